"""What a text states as its answer, and that answer in one spelling. Knows no rows, no models and no gold answers."""
