"""A logged step again: which can be, what is refused, and what is shown. A real run's is in tests/ray/test_run.py."""

from __future__ import annotations

import asyncio
import json
import math
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from made_up_runs import make_rollouts, make_run, make_student, write_rollouts
from opd_ray import config as configs
from opd_ray.embedded.prepare import TEACHER_DIR
from opd_ray.errors import InputError
from opd_ray.replay import show
from opd_ray.replay.logged import coefficients, logged_steps, metrics_of, rollouts_of
from opd_ray.replay.step import Replayed, Scorers
from opd_ray.report.rollouts import Signals, of_step
from opd_ray.report.runs import read_run
from opd_ray.run import replay as replaying
from opd_ray.watch.observers import RolloutLog, StepReport

COEFFICIENTS = {"student": {"coef": 1.0}, "golden": {"coef": 0.1}, "reference": {"coef": 0.02}}


def run_of(path: Path, logged: list[int], checkpoints: tuple[int, ...] = (), **sections: Any) -> Path:
    """A run on the embedded teacher's files, with rollouts of some steps and (empty) checkpoints."""
    make_run(path, steps=12, logged_steps=logged, student=TEACHER_DIR)
    config = {
        "student": {"path": str(TEACHER_DIR)},
        "teacher": {"path": str(TEACHER_DIR)},
        "loss": COEFFICIENTS,
        "data": {"prompts": "nowhere.jsonl", "golden": "nowhere.jsonl", "task": "chain"},
        "evaluation": {"num_problems": 0},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config | sections))
    for step in checkpoints:
        (path / "checkpoints" / f"step-{step}").mkdir(parents=True)
        (path / "checkpoints" / f"step-{step}" / "state.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected one step=N of 1 or more, got none"),
        (["step=0"], "got step=0"),
        (["step=one"], "got step=one"),
        (["step=1", "step=2"], "expected one step=N"),
        (["step=1", "learner.lr=1"], "under another loss.* or guard.*, nothing else"),
        (["step=1", "loss.student.divergence=jsdd"], "loss.student.divergence"),
        (["step=4"], "step 4 of .*its rollouts are not in the log; steps that can be replayed: 1, 2, 3, 7, 8"),
        (["step=11"], "nothing leads to the weights before it"),
    ],
)
def test_what_cannot_be_replayed_is_refused_with_what_can(tmp_path: Path, arguments: list[str], said: str) -> None:
    """Steps 1 to 3 follow the beginning, 7 and 8 a checkpoint; before 11 is a gap."""
    run = run_of(tmp_path / "run", [1, 2, 3, 7, 8, 11], checkpoints=(6,))
    with pytest.raises(InputError, match=said):
        replaying.replay(run, arguments)


def test_a_bfloat16_run_is_replayed_behind_its_checkpoints_alone(tmp_path: Path) -> None:
    """Steps between would be taken with weights that lost the digits of their float32 masters."""
    learner = {"dtype": "bfloat16"}
    run = run_of(tmp_path / "run", [1, 2, 7, 8], checkpoints=(6,), learner=learner)
    with pytest.raises(InputError, match="steps that can be replayed: 1, 7. .*a smaller checkpoint.every_steps"):
        replaying.replay(run, ["step=8"])


def test_what_scored_with_weights_that_are_gone_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [1], reference={"update": "periodic", "update_every_steps": 2})
    with pytest.raises(InputError, match="reference.update=periodic: it scored with weights that are kept nowhere"):
        replaying.replay(run, ["step=1"])
    with pytest.raises(InputError, match="is no run directory"):
        replaying.replay(tmp_path, ["step=1"])


def rows_of(step: int) -> list[dict[str, Any]]:
    """As a run writes them."""
    more = {"slot": 5, "topk_ids": [], "privileged_prompt_tokens": [], "teacher": "teacher", "repetitive": True}
    return [row | more | {"tail_period": 2, "worker": "one"} for row in make_rollouts(step)]


def test_the_student_s_top_k_is_of_the_size_that_was_kept(tmp_path: Path) -> None:
    """The bug: another top_k was read, and those that were kept were compared all the same."""
    own = {"coef": 1.0, "divergence": "reverse_kl", "support": "student_top_k", "top_k": 8}
    run = run_of(tmp_path / "run", [1], loss=COEFFICIENTS | {"student": own})
    write_rollouts(run, 1, rows_of(1))
    with pytest.raises(InputError, match="top_k=16: the run kept its top 8: take loss.student.top_k=8, or teacher"):
        replaying.replay(run, ["step=1", "loss.student.top_k=16"])
    other = run_of(tmp_path / "other", [1])
    write_rollouts(other, 1, rows_of(1))
    with pytest.raises(InputError, match="the run kept no top-k of the student's: take teacher_top_k or full"):
        replaying.replay(other, ["step=1", "loss.student.support=student_top_k"])


