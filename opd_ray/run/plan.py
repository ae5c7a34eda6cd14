"""``opd-ray plan``: what a run will take, against what there is for it, before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import psutil
import ray
from rich.console import Console

from opd_ray.config import Config
from opd_ray.embedded.resolve import resolve
from opd_ray.models import hub
from opd_ray.placement.nodes import Card, Node, cards, nodes, on_each, this_machine
from opd_ray.placement.session import cluster
from opd_ray.plan import fit, show
from opd_ray.plan.cost import Cost, cost
from opd_ray.plan.outlook import Outlook, outlook, processes_at
from opd_ray.plan.probe import Probe, probe
from opd_ray.plan.rates import Split, propose
from opd_ray.plan.snapshots import with_room
from opd_ray.run import preflight

_LOOK_S = 60.0
"""Within which every node says which GPUs it has."""


def plan(config: Config, *, measure: bool, price: float | None) -> bool:
    """Prints the plan; False where it does not fit. ``measure`` runs a probe, on a Ray of its own where RAY_ADDRESS
    names no cluster; without, and without a cluster, no Ray is started, and this machine is what there is."""
    asked, config = config, resolve(config)
    facts = preflight.check_files(config)
    asked, config = (hub.pinned(each, facts.commits) for each in (asked, config))
    console = Console(soft_wrap=True)
    if measure or ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        with cluster():
            there = nodes()
            gpus = _cards_of(there)
            seen = probe(asked) if measure else None
    else:
        there, gpus, seen = [this_machine()], cards(), None
    config, said = with_room(config, facts, there)
    ahead = outlook(config, facts)
    if said:
        console.print(said, highlight=False, markup=False)
    show.flow(console, ahead)
    planned = {each.room: each for each in processes_at(config, facts, seen.largest)} if seen else {}
    show.memory(console, ahead, {room: (planned[room], use) for room, use in seen.memory.items()} if seen else {})
    memory, store = sum(node.memory_bytes for node in there), sum(node.store_bytes for node in there)
    card_bytes = sorted((card.memory_bytes for card in gpus), reverse=True)
    show.places(console, ahead.processes, memory, store, card_bytes)
    if seen:
        problems = {name: len(each) for name, each in facts.data.problems.items()}
        show.rates(
            console,
            seen,
            _cost(config, problems, seen),
            _better(config, seen, there, ahead),
            _money(ahead, there, price),
        )
    return _verdict(console, ahead, memory, store, card_bytes)


def _cards_of(there: Sequence[Node]) -> list[Card]:
    """The GPUs of all nodes; a node that does not say which it has is left out."""
    answers = on_each([node for node in there if node.gpus], cards, deadline_s=_LOOK_S)
    return [card for answer in answers if isinstance(answer, list) for card in answer]


def _cost(config: Config, problems: Mapping[str, int], seen: Probe) -> Cost:
    generators = next(room for room in seen.rooms if room.room == "generate")
    length = seen.step.response_tokens
    return cost(config, problems, generators, start_s=seen.start_s, step_s=seen.step_s, response_tokens=length)


def _better(config: Config, seen: Probe, there: Sequence[Node], ahead: Outlook) -> Split | None:
    def fits(workers: Mapping[str, int]) -> bool:
        needed = [replace(each, number=workers.get(each.room, each.number)) for each in ahead.processes]
        return fit.host_bytes(needed) <= sum(node.memory_bytes for node in there)

    return propose(
        seen.rooms,
        seen.step_s,
        synchronous=config.buffer.max_staleness == 0,
        cores=max(sum(node.cpus for node in there), 1.0) if len(there) > 1 else float(psutil.cpu_count() or 1),
        cpus=sum(node.cpus for node in there),
        gpus=sum(node.gpus for node in there),
        fits=fits,
    )


def _money(ahead: Outlook, there: Sequence[Node], price: float | None) -> tuple[float, str] | None:
    """The price of an hour of what the run holds: its GPUs, or the nodes where it asks for none."""
    if price is None:
        return None
    if number := len(fit.gpus(ahead.processes)):
        return price * number, f"{number} GPUs at {price:g} an hour"
    return price * len(there), f"{len(there)} nodes without GPUs at {price:g} an hour"


def _verdict(console: Console, ahead: Outlook, memory: float, store: float, card_bytes: list[float]) -> bool:
    found = fit.problems(
        ahead.processes, ahead.store_bytes, memory_bytes=memory, store_bytes=store, card_bytes=card_bytes
    )
    if fit.gpus(ahead.processes) and not card_bytes:
        console.print("no GPU is here to compare with: what each has to hold stands above", highlight=False)
    for problem in found:
        console.print(f"does not fit: {problem}", highlight=False, markup=False)
    if not found:
        console.print("it fits", highlight=False)
    return not found
