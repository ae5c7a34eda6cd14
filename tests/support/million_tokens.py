"""One million tokens through the loss, run in a process of its own: prints memory (MiB) and CPU time as JSON.

The states are given, as there is no body: what is measured is everything behind it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from opd_ray.config import from_dict
from opd_ray.learn.heads import ResponseHead
from opd_ray.learn.losses import ScoredTokens, Tokens
from opd_ray.learn.microbatch import MicroBatch, Segment
from opd_ray.learn.objective import Objective
from opd_ray.messages import Coefficients, Count, Denominators
from opd_ray.models.heads import FrozenHead

ROLLOUTS, LENGTH = 1000, 1000
TOKENS, VOCABULARY, HIDDEN = ROLLOUTS * LENGTH, 256, 8


def status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**10


def peak_mb() -> float:
    """Of what is not a file's: its pages leave and come again as the kernel likes, and a refault is no growth.

    Not ru_maxrss, which begins with what the process that started this one held.
    """
    return status_mb("VmHWM") - status_mb("RssFile")


def main(logits_mb: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = from_dict(
        {
            "learner": {"logits_mb": logits_mb},
            "loss": {"student": {"divergence": "reverse_kl", "support": "full"}, "reference": {"coef": 0.0}},
        }
    )
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    states = torch.randn(TOKENS, HIDDEN, generator=generator)
    tokens = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    other = FrozenHead(torch.randn(VOCABULARY, HIDDEN, generator=generator), None)
    parts = zip(states.split(4096), tokens.split(4096), strict=True)
    scores = torch.cat([other(part).log_softmax(-1).gather(-1, own[:, None])[:, 0] for part, own in parts])
    teacher = ScoredTokens(scores, stop_logprobs=scores, hidden=states)
    segment = Segment(
        source="student",
        rollout_ids=tuple(map(str, range(ROLLOUTS))),
        lengths=torch.full((ROLLOUTS,), LENGTH),
        truncated=torch.zeros(ROLLOUTS, dtype=torch.bool),
        tokens=Tokens(tokens, scores, {"teacher": teacher}, reward_advantages=torch.zeros(TOKENS)),
        repetitive=torch.zeros(TOKENS),
    )
    batch = MicroBatch(
        input_ids=torch.zeros(1, 1, dtype=torch.int64),
        position_ids=None,
        logit_index=torch.zeros(0, dtype=torch.int64),
        segments=(segment,),
    )
    head = ResponseHead(HIDDEN, VOCABULARY, bias=False)
    objective = Objective(config, vocab_size=VOCABULARY, stop_token_ids=(1,), heads={"teacher": other})
    before, began = status_mb("RssAnon"), time.process_time()
    head.consumer = objective.of(batch, Denominators(student=Count(ROLLOUTS, TOKENS)), Coefficients(1.0, 0.0, 0.0, 0.0))
    loss = head(hidden)
    loss.backward()
    finite = bool(torch.isfinite(hidden.grad).all() and torch.isfinite(head.weight.grad).all())
    print(
        json.dumps(
            {
                "loss": loss.item(),
                "finite": finite and head.weight.grad.abs().max().item() > 0,
                "seconds": time.process_time() - began,
                "grown_mb": peak_mb() - before,
                "matrix_mb": TOKENS * VOCABULARY * 4 / 2**20,
                "tokens": TOKENS,
                "hidden": HIDDEN,
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
