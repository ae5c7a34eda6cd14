"""GenerationEngine on transformers: no paged memory, no captured graphs, and hardly anything else to do in a step.

For models so small that what vLLM does around a step takes longer than the step, and the reference that vLLM is
compared with. Runs on CPUs and on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_ray.generate.any_model import AnyModel
from opd_ray.generate.engine import Unfinished, response_budget
from opd_ray.generate.plain import PlainModel, is_plain
from opd_ray.generate.running import Response, Running
from opd_ray.generate.sampling import sample
from opd_ray.messages import Finished, FinishReason, GenerationRequest, TransferGroup, WeightManifest
from opd_ray.models.checkpoints import load_model
from opd_ray.weights.beside import Memory, own_stream
from opd_ray.weights.manifest import check_fits, dtype_name
from opd_ray.weights.transfer import WeightTransfer


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
        self._waiting: list[Response] = []
        self._running = Running(max_num_seqs)
        self._passes = (PlainModel if is_plain(self._model) else AnyModel)(self._model, max_num_seqs)
        """Has keys and values of the running responses, in the same rows."""
        self.weight_version = 0

    def submit(self, request: GenerationRequest) -> None:
        self._waiting.append(Response(request, response_budget(request, self._max_context_tokens)))

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        free = self._max_num_seqs - len(self._running)
        entering, self._waiting = self._waiting[:free], self._waiting[free:]
        if not (entering or self._running):
            return []
        last = torch.from_numpy(self._running.last_tokens()).to(self._model.device)
        logits = self._passes.advance(last, [torch.tensor(_prefix(response)) for response in entering])
        if entering:
            self._running.enter(entering)
        ended = self._append(logits.float())
        finished = [self._running.taken(row).finished(ended[row]) for row in sorted(ended)]
        self._drop(list(ended))
        return finished

    def _append(self, logits: Tensor) -> dict[int, FinishReason]:
        """The next token of every running response, from logits [rows, vocabulary]; the rows that end, and why."""
        settings = [torch.from_numpy(each).to(logits.device) for each in self._running.settings()]
        tokens, logprobs = (each.cpu().numpy() for each in sample(logits, *settings))
        asked = [response.request.sampling.top_k for response in self._running.responses]
        if most := max(asked):
            top = logits.topk(min(most, logits.shape[1])).indices.to(torch.int32).cpu().numpy()
            for row, (response, top_k) in enumerate(zip(self._running.responses, asked, strict=True)):
                if top_k:
                    response.topk_ids.append(top[row, :top_k].copy())  # a view would keep those of all rows
        return self._running.append(tokens, logprobs, self.weight_version)

    @torch.inference_mode()
    def abort(self, request_ids: Sequence[str]) -> None:
        dropped = set(request_ids)
        self._waiting = [response for response in self._waiting if response.request.request_id not in dropped]
        running = enumerate(self._running.responses)
        self._drop([row for row, response in running if response.request.request_id in dropped])

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
        again = [self._running.taken(row) for row in range(len(self._running))]
        if unfinished == "restart":
            again = [Response(response.request, response.budget) for response in again]
        self._running.leave([])
        self._waiting = again + self._waiting  # ahead of those that have not begun

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        """Tied ones under each of their names."""
        return dict(self._model.named_parameters(remove_duplicate=False))

    def _drop(self, rows: Sequence[int]) -> None:
        """Goes on without these running responses."""
        if rows:
            self._running.leave(self._passes.leave(rows, len(self._running)))


def _prefix(response: Response) -> list[int]:
    """Prompt and what was sampled so far."""
    return [*response.request.prompt_tokens, *response.tokens.tolist()]
