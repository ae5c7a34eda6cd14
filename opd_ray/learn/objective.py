"""The objective of one optimizer step, micro-batch by micro-batch (METHOD §3, §4):

    L = Σ_source coef · mean w D_source(π_θ, π_T)  +  coef_reference · mean KL(π_θ‖π_ref)

w is 1 but where evidence decides what a prompt is taught by (:mod:`opd_ray.buffer.evidence`), which also adds
coef_student · mean of the reward's policy gradient; and 0 at the repeats of loops that have an advantage of their own
(``loss.loop_advantage``), which adds coef_student · mean of theirs. Means are over all tokens, those with w = 0 too.
The coefficients and the counts that the means divide by come with the step's plan. The mean of the KL to the reference
is over the student's tokens, or over those of all sources with ``loss.reference.on_golden``.

**Memory.** The loss makes the logits of ``c`` tokens at a time, 4·c·V ≤ ``learner.logits_mb`` MiB. A micro-batch that
fits is one piece and keeps its logits for the backward pass. Of a larger one each piece's gradient is taken before the
next one begins, so that besides the model's own activations it holds, for N response tokens,

    4·N·(2·H_s + H_t)  bytes   states of the student, their gradient, and the states of full-vocabulary scorers
    12 · logits_mb     MiB     one piece at most: logits, log-probs, their products and gradients; 3 for a reverse KL
    8·V·H_s            bytes   the gradient of the output layer, where it is trained, and one piece's share of it
    60·N               bytes   tokens, weights and masks

(2 instead of 4 bytes where states are 16-bit), and never anything of size N·V.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from opd_ray.config import Config
from opd_ray.errors import RunError
from opd_ray.learn.heads import ResponseHead
from opd_ray.learn.losses import ScoredTokens, TokenBatch, Tokens, is_any_of, mapped
from opd_ray.learn.losses.advantage import (
    combined_logprobs,
    discounted,
    log_ratios,
    loop_gradient,
    reward_gradient,
)
from opd_ray.learn.losses.diagnostics import student_metrics, topk_overlap
from opd_ray.learn.losses.reduction import before_tail, lowest, position_weights, token_weights
from opd_ray.learn.losses.terms import reference_loss, source_loss
from opd_ray.learn.microbatch import MicroBatch, Segment
from opd_ray.messages import REFERENCE, SOURCES, Coefficients, Count, Denominators, Source
from opd_ray.models.heads import FrozenHead

REWARD = "reward"
"""The term of what evidence leaves to the task's reward."""
LOOP = "loop"
"""The term of loops that have an advantage of their own."""
_MOST_NATS = 1e4
"""Of a token that is left out: as good as infinite where it is logged."""
_PROBE_TOKENS = 16
"""Tokens on which a scorer's output layer is compared with what the scorer said."""


