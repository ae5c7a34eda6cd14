"""What prompts are taught by where verdicts decide it, and what keeps a few lucky ones from deciding."""

import dataclasses
import itertools
import json

import pytest

import fake_ray
from driven_run import cast_of, drive
from fake_rooms import Cast, make_pipeline
from fake_workers import FakeTeacherGenerator
from opd_ray.buffer.evidence import Evidence, Verdicts, weighed
from opd_ray.buffer.plan import group_advantages
from opd_ray.config import Config, from_dict
from opd_ray.errors import InputError
from opd_ray.messages import Coefficients, Entry
from small_messages import entry

REWARD = {"loss": {"advantage": {"reward_coef": 1.0}}, "rollout": {"responses_per_prompt": 4}}
PAIRED = {"golden_pairing": "prompt"}
COEFFICIENTS = Coefficients(student=0.25, golden=0.75, teacher=0.0, reference=0.0)


def configured(evidence: dict | None = None, **sections) -> Config:
    buffer = {"evidence": evidence or {}, **PAIRED} | sections.pop("buffer", {})
    return from_dict({"buffer": buffer, **sections})


def step_of(prompt: str, teacher: str = "", student: str = "+", *, golden: bool = False, slot: int = 0) -> list[Entry]:
    """Rollouts of one prompt, with their verdicts: right, wrong, or given up (?)."""
    numbers = itertools.count()

    def rollouts(verdicts: str, source: str) -> list[Entry]:
        return [
            entry(
                slot,
                source=source,
                prompt_id=prompt,
                rollout_id=f"{slot}-{source}{next(numbers)}",
                correct=each == "+",
                no_verdict=each == "?",
            )
            for each in verdicts
        ]

    judged = [dataclasses.replace(each, taught_by="nothing") for each in rollouts(teacher, "teacher")]
    return [*rollouts(student, "student"), *judged, *rollouts("+" * golden, "golden")]


def choice(config: Config, *args, **kwargs) -> str:
    entries = Evidence(config).teach(0, step_of("p", *args, **kwargs), COEFFICIENTS)
    (found,) = {each.taught_by for each in entries if each.meta.source == "student"} - {None}
    return found


# ---- bounds ----


def test_bounds_are_wilsons():
    # Newcombe (1998), 81 of 263 at 95 % on both sides: .2553 to .3662.
    assert (Verdicts(81, 263).lower(1.959964), Verdicts(81, 263).upper(1.959964)) == pytest.approx(
        (0.2553, 0.3662), abs=5e-5
    )
    assert (Verdicts().lower(1.3), Verdicts().upper(1.3)) == (0, 1), "nothing is known"
    assert (Verdicts(0, 3).lower(1.3), Verdicts(3, 3).upper(1.3)) == pytest.approx((0, 1))
    assert Verdicts(2, 3).lower(0) == Verdicts(2, 3).upper(0) == pytest.approx(2 / 3)
    assert Verdicts(0.2, 0.25).lower(1.3) < Verdicts(8, 10).lower(1.3), "a faded verdict shows less"


# ---- the rule ----


def test_a_teacher_is_trusted_when_enough_of_its_responses_are_right():
    assert choice(configured(), "+++") == "teacher"
    assert choice(configured(), "++-+++") == "teacher"
    assert choice(configured(), "---") == "nothing"


def test_one_lucky_response_is_no_evidence():
    assert choice(configured(), "+", golden=True) == "golden"
    assert choice(configured(**REWARD), "+", "+-") == "reward"
    assert choice(configured(), "", golden=True) == "golden", "nor is none"


def test_without_confidence_it_is_the_rule_of_tgopd():
    tgopd = configured({"confidence": 0.5, "threshold": 0.66}, **REWARD)
    assert [choice(tgopd, each, "+--+") for each in ("+++", "++-", "+--", "---")] == [
        "teacher",
        "teacher",
        "reward",
        "reward",
    ]


