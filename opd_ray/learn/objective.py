"""The objective of one optimizer step, micro-batch by micro-batch (METHOD §3, §4):

    L = Σ_source coef · mean D_source(π_θ, π_T)  +  β_KL · mean KL(π_θ‖π_ref)

The coefficients and the counts that the means divide by come with the step's plan. The anchor's mean is over the
student's tokens, or over those of all sources with ``loss.reference.on_golden``.

**Memory.** The loss makes the logits of ``c`` tokens at a time, 4·c·V ≤ ``learner.logits_mb`` MiB. A micro-batch that
fits is one piece and keeps its logits for the backward pass. Of a larger one each piece's gradient is taken before the
next one begins, so that besides the model's own activations it holds, for N response tokens,

    4·N·(2·H_s + H_t)  bytes   states of the student, their gradient, and the states of full-vocabulary scorers
    12 · logits_mb     MiB     one piece: logits, log-probs of both models, their products, and gradients of these
    8·V·H_s            bytes   the gradient of the output layer, and one piece's share of it
    60·N               bytes   tokens, weights and masks

(2 instead of 4 bytes where states are 16-bit), and never anything of size N·V.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from opd_ray.config import Config
from opd_ray.errors import RunError
from opd_ray.learn.heads import ResponseHead, chunk_rows
from opd_ray.learn.losses import ScoredTokens, TokenBatch, is_any_of
from opd_ray.learn.losses.advantage import combined_logprobs, discounted, log_ratios, uses_teacher
from opd_ray.learn.losses.diagnostics import student_metrics, topk_overlap
from opd_ray.learn.losses.reduction import before_tail, token_weights
from opd_ray.learn.losses.terms import reference_loss, source_loss
from opd_ray.learn.microbatch import MicroBatch, Segment
from opd_ray.messages import REFERENCE, Coefficients, Count, Denominators, Source
from opd_ray.models.heads import FrozenHead

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
        self.chunk_rows = chunk_rows(widest, config.learner.logits_mb)
        teachers = config.teachers
        total = sum(teacher.weight for teacher in teachers.values())
        self._unchecked = set(self.heads)
        self._shares = {name: teacher.weight / total for name, teacher in teachers.items()}

    def of(self, batch: MicroBatch, denominators: Denominators, coefficients: Coefficients) -> MicroBatchLoss:
        """The loss of one micro-batch, to be given to ResponseModel.consume. RunError where scores are missing."""
        pieces = []
        for source in ("student", "golden", "teacher"):
            # A source that the whole step lacks has no mean; every rank leaves its metrics out alike.
            if denominators.of(source).tokens > 0:
                segments = [segment for segment in batch.segments if segment.source == source]
                pieces += [
                    self._piece(segment, batch, denominators, coefficients)
                    for segment in segments or [self._empty(source, batch)]
                ]
        return MicroBatchLoss(self, pieces, batch.rollout_ids, denominators, coefficients)

    def anchors(self, source: Source) -> bool:
        """Is the distance to the reference part of this source's loss?"""
        anchor = self.config.loss.reference
        return anchor.used and (source == "student" or anchor.on_golden)

    def anchor_count(self, denominators: Denominators) -> Count:
        """What the anchor's mean divides by."""
        counts = [denominators.of(source) for source in ("student", "golden", "teacher") if self.anchors(source)]
        return Count(sum(count.rollouts for count in counts), sum(count.tokens for count in counts))

    def _piece(
        self, segment: Segment, batch: MicroBatch, denominators: Denominators, coefficients: Coefficients
    ) -> Piece:
        loss, source = self.config.loss, segment.source
        shares = self._shares_of(segment, batch)
        teachers = {name: segment.teachers[name] for name in shares}
        if self.config.needs_reference(source) and segment.reference is None:
            raise RunError(_missing("reference", source, batch, segment))
        for role, scored in (*teachers.items(), (REFERENCE, segment.reference)):
            self._check_head(role, scored, batch.tokens[segment.tokens])
        lengths = batch.response_lengths[segment.rollouts]
        truncated = batch.truncated[segment.rollouts]
        repetitive, behaviour = batch.repetitive[segment.tokens], batch.behaviour_logprobs[segment.tokens]
        kept = torch.ones_like(repetitive)
        if coefficients.mask_truncated_tails:
            kept = before_tail(repetitive, truncated, lengths)
        last = torch.zeros_like(repetitive)
        last[lengths.cumsum(0) - 1] = 1.0
        in_truncated = truncated.repeat_interleave(lengths).float()
        advantages = None
        if source == "student" and loss.student.divergence == "k1" and loss.advantage.policy == "behaviour":
            teacher = combined_logprobs(teachers, shares) if uses_teacher(loss.advantage) else None
            reference = segment.reference.logprobs if segment.reference is not None else None
            ratios = log_ratios(teacher, behaviour, reference, loss.advantage)
            advantages = discounted(ratios, lengths, loss.advantage.discount)
        anchor_weights = None
        if self.anchors(source):
            anchor_weights = kept * token_weights(lengths, self.anchor_count(denominators), loss.reduction)
        return Piece(
            segment=segment,
            shares=shares,
            teachers=teachers,
            tokens=batch.tokens[segment.tokens],
            behaviour_logprobs=behaviour,
            repetitive=repetitive,
            in_truncated=in_truncated,
            last=last,
            rewards=batch.reward_advantages[segment.rollouts].repeat_interleave(lengths),
            teacher_advantages=advantages,
            weights=kept * token_weights(lengths, denominators.of(source), loss.reduction),
            anchor_weights=anchor_weights,
            lengths=lengths,
        )

    def _check_head(self, role: str, scored: ScoredTokens | None, tokens: torch.Tensor) -> None:
        """Once for each output layer: it must give its model's states the log-probs that the model itself gave."""
        if role not in self._unchecked or scored is None or scored.hidden is None or not tokens.numel():
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

    def _shares_of(self, segment: Segment, batch: MicroBatch) -> dict[str, float]:
        """Weight of each teacher in the segment's loss; empty where it compares with none."""
        if not self.config.needs_teacher(segment.source):
            return {}
        there = set(segment.teachers)
        if self.config.loss.teachers == "weighted":
            if there != set(self._shares):
                missing = sorted(set(self._shares) - there)
                raise RunError(_missing(", ".join(missing) or "configured teachers'", segment.source, batch, segment))
            return self._shares
        if len(there) != 1:
            if not there:
                raise RunError(_missing("teacher", segment.source, batch, segment))
            raise RunError(
                f"rollout {batch.rollout_ids[segment.rollouts.start]} carries scores of {sorted(there)}, but "
                "loss.teachers=routed expects one teacher; set loss.teachers=weighted to use all of them"
            )
        return dict.fromkeys(there, 1.0)

    def _empty(self, source: Source, batch: MicroBatch) -> Segment:
        """No tokens of a source that other ranks have, so that its metrics get their names here too."""
        zeros = partial(torch.zeros, device=batch.tokens.device)

        def scored(role: str) -> ScoredTokens:
            head = self.heads.get(role)
            hidden = None if head is None else zeros(0, head.weight.shape[1])
            ids = zeros(0, 1, dtype=torch.int64)
            return ScoredTokens(zeros(0), ids, zeros(0, 1), zeros(0, 1), zeros(0), hidden)

        names = list(self._shares) if self.config.loss.teachers == "weighted" else list(self._shares)[:1]
        nothing = slice(0, 0)
        ids = zeros(0, 1, dtype=torch.int64)
        return Segment(source, nothing, nothing, {name: scored(name) for name in names}, scored(REFERENCE), ids)


