"""Who looks at a run: metrics, log of rollouts, events, guard."""
