"""Every recipe trains a few steps on real Ray: real actors and losses, small models, torch generation.

The shipped teacher stands in for the student, so that some responses are right; a random model teaches.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from embedded_preset import preset
from opd_ray import config as configs
from opd_ray import train
from opd_ray.buffer.mixture import Mixture
from opd_ray.config import Config
from opd_ray.embedded.models import PAIRS, make_tokenizer
from opd_ray.embedded.prepare import TEACHER_DIR
from opd_ray.embedded.resolve import resolve
from opd_ray.placement.session import Session

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

DIRECTORY = Path(__file__).parents[2] / "opd_ray" / "recipes"
RECIPES = sorted(path.stem for path in DIRECTORY.glob("*.yaml") if not path.stem.startswith("paper_"))
TEXTS = make_tokenizer()
STEPS = 2
BUDGET = 24
SMALL = [
    f"student.path={TEACHER_DIR}",
    f"learner.steps={STEPS}",
    "rollout.engine=torch",
    "rollout.prompts_per_call=4",
    "evaluation.num_problems=0",
    "evaluation.every_steps=0",
    "checkpoint.every_steps=0",
    "metrics.rollout_log_every_steps=1",
]


@dataclass(frozen=True)
class Outcome:
    """What a recipe's run left behind."""

    config: Config
    summary: dict[str, Any]
    steps: list[dict[str, float]]
    """Metrics of each step."""
    rows: list[dict[str, Any]]
    """The rollout log."""

    def values(self, name: str) -> list[float]:
        """A metric at every step; KeyError where a step lacks it."""
        return [step[name] for step in self.steps]

    def lacks(self, name: str) -> bool:
        return not any(name in step for step in self.steps)

    def of(self, source: str) -> list[dict[str, Any]]:
        """The rollouts of a source, of which there must be some."""
        rows = [row for row in self.rows if row["source"] == source]
        assert rows, f"no {source} rollouts"
        return rows


@pytest.fixture(scope="module")
def session(world, ray_here) -> Iterator[Session]:
    """One set of rooms for nearly all recipes: two teachers, of which the first may follow the student, and the
    reference."""
    rooms = [
        "teacher.update=average",
        f"more_teachers.short.path={world.teacher}",
        f"rollout.max_response_tokens={BUDGET}",
    ]
    rooms_for = configs.load(None, [*world.overrides(), *SMALL, *rooms])
    session = Session(resolve(rooms_for), max_context_tokens=64)  # of the recipes that show solutions, too
    yield session
    session.close()


def overrides(name: str, world, config: Config) -> list[str]:
    """A recipe at the size of a test, on the world's files; what makes it the recipe stays."""
    recipe = yaml.safe_load((DIRECTORY / f"{name}.yaml").read_text())
    small = [*preset(recipe), *SMALL, f"data.evaluation={world.evaluation}"]
    if config.buffer.prompts_per_step:
        small.append("buffer.prompts_per_step=4")
    else:
        small.append("buffer.golden_per_step=4")
    budget = "[[0, 8], [1, 24]]" if isinstance(config.rollout.max_response_tokens, tuple) else BUDGET
    small.append(f"rollout.max_response_tokens={budget}")
    small += [f"more_teachers.{other}.path={world.teacher}" for other in config.more_teachers]
    if config.teacher.path == configs.EMBEDDED_PAIRS:
        small.append(f"teacher.path={world.pairs}")
    elif config.teacher.path != configs.STUDENT:
        small.append(f"teacher.path={world.teacher}")
    if config.teacher.privileged:
        small.append(f"data.prompts={world.golden}")
    elif config.more_teachers:
        small.append(f"data.prompts={DIRECTORY / 'mopd_prompts.jsonl'}")
    else:
        small.append(f"data.prompts={world.prompts}")
    if config.buffer.uses_golden or config.teacher.privileged:
        small.append(f"data.golden={world.golden}")
    if config.rollout.horizon is not None:
        small.append("rollout.horizon=8")
    if name == "simple_opd":
        small.append("buffer.on_policy_probability=[[0, 0], [1, 1]]")
    if name == "gkd":
        small += ["seed=2", "learner.steps=4"]  # a seed whose first four steps are not all of one kind
    return small


