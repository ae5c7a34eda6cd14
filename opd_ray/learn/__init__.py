"""LEARN: from a step's rollouts to the next weights."""
