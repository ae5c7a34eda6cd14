"""The guard: sees length inflation and its kin in a step's metrics, and says what to do about it.

Pure logic: it knows metric names and steps; nothing of losses, checkpoints or Ray. The driver shows it every
step and does what the verdict asks. Levels, each with those before it: warn; act (more golden rollouts and a
larger β_KL within stated limits, truncated tails masked); roll back to the last healthy checkpoint and keep the
stronger setting; stop. Between two actions a signal gets ``patience_steps`` to recede.

Signals are means over a window. Shares are measured from the lowest level that the run has shown: with lowest
level b a threshold t stands at b + (1 − b)·t. A student that always truncates a little is its own measure, and so
is one whose length budget still grows. The strength never falls again within a run: relaxing it would bring back
the loop that it broke, and the run would swing.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from opd_ray.config.guard import _SHARES, GuardConfig
from opd_ray.messages import Strength

Level = Literal["warn", "act", "rollback", "stop"]
Order = Literal["go on", "roll back", "stop"]

_RANK = {"off": 0, "warn": 1, "act": 2, "rollback": 3, "stop": 4}


@dataclasses.dataclass(frozen=True)
class GuardEvent:
    """What was seen, against what, and what was done; every number is finite."""

    step: int
    signal: str
    value: float
    threshold: float
    level: Level
    action: str
    """What was done, in one sentence that begins with the kind of failure where the metrics tell it."""

    def __str__(self) -> str:
        seen = f"{self.signal} {self.value:.3g} ({self.threshold:.3g})"
        return f"guard, step {self.step}, {self.level}: {seen}: {self.action}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the guard says after a step; where it orders the end of the loop, the last event says why."""

    events: tuple[GuardEvent, ...]
    strength: Strength
    order: Order


@dataclasses.dataclass(frozen=True)
class _Reading:
    """A signal's value and its thresholds, mildest first; one that has no second threshold only warns."""

    signal: str
    value: float
    thresholds: tuple[float, ...]
    note: str = ""
    falling: bool = False

    @property
    def severity(self) -> int:
        """0 quiet, 1 warn, 2 act, 3 roll back."""
        return sum(self.value < each if self.falling else self.value > each for each in self.thresholds)

    def event(self, step: int, level: Level, action: str) -> GuardEvent:
        crossed = self.thresholds[max(self.severity, 1) - 1]
        return GuardEvent(step, self.signal, self.value, crossed, level, self.note + action)


@dataclasses.dataclass
class _State:
    """All that a resumed run must know; plain values only."""

    notch: int = 0
    num_rollbacks: int = 0
    num_non_finite: int = 0
    acted_at: int | None = None
    said_spent: bool = False
    alarmed: bool = False
    budget: float | None = None
    first_lengths: list[float] = field(default_factory=list)
    windows: dict[str, list[float]] = field(default_factory=dict)
    lowest: dict[str, float] = field(default_factory=dict)
    said: dict[str, list[int]] = field(default_factory=dict)
    """Signal to the highest severity announced and the last step at which it was not quiet."""


_ROLLOUTS = (*_SHARES, "length")
_TOKENS = ("repetitive_share", "advantage_repetitive", "advantage_other", "teacher_logprob_repetitive")
_LEARNER = (*_TOKENS, "entropy", "grad_norm")
_WATCHED = {name: f"rollouts/{name}" for name in _ROLLOUTS} | {name: f"learner/{name}" for name in _LEARNER}