def test_a_golden_solution_comes_before_the_reward_and_the_reward_needs_verdicts_that_differ():
    config = configured(**REWARD)
    assert choice(config, "---", "+-", golden=True) == "golden"
    assert choice(config, "---", "+-") == "reward"
    assert choice(config, "---", "--") == choice(config, "---", "++") == "nothing"
    assert choice(config, "---", "+?") == "nothing", "a verdict that was given up is none"
    assert choice(configured(), "---", "+-") == "nothing", "a reward without weight teaches nothing"


def test_golden_solutions_that_have_no_weight_yet_are_in_nobodys_place():
    entries = step_of("p", "---", golden=True)
    taught = Evidence(configured()).teach(0, entries, dataclasses.replace(COEFFICIENTS, golden=0.0))
    assert {each.taught_by for each in taught} == {"nothing", None}


def test_a_student_that_is_shown_to_be_better_is_not_taught_by_the_teacher():
    evidence = Evidence(configured({"threshold": 0.2}))
    evidence.learn(0, step_of("p", "++----", "++++++++++++"))
    assert evidence._choose(Verdicts(2, 6), Verdicts(12, 12), [], solved=True) == "golden"
    assert evidence._choose(Verdicts(4, 6), Verdicts(4, 6), [], solved=True) == "teacher"


def test_verdicts_that_were_given_up_count_on_neither_side():
    """An adversary: a verifier that times out on all that the teacher writes makes it neither right nor wrong."""
    evidence = Evidence(configured())
    evidence.learn(0, step_of("p", "???", "?"))
    assert evidence.state()["p"][:2] == [[0, 0], [0, 0]]
    assert evidence.probes("p") == 3
    assert choice(configured(), "+++???") == "teacher"
    config = configured(**REWARD)
    entries = Evidence(config).teach(0, step_of("p", "---", "+-?"), COEFFICIENTS)
    assert [each.taught_by for each in entries[:3]] == ["reward", "reward", "nothing"]
    advantages = [each.reward_advantage for each in group_advantages(entries, std=False)]
    assert advantages == [0.5, -0.5, 0, 0, 0, 0], "nor in the group's mean"


# ---- what is kept ----


def test_what_was_seen_of_the_student_fades_and_of_the_teacher_does_not():
    evidence = Evidence(configured({"half_life_steps": 10}))
    evidence.learn(0, step_of("p", "+++", "++++"))
    evidence.learn(20, step_of("p", "", "----"))
    teacher, student, step, *_ = evidence.state()["p"]
    assert (teacher, student, step) == ([3, 3], [1, 5], 20)


def test_evidence_survives_a_checkpoint():
    evidence = Evidence(configured())
    evidence.learn(3, step_of("p", "+++", "+-") + step_of("q", "---", slot=1))
    again = Evidence(configured(), json.loads(json.dumps(evidence.state())))
    assert again.state() == evidence.state() and again.map() == evidence.map()
    assert again.probes("p") == again.probes("q") == 0 and again.probes("r") == 3
    (entry, *_) = again.teach(9, step_of("p"), COEFFICIENTS)
    assert entry.taught_by == "teacher", "by what was seen before"


def test_probes_are_few_and_once_more_where_they_leave_it_open():
    evidence = Evidence(configured())
    seen = [each.meta for each in step_of("p", "++-+--", student="")]
    assert [evidence.probes("p", seen[:n]) for n in (0, 1, 3, 4, 6)] == [3, 2, 3, 2, 0]
    sure = [each.meta for each in step_of("p", "+++", student="")]
    assert evidence.probes("p", sure) == 0


# ---- what follows ----


@pytest.mark.parametrize("reduction", ["token", "sum"])
def test_a_golden_solution_weighs_what_it_did_and_as_much_as_the_rollouts_in_whose_place_it_is(reduction):
    config = configured(loss={"reduction": reduction})
    entries = step_of("p", "---", "++++", golden=True)
    for slot, prompt in enumerate("qrs", start=1):
        entries += step_of(prompt, "+++", "++++", golden=prompt != "s", slot=slot)
    taught = Evidence(config).teach(0, entries, COEFFICIENTS)
    golden = {each.meta.prompt_id: each.weight for each in taught if each.meta.source == "golden"}
    # Three golden rollouts: of their mean, .75 c/3 shall be .25/4; of their sum, .75 c the .25 of four rollouts.
    assert golden["p"] == pytest.approx(1 + {"token": 0.25, "sum": 4 / 3}[reduction]) and golden["q"] == 1
    assert [each.weight for each in taught if each.meta.source == "student"] == [0] * 4 + [1] * 12
    assert weighed(taught, COEFFICIENTS, config) == taught, "a replay gives the same"


