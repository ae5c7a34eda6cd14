"""Prompts, golden solutions and held-out problems: read and checked."""
