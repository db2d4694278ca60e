"""Candidates in, evidence out; it knows no method and no scorer."""
