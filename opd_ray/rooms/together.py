"""Calls that belong together, and calls that are made again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from opd_ray.errors import PayloadLost, RunError, first_failure

_MOST_REPAIRS = 10
"""How often in a row what a node took with it is made again before the cause must be another."""
_T = TypeVar("_T")


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


async def until_whole(what: str, make: Callable[[], Awaitable[_T]], tell: Callable[[str], None]) -> _T:
    """What ``make`` returns; it begins again, and ``tell`` says so, when a payload that belongs to ``what`` is gone."""
    for _ in range(_MOST_REPAIRS):
        try:
            return await make()
        except PayloadLost as error:
            tell(f"{what}; they are got anew: {error}")
            last = error
    raise RunError(f"{what} were lost {_MOST_REPAIRS} times in a row, the last: {last}")
