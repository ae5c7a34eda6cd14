"""ScoringEngine as one forward pass of a transformers model per batch: packed on CPUs, padded on CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from opd_ray.messages import ScoreRequest
from opd_ray.models.attention import can_pack, row_bounds
from opd_ray.models.checkpoints import load_model
from opd_ray.models.heads import checked_transform
from opd_ray.models.inputs import lay_out
from opd_ray.models.scores import token_scores
from opd_ray.score.engine import Rollout, Scores

_LOGITS_BYTES = 256 * 2**20
"""Float32 logits that are held at once; their exponentials take as much again."""


class TorchScoringEngine:
    """Exact scores; the output layer is applied to a chunk of tokens at a time, so that a batch of N tokens never has
    its [N, vocabulary] logits in memory."""

    def __init__(
        self,
        *,
        path: str,
        dtype: str = "float32",
        device: str | None = None,
        max_batch_tokens: int = 8192,
        logits_bytes: int = _LOGITS_BYTES,
    ) -> None:
        """``max_batch_tokens`` bounds the positions of one pass; ``device`` defaults to a GPU if there is one.

        Raises InputError for a model that does something unknown to its logits behind the output layer.
        """
        self._dtype, self._device = dtype, device
        self._max_batch_tokens, self._logits_bytes = max_batch_tokens, logits_bytes
        self.load(path)

    def load(self, path: str) -> None:
        self._model = None  # two models need not fit
        self._model = load_model(path, self._dtype, self._device)
        self._head = self._model.get_output_embeddings()
        self._vocab_size = self._head.weight.shape[0]
        self._transform = checked_transform(self._model, path)
        self._packs = can_pack(self._model)

    @property
    def device(self) -> torch.device:
        return self._model.device

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Every parameter of the model, tied ones under each of their names; writing to them changes the scores."""
        return dict(self._model.named_parameters(remove_duplicate=False))

    @torch.inference_mode()
    def score(self, sequences: Sequence[Rollout], request: ScoreRequest) -> list[Scores]:
        self._check_tokens(sequences, request)
        scores: dict[int, Scores] = {}
        for batch in self._batches(sequences):
            rows = [sequences[index] for index in batch]
            scores.update(zip(batch, self._score_batch(rows, request), strict=True))
        return [scores[index] for index in range(len(sequences))]

    def _check_tokens(self, sequences: Sequence[Rollout], request: ScoreRequest) -> None:
        parts = [part for row in sequences for part in (row.prompt_tokens, row.response_tokens)]
        largest = max([*request.stop_token_ids, *(int(part.max()) for part in parts if len(part))], default=0)
        if largest >= self._vocab_size:
            raise ValueError(
                f"token {largest} is not among the {self._vocab_size} of {type(self._model).__name__}; "
                "score with models of the student's tokenizer"
            )

    def _batches(self, sequences: Sequence[Rollout]) -> Iterator[list[int]]:
        """Indices of ``sequences``, longest first, in groups whose size as a pass has it keeps to the bound."""
        lengths = [len(sequence.prompt_tokens) + len(sequence.response_tokens) for sequence in sequences]
        batch: list[int] = []
        size = 0
        for index in sorted(range(len(sequences)), key=lambda index: -lengths[index]):
            more = lengths[index if self._packs or not batch else batch[0]]
            if batch and size + more > self._max_batch_tokens:
                yield batch
                batch, size, more = [], 0, lengths[index]
            batch.append(index)
            size += more
        if batch:
            yield batch

    def _score_batch(self, rows: list[Rollout], request: ScoreRequest) -> list[Scores]:
        lengths = [len(row.response_tokens) for row in rows]
        tokens = np.concatenate([row.response_tokens for row in rows])
        given = np.concatenate([row.given_ids for row in rows]) if request.given else np.empty((len(tokens), 0))
        columns = [torch.from_numpy(ids.astype(np.int64)).to(self.device) for ids in (tokens, given)]
        parts = [row.prompt_tokens for row in rows], [row.response_tokens for row in rows]
        input_ids, positions, index = lay_out(*parts, packing=self._packs)
        packed = {}
        if self._packs:
            packed = {"position_ids": positions, **row_bounds(positions, self._model.config._attn_implementation)}
        body = self._model.base_model(input_ids=input_ids.to(self.device), use_cache=False, **packed)
        hidden = body.last_hidden_state.flatten(0, 1).index_select(0, index.to(self.device))
        size = max(1, self._logits_bytes // (4 * self._vocab_size))
        chunks = []
        for start in range(0, max(1, len(tokens)), size):
            chunk = slice(start, start + size)
            logits = self._transform(self._head(hidden[chunk]))
            chunks.append(token_scores(logits, *(ids[chunk] for ids in columns), request))
        whole = {name: torch.cat([chunk[name] for chunk in chunks]).cpu().numpy() for name in chunks[0]}
        # NumPy has no bfloat16; float16 keeps more of its digits, and the scorer checks the range.
        portable = torch.float16 if hidden.dtype == torch.bfloat16 else hidden.dtype
        whole["hidden"] = (hidden if request.hidden else hidden[:, :0]).to(portable).cpu().numpy()
        rows_of = [slice(end - length, end) for end, length in zip(np.cumsum(lengths), lengths, strict=True)]
        return [Scores(**{name: column[rows] for name, column in whole.items()}) for rows in rows_of]
