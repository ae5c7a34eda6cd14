"""What is made for Ray is made once: Ray keeps the keys of each function and class for as long as it runs."""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from opd_ray.placement import launch
from opd_ray.rooms.memory import HEAP, KERNEL_CACHES
from opd_ray.snapshots import calls


class Made:
    """What ray.remote() makes."""

    def options(self, **given: object) -> Made:
        self.given = given
        return self

    def remote(self, *args: Any) -> Any:
        if not args:
            return object()
        function, _, *rest = args
        answer: asyncio.Future = asyncio.get_running_loop().create_future()
        answer.set_result(function(*rest))
        return answer, None


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., Any]]:
    """Of what it has been asked to make something."""
    made: list[Callable[..., Any]] = []
    monkeypatch.setattr(calls.ray, "remote", lambda function: made.append(function) or Made())
    return made


def test_the_task_that_writes_is_made_once(made: list) -> None:
    """The bug: each file of each checkpoint made a remote function, and Ray's tables grew by its keys for good."""
    calls._task.cache_clear()

    async def scenario() -> list[int]:
        both = [calls.FileCalls(local=False, deadline_s=60.0) for _ in range(2)]
        return [await call(abs, -number) for number in range(3) for call in both]

    try:
        assert asyncio.run(scenario()) == [0, 0, 1, 1, 2, 2]
    finally:
        calls._task.cache_clear()
    assert len(made) == 1


def test_the_class_of_an_actor_is_made_once_for_all_its_restarts(made: list) -> None:
    """The bug: each replacement of a worker made the class anew, and Ray kept them all."""
    spawn = launch._spawning("generate", "generator", partial(object), {"num_cpus": 1}, {})
    assert [spawn(0, restart).name for restart in range(3)] == [
        "generator-0",
        "generator-0-again-1",
        "generator-0-again-2",
    ]
    assert made == [object]


def test_an_actor_gets_the_users_environment_before_what_it_has_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    actor_class = Made()
    monkeypatch.setattr(launch.ray, "remote", lambda _: actor_class)
    env = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": 4}
    launch._spawning("generate", "generator", partial(object), {"num_cpus": 1}, env)(0, 0)
    variables = actor_class.given["runtime_env"]["env_vars"]
    assert (variables["NCCL_DEBUG"], variables["OMP_NUM_THREADS"]) == ("INFO", "4")
    assert variables["TOKENIZERS_PARALLELISM"] == "false"
    assert variables.items() >= (KERNEL_CACHES | HEAP).items()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library reads other variables")
def test_what_an_actor_frees_comes_back_to_it_without_page_faults() -> None:
    """Four arrays of 4 MiB, made and freed together fifty times, as a layer's are: 4,096 pages of them each time."""
    work = "for _ in range(50): arrays = [numpy.ones(2**19) for _ in range(4)]; del arrays"
    tell = "resource.getrusage(resource.RUSAGE_SELF).ru_minflt"
    code = f"import numpy, resource\nbefore = {tell}\n{work}\nprint({tell} - before)"
    answer = subprocess.run([sys.executable, "-c", code], env=os.environ | HEAP, capture_output=True, check=True)
    assert int(answer.stdout) < 20_000  # 100,000 without
