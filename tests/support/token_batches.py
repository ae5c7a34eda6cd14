"""Random token batches for tests of losses: a student, and scorers that tell all of one distribution."""

from __future__ import annotations

import torch

from opd_ray.learn.losses import ScoredTokens, TokenBatch

N, V = 7, 11


def scored(logits: torch.Tensor, tokens: torch.Tensor, k: int, given_ids=None, stop_ids=()) -> ScoredTokens:
    """What a scorer with these logits [N, V'] returns; its hidden states are the logits (see :func:`identity`)."""
    logprobs = logits.double().log_softmax(-1)
    chosen, merged = tokens, logprobs
    if len(stop_ids) > 1:
        merged = logprobs.clone()
        merged[:, list(stop_ids)] = -torch.inf
        merged[:, stop_ids[0]] = logprobs[:, list(stop_ids)].logsumexp(-1)
        chosen = torch.where(torch.isin(tokens, torch.tensor(stop_ids)), stop_ids[0], tokens)
    top = merged.topk(min(k, logits.shape[-1]), -1)
    return ScoredTokens(
        logprobs=merged.gather(-1, chosen[:, None]).squeeze(-1).float(),
        topk_ids=top.indices,
        topk_logprobs=top.values.float(),
        given_logprobs=None if given_ids is None else merged.gather(-1, given_ids).float(),
        stop_logprobs=logprobs[:, list(stop_ids)].logsumexp(-1).float() if stop_ids else None,
        hidden=logits,
    )


def identity(hidden: torch.Tensor) -> torch.Tensor:
    """The output layer of a scorer whose hidden states are its logits."""
    return hidden.clone()


def batch(seed: int = 0, k: int = V, scale: float = 2.0, n: int = N, v: int = V, stop_ids=()) -> TokenBatch:
    """Student, teacher, reference and behaviour policy of random logits; the given ids are the behaviour's top-k."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher, reference, behaviour = (torch.randn(n, v, generator=generator) * scale for _ in range(4))
    tokens = torch.randint(0, v, (n,), generator=generator)
    given = behaviour.topk(min(k, v), -1).indices
    return TokenBatch(
        logits=student.requires_grad_(),
        tokens=tokens,
        behaviour_logprobs=behaviour.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1),
        teachers={"teacher": scored(teacher, tokens, k, given, stop_ids)},
        reference=scored(reference, tokens, k, given, stop_ids),
        given_ids=given,
        stop_token_ids=tuple(stop_ids),
    )


def gradient_of(values: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Of the sum of ``values``."""
    return torch.autograd.grad(values.sum(), logits, retain_graph=True)[0]
