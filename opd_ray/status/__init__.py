"""Where a run stands and why it waits: the driver writes ``status.json``, ``opd-ray status`` and the log explain it.

Nothing here imports Ray or torch: the command has to answer at once, also where the cluster is gone.
"""
