"""Excise met with damaged, foreign and absurd input: `python -m fuzz`, seeded, each input judged.

Its own small readers and measurements judge what Excise says; it imports Excise only to run it.
"""
