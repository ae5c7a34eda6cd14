"""Is a cluster fit for a run? Asked before the first one, on nodes that nobody knows yet.

inspector   what runs on the nodes: small actors that look at their node, talk to another, or hold an engine
checks      what is asked of them, each check with a deadline
findings    what the answers mean, and what to do about them; pure
"""