def test_only_rollouts_that_the_reward_teaches_have_an_advantage():
    config = configured(**REWARD)
    entries = step_of("p", "---", "+---") + step_of("q", "+++", "++--", slot=1)
    found = group_advantages(Evidence(config).teach(0, entries, COEFFICIENTS), std=False)
    student = [each.reward_advantage for each in found if each.meta.source == "student"]
    assert student == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]


def test_the_map_counts_prompts_by_shares_and_by_length():
    evidence = Evidence(configured(**REWARD))
    for number in range(12):
        prompt = step_of(str(number), "+++" if number < 8 else "---", "+-", slot=number)
        for at, each in enumerate(prompt):
            prompt[at] = dataclasses.replace(each, meta=dataclasses.replace(each.meta, num_prompt_tokens=4 + number))
        evidence.learn(0, evidence.teach(0, prompt, COEFFICIENTS))
    found = evidence.map()
    assert found["prompts"] == 12 and found["taught_by"] == {"teacher": 8, "reward": 4}
    assert sorted(found["shares"]) == [[0, 2, {"reward": 4}], [4, 2, {"teacher": 8}]]
    assert [row[:2] for row in found["lengths"]] == [[4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15]]
    assert found["lengths"][0][2:] == [6, 6, 2, 4, {"teacher": 2}]
    assert found["lengths"][-1][2:] == [0, 6, 2, 4, {"reward": 2}]


# ---- in a run ----

EVIDENCE = {
    "buffer": {"golden_per_prompt": 0, "evidence": {}},
    "loss": {"golden": {"coef": 0}, "reference": {"coef": 0}, "advantage": {"reward_coef": 1.0}},
    "rollout": {"responses_per_prompt": 2, "prompts_per_call": 2},
    "guard": {"level": "off"},
}
TWO_PROMPTS = [{"id": name, "prompt": "p", "answer": "a"} for name in "ab"]


def asked_of_the_teacher(cast: Cast) -> list[int]:
    return [slot for event in cast.log if event[0] == "generate" and event[3] == "teacher" for slot in event[1]]


def test_a_prompt_is_probed_once_in_a_run_and_its_probes_are_not_trained_on():
    async def whole():
        made = await make_pipeline(steps=4, prompts_per_step=2, max_staleness=0, rows=TWO_PROMPTS, **EVIDENCE)
        await made.pipeline.run([made.recording])
        return made

    made = fake_ray.run(whole())
    assert sorted(asked_of_the_teacher(made.cast)) == [0, 1], "three at once: the fake's are all right or all wrong"
    trained = [each for plan in made.learner.plans for batch in plan.micro_batches for each in batch]
    assert {each.meta.source for each in trained} == {"student"} and len(trained) == 16
    assert {each.weight for each in trained if each.taught_by == "teacher"} == {1}
    first, *others = made.recording.reports
    assert [each.taught_by for each in first.entries if each.meta.source == "teacher"] == ["nothing"] * 6
    assert not any(each.meta.source == "teacher" for report in others for each in report.entries)
    assert first.metrics["mixture/taught_by_teacher_share"] == first.metrics["mixture/taught_by_nothing_share"] == 0.5
    assert "mixture/teacher_rollouts" not in first.metrics and first.metrics["mixture/teacher_right_share"] == 0.5


