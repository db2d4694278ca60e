"""Judges: what gives verdicts on responses, from a classifier to a server, and how far to believe each."""
