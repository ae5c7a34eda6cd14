"""The student as one rank loads it: in the learner's precision, and under ZeRO-3 split over the ranks from the first
byte on."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from opd_ray.config import LearnerConfig
from opd_ray.learn.microbatch import disable_dropout
from opd_ray.models.attention import implementation
from opd_ray.models.checkpoints import load_causal_lm

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt (malloc.h)."""


def load_student(path: Path, learner: LearnerConfig, zero_stage: int, device: torch.device) -> torch.nn.Module:
    """The model in ``path``, ready to be trained on ``device``; its ``config.dtype`` is still that of the checkpoint.

    Collective under ZeRO-3, where no rank ever holds more of it than its own part, and of one parameter a few copies.
    """
    dtype = getattr(torch, learner.dtype)
    with _split_while_loading(dtype) if zero_stage == 3 else contextlib.nullcontext():
        model = load_causal_lm(path, dtype="auto", attn_implementation=implementation(learner, device))
    if zero_stage == 3:
        _restore_buffers(model)
    # Not model.to(dtype), which would also cast rotary frequencies and so blur long positions.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    model = model.to(device).train()
    disable_dropout(model)
    if learner.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@contextlib.contextmanager
def _split_while_loading(dtype: torch.dtype) -> Iterator[None]:
    """Within it transformers makes each parameter under DeepSpeed's zero.Init, in ``dtype``, whatever the checkpoint
    is in: the ranks keep a part each and forget the rest."""
    from transformers.integrations import HfDeepSpeedConfig

    config = HfDeepSpeedConfig(
        {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {"stage": 3},
        }
    )
    try:
        with _freed_at_once():
            yield
    finally:
        del config  # transformers looks whether it is alive; other models of this process are whole
    gc.collect()  # a tied output layer was made, too, before it was tied


def _restore_buffers(model: Any) -> None:
    """zero.Init makes buffers in the precision of the parameters, too, and rotary frequencies in bfloat16 blur long
    positions. Those that are not in the checkpoint get their own precision back, and are computed anew."""
    with torch.device("meta"):
        skeleton = type(model)._from_config(model.config, dtype=model.config.dtype)
    for module, plain in zip(model.modules(), skeleton.modules(), strict=True):
        changed = [
            name
            for name in module._non_persistent_buffers_set
            if module._buffers[name] is not None and module._buffers[name].dtype != plain._buffers[name].dtype
        ]
        for name in changed:
            module._buffers[name] = module._buffers[name].to(plain._buffers[name].dtype)
        if changed:
            model._init_weights(module)


@contextlib.contextmanager
def _freed_at_once() -> Iterator[None]:
    """Within it glibc gives memory that is freed back to the system. Left alone it keeps the place of every parameter
    in its heap, where the next one does not fit: 2.2 GB for a rank's half of a model of 1.5 GB."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # not glibc
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        # As far as glibc raises both by itself in a process that allocates much.
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


@contextlib.contextmanager
def gathering_in_passing(model: torch.nn.Module) -> Iterator[None]:
    """Within it a model whose parameters are split can be called, by all ranks together: each module gathers its own
    for its forward pass. DeepSpeed's engine does so later."""
    import deepspeed  # whose zero is no module that could be imported from

    gathered: dict[torch.nn.Module, Any] = {}

    def before(module: torch.nn.Module, _inputs: Any) -> None:
        gathered[module] = deepspeed.zero.GatheredParameters(module.parameters(recurse=False))
        gathered[module].__enter__()

    def after(module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        gathered.pop(module).__exit__(None, None, None)

    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            if any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False)):
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(after).remove)
        yield
