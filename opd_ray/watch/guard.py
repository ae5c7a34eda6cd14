"""The guard: sees length inflation and its kin in a step's metrics, and says what to do about it.

Pure logic: it knows metric names and steps; nothing of losses, checkpoints or Ray. The driver shows it every
step and does what the verdict asks. Levels, each with those before it: warn; act (more golden rollouts and a
larger β_KL within stated limits, truncated tails masked); roll back to the last healthy checkpoint and keep the
stronger setting; stop.

Windows are so many steps as have some hundred rollouts. A share is measured from the run's own normal level b
(:mod:`opd_ray.watch.evidence`): a threshold t stands at b + (1 − b)·t, and is crossed only by a mean that is also
above b beyond its standard error. Between two actions a signal gets time to recede, and is judged by what was sampled
since. When health has returned for some windows the strength falls, a notch at a time; each relapse doubles that
time, so that a run which needs the strength does not swing.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from opd_ray.config import GuardConfig
from opd_ray.messages import Strength
from opd_ray.watch.evidence import Share, Windows

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
    num_quiet: int = 0
    """Steps in a row that showed health, since the strength last changed."""
    num_relapses: int = 0
    has_fallen: bool = False
    """Whether the last change of the strength was downwards."""
    said_spent: bool = False
    alarmed: bool = False
    budget: float | None = None
    first_lengths: list[float] = field(default_factory=list)
    windows: dict[str, list[float]] = field(default_factory=dict)
    shares: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The fields of a :class:`Share` by signal."""
    said: dict[str, list[int]] = field(default_factory=dict)
    """Signal to the highest severity announced and the last step at which it was not quiet."""


_VANISHING_GRAD_NORM = 0.02
"""Under it a student no longer moves, whatever the teacher says."""
_LONGER = 1.5
"""Mean length over that of the first steps; warns only, for a student may rightly learn to write more."""
_REPETITIVE_SHARE = 0.05
"""Share of repetitive tokens from which their advantage is compared with that of the others."""
_ENDORSED_LOGPROB = -1.0
"""Teacher's mean log-prob from which it endorses what the student writes; on repetitive tokens it warns only."""
_MOST_GOLDEN_FACTOR = 3.0
"""Limit of λ_gold as a multiple of the configured one, or of the student's coefficient where that is 0."""
_MOST_REFERENCE_KL = 1.0
"""Limit of β_KL as a multiple of the student's coefficient, for their ratio decides: at 1 a token's probability is
drawn to the geometric mean of teacher's and reference's, at .1 hardly at all."""
_MOST_NON_FINITE = 3
"""Steps in a row without a finite loss after which the run is rolled back where level allows, or else stopped."""
_NUM_NOTCHES = 2
_LEAST_PATIENCE, _LEAST_QUIET = 5, 20
"""Steps: what an action needs to show whatever the window, for weights move by steps; and health to be believed."""
_QUIET_WINDOWS = 4
_TOKENS = ("repetitive_share", "advantage_repetitive", "advantage_other", "teacher_logprob_repetitive")
_LEARNER = (*_TOKENS, "entropy", "grad_norm")
_WATCHED = {"length": "rollouts/length"} | {name: f"learner/{name}" for name in _LEARNER}
_SHARES = ("truncated_token_share", "truncation_rate", "repetition_rate")
_MEASURED = {name: f"rollouts/{name}" for name in _SHARES} | {"repetitive_share": "learner/repetitive_share"}
_BEGINS = (
    "the run begins like this and there is nothing healthier to compare with, later levels are measured from here; is "
    "rollout.max_response_tokens too small, do student and teacher end with other tokens, or does it lack a cold start?"
)


