"""The reference of a student that is trained by adapters: the same model without them, so no second one is loaded."""

from __future__ import annotations

from dataclasses import replace

import torch

from opd_ray.learn.adapters import Adapters
from opd_ray.learn.heads import ResponseHead, ResponseModel
from opd_ray.learn.losses import ScoredTokens
from opd_ray.learn.microbatch import MicroBatch, Segment
from opd_ray.learn.objective import Objective
from opd_ray.models.scores import token_scores
from opd_ray.score.requests import reference_request


class OwnReference:
    """Scores micro-batches as a reference scorer does, in the learner's precision."""

    def __init__(self, module: ResponseModel, adapters: Adapters, objective: Objective) -> None:
        self._module, self._adapters, self._objective = module, adapters, objective
        self._request = reference_request(objective.config, objective.stop_token_ids)

    @torch.no_grad()
    def beside(self, batch: MicroBatch) -> MicroBatch:
        """``batch`` with the reference's scores of those segments whose loss compares with it.

        One forward pass, also where there are none: under ZeRO-3 every rank takes part in it.
        """
        tokens = torch.cat([batch.logit_index[:0], *(segment.tokens.tokens for segment in batch.segments)])
        found: dict[str, torch.Tensor] = {}

        def consume(hidden: torch.Tensor, head: ResponseHead) -> torch.Tensor:
            found.update(self._scores(hidden, tokens, head))
            return hidden.new_zeros(())

        self._module.consume(consume)
        with self._adapters.off():
            self._module(batch.input_ids, batch.position_ids, batch.logit_index)
        sizes = [len(segment.tokens.tokens) for segment in batch.segments]
        columns = {name: column.split(sizes) for name, column in found.items()}
        segments = [
            self._with_reference(segment, ScoredTokens(**{name: parts[index] for name, parts in columns.items()}))
            for index, segment in enumerate(batch.segments)
        ]
        return replace(batch, segments=tuple(segments))

    def _scores(self, hidden: torch.Tensor, tokens: torch.Tensor, head: ResponseHead) -> dict[str, torch.Tensor]:
        """What was asked for, of all tokens; the logits of a chunk of them exist at a time."""
        rows = self._objective.chunk_rows
        chunks = [
            token_scores(head.logits(states), own, own[:, None][:, :0], self._request)
            for states, own in zip(hidden.split(rows), tokens.split(rows), strict=True)
        ]
        asked = ["logprobs"]
        asked += ["topk_ids", "topk_logprobs"] if self._request.top_k else []
        asked += ["stop_logprobs"] if self._request.stop_token_ids else []
        scores = {name: torch.cat([chunk[name] for chunk in chunks]) for name in asked}
        if self._request.top_k:
            scores["topk_ids"] = scores["topk_ids"].long()
        return scores | ({"hidden": hidden} if self._request.hidden else {})

    def _with_reference(self, segment: Segment, scored: ScoredTokens) -> Segment:
        if not self._objective.config.needs_reference(segment.source):
            return segment
        return replace(segment, tokens=replace(segment.tokens, reference=scored))
