"""A live model: where its writers are, and its forward pass, whole or in parts."""
