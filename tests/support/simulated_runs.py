"""Steps as a guard sees them, of runs that are made up: healthy ones, and ones whose truncation climbs to the end.

python tests/support/simulated_runs.py SEED [HEALTHY COLLAPSING]     how often it acts on those, how late on these
"""

import sys
from statistics import NormalDist

import numpy as np

from opd_ray.config import GuardConfig
from opd_ray.watch.guard import Guard

BUDGET, LONG, SPREAD = 4096, 1000.0, 0.8
PER_PROMPT = 4


def steps_of(rng, rollouts, steps, onset=None, truncated=0.04, alike=0.5):
    """One dict of metrics a step. Lengths are log-normal, four rollouts share a prompt's difficulty (``alike`` of the
    variance of log-length and of the propensity to run to the budget); from ``onset`` on truncation climbs to 1 in 30
    steps and half of what is truncated repeats itself."""
    prompts = -(-rollouts // PER_PROMPT)
    shape = (steps, prompts, PER_PROMPT)

    def normal():
        common = rng.standard_normal((steps, prompts, 1))
        return (alike**0.5 * common + (1 - alike) ** 0.5 * rng.standard_normal(shape)).reshape(steps, -1)[:, :rollouts]

    lengths = np.minimum(np.exp(np.log(LONG) + SPREAD * normal()), BUDGET - 1)
    rate = np.full(steps, truncated)
    if onset is not None:
        rate += (1 - truncated) * np.clip((np.arange(steps) - onset + 1) / 30, 0, 1)
    cuts = [-np.inf if each >= 1 else NormalDist().inv_cdf(1 - each) for each in rate]
    cut = normal() > np.array(cuts)[:, None]
    lengths = np.where(cut, BUDGET, lengths)
    repeats = cut & (rng.random(cut.shape) < (0.5 if onset is not None else 0.1))
    columns = (
        ("truncated_token_share", (lengths * cut).sum(1) / lengths.sum(1)),
        ("truncation_rate", cut.mean(1)),
        ("repetition_rate", repeats.mean(1)),
        ("length", lengths.mean(1)),
    )
    each = zip(*(values.tolist() for _, values in columns), strict=True)
    names = [f"rollouts/{name}" for name, _ in columns]
    return [dict(zip(names, row, strict=True)) | {"learner/loss": 1.0} for row in each]


def acts_at(rollouts, rows, of_probes=None, probes=1.0):
    """The first step at which the guard acts on a signal, or None. With rows ``of_probes``, a share ``probes`` of the
    rollouts, it begins with a horizon that it has shortened, and sees those until that is whole again."""
    config = GuardConfig(level="act", min_horizon=0.5 if of_probes else 1)
    room = {"has_golden": True, "has_reference": True, "configured": None, "student_coef": 1.0}
    guard = Guard(config, **room, rollouts_per_step=rollouts)
    if of_probes:
        guard.restore(guard.state() | {"notch": 1, "horizons": [[0, 0.5]]})
    for step, row in enumerate(rows, 1):
        if guard.horizon_at(step) < 1:
            row = of_probes[step - 1] | {"rollouts/whole": probes * rollouts}
        if any(event.level == "act" and event.signal != "health" for event in guard.look(step, row)):
            return step
    return None


def false_actions(rollouts, runs, seed, probes=None):
    """How many of so many healthy runs of 500 steps see the guard act; with ``probes``, a share of the rollouts, after
    a beginning with a shorter horizon."""
    found = 0
    for run in range(runs):
        rng = np.random.default_rng([seed, rollouts, run])
        rows = steps_of(rng, rollouts, 500)
        of_probes = steps_of(rng, round(probes * rollouts), 500) if probes else None
        found += acts_at(rollouts, rows, of_probes, probes) is not None
    return found


def delays(rollouts, runs, seed):
    """Steps from the onset of a collapse, at step 150 and later, to the first action; inf where there is none."""
    found = []
    for run in range(runs):
        rng, onset = np.random.default_rng([seed + 1, rollouts, run]), 150 + run
        step = acts_at(rollouts, steps_of(rng, rollouts, onset + 30, onset))
        found.append(np.inf if step is None else step - onset)
    return np.array(found)


if __name__ == "__main__":
    seed, healthy, collapsing = (int(each) for each in (*sys.argv[1:4], *("0", "200", "60")[len(sys.argv[1:4]) :]))
    for size in (8, 16, 32, 64, 128, 256):
        late = delays(size, collapsing, seed)
        acted = false_actions(size, healthy, seed)
        print(
            f"{size} rollouts a step: acts in {acted} of {healthy} healthy runs; on a collapse after "
            f"{np.median(late):g} steps (median), within ten in {np.mean(late <= 10):.0%}, {late.max():g} at most"
        )