class Objective:
    """What the configuration says the student's loss is."""

    def __init__(
        self,
        config: Config,
        *,
        vocab_size: int,
        stop_token_ids: tuple[int, ...] = (),
        heads: Mapping[str, FrozenHead] | None = None,
    ) -> None:
        """``vocab_size`` is the student's; ``stop_token_ids`` the EOS set, the first id standing for all.

        ``heads`` holds the output layer of each scorer that is compared on the whole vocabulary, by role.
        """
        self.config = config
        self.stop_token_ids = stop_token_ids
        self.heads = dict(heads or {})
        widest = max([vocab_size, *(head.weight.shape[0] for head in self.heads.values())])
        self.chunk_rows = max(1, config.learner.logits_mb * 2**20 // (4 * widest))
        """Tokens whose float32 logits are made at a time."""
        self._unchecked = set(self.heads)
        self.watch: Watch | None = None
        """Shown every piece of the loss, before its gradient is taken."""
        total = sum(teacher.weight for teacher in config.teachers.values())
        self._shares = {name: teacher.weight / total for name, teacher in config.teachers.items()}

    def of(self, batch: MicroBatch, denominators: Denominators, coefficients: Coefficients) -> MicroBatchLoss:
        """The loss of one micro-batch, to be given to ResponseModel.consume. RunError where scores are missing."""
        segments = [self._weighted(segment, denominators, coefficients) for segment in batch.segments]
        return MicroBatchLoss(self, segments, denominators, coefficients)

    def compares_with_reference(self, source: Source) -> bool:
        """Is the KL to the reference part of this source's loss?"""
        reference = self.config.loss.reference
        return reference.used and (source == "student" or reference.on_golden)

    def reference_count(self, denominators: Denominators) -> Count:
        """What the mean of the KL to the reference divides by."""
        counts = [denominators.of(source) for source in SOURCES if self.compares_with_reference(source)]
        return Count(sum(count.rollouts for count in counts), sum(count.tokens for count in counts))

    def _weighted(self, segment: Segment, denominators: Denominators, coefficients: Coefficients) -> WeightedSegment:
        loss, source, lengths, tokens = self.config.loss, segment.source, segment.lengths, segment.tokens
        if self.config.needs_reference(source) and tokens.reference is None:
            raise RunError(_missing(REFERENCE, segment))
        shares = self._shares_of(segment)
        tokens = replace(tokens, teachers={name: tokens.teachers[name] for name in shares})
        for role, scored in (*tokens.teachers.items(), (REFERENCE, tokens.reference)):
            self._check_head(role, scored, tokens.tokens)
        advantages = None
        if source == "student" and loss.student.divergence == "k1" and loss.advantage.policy == "behaviour":
            ratios = log_ratios(tokens, tokens.behaviour_logprobs, shares, loss.advantage)
            advantages = discounted(ratios, lengths, loss.advantage.discount)
        kept = torch.ones_like(segment.repetitive)
        if coefficients.mask_truncated_tails:
            kept = before_tail(segment.repetitive, segment.truncated, lengths)
        last = torch.zeros_like(segment.repetitive)
        last[lengths.cumsum(0) - 1] = 1.0
        plain = token_weights(lengths, denominators.of(source), loss.reduction)
        own = kept * plain if segment.looped is None else kept * (1 - segment.looped) * plain
        weights = {source: own if segment.weights is None else own * segment.weights.repeat_interleave(lengths)}
        if source == "student" and loss.student.lowest_share < 1:
            weights[source] *= lowest(tokens.behaviour_logprobs, lengths, loss.student.lowest_share)
        if source == "student" and loss.student.position_weight > 1:
            disagreement = (combined_logprobs(tokens.teachers, shares) - tokens.behaviour_logprobs).abs()
            weights[source] *= position_weights(disagreement, lengths, loss.student.position_weight)
        if source == "student" and self.config.buffer.evidence and loss.advantage.reward_coef > 0:
            weights[REWARD] = own
        if segment.looped is not None:
            weights[LOOP] = segment.looped * plain  # which the mask of tails does not take away
        if self.compares_with_reference(source):
            weights[REFERENCE] = kept * token_weights(lengths, self.reference_count(denominators), loss.reduction)
        tokens = replace(tokens, teacher_advantages=advantages)
        return WeightedSegment(
            segment=segment,
            tokens=_bounded(tokens, weights[source] > 0, weights.get(REFERENCE, weights[source]) > 0),
            shares=shares,
            weights=weights,
            last=last,
            in_truncated=segment.truncated.repeat_interleave(lengths).float(),
        )

    def _check_head(self, role: str, scored: ScoredTokens | None, tokens: torch.Tensor) -> None:
        """Once for each output layer: it must give its model's states the log-probs that the model itself gave."""
        if role not in self._unchecked or scored is None or scored.hidden is None:
            return
        head, tokens = self.heads[role], tokens[:_PROBE_TOKENS]
        logprobs = head(scored.hidden[:_PROBE_TOKENS]).log_softmax(-1)
        own = logprobs.gather(-1, tokens[:, None].clamp(max=logprobs.shape[-1] - 1)).squeeze(-1)
        if len(self.stop_token_ids) > 1:
            stops = logprobs[:, list(self.stop_token_ids)].logsumexp(-1)
            own = torch.where(is_any_of(tokens, self.stop_token_ids), stops, own)
        difference = float((own - scored.logprobs[:_PROBE_TOKENS]).abs().median())
        if difference > (0.01 if head.weight.dtype == torch.float32 else 0.25):
            raise RunError(
                f"{role}: its output layer does not make its log-probs of its hidden states (they differ by "
                f"{difference:.2g} nats); its architecture changes logits in an unknown way, or the scorer is another "
                "model: compare on a top-k support"
            )
        self._unchecked.discard(role)

    def _shares_of(self, segment: Segment) -> dict[str, float]:
        """Weight of each teacher in the segment's loss; empty where it compares with none."""
        if not self.config.needs_teacher(segment.source):
            return {}
        there = segment.tokens.teachers.keys()
        weighted = self.config.loss.teachers == "weighted"
        if not there or (weighted and there != self._shares.keys()):
            raise RunError(_missing(", ".join(sorted(self._shares.keys() - there)) if weighted else "teacher", segment))
        if weighted:
            return self._shares
        if len(there) > 1:
            raise RunError(
                f"rollout {segment.rollout_ids[0]} carries scores of {sorted(there)}, but "
                "loss.teachers=routed expects one teacher; set loss.teachers=weighted to use all of them"
            )
        return dict.fromkeys(there, 1.0)


Watch = Callable[["WeightedSegment", slice, TokenBatch, torch.Tensor, Mapping[str, torch.Tensor]], None]
"""(segment, which of its tokens, these, each one's share [n] of the step's loss, what is logged of them)."""


@dataclass(frozen=True)
class WeightedSegment:
    """A segment with everything that its loss needs per token, [N] each in its order."""

    segment: Segment
    tokens: Tokens
    """With those teachers that its loss compares with."""
    shares: dict[str, float]
    """Weight of each teacher."""
    weights: dict[str, torch.Tensor]
    """Of each token in the terms of the loss: the source's own, "reward", "loop" and "reference" where they are part of
    it."""
    last: torch.Tensor
    """1 at the end of each rollout."""
    in_truncated: torch.Tensor
    """1 in rollouts that did not end by themselves."""


class MicroBatchLoss:
    """One micro-batch's share of the step's loss: called once by the student's head, then read.

    Loss and metrics are already divided by the global denominators: summed over every micro-batch of every
    rank they are the step's.
    """

    def __init__(
        self,
        objective: Objective,
        segments: Sequence[WeightedSegment],
        denominators: Denominators,
        coefficients: Coefficients,
    ) -> None:
        self._objective, self._segments = objective, segments
        self._denominators, self._coefficients = denominators, coefficients
        self._culprits: dict[str, None] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self.metrics: dict[str, float] = {}
        """After the call: of the sources that the micro-batch has."""
        self.problem: str | None = None
        """After the call: which rollouts' loss is not finite, if any. The gradient is then nan on purpose."""

    def __call__(self, hidden: torch.Tensor, head: ResponseHead) -> torch.Tensor:
        """The loss, from states [N, H] of the response tokens; see :data:`opd_ray.learn.heads.Consumer`."""
        if not self._segments:
            return head.logits(hidden).sum()  # 0, with the gradient of 0 that ZeRO's collectives count
        in_pieces = hidden.shape[0] > self._objective.chunk_rows
        rows = self._objective.chunk_rows if in_pieces else hidden.shape[0]
        parts = [
            (segment, slice(start, min(start + rows, len(segment.last))))
            for segment in self._segments
            for start in range(0, len(segment.last), rows)
        ]
        sizes = [rows.stop - rows.start for _, rows in parts]
        if in_pieces:
            total = head.sum_losses(hidden, sizes, lambda index, logits: self._loss(*parts[index], logits))
        else:
            states = zip(parts, hidden.split(sizes), strict=True)
            total = sum(self._loss(*part, head.logits(own)) for part, own in states)
        self._sums["loss"] = total.detach()
        self.metrics = dict(zip(self._sums, torch.stack([*self._sums.values()]).tolist(), strict=True))
        if self._culprits or not math.isfinite(self.metrics["loss"]):
            shown = list(self._culprits)[:8] or ["the sum of this micro-batch"]
            more = len(self._culprits) - len(shown)
            self.problem = f"the loss is not finite for {', '.join(shown)}" + (f" and {more} more" if more > 0 else "")
            # Whatever made it so, no rank may take this step: the gradient says it to all of them.
            total = total + hidden.sum() * torch.nan
        return total

    def _loss(self, of: WeightedSegment, rows: slice, logits: torch.Tensor) -> torch.Tensor:
        """That of some tokens of a segment."""
        objective, source = self._objective, of.segment.source
        tokens = mapped(of.tokens, lambda tensor: tensor[rows])
        batch = TokenBatch(**vars(tokens), logits=logits, stop_token_ids=objective.stop_token_ids)
        loss = source_loss(batch, source, objective.config.loss, of.shares, objective.heads)
        terms = {source: loss.values}
        if REWARD in of.weights:
            settings = objective.config.loss
            terms[REWARD] = reward_gradient(batch, settings.advantage.reward_coef, settings.importance.clip_ratio)
        if LOOP in of.weights:
            settings = objective.config.loss
            terms[LOOP] = loop_gradient(batch, settings.loop_advantage, settings.importance.clip_ratio)
            if (used := loss.metrics.get("advantage_used")) is not None:
                looped = of.segment.looped[rows] > 0
                loss.metrics["advantage_used"] = torch.where(looped, settings.loop_advantage, used)
        if REFERENCE in of.weights:
            head = objective.heads.get(REFERENCE)
            terms[REFERENCE] = reference_loss(batch, objective.config.loss.reference, head)
        total = torch.zeros((), device=logits.device)
        for name, values in terms.items():
            reduced = (values * of.weights[name][rows]).sum()
            total = total + self._coefficient(name) * reduced
            self._add(f"loss_{name}", reduced.detach())
        if not torch.isfinite(total):
            self._blame(of.segment, rows, terms)
        self._record(of, rows, batch.detached(), loss.metrics)
        if objective.watch is not None:
            weighed = [self._coefficient(name) * terms[name] * of.weights[name][rows] for name in terms]
            objective.watch(of, rows, batch, sum(weighed).detach(), loss.metrics)
        return total

    def _coefficient(self, term: str) -> float:
        """Reward and loops have that of the student's loss, in whose place they are."""
        return getattr(self._coefficients, "student" if term in (REWARD, LOOP) else term)

    def _blame(self, segment: Segment, rows: slice, terms: dict[str, torch.Tensor]) -> None:
        """Notes the rollouts and terms whose loss is not finite."""
        ends = segment.lengths.cumsum(0)
        for name, values in terms.items():
            tokens = torch.nonzero(~torch.isfinite(values.detach())).flatten() + rows.start
            rollouts = torch.searchsorted(ends, tokens, right=True).unique().tolist()
            self._culprits |= {f"{segment.rollout_ids[rollout]} (loss_{name})": None for rollout in rollouts}

    def _record(self, of: WeightedSegment, rows: slice, batch: TokenBatch, metrics: dict[str, torch.Tensor]) -> None:
        source = of.segment.source
        if source == "student":
            last, cut, weights = of.last[rows], of.in_truncated[rows], of.weights[source][rows]
            repetitive = of.segment.repetitive[rows]
            logged = metrics | student_metrics(batch, of.shares, repetitive, last * (1 - cut), last * cut)
            logged |= {"_weight": weights, "truncated_weight_share": weights * cut}
            term = self._objective.config.loss.student
            if term.on_distributions and term.support != "full":
                logged["topk_overlap"] = topk_overlap(batch, of.shares)
        else:
            logged = {f"{source}_{name}": values for name, values in metrics.items()}
            name = "golden_logprob" if source == "golden" else "teacher_rollout_logprob"
            logged[name] = batch.plain_logprobs
        for name, values in logged.items():
            self._add(name, values.detach().sum() / self._denominators.of(source).tokens)
        if REFERENCE in of.weights:
            tokens = self._objective.reference_count(self._denominators).tokens
            self._add("reference_logprob", batch.reference.logprobs.sum() / tokens)

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value


def _bounded(tokens: Tokens, taught: torch.Tensor, anchored: torch.Tensor) -> Tokens:
    """With finite values at tokens that the source's loss, or the KL to the reference, leaves out ([N] bool: what is
    not ``taught``, not ``anchored``): what a scorer rules out has log-prob −∞, and 0 · ∞ would be nan."""

    def bounded(scored: ScoredTokens | None, counts: torch.Tensor) -> ScoredTokens | None:
        if scored is None or counts.all():  # as almost always, and k log-probs a token are much to copy
            return scored

        def bound(values: torch.Tensor | None) -> torch.Tensor | None:
            if values is None:
                return None
            return torch.where(counts.view(-1, *[1] * (values.dim() - 1)), values, values.clamp(min=-_MOST_NATS))

        names = ("logprobs", "topk_logprobs", "given_logprobs", "stop_logprobs")
        return replace(scored, **{name: bound(getattr(scored, name)) for name in names})

    advantages = tokens.teacher_advantages
    if advantages is not None:
        advantages = torch.where(taught, advantages, advantages.nan_to_num().clamp(-_MOST_NATS, _MOST_NATS))
    teachers = {name: bounded(scored, taught) for name, scored in tokens.teachers.items()}
    reference = bounded(tokens.reference, anchored)
    return replace(tokens, teachers=teachers, reference=reference, teacher_advantages=advantages)


def _missing(what: str, segment: Segment) -> str:
    return (
        f"rollout {segment.rollout_ids[0]} carries no {what} scores, which the loss of {segment.source} "
        "rollouts compares with; score every rollout of this source before it is trained on"
    )
