"""Learner: one data-parallel rank of the trainer, under DeepSpeed.

The driver calls ``train_step``, ``send_weights``, ``snapshot``, ``restore`` and ``export`` on every
rank at once: under ZeRO they are collective, and a rank that is left out makes the others wait. A
rank knows its own plan and the step's global denominators, nothing of the buffer or of the
generators. It is a plain class; :mod:`opd_ray.placement.launch` makes it an actor.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import logging
import math
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from opd_ray.config import Config, LoraConfig
from opd_ray.errors import RunError
from opd_ray.learn import ranks
from opd_ray.learn.adapters import Adapters
from opd_ray.learn.export import write_trained
from opd_ray.learn.heads import ResponseModel
from opd_ray.learn.losses.diagnostics import finish
from opd_ray.learn.microbatch import Payloads, collate, fetch_payloads, lr_factor
from opd_ray.learn.objective import MicroBatchLoss, Objective
from opd_ray.learn.reference import OwnReference
from opd_ray.learn.state import LearnerState
from opd_ray.learn.student import gathering_in_passing, load_student
from opd_ray.messages import MemoryUse, Spans, StepOutcome, StepPlan, TransferGroup, WeightManifest
from opd_ray.models.adapters import adapted_layers
from opd_ray.models.heads import load_heads
from opd_ray.models.hub import local_directory
from opd_ray.rooms import logs, spans
from opd_ray.rooms.memory import own_memory
from opd_ray.rooms.node import free_port, node_ip, this_node, use_own_interface
from opd_ray.weights.gathering import whole_weights
from opd_ray.weights.manifest import manifest_of, shape_of, weights_of
from opd_ray.weights.transfer import WeightTransfer

_log = logs.get(__name__)


class Learner:
    """Trains the student on the plans of one rank, and hands its weights out.

    The process joins the other ranks once, by ``setup``; ``begin`` starts a run and may be called again for the
    next one.
    """

    def __init__(self, config: Config, rank: int) -> None:
        """``config`` says where and with how many others this process trains; later runs keep to that."""
        self._config = config
        self._rank = rank
        self._num_ranks = config.learner.num_ranks
        self._cuda = config.learner.gpus_per_rank > 0
        # DeepSpeed guesses its accelerator from the machine; a CPU run on a GPU node must say so.
        os.environ["DS_ACCELERATOR"] = "cuda" if self._cuda else "cpu"
        if not self._cuda:
            torch.set_num_threads(max(1, int(config.learner.cpus_per_rank)))
        self._device = torch.device("cuda", 0) if self._cuda else torch.device("cpu")
        self._transfer = WeightTransfer()
        self._engine: Any = None

    def node(self) -> str:
        return this_node()

    def memory(self) -> MemoryUse:
        return own_memory()

    def timeline(self) -> Spans:
        return spans.collect()

    def node_address(self) -> tuple[str, int]:
        """(IP address, free port) of this process's node, where rank 0 lets the others meet."""
        return node_ip(), free_port()

    def setup(self, master_host: str, master_port: int, secret: str) -> None:
        """Joins the other ranks, all of which know ``secret``; once in a process, blocks for all of them."""
        use_own_interface()
        os.environ["LOCAL_RANK"] = "0"  # Ray shows each actor only its own GPU
        timeout = timedelta(seconds=max(self._config.deadlines.start_s, self._config.deadlines.train_s))
        backend = "nccl" if self._cuda else "gloo"
        ranks.join(backend, self._rank, self._num_ranks, (master_host, master_port), secret, timeout)
        _import_deepspeed().init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)

    @spans.spanned("load")
    def begin(self, config: Config, student_path: str, stop_token_ids: Sequence[int]) -> None:
        """Loads the student and builds engine, optimizer and objective of a run; blocks for all ranks.

        ``stop_token_ids`` is the EOS set, the first id standing for all. What an earlier run left is freed. Raises
        InputError when a model cannot be used.
        """
        self._end()
        self._config = config
        self._base, self._student_path = student_path, local_directory(student_path)
        self._zero_stage = config.learner.zero_stage
        if self._zero_stage == 0 and config.learner.dtype == "bfloat16":
            # DeepSpeed 0.19 without ZeRO accumulates bfloat16 gradients in bfloat16, and allocates AdamW's state
            # by an empty step that its bias correction counts: the first update is 0.74 of what it should be.
            self._zero_stage = 1
        self._stop_token_ids = tuple(stop_token_ids)
        torch.manual_seed(config.seed)
        self._model = load_student(self._student_path, config.learner, self._zero_stage, self._device)
        self._num_parameters = sum(shape_of(parameter).numel() for parameter in self._model.parameters())
        self._adapters = self._adapt(config.student.lora)
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._num_trained = sum(shape_of(parameter).numel() for parameter in trained)
        with gathering_in_passing(self._model):
            self._module = ResponseModel(self._model, packing=config.learner.packing)
        self._objective = Objective(
            config,
            vocab_size=self._module.vocab_size,
            stop_token_ids=self._stop_token_ids,
            heads=load_heads(config, str(self._student_path), self._device),
        )
        self._reference = None
        if config.uses_reference and config.learner_is_reference:
            self._reference = OwnReference(self._module, self._adapters, self._objective)
        learner = config.learner
        optimizer = torch.optim.AdamW(
            trained,
            lr=learner.lr,
            betas=learner.adam_betas,
            weight_decay=learner.weight_decay,
            fused=True,
        )
        self._engine, *_ = _import_deepspeed().initialize(
            model=self._module,
            optimizer=optimizer,
            lr_scheduler=lambda basic: torch.optim.lr_scheduler.LambdaLR(basic, functools.partial(lr_factor, learner)),
            config=self._engine_config(),
        )
        # Of one rank's gradients DeepSpeed would make a copy, reduce it with nobody and copy it back.
        self._engine.enable_backward_allreduce = self._zero_stage > 0 or self._num_ranks > 1
        own = self._adapters.weights() if self._adapters else self._model.named_parameters()
        self._state = LearnerState(self._engine, dict(own), zero_stage=self._zero_stage, seed=config.seed)

    @spans.spanned("train")
    def train_step(self, plan: StepPlan, fetch: Callable[[list[Any]], list[Any]] = ray.get) -> StepOutcome:
        """One optimizer step; the same outcome on every rank.

        ``fetch`` turns refs into RecordBatches. Where payloads of any rank are gone from the
        object store, or where a loss or the gradient is not finite on any rank, no rank takes the step, and the
        outcome says which rollouts are lost or to blame. Raises RunError when a payload does not fit its plan.
        """
        with spans.span("fetch"):
            payloads, lost = fetch_payloads(plan, fetch)
        # Agreed on before anything collective: a rank without its payloads would leave the others waiting in it.
        if lost := tuple(sorted({rollout for each in ranks.everyones(lost) for rollout in each})):
            return StepOutcome({}, lost=lost)
        last = len(plan.micro_batches) - 1
        seen = []
        for index in range(len(plan.micro_batches)):
            self._engine.set_gradient_accumulation_boundary(index == last)
            loss = self._backward(plan, index, payloads)
            seen.append((loss.metrics, f"rank {self._rank}: {loss.problem}" if loss.problem else None))
        lr = self._engine.get_lr()[0]
        grad_norm = self._optimizer_step()
        totals: Counter[str] = Counter()  # which, unlike a dict, adds up what it is updated with
        problems: list[str] = []
        for sums, problem in itertools.chain.from_iterable(ranks.everyones(seen)):
            totals.update(sums)
            problems += [problem] if problem else []
        metrics = finish(totals)
        metrics |= {"grad_norm": grad_norm, "lr": lr, "trained_tokens": float(plan.denominators.tokens)}
        logs.at(step=plan.step + 1, version=plan.step + 1)
        _log.info("trained %d tokens, gradient norm %.3g", plan.denominators.tokens, grad_norm)
        if math.isfinite(grad_norm):
            return StepOutcome(metrics)
        if not problems:
            problems = [
                f"the gradient norm is {grad_norm} although the loss is finite; lower learner.lr, or train in float32"
            ]
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        return StepOutcome(metrics | {"loss": math.nan}, "; ".join(problems[:4]) + more)

    def manifest(self, version: int) -> WeightManifest:
        """What ``send_weights`` will send."""
        manifest = manifest_of(self._sent(), version)
        if self._adapters is None:
            return manifest
        return dataclasses.replace(manifest, base=self._base, scale=self._adapters.lora.scale)

    @spans.spanned("connect")
    def open_transport(self, group: TransferGroup) -> None:
        """Rank 0 forms the weight-transfer group; the other ranks take no part in it and return at once."""
        if self._rank == 0:
            self._transfer.connect(group)

    @spans.spanned("broadcast")
    def send_weights(self, manifest: WeightManifest, group: TransferGroup | None = None) -> None:
        """Broadcasts the weights from rank 0. Collective under ZeRO-3; elsewhere the other ranks return at once.

        With a ``group``, in that one, which is formed for this broadcast and closed after it; the group of
        ``open_transport`` stays as it is. Raises WeightSyncError when a member does not answer in time; the learner
        goes on, and may open another group.
        """
        weights = self._whole_weights()
        transfer = self._transfer if group is None else WeightTransfer()
        try:
            if self._rank == 0:
                if group is not None:
                    transfer.connect(group)
                transfer.send(manifest, weights)
        finally:
            if group is not None:
                transfer.close()
            if self._zero_stage == 3:
                for _ in weights:  # every rank gathers every parameter, also after a failure of rank 0
                    pass

    @spans.spanned("snapshot")
    def snapshot(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The state between two steps: what all ranks agree on, for JSON, and this rank's share of the arrays.

        Collective. The arrays of all ranks together are the whole state (see opd_ray.learn.state), also before the
        first step and after one that was not taken.
        """
        return self._state.facts(), self._state.arrays()

    @spans.spanned("restore")
    def restore(self, facts: Mapping[str, Any], parts: Sequence[Any]) -> None:
        """Continues from a ``snapshot`` of any number of ranks at any ZeRO stage; after ``begin`` or in mid-run.

        ``parts`` are refs of all ranks' arrays, of which one at a time is held.
        The random generators go on where the number of ranks is the same, and else begin anew for the configured
        seed and the rank. Raises RunError when the state is not this model's or not whole.
        """
        self._state.restore(facts, (item for part in parts for item in ray.get(part).items()))

    @spans.spanned("export")
    def export(self) -> tuple[int, dict[str, np.ndarray]]:
        """A Hugging Face checkpoint in the student's original dtype: its size in bytes, and each file as uint8.

        Collective under ZeRO-3; all but rank 0 return (0, {}). See :func:`~opd_ray.learn.export.write_trained`.
        """
        state, original = {}, self._model.config.dtype
        for name, weight in self._whole_weights():
            if self._rank == 0:
                state[name] = weight.detach().to("cpu", weight.dtype if self._adapters else original, copy=True)
        if self._rank != 0:
            return 0, {}
        with tempfile.TemporaryDirectory() as directory:
            root, source = Path(directory), self._student_path
            lora = self._adapters.lora if self._adapters else None
            write_trained(root, self._model, state, source, self._stop_token_ids, base=self._base, lora=lora)
            found = sorted(path for path in root.rglob("*") if path.is_file())
            files = {path.relative_to(root).as_posix(): np.fromfile(path, dtype=np.uint8) for path in found}
        return sum(map(len, files.values())), files

    def _adapt(self, lora: LoraConfig | None) -> Adapters | None:
        """Freezes the student and puts adapters on it, where the configuration has these trained in its place."""
        if lora is None:
            return None
        return Adapters(self._model, adapted_layers(f"student.path={self._base}", self._student_path, lora), lora)

    def _sent(self) -> list[tuple[str, torch.nn.Parameter]]:
        """What a broadcast sends, by name."""
        return self._adapters.weights() if self._adapters else weights_of(self._model)

    def _engine_config(self) -> dict[str, Any]:
        """DeepSpeed's configuration; buckets no larger than the model, as it allocates them whole."""
        learner = self._config.learner
        bucket = min(self._num_trained, 200_000_000)
        bfloat16 = learner.dtype == "bfloat16"
        return {
            "train_micro_batch_size_per_gpu": 1,  # not used: boundaries and denominators are ours
            "gradient_accumulation_steps": 1,
            # Without ZeRO, DeepSpeed steps the plain optimizer and reports no gradient norm: we clip ourselves.
            "gradient_clipping": learner.gradient_clip if self._zero_stage else 0.0,
            "steps_per_print": 2**31,
            "bf16": {"enabled": bfloat16},
            **({"data_types": {"grad_accum_dtype": "fp32"}} if bfloat16 else {}),
            "zero_optimization": {
                "stage": self._zero_stage,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                "stage3_prefetch_bucket_size": min(self._num_parameters, 50_000_000),
                # DeepSpeed keeps parameters below this size whole; its 100 000 would keep a small model whole.
                "stage3_param_persistence_threshold": min(100_000, self._num_parameters // 1000),
            },
        }

    def _backward(self, plan: StepPlan, index: int, payloads: Payloads) -> MicroBatchLoss:
        """Accumulates the gradient of one micro-batch."""
        batch = collate(
            plan.micro_batches[index],
            payloads,
            packing=self._config.learner.packing,
            loops=self._config.told_loops,
        ).to(self._device)
        if self._reference is not None:
            batch = self._reference.beside(batch)
        try:
            loss = self._objective.of(batch, plan.denominators, plan.coefficients)
        except RunError as error:
            raise RunError(f"learner rank {self._rank}, step {plan.step}: {error}") from None
        self._module.consume(loss)
        value = self._engine(batch.input_ids, batch.position_ids, batch.logit_index)
        # DeepSpeed averages gradients over ranks, but the loss is already divided by global counts.
        self._engine.backward(value * self._num_ranks, scale_wrt_gas=False)
        return loss

    def _optimizer_step(self) -> float:
        """Clips, steps optimizer and schedule; the global gradient norm before clipping.

        A norm that is not finite means that nothing was stepped and the gradients are gone, on every rank.
        """
        if self._zero_stage > 0:
            self._engine.step()
            # ZeRO skips a step whose gradient is not finite, and keeps the norm of the step before.
            return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.inf
        for parameter in self._module.parameters():
            if parameter.requires_grad and parameter.grad is None:  # what no pass reads has a state, too
                parameter.grad = torch.zeros_like(parameter)
        clip = self._config.learner.gradient_clip
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), clip))
        if math.isfinite(grad_norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
        return grad_norm

    def _end(self) -> None:
        """Frees what the last run held."""
        if self._engine is None:
            return
        self._engine.destroy()
        self._engine = self._module = self._model = self._objective = self._state = None
        self._adapters = self._reference = None
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()

    def _whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return whole_weights(self._sent(), self._device, split=self._zero_stage == 3)


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet, and told not to compile its shared-memory extension (a minute at first use)."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its ZeRO-3 collectives go by names that torch 2.13 deprecates, and each call says so again.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    return deepspeed