def run(name: str, world, session: Session, run_dir: Path) -> Outcome:
    path = DIRECTORY / f"{name}.yaml"
    config = configs.load(path, overrides(name, world, configs.load(path)))

    async def cell() -> dict[str, Any]:
        """As a notebook calls it: where an event loop is running."""
        # A teacher that writes has rooms of its own: its generators keep to one teacher. So does one with another
        # vocabulary: the others' takes in the student's weights.
        alone = config.buffer.has_teacher_write or config.teacher.path == str(world.pairs)
        return train(config, run_dir, session=None if alone else session)

    try:
        summary = asyncio.run(cell())
    except BaseException:
        session.close()  # the next recipe starts its rooms anew
        raise
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    files = sorted((run_dir / "rollouts").glob("*.parquet"))
    return Outcome(
        config,
        summary,
        [line for line in lines if "learner/loss" in line],
        [row for file in files for row in pq.read_table(file).to_pylist()],
    )


def check_opd(outcome: Outcome) -> None:
    assert outcome.values("learner/clip_fraction")
    assert len(outcome.of("student")) == STEPS * 4 * 4


def check_stableopd(outcome: Outcome) -> None:
    assert all(value > 0 for value in outcome.values("learner/loss_golden"))
    assert outcome.values("learner/loss_reference")[1] > 0, "the student has moved away from the reference"
    assert all(row["reference_logprobs"] for row in outcome.of("student"))


def check_sft(outcome: Outcome) -> None:
    assert len(outcome.of("golden")) == STEPS * 4
    assert outcome.lacks("learner/loss_student")


def check_sequence_kd(outcome: Outcome) -> None:
    assert outcome.values("learner/loss_teacher")
    assert {row["finish_reason"] for row in outcome.of("teacher")} == {"stop"}


def check_gkd(outcome: Outcome) -> None:
    kinds = [{row["source"] for row in outcome.rows if row["step"] == step + 1} for step in range(4)]
    mixture = Mixture(outcome.config)
    assert kinds == [{"student"} if mixture.at(step).student_per_prompt else {"golden"} for step in range(4)]
    assert {"student"} in kinds
    assert {"golden"} in kinds
    assert all(row["teacher_logprobs"] for row in outcome.of("golden")), "both sides have the same divergence"


def check_minillm(outcome: Outcome) -> None:
    assert outcome.values("learner/loss_golden")
    assert all(row["teacher_logprobs"] is None for row in outcome.of("golden"))
    # The reward-to-go adds up the log-ratios of a response: far larger than those of its tokens.
    used, single = outcome.values("learner/advantage_used")[0], outcome.values("learner/advantage")[0]
    assert used < 3 * single < 0


def check_thinking_machines(outcome: Outcome) -> None:
    assert outcome.values("staleness/max") == [0] * STEPS
    assert outcome.values("learner/importance_ratio") == pytest.approx([1] * STEPS, abs=1e-3)


def check_revisiting(outcome: Outcome) -> None:
    assert all(0 < value < 1 for value in outcome.values("learner/topk_overlap"))


def check_rethinking(outcome: Outcome) -> None:
    assert outcome.values("learner/entropy_gap")
    assert all(0 < value < 1 for value in outcome.values("learner/topk_overlap"))
    assert all(len(row["topk_ids"]) == 16 * len(row["response_tokens"]) for row in outcome.of("student"))


def check_many_faces(outcome: Outcome) -> None:
    assert outcome.values("learner/loss_student")


def check_eopd(outcome: Outcome) -> None:
    assert all(0 < value <= 1 for value in outcome.values("learner/entropy_gate_share"))


def check_mopd(outcome: Outcome) -> None:
    assert {row["teacher"] for row in outcome.of("student")} == {"teacher", "short"}
    assert all(row["teacher_logprobs"] for row in outcome.of("student"))
    assert outcome.values("learner/masked_share")
    assert max(outcome.values("rollouts/accuracy")) > 0, "there is a reward to mix in"


def check_cross_tokenizer(outcome: Outcome) -> None:
    assert all(0 <= value < 0.5 for value in outcome.values("learner/unaligned_share"))
    pairs = PAIRS.vocabulary
    for row in outcome.of("student"):
        prompt = TEXTS.decode(row["prompt_tokens"])
        assert list(row["privileged_prompt_tokens"]) == [pairs[token] for token in PAIRS.tokens(prompt)]
        assert len(row["teacher_logprobs"]) == len(row["response_tokens"])


