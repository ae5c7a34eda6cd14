"""The generator around a fake engine: commands between steps, what an update does to unfinished responses, failures."""

import asyncio
import math
import threading
from dataclasses import replace

import pytest

from opd_ray.errors import EngineFailed, RunError, WeightSyncError
from opd_ray.generate.engine_thread import EngineThread
from opd_ray.generate.generator import GeneratorSettings, StudentGenerator, TeacherGenerator
from opd_ray.messages import (
    ROLLOUT_SCHEMA,
    GenerationRequest,
    PromptGroup,
    RepetitionRule,
    SamplingSettings,
    WeightManifest,
)
from opd_ray.placement import launch
from uniform_tokens import UniformTokens

NEVER_STOP = SamplingSettings(temperature=1.0, top_p=1.0, max_response_tokens=6, stop_token_ids=())


class SteppedEngine(UniformTokens):
    """Takes a step only when the test lets it, and keeps the order of what happened."""

    def __init__(self):
        super().__init__()
        self.events, self.may_step = [], threading.Semaphore(0)

    def submit(self, request):
        self.events.append(f"submit {request.request_id}")
        super().submit(request)

    def step(self):
        assert self.may_step.acquire(timeout=10), "the test never allowed this step"
        self.events.append("step")
        return super().step()

    def install(self, unfinished):
        self.events.append(f"update {self.received} {unfinished}")
        super().install(unfinished)


class Words:
    """A tokenizer whose text is the numbers of the tokens."""

    def batch_decode(self, tokens, skip_special_tokens):
        return [" ".join(map(str, row)) for row in tokens]


class Even:
    """A task whose answers are right when they have an even number of words."""

    def verify(self, response, row):
        return len(response.split()) % 2 == 0


def manifest(version):
    return WeightManifest(version, (), (), ())


def group(slot, num_responses=1):
    return PromptGroup(slot, f"p{slot}", (1, 2, 3), {"answer": "x"}, num_responses, seed=100 * slot)


def make(in_flight="keep", engine=None, kind=StudentGenerator):
    engine = engine or SteppedEngine()
    return kind(make_engine=lambda: engine, load_tokenizer=Words, settings=settings(in_flight)), engine


def settings(in_flight="keep", **changes):
    values = {"repetition": (1000, 2.0)}
    return GeneratorSettings(task=Even(), in_flight=in_flight, **(values | changes))


