"""Rollouts that are gone with a node, in a pipeline on fakes: what is made again, and what is not."""

import asyncio
import random

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ObjectLostError

import fake_ray
from fake_rooms import make_pipeline
from fake_workers import FakeGenerator, FakeScorer
from opd_ray.errors import MemberLost, RunError
from opd_ray.messages import Entry
from small_messages import meta

GOLDEN = {"golden": {"coef": 1, "divergence": "forward_kl"}}
NO_GOLDEN = {"buffer": {"golden_per_prompt": 0}, "loss": {"golden": {"coef": 0}}}
OFF = {"guard": {"level": "off"}}


def run(making, before=lambda made: None):
    """Makes a pipeline, calls ``before`` with it, and runs it to its end; lost workers are replaced at once."""

    async def whole():
        made, tasks = await making, []

        def replace(pool, member, cause):
            newcomer = pool.grow()
            tasks.append(asyncio.ensure_future(bring_up(made, pool, newcomer)))

        for pool in made.rooms.pools:
            pool.on_loss = replace
        before(made)
        await made.pipeline.run([made.recording])
        return made

    return fake_ray.run(whole())


async def bring_up(made, pool, member):
    try:
        await pool.bring_up(member, 100)
        if member.state == "joining":
            await made.delivery.welcome(member)
    except MemberLost as error:
        pool.lose(member, str(error))


def trained(made, source="student"):
    """Slots in the order in which they were trained on."""
    return [
        entry.meta.slot for report in made.recording.reports for entry in report.entries if entry.meta.source == source
    ]


def sampled(made):
    return [slot for event in made.log if event[0] == "generate" for slot in event[1]]


def lose_payloads(made, times, *, of=lambda entry: entry.rollouts):
    """Before the learner's ``times`` next calls, loses a payload of the first rollout of its plan."""
    rank, left = made.learner, [times]
    step = rank.train_step

    async def losing(plan):
        if left[0]:
            left[0] -= 1
            made.cast.world.objects.lose(of(plan.micro_batches[0][0]))
        return await step(plan)

    rank.train_step = losing


def test_what_is_gone_while_it_is_scored_is_sampled_again():
    gone = []

    def before(made):
        def lose(actor, method):
            if method == "score" and len(gone) < 3:
                newest = max(made.cast.world.objects._objects, key=lambda ref: ref.number)
                gone.append(newest)
                made.cast.world.objects.lose(newest)

        made.cast.world.before = lose

    made = run(make_pipeline(steps=3, prompts_per_step=2, max_staleness=0, **NO_GOLDEN, **OFF), before)
    assert len(gone) == 3
    assert trained(made) == list(range(6))
    assert len(sampled(made)) > 6
    assert made.pipeline.num_lost_payloads >= 1
    assert [len(report.entries) for report in made.recording.reports] == [2, 2, 2]


def test_rollouts_that_are_gone_again_and_again_end_the_run():
    def before(made):
        made.cast.world.before = lambda actor, method: made.cast.world.objects.lose_all() if method == "score" else None

    with pytest.raises(RunError, match=r"rollouts of slots \[0, 1\] were lost 10 times in a row"):
        run(make_pipeline(steps=3, prompts_per_step=2, **NO_GOLDEN, **OFF), before)


@pytest.mark.parametrize("of", ["rollouts", "teacher", "reference"])
def test_what_the_learner_lacks_is_made_again_and_nothing_else(of):
    def before(made):
        lose_payloads(made, 1, of=lambda entry: entry.rollouts if of == "rollouts" else entry.scores[of])

    making = make_pipeline(
        steps=3, prompts_per_step=4, max_staleness=0, rollout={"prompts_per_call": 2}, **NO_GOLDEN, **OFF
    )
    made = run(making, before)
    again = sorted(slot for slot in set(sampled(made)) if sampled(made).count(slot) == 2)
    assert again in ([0, 1], [2, 3]), "the slots that share the payload"
    assert len(sampled(made)) == 12 + 2
    assert trained(made) == list(range(12)), "each once, in order"
    assert [plan.step for plan in made.learner.plans] == [0, 0, 1, 2]
    assert made.learner.steps == [0, 1, 2] and sorted(made.learner.trained) == list(range(12))
    assert made.pipeline.num_lost_payloads == 2


