"""How candidates become edits: one pair a method, its binding to a model and its maths."""
