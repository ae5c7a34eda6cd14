"""What precedes the collapse: the advantage of repetitive and of other tokens before a run passes half truncated.

The paper's signature of length inflation (arXiv 2604.08527) is that repetitive tokens have the higher advantage:
they are what the student then writes more of.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from opd_ray.report.arms import Arm, crossing
from opd_ray.report.runs import Metrics, Run

WINDOW = 10
"""Steps before the crossing that are averaged."""
ALARM = 0.25
"""Share of the tokens that are in truncated rollouts; passed before the truncation rate passes half."""


@dataclass(frozen=True)
class Crossing:
    """One run that passed half truncated; advantages are means over tokens, in nats."""

    arm: Arm
    run: Run
    step: int
    """The first with more than half of its rollouts truncated."""
    repetitive: float | None
    """Mean advantage of the repetitive tokens of the WINDOW steps before; None if there were none."""
    other: float | None
    share: float | None
    """Of repetitive tokens among those of the window."""
    alarm_lead: int | None
    """How many steps before the crossing the tokens in truncated rollouts first passed ALARM."""

    @property
    def gap(self) -> float | None:
        return None if self.repetitive is None or self.other is None else self.repetitive - self.other


def crossings(arms: Sequence[Arm]) -> list[Crossing]:
    """Of every run that passed half truncated, on an attempt that was abandoned later or not."""
    return [found for arm in arms for run in arm.runs if (found := _crossing(arm, run)) is not None]


def signature(found: Sequence[Crossing]) -> str:
    """How often repetitive tokens had the higher advantage, as a sentence."""
    known = [each.gap for each in found if each.gap is not None]
    if not known:
        return "No advantages of repetitive tokens were measured before the crossing."
    higher = sum(gap > 0 for gap in known)
    if len(known) == 1 and not higher:
        return "In the one run that passed half truncated, repetitive tokens did not have the higher advantage."
    runs = "the one run" if len(known) == 1 else f"{higher} of {len(known)} runs"
    return f"In {runs} that passed half truncated, repetitive tokens had the higher advantage before they did."


def _crossing(arm: Arm, run: Run) -> Crossing | None:
    found = crossing(run)
    if found is None:
        return None
    metrics, step = found
    window = range(step - WINDOW, step)
    alarms = [at for at, share in metrics.get("rollouts/truncated_token_share", {}).items() if share > ALARM]
    lead = step - alarms[0] if alarms and alarms[0] <= step else None
    return Crossing(arm, run, step, *_advantages(metrics, window), lead)


def _advantages(metrics: Metrics, window: Sequence[int]) -> tuple[float | None, float | None, float | None]:
    """Of repetitive and of other tokens, and the share of the former; a step counts with its number of tokens.

    A step without repetitive tokens has no advantage of such, and its share of them, 0, is its weight.
    """
    lengths, shares = metrics.get("rollouts/length", {}), metrics.get("learner/repetitive_share", {})
    tokens = {step: lengths.get(step, 1.0) for step in window if step in shares}
    repetitive = {step: number * shares[step] for step, number in tokens.items()}
    others = {step: number - repetitive[step] for step, number in tokens.items()}
    return (
        _weighted(metrics.get("learner/advantage_repetitive", {}), repetitive),
        _weighted(metrics.get("learner/advantage_other", {}), others),
        _weighted(shares, tokens),
    )


def _weighted(values: dict[int, float], weights: dict[int, float]) -> float | None:
    """The mean of ``values`` by ``weights``; None over nothing."""
    both = [step for step in weights if step in values and weights[step] > 0]
    return statistics.fmean([values[step] for step in both], [weights[step] for step in both]) if both else None
