"""GenerationEngine on transformers: no paged memory, no captured graphs, and hardly anything else to do in a step.

For models so small that what vLLM does around a step takes longer than the step, and the reference that vLLM is
compared with. Runs on CPUs and on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from opd_ray.generate.columns import Columns
from opd_ray.generate.engine import Unfinished, response_budget
from opd_ray.generate.repeats import Repeats
from opd_ray.generate.sampling import sample, uniform
from opd_ray.messages import Finished, FinishReason, GenerationRequest, TransferGroup, WeightManifest
from opd_ray.models.checkpoints import load_model
from opd_ray.weights.beside import Memory, own_stream
from opd_ray.weights.manifest import check_fits, dtype_name
from opd_ray.weights.transfer import WeightTransfer


class _Response:
    """One running response of TorchGenerationEngine."""

    def __init__(self, request: GenerationRequest, budget: int) -> None:
        self.request, self.budget = request, budget
        self.stops = frozenset(request.sampling.stop_token_ids)
        self.drawn = uniform(request.seed, budget)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.topk_ids: list[np.ndarray] = []
        self.repeats = False

    @property
    def prefix(self) -> Tensor:
        """Prompt and what was sampled so far."""
        return torch.tensor([*self.request.prompt_tokens, *self.tokens])

    @property
    def finish_reason(self) -> FinishReason | None:
        if self.tokens and self.tokens[-1] in self.stops:
            return "stop"
        if len(self.tokens) >= self.budget:
            return "length"
        return "repetition" if self.repeats else None

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

    Responses join and leave between steps. Weights that came are used where they lie: the model changes over between
    two memories.
    """

    weight_version: int
    beside_steps = True

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
        self._in_use, self._free = Memory(), Memory()
        self._received: tuple[int, dict[str, Tensor]] = 0, {}
        """Version and weights."""
        self._waiting: list[_Response] = []
        self._running: list[_Response] = []
        """Each in the row of the cache that it has here."""
        self._columns = Columns(self._model, max_num_seqs)
        self._repeats = Repeats(max_num_seqs)
        self.weight_version = 0

    def submit(self, request: GenerationRequest) -> None:
        self._waiting.append(_Response(request, response_budget(request, self._max_context_tokens)))

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        free = self._max_num_seqs - len(self._running)
        entering, self._waiting = self._waiting[:free], self._waiting[free:]
        logits = []
        if self._running:
            last = torch.tensor([response.tokens[-1] for response in self._running], device=self._model.device)
            logits.append(self._columns.extend(last))
        if entering:
            logits.append(self._columns.enter([response.prefix for response in entering], len(self._running)))
            rules = [(response.request.sampling.repetition_rule, response.tokens) for response in entering]
            self._repeats.enter(len(self._running), rules)
            self._running += entering
        if logits:
            self._append(torch.cat(logits).float())
        finished = [response.finished() for response in self._running if response.finish_reason is not None]
        self._keep(lambda response: response.finish_reason is None)
        return finished

    def _append(self, logits: Tensor) -> None:
        """The next token of every running response, from logits [rows, vocabulary]."""
        asked = [response.request.sampling for response in self._running]
        drawn = [response.drawn[len(response.tokens)] for response in self._running]
        each = (each.temperature for each in asked), (each.top_p for each in asked)
        settings = [torch.tensor([*values], device=logits.device) for values in each]
        tokens, logprobs = sample(logits, *settings, torch.tensor(drawn, device=logits.device))
        most = max(sampling.top_k for sampling in asked)
        top = logits.topk(min(most, logits.shape[1])).indices.to(torch.int32).cpu().numpy() if most else ()
        listed = tokens.tolist()
        rows = zip(self._running, listed, logprobs.tolist(), strict=True)
        for row, (response, token, logprob) in enumerate(rows):
            response.tokens.append(token)
            response.logprobs.append(logprob)
            response.versions.append(self.weight_version)
            if top_k := response.request.sampling.top_k:
                response.topk_ids.append(top[row, :top_k].copy())  # a view would keep those of all rows

        for row in self._repeats.extend(listed):
            self._running[row].repeats = True

    @torch.inference_mode()
    def abort(self, request_ids: Sequence[str]) -> None:
        dropped = set(request_ids)
        self._waiting = [response for response in self._waiting if response.request.request_id not in dropped]
        self._keep(lambda response: response.request.request_id not in dropped)

    def connect(self, group: TransferGroup) -> None:
        self._transfer.connect(group)

    @torch.no_grad()
    def receive(self, manifest: WeightManifest) -> None:
        own = self._parameters()
        check_fits(manifest, own, "a generator")
        sent = zip(manifest.names, manifest.dtypes, strict=True)
        alike = all(dtype == dtype_name(own[name].dtype) for name, dtype in sent if name in own)
        with own_stream(self._model.device):
            received = self._transfer.receive_whole(manifest, self._free if alike else None)
            # A checkpoint of adapters' base may hold more than parameters.
            weights = {name: tensor.to(own[name]) for name, tensor in received if name in own}
        self._received = manifest.version, weights

    def install(self, unfinished: Unfinished) -> None:
        self.weight_version, weights = self._received
        own = self._parameters()
        for name, tensor in weights.items():
            own[name].data = tensor
        self._in_use, self._free = self._free, self._in_use
        if unfinished == "keep":
            return
        again = self._running
        if unfinished == "restart":
            again = [_Response(response.request, response.budget) for response in again]
        self._waiting, self._running = again + self._waiting, []  # ahead of those that have not begun

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        """Tied ones under each of their names."""
        return dict(self._model.named_parameters(remove_duplicate=False))

    def _keep(self, stays: Callable[[_Response], bool]) -> None:
        """Goes on with these running responses only."""
        gone = [row for row, response in enumerate(self._running) if not stays(response)]
        if gone:
            was = self._columns.leave(gone, len(self._running))
            self._repeats.leave(was)
            self._running = [self._running[row] for row in was]
