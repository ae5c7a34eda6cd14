"""The configuration's sections about training: the learner, and how its weights travel."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from opd_ray.config.binding import ROOMS, RUN
from opd_ray.config.devices import may_share_a_device, settle_dtype
from opd_ray.config.method import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LearnerConfig:
    """The trainer: a group of DeepSpeed ranks."""

    num_ranks: Annotated[int, ROOMS] = Field(1, ge=1)
    """Data-parallel ranks, one actor each."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: 1 shards the optimizer, 2 gradients, 3 parameters as well; 0 with bfloat16 runs as 1."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], RUN] = "auto"
    """Precision of forward and backward: auto is bfloat16 on GPUs and float32 on CPUs; the optimizer keeps float32
    master weights."""
    steps: int = Field(150, ge=1)
    """Optimizer steps."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; linear and cosine end at 0."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest global gradient norm."""
    micro_batch_tokens: int = Field(4096, gt=0)
    """Tokens of one forward and backward pass per rank (padded, unless packing); more are accumulated."""
    logits_mb: int = Field(512, ge=1)
    """Float32 logits of one model that are held at once, MiB; larger micro-batches pass the output layer in chunks."""
    packing: bool = True
    """Concatenate rollouts into one row, in which each attends to itself alone; false pads them, for an architecture
    that lets them see each other."""
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    """PyTorch's attention, or flash-attn's (bfloat16 on GPUs); auto takes flash-attn's where it is installed."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    cpus_per_rank: Annotated[float, ROOMS] = Field(0.5, ge=0)
    """Ray CPUs each rank reserves."""
    gpus_per_rank: Annotated[float, ROOMS] = Field(0.0, ge=0)
    """Ray GPUs each rank reserves; 0 trains on the CPU."""
    placement: Annotated[Literal["pack", "strict_pack", "spread"], ROOMS] = "pack"
    """Ranks on as few nodes as possible, on one node or not at all, or on as many as possible."""
    node_resource: Annotated[str | None, ROOMS] = None
    """Custom Ray resource of the nodes that may host ranks; by default any node."""

    def __post_init__(self) -> None:
        settle_dtype(self, self.gpus_per_rank)
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is longer than the run, which has steps={self.steps}: the learning "
                "rate would not reach lr; lower it, or raise steps"
            )
        if self.attention == "flash" and not (self.gpus_per_rank and self.dtype == "bfloat16"):
            raise ValueError("attention=flash needs gpus_per_rank > 0 and dtype=bfloat16; auto takes it where it can")
        if may_share_a_device([(self.num_ranks, self.gpus_per_rank)]):
            raise ValueError(
                f"gpus_per_rank={self.gpus_per_rank:g} may put two of {self.num_ranks} ranks on one GPU, which NCCL "
                "refuses: give each rank a whole one, or train with num_ranks=1"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WeightsConfig:
    """The broadcast from the learner to the generators."""

    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Transport; auto takes nccl where generators and learner have GPUs and no two members may share one, else gloo."""
    timeout_s: float = Field(120.0, gt=0)
    """How long one bucket (64 MiB, or one larger parameter) of a broadcast may take; the broadcast as a whole may take
    twice that, and a worker that gave no answer by then is dropped."""
