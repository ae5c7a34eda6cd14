"""Run directories as a training run leaves them, made up: curves, events and rollouts that tests can count."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from opd_ray.messages import Span
from opd_ray.watch.trace_file import TraceFile
from tiny_checkpoints import CHARACTERS, make_checkpoint

EVIL = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">'
"""A token that would run, were it ever parsed as HTML."""

_LISTS = {
    "prompt_tokens": pa.int32(),
    "response_tokens": pa.int32(),
    "behaviour_logprobs": pa.float32(),
    "weight_versions": pa.int32(),
    "teacher_logprobs": pa.float32(),
    "reference_logprobs": pa.float32(),
    "teacher_top_ids": pa.int32(),
    "teacher_top_logprobs": pa.float32(),
}


def make_run(
    path: Path,
    *,
    name: str | None = None,
    method: str = "opd",
    seed: int = 1,
    steps: int = 20,
    inflates_at: int | None = None,
    accuracy: tuple[float, float] = (0.3, 0.5),
    events: Sequence[Mapping[str, Any]] = (),
    finished: bool = True,
    logged_steps: Sequence[int] = (),
    student: Path | None = None,
    config: Mapping[str, Any] | None = None,
    golden_used: int | None = None,
    evaluates_before: bool = True,
) -> Path:
    """A run whose accuracy moves in a straight line and whose truncation jumps to .9 at ``inflates_at``.

    ``evaluates_before=False``: the student's evaluation is in the summary alone, as where an arm before made it.
    """
    path.mkdir(parents=True)
    before, after = (_evaluation(value, 0.0) for value in accuracy)
    if inflates_at is not None:
        after = _evaluation(accuracy[1], 0.9)
    lines = [_line(0, "evaluation", before)] if evaluates_before else []
    for step in range(1, steps + 1):
        inflated = inflates_at is not None and step >= inflates_at
        lines.append(
            {"step": step} | _measured(step, accuracy[0] + (accuracy[1] - accuracy[0]) * step / steps, inflated)
        )
    if finished:
        lines.append(_line(steps, "evaluation", after))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {
        "seed": seed,
        "name": name,
        "student": {"path": str(student or "nowhere")},
        "rollout": {"max_response_tokens": 80, "temperature": 1.0, "top_p": 1.0},
        "metrics": {"repetition_window_chars": 24, "repetition_ratio": 1.5},
        "learner": {"steps": steps},
        "guard": {"level": "act", "truncation_rate": [0.1, 0.25, 0.5], "repetition_rate": [0.05, 0.15, 0.4]},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(settings | dict(config or {})))
    if finished:
        summary = {
            "method": method,
            "seed": seed,
            "steps": steps,
            "wall_s": 61.0,
            "trained_tokens": 12_345,
            "eval_before": before,
            "eval_after": after,
            "guard_events": list(events),
        }
        if golden_used is not None:
            summary["golden"] = {"rows": golden_used, "used": golden_used}
        (path / "summary.json").write_text(json.dumps(summary | ({"name": name} if name else {})))
    for step in logged_steps:
        write_rollouts(path, step, make_rollouts(step))
    return path


def write_trace(path: Path, steps: int = 60) -> None:
    """A learner that waits, trains and sends, and two generators; another name is markup."""
    file = TraceFile(path, zero=0.0)
    for step in range(steps):
        for node, lane, room in (("head", "driver", "drive"), ("a", "learner-0", "learn")):
            for began, lasted, kind in ((0.0, 0.4, "wait"), (0.4, 0.5, "train"), (0.9, 0.1, "broadcast")):
                file.span(node, lane, room, Span(kind, step + began, lasted, {"step": step}))
        for lane in ("student-generator-0", EVIL):
            file.span("b", lane, "generate", Span("generate", step + 0.0, 0.85, {}))
            file.span("b", lane, "generate", Span("broadcast", step + 0.9, 0.1, {}))
        file.mark("head", "driver", "checkpoint", "written", step + 1.0)
    file.close()


STUDY_ARMS: Mapping[str, Mapping[str, Any]] = {
    "StableOPD": {"method": "stableopd", "accuracy": (0.3, 0.93), "golden_used": 128},
    "Mixture only": {"method": "opd+mixture", "accuracy": (0.3, 0.92), "golden_used": 128},
    "OPD + reference KL": {"method": "opd+reference_kl", "accuracy": (0.3, 0.7)},
    "OPD, full vocabulary": {"accuracy": (0.3, 0.2), "inflates_at": 70},
    "OPD, sampled token": {"accuracy": (0.3, 0.4), "inflates_at": 90},
    "OPD, forward KL top-8": {"accuracy": (0.3, 0.33)},
    "OPD + guard": {"accuracy": (0.3, 0.9), "inflates_at": 70, "golden_used": 128},
    "SFT, 128 golden": {"method": "sft", "accuracy": (0.3, 0.7), "golden_used": 128},
    "SFT, 3840 teacher rollouts": {"method": "sft", "accuracy": (0.3, 0.75), "golden_used": 4647},
    "SFT, 128 teacher rollouts": {"method": "sft", "accuracy": (0.3, 0.45), "golden_used": 121},
    "StableOPD, 32 golden": {"method": "stableopd", "accuracy": (0.3, 0.84), "golden_used": 32},
    "SFT, 32 golden": {"method": "sft", "accuracy": (0.3, 0.41), "golden_used": 32},
    "StableOPD, 512 golden": {"method": "stableopd", "accuracy": (0.3, 0.94), "golden_used": 512},
    "SFT, 512 golden": {"method": "sft", "accuracy": (0.3, 0.93), "golden_used": 512},
}
"""Names as in jobs/ablation.yaml; the outcomes are made up."""


def make_study(root: Path, seeds: Sequence[int] = range(5), *, steps: int = 150, **common: Any) -> Path:
    """Fourteen arms on several seeds, with noise, collapses and recoveries, and a guard that rolls back on odd seeds.

    ``common`` goes to :func:`make_run`.
    """
    for number, (name, arm) in enumerate(STUDY_ARMS.items()):
        teacher = "teacher rollouts" in name
        for seed in seeds:
            rng = random.Random(100 * seed + number)
            inflates = arm.get("inflates_at")
            if inflates is not None:
                inflates = round(inflates * steps / 150) + rng.randint(-8, 8) * steps // 150
            changes: dict[str, Any] = {"inflates_at": inflates}
            if inflates is not None and seed % 3 == 2:
                changes["inflates_at"] = None
            rolls_back = name == "OPD + guard" and changes["inflates_at"] and seed % 2
            if rolls_back:
                event = {"signal": "truncation_rate", "value": 0.9, "threshold": 0.5, "level": "rollback"}
                changes["events"] = [event | {"step": inflates + 3, "action": "back to the last healthy checkpoint"}]
            path = root / re.sub(r"[^a-z0-9]+", "-", name.lower()) / f"seed-{seed}"
            accuracy = (0.3, min(1.0, max(0.0, arm["accuracy"][1] + rng.gauss(0, 0.04))))
            size = f"{root}/{'teacher-rollouts-' if teacher else 'golden-'}{arm.get('golden_used')}-{seed}"
            settings = {
                "data": {"golden": size, "golden_problems": "skip" if teacher else "refuse"},
                "loss": {"golden": {"coef": {"stableopd": 0.75, "sft": 1.0}.get(arm.get("method", ""), 0.0)}},
                "guard": {"level": "rollback" if "guard" in name else "off"},
            }
            fixed = {"name": name, "seed": seed, "steps": steps, "evaluates_before": number == 0, "config": settings}
            make_run(path, **{**arm, **fixed, **changes, "accuracy": accuracy, **common})
            _roughen(path, rng, back_to=inflates - 12 if rolls_back else None)
    return root


def _roughen(run: Path, rng: random.Random, back_to: int | None) -> None:
    """Noise on every number, inflation that comes slowly and goes, and a rollback three steps after its height."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    crossed = next((line["step"] for line in lines if line.get("rollouts/truncation_rate", 0) > 0.5), None)
    rough, abandoned = [], []
    for line in lines:
        height = 0.0
        if crossed is not None and "rollouts/length" in line:
            distance = line["step"] - crossed
            height = math.exp(-((distance / (12 if distance < 0 else 30)) ** 2))
        for name in [name for name in line if name != "step" and not name.startswith("evaluation/")]:
            line[name] *= 1 + rng.gauss(0, 0.08)
        if "rollouts/length" in line:
            calm = line | {"rollouts/truncation_rate": max(0.0, rng.gauss(0.02, 0.015)), "rollouts/length": 20.0}
            line |= {
                "rollouts/truncation_rate": min(1.0, 0.02 + 0.75 * height * rng.uniform(0.9, 1.1)),
                "rollouts/truncated_token_share": min(1.0, 0.03 + 0.85 * height),
                "rollouts/length": 20 + 45 * height,
                "rollouts/accuracy": min(1.0, line["rollouts/accuracy"] * (1 - 0.6 * height)),
                "learner/repetitive_share": 0.01 + 0.3 * height,
            }
            if back_to is not None and back_to < line["step"] <= crossed + 3:
                abandoned.append(line)
            if back_to is not None and line["step"] > back_to:
                line = calm | {"rollouts/truncated_token_share": 0.03, "learner/repetitive_share": 0.01}
        rough.append(line)
    at = next((i for i, line in enumerate(rough) if abandoned and line["step"] > back_to), 0)
    rough[at:at] = abandoned
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rough))


