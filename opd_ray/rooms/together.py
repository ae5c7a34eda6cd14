"""Several calls at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from opd_ray.errors import first_failure


async def together(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    """The outcomes of all. The first failure ends the others, and is then raised as it is.

    asyncio.gather leaves the others running: what a caller began again, they were still at, and what they did to
    rooms and counts came when nobody expected it.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as failures:
        failure = first_failure(failures)
    else:
        return [task.result() for task in tasks]
    raise failure  # out here it keeps its cause