@dataclass(frozen=True)
class Piece:
    """One segment with everything that its loss needs per token, [n] each in its order."""

    segment: Segment
    shares: dict[str, float]
    teachers: dict[str, ScoredTokens]
    tokens: torch.Tensor
    behaviour_logprobs: torch.Tensor
    repetitive: torch.Tensor
    in_truncated: torch.Tensor
    last: torch.Tensor
    rewards: torch.Tensor
    teacher_advantages: torch.Tensor | None
    weights: torch.Tensor
    anchor_weights: torch.Tensor | None
    lengths: torch.Tensor

    def batch(self, logits: torch.Tensor, rows: slice, stop_token_ids: tuple[int, ...]) -> TokenBatch:
        """The tokens of ``rows`` with their logits."""
        segment = self.segment
        return TokenBatch(
            logits=logits,
            tokens=self.tokens[rows],
            behaviour_logprobs=self.behaviour_logprobs[rows],
            teachers={name: scored.rows(rows) for name, scored in self.teachers.items()},
            reference=None if segment.reference is None else segment.reference.rows(rows),
            given_ids=None if segment.given_ids is None else segment.given_ids[rows],
            reward_advantages=self.rewards[rows],
            teacher_advantages=None if self.teacher_advantages is None else self.teacher_advantages[rows],
            stop_token_ids=stop_token_ids,
        )


