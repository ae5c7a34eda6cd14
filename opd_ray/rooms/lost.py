"""Work whose payloads may be gone with a node."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from opd_ray.errors import PayloadLost, RunError

_MOST_REPAIRS = 10
"""How often in a row what a node took with it is made again before the cause must be another."""
_T = TypeVar("_T")


async def until_whole(what: str, make: Callable[[], Awaitable[_T]], tell: Callable[[str], None]) -> _T:
    """What ``make`` returns; it begins again, and ``tell`` says so, when a payload that belongs to ``what`` is gone."""
    for _ in range(_MOST_REPAIRS):
        try:
            return await make()
        except PayloadLost as error:
            tell(f"{what}; they are got anew: {error}")
            last = error
    raise RunError(f"{what} were lost {_MOST_REPAIRS} times in a row, the last: {last}")