class Guard:
    """Judges one run, step by step in order. A metric that a step lacks leaves its signal silent.

    ``configured`` is what the run has without the guard, the point from which notches count; ``student_coef`` the
    weight of what they counter, by which β_KL is measured, and λ_gold where it is 0.
    """

    def __init__(
        self,
        config: GuardConfig,
        *,
        has_golden: bool,
        has_reference: bool,
        configured: Strength | None = None,
        student_coef: float = 1.0,
        rollouts_per_step: int = 32,
    ) -> None:
        self._config, self._configured = config, configured or Strength()
        self._has_golden, self._has_reference = has_golden, has_reference
        self._rollouts_per_step, self._windows = max(1, rollouts_per_step), Windows.of(rollouts_per_step)
        self._patience = max(_LEAST_PATIENCE, self._windows.middle)
        self._state, self._shares = _State(), {}
        self._most = Strength(
            config.max_golden_per_prompt,
            _MOST_GOLDEN_FACTOR * (self._configured.golden_coef or student_coef),
            _MOST_REFERENCE_KL * student_coef,
        )
        self._raises_golden = has_golden and self._most.golden_per_prompt > self._configured.golden_per_prompt
        self._raises_kl = has_reference and self._most.reference_kl_coef > self._configured.reference_kl_coef
        self._masks = not self._configured.mask_truncated_tails
        self._num_notches = _NUM_NOTCHES if self._raises_golden or self._raises_kl else int(self._masks)

    def look(self, step: int, metrics: Mapping[str, float]) -> Verdict:
        """Judges step ``step``; call it once after each, in order."""
        if self._config.level == "off":
            return Verdict((), self.strength, "go on")
        events, order = self._judge_loss(step, metrics.get("learner/loss", 0.0))
        if order == "go on":
            means = self._observe(metrics)
            seen = self._measure(metrics)
            events += self._beginning(step, seen)
            readings = [each for each in self._readings(means, seen) if each.severity]
            quiet = not any(each.signal in _SHARES for each in readings)
            for name in seen:
                self._shares[name].learn(self._windows, self._rollouts_per_step, quiet=quiet)
            if any(self._judges(name) for name in seen if name in _SHARES):  # one that sampled nothing tells nothing
                self._state.alarmed = any(len(each.thresholds) > 1 for each in readings)
                self._state.num_quiet = 0 if self._state.alarmed else self._state.num_quiet + 1
            action, order = self._act(step, readings)
            action += self._relax(step) if order == "go on" else []
            events += self._announce(step, readings, {event.signal for event in action}) + action
        return Verdict(tuple(events), self.strength, order)

    @property
    def strength(self) -> Strength:
        most, configured, notch = self._most, self._configured, self._state.notch
        if self._config.level == "off" or notch == 0:
            return Strength()
        part = min(1.0, notch / max(1, self._num_notches))
        golden = kl = coef = 0.0
        if self._raises_golden:
            golden = _between(configured.golden_per_prompt, most.golden_per_prompt, part)
            coef = _between(configured.golden_coef, most.golden_coef, part)
        if self._raises_kl:
            kl = _between(configured.reference_kl_coef, most.reference_kl_coef, part)
        return Strength(golden, coef, kl, self._masks)

    def healthy(self) -> bool:
        """Whether a checkpoint of the last step may be rolled back to: its loss was finite, and no signal
        that may cause an action is over its warning threshold."""
        return not self._state.alarmed and self._state.num_non_finite == 0

    def rolled_back(self, step: int) -> None:
        """The run goes on from ``step``: windows and announcements are cleared, the stronger setting stays."""
        state = self._state
        self._forget()
        state.windows, state.said, state.alarmed, state.num_non_finite = {}, {}, False, 0
        state.acted_at = step

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint; ``restore`` continues from them."""
        shares = {name: dataclasses.asdict(share) for name, share in self._shares.items()}
        return dataclasses.asdict(self._state) | {"shares": shares}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._state = _State(**copy.deepcopy(dict(state)))
        self._shares = {name: Share(**values) for name, values in self._state.shares.items()}

    def _judge_loss(self, step: int, loss: float) -> tuple[list[GuardEvent], Order]:
        """A step without a finite loss changes no weights, so a single one is harmless; a row of them is not.
        The event counts such steps in a row, so that its numbers are finite."""
        state, limit = self._state, _MOST_NON_FINITE
        state.num_non_finite = 0 if math.isfinite(loss) else state.num_non_finite + 1
        if state.num_non_finite == 0:
            return [], "go on"
        reading = _Reading("non_finite_loss", float(state.num_non_finite), (float(limit),), f"the loss is {loss}: ")
        if state.num_non_finite < limit:
            return [reading.event(step, "warn", "the step was skipped, the weights are unchanged")], "go on"
        if self._may_roll_back():
            return [reading.event(step, "rollback", self._roll_back(step))], "roll back"
        return [reading.event(step, "stop", "the run is stopped")], "stop"

    def _observe(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Window means, without the room's name, of what this step has and whose windows are full."""
        state, means = self._state, {}
        budget = metrics.get("rollouts/length_budget")
        if budget is not None and budget != state.budget:
            if state.budget is not None and budget < state.budget:
                self._shares.clear()  # a tighter budget truncates more by itself
            state.budget, state.first_lengths = budget, []
            state.windows.pop("length", None)
        for name, full_name in _WATCHED.items():
            value = metrics.get(full_name, math.nan)
            if not math.isfinite(value):
                continue
            window = state.windows.setdefault(name, [])
            window.append(float(value))
            size = self._windows.long if name == "length" else self._windows.short  # lengths are heavy-tailed
            del window[:-size]
            if len(window) == size:
                means[name] = sum(window) / len(window)
            if name == "length" and len(state.first_lengths) < self._windows.long:
                state.first_lengths.append(float(value))
        return means

    def _measure(self, metrics: Mapping[str, float]) -> list[str]:
        """Shows the step's shares to their windows, and says which it has."""
        seen = []
        length = metrics.get("rollouts/length", 1.0)
        for name, full_name in _MEASURED.items():
            value = metrics.get(full_name, math.nan)
            if math.isfinite(value):
                weight = length if name.endswith("_share") and math.isfinite(length) else 1.0
                self._shares.setdefault(name, Share()).add(float(value), float(weight), self._windows)
                seen.append(name)
        return seen

    def _beginning(self, step: int, seen: list[str]) -> list[GuardEvent]:
        """Says once, as early as it is certain, that a run begins above a warning threshold."""
        events = []
        for name in (each for each in seen if each in _SHARES):
            warn, share = getattr(self._config, name)[0], self._shares[name]
            if share.begins_beyond(warn, self._windows, self._rollouts_per_step):
                reading = _Reading(name, share.mean(len(share.steps)), (warn,))
                events.append(reading.event(step, "warn", _BEGINS))
        return events

    def _judges(self, name: str) -> bool:
        share = self._shares[name]
        return share.known(self._windows) and len(share.steps) >= self._windows.short

    def _share_reading(self, name: str, kind: str) -> _Reading | None:
        """The worst of the windows that are above the normal level beyond chance, and of those the shortest."""
        share, worst = self._shares[name], None
        thresholds = tuple(self._over_normal(name, each) for each in getattr(self._config, name))
        for steps in dict.fromkeys(dataclasses.astuple(self._windows)):
            if steps > len(share.steps):
                break
            reading = _Reading(name, share.mean(steps), thresholds, kind)
            if reading.severity > (worst.severity if worst else 0) and share.differs(steps, self._rollouts_per_step):
                worst = reading
        return worst

    def _readings(self, means: Mapping[str, float], seen: list[str]) -> list[_Reading]:
        config, first, readings = self._config, self._state.first_lengths, []
        inflation = self._signature(means)
        endorsed = means.get("teacher_logprob_repetitive", -math.inf) > _ENDORSED_LOGPROB
        kind = f"length inflation that the teacher endorses: {inflation}: " if inflation and endorsed else ""
        if means.get("grad_norm", math.inf) < _VANISHING_GRAD_NORM and "entropy" in means:
            advantage = _mean_advantage(means)
            if advantage is None:
                readings.append(_Reading("entropy", means["entropy"], config.entropy[:1], falling=True))
            elif advantage < _ENDORSED_LOGPROB:
                note = f"collapse to a string that the teacher does not endorse (mean advantage {advantage:.2f}): "
                readings.append(_Reading("entropy", means["entropy"], config.entropy, note, falling=True))
                kind = note if readings[-1].severity else kind
        judged = [each for each in seen if each in _SHARES and self._judges(each)]
        readings += [reading for name in judged if (reading := self._share_reading(name, kind))]
        if "length" in means and len(first) >= self._windows.long and sum(first) > 0:
            ratio = means["length"] * len(first) / sum(first)
            readings.append(_Reading("length_ratio", ratio, (_LONGER,)))
        if inflation:
            early = (means["teacher_logprob_repetitive"], (_ENDORSED_LOGPROB,), f"early alarm, {inflation}: ")
            readings.append(_Reading("teacher_logprob_repetitive", *early))
        return readings

    def _over_normal(self, name: str, threshold: float) -> float:
        level = self._shares[name].level()
        return level + (1 - level) * threshold

    def _signature(self, means: Mapping[str, float]) -> str:
        """The signature of inflation in words: enough repetitive tokens, of a higher advantage than the others;
        empty where there is none."""
        if not means.keys() >= set(_TOKENS) or not self._judges("repetitive_share"):
            return ""
        share, repetitive, other = (means[each] for each in _TOKENS[:3])
        if share <= self._over_normal("repetitive_share", _REPETITIVE_SHARE) or repetitive <= other:
            return ""
        return f"repetitive tokens ({share:.0%}) have advantage {repetitive:.2f}, others {other:.2f}"

    def _announce(self, step: int, readings: list[_Reading], spoken: set[str]) -> list[GuardEvent]:
        """Warnings: a signal when it gets worse, and anew after it was quiet, unless an action has spoken of it."""
        events, state = [], self._state
        waits = "nothing was done" + (f" beyond the action at step {state.acted_at}" if state.acted_at else "")
        for reading in readings:
            worst, last = state.said.get(reading.signal, (0, step))
            worst = 0 if step - last > self._patience else worst
            state.said[reading.signal] = [max(worst, reading.severity), step]
            if reading.severity > worst and reading.signal not in spoken:
                held = reading.severity > 1 and not self._may("act")
                events.append(reading.event(step, "warn", "guard.level allows no action" if held else waits))
        return events

    def _act(self, step: int, readings: list[_Reading]) -> tuple[list[GuardEvent], Order]:
        """At most one action a step, for the worst signal: a notch; with none left a rollback; then the end."""
        state, loud = self._state, [each for each in readings if each.severity > 1]
        waiting = state.acted_at is not None and step - state.acted_at < self._patience
        if not loud or waiting or not self._may("act"):
            return [], "go on"
        worst = max(loud, key=lambda each: each.severity)
        if state.notch < self._num_notches:
            self._strengthen(step)
            self._forget()  # the next action is for what is sampled from now on
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
        state.num_rollbacks += 1
        self._strengthen(step)
        count = f"rollback {state.num_rollbacks} of {self._config.max_rollbacks}"
        return f"back to the last healthy checkpoint ({count}) with {self._setting()}"

    def _strengthen(self, step: int) -> None:
        state = self._state
        state.notch, state.acted_at = min(state.notch + 1, self._num_notches), step
        state.num_relapses += state.has_fallen
        state.has_fallen, state.num_quiet, state.said_spent = False, 0, False

    def _relax(self, step: int) -> list[GuardEvent]:
        """A notch less, when health has returned for so many steps as past relapses ask for."""
        state = self._state
        wanted = max(_LEAST_QUIET, _QUIET_WINDOWS * self._windows.long) * 2**state.num_relapses
        if state.notch == 0 or state.num_quiet < wanted:
            return []
        quiet = _Reading("health", float(state.num_quiet), (float(wanted),), f"healthy for {state.num_quiet} steps: ")
        state.notch, state.has_fallen, state.num_quiet, state.said_spent = state.notch - 1, True, 0, False
        setting = self._setting() if state.notch else "everything as configured"
        return [quiet.event(step, "act", f"{setting} (down to notch {state.notch} of {self._num_notches})")]

    def _forget(self) -> None:
        """The windows begin anew, the normal levels stay."""
        for share in self._shares.values():
            share.steps.clear()
            share.told_beginning = True

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
