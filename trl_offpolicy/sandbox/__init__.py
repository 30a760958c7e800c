"""Where code that nobody has read runs, and the two programs in there. Knows no rows and no verdicts."""
