"""One micro-batch's forward pass and loss, and the sums that become a step's metrics.

Knows tensors, models and losses; nothing of DeepSpeed, ranks or Ray. The learner runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from opd_ray.batching import MicroBatch, Payload
from opd_ray.config import LearnerConfig, LossConfig
from opd_ray.errors import RunError
from opd_ray.losses import TokenBatch, TokenLoss, make_loss
from opd_ray.losses.anchors import reference_kl, sft_cross_entropy
from opd_ray.losses.reduction import token_weights
from opd_ray.messages import Denominators, StepPlan


class ResponseLogits(torch.nn.Module):
    """A causal LM that returns only the logits that predict response tokens.

    The gather sits in front of the output embedding, so the [B, T, V] logits never exist, and inside the
    model's own forward, so whatever an architecture does to its logits afterwards (soft caps, scales) is kept.
    """

    def __init__(self, causal_lm: torch.nn.Module) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self._logit_index: torch.Tensor | None = None
        causal_lm.get_output_embeddings().register_forward_pre_hook(self._gather)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, logit_index: torch.Tensor
    ) -> torch.Tensor:
        """[N, V] float32 for ``logit_index`` [N] into the flattened ``input_ids`` [B, T].

        Without an attention mask: rows are padded on the right, where causal attention never looks;
        packed rows are told apart by their ``position_ids``. Each row's largest logit is shifted to 0, which
        changes no probability but lets float32 resolve the small masses that tail buckets are made of.
        """
        self._logit_index = logit_index
        logits = self.causal_lm(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float()
        return logits.sub_(logits.detach().amax(-1, keepdim=True))

    def _gather(self, _module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0].flatten(0, 1).index_select(0, self._logit_index),)


class Objective:
    """L = opd_coef · L_OPD + sft_coef · L_SFT + reference_kl_coef · KL(π_θ‖π_ref) (METHOD §3)."""

    def __init__(self, config: LossConfig) -> None:
        self._config = config
        self._opd = make_loss(config)

    def __call__(
        self, logits: torch.Tensor, batch: MicroBatch, denominators: Denominators
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This micro-batch's share of the step's loss, and of each of its metrics.

        Both are already divided by the global denominators: summed over every micro-batch of every rank
        they are the step's loss and means. The names do not depend on the batch, so ranks can add them
        up as one vector. Raises RunError when the loss is not finite, naming the rollouts.
        """
        config, split, rollouts = self._config, batch.num_student_tokens, batch.num_student_rollouts
        terms: list[tuple[str, float, TokenLoss, torch.Tensor]] = []
        # A source that the whole step lacks has no mean; every rank leaves its metrics out alike.
        if denominators.student_tokens > 0:
            student = TokenBatch(
                logits[:split], batch.tokens[:split], batch.behaviour_logprobs, batch.teacher, batch.reference
            )
            lengths = batch.response_lengths[:rollouts]
            size = (denominators.student_rollouts, denominators.student_tokens)
            weights = token_weights(lengths, *size, config.reduction)
            opd = self._opd(student)
            repetitive = batch.repetitive[:split]
            opd.metrics["repetitive_share"] = repetitive
            opd.metrics["advantage_repetitive"] = opd.metrics["advantage"] * repetitive
            terms.append(("opd", config.opd_coef, opd, weights))
            if config.needs_reference:
                anchor = reference_kl(student, config.reference_estimator)
                terms.append(("reference_kl", config.reference_kl_coef, anchor, weights))
        if denominators.golden_tokens > 0:
            golden = TokenBatch(logits[split:], batch.tokens[split:], logits.new_empty(0), None, None)
            lengths = batch.response_lengths[rollouts:]
            size = (denominators.golden_rollouts, denominators.golden_tokens)
            weights = token_weights(lengths, *size, config.reduction)
            terms.append(("sft", config.sft_coef, sft_cross_entropy(golden), weights))
        return self._sum(terms, batch, denominators)

    def _sum(
        self,
        terms: Sequence[tuple[str, float, TokenLoss, torch.Tensor]],
        batch: MicroBatch,
        denominators: Denominators,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        metrics: dict[str, torch.Tensor] = {}
        total = torch.zeros((), device=batch.tokens.device)
        for name, coefficient, loss, weights in terms:
            reduced = (loss.values * weights).sum()
            total = total + coefficient * reduced
            metrics[f"loss_{name}"] = reduced.detach()
            num_tokens = denominators.golden_tokens if name == "sft" else denominators.student_tokens
            metrics |= {key: value.sum() / max(num_tokens, 1) for key, value in loss.metrics.items()}
        metrics["loss"] = total.detach()
        if not torch.isfinite(total):
            raise RunError(_describe_non_finite(terms, batch))
        return total, metrics


def _describe_non_finite(terms: Sequence[tuple[str, float, TokenLoss, torch.Tensor]], batch: MicroBatch) -> str:
    """Names the terms and rollouts whose loss is not finite."""
    culprits = []
    for name, _, loss, _ in terms:
        rows = slice(batch.num_student_rollouts, None) if name == "sft" else slice(batch.num_student_rollouts)
        lengths = batch.response_lengths[rows].tolist()
        for rollout_id, values in zip(batch.rollout_ids[rows], loss.values.split(lengths), strict=True):
            if not torch.isfinite(values).all():
                culprits.append(f"{rollout_id} (loss_{name})")
    shown = ", ".join(culprits[:8]) + (f" and {len(culprits) - 8} more" if len(culprits) > 8 else "")
    return f"the loss is not finite for {shown or 'the sum of this micro-batch'}"


def finish(metrics: dict[str, float]) -> dict[str, float]:
    """A step's summed metrics as they are reported: ``advantage_repetitive`` becomes the mean over repetitive
    tokens, beside ``advantage_other`` over the rest (METHOD §2); either is left out where it has no tokens."""
    if "repetitive_share" not in metrics:
        return metrics
    share, repetitive = metrics["repetitive_share"], metrics.pop("advantage_repetitive")
    if share > 0:
        metrics["advantage_repetitive"] = repetitive / share
    if share < 1:
        metrics["advantage_other"] = (metrics["advantage"] - repetitive) / (1 - share)
    return metrics


def fetch_payloads(plan: StepPlan, fetch: Callable[[list[Any]], list[Any]]) -> dict[int, Payload]:
    """Every distinct payload of a plan, fetched at once; keyed by ``id(ref)``."""
    refs: dict[int, Any] = {}
    for entry in (entry for micro_batch in plan.micro_batches for entry in micro_batch):
        for ref in (entry.rollouts, *entry.scores.values()):
            refs[id(ref)] = ref
    return dict(zip(refs, map(Payload, fetch(list(refs.values()))), strict=True))


def lr_factor(config: LearnerConfig, step: int) -> float:
    """Share of the peak learning rate at a 0-based step.

    It rises linearly to 1 over the warm-up; "linear" and "cosine" then fall and would reach 0 at
    ``config.steps``, the first step that is not taken.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.lr_schedule == "constant":
        return 1.0
    done = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    return 1.0 - done if config.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def disable_dropout(model: torch.nn.Module) -> None:
    """π_θ is the policy that generates, which has no dropout; a checkpoint's own rate would bias A and ρ."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
