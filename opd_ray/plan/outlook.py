"""Everything that is known of a run before it starts: put together from its configuration and what preflight found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd_ray.config import Config
from opd_ray.messages import MemoryUse
from opd_ray.plan import flow, memory
from opd_ray.plan.flow import Horizon, Step
from opd_ray.plan.memory import Process

if TYPE_CHECKING:
    from opd_ray.run.preflight import Preflight


@dataclass(frozen=True)
class Outlook:
    """At the largest that any step of the run can be."""

    step: Step
    horizon: Horizon | None
    """None where every rollout may have its budget."""
    processes: tuple[Process, ...]
    payload_bytes: Mapping[str, float]
    """Of one step, through the object store: "rollouts", and each scorer's answers by its role."""
    store_bytes: Mapping[str, float]
    """Held in the object store at one time."""
    broadcast_bytes: int
    """To each receiver, a step."""
    num_receivers: int
    num_steps: int
    num_prompts: int
    steps_per_epoch: float | None
    """None where a run trains on golden rollouts alone."""


def outlook(config: Config, facts: Preflight) -> Outlook:
    """That of a run whose files were checked."""
    step = flow.largest_step(config, facts.max_prompt_tokens)
    return Outlook(
        step=step,
        horizon=flow.horizon(config),
        processes=tuple(processes_at(config, facts, step)),
        payload_bytes=flow.store_bytes(config, step, facts.sizes, facts.eos_token_ids),
        store_bytes=memory.object_store(config, facts.sizes, step, facts.eos_token_ids),
        broadcast_bytes=flow.broadcast_bytes(config, facts.sizes["student"]),
        num_receivers=flow.num_receivers(config),
        num_steps=config.learner.steps,
        num_prompts=facts.num_prompts,
        steps_per_epoch=flow.steps_per_epoch(config, facts.num_prompts),
    )


def processes_at(config: Config, facts: Preflight, step: Step) -> list[Process]:
    """What the processes need for steps like this one."""
    return memory.processes(config, facts.sizes, step, facts.max_context_tokens)


def predicted_memory(processes: Iterable[Process]) -> dict[str, dict[str, float]]:
    """Room to the most that one of its processes is expected to need, for summary.json. What a vLLM engine takes of a
    GPU is a share of the card."""
    found: dict[str, dict[str, float]] = {}
    for process in processes:
        found[process.room] = {"host_bytes": process.host_bytes}
        if process.takes_share is not None:
            found[process.room]["share_of_gpu"] = process.takes_share
        elif process.gpus:
            found[process.room]["gpu_bytes"] = process.bytes
    return found


def measured_memory(uses: Mapping[str, MemoryUse]) -> dict[str, dict[str, float]]:
    """Room to what one of its processes has needed, for summary.json."""
    return {
        room: {"host_bytes": use.host_bytes} | ({} if use.gpu_bytes is None else {"gpu_bytes": use.gpu_bytes})
        for room, use in uses.items()
    }
