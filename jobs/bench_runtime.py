"""The runtime's own limit: the real loop over a real Ray, in rooms whose engines only take their time.

    python jobs/bench_runtime.py [bookkeeping] [generators] [staleness] [--generators 8,64,256] [--per-call 8,32,1]
                                 [--staleness 0,2] [--rate N] [--steps N] [--json FILE]

Pipeline, pools, slots, buffer, plan and broadcast are the real ones, and so is every call, reference and payload; only
the models are missing (waiting_rooms.py). A generator runs eight responses at once, 20 ms a token, of log-normal
lengths (median 1,500 tokens, σ .8, cut at 8,192): 41 s in the mean, 164 s at the longest. A step has 32 of them for
each generator, so that eight generators make the 64 prompts × 4 of the paper's step, and a golden one a prompt; in
calls of 8 rollouts a generator has four calls a step, as the one of the paper's recipes has. Learner ranks take half of
the time that generators take, scorers a tenth, a broadcast 2 s.

These are seconds of devices. A run lets them pass up to 50 times as fast, but no faster than brings --rate rollouts a
second; what Ray and the driver do takes the time that it takes, and weighs so many times as much as beside devices.

bookkeeping   rollouts a second through slots, buffer, mixture and plan, without Ray
generators    the loop by the number of generators and by rollouts a call: the driver's CPU time (of all its threads,
              Ray's included, and of the event loop's alone) and Ray calls for each student rollout; the share of the
              ideal, which is the pace of the slowest room alone with all its workers always at work (what a few steps
              tell to within some hundredths)
staleness     the same with eight generators by buffer.max_staleness; 0 is synchronous
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
import ray
from rich.console import Console
from rich.table import Table
from waiting_rooms import (
    AT_ONCE,
    BROADCAST_S,
    MOST_TOKENS,
    NUM_RANKS,
    PROMPT_TOKENS,
    SCORED_PER_S,
    TOKEN_S,
    TRAINED_PER_S,
    House,
    Seat,
    length,
    meta_of,
    rollouts,
)

from opd_ray.buffer.mixture import NO_STRENGTH, Mixture
from opd_ray.buffer.plan import plan_step
from opd_ray.buffer.replay import GoldenSet, ReplayBuffer
from opd_ray.buffer.slots import Slots
from opd_ray.config import Config, from_dict
from opd_ray.config.help import OutputFile
from opd_ray.data.orders import Shuffled
from opd_ray.data.prompts import Prompts, PromptStream
from opd_ray.messages import Entry, RolloutMeta, WeightManifest
from opd_ray.pipeline import Pipeline
from opd_ray.placement.session import cluster
from opd_ray.rooms import Rooms
from opd_ray.status.state import Whereabouts
from opd_ray.watch.guard import Guard
from opd_ray.watch.observers import StepReport
from opd_ray.weights.delivery import Delivery

PARTS = ("bookkeeping", "generators", "staleness")
PER_STEP = 32
"""Responses that a step has of each generator."""
GENERATORS_PER_SCORER = 8
ON_PAPER = 10_000
"""Generators that no loop here has."""
_FASTEST = 50
_NUM_GOLDEN = 100


class _Tokens:
    """Renders every prompt as the same tokens."""

    def prompt(self, row: Any, solution: str | None = None) -> list[int]:
        return list(range(PROMPT_TOKENS))


def configured(generators: int, per_call: int, steps: int, max_staleness: int = 2) -> Config:
    """As jobs and recipes have it, but for a model; ``per_call``: rollouts a call, one a prompt where that is one."""
    responses = min(4, per_call)
    return from_dict(
        {
            "student": {"path": "none"},
            "teacher": {"path": "none", "num_actors": max(1, generators // GENERATORS_PER_SCORER)},
            "reference": {"num_actors": max(1, generators // GENERATORS_PER_SCORER)},
            "data": {"prompts": "none.jsonl", "golden": "none.jsonl"},
            "rollout": {
                "num_generators": generators,
                "responses_per_prompt": responses,
                "prompts_per_call": per_call // responses,
                "max_num_seqs": AT_ONCE,
                "max_response_tokens": MOST_TOKENS,
            },
            "buffer": {
                "prompts_per_step": generators * PER_STEP // responses,
                "golden_per_prompt": responses / 4,
                "max_staleness": max_staleness,
            },
            "loss": {
                "student": {"divergence": "k1"},
                "reference": {"estimator": "k3"},
            },
            "learner": {
                "steps": steps,
                "num_ranks": NUM_RANKS,
                "micro_batch_tokens": 16_384,
                "packing": True,
            },
            "evaluation": {"num_problems": 0, "every_steps": 0},
            "guard": {"level": "warn"},
        }
    )


def pipeline(config: Config, rooms: Rooms) -> Pipeline:
    """The real one; its rooms are up, and have weights."""
    metas = [_golden(number) for number in range(_NUM_GOLDEN)]
    payload = ray.put(rollouts(metas))
    golden = [Entry(meta, row, payload) for row, meta in enumerate(metas)]
    delivery = Delivery(config, rooms, lambda *_, **__: None)
    delivery.manifest = WeightManifest(0, ("w",), ("float32",), ((1,),))
    return Pipeline(
        config=config,
        rooms=rooms,
        buffer=ReplayBuffer(config.buffer.prompts_per_step, GoldenSet(golden, Shuffled(_NUM_GOLDEN, 0))),
        prompts=prompts(config),
        problems={},
        stop_token_ids=(0,),
        delivery=delivery,
        guard=Guard(
            config.guard,
            has_golden=True,
            has_reference=True,
            configured=config.least_strength,
            rollouts_per_step=config.rollout.num_generators * PER_STEP,
        ),
        first_step=0,
        restored={},
        where=Whereabouts(),
        say=lambda *_, **__: None,
    )


def prompts(config: Config) -> PromptStream:
    rows = [{"id": str(number), "prompt": "", "answer": ""} for number in range(10_000)]
    renderer: Any = _Tokens()
    order, responses = Shuffled(len(rows), config.seed), config.rollout.responses_per_prompt
    return PromptStream(Prompts("none", rows, renderer), order=order, num_responses=responses, seed=config.seed)


def _golden(number: int) -> RolloutMeta:
    return meta_of(f"golden-{number}", -1, "", "golden", length(number), -1)


# ---- the three parts ----


def bookkeeping(generators: int, steps: int) -> dict[str, Any]:
    """Steps as large as so many generators make them."""
    config = configured(generators, 32, steps)
    per_step, stream, mixture = config.buffer.prompts_per_step, prompts(config), Mixture(config)
    golden = [Entry(_golden(number), number, None) for number in range(_NUM_GOLDEN)]
    buffer = ReplayBuffer(per_step, GoldenSet(golden, Shuffled(_NUM_GOLDEN, 0)))
    slots = Slots(config.buffer.num_slots)

    async def step(number: int) -> int:
        for _ in range(per_step // config.rollout.prompts_per_call):
            taken = await slots.take(config.rollout.prompts_per_call)
            groups = [stream[slot] for slot in taken]
            owners = [(group, index) for group in groups for index in range(group.num_responses)]
            metas = [
                meta_of(f"{group.slot}-{index}", group.slot, group.prompt_id, "student", lengths[group.slot % 997], 0)
                for group, index in owners
            ]
            await buffer.add(taken, [Entry(meta, row, None) for row, meta in enumerate(metas)])
        entries = await buffer.take(number)
        entries += buffer.golden.take(mixture.at(number).num_golden, [])
        plan_step(
            entries,
            step=number,
            coefficients=mixture.coefficients(number),
            num_ranks=config.learner.num_ranks,
            micro_batch_tokens=config.learner.micro_batch_tokens,
            packing=True,
        )
        mixture.composition(number, entries, NO_STRENGTH)
        slots.free(buffer.slots_of(number))
        return per_step * config.rollout.responses_per_prompt

    async def all_steps() -> float:
        began = time.process_time()
        done = [await step(number) for number in range(steps)]
        return sum(done) / (time.process_time() - began)

    lengths = [length(number) for number in range(997)]
    return {"rollouts_per_step": generators * PER_STEP, "rollouts_per_s": asyncio.run(all_steps())}


class Enough(Exception):
    """All steps that are measured were done."""


@dataclasses.dataclass
class Watch:
    """An observer: what was needed from one step to the end of another."""

    warmup: int
    steps: int
    marks: list[tuple[float, float, float, int]] = dataclasses.field(default_factory=list)
    """Time, CPU time of the process and of this thread, and calls of Ray, after each step."""
    work: Counter[str] = dataclasses.field(default_factory=Counter)
    """Rollouts that these steps trained on, and tokens that each room was given of them."""
    times: Counter[str] = dataclasses.field(default_factory=Counter)
    """Seconds of these steps that the learner waited for rollouts, trained and sent weights."""
    staleness: float = 0.0

    async def on_step(self, report: StepReport) -> None:
        self.marks.append((time.monotonic(), time.process_time(), time.thread_time(), sum(Seat.calls.values())))
        if report.step > self.warmup:
            students = [entry.meta for entry in report.entries if entry.meta.source == "student"]
            self.work["rollouts"] += len(students)
            self.work["generate"] += sum(meta.num_response_tokens for meta in students)
            self.work["score"] += sum(meta.num_tokens for meta in students)
            self.work["learn"] += sum(entry.meta.num_tokens for entry in report.entries)
            for phase in ("wait", "train", "weight_sync"):
                self.times[phase] += report.metrics[f"learner/{phase}_s"]
        self.staleness = max(self.staleness, report.metrics["staleness/max"])
        if report.step == self.warmup + self.steps:
            raise Enough


def loop(generators: int, per_call: int, steps: int, rate: float, max_staleness: int = 2) -> dict[str, Any]:
    """Runs the loop and measures ``steps`` of it; ``rate``: rollouts a second that the devices may bring at most."""
    warmup = max_staleness + 2  # those that were admitted at once come at once
    config = configured(generators, per_call, warmup + steps + max_staleness + 1, max_staleness)
    second_s = max(1 / _FASTEST, generators * AT_ONCE / (_mean_length() * TOKEN_S) / rate)
    house, watch = House(config, second_s), Watch(warmup, steps)

    async def run() -> None:
        limit = config.deadlines.start_s
        await asyncio.gather(*(room.up(limit) for room in house.rooms.every))
        whole = pipeline(config, house.rooms)
        await whole.broadcast(0)
        with contextlib.suppress(Enough):
            await whole.run([watch])

    try:
        asyncio.run(run())
    finally:
        house.close()
    assert watch.staleness <= max_staleness
    wall, cpu, thread, calls = (
        after - before for before, after in zip(watch.marks[warmup - 1], watch.marks[-1], strict=True)
    )
    slowest, alone_s = max(_alone(config, watch.work, steps).items(), key=lambda each: each[1])
    number = watch.work["rollouts"]
    return {
        "generators": generators,
        "rollouts_per_call": per_call,
        "max_staleness": max_staleness,
        "times_as_fast": 1 / second_s,
        "rollouts_per_s": number / wall,
        "rollouts_per_device_s": number / wall * second_s,
        "driver_ms_per_rollout": cpu / number * 1000,
        "loop_ms_per_rollout": thread / number * 1000,
        "calls_per_rollout": calls / number,
        "slowest_room": slowest,
        "share_of_ideal": alone_s * second_s / wall,
        **{f"{phase}_s_per_step": seconds / steps for phase, seconds in watch.times.items()},
    }


def _alone(config: Config, work: Counter[str], steps: int) -> dict[str, float]:
    """Seconds of devices that each room would take for this work, never waiting for another."""
    generators = config.rollout.num_generators
    return {
        "generate": work["generate"] * TOKEN_S / AT_ONCE / generators,
        "score": work["score"] / SCORED_PER_S / config.teacher.num_actors,
        "learn": work["learn"] / TRAINED_PER_S / generators + steps * BROADCAST_S,
    }


def _mean_length() -> float:
    return float(np.mean([length(seed) for seed in range(1000)]))


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option("--generators", default="8,64,256", show_default=True, help="How many, one loop after the other.")
@click.option("--per-call", default="8", show_default=True, help="Rollouts a call, one loop after the other.")
@click.option("--staleness", default="0,1,2,4", show_default=True, help="Values of buffer.max_staleness.")
@click.option("--rate", default=800.0, show_default=True, help="Rollouts a second that devices may bring at most.")
@click.option("--steps", default=4, show_default=True, help="Steps of a loop that are measured.")
@click.option("--json", "json_file", type=OutputFile(), help="Write what was measured to this file.")
def main(
    parts: tuple[str, ...],
    generators: str,
    per_call: str,
    staleness: str,
    rate: float,
    steps: int,
    json_file: Path | None,
) -> None:
    """Measures the runtime without models."""
    wanted, found = parts or PARTS, {}
    if "bookkeeping" in wanted:
        found["bookkeeping"] = [bookkeeping(number, steps) for number in (8, 256)]
        for row in found["bookkeeping"]:
            click.echo(f"bookkeeping: {row['rollouts_per_s']:,.0f} rollouts/s in steps of {row['rollouts_per_step']:,}")
    with cluster():
        if "generators" in wanted:
            settings = [(number, calls) for number in _numbers(generators) for calls in _numbers(per_call)]
            found["generators"] = [loop(*setting, steps, rate) for setting in settings]
        if "staleness" in wanted:
            bounds = _numbers(staleness)
            found["staleness"] = [loop(8, _numbers(per_call)[0], steps, rate, bound) for bound in bounds]
    for part in ("generators", "staleness"):
        if rows := found.get(part):
            _show(part, rows)
    if json_file:
        json_file.write_text(json.dumps(found, indent=2))


def _show(part: str, rows: list[dict[str, Any]]) -> None:
    heads = ("generators", "a call", "staleness", "rollouts/s", "driver ms (loop)", "Ray calls", "of the ideal", "pace")
    table = Table(*heads, title=f"{part}: each rollout's, and the pace beside the first row's", title_justify="left")
    for row in rows:
        table.add_row(
            f"{row['generators']:,}",
            str(row["rollouts_per_call"]),
            str(row["max_staleness"]),
            f"{row['rollouts_per_s']:,.0f}",
            f"{row['driver_ms_per_rollout']:.2f} ({row['loop_ms_per_rollout']:.2f})",
            f"{row['calls_per_rollout']:.2f}",
            f"{row['share_of_ideal']:.2f} ({row['slowest_room']})",
            f"{row['rollouts_per_device_s'] / rows[0]['rollouts_per_device_s']:.2f}",
        )
    Console().print(table)
    if part == "generators":
        most = rows[-1]
        brought = ON_PAPER * AT_ONCE / (_mean_length() * TOKEN_S)
        click.echo(
            f"on paper: {ON_PAPER:,} generators bring {brought:,.0f} rollouts a second of devices, which keep "
            f"{brought * most['driver_ms_per_rollout'] / 1000:.2f} cores of the driver busy, its event loop for "
            f"{brought * most['loop_ms_per_rollout'] / 1000:.2f} of the time"
        )


def _numbers(listed: str) -> list[int]:
    return [int(number) for number in listed.split(",")]


if __name__ == "__main__":
    main()
