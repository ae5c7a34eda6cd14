"""What follows from measured steps: rates, the split that balances, hours; and what fits where."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from driven_run import cast_of, die, drive, on_call
from known_models import TINY
from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.errors import MemberLost
from opd_ray.messages import MemoryUse
from opd_ray.plan import fit, forecast
from opd_ray.plan.cost import cost
from opd_ray.plan.flow import Step
from opd_ray.plan.forecast import Forecast
from opd_ray.plan.memory import Process
from opd_ray.plan.memory import processes as memory_of
from opd_ray.plan.rates import RoomRate, measured, propose, step_s
from opd_ray.rooms import Rooms, memory
from opd_ray.rooms.memory import own_memory
from opd_ray.watch.observers import StepReport


def made(*overrides: str) -> Config:
    return configs.load(None, list(overrides))


def on_gpus(**busy_s: float) -> list[RoomRate]:
    return [RoomRate(room, 1, 1000.0, busy, cpus=0.0, gpus=1.0) for room, busy in busy_s.items()]


PLENTY = {"cores": 1000.0, "cpus": 1000.0, "synchronous": False}

# ---- rates ----


def test_a_rooms_rate_is_that_of_its_own_work() -> None:
    """Two steps of 2 s in which the two generators worked for half of the time."""
    config = made("rollout.num_generators=2", "rollout.gpus_per_generator=0.5")
    rows = [{"throughput/step_s": 2.0, "idle/generate": 0.5, "idle/learn": 0.75}] * 2
    rooms = {room.room: room for room in measured(rows, [Counter(generate=600, learn=900)] * 2, config)}
    assert rooms.keys() == {"generate", "learn", "teacher", "reference"}
    generate = rooms["generate"]
    assert (generate.busy_s, generate.tokens_per_s, generate.step_s, generate.gpus) == (2.0, 300.0, 1.0, 0.5)
    assert generate.idle_share(2.0) == 0.5
    assert rooms["learn"].tokens_per_s == 900 / 0.5


def test_rooms_that_work_at_once_take_as_long_as_the_slowest_and_synchronous_ones_as_long_as_all() -> None:
    rooms = on_gpus(generate=4.0, learn=1.0)
    assert step_s(rooms, synchronous=False, cores=1) == 4.0
    assert step_s(rooms, synchronous=True, cores=1) == 5.0


def test_rooms_on_cpus_cannot_be_faster_than_their_work_on_all_cores() -> None:
    rooms = [RoomRate(room, 4, 1.0, 4.0, cpus=0.0, gpus=0.0) for room in ("generate", "learn")]
    assert step_s(rooms, synchronous=False, cores=2) == 4.0
    assert step_s(rooms, synchronous=False, cores=100) == 1.0


# ---- the split ----


def test_the_split_gives_workers_to_whom_the_others_wait_for() -> None:
    """Of 8 GPUs: work of 6, 1 and 1 seconds is done in one second by 6, 1 and 1 workers."""
    split = propose(on_gpus(generate=6.0, teacher=1.0, learn=1.0), 6.6, gpus=8, **PLENTY)
    assert split.workers == {"generate": 6, "teacher": 1, "learn": 1}
    assert split.step_s == pytest.approx(1.1), "what a step took beyond its work stays in proportion"


def test_two_rooms_that_are_slowest_together_both_get_more() -> None:
    """The adversary: one more worker for one of them shortens nothing by itself."""
    split = propose(on_gpus(generate=4.0, learn=4.0, teacher=1.0), 4.0, gpus=5, **PLENTY)
    assert split.workers == {"generate": 2, "learn": 2, "teacher": 1}


def test_no_more_workers_than_the_step_gets_shorter_by() -> None:
    rooms = [*on_gpus(generate=4.0), RoomRate("learn", 1, 1.0, 2.0, cpus=0.0, gpus=100.0)]
    assert propose(rooms, 4.0, gpus=150, **PLENTY).workers == {"generate": 2, "learn": 1}


def test_a_split_that_memory_does_not_hold_is_not_proposed() -> None:
    rooms = on_gpus(generate=6.0, learn=1.0)
    split = propose(rooms, 6.0, gpus=9, fits=lambda workers: workers["generate"] < 4, **PLENTY)
    assert split.workers == {"generate": 3, "learn": 1}


def test_a_split_that_is_balanced_is_left_alone() -> None:
    assert propose(on_gpus(generate=1.0, learn=1.0), 1.0, gpus=2, **PLENTY) is None
    on_cpus = [RoomRate(room, 1, 1.0, 1.0, cpus=0.5, gpus=0.0) for room in ("generate", "learn")]
    busy = {"synchronous": False, "cores": 2.0, "cpus": 64.0, "gpus": 0.0}
    assert propose(on_cpus, 1.0, **busy) is None, "the cores are taken, whatever Ray has to give"


# ---- hours ----


def test_a_run_is_its_start_its_steps_and_its_evaluations() -> None:
    config = made("learner.steps=100", "evaluation.num_problems=50", "evaluation.every_steps=25")
    generators = RoomRate("generate", 2, 100.0, 1.0, cpus=0.5, gpus=0.0)
    found = cost(config, {"held_out": 200}, generators, start_s=30, step_s=2, response_tokens=40)
    # before and after 50 problems, at steps 25, 50 and 75 up to 128, each greedy and sampled; 2 workers of 100 tokens/s
    assert (found.start_s, found.steps_s) == (30, 200)
    assert found.evaluations_s == (2 * 50 + 3 * 128) * 2 * 40 / 200


# ---- what fits ----


def process(room: str, size: float, gpus: float, number: int = 1, share: float | None = None) -> Process:
    return Process(room, number, {"weights": size}, gpus, {"process": 1e9}, share)


def test_processes_lie_on_the_first_gpu_that_has_room_for_their_share() -> None:
    """As Ray places the paper's recipe: two ranks, a generator, teacher and reference on one."""
    rooms = [process("learn", 50e9, 1, 2), process("generate", 20e9, 1, share=0.85)]
    rooms += [process("teacher", 22e9, 0.6), process("reference", 22e9, 0.4)]
    placed = fit.gpus(rooms)
    assert [[each.room for each in gpu.rooms] for gpu in placed] == [
        ["learn"],
        ["learn"],
        ["generate"],
        ["teacher", "reference"],
    ]
    assert placed[2].bytes(100e9) == 85e9, "an engine takes its share of a card that is known"
    assert placed[2].bytes(None) == 20e9