def test_what_the_mixture_has_the_teacher_write_counts_as_evidence():
    buffer = EVIDENCE["buffer"] | {"teacher_per_prompt": 2, "teacher_filter": "none"}
    loss = EVIDENCE["loss"] | {"teacher": {"coef": 0.1}}

    async def whole():
        made = await make_pipeline(
            steps=2,
            prompts_per_step=2,
            max_staleness=0,
            rows=TWO_PROMPTS,
            **EVIDENCE | {"buffer": buffer, "loss": loss},
        )
        await made.pipeline.run([made.recording])
        return made

    first, second = fake_ray.run(whole()).recording.reports
    assert [each.taught_by for each in first.entries if each.meta.source == "teacher"] == [None, None, "nothing"] * 2
    assert first.metrics["mixture/teacher_rollouts"] == second.metrics["mixture/teacher_rollouts"] == 4
    assert sum(each.meta.source == "teacher" for each in second.entries) == 4, "known by then"


def test_a_run_that_resumes_knows_what_it_saw_and_says_so_in_the_end(tmp_path):
    summary, _ = drive(tmp_path, cast_of(**EVIDENCE, learner={"steps": 4}))
    assert summary["evidence"]["prompts"] == 8 and set(summary["evidence"]["taught_by"]) == {"teacher", "nothing"}
    again = cast_of(**EVIDENCE, learner={"steps": 6})
    summary, _ = drive(tmp_path, again, resume=True)
    assert summary["evidence"]["prompts"] == 12
    assert min(asked_of_the_teacher(again)) == 8, "what was seen before is not asked again"


def test_the_second_round_goes_on_where_the_first_ended():
    """The bug would be probes that are the same responses twice: ids and seeds are those of later numbers."""

    class Undecided(FakeTeacherGenerator):
        async def generate(self, groups, sampling):
            asked.append([(group.first_response, group.num_responses) for group in groups])
            metas, payload = await super().generate(groups, sampling)
            return [dataclasses.replace(each, correct=at % 3 < 2) for at, each in enumerate(metas)], payload

    asked: list = []

    async def whole():
        made = await make_pipeline(
            steps=1,
            prompts_per_step=2,
            prepare=lambda cast: setattr(cast, "teacher_generator", Undecided),
            **EVIDENCE,
        )
        await made.pipeline.run([made.recording])

    fake_ray.run(whole())
    assert asked == [[(0, 3), (0, 3)], [(3, 3), (3, 3)]]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"buffer": {"golden_pairing": "shuffled"}}, "set buffer.golden_pairing=prompt"),
        ({"loss": {"golden": {"divergence": "forward_kl"}}}, "loss.golden.divergence must be cross_entropy"),
        (
            {"loss": {"student": {"divergence": "cross_entropy"}}},
            "is about the teacher that loss.student compares with",
        ),
        ({"buffer": {"on_policy_probability": 0.5}}, "leave one of the two out"),
        ({"more_teachers": {"other": {}}}, "looks at one teacher, but there are more_teachers"),
        ({"teacher": {"privileged": True}}, "which teacher.privileged shows the solution to"),
        ({"teacher": {"update": "average"}}, "which teacher.update=average changes"),
        ({"rollout": {"horizon": 20}}, "buffer.evidence judges whole responses"),
        (
            {"loss": {"advantage": {"reward_coef": 1}}, "rollout": {"responses_per_prompt": 2, "temperature": 0.7}},
            "needs rollout.temperature=1",
        ),
        ({"loss": {"advantage": {"reward_coef": 1}}}, "responses_per_prompt must be 2 or more"),
        ({"buffer": {"evidence": {"probes": 1, "threshold": 0.9}}}, "no teacher would be trusted"),
        ({"buffer": {"evidence": {"confidence": 1.0}}}, "buffer.evidence.confidence"),
    ],
)
def test_what_evidence_cannot_decide_is_refused(sections, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        configured(**sections)


def test_a_reward_beside_a_divergence_needs_evidence_to_leave_prompts_to_it():
    with pytest.raises(InputError, match=r"without buffer.evidence a reward is part of k1 alone"):
        from_dict({"loss": {"advantage": {"reward_coef": 1}}, "rollout": {"responses_per_prompt": 2}})


def test_evidence_has_the_teacher_write_and_says_so_in_the_method():
    config = configured()
    assert config.buffer.has_teacher_write and not config.buffer.uses_teacher_rollouts
    assert config.method == "stableopd+evidence" and "teacher" not in config.sources
    assert not config.may_shorten
