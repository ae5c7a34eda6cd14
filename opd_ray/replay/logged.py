"""What a run logged of its steps: rollouts as the learner got them, and metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opd_ray.buffer.mixture import Mixture
from opd_ray.config import Config
from opd_ray.errors import InputError
from opd_ray.messages import ROLLOUT_SCHEMA, Coefficients, Entry, RolloutMeta, Strength
from opd_ray.watch.guard_of import guard_of


def logged_steps(run_dir: Path) -> list[int]:
    """Those whose rollouts are there."""
    names = (file.stem.removeprefix("step-") for file in (run_dir / "rollouts").glob("step-*.parquet"))
    return sorted(int(name) for name in names if name.isdecimal())


def rollouts_of(run_dir: Path, step: int) -> list[Entry]:
    """The step's rollouts, without scores, of one payload; InputError where they are not whole."""
    file = run_dir / "rollouts" / f"step-{step:06d}.parquet"
    try:
        table = pq.read_table(file)
        batch = table.select(ROLLOUT_SCHEMA.names).cast(ROLLOUT_SCHEMA).combine_chunks().to_batches()[0]
        more = [name for name in ("horizon", "taught_by") if name in table.schema.names]
        facts = table.select(["teacher", "repetitive", "tail_period", "worker", *more]).to_pylist()
    except (pa.ArrowException, OSError, KeyError, ValueError, IndexError) as error:
        raise InputError(f"{file}: cannot be read as a step's rollouts ({type(error).__name__}: {error})") from None
    entries = []
    for row, (own, its) in enumerate(zip(batch.to_pylist(), facts, strict=True)):
        if not own["response_tokens"]:
            raise InputError(
                f"{file}: rollout {own['rollout_id']} was gone with its node when the log was written; replay a step "
                "whose rollouts are whole"
            )
        entries.append(Entry(_meta(own, its), row, batch, taught_by=its.get("taught_by")))
    return [entry for entry in entries if entry.is_trained_on]


def _meta(row: dict[str, Any], more: dict[str, Any]) -> RolloutMeta:
    versions, behaviour = row["weight_versions"], row["behaviour_logprobs"]
    return RolloutMeta(
        rollout_id=row["rollout_id"],
        slot=row["slot"],
        prompt_id=row["prompt_id"],
        source=row["source"],
        num_prompt_tokens=len(row["prompt_tokens"]),
        num_response_tokens=len(row["response_tokens"]),
        finish_reason=row["finish_reason"],
        correct=row["correct"],
        repetitive=bool(more["repetitive"]),
        oldest_version=versions[0] if versions else -1,
        mean_version=sum(versions) / len(versions) if versions else -1.0,
        mean_behaviour_logprob=sum(behaviour) / len(behaviour) if behaviour else math.nan,
        teacher=more["teacher"] or "teacher",
        tail_period=more["tail_period"] or 0,
        worker=more["worker"] or "",
        horizon=more.get("horizon"),
    )


def metrics_of(run_dir: Path) -> dict[int, dict[str, float]]:
    """Step to what was measured at it, on the way that led to where the run is now."""
    found: dict[int, dict[str, float]] = {}
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{run_dir / 'metrics.jsonl'}: cannot be read ({error.strerror}); is this a run?") from None
    for line in lines:
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a crash cut it off
        if "learner/trained_tokens" in values:  # of a step, and not of an evaluation
            while found and next(reversed(found)) >= step:
                found.popitem()
            found[step] = values
    return found


def coefficients(config: Config, logged: Config, metrics: dict[int, dict[str, float]], step: int) -> Coefficients:
    """The weights that ``config`` gives the terms of the objective at a step of the run that was ``logged``.

    The guard of ``config`` looks once more at what was measured before the step. Of the run's own guard counts what it
    was seen to raise: it may have been through rollbacks, of which the way that is left tells nothing.
    """
    guard = guard_of(config)
    for before in sorted(each for each in metrics if each < step):
        guard.look(before, {"learner/loss": math.nan} | metrics[before])  # what is not finite is not in the file
    strength = guard.strength
    if config.guard == logged.guard:
        planned, then = Mixture(logged).coefficients(step - 1), metrics[step]
        least = {"golden": planned.golden, "reference": planned.reference}
        seen = {name: then.get(f"mixture/{name}_coef", 0.0) for name in least}
        raised = {name: value if value > least[name] + 1e-9 else 0.0 for name, value in seen.items()}
        masks = strength.mask_truncated_tails or any(raised.values())
        strength = Strength(0.0, raised["golden"], raised["reference"], masks)
    return Mixture(config).coefficients(step - 1, strength)
