"""Drivers that die, and what their runs are worth afterwards: `kill -9`, SIGTERM, a full disk, damaged checkpoints.

Where only the runtime is under test, engines and learner are fakes (fake_run.py, fake_learner.py); the rest, the Ray
included, is real. Everything that a test says about a run comes from what is on the disk.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

import fake_run
from autoscaling_head import AutoscalingHead, autoscaling_head, fake_cluster
from fake_run import FULL, POINTS, Driver, Drivers
from fake_server import FakeServer, serving, table
from killed_runs import (
    LR,
    PROMPTS_PER_STEP,
    Run,
    check_exactly_once,
    check_model,
    check_nothing_is_left_over,
    check_start,
    check_tensorboard,
)
from opd_ray.status.reasons import explain
from opd_ray.status.state import FILE, read
from opd_ray.tasks.chain import draw_distinct, to_row

pytestmark = pytest.mark.ray
NUM_PROMPTS = 16
"""An epoch is four steps."""
FAKE = [
    *("data.golden=null", "buffer.golden_per_prompt=0", "loss.golden.coef=0", "loss.reference.coef=0"),
    *("guard.level=off", "evaluation.num_problems=0", "evaluation.every_steps=0"),
    *(f"buffer.prompts_per_step={PROMPTS_PER_STEP}", "rollout.prompts_per_call=2", "rollout.max_response_tokens=8"),
    *(f"learner.lr={LR}", "metrics.rollout_log_every_steps=1"),
    *("checkpoint.every_steps=2", "checkpoint.keep=2", "checkpoint.memory_every_steps=0"),
]


@pytest.fixture(scope="module")
def head() -> Iterator[AutoscalingHead]:
    """A Ray whose workers know the fakes, and that stays when drivers die."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(fake_run.__file__).parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        with autoscaling_head(fake_cluster({}, head={"CPU": 4})) as head:
            yield head


@pytest.fixture(autouse=True)
def _head_is_there(head: AutoscalingHead) -> Iterator[None]:
    """A test that fails because the others' Ray has ended says so."""
    head.check()
    yield
    head.check()


@pytest.fixture(scope="module")
def drivers(head: AutoscalingHead, preloaded_job: dict[str, str]) -> Iterator[Drivers]:
    with Drivers(head.environment | preloaded_job | {"FAKE_KEY": "s3cret"}) as drivers:
        yield drivers


