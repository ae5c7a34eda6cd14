"""What this worker is at, kept while somebody collects it: ``--trace``.

A worker has one lane, in which one thing happens at a time: what begins within another cuts that in two. Where nobody
has asked for a minute nothing is kept, and a span costs a look at the clock.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from opd_ray.messages import Span, Spans

_AWAKE_S = 60.0
"""How long spans are kept after somebody has asked for them."""
_MOST = 20_000
"""Spans that are kept until somebody asks; then the oldest are dropped."""
SEAM_S = 0.005
"""Two spans of a kind with no more between them are one: an engine makes a hundred steps a second."""
_LEAST_S = 2e-5
"""What takes less is left out, as what is before the first thing within."""
_NOTHING = nullcontext()
_Method = TypeVar("_Method", bound=Callable[..., Any])

_lock = threading.Lock()
_kept: deque[Span] = deque(maxlen=_MOST)
_awake_until = 0.0
_here = threading.local()


def span(kind: str, **facts: float) -> AbstractContextManager[Any]:
    """Its block is one span, or goes on with the one before."""
    return _Timed(kind, facts) if time.monotonic() < _awake_until else _NOTHING


def spanned(kind: str) -> Callable[[_Method], _Method]:
    """A function of which every call is a span."""

    def around(function: _Method) -> _Method:
        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            with span(kind):
                return function(*args, **options)

        return timed

    return around


def collect() -> Spans:
    """What was kept since it was asked for last; from now on spans are kept for a minute."""
    global _awake_until
    with _lock:
        now = time.monotonic()
        _awake_until = now + _AWAKE_S
        found = tuple(_kept)
        _kept.clear()
    return Spans(now, found)


def joined(before: Span, after: Span) -> Span | None:
    """Both as one span, where the one goes on with the other."""
    seam = after.began_s - before.began_s - before.lasted_s
    if (before.kind, before.facts) != (after.kind, after.facts) or seam > SEAM_S:
        return None
    return before._replace(lasted_s=after.began_s + after.lasted_s - before.began_s)


class _Timed:
    def __init__(self, kind: str, facts: dict[str, float]) -> None:
        self._kind, self._facts = kind, facts
        self._began = 0.0
        self._around: _Timed | None = None

    def __enter__(self) -> None:
        self._around, _here.innermost = getattr(_here, "innermost", None), self
        self._began = time.monotonic()
        if self._around is not None:
            self._around._keep(self._began)

    def __exit__(self, *_: object) -> None:
        now = time.monotonic()
        self._keep(now)
        if self._around is not None:
            self._around._began = now
        _here.innermost = self._around

    def _keep(self, end: float) -> None:
        if end - self._began < _LEAST_S:
            return
        new = Span(self._kind, self._began, end - self._began, self._facts)
        with _lock:
            whole = joined(_kept[-1], new) if _kept else None
            if whole is not None:
                _kept[-1] = whole
            else:
                _kept.append(new)
