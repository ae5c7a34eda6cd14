"""What a frozen model thinks of tokens, from the logits that predict them."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_ray.messages import ScoreRequest


def token_scores(logits: Tensor, tokens: Tensor, given: Tensor, request: ScoreRequest) -> dict[str, Tensor]:
    """Scores of N tokens and of N × k' given ones from the logits [N, vocabulary] that predict them, which it changes.

    The largest of each row is 0, so that float32 resolves the small masses outside of a top-k.
    """
    log_normalizer = logits.logsumexp(1, keepdim=True)
    stops = list(request.stop_token_ids)
    stop_logprobs = logits.new_zeros(0)
    if stops:
        together = logits[:, stops].logsumexp(1)
        logits[:, stops[0]] = together
        logits[:, stops[1:]] = -torch.inf
        tokens = torch.where(torch.isin(tokens, tokens.new_tensor(stops)), stops[0], tokens)
        stop_logprobs = together - log_normalizer[:, 0]
    vocab_size = logits.shape[1]
    top = logits.topk(min(request.top_k, vocab_size - len(stops[1:])), dim=1)
    beyond = given >= vocab_size  # padding of a larger output layer
    given_logits = logits.gather(1, given.clamp(max=vocab_size - 1)).masked_fill(beyond, -torch.inf)
    return {
        "logprobs": (logits.gather(1, tokens[:, None]) - log_normalizer)[:, 0],
        "topk_ids": top.indices.to(torch.int32),
        "topk_logprobs": top.values - log_normalizer,
        "given_logprobs": given_logits - log_normalizer,
        "stop_logprobs": stop_logprobs,
    }
