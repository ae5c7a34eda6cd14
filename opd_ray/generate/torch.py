"""GenerationEngine on transformers: the reference that vLLM is compared with.

Continuous batching without paged memory or captured graphs, so it keeps up on models of this
repository's tests and not on large ones. Runs on CPUs and on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, TopPLogitsWarper

from opd_ray.generate.engine import Unfinished, response_budget
from opd_ray.messages import Finished, FinishReason, GenerationRequest, TransferGroup, WeightManifest
from opd_ray.models.checkpoints import load_model
from opd_ray.weights.manifest import check_fits
from opd_ray.weights.transfer import WeightTransfer


class _Response:
    """One running response of TorchGenerationEngine."""

    def __init__(self, request: GenerationRequest, budget: int, device: torch.device) -> None:
        self.request = request
        self.budget = budget
        self.generator = torch.Generator(device).manual_seed(request.seed)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.topk_ids: list[np.ndarray] = []

    def append(self, logits: Tensor, version: int) -> None:
        """Samples the next token from logits [vocabulary] of weights ``version``.

        Its log-prob is that under the distribution it came from; greedy (temperature 0) reports the untempered one,
        as vLLM does.
        """
        sampling = self.request.sampling
        if sampling.temperature == 0:
            logprobs = logits.log_softmax(-1)
            token = int(logprobs.argmax())
        else:
            warped = logits / sampling.temperature
            if sampling.top_p < 1:
                warped = TopPLogitsWarper(sampling.top_p)(None, warped[None])[0]
            logprobs = warped.log_softmax(-1)
            token = int(torch.multinomial(logprobs.exp(), 1, generator=self.generator))
        self.tokens.append(token)
        self.logprobs.append(float(logprobs[token]))
        self.versions.append(version)
        if sampling.top_k:
            ids = logits.topk(min(sampling.top_k, len(logits))).indices
            self.topk_ids.append(ids.to(torch.int32).cpu().numpy())

    @property
    def prefix(self) -> Tensor:
        """Prompt and what was sampled so far."""
        return torch.tensor([*self.request.prompt_tokens, *self.tokens])

    @property
    def finish_reason(self) -> FinishReason | None:
        if self.tokens and self.tokens[-1] in self.request.sampling.stop_token_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.budget else None

    def finished(self) -> Finished:
        return Finished(
            request_id=self.request.request_id,
            tokens=np.asarray(self.tokens, dtype=np.int32),
            logprobs=np.asarray(self.logprobs, dtype=np.float32),
            weight_versions=np.asarray(self.versions, dtype=np.int32),
            finish_reason=self.finish_reason,
            topk_ids=np.stack(self.topk_ids) if self.topk_ids else None,
        )


class TorchGenerationEngine:
    """GenerationEngine on a transformers model.

    The running responses share one key-value cache [rows, heads, width, head size] whose rows end
    at the same column (left padding); rows join and leave between steps. A weight update drops
    the cache, and the next step prefills every response again.
    """

    weight_version: int

    def __init__(
        self,
        *,
        path: str,
        dtype: str = "float32",
        device: str | None = None,
        max_num_seqs: int = 64,
        max_context_tokens: int | None = None,
    ) -> None:
        self._model = load_model(path, dtype, device)
        self._max_num_seqs = max_num_seqs
        limit = self._model.config.get_text_config().max_position_embeddings
        self._max_context_tokens = min(max_context_tokens or limit, limit)
        self._transfer = WeightTransfer()
        self._waiting: list[_Response] = []
        self._running: list[_Response] = []
        self._cache: _Cache | None = None
        self.weight_version = 0

    def submit(self, request: GenerationRequest) -> None:
        budget = response_budget(request, self._max_context_tokens)
        self._waiting.append(_Response(request, budget, self._model.device))

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        free = self._max_num_seqs - len(self._running)
        entering, self._waiting = self._waiting[:free], self._waiting[free:]
        logits = []
        if self._running:
            last = torch.tensor([[response.tokens[-1]] for response in self._running], device=self._model.device)
            logits.append(self._cache.extend(self._model, last, 1))
        if entering:
            prefixes, entered = [response.prefix for response in entering], _Cache()
            columns = pad_sequence(prefixes, batch_first=True, padding_side="left").to(self._model.device)
            lengths = torch.tensor([len(prefix) for prefix in prefixes], device=self._model.device)
            logits.append(entered.extend(self._model, columns, lengths))
            self._cache = entered if self._cache is None else self._cache.joined(entered)
            self._running = self._running + entering
        for response, row in zip(self._running, torch.cat(logits) if logits else (), strict=True):
            response.append(row.float(), self.weight_version)
        finished = [response.finished() for response in self._running if response.finish_reason is not None]
        self._keep(lambda response: response.finish_reason is None)
        return finished

    def abort(self, request_ids: Sequence[str]) -> None:
        dropped = set(request_ids)
        self._waiting = [response for response in self._waiting if response.request.request_id not in dropped]
        self._keep(lambda response: response.request.request_id not in dropped)

    def connect(self, group: TransferGroup) -> None:
        self._transfer.connect(group)

    @torch.no_grad()
    def update_weights(self, manifest: WeightManifest, unfinished: Unfinished) -> None:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        check_fits(manifest, parameters, "a generator")
        for name, tensor in self._transfer.receive_whole(manifest):
            if name in parameters:  # a checkpoint of adapters' base may hold more than parameters
                parameters[name].copy_(tensor)
        self.weight_version = manifest.version
        # Kept responses are prefilled again, ahead of those that have not begun.
        kept = self._running
        if unfinished == "restart":
            kept = [_Response(response.request, response.budget, self._model.device) for response in kept]
        self._waiting, self._running, self._cache = kept + self._waiting, [], None

    def _keep(self, stays: Callable[[_Response], bool]) -> None:
        """Goes on with these running responses only, and takes the others' rows out of the cache."""
        rows = [row for row, response in enumerate(self._running) if stays(response)]
        if len(rows) < len(self._running):
            self._running = [self._running[row] for row in rows]
            self._cache = self._cache.rows(rows) if rows else None


