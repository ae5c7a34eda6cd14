"""Drawing the next token of many responses at once, for engines that have their logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def uniform(seed: int, number: int) -> np.ndarray:
    """What a response draws with, [number] in [0, 1): the same for a seed whatever else is sampled beside it."""
    return np.random.Generator(np.random.Philox(seed)).random(number)


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each row and its log-prob: [rows] each.

    ``logits`` [rows, vocabulary] in float32, the rest [rows]. The log-prob is that under the distribution that the
    token came from, after temperature and nucleus; where the temperature is 0 the most probable token is taken, and
    its log-prob is the untempered one, as vLLM has it.
    """
    greedy = temperature == 0
    logprobs = (logits / torch.where(greedy, 1.0, temperature)[:, None]).log_softmax(-1)
    if (top_p < 1).any():
        logprobs = _nucleus(logprobs, torch.where(greedy, 1.0, top_p))
    # The first token at which the cumulative probability is above what was drawn; tokens without probability never are.
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    below = torch.minimum(drawn[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, below, right=True)[:, 0]
    if greedy.any():
        tokens = torch.where(greedy, logprobs.argmax(-1), tokens)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _nucleus(logprobs: Tensor, top_p: Tensor) -> Tensor:
    """The most probable tokens of each row that together have a probability of ``top_p`` [rows], and at least one;
    normalised, the others at -inf."""
    ordered, ids = logprobs.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    # As vLLM and transformers have it: what is left out sums to 1 - top_p at the most.
    out = before >= top_p[:, None]
    out[:, 0] = False
    out &= (top_p < 1)[:, None]
    return logprobs.masked_fill(torch.zeros_like(out).scatter(-1, ids, out), -torch.inf).log_softmax(-1)
