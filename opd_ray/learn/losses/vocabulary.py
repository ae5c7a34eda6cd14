"""The reverse KL on the whole vocabulary, with its gradient, in a few passes over the logits.

It is :func:`~opd_ray.learn.losses.divergences.reverse_kl` on the outcomes of support=full, with z and t the logits of
student p and frozen model q over the ids that both have, and n_p, n_q the logarithms of Σ exp z and Σ exp t:

    KL(p‖q) = Σ p (z − t) + n_q − n_p        ∂KL/∂z = p (z − t + n_q − n_p − KL)
    H(p) = n_p − Σ p z                       H(q) = n_q − Σ q t

An EOS set is one outcome; its logit is log Σ exp of its members', who share its gradient as they do its probability.
"""

from __future__ import annotations

from typing import Any

import torch

from opd_ray.learn.losses import Head

_BLOCK = 2**18
"""Logits that are worked on at a time: they stay in a core's cache, and fresh pages cost more than the arithmetic."""
_FEWEST_ROWS = 64
"""Of a block, so that the frozen model's output layer is not read for a few tokens alone."""


def reverse_kl(
    logits: torch.Tensor, hidden: torch.Tensor, head: Head, stop_token_ids: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(KL(p‖q) with gradient, H(p), H(q)) of each token, [N] nats: of the student's ``logits`` [N, V], and of the
    frozen model's ``hidden`` [N, H] and ``head``. Its backward pass can be made once."""
    return _ReverseKl.apply(logits, hidden, head, stop_token_ids)


class _ReverseKl(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, logits: torch.Tensor, hidden: torch.Tensor, head: Head, stop_token_ids: tuple[int, ...]
    ) -> tuple[torch.Tensor, ...]:
        gradient = torch.empty_like(logits)
        rows = max(_FEWEST_ROWS, _BLOCK // logits.shape[-1])
        blocks = zip(*(tensor.split(rows) for tensor in (logits, hidden, gradient)), strict=True)
        parts = [_block(ours, head(states), slope, stop_token_ids) for ours, states, slope in blocks]
        context.save_for_backward(gradient)
        divergence, *entropies = (torch.cat(part) for part in zip(*parts, strict=True))
        context.mark_non_differentiable(*entropies)
        return divergence, *entropies

    @staticmethod
    def backward(context: Any, of_divergence: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        [gradient] = context.saved_tensors
        return gradient.mul_(of_divergence[:, None]), None, None, None


def _block(
    ours: torch.Tensor, theirs: torch.Tensor, gradient: torch.Tensor, stop_token_ids: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(KL, H(p), H(q)) of some tokens; writes ∂KL/∂z into ``gradient``."""
    size = min(ours.shape[-1], theirs.shape[-1])
    gradient[:, size:] = 0.0
    shared = gradient[:, :size]
    z, t = (part - part.amax(-1, keepdim=True) for part in (ours[:, :size], theirs[:, :size]))
    p, q = z.exp(), t.exp()
    mass_p, mass_q = p.sum(-1), q.sum(-1)
    merges = len(stop_token_ids) > 1
    if merges:
        stops = list(stop_token_ids)
        members = z[:, stops].softmax(-1)
        for logits, masses in ((z, p), (t, q)):
            together = logits[:, stops].logsumexp(-1)
            logits[:, stops[0]], masses[:, stops[0]] = together, together.exp()
            logits[:, stops[1:]] = masses[:, stops[1:]] = 0.0
    normalizer_p, normalizer_q = mass_p.log(), mass_q.log()
    entropy_p = normalizer_p - torch.linalg.vecdot(p, z) / mass_p
    entropy_q = normalizer_q - torch.linalg.vecdot(q, t) / mass_q
    offset, difference = normalizer_q - normalizer_p, z.sub_(t)
    divergence = torch.linalg.vecdot(p, difference) / mass_p + offset
    torch.mul(difference.add_((offset - divergence)[:, None]), p.div_(mass_p[:, None]), out=shared)
    if merges:
        shared[:, stops] = shared[:, stops[:1]] * members
    return divergence, entropy_p, entropy_q
