"""The objective of one optimizer step, micro-batch by micro-batch (METHOD §3, §4):

    L = Σ_source coef · mean D_source(π_θ, π_T)  +  β_KL · mean KL(π_θ‖π_ref)

The coefficients and the counts that the means divide by come with the step's plan. The anchor's mean is over the
student's tokens, or over those of all sources with ``loss.reference.on_golden``.

**Memory.** The loss asks the student's head for the logits of ``c`` tokens at a time, 4·c·V ≤ ``learner.logits_mb``
MiB. A micro-batch that fits is one such piece and keeps its logits for the backward pass. A larger one recomputes each
piece in the backward pass, so that besides the model's own activations it holds, for N response tokens,

    4·N·(2·H_s + H_t)  bytes   states of the student, their gradient and the states of full-vocabulary scorers
    ≈ 12 · logits_mb   MiB     one piece: logits, log-probs of both models, their products, and gradients of these
    8·V·H_s            bytes   the gradient of the output layer, and one piece's share of it

and never anything of size N·V. (2 bytes instead of 4 where states are 16-bit; top-k supports need about half a piece.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from opd_ray.batching import REFERENCE, MicroBatch, Segment
from opd_ray.config import Config
from opd_ray.errors import RunError
from opd_ray.heads import FrozenHead, chunk_rows
from opd_ray.losses import Head, ScoredTokens, TokenBatch
from opd_ray.losses.advantage import combined_logprobs, discounted, log_ratios, uses_teacher
from opd_ray.losses.diagnostics import student_metrics, topk_overlap
from opd_ray.losses.reduction import before_repetition, token_weights
from opd_ray.losses.terms import reference_loss, source_loss
from opd_ray.messages import Coefficients, Count, Denominators, Source


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
        lengths = batch.response_lengths[segment.rollouts]
        truncated = batch.truncated[segment.rollouts]
        repetitive, behaviour = batch.repetitive[segment.tokens], batch.behaviour_logprobs[segment.tokens]
        kept = torch.ones_like(repetitive)
        if coefficients.mask_truncated_tails:
            kept = before_repetition(repetitive, truncated, lengths)
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

    def batch(self, logits: torch.Tensor, rows: slice, stop_token_ids: tuple[int, ...], recording: bool) -> TokenBatch:
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
            recording=recording,
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
        self._recording = True
        self._values: dict[tuple[int, str], list[torch.Tensor]] = {}
        self.metrics: dict[str, torch.Tensor] = {}
        """After the call: name to a number."""
        self.problem: str | None = None
        """After the call: which rollouts' loss is not finite, if any. The gradient is then nan on purpose."""

    def __call__(self, hidden: torch.Tensor, head: Head) -> torch.Tensor:
        """The loss, from states [N, H] of the response tokens; see :class:`opd_ray.heads.Consumer`."""
        rows = self._objective.chunk_rows
        in_pieces = hidden.shape[0] > rows
        parts = self._parts(rows if in_pieces else max(1, hidden.shape[0]))
        total = hidden.new_zeros((), dtype=torch.float32)
        for (index, span), states in zip(parts, hidden.split([s.stop - s.start for _, s in parts]), strict=True):
            run = partial(self._loss, index, span, head)
            if in_pieces:
                total = total + checkpoint(run, states, use_reentrant=False, preserve_rng_state=False)
            else:
                total = total + run(states)
        self._recording = False
        self.metrics["loss"] = total.detach()
        if not torch.isfinite(total):
            self.problem = self._describe()
            # Whatever made it so, no rank may take this step: the gradient says it to all of them.
            total = total + hidden.sum() * torch.nan
        self._values.clear()
        return total

    def _parts(self, rows: int) -> list[tuple[int, slice]]:
        """(piece, its rows) in the order of the micro-batch's tokens, at most ``rows`` at a time; empty pieces too."""
        parts = []
        for index, piece in enumerate(self._pieces):
            size = piece.tokens.shape[0]
            parts += [(index, slice(start, min(start + rows, size))) for start in range(0, max(size, 1), rows)]
        return parts

    def _loss(self, index: int, rows: slice, head: Head, states: torch.Tensor) -> torch.Tensor:
        piece, config, coefficients = self._pieces[index], self._objective.config.loss, self._coefficients
        source, heads = piece.segment.source, self._objective.heads
        batch = piece.batch(head(states), rows, self._objective.stop_token_ids, self._recording)
        loss = source_loss(batch, source, config, piece.shares, heads)
        reduced = (loss.values * piece.weights[rows]).sum()
        total = getattr(coefficients, source) * reduced
        anchor = None
        if piece.anchor_weights is not None:
            anchor = reference_loss(batch, config.reference, heads.get(REFERENCE))
            anchored = (anchor * piece.anchor_weights[rows]).sum()
            total = total + coefficients.reference * anchored
        if self._recording:
            self._add(f"loss_{source}", reduced.detach())
            self._values.setdefault((index, f"loss_{source}"), []).append(loss.values.detach())
            if anchor is not None:
                self._add("loss_reference", anchored.detach())
                self._values.setdefault((index, "loss_reference"), []).append(anchor.detach())
                count = self._objective.anchor_count(self._denominators).tokens
                self._add("reference_logprob", batch.reference.logprobs.sum() / max(count, 1))
            self._record(piece, rows, batch, loss.metrics)
        return total

    def _record(self, piece: Piece, rows: slice, batch: TokenBatch, metrics: dict[str, torch.Tensor]) -> None:
        source = piece.segment.source
        if source == "student":
            last, cut = piece.last[rows], piece.in_truncated[rows]
            logged = metrics | student_metrics(
                batch, piece.shares, piece.repetitive[rows], last * (1 - cut), last * cut
            )
            term = self._objective.config.loss.student
            if term.on_distributions and term.support == "teacher_top_k":
                logged["topk_overlap"] = topk_overlap(batch, piece.shares)
            weights = piece.weights[rows]
            logged |= {"_weight": weights, "truncated_weight_share": weights * cut}
        else:
            logged = {f"{source}_{name}": values for name, values in metrics.items()}
            name = "golden_logprob" if source == "golden" else "teacher_rollout_logprob"
            logged[name] = batch.plain_logprobs.detach()
        tokens = max(self._denominators.of(source).tokens, 1)
        for name, values in logged.items():
            self._add(name, values.detach().sum() / tokens)

    def _add(self, name: str, value: torch.Tensor) -> None:
        self.metrics[name] = self.metrics[name] + value if name in self.metrics else value

    def _describe(self) -> str:
        """Names the terms and rollouts whose loss is not finite."""
        culprits = []
        for (index, term), values in self._values.items():
            piece = self._pieces[index]
            ids = self._rollout_ids[piece.segment.rollouts]
            for rollout_id, tokens in zip(ids, torch.cat(values).split(piece.lengths.tolist()), strict=True):
                if not torch.isfinite(tokens).all():
                    culprits.append(f"{rollout_id} ({term})")
        shown = ", ".join(culprits[:8]) + (f" and {len(culprits) - 8} more" if len(culprits) > 8 else "")
        return f"the loss is not finite for {shown or 'the sum of this micro-batch'}"


def _missing(what: str, source: Source, batch: MicroBatch, segment: Segment) -> str:
    return (
        f"rollout {batch.rollout_ids[segment.rollouts.start]} carries no {what} scores, which the loss of {source} "
        "rollouts compares with; score every rollout of this source before it is trained on"
    )
