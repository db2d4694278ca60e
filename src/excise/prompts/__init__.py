"""From prompt files and templates to batches of token ids."""
