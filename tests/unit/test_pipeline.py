"""The loop on fakes: order of events, staleness, exactly-once, failures."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fake_ray
from fake_rooms import make_pipeline
from fake_workers import FakeLearner
from opd_ray.data.orders import Shuffled
from opd_ray.errors import RunError
from opd_ray.pipeline import GuardOrder


def run(making, before=lambda made: None):
    """Makes a pipeline, calls ``before`` with it, and runs it to its end."""

    async def whole():
        made = await making
        before(made)
        await made.pipeline.run([made.recording])
        return made

    return fake_ray.run(whole())


def at_full_strength(made):
    made.guard.restore(made.guard.state() | {"notch": 4})


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    max_staleness=st.integers(0, 4),
    prompts_per_step=st.integers(1, 5),
    slowest=st.sampled_from([0, 5, 60]),
    seed=st.integers(0, 100),
)
def test_staleness_stays_within_the_bound_and_every_prompt_is_trained_once(
    max_staleness, prompts_per_step, slowest, seed
):
    made = run(
        make_pipeline(max_staleness=max_staleness, prompts_per_step=prompts_per_step, slowest=slowest, seed=seed)
    )
    trained = [
        entry.meta for report in made.recording.reports for entry in report.entries if entry.meta.source == "student"
    ]
    assert sorted(meta.slot for meta in trained) == list(range(6 * prompts_per_step))
    assert max(report.metrics["staleness/max"] for report in made.recording.reports) <= max_staleness


def test_synchronous_runs_never_train_on_old_weights():
    made = run(make_pipeline(max_staleness=0, slowest=10))
    assert [report.metrics["staleness/max"] for report in made.recording.reports] == [0] * 6


def test_with_staleness_the_rooms_overlap():
    made = run(make_pipeline(max_staleness=2))
    assert max(report.metrics["staleness/max"] for report in made.recording.reports) == 2


def test_slots_are_freed_only_after_the_broadcast():
    """A prompt admitted for a freed slot must be sampled by the weights that the freed step made."""
    made = run(make_pipeline(max_staleness=0, prompts_per_step=3))
    admitted = {
        slot: version for name, *rest in made.log if name == "generate" for slot in rest[0] for version in rest[1:2]
    }
    assert admitted == {slot: slot // 3 for slot in range(18)}


def test_a_step_is_trained_then_sent_and_received():
    made = run(make_pipeline(steps=2))
    order = [event for event in made.log if event[0] in ("train_step", "send_weights", "update_weights")]
    assert order[::3] == [("train_step", 0), ("train_step", 1)]
    for version in (1, 2):  # both at once
        sending = order[3 * version - 2 : 3 * version]
        assert sorted(sending) == [("send_weights", version), ("update_weights", version)]


def test_teacher_and_reference_see_every_rollout_and_the_learner_gets_both():
    made = run(make_pipeline(steps=1))
    entries = [entry for plan in made.learner.plans for batch in plan.micro_batches for entry in batch]
    student = [entry for entry in entries if entry.meta.source == "student"]
    assert len(student) == 4
    assert all(set(entry.scores) == {"teacher", "reference"} for entry in student)
    for entry in student:
        for role, scores in entry.scores.items():
            assert made.held(scores)[entry.row] == {"of": entry.meta.slot, "by": role}
    assert sum(entry.meta.source == "golden" for entry in entries) == 4


def test_rollouts_of_one_payload_go_to_the_ranks_of_one_node():
    def apart(made):
        for member, node in zip(made.pipeline._rooms.learner.members, ("here", "there"), strict=True):
            member.node = node

    off = {"buffer": {"golden_per_prompt": 0}, "loss": {"golden": {"coef": 0}}}
    making = make_pipeline(steps=1, learner={"num_ranks": 2}, rollout={"prompts_per_call": 2}, **off)
    plans = [rank.plans[0] for rank in run(making, apart).cast.ranks]
    payloads = [{id(entry.rollouts) for batch in plan.micro_batches for entry in batch} for plan in plans]
    assert list(map(len, payloads)) == [1, 1] and not payloads[0] & payloads[1]


def test_a_resumed_run_goes_on_with_the_first_prompt_that_was_not_trained():
    made = run(make_pipeline(steps=6, first_step=4))
    slots = [entry.meta.slot for report in made.recording.reports for entry in report.entries if entry.meta.slot >= 0]
    assert sorted(slots) == list(range(16, 24))
    assert [report.step for report in made.recording.reports] == [5, 6]


def test_a_failure_in_a_room_ends_the_run_with_its_own_error():
    with pytest.raises(RunError, match="learn: learner-0 .*: learner lost at step 2"):
        run(make_pipeline(fail_at=2))


def test_plain_sft_runs_without_generators():
    made = run(
        make_pipeline(
            steps=2,
            buffer={"prompts_per_step": 0, "golden_per_step": 3},
            loss={"student": {"coef": 0}, "reference": {"coef": 0}},
        )
    )
    assert not [event for event in made.log if event[0] == "generate"]
    assert [len(plan.micro_batches[0]) for plan in made.learner.plans] == [3, 3]


OFF = {"guard": {"level": "off"}}


def sampled(made, source="student"):
    """(slots, number of rollouts asked for, budget) of each call to the generators of a source."""
    calls = [event for event in made.log if event[0] == "generate" and event[3] == source]
    return [(slots, settings.max_response_tokens) for _, slots, _, _, settings in calls]


def sources(report):
    return [entry.meta.source for entry in report.entries]


@pytest.mark.parametrize(("teacher_filter", "fit"), [("correct", [0]), ("finished", [0, 1, 3]), ("none", [0, 1, 2, 3])])
def test_live_teacher_rollouts_are_filtered_and_scored_like_their_loss_asks(teacher_filter, fit):
    """Odd slots are wrong in the fake; forward KL needs the teacher's top-k, the reference is the student's alone.

    The bug: what the teacher wrote in a loop, as in slot 2, passed every filter."""
    loss = {"teacher": {"coef": 1, "divergence": "forward_kl", "top_k": 7}}
    made = run(
        make_pipeline(steps=1, buffer={"teacher_per_prompt": 1.0, "teacher_filter": teacher_filter}, loss=loss, **OFF)
    )
    (report,) = made.recording.reports
    teacher = [entry for entry in report.entries if entry.meta.source == "teacher"]
    assert [entry.meta.slot for entry in teacher] == fit
    assert all(set(entry.scores) == {"teacher"} for entry in teacher)
    asked = [event[2] for event in made.log if event[:2] == ("teacher", "teacher")]
    assert {request.top_k for request in asked} == {7}


def test_half_a_teacher_rollout_per_prompt_is_one_for_every_second_prompt():
    buffer = {"teacher_per_prompt": 0.5, "teacher_filter": "none"}
    made = run(make_pipeline(steps=2, buffer=buffer, loss={"teacher": {"coef": 1}}, **OFF))
    slots = sorted(slot for slots, _ in sampled(made, "teacher") for slot in slots)
    assert slots == [1, 3, 5, 7]


def test_with_a_probability_of_being_on_policy_a_step_is_one_or_the_other():
    buffer = {"on_policy_probability": 0.5}
    made = run(make_pipeline(steps=40, buffer=buffer, **OFF))
    kinds = [set(sources(report)) for report in made.recording.reports]
    assert all(kind in ({"student"}, {"golden"}) for kind in kinds)
    assert 10 < sum(kind == {"student"} for kind in kinds) < 30


def test_golden_rollouts_are_scored_when_their_loss_compares_with_the_teacher():
    loss = {"golden": {"coef": 1, "divergence": "forward_kl"}, "reference": {"on_golden": True}}
    made = run(make_pipeline(steps=1, loss=loss, **OFF))
    entries = [entry for entry in made.recording.reports[0].entries if entry.meta.source == "golden"]
    assert len(entries) == 4
    assert all(set(entry.scores) == {"teacher", "reference"} for entry in entries)
    assert [entry.row for entry in entries] == [0, 1, 2, 3]


GOLDEN = {"golden": {"coef": 1, "divergence": "forward_kl"}, "reference": {"on_golden": True}}


def golden_scores(made):
    """How many golden payloads the reference was asked about, which is the last to be asked."""
    return sum(event[:2] == ("reference", "golden") for event in made.log)


def golden_ids(report):
    return [entry.meta.rollout_id for entry in report.entries if entry.meta.source == "golden"]


def test_golden_rollouts_are_scored_while_the_step_before_is_trained():
    """They stood in the way of every step: nobody began with them before the step's other rollouts were there."""

    class Waiting(FakeLearner):
        async def train_step(self, plan):
            if plan.step < 5:
                await fake_ray.until(lambda: golden_scores(seen[0]) == plan.step + 2)
            return await super().train_step(plan)

    seen = []
    made = run(make_pipeline(loss=GOLDEN, prepare=lambda cast: setattr(cast, "learner", Waiting), **OFF), seen.append)
    assert golden_scores(made) == 6, "once a step"
    assert [len(golden_ids(report)) for report in made.recording.reports] == [4] * 6


