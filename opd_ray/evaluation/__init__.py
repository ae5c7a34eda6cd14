"""Held-out problems: the generators answer them, every verdict is kept, and two checkpoints are compared by them.

evaluate    asks the generators
verdicts    a row for each answer, as a table and as a file; paired differences
scores      what a table of verdicts says in numbers
table       the numbers for people
"""
