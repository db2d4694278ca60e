"""What an edit costs in what the search does not measure: benchmarks, and edits beside each other."""
