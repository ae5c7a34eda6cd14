"""GenerationEngine on transformers: the reference that vLLM is compared with.

Continuous batching without paged memory or captured graphs, so it keeps up on models of this
repository's tests and not on large ones. Runs on CPUs and on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opd_ray.errors import WeightSyncError
from opd_ray.generate.engine import Unfinished, response_budget
from opd_ray.messages import Finished, FinishReason, GenerationRequest, TransferGroup, WeightManifest
from opd_ray.models.checkpoints import load_model
from opd_ray.weights.receivers import WeightReceiver, make_receiver


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
        """Samples the next token from logits [vocabulary] of weights ``version``."""
        token, logprob = _sample(logits, self)
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        if top_k := self.request.sampling.top_k:
            ids = logits.topk(min(top_k, len(logits))).indices
            self.topk_ids.append(ids.to(torch.int32).cpu().numpy())

    @property
    def prefix(self) -> np.ndarray:
        """Prompt and what was sampled so far."""
        return np.asarray([*self.request.prompt_tokens, *self.tokens], dtype=np.int64)

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
        weight_backend: str = "gloo",
    ) -> None:
        self._model = load_model(path, dtype, device)
        self._max_num_seqs = max_num_seqs
        limit = self._model.config.get_text_config().max_position_embeddings
        self._max_context_tokens = min(max_context_tokens or limit, limit)
        self._receiver: WeightReceiver = make_receiver(weight_backend, self._model.device)
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
            logits.append(self._cache.extend(self._model, last))
        if entering:
            prefilled, entered = _Cache.prefill(self._model, [response.prefix for response in entering])
            logits.append(prefilled)
            self._cache = entered if self._cache is None else self._cache.joined(entered)
            self._running = self._running + entering
        for response, row in zip(self._running, torch.cat(logits) if logits else (), strict=True):
            response.append(row.float(), self.weight_version)
        return self._leave()

    def abort(self, request_ids: Sequence[str]) -> None:
        dropped = set(request_ids)
        self._waiting = [response for response in self._waiting if response.request.request_id not in dropped]
        self._keep([row for row, each in enumerate(self._running) if each.request.request_id not in dropped])

    def connect(self, group: TransferGroup) -> None:
        self._receiver.connect(group)

    @torch.no_grad()
    def update_weights(self, manifest: WeightManifest, unfinished: Unfinished) -> None:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        if missing := parameters.keys() - set(manifest.names):
            raise WeightSyncError(
                f"weights: the broadcast of version {manifest.version} leaves out {len(missing)} parameters of the "
                f"generator, as {min(missing)}; send the same architecture that the generator loaded"
            )
        for name, tensor in self._receiver.receive(manifest):
            parameters[name].copy_(tensor)
        self.weight_version = manifest.version
        # Kept responses are prefilled again, ahead of those that have not begun.
        kept = self._running
        if unfinished == "restart":
            kept = [_Response(response.request, response.budget, self._model.device) for response in kept]
        self._waiting, self._running, self._cache = kept + self._waiting, [], None

    def _leave(self) -> list[Finished]:
        """Returns the responses that ended and takes their rows out of the cache."""
        finished = [response.finished() for response in self._running if response.finish_reason is not None]
        self._keep([row for row, response in enumerate(self._running) if response.finish_reason is None])
        return finished

    def _keep(self, rows: list[int]) -> None:
        """Goes on with these running responses only."""
        if len(rows) < len(self._running):
            self._running = [self._running[row] for row in rows]
            self._cache = self._cache.rows(rows) if rows else None


class _Cache:
    """Key-value cache of R responses, aligned at their last column.

    ``layers`` holds keys and values [R, heads, width, head size] of each layer; ``lengths`` [R]
    how many of the last columns of a row are real.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], lengths: Tensor) -> None:
        self.layers = layers
        self.lengths = lengths

    @staticmethod
    def prefill(model: PreTrainedModel, prefixes: Sequence[np.ndarray]) -> tuple[Tensor, _Cache]:
        """Next-token logits [R, vocabulary] of the prefixes, and their cache."""
        lengths = torch.tensor([len(prefix) for prefix in prefixes], device=model.device)
        width = int(lengths.max())
        input_ids = torch.zeros((len(prefixes), width), dtype=torch.int64)
        for row, prefix in enumerate(prefixes):
            input_ids[row, width - len(prefix) :] = torch.from_numpy(prefix)
        return _Cache([], lengths)._forward(model, input_ids.to(model.device))

    def extend(self, model: PreTrainedModel, tokens: Tensor) -> Tensor:
        """Appends one token [R, 1] to each row and returns the logits [R, vocabulary] after it."""
        logits, grown = _Cache(self.layers, self.lengths + 1)._forward(model, tokens)
        self.layers, self.lengths = grown.layers, grown.lengths
        return logits

    def joined(self, other: _Cache) -> _Cache:
        """The rows of both, the narrower one padded on the left."""
        width = max(self._width, other._width)
        layers = [
            (
                torch.cat([_widen(keys, width), _widen(other_keys, width)]),
                torch.cat([_widen(values, width), _widen(other_values, width)]),
            )
            for (keys, values), (other_keys, other_values) in zip(self.layers, other.layers, strict=True)
        ]
        return _Cache(layers, torch.cat([self.lengths, other.lengths]))

    def rows(self, rows: list[int]) -> _Cache:
        """Only these rows, without the columns that none of them uses."""
        index = torch.tensor(rows, device=self.lengths.device)
        lengths = self.lengths[index]
        unused = self._width - int(lengths.max())
        return _Cache([(keys[index, :, unused:], values[index, :, unused:]) for keys, values in self.layers], lengths)

    @property
    def _width(self) -> int:
        return self.layers[0][0].shape[2]

    def _forward(self, model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, _Cache]:
        """Runs new columns [R, n] on top of the cached ones; ``lengths`` counts the new ones already."""
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys, values, index)
        num_new = input_ids.shape[1]
        width = num_new + (self._width if self.layers else 0)
        columns = torch.arange(width, device=input_ids.device)
        attention_mask = (columns >= width - self.lengths[:, None]).to(torch.int64)
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -num_new:]
        logits = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits, _Cache([(layer.keys, layer.values) for layer in cache.layers], self.lengths)


def _widen(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, width - tensor.shape[2], 0))


def _sample(logits: Tensor, response: _Response) -> tuple[int, float]:
    """One token from logits [vocabulary] and its log-prob under the distribution it came from.

    Greedy (temperature 0) reports the untempered distribution, as vLLM does.
    """
    sampling = response.request.sampling
    if sampling.temperature == 0:
        logprobs = logits.log_softmax(-1)
        token = int(logprobs.argmax())
        return token, float(logprobs[token])
    logprobs = (logits / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        logprobs = _nucleus(logprobs, sampling.top_p)
    token = int(torch.multinomial(logprobs.exp(), 1, generator=response.generator))
    return token, float(logprobs[token])


def _nucleus(logprobs: Tensor, top_p: float) -> Tensor:
    """Renormalised log-probs of the smallest set of tokens that holds ``top_p`` of the mass."""
    ordered, ids = logprobs.sort(descending=True)
    before = ordered.exp().cumsum(0) - ordered.exp()
    outside = ids[before >= top_p]
    return logprobs.index_fill(0, outside, -torch.inf).log_softmax(-1)