def test_golden_rollouts_that_the_guard_adds_after_the_others_were_scored_are_scored_with_them():
    class Rescue:
        async def on_step(self, report):
            if report.step == 2:
                at_full_strength(seen[0])

    async def whole():
        made = await make_pipeline(buffer={"golden_per_prompt": 0.5}, loss=GOLDEN)
        seen.append(made)
        await made.pipeline.run([made.recording, Rescue()])
        return made

    seen = []
    made = fake_ray.run(whole())
    ids = [golden_ids(report) for report in made.recording.reports]
    assert [len(each) for each in ids] == [2, 2, 8, 8, 8, 8]
    assert golden_scores(made) == 6 + 1
    order = Shuffled(5, 0)
    assert [name for each in ids for name in each] == [f"golden-{order[position]}" for position in range(36)]
    entries = [entry for entry in made.recording.reports[2].entries if entry.meta.source == "golden"]
    assert all(set(entry.scores) == {"teacher", "reference"} for entry in entries)


def test_a_scorer_that_follows_the_student_is_asked_about_golden_rollouts_at_their_step():
    """Ahead it would answer by weights that are a step older than those that it is asked for."""
    made = run(make_pipeline(loss=GOLDEN, reference={"update": "average"}, **OFF))
    order = [event for event in made.log if event[:2] == ("reference", "golden") or event[0] == "train_step"]
    assert [event[0] for event in order] == ["reference", "train_step"] * 6


