"""A page on this machine alone: runs as they search, their points talked to, exports, new runs."""
