"""Checkpoints on disk, in whatever form they come, to a loaded model whose writers are proven."""