class Guard:
    """Judges one run, step by step in order. A metric that a step lacks leaves its signal silent.

    ``configured`` is what the run has without the guard, the point from which notches count.
    """

    def __init__(
        self, config: GuardConfig, *, has_golden: bool, has_reference: bool, configured: Strength | None = None
    ) -> None:
        self._config, self._configured = config, configured or Strength()
        self._has_golden, self._has_reference = has_golden, has_reference
        self._state = _State()
        self._raises_golden = has_golden and config.max_golden_per_prompt > self._configured.golden_per_prompt
        self._raises_kl = has_reference and config.max_reference_kl_coef > self._configured.reference_kl_coef
        self._masks = config.mask_truncated_tails and not self._configured.mask_truncated_tails
        self._num_notches = config.num_notches if self._raises_golden or self._raises_kl else int(self._masks)

    def look(self, step: int, metrics: Mapping[str, float]) -> Verdict:
        """Judges step ``step``; call it once after each, in order."""
        if self._config.level == "off":
            return Verdict((), self.strength, "go on")
        events, order = self._judge_loss(step, metrics.get("learner/loss", 0.0))
        if order == "go on":
            means = self._observe(metrics)
            events += self._note_lowest(step, means)
            readings = [each for each in self._readings(means) if each.severity]
            if any(share in means for share in _SHARES):  # a step that sampled nothing tells nothing
                self._state.alarmed = any(len(each.thresholds) > 1 for each in readings)
            action, order = self._act(step, readings)
            events += self._announce(step, readings, {event.signal for event in action}) + action
        return Verdict(tuple(events), self.strength, order)

    @property
    def strength(self) -> Strength:
        config, configured, notch = self._config, self._configured, self._state.notch
        if config.level == "off" or notch == 0:
            return Strength()
        part = min(1.0, notch / max(1, self._num_notches))
        golden = kl = coef = 0.0
        if self._raises_golden:
            golden = _between(configured.golden_per_prompt, config.max_golden_per_prompt, part)
            coef = _between(configured.golden_coef, config.max_golden_coef, part)
        if self._raises_kl:
            kl = _between(configured.reference_kl_coef, config.max_reference_kl_coef, part)
        return Strength(golden, coef, kl, self._masks)

    def healthy(self) -> bool:
        """Whether a checkpoint of the last step may be rolled back to: its loss was finite, and no signal
        that may cause an action is over its warning threshold."""
        return not self._state.alarmed and self._state.num_non_finite == 0

    def rolled_back(self, step: int) -> None:
        """The run goes on from ``step``: windows and announcements are cleared, the stronger setting stays."""
        state = self._state
        state.windows, state.said, state.alarmed, state.num_non_finite = {}, {}, False, 0
        state.acted_at = step

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint; ``restore`` continues from them."""
        return dataclasses.asdict(self._state)

    def restore(self, state: Mapping[str, Any]) -> None:
        self._state = _State(**copy.deepcopy(dict(state)))

    def _judge_loss(self, step: int, loss: float) -> tuple[list[GuardEvent], Order]:
        """A step without a finite loss changes no weights, so one is harmless where there is no way back.
        The event counts such steps in a row, so that its numbers are finite."""
        state, limit = self._state, self._config.max_non_finite_steps
        state.num_non_finite = 0 if math.isfinite(loss) else state.num_non_finite + 1
        if state.num_non_finite == 0:
            return [], "go on"
        reading = _Reading("non_finite_loss", float(state.num_non_finite), (float(limit),), f"the loss is {loss}: ")
        if self._may_roll_back():
            return [reading.event(step, "rollback", self._roll_back(step))], "roll back"
        if self._config.level == "stop" or state.num_non_finite >= limit:
            return [reading.event(step, "stop", "the run is stopped")], "stop"
        return [reading.event(step, "warn", "the step was skipped, the weights are unchanged")], "go on"

    def _observe(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Window means, without the room's name, of what this step has and whose windows are full."""
        state, config, means = self._state, self._config, {}
        budget = metrics.get("rollouts/length_budget")
        if budget is not None and budget != state.budget:
            if state.budget is not None and budget < state.budget:
                state.lowest.clear()  # a tighter budget truncates more by itself
            state.budget, state.first_lengths = budget, []
            state.windows.pop("length", None)
        for name, full_name in _WATCHED.items():
            value = metrics.get(full_name, math.nan)
            if not math.isfinite(value):
                continue
            window = state.windows.setdefault(name, [])
            window.append(float(value))
            del window[: -config.window_steps]
            if len(window) == config.window_steps:
                means[name] = sum(window) / len(window)
            if name == "length" and len(state.first_lengths) < config.warmup_steps:
                state.first_lengths.append(float(value))
        return means

    def _note_lowest(self, step: int, means: Mapping[str, float]) -> list[GuardEvent]:
        """Notes the lowest level of every share, and says once where a run begins above a warning threshold."""
        events, lowest = [], self._state.lowest
        for name in (each for each in (*_SHARES, "repetitive_share") if each in means):
            if name in _SHARES and name not in lowest:
                first = _Reading(name, means[name], getattr(self._config, name)[:1])
                if first.severity:
                    events.append(first.event(step, "warn", "it begins like this, later levels are measured from here"))
            lowest[name] = min(means[name], lowest.get(name, 1.0))
        return events

    def _readings(self, means: Mapping[str, float]) -> list[_Reading]:
        config, first, readings = self._config, self._state.first_lengths, []
        inflation = self._signature(means)
        endorsed = means.get("teacher_logprob_repetitive", -math.inf) > config.endorsed_logprob
        kind = f"length inflation that the teacher endorses: {inflation}: " if inflation and endorsed else ""
        if means.get("grad_norm", math.inf) < config.grad_norm and "entropy" in means:
            advantage = _mean_advantage(means)
            if advantage is None:
                readings.append(_Reading("entropy", means["entropy"], config.entropy[:1], falling=True))
            elif advantage < config.endorsed_logprob:
                note = f"collapse to a string that the teacher does not endorse (mean advantage {advantage:.2f}): "
                readings.append(_Reading("entropy", means["entropy"], config.entropy, note, falling=True))
                kind = note if readings[-1].severity else kind
        for name in (each for each in _SHARES if each in means):
            thresholds = tuple(self._over_lowest(name, each) for each in getattr(config, name))
            readings.append(_Reading(name, means[name], thresholds, kind))
        if "length" in means and len(first) >= config.warmup_steps and sum(first) > 0:
            ratio = means["length"] * len(first) / sum(first)
            readings.append(_Reading("length_ratio", ratio, (config.length_ratio,)))
        if inflation:
            early = (means["teacher_logprob_repetitive"], (config.endorsed_logprob,), f"early alarm, {inflation}: ")
            readings.append(_Reading("teacher_logprob_repetitive", *early))
        return readings

    def _over_lowest(self, name: str, threshold: float) -> float:
        lowest = self._state.lowest[name]
        return lowest + (1 - lowest) * threshold

    def _signature(self, means: Mapping[str, float]) -> str:
        """The signature of inflation in words: enough repetitive tokens, of a higher advantage than the others;
        empty where there is none."""
        if not means.keys() >= set(_TOKENS):
            return ""
        share, repetitive, other = (means[each] for each in _TOKENS[:3])
        if share <= self._over_lowest("repetitive_share", self._config.repetitive_share) or repetitive <= other:
            return ""
        return f"repetitive tokens ({share:.0%}) have advantage {repetitive:.2f}, others {other:.2f}"

    def _announce(self, step: int, readings: list[_Reading], spoken: set[str]) -> list[GuardEvent]:
        """Warnings: a signal when it gets worse, and anew after it was quiet, unless an action has spoken of it."""
        events, state = [], self._state
        waits = "nothing was done" + (f" beyond the action at step {state.acted_at}" if state.acted_at else "")
        for reading in readings:
            worst, last = state.said.get(reading.signal, (0, step))
            worst = 0 if step - last > self._config.patience_steps else worst
            state.said[reading.signal] = [max(worst, reading.severity), step]
            if reading.severity > worst and reading.signal not in spoken:
                held = reading.severity > 1 and not self._may("act")
                events.append(reading.event(step, "warn", "guard.level allows no action" if held else waits))
        return events

    def _act(self, step: int, readings: list[_Reading]) -> tuple[list[GuardEvent], Order]:
        """At most one action a step, for the worst signal: a notch; with none left a rollback; then the end."""
        state, loud = self._state, [each for each in readings if each.severity > 1]
        waiting = state.acted_at is not None and step - state.acted_at < self._config.patience_steps
        if not loud or waiting or not self._may("act"):
            return [], "go on"
        worst = max(loud, key=lambda each: each.severity)
        if state.notch < self._num_notches:
            state.notch, state.acted_at = state.notch + 1, step
            notch = f" (notch {state.notch} of {self._num_notches})"
            return [worst.event(step, "act", self._setting() + notch)], "go on"
        if worst.severity == 3 and self._may_roll_back():
            return [worst.event(step, "rollback", self._roll_back(step))], "roll back"
        if worst.severity == 3 and self._may("stop"):
            state.acted_at = step
            return [worst.event(step, "stop", "no remedy is left, the run is stopped")], "stop"
        if state.said_spent or (worst.severity == 2 and self._may("rollback")):
            return [], "go on"
        state.said_spent = True
        return [worst.event(step, "warn", f"no remedy is left that guard.level allows: {self._setting()}")], "go on"

    def _roll_back(self, step: int) -> str:
        state = self._state
        state.num_rollbacks, state.acted_at = state.num_rollbacks + 1, step
        state.notch = min(state.notch + 1, self._num_notches)
        count = f"rollback {state.num_rollbacks} of {self._config.max_rollbacks}"
        return f"back to the last healthy checkpoint ({count}) with {self._setting()}"

    def _setting(self) -> str:
        """The strength in words, and why what is not raised is not."""
        strength = self.strength
        golden = "golden rollouts as configured" if self._has_golden else "no golden rollouts to add"
        if self._raises_golden:
            golden = f"at least {strength.golden_per_prompt:.3g} golden rollouts a prompt"
            golden += f" at λ_gold {strength.golden_coef:.3g}"
        kl = "β_KL as configured" if self._has_reference else "no reference for β_KL"
        if self._raises_kl:
            kl = f"β_KL at least {strength.reference_kl_coef:.3g}"
        return f"{golden}, {kl}, truncated tails {'masked' if strength.mask_truncated_tails else 'as configured'}"

    def _may(self, level: Level) -> bool:
        return _RANK[self._config.level] >= _RANK[level]

    def _may_roll_back(self) -> bool:
        return self._may("rollback") and self._state.num_rollbacks < self._config.max_rollbacks


def _between(configured: float, limit: float, part: float) -> float:
    return (1 - part) * configured + part * limit if limit > configured else 0.0


def _mean_advantage(means: Mapping[str, float]) -> float | None:
    """Over all student tokens; None without a teacher."""
    share, parts = means.get("repetitive_share"), {"advantage_repetitive", "advantage_other"} & means.keys()
    if share is None or not parts:
        return None
    return share * means.get("advantage_repetitive", 0.0) + (1 - share) * means.get("advantage_other", 0.0)