class _Cache:
    """Key-value cache of R responses, aligned at their last column.

    ``tensors`` are the keys and the values [R, heads, width, head size] of each layer in turn; ``lengths`` [R] how many
    of the last columns of a row are real.
    """

    def __init__(self, tensors: Sequence[Tensor] = (), lengths: Tensor | int = 0) -> None:
        self._tensors = tensors
        self._lengths = lengths

    def extend(self, model: PreTrainedModel, columns: Tensor, lengths: Tensor | int) -> Tensor:
        """Appends tokens [R, n], of each row the last ``lengths``; returns the logits [R, vocabulary] after them."""
        self._lengths = self._lengths + lengths
        cache = DynamicCache()
        for layer in range(len(self._tensors) // 2):
            cache.update(*self._tensors[2 * layer : 2 * layer + 2], layer)
        num_new = columns.shape[1]
        width = num_new + self._width
        attention_mask = torch.arange(width, device=columns.device) >= width - self._lengths[:, None]
        logits = model(
            input_ids=columns,
            attention_mask=attention_mask.to(torch.int64),
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0)[:, -num_new:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self._tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return logits

    def joined(self, other: _Cache) -> _Cache:
        """The rows of both, the narrower one padded on the left."""
        width = max(self._width, other._width)
        pairs = zip(self._tensors, other._tensors, strict=True)
        tensors = [torch.cat([_widen(tensor, width) for tensor in pair]) for pair in pairs]
        return _Cache(tensors, torch.cat([self._lengths, other._lengths]))

    def rows(self, rows: list[int]) -> _Cache:
        """Only these rows, without the columns that none of them uses."""
        index = torch.tensor(rows, device=self._lengths.device)
        lengths = self._lengths[index]
        unused = self._width - int(lengths.max())
        return _Cache([tensor[index, :, unused:] for tensor in self._tensors], lengths)

    @property
    def _width(self) -> int:
        return self._tensors[0].shape[2] if self._tensors else 0


def _widen(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, width - tensor.shape[2], 0))