def test_golden_scores_that_are_gone_are_made_again_and_the_golden_rollouts_are_the_same():
    def before(made):
        def golden_first(plan):
            return next(entry for batch in plan.micro_batches for entry in batch if entry.meta.source == "golden")

        step, left = made.learner.train_step, [1]

        async def losing(plan):
            if left:
                left.pop()
                made.cast.world.objects.lose(golden_first(plan).scores["teacher"])
            return await step(plan)

        made.learner.train_step = losing

    made = run(make_pipeline(steps=2, loss=GOLDEN, **OFF), before)
    golden = [
        [entry.meta.rollout_id for batch in plan.micro_batches for entry in batch if entry.meta.source == "golden"]
        for plan in made.learner.plans
    ]
    assert sorted(golden[0]) == sorted(golden[1]) and len(golden) == 3
    assert sorted(sampled(made)) == list(range(8)), "no prompt is sampled again for them"
    assert trained(made) == list(range(8))


def test_golden_scores_that_are_gone_after_rollouts_were_cost_no_rollouts_again():
    """The bug: the slots that had just been made again were made once more."""

    def before(made):
        world = made.cast.world
        lose_payloads(made, 1, of=lambda entry: entry.rollouts)

        def lose(actor, method):
            if method == "select" and len(made.learner.plans) == 1 and not gone:
                gone.append(actor.name)
                raise ObjectLostError("00" * 28, "", "")

        world.before = lose

    gone = []
    more = {"rollout": {"prompts_per_call": 2}, "loss": GOLDEN}
    made = run(make_pipeline(steps=1, prompts_per_step=4, max_staleness=0, **more, **OFF), before)
    assert len(gone) == 1
    assert len(sampled(made)) == 4 + 2, "the slots that share the payload, once"


def test_what_is_gone_while_golden_rollouts_are_scored_ahead_is_made_again():
    def before(made):
        def lose(actor, method):
            calls.append(method)
            if method == "select" and calls.count("select") == 2:
                raise ObjectLostError("00" * 28, "", "")

        made.cast.world.before = lose

    calls = []
    made = run(make_pipeline(steps=3, loss=GOLDEN, **OFF), before)
    assert calls.index("train_step") > [at for at, each in enumerate(calls) if each == "select"][1], "it was ahead"
    assert calls.count("select") == 3 + 1 and made.pipeline.num_lost_payloads == 1
    assert [sum(entry.meta.source == "golden" for entry in each.entries) for each in made.recording.reports] == [4] * 3
    assert len(made.learner.plans) == 3, "no step was begun without them"


def test_payloads_that_the_learner_lacks_again_and_again_end_the_run():
    with pytest.raises(RunError, match="step 0: rollouts were lost 10 times in a row, the last: .*'0-0'"):
        run(make_pipeline(steps=2, **NO_GOLDEN, **OFF), lambda made: lose_payloads(made, 99))


def test_answers_of_an_evaluation_that_are_gone_are_asked_for_again():
    def before(made):
        lost = []

        def lose(actor, method):
            if method == "measure" and not lost:
                lost.append(actor)
                made.cast.world.objects.lose_all()
                raise ObjectLostError("00" * 28, "", "")

        made.cast.world.before = lose

    more = {"evaluation": {"every_steps": 1, "num_problems_during": 3}}
    made = run(make_pipeline(steps=2, max_staleness=0, **more, **NO_GOLDEN, **OFF), before)
    assert [report.evaluation is not None for report in made.recording.reports] == [True, False]
    assert made.recording.reports[0].evaluation.num_problems == 3
    assert made.pipeline.num_lost_payloads >= 1


