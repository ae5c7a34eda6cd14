"""A plan in words: one or two lines for preflight, tables for ``opd-ray plan``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from opd_ray.messages import MemoryUse
from opd_ray.plan.cost import Cost
from opd_ray.plan.fit import gigabytes, gpus, host_bytes
from opd_ray.plan.memory import Process
from opd_ray.plan.outlook import Outlook
from opd_ray.plan.rates import Split

if TYPE_CHECKING:
    from opd_ray.plan.probe import Probe


def short(outlook: Outlook) -> str:
    """What a run takes, in one line for each of memory and bytes on the way."""
    rooms = ", ".join(
        f"{each.room} {f'{each.number} x ' if each.number > 1 else ''}{gigabytes(each.bytes)}"
        for each in outlook.processes
        if each.room != "record"
    )
    where = "on GPUs" if any(each.gpus for each in outlook.processes) else "of memory"
    payload, held = sum(outlook.payload_bytes.values()), sum(outlook.store_bytes.values())
    epoch = f", {outlook.steps_per_epoch:,.0f} steps an epoch" if outlook.steps_per_epoch else ""
    return (
        f"plan: {rooms} {where}; object store {gigabytes(held)}\n"
        f"plan: at most {outlook.step.trained_tokens:,.0f} response tokens a step{epoch}; a step sends "
        f"{gigabytes(payload)} of payloads and {gigabytes(outlook.broadcast_bytes)} of weights"
    )


def flow(console: Console, outlook: Outlook) -> None:
    """Tokens of a step and an epoch, and bytes on the way."""
    step = outlook.step
    rollouts = " + ".join(f"{number} {source}" for source, number in step.rollouts.items())
    lines = [
        f"a step: {rollouts} rollouts of at most {step.prompt_tokens:.0f} + {step.response_tokens:.0f} tokens, "
        f"{step.trained_tokens:,.0f} response tokens"
    ]
    if horizon := outlook.horizon:
        lines.append(
            f"the horizon: rollouts end after at most {horizon.tokens:,} tokens, those of {horizon.probes:,} probed "
            f"prompts at the budget; the student samples at most {horizon.sampled_tokens:,} tokens a step"
        )
    if outlook.steps_per_epoch:
        tokens = outlook.steps_per_epoch * step.student_tokens
        epochs = outlook.num_steps / outlook.steps_per_epoch
        lines.append(
            f"an epoch: {outlook.num_prompts:,} prompts, {outlook.steps_per_epoch:,.1f} steps, at most {tokens:,.0f} "
            f"student tokens; the run's {outlook.num_steps:,} steps are {epochs:,.2f} epochs"
        )
    payload = ", ".join(f"{name} {gigabytes(number)}" for name, number in outlook.payload_bytes.items())
    lines.append(f"through the object store, a step: {gigabytes(sum(outlook.payload_bytes.values()))} ({payload})")
    lines.append(
        f"in the broadcast, a step: {gigabytes(outlook.broadcast_bytes)} to each of {outlook.num_receivers} processes"
    )
    for line in lines:
        console.print(line, highlight=False, markup=False)


def memory(console: Console, outlook: Outlook, seen: Mapping[str, tuple[Process, MemoryUse]]) -> None:
    """Every room's processes, by part; beside them what is planned for the lengths that a probe saw, and what its
    processes have needed, both by room."""
    table = Table("room", "processes", "each, at most", "of which", title="memory", title_justify="left")
    if seen:
        table.add_column("at the lengths seen, and measured")
    for each in outlook.processes:
        size = gigabytes(each.bytes) + (f" (+ {gigabytes(each.host_bytes)} of its node)" if each.gpus else "")
        if each.takes_share is not None:
            size += f", takes {each.takes_share:.2f} of the GPU"
        row = [each.room, str(each.number), size, _parts(each)]
        table.add_row(*row, *([_measured(*seen[each.room]) if each.room in seen else "-"] if seen else []))
    console.print(table)
    held = ", ".join(f"{name} {gigabytes(number)}" for name, number in outlook.store_bytes.items())
    console.print(f"held in the object store: {held}", highlight=False, markup=False)


def _parts(process: Process) -> str:
    parts = sorted(process.parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {gigabytes(number)}" for name, number in parts if number >= 0.01 * process.bytes)


def _measured(planned: Process, use: MemoryUse) -> str:
    got = use.gpu_bytes if planned.gpus else use.host_bytes
    if got is None:
        return "-"
    if planned.takes_share is not None:
        return gigabytes(got)
    return f"{gigabytes(planned.bytes)}, {gigabytes(got)} ({planned.bytes / got - 1:+.0%})"


def places(
    console: Console, processes: Sequence[Process], memory_bytes: float, store_bytes: float, cards: Sequence[float]
) -> None:
    """Processes on GPUs and nodes, against what these have."""
    for number, gpu in enumerate(gpus(processes), start=1):
        has = cards[number - 1] if number <= len(cards) else None
        rooms = " + ".join(each.room for each in gpu.rooms)
        of = f" of {gigabytes(has)}" if has and math.isfinite(has) else ""
        console.print(f"GPU {number}: {rooms}, {gigabytes(gpu.bytes(has))}{of}", highlight=False, markup=False)
    console.print(
        f"memory of the nodes: {gigabytes(host_bytes(processes))} of {gigabytes(memory_bytes)}, and "
        f"{gigabytes(store_bytes)} for the object store",
        highlight=False,
        markup=False,
    )


def rates(console: Console, probe: Probe, cost: Cost, split: Split | None, money: tuple[float, str] | None) -> None:
    """What the probe measured, and what follows from it for the run; ``money``: price of an hour, and for what."""
    table = Table("room", "workers", "tokens/s of its own work, each", "idle share")
    table.title, table.title_justify = f"measured over {probe.num_steps} steps", "left"
    for room in probe.rooms:
        idle = f"{room.idle_share(probe.step_s):.2f}"
        table.add_row(room.room, str(room.workers), f"{room.tokens_per_s:,.0f}" if room.tokens else "-", idle)
    console.print(table)
    step = probe.step
    lines = [
        f"predicted: {step.student_tokens / probe.step_s:,.0f} student tokens trained per second "
        f"({step.trained_tokens / probe.step_s:,.0f} of all sources), {probe.step_s:,.2f} s a step of rollouts of "
        f"{step.response_tokens:,.0f} tokens",
        f"predicted: {_hours(cost.hours)} in all: start {_hours(cost.start_s / 3600)}, steps "
        f"{_hours(cost.steps_s / 3600)}, evaluations {_hours(cost.evaluations_s / 3600)}",
    ]
    if money:
        price, what = money
        lines.append(f"predicted: {cost.hours * price:,.2f} in money ({what})")
    if split:
        workers = ", ".join(f"{room} {number}" for room, number in split.workers.items())
        lines.append(f"a better split: {workers} would take {split.step_s:,.2f} s a step")
    else:
        lines.append("no other split of these resources would save a twentieth of a step")
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:,.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"
