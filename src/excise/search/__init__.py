"""The study: trials asked, measured, scored, kept, and the front that they make."""