def check_exopd(outcome: Outcome) -> None:
    assert all(row["reference_logprobs"] for row in outcome.of("student"))
    assert outcome.lacks("learner/loss_reference"), "the reference enters the advantage only"
    # A = k1 + .25 (log π_T - log π_ref), and at the first step the student is the reference.
    assert outcome.values("learner/advantage_used")[0] == pytest.approx(
        1.25 * outcome.values("learner/advantage")[0], rel=1e-3
    )


def check_lightning(outcome: Outcome) -> None:
    assert outcome.values("learner/advantage_clip_fraction")
    assert all(-5 <= value <= 5 for value in outcome.values("learner/advantage_used"))


def check_lora(outcome: Outcome) -> None:
    assert outcome.values("learner/loss_reference")[1] > 0, "the student has moved away from its base"
    assert all(row["reference_logprobs"] is None for row in outcome.of("student")), "no reference scorer was asked"
    # The shipped teacher has three blocks of width 64 with 64 × 64 and 64 × 128 layers; float32.
    both_sides = 3 * (4 * (64 + 64) + 3 * (64 + 128))
    assert outcome.summary["weight_sync_bytes"] == 4 * outcome.config.student.lora.rank * both_sides


def check_async_opd(outcome: Outcome) -> None:
    assert outcome.values("learner/loss_student")
    assert max(outcome.values("staleness/max")) <= 4


def check_top_d(outcome: Outcome) -> None:
    floor = math.log(1 - 0.2)
    assert all(floor <= used for used in outcome.values("learner/advantage_used"))


def check_tropd(outcome: Outcome) -> None:
    assert all(0 < value < 1 for value in outcome.values("learner/trust"))


def check_iw_opd(outcome: Outcome) -> None:
    assert outcome.values("learner/loss_student")


def check_opsa(outcome: Outcome) -> None:
    assert all(row["teacher_logprobs"] is None for row in outcome.of("student"))
    assert outcome.values("learner/advantage_used") == pytest.approx([-0.5] * STEPS)


def check_tgopd(outcome: Outcome) -> None:
    assert {row["taught_by"] for row in outcome.of("student")} <= {"teacher", "reward", "nothing"}
    assert {row["taught_by"] for row in outcome.of("teacher")} == {"nothing"}, "probes are judged, not trained on"


def check_esr(outcome: Outcome) -> None:
    assert {row["horizon"] for row in outcome.of("student")} == {8}
    assert any(row["finish_reason"] == "horizon" and len(row["response_tokens"]) == 8 for row in outcome.rows)


def check_simple_opd(outcome: Outcome) -> None:
    assert [{row["source"] for row in outcome.rows if row["step"] == step} for step in (1, 2)] == [
        {"teacher"},
        {"student"},
    ]


def check_opsd(outcome: Outcome) -> None:
    assert all(len(row["privileged_prompt_tokens"]) > len(row["prompt_tokens"]) for row in outcome.of("student"))
    assert {row["source"] for row in outcome.rows} == {"student"}, "solutions are shown, not trained on"
    assert outcome.values("learner/loss_student")[0] > 0, "the same weights see more in the prompt"


def check_sdpo(outcome: Outcome) -> None:
    check_opsd(outcome)


def check_grpo(outcome: Outcome) -> None:
    assert all(row["teacher_logprobs"] is None for row in outcome.of("student"))
    assert outcome.lacks("learner/teacher_logprob")
    assert max(outcome.values("rollouts/accuracy")) > 0
    assert outcome.values("learner/loss_reference")


def check_prefix_opd(outcome: Outcome) -> None:
    assert outcome.values("rollouts/length_budget") == [8, BUDGET]
    assert max(len(row["response_tokens"]) for row in outcome.rows if row["step"] == 1) == 8


CHECKS: dict[str, Callable[[Outcome], None]] = {name: globals()[f"check_{name}"] for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name, world, session, tmp_path):
    outcome = run(name, world, session, tmp_path / "run")
    config = outcome.config
    assert len(outcome.steps) == config.learner.steps
    judged = {"teacher"} if config.buffer.evidence else set()
    assert {row["source"] for row in outcome.rows} == {*config.sources, *judged}
    for step in outcome.steps:
        assert math.isfinite(step["learner/loss"])
        assert math.isfinite(step["learner/grad_norm"])
        assert step["learner/trained_tokens"] > 0
    assert max(outcome.values("learner/grad_norm")) > 0
    assert outcome.summary["method"] == config.method
    assert outcome.summary["guard_events"] == []
    CHECKS[name](outcome)
