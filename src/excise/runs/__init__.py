"""Whole jobs: a run from its settings to its artifacts, and what is done with it later."""
