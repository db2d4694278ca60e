"""Edits folded into checkpoints and adapters, and their upload."""