def restored(slots):
    """Rollouts of a snapshot, scored by versions before."""

    async def making():
        entries = {}

        def prepare(cast):
            for slot in slots:
                put = cast.world.objects.put
                scores = {role: put(pa.record_batch({"of": [slot], "by": [role]})) for role in ("teacher", "reference")}
                rollouts = put(pa.record_batch({"slot": [slot], "source": ["student"]}))
                values = {"prompt_id": "restored", "oldest_version": 2, "mean_version": 2.0}
                entries[slot] = [Entry(meta(slot, **values), 0, rollouts, scores)]

        return await make_pipeline(
            steps=6, first_step=3, prompts_per_step=2, restored=entries, prepare=prepare, **NO_GOLDEN, **OFF
        )

    return making()


def test_slots_that_are_restored_are_trained_and_not_sampled_again():
    made = run(restored([6, 8, 9]))
    assert sorted(sampled(made)) == [7, 10, 11]
    assert trained(made) == [6, 7, 8, 9, 10, 11]
    names = {e.meta.slot: e.meta.prompt_id for report in made.recording.reports for e in report.entries}
    assert [slot for slot, name in names.items() if name == "restored"] == [6, 8, 9]
    assert max(report.metrics["staleness/max"] for report in made.recording.reports) <= 2


def test_a_restored_rollout_that_is_gone_is_sampled_again():
    def before(made):
        made.cast.world.objects.lose(made.pipeline._restored[6][0].rollouts)

    made = run(restored([6, 7]), before)
    assert sorted(sampled(made)) == [6, 8, 9, 10, 11]
    assert trained(made) == [6, 7, 8, 9, 10, 11]


def test_what_a_pipeline_holds_is_what_another_goes_on_with():
    """At a step boundary every slot is trained, buffered, in flight, or not admitted yet."""
    seen = []

    def before(made):
        async def on_step(report):
            slots, entries = made.pipeline.buffered()
            ledger, _, _ = made.pipeline.slots()
            seen.append((report.step, slots, entries, ledger.next, set(ledger.taken)))

        made.recording.on_step = on_step

    run(make_pipeline(steps=5, prompts_per_step=2, max_staleness=2, slowest=20, **NO_GOLDEN, **OFF), before)
    for step, slots, entries, next_slot, taken in seen:
        assert sorted(slots) == sorted({entry.meta.slot for entry in entries})
        assert set(slots) <= taken == set(range(2 * step, next_slot))
    assert seen[-1] == (5, (), (), 10, set())


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    max_staleness=st.integers(0, 3),
    prompts_per_step=st.integers(1, 5),
    num_ranks=st.integers(1, 2),
    seed=st.integers(0, 10_000),
)
def test_random_losses_of_workers_and_payloads_cost_no_slot_its_turn(max_staleness, prompts_per_step, num_ranks, seed):
    rng, left = random.Random(seed), {"losses": 15, "deaths": 2}  # three would be held to be one call's doing

    def before(made):
        world = made.cast.world

        def fault(actor, method):
            if left["deaths"] and actor.role != "learner" and rng.random() < 0.05:
                left["deaths"] -= 1
                actor.die()
            if left["losses"] and rng.random() < 0.1:
                left["losses"] -= 1
                payloads = [ref for ref in world.objects._objects if ref.number > 0]  # golden ones stay
                world.objects.lose(*rng.sample(payloads, min(2, len(payloads))))

        world.before = world.after = fault

    def prepare(cast):
        cast.generator = type("Slow", (FakeGenerator,), {"takes_s": 1.0})
        cast.scorer = type("Slow", (FakeScorer,), {"takes_s": 0.2})

    making = make_pipeline(
        max_staleness=max_staleness,
        prompts_per_step=prompts_per_step,
        prepare=prepare,
        seed=seed,
        learner={"num_ranks": num_ranks},
        rollout={"num_generators": 2},
        loss=GOLDEN,
        weights={"timeout_s": 5},
        **OFF,
    )
    made = run(making, before)
    slots = list(range(6 * prompts_per_step))
    assert trained(made) == slots, "each once, in order"
    assert made.cast.trained == slots
    assert max(report.metrics["staleness/max"] for report in made.recording.reports) <= max_staleness
    ledger, missing, places = made.pipeline.slots()
    assert (len(ledger.taken), missing, places) == (0, [], {})
    for report in made.recording.reports:
        assert sum(entry.meta.source == "golden" for entry in report.entries) == prompts_per_step
