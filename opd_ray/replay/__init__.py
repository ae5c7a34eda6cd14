"""A step of a run once more, from what the run left behind: ``opd-ray replay``.

    logged      the rollouts and coefficients of a step, from the rollout log and metrics.jsonl
    student     the weights before it: a checkpoint's, or the student's own, and the logged steps after them taken again
    step        its loss and gradient under a configuration, token by token
    show        two configurations side by side, in the terminal and for the report's viewer

Teachers and the reference score again what they scored then. Nothing here needs Ray.
"""
