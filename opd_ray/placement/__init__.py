"""Which actors run where, and who takes the place of the dead."""