async def until(condition):
    """Waits for what the engine thread does, with a deadline."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def updated(generator, in_flight, version=1):
    """What a generator is asked at a broadcast."""
    if in_flight == "drain":
        await generator.drain()
    await generator.update_weights(manifest(version))


async def update_in_the_middle(in_flight):
    """Two tokens under version 0, an update, then as many steps as it takes; returns metas and events."""
    async with asyncio.timeout(20):
        return await _update_in_the_middle(in_flight)


async def _update_in_the_middle(in_flight):
    generator, engine = make(in_flight)
    answer = asyncio.create_task(generator.generate([group(0)], NEVER_STOP))
    engine.may_step.release(2)
    await until(lambda: engine.events.count("step") == 2)
    update = asyncio.create_task(updated(generator, in_flight))
    await asyncio.sleep(0)
    late = asyncio.create_task(generator.generate([group(1)], NEVER_STOP))
    await asyncio.sleep(0)
    engine.may_step.release(40)
    await update
    (meta,), payload = await answer
    (late_meta,), _ = await late
    return meta, late_meta, payload, engine.events


def test_keep_updates_between_two_steps_of_a_running_response():
    meta, _, payload, events = asyncio.run(update_in_the_middle("keep"))
    versions = payload["weight_versions"][0].as_py()
    assert versions == sorted(versions)
    assert (meta.oldest_version, versions[-1]) == (0, 1)
    assert meta.mean_version == pytest.approx(sum(versions) / len(versions))
    assert "update 1 keep" in events


def test_abort_begins_the_response_again_so_it_has_one_version():
    meta, _, payload, events = asyncio.run(update_in_the_middle("abort"))
    assert payload["weight_versions"][0].as_py() == [1] * 6
    assert meta.num_response_tokens == 6
    assert "update 1 restart" in events


def test_drain_finishes_what_runs_and_holds_what_comes_until_the_update():
    meta, late, _, events = asyncio.run(update_in_the_middle("drain"))
    assert (meta.oldest_version, meta.mean_version) == (0, 0)
    assert late.oldest_version == 1
    assert events.index("update 1 keep") < events.index("submit 1")
    assert events[: events.index("update 1 keep")].count("step") == 6


def test_a_drain_with_nothing_running_happens_at_once():
    async def scenario():
        generator, engine = make("drain")
        await asyncio.wait_for(updated(generator, "drain"), 5)
        assert engine.events == ["update 1 keep"]

    asyncio.run(scenario())


def test_a_group_gives_a_row_per_response_with_seeds_of_their_own():
    async def scenario():
        generator, engine = make()
        engine.may_step.release(100)
        metas, payload = await generator.generate([group(3, num_responses=2), group(4)], NEVER_STOP)
        assert [meta.rollout_id for meta in metas] == ["3-0", "3-1", "4-0"]
        assert payload["rollout_id"].to_pylist() == ["3-0", "3-1", "4-0"]
        responses = payload["response_tokens"].to_pylist()
        assert responses[0] != responses[1]
        assert payload["prompt_tokens"].to_pylist() == [[1, 2, 3]] * 3
        assert all(len(row) == 6 for row in payload["behaviour_logprobs"].to_pylist())

    asyncio.run(scenario())


def test_a_truncated_response_is_never_correct():
    async def scenario():
        generator, engine = make()
        engine.may_step.release(100)
        (meta,), _ = await generator.generate([group(0)], NEVER_STOP)
        assert meta.truncated
        assert not meta.correct

    asyncio.run(scenario())


def test_a_response_that_the_engine_ended_is_a_truncated_loop_that_nobody_judges():
    async def scenario():
        generator, _ = make(engine=UniformTokens())
        rule = RepetitionRule(max_pattern_size=1, min_pattern_size=1, min_count=2)
        sampling = replace(NEVER_STOP, max_response_tokens=1000, repetition_rule=rule)
        metas, payload = await generator.generate([group(0, 6)], sampling)
        assert {meta.num_response_tokens % 2 for meta in metas} == {0, 1}  # of which Even would like one half
        for meta in metas:
            assert (meta.finish_reason, meta.truncated, meta.repetitive) == ("repetition", True, True)
            assert not meta.correct and not meta.no_verdict
        assert payload["finish_reason"].to_pylist() == ["repetition"] * 6

    asyncio.run(scenario())


def test_a_response_ends_at_the_horizon_but_for_probes_and_what_has_no_room_for_more():
    async def scenario():
        generator, _ = make(engine=UniformTokens(max_context_tokens=10))  # 7 for a response
        groups = [replace(group(slot), horizon=horizon, probe=probe) for slot, (horizon, probe) in enumerate(asked)]
        metas, _ = await generator.generate(groups, replace(NEVER_STOP, max_response_tokens=20))
        assert [(meta.num_response_tokens, meta.finish_reason, meta.truncated, meta.whole) for meta in metas] == [
            (4, "horizon", False, False),
            (7, "length", True, True),
            (7, "length", True, False),
            (7, "length", True, True),
        ]
        assert [meta.num_trained_tokens for meta in metas] == [4, 4, 7, 7]

    asked = [(4, False), (4, True), (9, False), (None, False)]
    asyncio.run(scenario())


def test_an_engine_that_fails_fails_every_waiting_call_with_its_error():
    class Broken(SteppedEngine):
        def step(self):
            raise RuntimeError("the device is gone")

    async def scenario():
        generator, _ = make(engine=Broken())
        together = [generator.generate([group(slot)], NEVER_STOP) for slot in (0, 1)]
        failures = await failures_of(*together)
        failures += await failures_of(generator.generate([group(2)], NEVER_STOP), generator.update_weights(manifest(1)))
        assert [type(failure) for failure in failures] == [EngineFailed] * 4
        assert {str(failure) for failure in failures} == {"the engine failed: RuntimeError: the device is gone"}

    asyncio.run(scenario())


@pytest.mark.parametrize("in_flight", ["keep", "drain"])
def test_an_engine_with_half_of_an_installation_is_not_stepped_until_one_succeeds(in_flight):
    """Its weights are of two versions; it still takes commands and requests, and is of use after the next update."""

    class Torn(SteppedEngine):
        def install(self, unfinished):
            super().install(unfinished)
            if self.weight_version == 1:
                raise WeightSyncError("the device is full")

    async def scenario():
        generator, engine = make(in_flight, engine=Torn())
        running = asyncio.create_task(generator.generate([group(0)], NEVER_STOP))
        engine.may_step.release(2)
        await until(lambda: engine.events.count("step") == 2)
        update = asyncio.create_task(updated(generator, in_flight))
        await asyncio.sleep(0)
        engine.may_step.release(100)
        with pytest.raises(WeightSyncError, match="the device is full"):
            await asyncio.wait_for(update, 10)
        steps = engine.events.count("step")
        late = asyncio.create_task(generator.generate([group(1)], NEVER_STOP))
        await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.wrap_future(generator._engine.command(lambda _: None)), 10)
        assert engine.events.count("step") == steps
        assert not late.done()
        await asyncio.wait_for(generator.update_weights(manifest(2)), 10)
        (meta,), _ = await asyncio.wait_for(late, 10)
        assert (meta.oldest_version, meta.mean_version) == (2, 2)
        await asyncio.wait_for(running, 10)

    asyncio.run(scenario())


def test_what_is_under_way_in_a_half_updated_engine_can_be_abandoned():
    class Torn(SteppedEngine):
        def install(self, unfinished):
            raise WeightSyncError("the device is full")

    async def scenario():
        generator, engine = make(engine=Torn())
        running = asyncio.create_task(generator.generate([group(0)], NEVER_STOP))
        await until(lambda: "submit 0" in engine.events)
        update = asyncio.create_task(generator.update_weights(manifest(1)))
        await asyncio.sleep(0)
        engine.may_step.release(1)
        assert isinstance((await failures_of(update))[0], WeightSyncError)
        assert await asyncio.wait_for(generator.abandon(), 10) == 1
        assert "abandoned" in str((await failures_of(running))[0])

    asyncio.run(scenario())


@pytest.mark.parametrize("breaks", [False, True])
def test_responses_go_on_while_a_broadcast_comes_in(breaks):
    """One that breaks off leaves the engine with the weights that it had, and what was on hold on hold."""

    class Receiving(SteppedEngine):
        def __init__(self):
            super().__init__()
            self.came = threading.Event()

        def receive(self, manifest):
            self.events.append("receive")
            assert self.came.wait(10)
            if breaks:
                raise WeightSyncError("the sender is gone")
            super().receive(manifest)

    async def scenario():
        generator, engine = make(engine=Receiving())
        update = asyncio.create_task(generator.update_weights(manifest(1)))
        await until(lambda: "receive" in engine.events)
        engine.may_step.release(8)
        (before,), _ = await asyncio.wait_for(generator.generate([group(0)], NEVER_STOP), 10)
        long = replace(NEVER_STOP, max_response_tokens=1000)
        after = asyncio.create_task(generator.generate([group(1)], long))
        await until(lambda: engine.events.count("step") == 8)
        assert not update.done()
        engine.came.set()
        await until(lambda: engine.may_step.release() or update.done())
        engine.may_step.release(1000)
        (late,), payload = await asyncio.wait_for(after, 60)  # 1000 steps, which a busy machine did not make in 10 s
        assert (before.oldest_version, before.mean_version, late.oldest_version) == (0, 0, 0)
        if breaks:
            assert isinstance(update.exception(), WeightSyncError)
            assert late.mean_version == 0
        else:
            assert payload["weight_versions"][0].as_py()[-2:] == [1, 1]

    asyncio.run(scenario())


def test_a_broadcast_waits_for_the_installation_of_the_one_before():
    """The memory that it comes into may be what is installed."""

    async def scenario():
        generator, engine = make()
        running = asyncio.create_task(generator.generate([group(0)], NEVER_STOP))
        await until(lambda: "submit 0" in engine.events)
        first, second = (asyncio.create_task(generator.update_weights(manifest(version))) for version in (1, 2))
        await until(lambda: engine.received == 1)
        engine.may_step.release(100)
        await asyncio.wait_for(asyncio.gather(running, first, second), 10)
        assert [event for event in engine.events if "update" in event] == ["update 1 keep", "update 2 keep"]

    asyncio.run(scenario())


def test_an_engine_that_cannot_start_says_why():
    def fail():
        raise ValueError("no such checkpoint")

    with pytest.raises(ValueError, match="no such checkpoint"):
        EngineThread(fail)


def test_one_bad_request_does_not_end_the_engine():
    """A request that the engine refuses fails its own call; others go on."""

    class Picky(SteppedEngine):
        def submit(self, request):
            if len(request.prompt_tokens) > 3:
                raise ValueError("prompt too long")
            super().submit(request)

    engine = Picky()
    thread = EngineThread(lambda: engine)
    engine.may_step.release(100)
    bad = thread.submit(GenerationRequest("bad", (1, 2, 3, 4), 0, NEVER_STOP))
    good = thread.submit(GenerationRequest("good", (1, 2), 0, NEVER_STOP))
    with pytest.raises(ValueError, match="prompt too long"):
        bad.result(timeout=5)
    assert len(good.result(timeout=5).tokens) == 6


def test_rows_carry_teacher_privileged_prompt_and_top_k():
    async def scenario():
        generator, engine = make()
        engine.may_step.release(100)
        asking = replace(group(3, num_responses=2), teacher="algebra", privileged_prompt_tokens=(9, 9, 9, 9))
        metas, payload = await generator.generate([asking], replace(NEVER_STOP, top_k=4))
        assert {meta.teacher for meta in metas} == {"algebra"}
        assert payload["privileged_prompt_tokens"].to_pylist() == [[9, 9, 9, 9]] * 2
        assert payload["topk_ids"].to_pylist() == [[0, 1, 2, 3] * 6] * 2

    asyncio.run(scenario())


def test_what_was_not_asked_for_is_empty():
    async def scenario():
        generator, engine = make()
        engine.may_step.release(100)
        _, payload = await generator.generate([group(3)], NEVER_STOP)
        assert payload["privileged_prompt_tokens"].to_pylist() == [[]]
        assert payload["topk_ids"].to_pylist() == [[]]

    asyncio.run(scenario())


def test_a_group_without_responses_gives_no_rows():
    async def scenario():
        generator, engine = make()
        engine.may_step.release(100)
        metas, payload = await generator.generate([group(0, 0), group(1, 2), group(2, 0)], NEVER_STOP)
        assert [meta.slot for meta in metas] == payload["slot"].to_pylist() == [1, 1]
        metas, payload = await generator.generate([group(0, 0)], NEVER_STOP)
        assert (metas, len(payload), payload.schema) == ((), 0, ROLLOUT_SCHEMA)

    asyncio.run(scenario())


def test_the_period_of_the_tail_is_in_the_meta():
    class Looping(SteppedEngine):
        def _token(self, request, position):
            return position % 3

    async def scenario():
        generator, engine = make(engine=Looping())
        engine.may_step.release(100)
        (meta,), _ = await generator.generate([group(0)], replace(NEVER_STOP, max_response_tokens=20))
        assert meta.tail_period == 3
        (meta,), _ = await generator.generate([group(0)], NEVER_STOP)
        assert meta.tail_period == 0

    asyncio.run(scenario())


def test_a_teachers_rollouts_have_no_behaviour_policy_and_ids_of_their_own():
    async def scenario():
        generator, engine = make(kind=TeacherGenerator)
        engine.may_step.release(100)
        metas, payload = await generator.generate([group(3, num_responses=2)], NEVER_STOP)
        assert [meta.rollout_id for meta in metas] == payload["rollout_id"].to_pylist() == ["3-t0", "3-t1"]
        for meta in metas:
            assert (meta.source, meta.oldest_version, meta.mean_version) == ("teacher", -1, -1)
            assert math.isnan(meta.mean_behaviour_logprob)
        assert payload["source"].to_pylist() == ["teacher"] * 2
        for column in ("behaviour_logprobs", "weight_versions"):
            assert payload[column].to_pylist() == [[], []]

    asyncio.run(scenario())


async def failures_of(*tasks):
    async with asyncio.timeout(10):
        return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("in_flight", ["keep", "drain"])
def test_abandoned_responses_fail_at_once_and_the_engine_goes_on(in_flight):
    """Running ones, and those that wait behind a drain; the drain itself then has nothing to wait for."""

    async def scenario():
        generator, engine = make(in_flight)
        running = asyncio.create_task(generator.generate([group(0, 2)], NEVER_STOP))
        engine.may_step.release(2)
        await until(lambda: engine.events.count("step") == 2)
        update = asyncio.create_task(updated(generator, in_flight))
        await asyncio.sleep(0)
        late = asyncio.create_task(generator.generate([group(1)], NEVER_STOP))
        await asyncio.sleep(0)
        abandoned = asyncio.create_task(generator.abandon())
        await asyncio.sleep(0)
        engine.may_step.release(1)  # the step that was under way
        failures = await failures_of(running, late)
        assert all(isinstance(failure, RunError) and "abandoned" in str(failure) for failure in failures)
        assert await abandoned == 3
        await update
        engine.may_step.release(100)
        (meta,), _ = await generator.generate([group(2)], NEVER_STOP)
        assert meta.oldest_version == 1

    asyncio.run(scenario())


def test_another_run_abandons_the_last_one_and_brings_its_settings():
    async def scenario():
        generator, engine = make("keep")
        running = asyncio.create_task(generator.generate([group(0)], NEVER_STOP))
        engine.may_step.release(1)
        await until(lambda: engine.events.count("step") == 1)
        begun = asyncio.create_task(generator.begin(settings("abort")))
        await asyncio.sleep(0)
        engine.may_step.release(1)
        assert isinstance((await failures_of(running))[0], RunError)
        await begun
        await generator.update_weights(manifest(1))
        assert "update 1 restart" in engine.events

    asyncio.run(scenario())


@pytest.mark.parametrize("refusal", [PermissionError, AttributeError])
def test_an_engine_on_cpus_gives_way_also_where_a_sandbox_or_the_system_has_no_idle_policy(
    refusal: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise refusal

    told: list[int] = []
    monkeypatch.setattr("os.sched_setscheduler", refused)
    monkeypatch.setattr("os.nice", told.append)
    assert launch._giving_way(lambda: "engine") == "engine"
    assert told == [5]
