"""Structured logs: JSON lines of every worker, and the driver's own events.

Workers log through the standard library; Ray writes what they log as JSON lines into the session's log directory,
where `ray logs` and the dashboard find them. A line of :func:`get`'s loggers names time, level, logger, actor, room,
node, job, step, version and message (keys ``asctime``, ``levelname``, ``name``, ``actor_name``, ``room``, ``node``,
``job_id``, ``step``, ``version``, ``message``; Ray adds ids). The driver's console stays for people: what happens in
the driver besides steps is one :class:`Events` line there and one JSON line in ``events.jsonl``.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import MutableMapping
from typing import Any

import ray
from ray.job_config import JobConfig

from opd_ray.rooms.node import this_node

ROOM_VARIABLE = "OPD_RAY_ROOM"
"""Environment variable by which a worker knows its room."""


def job_config() -> JobConfig:
    """For ``ray.init(job_config=...)``: workers log JSON lines from INFO on; the driver's own logging stays."""
    config = JobConfig()
    config.set_py_logging_config(ray.LoggingConfig(encoding="JSON", additional_log_standard_attrs=["name"]))
    return config


def get(name: str) -> Log:
    """The logger of a module: ``log = logs.get(__name__)``."""
    return Log(logging.getLogger(name), {})


def at(**fields: Any) -> None:
    """Where this process stands from now on (``step``, ``version``): part of all that its loggers write."""
    _here().update(fields)


class Log(logging.LoggerAdapter):
    """A logger whose lines carry fields: those of the process, and ``extra`` of the call."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**_here(), **(kwargs.get("extra") or {})}
        return msg, kwargs


@functools.cache
def _here() -> dict[str, Any]:
    """Where a process is all its life, and what ``at`` adds."""
    room = os.environ.get(ROOM_VARIABLE)
    return {"node": this_node()} | ({"room": room} if room else {})
