"""Verdicts that hang, die or eat memory: each is given up by itself, and the others do not notice."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hostile_task import Hostile, Unloadable
from opd_ray.errors import RunError
from opd_ray.tasks import get_task, judge
from opd_ray.tasks.judge import Judge

PARENT = """
import sys
from hostile_task import Hostile
from opd_ray.tasks.judge import Judge
if True:  # no __main__ guard: a second run of this script would start judges without end
    Judge(Hostile()).ask("verify", [("hang_known", {"part": sys.argv[1] + ".part", "pids": sys.argv[1]})])
"""


@pytest.mark.slow
def test_answers_keep_their_order_and_whatever_goes_wrong_costs_one_verdict() -> None:
    """The bug: one answer that sympy holds the GIL for ended the heartbeat of its generator, and then the run."""
    bad = ["sleep", "hold_the_gil", "die", "eat_memory", "raise", "say_exit"]
    with Judge(Hostile()) as judging:
        began = time.monotonic()
        answers = [each for reason in bad for each in ("right", reason, "wrong")]
        assert judging.ask("verify", [(answer, {}) for answer in answers]) == [True, None, False] * len(bad)
        assert time.monotonic() - began < 20
        assert asyncio.run(judging.verify([("wrong", {}), ("die", {}), ("right", {})])) == [False, None, True]


def test_verdicts_of_one_call_are_given_side_by_side(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    with Judge(Hostile()) as judging:
        judging.ask("verify", [("right", {})] * 8)
        assert judging.ask("verify", [("meet", {"files": (one, two)}), ("meet", {"files": (two, one)})]) == [True] * 2


@pytest.mark.slow
def test_a_process_that_is_stopped_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "_GRACE_S", 0.5)
    monkeypatch.setattr(judge, "_PROCESSES", 1)
    with Judge(Hostile()) as judging:
        assert judging.ask("verify", [("stop", {}), ("right", {})]) == [None, True]
        assert len(judging._all) == 1


def test_closing_ends_what_is_asked(tmp_path: Path) -> None:
    async def scenario() -> None:
        judging = Judge(Hostile())
        row = {"part": str(tmp_path / "part"), "pids": str(tmp_path / "pids")}
        asked = asyncio.create_task(judging.verify([("hang_known", row)] + [("sleep", {})] * 20))
        await asyncio.to_thread(wait_for, (tmp_path / "pids").exists)
        judging.close()
        assert await asyncio.wait_for(asked, 10) == [None] * 21

    asyncio.run(scenario())


@pytest.mark.slow
def test_no_process_outlives_its_parent(tmp_path: Path) -> None:
    """Not even one whose verdict holds the GIL, so that it cannot see that its parent is gone."""
    script, pids = tmp_path / "parent.py", tmp_path / "pids"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, str(script), str(pids)], env=environment)
    try:
        wait_for(pids.exists)
    finally:
        parent.kill()
        parent.wait()
    for pid in pids.read_text().split():
        wait_for(lambda pid=pid: gone(pid))


def test_a_task_that_cannot_load_says_why() -> None:
    with (
        Judge(Unloadable()) as judging,
        pytest.raises(RunError, match="could not start Unloadable: ImportError: no such library"),
    ):
        judging.ask("verify", [("right", {})])


def test_a_cheap_task_is_asked_in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "_Process", None)
    with Judge(get_task("chain")) as judging:
        row = {"prompt": "1=", "answer": "1"}
        assert asyncio.run(judging.verify([("#1", row), ("#2", row)])) == [True, False]
        assert judging.ask("reads", [("1",)]) == [True]


def wait_for(condition) -> None:
    """Waits for what another process does, with a deadline."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def gone(pid: str) -> bool:
    """Has it ended? One that nobody has collected yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