def make_rollouts(step: int) -> list[dict[str, Any]]:
    """Four of the student (one truncated and repetitive, one with a token the teacher rules out) and one golden."""
    right = _rollout(f"{step}-right", "1+1=2", teacher=[-0.1] * 6)
    wrong = _rollout(f"{step}-wrong", "1+1=3", teacher=[-0.1] * 4 + [-3.0, -0.1], correct=False)
    ruled_out = _rollout(f"{step}-never", "1+1=4", teacher=[-0.1] * 4 + [float("-inf"), -0.1], correct=False)
    loop = _rollout(f"{step}-loop", "1+" * 12, teacher=[-0.05] * 24, correct=False, finish_reason="length")
    golden = _rollout(f"{step}-golden", "1+1=2", teacher=None, source="golden")
    return [right, wrong, ruled_out, loop, golden | {"behaviour_logprobs": [], "weight_versions": []}]


def write_rollouts(run: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
    """rollouts/step-N.parquet of these rows."""
    types = {name: pa.list_(_LISTS[name]) if name in _LISTS else None for name in rows[0]}
    table = pa.table({name: pa.array([row[name] for row in rows], type) for name, type in types.items()})
    path = run / "rollouts" / f"step-{step:06d}.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table.add_column(0, "step", pa.array([step] * len(rows), pa.int32())), path)
    return path


def make_student(path: Path, tokens: Sequence[str] = CHARACTERS) -> Path:
    """A checkpoint directory with a tokenizer of one token per character; nothing is generated with it."""
    return make_checkpoint(path, tokens=tokens)


def _rollout(rollout_id: str, text: str, *, teacher: list[float] | None, **changes: Any) -> dict[str, Any]:
    tokens = [CHARACTERS.index(character) for character in text]
    if changes.get("finish_reason", "stop") == "stop":
        tokens.append(CHARACTERS.index("<eos>"))
    row = {
        "rollout_id": rollout_id,
        "prompt_id": "1+1",
        "source": "student",
        "prompt_tokens": [CHARACTERS.index(character) for character in "1+1="],
        "response_tokens": tokens,
        "behaviour_logprobs": [-0.5] * len(tokens),
        "weight_versions": [3] * (len(tokens) - 1) + [4],
        "finish_reason": "stop",
        "correct": True,
        "text": text,
        "teacher_logprobs": teacher,
        "prompt": "What is 1+1?",
        "answer": "2",
        "reference_logprobs": [-0.25] * len(tokens),
        "teacher_top_ids": [CHARACTERS.index("2"), CHARACTERS.index("4")] * len(tokens),
        "teacher_top_logprobs": [-0.1, -2.0] * len(tokens),
    }
    return row | changes


def _evaluation(accuracy: float, truncation: float) -> dict[str, float]:
    return {
        "accuracy_greedy": min(1.0, accuracy + 0.1),
        "accuracy_sampled": accuracy,
        "accuracy_sampled_se": 0.02,
        "truncation_rate": truncation,
        "repetition_rate": truncation / 2,
        "mean_length": 20 + 60 * truncation,
        "num_problems": 500,
    }


def _line(step: int, section: str, values: Mapping[str, float]) -> dict[str, float]:
    return {"step": step} | {f"{section}/{name}": value for name, value in values.items()}


def _measured(step: int, accuracy: float, inflated: bool) -> dict[str, float]:
    return {
        "rollouts/accuracy": accuracy,
        "rollouts/truncation_rate": 0.9 if inflated else 0.02,
        "rollouts/repetition_rate": 0.5 if inflated else 0.0,
        "rollouts/truncated_token_share": 0.95 if inflated else 0.03,
        "rollouts/length": 75.0 if inflated else 20.0,
        "learner/loss": 1.0 / step,
        "learner/loss_student": 1.0 / step,
        "learner/advantage_repetitive": -0.3,
        "learner/advantage_other": -0.8,
        "learner/repetitive_share": 0.3 if inflated else 0.01,
        "learner/trained_tokens": 1000.0,
        "throughput/tokens_per_s": 1000.0 + step,
        "throughput/step_s": 3.0,
        "idle/learn": 0.1,
        "idle/generate": 0.2,
        "staleness/mean": 1.0,
        "staleness/max": 2.0,
        "something/new": float(step),
    }
