"""Several arms from the same students, and whether they show what was expected."""
