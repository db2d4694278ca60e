"""Talk to trials of a run: the original and its edits as rows of one stack, streamed from one pass."""
