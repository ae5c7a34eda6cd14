"""Steps as a guard sees them, of runs that are made up: healthy ones, and ones whose truncation climbs to the end."""

from statistics import NormalDist

import numpy as np

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