def test_a_rollout_that_the_step_has_not_is_refused_before_a_model_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaying, "_pinned", None)
    run = run_of(tmp_path / "run", [1])
    write_rollouts(run, 1, rows_of(1))
    with pytest.raises(InputError, match="--rollout none: is none of the step's, as 1-golden, 1-loop"):
        replaying.replay(run, ["step=1"], "none")


def test_what_was_said_of_a_step_is_kept_for_another_loss_and_not_for_other_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug: steps that are taken again added up, and of a full vocabulary these are hidden states."""
    run, asked, said = run_of(tmp_path / "run", []), [], []

    async def score(rollouts: pa.RecordBatch, request: Any) -> tuple[None, pa.RecordBatch]:
        answer = pa.record_batch({"logprob": pa.array(range(len(rollouts)))})
        asked.append(rollouts["rollout_id"][0].as_py())
        said.append(weakref.ref(answer))
        return None, answer

    scorers, config = Scorers(), configs.load(run / "config.yaml", ["loss.reference.coef=0"])
    monkeypatch.setattr(scorers, "_asked", lambda role, scorer: SimpleNamespace(score=score))
    for step in (1, 2):
        write_rollouts(run, step, rows_of(step))
        for _ in ("as it was", "another loss"):
            scorers.score(config, rollouts_of(run, step)[:-1], (0,))  # the last is golden
    assert asked == ["1-right", "2-right"] and [each() is None for each in said] == [True, False]


def test_json_has_one_rollout_or_all_and_nothing_that_is_no_json(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [])
    write_rollouts(run, 3, rows_of(3))
    entries = rollouts_of(run, 3)
    tokens = {entry.meta.rollout_id: np.full((entry.meta.num_response_tokens, 4), math.nan) for entry in entries}
    found = replaying.Replay(run, "", 3, (), entries, {}, Replayed({"loss": math.nan}, tokens), None)
    plain = show.plain(found, None)
    assert "null" in json.dumps(plain, allow_nan=False) and len(plain["rollouts"]) == len(entries)
    assert [each["rollout_id"] for each in show.plain(found, "3-wrong")["rollouts"]] == ["3-wrong"]


def test_rollouts_that_were_gone_with_their_node_are_refused_and_others_are_as_they_were(tmp_path: Path) -> None:
    rows = rows_of(3)
    run = run_of(tmp_path / "run", [])
    write_rollouts(run, 3, rows)
    entries = rollouts_of(run, 3)
    assert [entry.meta.rollout_id for entry in entries] == [row["rollout_id"] for row in rows]
    assert entries[0].meta.slot == 5 and entries[0].meta.oldest_version == 3 and entries[4].meta.oldest_version == -1
    assert entries[3].meta.truncated and entries[3].rollouts["text"][3].as_py() == rows[3]["text"]
    write_rollouts(run, 4, [rows[0], rows[1] | {"response_tokens": []}])
    with pytest.raises(InputError, match="3-wrong was gone with its node"):
        rollouts_of(run, 4)
    write_rollouts(run, 5, [{name: value for name, value in rows[0].items() if name != "worker"}])
    with pytest.raises(InputError, match="cannot be read as a step's rollouts .KeyError"):
        rollouts_of(run, 5)
    (run / "rollouts" / "step-copy.parquet").touch()
    assert logged_steps(run) == [3, 4, 5]


def metrics(truncated: float, steps: int = 12, **more: float) -> dict[int, dict[str, float]]:
    """A run that inflates from its third step on, the coefficients as configured."""
    line = {"learner/loss": 1.0, "mixture/golden_coef": 0.1, "mixture/reference_coef": 0.02}
    shares = [0.0 if step < 3 else truncated for step in range(1, steps + 1)]
    return {
        step: line | {"rollouts/truncated_token_share": share, "rollouts/truncation_rate": share} | more
        for step, share in enumerate(shares, 1)
    }


def test_the_guard_looks_again_and_another_guard_would_have_done_something_else() -> None:
    base = {"loss": COEFFICIENTS, "data": {"golden": "some"}, "buffer": {"prompts_per_step": 160}}
    logged = configs.from_dict(base | {"guard": {"level": "warn"}})
    acting = configs.from_dict(base | {"guard": {"level": "act"}})
    seen = metrics(0.9)
    calm = coefficients(logged, logged, seen, 12)
    assert (calm.student, calm.golden, calm.reference, calm.mask_truncated_tails) == (1.0, 0.1, 0.02, False)
    acted = coefficients(acting, logged, seen, 12)
    assert acted.golden > 0.1 and acted.reference > 0.02 and acted.mask_truncated_tails
    assert coefficients(acting, logged, seen, 2) == coefficients(logged, logged, seen, 2)


def test_what_the_run_s_own_guard_raised_counts_as_it_was_logged() -> None:
    base = {"loss": COEFFICIENTS, "data": {"golden": "some"}}
    logged, seen = configs.from_dict(base), metrics(0.0)
    seen[12] |= {"mixture/golden_coef": 0.2, "mixture/reference_coef": 0.5}
    found = coefficients(logged, logged, seen, 12)
    assert (found.golden, found.reference, found.mask_truncated_tails) == (0.2, 0.5, True)
    stronger = configs.from_dict(base | {"loss": COEFFICIENTS | {"reference": {"coef": 0.7}}})
    assert coefficients(stronger, logged, seen, 12).reference == 0.7


def test_steps_behind_a_checkpoint_are_logged_with_every_n_th() -> None:
    """Steps between two checkpoints have no weights that are kept."""
    wrote = []

    async def call(method: str, directory: str, step: int, *rest: Any, payload: bool) -> None:
        wrote.append(step)

    def logged(every: int, saves: int) -> list[int]:
        config = configs.from_dict(
            {"metrics": {"rollout_log_every_steps": every}, "checkpoint": {"every_steps": saves}}
        )
        log = RolloutLog(SimpleNamespace(call=call), Path(), config, lambda entry: ("", ""))
        wrote.clear()

        async def run() -> None:
            for step in range(1, 13):
                await log.on_step(StepReport(step, [], {}, None))
            await log.written()

        asyncio.run(run())
        return list(wrote)

    assert logged(10, 5) == [1, 6, 10, 11]
    assert logged(5, 0) == [1, 5, 10]
    assert logged(0, 5) == []


def test_the_way_that_counts_is_that_on_which_the_run_is_now(tmp_path: Path) -> None:
    lines = [(1, 1.0), (2, 2.0), (3, 3.0), (2, 2.5)]
    text = "".join(json.dumps({"step": s, "learner/loss": v, "learner/trained_tokens": 1}) + "\n" for s, v in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 2, "evaluation/x": 1}\n{"step": 3, "learn')
    found = metrics_of(tmp_path)
    assert {step: values["learner/loss"] for step, values in found.items()} == {1: 1.0, 2: 2.5}


def test_what_was_measured_at_many_steps_is_read_at_once(tmp_path: Path) -> None:
    """The bug: all steps before were copied for each; twice as many took four times as long."""
    line = '{{"step": {}, "learner/trained_tokens": 1}}\n'
    (tmp_path / "metrics.jsonl").write_text("".join(map(line.format, range(1, 20_001))))
    began = time.process_time()
    assert len(metrics_of(tmp_path)) == 20_000
    assert time.process_time() - began < 2


def test_the_viewer_gets_every_token_s_signals(tmp_path: Path) -> None:
    student = make_student(tmp_path / "student")
    run = make_run(tmp_path / "run", logged_steps=[1, 2], student=student)
    rows = {row["rollout_id"]: len(row["response_tokens"]) for row in make_rollouts(2)}
    values = {name: np.arange(length) / 3 for name, length in rows.items()}
    values["2-right"][0] = math.nan
    sample = of_step(read_run(run), Signals(2, {"push, as configured": values}), most=100)
    assert sample.signals == ["push, as configured"] and {each["step"] for each in sample.rollouts} == {2}
    assert {each["id"] for each in sample.rollouts} == rows.keys()
    [right] = [each for each in sample.rollouts if each["id"] == "2-right"]
    assert right["X"][0][:3] == [None, 0.3333, 0.6667] and len(right["X"][0]) == len(right["ids"])
    del values["2-right"]  # the bug: a rollout that was only judged has none, and ended the page
    sample = of_step(read_run(run), Signals(2, {"push, as configured": values}), most=100)
    assert {each["id"] for each in sample.rollouts} == values.keys()


def test_a_remark_tells_of_a_loss_that_is_not_what_was_logged() -> None:
    def remark(logged: dict[str, float]) -> str:
        again = SimpleNamespace(metrics={"loss": 0.5})
        return replaying.Replay(Path(), "", 1, (), [], logged, again, None).remark

    assert remark({"learner/loss": 0.500004}) == ""
    assert "is 0.5, logged was 0.51" in remark({"learner/loss": 0.51})
    assert "was not finite" in remark({})