def verdict(rooms: list[Process], **there: object) -> list[str]:
    plenty = {"memory_bytes": 1e15, "store_bytes": 1e15, "card_bytes": []}
    return fit.problems(rooms, {"snapshots": 100e9, "rollouts and scores": 1e9}, **(plenty | there))


def test_each_thing_that_does_not_fit_is_said_with_what_to_do() -> None:
    rooms = [process("learn", 90e9, 1, 2)]
    assert verdict(rooms) == []
    assert "memory, the nodes have 1.0 GB" in verdict(rooms, memory_bytes=1e9)[0]
    store = verdict(rooms, store_bytes=50e9)[0]
    assert "needs 101.0 GB (snapshots 100.0 GB), the nodes have 50.0 GB: set checkpoint.memory_every_steps=0" in store
    assert verdict(rooms, card_bytes=[100e9]) == ["the rooms fill 2 GPUs, the nodes have 1"]
    assert "GPU 2 would hold 90.0 GB (learn 90.0 GB) of 80.0 GB" in verdict(rooms, card_bytes=[100e9, 80e9])[0]
    assert verdict(rooms, card_bytes=[100e9, 100e9]) == []


def test_an_engine_must_fit_into_its_share_of_a_card() -> None:
    rooms = [process("generate", 20e9, 0.5, share=0.4)]
    assert verdict(rooms, card_bytes=[60e9]) == []
    assert "generate takes 16.0 GB of GPU 1, but needs 20.0 GB" in verdict(rooms, card_bytes=[40e9])[0]


# ---- the forecast of a run ----


FACTS = SimpleNamespace(
    sizes=defaultdict(lambda: TINY), max_prompt_tokens=4, max_context_tokens=64, num_prompts=9, eos_token_ids=(1,)
)


def report(step: int, tokens: int, evaluation: object = None) -> StepReport:
    count = {"num_response_tokens": tokens, "num_trained_tokens": tokens}
    meta = SimpleNamespace(source="student", num_prompt_tokens=10, **count)
    entry = SimpleNamespace(meta=meta, is_trained_on=True)
    return StepReport(step, [entry], {}, evaluation)


