"""What the guard may do short of a rollback, a notch at a time: settings and what they are called.

The first notches halve the horizon, which costs least and saves what it cuts off: a collapse does not wait, and all of
them are taken at once; back they go one by one. Those after them keep it there and go from what is configured to the
limits of golden rollouts, λ_gold and β_KL, with the tails of truncated rollouts masked.
"""

from __future__ import annotations

import math

from opd_ray.config import GuardConfig
from opd_ray.messages import Strength

_MOST_GOLDEN_FACTOR = 3.0
"""Limit of λ_gold as a multiple of the configured one, or of the student's coefficient where that is 0."""
_MOST_REFERENCE_KL = 1.0
"""Limit of β_KL as a multiple of the student's coefficient, for their ratio decides: at 1 a token's probability is
drawn to the geometric mean of teacher's and reference's, at .1 hardly at all."""
_RAISES = 2
_RAISED = ("golden_per_prompt", "golden_coef", "reference_kl_coef")


class Ladder:
    """The notches of one run, 0 being as it is configured. For the arguments see the guard's."""

    def __init__(
        self,
        config: GuardConfig,
        *,
        has_golden: bool,
        has_reference: bool,
        may_shorten: bool,
        configured: Strength,
        student_coef: float,
    ) -> None:
        self._configured, self._min_horizon = configured, config.min_horizon if may_shorten else 1.0
        self._has_golden, self._has_reference = has_golden, has_reference
        kl = _MOST_REFERENCE_KL * student_coef
        self._raises_golden = has_golden and config.max_golden_per_prompt > configured.golden_per_prompt
        self._raises_kl = has_reference and kl > configured.reference_kl_coef
        self._most = Strength(
            config.max_golden_per_prompt * self._raises_golden,
            _MOST_GOLDEN_FACTOR * (configured.golden_coef or student_coef) * self._raises_golden,
            kl * self._raises_kl,
            not configured.mask_truncated_tails,
        )
        self.halvings = math.ceil(-math.log2(self._min_horizon))
        """The notches that are those of the horizon alone."""
        raises = self._raises_golden or self._raises_kl
        self._raises = _RAISES if raises else int(self._most.mask_truncated_tails)
        self.num_notches = self.halvings + self._raises

    def above(self, notch: int) -> int:
        """The next one of an action, or the last."""
        return min(max(notch + 1, self.halvings), self.num_notches)

    def strength(self, notch: int) -> Strength:
        horizon = max(self._min_horizon, 0.5 ** min(notch, self.halvings))
        if notch <= self.halvings:
            return Strength(horizon=horizon)
        part = min(1.0, (notch - self.halvings) / max(1, self._raises))

        def raised(name: str) -> float:
            configured, most = getattr(self._configured, name), getattr(self._most, name)
            return (1 - part) * configured + part * most if most > configured else 0.0

        return Strength(*map(raised, _RAISED), self._most.mask_truncated_tails, horizon)

    def setting(self, notch: int) -> str:
        """A notch in words, and why what is not raised is not."""
        strength = self.strength(notch)
        horizon = f"rollouts up to {strength.horizon:.0%} of the horizon" if self.halvings else ""
        if 0 < notch <= self.halvings:
            return horizon
        golden = "golden rollouts as configured" if self._has_golden else "no golden rollouts to add"
        if self._raises_golden:
            golden = f"at least {strength.golden_per_prompt:.3g} golden rollouts a prompt"
            golden += f" at λ_gold {strength.golden_coef:.3g}"
        kl = "β_KL as configured" if self._has_reference else "no reference for β_KL"
        if self._raises_kl:
            kl = f"β_KL at least {strength.reference_kl_coef:.3g}"
        tails = f"truncated tails {'masked' if strength.mask_truncated_tails else 'as configured'}"
        return ", ".join(filter(None, (horizon, golden, kl, tails)))
