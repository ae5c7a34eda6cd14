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

from opd_ray.learn.losses import Head, block_rows

_LEAST = -1e4
"""Of a logit below the largest: its probability is 0, and 0 times an infinite one would be no number."""
_FEWEST_ROWS = 64
"""That the frozen model's output layer, which may be large, is read for."""


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
        gradient, rows = torch.empty_like(logits), block_rows(logits)
        values, work = logits.new_empty(3, len(logits)), logits.new_empty(2, rows, logits.shape[-1])
        for begin in range(0, len(logits), max(rows, _FEWEST_ROWS)):
            piece = slice(begin, begin + max(rows, _FEWEST_ROWS))
            theirs = head(hidden[piece])
            parts = logits[piece], theirs, gradient[piece], values[:, piece].T
            for block in zip(*(part.split(rows) for part in parts), strict=True):
                _block(*block, work, stop_token_ids)
        context.save_for_backward(gradient)
        divergence, *entropies = values
        context.mark_non_differentiable(*entropies)
        return divergence, *entropies

    @staticmethod
    def backward(context: Any, of_divergence: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        [gradient] = context.saved_tensors
        return gradient.mul_(of_divergence[:, None]), None, None, None


def _block(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    gradient: torch.Tensor,
    values: torch.Tensor,
    work: torch.Tensor,
    stop_token_ids: tuple[int, ...],
) -> None:
    """Writes ∂KL/∂z into ``gradient`` and (KL, H(p), H(q)) into ``values`` [n, 3]; ``theirs`` becomes t, and ``work``
    [2, rows, V] p and q without their normalizers."""
    number, size = len(ours), min(ours.shape[-1], theirs.shape[-1])
    gradient[:, size:] = 0.0
    ours, z, t = ours[:, :size], gradient[:, :size], theirs[:, :size]
    torch.sub(ours, ours.amax(-1, keepdim=True), out=z).clamp_(min=_LEAST)
    t.sub_(t.amax(-1, keepdim=True)).clamp_(min=_LEAST)
    p, q = (torch.exp(part, out=space[:number, :size]) for part, space in zip((z, t), work, strict=True))
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
    offset = normalizer_q - normalizer_p
    values[:, 1] = normalizer_p - torch.linalg.vecdot(p, z) / mass_p
    values[:, 2] = normalizer_q - torch.linalg.vecdot(q, t) / mass_q
    values[:, 0] = torch.linalg.vecdot(p, z.sub_(t)) / mass_p + offset
    z.add_((offset - values[:, 0])[:, None]).mul_(p).div_(mass_p[:, None])
    if merges:
        z[:, stops] = z[:, stops[:1]] * members