def test_the_first_steps_tell_the_rate_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 steps fill the rooms, 10 of .5 s tell; one with an evaluation, which takes a minute, is in neither."""
    now, said = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    config = made("learner.steps=40", "buffer.max_staleness=3")
    watch = Forecast(config, FACTS, lambda kind, text: said.append((kind, text)))

    async def steps() -> None:
        for step in range(1, 41):
            slow = 60.0 if step == 12 else 5.0 if step <= 8 else 0.5 if step <= 19 else 1.0
            now[0] += slow
            tokens = 400 if step == 12 else 100
            await watch.on_step(report(step, tokens, object() if step == 12 else None))

    now[0] += 100.0
    watch.go_on()  # a restore
    asyncio.run(steps())
    assert said == [("forecast", "forecast: 200 tokens/s, 0:10 min of steps left")]
    found = watch.result({"learn": MemoryUse(8, None), "generate": MemoryUse(9, 10)})
    came = memory_of(config, FACTS.sizes, Step({"student": 1}, 10, 400), 64)
    assert found["predicted"]["tokens_per_s"] == 200.0
    assert found["predicted"]["memory"]["learn"] == {"host_bytes": came[0].bytes}, "of the largest step that came"
    assert found["predicted"]["memory_at_most"]["learn"] != found["predicted"]["memory"]["learn"]
    assert found["measured"]["tokens_per_s"] == pytest.approx(31 * 100 / (10 * 0.5 + 21 * 1.0))
    assert found["measured"]["memory"] == {"learn": {"host_bytes": 8}, "generate": {"host_bytes": 9, "gpu_bytes": 10}}


def test_a_run_of_a_few_steps_foretells_nothing() -> None:
    watch = Forecast(made("learner.steps=3"), FACTS, forecast)
    asyncio.run(watch.on_step(report(1, 5)))
    assert watch.result({})["predicted"]["tokens_per_s"] is watch.result({})["measured"]["tokens_per_s"] is None


# ---- memory of processes ----


def test_a_process_counts_what_it_needed_at_its_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adversaries: memory that was given back before anybody looked, and the object store, which all map."""
    assert own_memory().host_bytes > 10e6
    files = {"smaps_rollup": {"Pss": 500, "Pss_Shmem": 300}, "status": {"VmHWM": 1000, "VmRSS": 900}}
    monkeypatch.setattr(memory, "_kilobytes", lambda file: files[file.name])
    monkeypatch.setattr("psutil.Process.children", lambda *_, **__: [])
    assert own_memory() == MemoryUse(1024 * (500 - 300 + 100), None)


def test_the_memory_of_a_room_is_that_of_its_largest_process_and_one_that_is_lost_is_left_out() -> None:
    uses = {"a": MemoryUse(5, 70), "b": MemoryUse(9, None), "c": MemberLost("gone")}

    async def ask(member: str, method: str, deadline_s: float) -> MemoryUse:
        assert method == "memory"
        if isinstance(uses[member], Exception):
            raise uses[member]
        return uses[member]

    pools = {
        name: SimpleNamespace(room=name, those=lambda _, members=members: members, ask=ask)
        for name, members in {"generate": ["a", "b"], "learn": ["c"], "teacher": ["b"]}.items()
    }
    rooms = Rooms(pools["generate"], pools["learn"], {"teacher": pools["teacher"]}, None, pools["teacher"])
    assert asyncio.run(rooms.memory()) == {"generate": MemoryUse(9, 70), "teacher": MemoryUse(9, None)}


# ---- in summary.json ----


def test_a_summary_has_the_prediction_beside_what_came(tmp_path: Path) -> None:
    summary, _ = drive(tmp_path, cast_of())
    predicted, measured_ = summary["plan"]["predicted"], summary["plan"]["measured"]
    assert predicted["memory"].keys() == predicted["memory_at_most"].keys() == measured_["memory"].keys()
    assert measured_["memory"].keys() == {"generate", "learn", "teacher", "record"}
    assert predicted["tokens_per_s"] is None, "of six steps"


def test_a_generator_that_dies_while_it_counts_its_memory_costs_its_row_alone(tmp_path: Path) -> None:
    cast = cast_of()
    done = on_call(cast, "memory", 1, die, role="student-generator")
    summary, stopped = drive(tmp_path, cast)
    assert done and stopped is None
    assert summary["plan"]["measured"]["memory"].keys() == {"learn", "teacher", "record"}
