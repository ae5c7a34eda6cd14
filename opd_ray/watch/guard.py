"""The guard: sees length inflation and its kin in a step's metrics, and says what to do about it.

Pure logic: it knows metric names and steps; nothing of losses, checkpoints or Ray. The driver shows it every
step and does what the verdict asks. Levels, each with those before it: warn; act, a notch of
:mod:`opd_ray.watch.ladder` at a time; roll back to the last healthy checkpoint and keep the stronger setting; stop.

Windows are so many steps as have some hundred rollouts. A share is measured from the run's own normal level b
(:mod:`opd_ray.watch.evidence`): a threshold t stands at b + (1 − b)·t, and is crossed only by a mean that is also
above b beyond its standard error. Between two actions a signal gets time to recede, and is judged by what was sampled
since. When health has returned for some windows the strength falls, a notch at a time; each relapse doubles that
time, so that a run which needs the strength does not swing.

Under a shorter horizon shares are those of the rollouts that have the whole budget all the same, and so many steps
count as one that they have the rollouts of one: it takes longer to tell them from chance, and no chance more. Rollouts
are asked for some steps ahead: a horizon holds from the first step on whose rollouts nobody had asked for when it was
decided, so that a run which resumes samples the same.
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
from opd_ray.watch.ladder import Ladder

Level = Literal["warn", "act", "rollback", "stop"]

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
    """All that a resumed run must know."""

    notch: int = 0
    num_rollbacks: int = 0
    num_non_finite: int = 0
    acted_at: int | None = None
    horizons: list[list[float]] = field(default_factory=list)
    """[0-based step, share] from which on it holds: the one of the step under way, and those to come."""
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
    shares: dict[str, Share] = field(default_factory=dict)
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
_MOST_NON_FINITE = 3
"""Steps in a row without a finite loss after which the run is rolled back where level allows, or else stopped."""
_LEAST_PATIENCE, _LEAST_QUIET = 5, 20
"""Steps: what an action needs to show whatever the window, for weights move by steps; and health to be believed."""
_QUIET_WINDOWS = 4
_TOKENS = ("repetitive_share", "advantage_repetitive", "advantage_other", "teacher_logprob_repetitive")
_AVERAGED = {"length": "rollouts/length"} | {name: f"learner/{name}" for name in (*_TOKENS, "entropy", "grad_norm")}
_SHARES = ("truncated_token_share", "truncation_rate", "repetition_rate")
_MEASURED = {name: f"rollouts/{name}" for name in _SHARES} | {"repetitive_share": "learner/repetitive_share"}
_BEGINS = (
    "the run begins like this and there is nothing healthier to compare with, later levels are measured from here; is "
    "rollout.max_response_tokens too small, do student and teacher end with other tokens, or does it lack a cold start?"
)


class Guard:
    """Judges one run, step by step in order. A metric that a step lacks leaves its signal silent.

    ``configured`` is what the run has without the guard, the point from which notches count; ``student_coef`` the
    weight of what they counter, by which β_KL is measured, and λ_gold where it is 0. Rollouts are sampled at most
    ``steps_ahead`` steps before the one under way.
    """

    def __init__(
        self,
        config: GuardConfig,
        *,
        has_golden: bool,
        has_reference: bool,
        may_shorten: bool = True,
        configured: Strength | None = None,
        student_coef: float = 1.0,
        rollouts_per_step: int = 32,
        steps_ahead: int = 0,
    ) -> None:
        self._config, self._rollouts_per_step, self._steps_ahead = config, rollouts_per_step, steps_ahead
        self._ladder = Ladder(
            config,
            has_golden=has_golden,
            has_reference=has_reference,
            may_shorten=may_shorten,
            configured=configured or Strength(),
            student_coef=student_coef,
        )
        self._windows = Windows.of(rollouts_per_step)
        self._patience = max(_LEAST_PATIENCE, self._windows.middle)
        self._state = _State()

    def look(self, step: int, metrics: Mapping[str, float]) -> list[GuardEvent]:
        """Judges step ``step``; call it once after each, in order. A last event of a rollback or a stop is an order:
        the loop ends."""
        if self._config.level == "off":
            return []
        events = self._judge_loss(step, metrics.get("learner/loss", 0.0))
        if not events or events[-1].level == "warn":
            known = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
            means, shares = self._average(known), self._measure(known)
            here = [name for name in _SHARES if _MEASURED[name] in known]
            events += self._beginning(step, shares)
            readings = [each for each in self._readings(means, shares) if each.severity]
            quiet = not any(each.signal in _SHARES for each in readings)
            for share in shares.values():
                share.learn(self._windows, quiet=quiet)
            if any(shares[name].tells(self._windows) for name in _SHARES if name in shares):
                self._state.alarmed = any(len(each.thresholds) > 1 for each in readings)
            if any(self._state.shares[name].tells(self._windows) for name in here):
                # That it is not told from chance is no health yet: few rollouts tell little.
                health = all(self._is_low(name) for name in here)
                self._state.num_quiet = 0 if self._state.alarmed else self._state.num_quiet + health
            action = self._act(step, readings) or self._relax(step)
            events += self._announce(step, readings, {event.signal for event in action}) + action
            self._note_horizon(step)
        return events

    @property
    def strength(self) -> Strength:
        return self._ladder.strength(0 if self._config.level == "off" else self._state.notch)

    def horizon_at(self, step: int) -> float:
        """Share of the configured horizon that rollouts of a 0-based step get, none that was asked for before."""
        if self._config.level == "off":  # the state is of a run that had a guard
            return 1.0
        return next((share for since, share in reversed(self._state.horizons) if since <= step), 1.0)

    def healthy(self) -> bool:
        """Whether a checkpoint of the last step may be rolled back to: its loss was finite, and no signal
        that may cause an action is over its warning threshold."""
        return not self._state.alarmed and self._state.num_non_finite == 0

    def rolled_back(self, step: int) -> None:
        """The run goes on from ``step``: windows and announcements are cleared, the stronger setting stays."""
        state = self._state
        self._forget()
        state.windows, state.said, state.alarmed, state.num_non_finite = {}, {}, False, 0
        state.acted_at, state.horizons = step, [[0, self.strength.horizon]]

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint; ``restore`` continues from them."""
        return dataclasses.asdict(self._state)

    def restore(self, state: Mapping[str, Any]) -> None:
        values = copy.deepcopy(dict(state))
        shares = {name: Share(**share) for name, share in values.pop("shares", {}).items()}
        if "horizons" not in state and state["notch"]:  # of a version without those of the horizon
            values["notch"] += self._ladder.halvings
        self._state = _State(**values, shares=shares)

    def _judge_loss(self, step: int, loss: float) -> list[GuardEvent]:
        """A step without a finite loss changes no weights, so a single one is harmless; a row of them is not.
        The event counts such steps in a row, so that its numbers are finite."""
        state, limit = self._state, _MOST_NON_FINITE
        state.num_non_finite = 0 if math.isfinite(loss) else state.num_non_finite + 1
        if state.num_non_finite == 0:
            return []
        reading = _Reading("non_finite_loss", float(state.num_non_finite), (float(limit),), f"the loss is {loss}: ")
        if state.num_non_finite < limit:
            return [reading.event(step, "warn", "the step was skipped, the weights are unchanged")]
        if self._may_roll_back():
            return [reading.event(step, "rollback", self._roll_back(step))]
        return [reading.event(step, "stop", "the run is stopped")]

    def _average(self, known: Mapping[str, float]) -> dict[str, float]:
        """Window means, without the room's name, of what this step has and whose windows are full."""
        state, means = self._state, {}
        budget = known.get("rollouts/length_budget", state.budget)
        if budget != state.budget:
            if state.budget is not None and budget < state.budget:
                state.shares.clear()  # a tighter budget truncates more by itself
            state.budget, state.first_lengths = budget, []
            state.windows.pop("length", None)
        for name, full_name in _AVERAGED.items():
            if full_name not in known:
                continue
            size = self._windows.long if name == "length" else self._windows.short  # lengths are heavy-tailed
            window = state.windows[name] = [*state.windows.get(name, []), known[full_name]][-size:]
            if len(window) == size:
                means[name] = sum(window) / size
            if name == "length" and len(state.first_lengths) < size:
                state.first_lengths.append(window[-1])
        return means

    def _measure(self, known: Mapping[str, float]) -> dict[str, Share]:
        """Those shares in whose windows the step is, with others before it or alone."""
        here = {name: known[full_name] for name, full_name in _MEASURED.items() if full_name in known}
        asked = self._rollouts_per_step or 1  # where only teacher or data write, nothing is cut off
        measured = min(1.0, known.get("rollouts/whole", asked) / asked)
        for name, value in list(here.items()):
            weight = known.get("rollouts/length", 1.0) if name.endswith("_share") else 1.0
            part = measured if name in _SHARES else 1.0
            if not self._state.shares.setdefault(name, Share()).add(value, weight, self._windows, part):
                del here[name]
        return {name: self._state.shares[name] for name in here}

    def _is_low(self, name: str) -> bool:
        """Is the mean over the longest window below the warning threshold?"""
        share, warn = self._state.shares[name], getattr(self._config, name)[0]
        steps = min(len(share.steps), self._windows.long)
        return steps == 0 or share.mean(steps) <= share.above_level(warn)

    def _beginning(self, step: int, shares: Mapping[str, Share]) -> list[GuardEvent]:
        """Says once, as early as it is certain, that a run begins above a warning threshold."""
        warn = {name: getattr(self._config, name)[0] for name in _SHARES if name in shares}
        return [
            _Reading(name, shares[name].mean(len(shares[name].steps)), (limit,)).event(step, "warn", _BEGINS)
            for name, limit in warn.items()
            if shares[name].begins_beyond(limit, self._windows)
        ]

    def _readings(self, means: Mapping[str, float], shares: Mapping[str, Share]) -> list[_Reading]:
        config, first, readings, kind = self._config, self._state.first_lengths, [], ""
        inflation = self._signature(means, shares)
        if inflation and means["teacher_logprob_repetitive"] > _ENDORSED_LOGPROB:
            kind = f"length inflation that the teacher endorses: {inflation}: "
        if means.get("grad_norm", math.inf) < _VANISHING_GRAD_NORM and "entropy" in means:
            advantage = _mean_advantage(means)
            if advantage is None:
                readings.append(_Reading("entropy", means["entropy"], config.entropy[:1], falling=True))
            elif advantage < _ENDORSED_LOGPROB:
                note = f"collapse to a string that the teacher does not endorse (mean advantage {advantage:.2f}): "
                readings.append(_Reading("entropy", means["entropy"], config.entropy, note, falling=True))
                kind = note if readings[-1].severity else kind
        for name in (each for each in _SHARES if each in shares and shares[each].tells(self._windows)):
            thresholds = tuple(map(shares[name].above_level, getattr(config, name)))
            if (mean := shares[name].worst(thresholds, self._windows)) is not None:
                readings.append(_Reading(name, mean, thresholds, kind))
        if "length" in means and len(first) >= self._windows.long and sum(first) > 0:
            ratio = means["length"] * len(first) / sum(first)
            readings.append(_Reading("length_ratio", ratio, (_LONGER,)))
        if inflation:
            early = (means["teacher_logprob_repetitive"], (_ENDORSED_LOGPROB,), f"early alarm, {inflation}: ")
            readings.append(_Reading("teacher_logprob_repetitive", *early))
        return readings

    def _signature(self, means: Mapping[str, float], shares: Mapping[str, Share]) -> str:
        """The signature of inflation in words: enough repetitive tokens, of a higher advantage than the others;
        empty where there is none."""
        if not means.keys() >= set(_TOKENS) or not shares["repetitive_share"].tells(self._windows):
            return ""
        part, repetitive, other, _ = (means[each] for each in _TOKENS)
        if part <= shares["repetitive_share"].above_level(_REPETITIVE_SHARE) or repetitive <= other:
            return ""
        return f"repetitive tokens ({part:.0%}) have advantage {repetitive:.2f}, others {other:.2f}"

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

    def _act(self, step: int, readings: list[_Reading]) -> list[GuardEvent]:
        """At most one action a step, for the worst signal: a notch; with none left a rollback; then the end."""
        state, loud = self._state, [each for each in readings if each.severity > 1]
        waiting = state.acted_at is not None and step - state.acted_at < self._patience
        if not loud or waiting or not self._may("act"):
            return []
        worst = max(loud, key=lambda each: each.severity)
        if state.notch < self._ladder.num_notches:
            self._strengthen(step)
            self._forget()  # the next action is for what is sampled from now on
            how = f"{self._ladder.setting(state.notch)} (notch {state.notch} of {self._ladder.num_notches})"
            return [worst.event(step, "act", how)]
        if worst.severity == 3 and self._may_roll_back():
            return [worst.event(step, "rollback", self._roll_back(step))]
        if worst.severity == 3 and self._may("stop"):
            state.acted_at = step
            return [worst.event(step, "stop", "no remedy is left, the run is stopped")]
        if state.said_spent or (worst.severity == 2 and self._may("rollback")):
            return []
        state.said_spent = True
        return [
            worst.event(step, "warn", f"no remedy is left that guard.level allows: {self._ladder.setting(state.notch)}")
        ]

    def _roll_back(self, step: int) -> str:
        state = self._state
        state.num_rollbacks += 1
        self._strengthen(step)
        count = f"rollback {state.num_rollbacks} of {self._config.max_rollbacks}"
        return f"back to the last healthy checkpoint ({count}) with {self._ladder.setting(state.notch)}"

    def _strengthen(self, step: int) -> None:
        state = self._state
        state.notch, state.acted_at = self._ladder.above(state.notch), step
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
        setting = self._ladder.setting(state.notch) if state.notch else "everything as configured"
        return [quiet.event(step, "act", f"{setting} (down to notch {state.notch} of {self._ladder.num_notches})")]

    def _note_horizon(self, step: int) -> None:
        """From which step on the horizon holds, where it has changed."""
        state, share, since = self._state, self.strength.horizon, step + self._steps_ahead
        if share != self.horizon_at(since):
            state.horizons.append([since, share])
        if any(since == step for since, _ in state.horizons):  # the next step is the first with it
            state.shares.pop("repetitive_share", None)  # of all rollouts: less of a shorter one repeats itself
        while len(state.horizons) > 1 and state.horizons[1][0] <= step:
            del state.horizons[0]

    def _forget(self) -> None:
        """The windows begin anew, the normal levels stay."""
        for share in self._state.shares.values():
            share.forget()

    def _may(self, level: Level) -> bool:
        return _RANK[self._config.level] >= _RANK[level]

    def _may_roll_back(self) -> bool:
        return self._may("rollback") and self._state.num_rollbacks < self._config.max_rollbacks


def _mean_advantage(means: Mapping[str, float]) -> float | None:
    """Over all student tokens; None without a teacher."""
    share, parts = means.get("repetitive_share"), {"advantage_repetitive", "advantage_other"} & means.keys()
    if share is None or not parts:
        return None
    return share * means.get("advantage_repetitive", 0.0) + (1 - share) * means.get("advantage_other", 0.0)
