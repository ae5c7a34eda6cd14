"""jobs/bench_loop.py and what it compares with: the formula of the ideal, and what the stages alone are given. The
measurement itself is what the job is for."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from itertools import islice
from threading import Event, Thread
from types import SimpleNamespace

import bench_loop
import pytest
from bare_stages import Bare, Work, _process, _Stage, _work, again, as_actor, check, ideal, under_way
from click.testing import CliRunner

from opd_ray import config as configs
from opd_ray.errors import InputError, RunError


def test_the_cores_are_the_ideal_where_the_stages_share_them() -> None:
    """Two cores, 1 ms of them for a token in all: no stage alone takes as long as half of that."""
    bare = {"generate": Bare(0.4e-3, 0.4e-3, 0.5e-3), "teacher": Bare(0.3e-3, 0.3e-3, 0.4e-3)}
    best = ideal(bare | {"learn": Bare(0.3e-3, 0.3e-3, 0.35e-3)}, {"generate": 1, "teacher": 1, "learn": 1}, 2)
    assert (best.tokens_per_s, best.beside_tokens_per_s) == (pytest.approx(2000), pytest.approx(1600))
    assert (best.slowest, best.slowest_tokens_per_s) == ("generate", pytest.approx(2500))


@pytest.mark.parametrize(("generators", "rate"), [(1, 1000), (3, 2500)])
def test_the_slowest_stage_with_all_its_workers_is_the_ideal_where_cores_are_left(generators: int, rate: float) -> None:
    """A stage may wait for a device, and then takes more time than core-seconds."""
    bare = {"generate": Bare(0.2e-3, 1e-3, 0.3e-3), "learn": Bare(0.1e-3, 0.4e-3, 0.2e-3)}
    best = ideal(bare, {"generate": generators, "learn": 1}, 16)
    assert (best.tokens_per_s, best.beside_tokens_per_s) == (pytest.approx(rate), pytest.approx(rate))


def test_an_engine_that_is_full_has_long_responses_more_often_and_at_any_of_their_tokens() -> None:
    short, long = ([1], [2] * 10), ([3], [4] * 30)
    rows = under_way([short, long], 4000)
    first = Counter(prompt[0] for prompt, _ in rows)
    assert first[3] / first[1] == pytest.approx(3, rel=0.15)
    left = [left for prompt, left in rows if prompt[0] == 3]
    assert {len(prompt) - 1 + left for prompt, left in rows if prompt[0] == 3} == {30}
    assert (min(left), max(left)) == (1, 30)
    assert sum(left) / len(left) == pytest.approx(15.5, abs=1)


def test_responses_come_again_with_other_prompts_of_the_same_length() -> None:
    given = list(islice(again([([1, 2, 3], [9] * 5), ([4], [9])]), 6))
    assert given == [([1, 2, 3], 5), ([4], 1), ([2, 3, 1], 5), ([4], 1), ([3, 1, 2], 5), ([4], 1)]


def test_stages_that_cannot_be_had_alone_are_refused() -> None:
    served = configs.load(None, ["teacher.url=http://there:8000", "evaluation.num_problems=0"])
    with pytest.raises(InputError, match=r"teacher\.url=.* is a server"):
        check(served)
    golden_alone = ["buffer.prompts_per_step=0", "buffer.golden_per_step=32", "loss.student.coef=0"]
    imitating = configs.load(None, [*golden_alone, "loss.reference.coef=0", "evaluation.num_problems=0"])
    with pytest.raises(InputError, match="the run has none"):
        check(imitating)


def test_a_stage_whose_process_ends_is_told_in_one_line() -> None:
    with (
        pytest.raises(RunError, match="stage learn by itself: its process ended with 3"),
        _process("learn", os._exit, 3),
    ):
        raise AssertionError("it has no figures")


def test_a_stage_works_alone_then_beside_others_until_these_have_their_figures_or_nobody_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever began it may be killed: it took a core for ever."""
    monkeypatch.setattr("bare_stages._MEASURED_S", 0.001)
    ours, theirs = multiprocessing.Pipe()
    done = Event()
    process = Thread(target=_work, args=(theirs, lambda: Work(done.set, 2.0, ["scored"]), ()), daemon=True)
    process.start()
    stage = _Stage("teacher", ours, process)
    assert stage.answers == ["scored"] and min(stage.alone) >= 0
    stage.go_on()
    assert min(stage.hear()) >= 0
    done.clear()
    assert done.wait(10), "it stopped before the others had their figures"
    ours.close()
    process.join(10)
    assert not process.is_alive()


def test_modes_differ_in_their_staleness_alone() -> None:
    modes = [configs.load(None, each) for each in bench_loop._modes("0, 1,4")]
    assert [each.buffer.max_staleness for each in modes] == [0, 1, 4]
    assert bench_loop._modes(None) == [[]]


def test_a_stage_alone_has_threads_and_environment_of_its_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes its threads from the environment alone, which is that of whoever started the bench."""
    told = []
    monkeypatch.setattr("torch.set_num_threads", told.append)
    monkeypatch.setattr("os.environ", {"OMP_NUM_THREADS": "1"})
    as_actor(2.0, {"VLLM_SETTING": 3})
    assert os.environ == {"OMP_NUM_THREADS": "2", "VLLM_SETTING": "3"} and told == [2]


def test_cores_are_those_that_the_run_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two of many, by `taskset`, the ideal was that of all, and what the others did nobody's work."""
    times = [SimpleNamespace(idle=idle, iowait=0.5) for idle in (1.0, 10.0, 100.0)]
    monkeypatch.setattr("psutil.cpu_times", lambda percpu: times)
    monkeypatch.setattr("psutil.Process.cpu_affinity", lambda _: [0, 2], raising=False)
    assert bench_loop._core_seconds()[0, "idle"] == 102.0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--row", "2", "--config", "mine.yaml"], "--row 2 brings its own configuration"),
        (["--row", "5"], "'5' is not one of '1', '2', '3', '4'"),
        (["--staleness", "0,x"], "max_staleness"),
        (["--staleness", ""], "max_staleness"),
        (["--ideal", "teacher.url=http://there:8000"], "is a server"),
    ],
)
def test_wrong_input_is_refused_before_anything_starts(
    arguments: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_loop, "measure", lambda modes, *rest: bench_loop.bare_stages.check(modes[0]))
    done = CliRunner().invoke(bench_loop.main, arguments)
    assert done.exit_code == 2
    assert reason in done.output
