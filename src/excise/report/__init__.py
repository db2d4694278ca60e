"""A record read, checked and shown: card, pages, tables. None of it loads torch."""
