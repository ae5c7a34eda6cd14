"""Where a run stands and why it waits: the driver writes ``status.json``, ``opd-ray status`` and the log explain it.

Nothing here imports Ray or torch: the command has to answer at once, also where the cluster is gone.
"""

from opd_ray.status.reasons import StallWatch, driver_alive, explain, silence
from opd_ray.status.state import (
    FILE,
    MOST_CALLS,
    STALE_S,
    WRITE_EVERY_S,
    CallStatus,
    Phase,
    Place,
    RoomStatus,
    Status,
    oldest_calls,
    read,
    write,
)

__all__ = [
    "FILE",
    "MOST_CALLS",
    "STALE_S",
    "WRITE_EVERY_S",
    "CallStatus",
    "Phase",
    "Place",
    "RoomStatus",
    "StallWatch",
    "Status",
    "driver_alive",
    "explain",
    "oldest_calls",
    "read",
    "silence",
    "write",
]