def test_each_prompt_goes_to_the_teacher_that_its_row_names():
    rows = [{"id": str(i), "prompt": "p", "answer": "a", "teacher": ("code", "teacher")[i % 2]} for i in range(64)]
    made = run(make_pipeline(steps=2, rows=rows, more_teachers={"code": {}}, **OFF))
    for report in made.recording.reports:
        for entry in report.entries:
            if entry.meta.source == "student":
                assert set(entry.scores) == {entry.meta.teacher, "reference"}
    weighted = run(make_pipeline(steps=1, rows=rows, more_teachers={"code": {}}, loss={"teachers": "weighted"}, **OFF))
    student = [entry for entry in weighted.recording.reports[0].entries if entry.meta.source == "student"]
    assert all(set(entry.scores) == {"teacher", "code", "reference"} for entry in student)


def test_the_length_budget_follows_its_schedule_and_no_call_spans_two_budgets():
    rollout = {"max_response_tokens": [[0, 10], [4, 50]], "prompts_per_call": 3}
    made = run(make_pipeline(steps=6, rollout=rollout, **OFF))
    for slots, budget in sampled(made):
        assert {10 + 10 * min(slot // 4, 4) for slot in slots} == {budget}


def test_schedules_reach_the_learner():
    loss = {"golden": {"coef": [[0, 1.0], [4, 0.2]]}, "reference": {"coef": [[0, 0.0], [2, 0.1]]}}
    made = run(make_pipeline(steps=6, loss=loss, buffer={"golden_per_prompt": [[0, 1.0], [4, 0.0]]}, **OFF))
    golden = [plan.coefficients.golden for plan in made.learner.plans]
    assert golden == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    assert [plan.coefficients.reference for plan in made.learner.plans] == pytest.approx([0, 0.05, 0.1, 0.1, 0.1, 0.1])
    assert [sources(report).count("golden") for report in made.recording.reports] == [4, 3, 2, 1, 0, 0]


def test_rewards_become_advantages_within_the_group_of_a_prompt():
    loss = {
        "student": {"coef": 1, "divergence": "k1"},
        "advantage": {"teacher_coef": 0, "reward_coef": 1},
        "golden": {"coef": 0},
        "reference": {"coef": 0},
    }
    made = run(
        make_pipeline(steps=1, loss=loss, buffer={"golden_per_prompt": 0}, rollout={"responses_per_prompt": 2}, **OFF)
    )
    entries = [entry for plan in made.learner.plans for batch in plan.micro_batches for entry in batch]
    assert len(entries) == 8
    assert all(entry.reward_advantage == 0 for entry in entries), "both responses of a slot have the same reward"
    assert not any(event[0] == "teacher" for event in made.log), "GRPO asks no teacher"


def test_a_loss_that_is_not_finite_ends_a_run_without_a_guard_and_not_one_with():
    nan = {2: {"loss": float("nan")}}
    with pytest.raises(RunError, match="not finite for 3-0"):
        run(make_pipeline(learner_metrics=nan, **OFF))
    made = run(make_pipeline(learner_metrics=nan, guard={"level": "act"}))
    events = [event for report in made.recording.reports for event in report.events]
    assert [(event.step, event.signal) for event in events] == [(3, "non_finite_loss")]


def test_the_guards_order_ends_the_loop_after_the_observers_saw_the_event(monkeypatch):
    monkeypatch.setattr("opd_ray.watch.guard._MOST_NON_FINITE", 1)
    seen, guard = [], {"level": "rollback"}
    with pytest.raises(GuardOrder) as order:
        run(make_pipeline(learner_metrics={2: {"loss": float("nan")}}, guard=guard), seen.append)
    (made,) = seen
    assert order.value.order == "rollback"
    assert made.recording.reports[-1].events[0].level == "rollback"
    assert made.recording.reports[-1].step == 3


def test_what_the_guard_raises_is_in_the_next_step():
    made = run(make_pipeline(steps=3, buffer={"golden_per_prompt": 0.5}), at_full_strength)
    assert [sources(report).count("golden") for report in made.recording.reports] == [8, 8, 8]
    assert made.learner.plans[0].coefficients.reference == pytest.approx(0.25)
    assert made.learner.plans[0].coefficients.mask_truncated_tails


def test_all_but_some_probes_end_at_the_horizon():
    rollout, teacher = {"horizon": [[0, 6], [3, 12]], "responses_per_prompt": 2}, {"teacher_per_prompt": 1}
    more = {"buffer": teacher, "loss": {"teacher": {"coef": 1}}}
    made = run(make_pipeline(rollout=rollout | {"max_response_tokens": 9}, **more))
    for step, report in enumerate(made.recording.reports):
        horizon = (6, 8)[step] if step < 2 else None  # then it is beyond the budget
        for meta in (entry.meta for entry in report.entries):
            student = meta.source == "student"
            assert meta.horizon == (horizon if student else None)
            assert meta.whole == (horizon is None or not student or meta.slot % 4 == 0)
        assert report.metrics.get("rollouts/whole") == (2 if horizon else None)


@pytest.mark.parametrize("slowest", [0, 20])
def test_the_guards_horizon_is_that_of_the_step_whenever_its_rollouts_are_asked_for(slowest):
    def shortened(made):
        made.guard.restore(made.guard.state() | {"notch": 1, "horizons": [[0, 1.0], [2, 0.5]]})

    guard = {"min_horizon": 0.25}
    made = run(make_pipeline(slowest=slowest, rollout={"max_response_tokens": 80}, guard=guard), shortened)
    found = [{entry.meta.horizon for entry in report.entries} for report in made.recording.reports]
    assert [each - {None} for each in found] == [set(), set(), {40}, {40}, {40}, {40}]


def test_golden_rollouts_that_only_the_guard_mixes_in_are_scored_for_the_reference():
    """The bug: nobody had asked the reference about them, and the run died when its rescue began."""
    loss = {"golden": {"coef": 0}, "reference": {"on_golden": True}}
    made = run(make_pipeline(steps=1, buffer={"golden_per_prompt": 0}, loss=loss), at_full_strength)
    golden = [entry for entry in made.recording.reports[0].entries if entry.meta.source == "golden"]
    assert len(golden) == 8
    assert all(set(entry.scores) == {"reference"} for entry in golden)


def test_the_guards_golden_rollouts_also_join_steps_that_are_on_policy_only():
    made = run(make_pipeline(steps=4, buffer={"on_policy_probability": 1.0}), at_full_strength)
    assert [sources(report).count("golden") for report in made.recording.reports] == [8] * 4


def test_an_event_about_a_loss_that_is_not_finite_names_the_rollouts():
    made = run(make_pipeline(learner_metrics={2: {"loss": float("nan")}}, guard={"level": "act"}))
    (event,) = [event for report in made.recording.reports for event in report.events]
    assert "(the loss is not finite for 3-0)" in event.action


def test_the_first_teacher_writes_for_its_own_prompts_only():
    rows = [{"id": str(i), "prompt": "p", "answer": "a", "teacher": ("teacher", "code")[i % 2]} for i in range(64)]
    more = {
        "rows": rows,
        "more_teachers": {"code": {}},
        "buffer": {"teacher_per_prompt": 1.0, "teacher_filter": "none"},
    }
    made = run(make_pipeline(steps=4, loss={"teacher": {"coef": 1}}, **more, **OFF))
    student = {e.meta.slot for r in made.recording.reports for e in r.entries if e.meta.teacher == "code"}
    teacher = {e.meta.slot for r in made.recording.reports for e in r.entries if e.meta.source == "teacher"}
    assert student and teacher and not student & teacher
