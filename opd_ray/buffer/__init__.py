"""BUFFER: which prompts are under way, and what a step trains on."""