@pytest.fixture(scope="module")
def small_world(world, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name the world's models, and so few prompts that a run sees each of them often."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    problems = draw_distinct(random.Random(1), "train", NUM_PROMPTS)
    prompts.write_text("".join(json.dumps(to_row(problem)) + "\n" for problem in problems))
    return [*world.overrides(), f"data.prompts={prompts}", *FAKE]


# ---- kills ----


def plan_of_kills(rng: random.Random) -> list[dict[str, Any]]:
    """Eleven where something is half done, nine at any time after a number of steps; one takes all workers with it."""
    at_points = [
        {"point": "started", "delay_s": rng.uniform(0, 3)},
        {"point": "restoring", "delay_s": rng.uniform(0, 0.05)},
        {"point": "training", "passing": rng.randint(1, 4), "delay_s": rng.uniform(0, 0.01)},
        {"point": "broadcasting", "passing": rng.randint(2, 4), "delay_s": rng.uniform(0, 0.005)},
        {"point": "logged", "passing": rng.randint(1, 4)},
        {"point": "part written", "passing": 1},
        {"point": "part written", "passing": rng.randint(2, 6)},
        {"point": "sealing", "passing": rng.randint(1, 2)},
        {"point": "sealed", "passing": rng.randint(1, 2)},
        {"point": "pruning"},
    ]
    anywhere = [{"steps": rng.randint(1, 4), "delay_s": rng.uniform(0, 0.3)} for _ in range(8)]
    anywhere[0]["whole_job"] = True
    rng.shuffle(kills := at_points + anywhere)
    return [{"steps": 5, "delay_s": 0.0}, *kills, {"point": "exporting"}]


def kill(run: Run, how: dict[str, Any], head: AutoscalingHead) -> None:
    """Starts a driver and kills it."""
    head.check()
    if "point" in how:
        driver = run.start(kill=how)
        assert driver.wait() == -signal.SIGKILL, f"{how}: {driver.printed()}"
        return
    before = len(run.metrics())
    driver = run.start()
    driver.wait_until(lambda: len(run.metrics()) >= before + how["steps"])
    assert len(run.metrics()) >= before + how["steps"], f"{how}: it ended by itself: {driver.printed()}"
    time.sleep(how["delay_s"])
    kill_job(head, driver) if "whole_job" in how else driver.signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL, f"{how}: {driver.printed()}"


def kill_job(head: AutoscalingHead, driver: Driver) -> None:
    """kill -9 of a driver and of all workers of this Ray, at once."""
    workers = [
        process
        for raylet in head.raylets().values()
        for process in raylet.children(recursive=True)
        if not process.name().endswith("Agent")  # a raylet dies with its agents
    ]
    driver.signal(signal.SIGKILL)
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


@pytest.mark.timeout(1200)
def test_twenty_kills_of_the_driver_lose_and_repeat_no_prompt(head, drivers, small_world, tmp_path):
    """Each start goes on from the newest complete checkpoint; the final weights are those of the rollout log, in which
    every prompt of every epoch stands once."""
    run = Run(drivers, tmp_path / "run", *small_world, "learner.steps=1000")
    kills = plan_of_kills(random.Random(20))
    assert len(kills) == 20
    assert {how.get("point") for how in kills} == {*POINTS, None}
    for how in [*kills, None]:
        noted, complete = len(run.journal()), run.complete()
        if how is kills[-1]:  # which comes when all steps are done
            steps = complete + 8
            run.overrides.append(f"learner.steps={steps}")
        kill(run, how, head) if how else run.finish()
        check_start(run, noted, complete)
    assert run.complete() == steps
    check_exactly_once(run.rollouts(), PROMPTS_PER_STEP, NUM_PROMPTS, max_staleness=2)
    check_model(run)
    check_tensorboard(run, steps)
    check_nothing_is_left_over(run)
    summary = json.loads((run.directory / "summary.json").read_text())
    tokens = sum(len(row["response_tokens"]) for rows in run.rollouts() for row in rows)
    assert (summary["steps"], summary["trained_tokens"]) == (steps, tokens)


# ---- signals, and the same losses ----

STEPS = 12
SYNCHRONOUS = ["buffer.max_staleness=0", f"learner.steps={STEPS}"]


@pytest.fixture(scope="module")
def undisturbed(drivers, small_world, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run; what a test changes in it is a copy."""
    run = Run(drivers, tmp_path_factory.mktemp("undisturbed") / "run", *small_world, *SYNCHRONOUS)
    run.finish()
    check_model(run)
    return run


@pytest.mark.timeout(600)
def test_a_run_that_was_ended_by_a_signal_and_then_killed_is_the_same_run(
    undisturbed, head, drivers, small_world, tmp_path
):
    """On SIGTERM the step under way is saved and the exit code is 143. After that, and after a kill, losses, rollouts
    and weights of a synchronous run are bit for bit those of one that nobody touched."""
    run = Run(drivers, tmp_path / "run", *small_world, *SYNCHRONOUS)
    driver = run.start("checkpoint.every_steps=100")
    driver.wait_until(lambda: len(run.metrics()) >= 3)
    driver.signal(signal.SIGTERM)
    assert driver.wait() == 143, driver.printed()
    trained = [line["trained"] for line in run.journal() if "trained" in line]
    saved = run.complete()
    assert trained == list(range(1, saved + 1)), "what was trained is saved"
    said = [line for line in driver.printed().splitlines() if line.startswith("opd-ray: ")]
    assert len(said) == 1
    assert f"ended by a signal after step {saved}; the checkpoint of step {saved} is written" in said[0]

    noted = len(run.journal())
    kill(run, {"point": "broadcasting", "passing": 4}, head)
    check_start(run, noted, saved)
    noted, complete = len(run.journal()), run.complete()
    run.finish()
    check_start(run, noted, complete)
    assert run.losses() == undisturbed.losses()
    assert run.rollouts() == undisturbed.rollouts()
    check_exactly_once(run.rollouts(), PROMPTS_PER_STEP, NUM_PROMPTS, max_staleness=0)
    check_model(run)


# ---- what cannot be written or read ----


@pytest.mark.timeout(600)
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(drivers, small_world, tmp_path):
    """The message names the file; as soon as there is space, the run goes on from the last checkpoint."""
    run = Run(drivers, tmp_path / "run", *small_world, "learner.steps=1000")
    driver = run.start()
    driver.wait_until(lambda: run.complete() >= 2)
    (run.directory / FULL).touch()
    assert driver.wait() == 1, driver.printed()
    complete = run.complete()
    said = [line for line in driver.printed().splitlines() if line.startswith("opd-ray: ")]
    assert len(said) == 1
    assert f"{run.checkpoints}/step-{complete + 2}/learner-0-of-1." in said[0]
    assert "cannot be written: no space is left (No space left on device)" in said[0]
    (run.directory / FULL).unlink()
    noted = len(run.journal())
    run.finish(f"learner.steps={complete + 4}")
    check_start(run, noted, complete)
    check_exactly_once(run.rollouts(), PROMPTS_PER_STEP, NUM_PROMPTS, max_staleness=2)
    check_model(run)
    check_nothing_is_left_over(run)


def cut_learner_file(run: Run) -> None:
    [part] = (run.checkpoints / f"step-{STEPS}").glob("learner-*")
    part.write_bytes(part.read_bytes()[:-1])


def another_run(run: Run) -> None:
    """The run directory is new, but its checkpoints are those of a run with another seed."""
    (run.directory / "config.yaml").unlink()


def nothing(run: Run) -> None:
    pass


REFUSALS = [
    (cut_learner_file, [], r"step-12/learner-0-of-1\..* has \d+ bytes, expected \d+ bytes; delete .* from step 10"),
    (another_run, ["seed=1"], "seed is 1, but the checkpoint .*step-12 has 0; continue it with seed=0"),
    (nothing, ["student.path={teacher}"], "student.path is .*teacher, but the run in .*student"),
]


@pytest.mark.parametrize(("spoil", "more", "says"), REFUSALS, ids=lambda value: getattr(value, "__name__", None))
def test_a_run_that_cannot_go_on_is_refused_in_one_line(
    undisturbed, drivers, world, tmp_path, spoil: Callable[[Run], None], more: list[str], says: str
):
    """Exit code 2 before anything starts, and no file is touched."""
    run = Run(drivers, tmp_path / "run")
    shutil.copytree(undisturbed.directory, run.directory)
    run.overrides = [*undisturbed.overrides[:-1], *run.overrides]
    spoil(run)
    before = contents(run.directory)
    driver = run.start(*(each.format(teacher=world.teacher) for each in more))
    assert driver.wait() == 2, driver.printed()
    [line] = driver.printed().splitlines()
    assert line.startswith("opd-ray: ")
    assert re.search(says, line), line
    assert contents(run.directory) == before


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# ---- a teacher behind servers ----


@pytest.mark.timeout(300)
def test_a_server_swapped_for_another_model_is_out_within_a_step_and_without_any_the_run_ends(
    drivers, world, small_world, tmp_path
):
    """Two replicas over HTTP, their key in the driver's environment. One gets another model: it is put out and named.
    When the other is gone as well, the run says what it waits for, and ends by its deadline with both URLs."""
    tokenizer = AutoTokenizer.from_pretrained(world.student)
    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(serving(FakeServer(key="s3cret"))) for _ in range(2))
        for each in (one, two):
            each.table = table(0, vocab_size=64)  # the model's; the tokenizer has fewer
            each.words = [tokenizer.decode([token]) for token in range(len(tokenizer))]
        teacher = [f"teacher.url=[{one.url},{two.url}]", "teacher.url_key_env=FAKE_KEY", "deadlines.score_s=6"]
        run = Run(drivers, tmp_path / "run", *small_world, *teacher, "learner.steps=100000")
        driver = run.start()
        driver.wait_until(lambda: len(run.metrics()) >= 3)
        assert one.scored() and two.scored()

        one.table, asked = table(1, vocab_size=64), len(one.asked)
        driver.wait_until(lambda: run.events("server_out"))
        [out] = run.events("server_out")
        assert out["url"] == one.url and f"{one.url} answers as another model" in out["text"]
        # The call under way and the one that finds out: two prompts with one response, a second opinion, the probe.
        assert len(one.asked) - asked <= 2 * (2 + 1 + 1)
        asked = len(one.asked)

        two.fail = lambda path: (503, {"error": {"message": "shutting down"}})
        driver.wait_until(lambda: "0 of 2 servers in use" in explain(read(run.directory / FILE)))
        assert re.search("room teacher: teacher-scorer-0 .*shutting down", explain(read(run.directory / FILE)))
        assert driver.wait() == 1, driver.printed()
        assert len(one.asked) == asked
        [line] = [line for line in driver.printed().splitlines() if line.startswith("opd-ray: ")]
        assert re.search(f"no scores in time.*{one.url} answers as another model.*{two.url}.*503 .shutting down", line)
    written = b"".join(contents(run.directory).values()) + driver.printed().encode()
    assert b"s3cret" not in written and b"FAKE_KEY" in written


# ---- the real engines and the real learner ----


@pytest.mark.vllm
@pytest.mark.deepspeed
@pytest.mark.timeout(600)
def test_a_real_run_goes_on_after_a_kill_on_another_number_of_ranks_and_another_engine(drivers, world, tmp_path):
    """vLLM and DeepSpeed, ZeRO-2 on two ranks: the driver dies in the middle of a step. The torch engine and one rank
    with ZeRO-1 bring the run to its end."""
    steps = 6
    run = Run(
        drivers,
        tmp_path / "run",
        *world.overrides(),
        *("buffer.prompts_per_step=8", "rollout.max_response_tokens=24", "rollout.max_num_seqs=16"),
        "metrics.rollout_log_every_steps=1",
        *("evaluation.num_problems=0", "evaluation.every_steps=0", "loss.reference.coef=0"),
        "guard.level=off",  # it would take alarm at random models, and the newest checkpoint without one is spared
        *("checkpoint.every_steps=2", "checkpoint.memory_every_steps=0", f"learner.steps={steps}"),
        fakes=False,
    )
    ranks = ["learner.num_ranks=2", "learner.zero_stage=2"]
    driver = run.start(*ranks, "rollout.engine=vllm", kill={"point": "training", "passing": 5, "delay_s": 0.02})
    assert driver.wait() == -signal.SIGKILL, driver.printed()
    complete, noted = run.complete(), len(run.metrics())
    assert complete in (2, 4)  # that of step 2 is written before that of step 4 begins
    run.finish("learner.num_ranks=1", "learner.zero_stage=1", "rollout.engine=torch")
    assert [line["step"] for line in run.metrics()[noted:]] == list(range(complete + 1, steps + 1))
    check_exactly_once(run.rollouts(), 8, 64, max_staleness=2)
    check_nothing_is_left_over(run)
    assert len(run.losses()) == steps
    assert (run.directory / "student" / "model.safetensors").is_file()
