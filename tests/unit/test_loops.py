"""Loops that the engine ended, and a teacher that endorses them: what their repeats are taught."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opd_ray import config as configs
from opd_ray.learn.losses import TokenBatch, Tokens
from opd_ray.learn.losses.advantage import loop_gradient
from opd_ray.learn.microbatch import MicroBatch, Segment
from opd_ray.learn.objective import Objective
from opd_ray.messages import Coefficients, Count, Denominators
from token_batches import scored

LOOPED, OTHER, COPIES, V = 3, 4, 6, 8
ENDORSED = 12.0
"""The teacher's logit of the looped token beside zeros: log π_T is −4e-5."""


class AsTheyAre:
    """An output layer whose states are the logits."""

    weight = torch.zeros(1, 1)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.clone()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def gradient(logits: torch.Tensor, tokens: torch.Tensor, looped: torch.Tensor, **loss: Any) -> torch.Tensor:
    """Of the objective's loss with respect to the student's logits [N, V]; the teacher is sure of every token."""
    of_teacher = torch.nn.functional.one_hot(tokens, V) * ENDORSED
    config = configs.from_dict(
        {
            "data": {"golden": None},
            "buffer": {"golden_per_prompt": 0},
            "rollout": {"repetition_detection": {"min_pattern_size": 1}},
            "loss": {"golden": {"coef": 0}, "reference": {"coef": 0}} | loss,
        }
    )
    objective = Objective(config, vocab_size=V, heads={"teacher": AsTheyAre()})
    behaviour = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    count = Count(1, len(tokens))
    segment = Segment(
        "student",
        ("one",),
        torch.tensor([len(tokens)]),
        torch.tensor([True]),
        Tokens(tokens, behaviour, {"teacher": scored(of_teacher, tokens, 4)}),
        torch.zeros(len(tokens)),
        looped=looped if config.loss.loop_advantage is not None else None,
    )
    part = MicroBatch(tokens[None], None, torch.arange(len(tokens)), (segment,))
    of = objective.of(part, Denominators(student=count), Coefficients(1.0, 0.0, 0.0, 0.0))
    student = logits.clone().requires_grad_()
    return torch.autograd.grad(of(student, AsTheyAre()), student)[0]


@pytest.mark.parametrize(
    "student",
    [
        {"divergence": "reverse_kl", "support": "full"},
        {"divergence": "reverse_kl", "top_k": 4},
        {"divergence": "forward_kl", "support": "full"},
        {"divergence": "jsd", "support": "full"},
        {"divergence": "k1"},
        {"divergence": "k2"},
    ],
    ids=str,
)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_loop_that_the_teacher_endorses_is_made_likelier_by_its_loss_and_rarer_by_an_advantage_of_its_own(
    student: dict[str, Any], share: float
) -> None:
    tokens = torch.tensor([OTHER, *[LOOPED] * COPIES])
    logits = torch.zeros(len(tokens), V)
    logits[1:, LOOPED] = torch.logit(torch.tensor(share)) + torch.log(torch.tensor(V - 1.0))
    looped = torch.tensor([0.0, 0.0, *[1.0] * (COPIES - 1)])
    fed = gradient(logits, tokens, looped, student=student)
    ended = gradient(logits, tokens, looped, student=student, loop_advantage=-1.0)
    left_out = gradient(logits, tokens, looped, student=student, loop_advantage=0.0)
    assert (fed[1:, LOOPED] < -1e-4).all(), "the loss of today raises every copy"
    assert (ended[2:, LOOPED] > 1e-4).all()
    torch.testing.assert_close(ended[2:, LOOPED], torch.full((COPIES - 1,), (1 - share) / len(tokens)))
    assert (left_out[2:] == 0).all()
    for each in (ended, left_out):  # the way into the loop and its first copy are taught as ever
        assert torch.equal(each[:2], fed[:2])


def test_its_gradient_is_that_of_finite_differences_and_lets_go_of_what_has_become_rare() -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(6, V, dtype=torch.float64), torch.randint(0, V, (6,))
    now = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    behaviour = now - torch.tensor([0.0, 0.1, -0.1, 0.5, -0.5, -0.2])  # ρ of .61 to 1.65

    def loss(z: torch.Tensor) -> torch.Tensor:
        return loop_gradient(TokenBatch(tokens=tokens, behaviour_logprobs=behaviour, logits=z), -0.7, 0.2)

    student = logits.clone().requires_grad_()
    found = torch.autograd.grad(loss(student).sum(), student)[0]
    ratio = (now - behaviour).exp()
    torch.testing.assert_close(loss(logits), 0.7 * ratio.clamp(min=0.8))
    for row, column in torch.cartesian_prod(torch.arange(6), torch.arange(V)).tolist():
        step = torch.zeros_like(logits)
        step[row, column] = 1e-6
        slope = (loss(logits + step) - loss(logits - step)).sum() / 2e-6
        assert found[row, column] == pytest.approx(slope.item(), abs=1e-8)
    assert (found[ratio < 0.8] == 0).all() and (ratio < 0.8).any()
    first = torch.nn.functional.one_hot(tokens[:1], V) - logits[:1].softmax(-1)
    torch.testing.assert_close(found[:1], 0.7 * first)  # on policy −A ∇log π