class MicroBatchLoss:
    """One micro-batch's share of the step's loss: called once by the student's head, then read.

    Loss and metrics are already divided by the global denominators: summed over every micro-batch of every
    rank they are the step's. The metrics' names do not depend on the batch, so ranks can add them up as one vector.
    """

    def __init__(
        self,
        objective: Objective,
        pieces: list[Piece],
        rollout_ids: tuple[str, ...],
        denominators: Denominators,
        coefficients: Coefficients,
    ) -> None:
        self._objective, self._pieces, self._rollout_ids = objective, pieces, rollout_ids
        self._denominators, self._coefficients = denominators, coefficients
        self._culprits: dict[str, None] = {}
        self.metrics: dict[str, torch.Tensor] = {}
        """After the call: name to a number."""
        self.problem: str | None = None
        """After the call: which rollouts' loss is not finite, if any. The gradient is then nan on purpose."""

    def __call__(self, hidden: torch.Tensor, head: ResponseHead) -> torch.Tensor:
        """The loss, from states [N, H] of the response tokens; see :class:`opd_ray.learn.heads.Consumer`."""
        rows = self._objective.chunk_rows
        if hidden.shape[0] > rows:
            parts = self._parts(rows)
            sizes = [span.stop - span.start for _, span in parts]
            total = head.sum_losses(hidden, sizes, lambda index, logits: self._loss(*parts[index], logits))
        else:
            parts = self._parts(max(1, hidden.shape[0]))
            states = hidden.split([span.stop - span.start for _, span in parts])
            total = sum(self._loss(*part, head.logits(own)) for part, own in zip(parts, states, strict=True))
        self.metrics["loss"] = total.detach()
        if self._culprits or not torch.isfinite(total):
            shown = list(self._culprits)[:8] or ["the sum of this micro-batch"]
            more = len(self._culprits) - len(shown)
            self.problem = f"the loss is not finite for {', '.join(shown)}" + (f" and {more} more" if more > 0 else "")
            # Whatever made it so, no rank may take this step: the gradient says it to all of them.
            total = total + hidden.sum() * torch.nan
        return total

    def _parts(self, rows: int) -> list[tuple[int, slice]]:
        """(piece, its rows) in the order of the micro-batch's tokens, at most ``rows`` at a time; empty pieces too."""
        parts = []
        for index, piece in enumerate(self._pieces):
            size = piece.tokens.shape[0]
            parts += [(index, slice(start, min(start + rows, size))) for start in range(0, max(size, 1), rows)]
        return parts

    def _loss(self, index: int, rows: slice, logits: torch.Tensor) -> torch.Tensor:
        piece, config, coefficients = self._pieces[index], self._objective.config.loss, self._coefficients
        source, heads = piece.segment.source, self._objective.heads
        batch = piece.batch(logits, rows, self._objective.stop_token_ids)
        loss = source_loss(batch, source, config, piece.shares, heads)
        terms = {source: (loss.values, piece.weights[rows])}
        if piece.anchor_weights is not None:
            anchor = reference_loss(batch, config.reference, heads.get(REFERENCE))
            terms[REFERENCE] = (anchor, piece.anchor_weights[rows])
        total = torch.zeros((), device=logits.device)
        for name, (values, weights) in terms.items():
            reduced = (values * weights).sum()
            total = total + getattr(coefficients, name) * reduced
            self._add(f"loss_{name}", reduced.detach())
        if not torch.isfinite(total):
            self._blame(piece, rows, {name: values.detach() for name, (values, _) in terms.items()})
        self._record(piece, rows, batch.detached(), loss.metrics)
        return total

    def _blame(self, piece: Piece, rows: slice, terms: dict[str, torch.Tensor]) -> None:
        """Notes the rollouts and terms whose loss is not finite."""
        ids = self._rollout_ids[piece.segment.rollouts]
        ends = piece.lengths.cumsum(0)
        for name, values in terms.items():
            tokens = torch.nonzero(~torch.isfinite(values)).flatten() + rows.start
            rollouts = torch.searchsorted(ends, tokens, right=True).unique()
            self._culprits |= dict.fromkeys(f"{ids[rollout]} (loss_{name})" for rollout in rollouts.tolist())

    def _record(self, piece: Piece, rows: slice, batch: TokenBatch, metrics: dict[str, torch.Tensor]) -> None:
        source = piece.segment.source
        if source == "student":
            last, cut = piece.last[rows], piece.in_truncated[rows]
            logged = metrics | student_metrics(
                batch, piece.shares, piece.repetitive[rows], last * (1 - cut), last * cut
            )
            term = self._objective.config.loss.student
            if term.on_distributions and term.support != "full":
                logged["topk_overlap"] = topk_overlap(batch, piece.shares)
            weights = piece.weights[rows]
            logged |= {"_weight": weights, "truncated_weight_share": weights * cut}
        else:
            logged = {f"{source}_{name}": values for name, values in metrics.items()}
            name = "golden_logprob" if source == "golden" else "teacher_rollout_logprob"
            logged[name] = batch.plain_logprobs.detach()
        if piece.anchor_weights is not None:
            count = self._objective.anchor_count(self._denominators)
            self._add("reference_logprob", batch.reference.logprobs.sum() / max(count.tokens, 1))
        tokens = max(self._denominators.of(source).tokens, 1)
        for name, values in logged.items():
            self._add(name, values.detach().sum() / tokens)

    def _add(self, name: str, value: torch.Tensor) -> None:
        self.metrics[name] = self.metrics[name] + value if name in self.metrics else value


def _missing(what: str, source: Source, batch: MicroBatch, segment: Segment) -> str:
    return (
        f"rollout {batch.rollout_ids[segment.rollouts.start]} carries no {what} scores, which the loss of {source} "
        "rollouts compares with; score every rollout of this source before it is trained on"
    )
