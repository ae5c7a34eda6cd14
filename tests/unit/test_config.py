"""Configuration: defaults, YAML, overrides, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from opd_ray import config as configs
from opd_ray.config import (
    Config,
    EvaluationSet,
    LoraConfig,
    RepetitionConfig,
    RolloutConfig,
    describe,
    describe_absent,
    hints,
)
from opd_ray.errors import InputError
from opd_ray.generate import chosen_engine
from opd_ray.messages import RepetitionRule
from opd_ray.repetition import is_repetitive
from opd_ray.score.requests import score_requests

LOOPS = ["rollout.repetition_detection.min_pattern_size=1"]
SFT = ["rollout.responses_per_prompt=0", "loss.student.coef=0", "loss.reference.coef=0"]


def test_file_and_overrides_are_merged_over_the_defaults_in_that_order(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\nlearner:\n  lr: 1.0e-4\n  steps: 7\n")
    config = configs.load(file, ["learner.steps=9", "teacher.eos_token_ids=[1,2]"])
    assert (config.seed, config.learner.lr, config.learner.steps) == (3, 1e-4, 9)
    assert config.teacher.eos_token_ids == (1, 2)
    assert config.rollout == configs.load().rollout


OWN = ["student.path=/models/s", "teacher.path=/models/t", "data.prompts=p.jsonl", "data.evaluation=e.jsonl"]


def test_what_the_embedded_models_need_stays_with_them() -> None:
    """The bug: with models of one's own the printed command trained at 1.5e-3 and judged loops by 40 characters."""
    own, embedded = configs.load(None, [*OWN, "data.golden=g.jsonl"]), configs.load()
    assert (own.learner.lr, embedded.learner.lr) == (1e-6, 1.5e-3)
    assert (own.data.task, embedded.data.task) == ("math", "chain")
    assert (own.loss.golden.coef, embedded.loss.golden.coef) == (0.1, 0.75)
    assert embedded.repetition == (40, 1.7)
    assert configs.load(None, ["learner.lr=1e-4", "loss.student.top_k=4"]).loss.student.coef == 0.25


@pytest.mark.parametrize(("budget", "window"), [(8192, 10_000), (1024, 2048), (16, 40)])
def test_the_repetition_window_follows_the_length_budget(budget: int, window: int) -> None:
    """The bug: a student that writes one sentence two hundred times was not repetitive (.87, the threshold 1.7)."""
    config = configs.load(None, [*OWN, f"rollout.max_response_tokens={budget}"])
    assert config.repetition[0] == window
    if budget >= 1024:
        assert is_repetitive('"Wait, let me reconsider the problem from the start … " ' * 200, *config.repetition)
        rng = random.Random(0)
        prose = " ".join("".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 9))) for _ in range(4000))
        assert not is_repetitive(prose, *config.repetition)
        assert not is_repetitive(Path(configs.__file__).with_name("whole.py").read_text(), *config.repetition)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.prompts=p", "data.evaluation=e"], "teacher.path is the embedded one"),
        (["teacher.path=/t", "data.evaluation=e"], "data.prompts is the embedded one"),
        (["teacher.path=/t", "data.prompts=p"], "data.evaluation is the embedded one.*evaluation.num_problems=0"),
    ],
)
def test_a_student_of_ones_own_meets_nothing_embedded_unasked(overrides: list[str], message: str) -> None:
    """The bug: without data.evaluation a real model was evaluated on the embedded chains."""
    with pytest.raises(InputError, match=message):
        configs.load(None, ["student.path=/models/s", *overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "student.path=embedded-hrad",
            "student.path is embedded-hrad, expected embedded or embedded-hard, .*did you mean",
        ),
        (
            "teacher.path=embedded-hard",
            "teacher.path is embedded-hard, expected embedded or embedded-other-end or embedded-pairs or "
            "embedded-misled, or ./.*; it is a word of student.path, and embedded stands for the teacher",
        ),
        ("data.prompts=embedded-hard", "data.prompts is embedded-hard, expected embedded, or ./embedded-hard"),
        ("data.golden=embedded-prompts", "expected embedded or embedded:N or embedded:prompts, .*mean 'embedded:prom"),
        ("student.path=embedded-other-end", "expected embedded or embedded-hard, .*; it is a word of teacher.path"),
    ],
)
def test_a_word_that_stands_for_nothing_is_refused(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        configs.load(None, [override])
    assert "\n" not in str(refusal.value)


def test_what_is_no_mapping_is_no_configuration() -> None:
    with pytest.raises(InputError, match="Input should be a dictionary"):  # was an AttributeError
        configs.from_dict([])


def test_the_embedded_teacher_with_another_end_is_for_the_embedded_student() -> None:
    with pytest.raises(InputError, match="student.path is /models/s, but teacher.path is the embedded one"):
        configs.load(None, [*OWN, "teacher.path=embedded-other-end"])


SETS = ["evaluation.sets.aime24.samples=32", "evaluation.sets.aime24.path=a.jsonl", "evaluation.sets.math500.path=m"]


def test_sets_take_the_place_of_data_evaluation_and_what_they_leave_out_from_the_section() -> None:
    config = configs.load(None, [*OWN[:-1], *SETS, "evaluation.temperature=0.6", "rollout.max_response_tokens=90"])
    aime, math = config.evaluation_sets.values()
    assert (aime.samples, aime.temperature, aime.max_tokens, aime.num_problems) == (32, 0.6, 90, None)
    assert (math.path, math.samples, math.greedy) == ("m", 1, False)
    assert configs.from_dict(configs.to_dict(config)) == config
    (name, alone), *none = configs.load(None, OWN).evaluation_sets.items()
    assert (name, alone.path, alone.greedy, alone.num_problems, none) == ("held_out", "e.jsonl", True, 512, [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*OWN, *SETS], r"evaluation.sets have files of their own: make data.evaluation one of them"),
        ([*OWN[:-1], "evaluation.sets.aime24.samples=4"], r"evaluation.sets.aime24.path is the embedded one"),
        ([*OWN[:-1], "evaluation.sets.a-b.path=x"], r"a set's name has letters, digits and _.* got 'a-b'"),
        ([*OWN[:-1], "evaluation.sets.held_out.path=x"], r"got 'held_out'"),
        ([*OWN[:-1], "evaluation.sets.a.path=[]"], r"evaluation.sets.a: path is an empty list; give a source"),
        (
            [*OWN[:-1], "evaluation.sets.a.path=[{source: x, weight: 1}]"],
            r"sets.a: path has .* all of its problems count",
        ),
        (
            [*OWN[:-1], "evaluation.sets.a.path=[x, embedded]"],
            r"sets.a: path has embedded in a list, which stands alone",
        ),
        ([*OWN, "data.prompts=[x, embedded]"], r"data: prompts has embedded in a list, which stands alone"),
        ([*OWN, "data.golden=[x, embedded:64]"], r"data: golden has embedded:64 in a list, which stands alone"),
        ([*OWN[:-1], "evaluation.sets.a.path=x", "evaluation.sets.a.samples=0"], r"evaluation.sets.a.samples: .* 1"),
        (
            [*OWN[:-1], "evaluation.sets.a.sample=1"],
            r"'evaluation.sets.a.sample'; did you mean '.*.a.samples'",
        ),
    ],
)
def test_a_set_that_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        configs.load(None, overrides)


def test_a_configuration_survives_yaml(tmp_path: Path) -> None:
    config = configs.load(
        None, ["data.golden=null", "buffer.golden_per_prompt=0", "loss.golden.coef=[[0,0.0],[5,0.0]]", "seed=5"]
    )
    file = tmp_path / "config.yaml"
    file.write_text(configs.to_yaml(config))
    assert configs.load(file) == config


def count_leaves(section) -> int:
    """Fields that are not sections themselves."""
    if not dataclasses.is_dataclass(section):
        return 1
    return sum(count_leaves(getattr(section, field.name)) for field in dataclasses.fields(section))


def test_every_field_has_a_sentence_and_a_default() -> None:
    docs = {doc.name: doc for doc in configs.describe()}
    absent = list(configs.describe_absent())
    assert docs["learner.lr"].default == Config().learner.lr
    assert not [doc.name for doc in (*docs.values(), *absent) if not doc.doc.endswith(".")]
    assert len(absent) == sum(len(dataclasses.fields(each)) for each in (EvaluationSet, LoraConfig, RepetitionConfig))
    assert len(docs) == count_leaves(Config())
    assert docs["loss.student.divergence"].default == "reverse_kl"


@pytest.mark.parametrize(
    ("gpus", "backend"),
    [
        ({"learner.gpus_per_rank": 1, "rollout.gpus_per_generator": 1}, "nccl"),
        ({"learner.gpus_per_rank": 1, "rollout.gpus_per_generator": 0}, "gloo"),
        ({"learner.gpus_per_rank": 0.5, "rollout.gpus_per_generator": 0.5}, "gloo"),
        ({"learner.gpus_per_rank": 0.5, "rollout.gpus_per_generator": 1}, "nccl"),  # a whole one is its own
        ({"learner.gpus_per_rank": 0.6, "rollout.gpus_per_generator": 0.6}, "nccl"),  # two do not fit on one
        ({"learner.gpus_per_rank": 1, "rollout.gpus_per_generator": 0.5}, "nccl"),
        ({"learner.gpus_per_rank": 1, "rollout.gpus_per_generator": 0.5, "rollout.num_generators": 2}, "gloo"),
        ({"learner.gpus_per_rank": 1, "rollout.gpus_per_generator": 0.5, "rollout.max_generators": 2}, "gloo"),
        (
            {"learner.gpus_per_rank": 1, "rollout.gpus_per_generator": 0.5, "reference.gpus_per_actor": 0.4}
            | {"reference.update": "average"},
            "gloo",
        ),
        ({"learner.gpus_per_rank": 1, "rollout.gpus_per_generator": 0.5, "reference.gpus_per_actor": 0.5}, "nccl"),
    ],
)
def test_weights_travel_by_nccl_only_where_no_two_members_may_share_a_gpu(
    gpus: dict[str, object], backend: str
) -> None:
    """NCCL: "Duplicate GPU detected". A reference that does not follow the student takes no part."""
    config = configs.load(None, [f"{name}={value}" for name, value in gpus.items()])
    assert config.weight_backend == backend


def test_a_precision_that_is_left_out_is_that_of_the_rooms_device() -> None:
    config = configs.load(None, ["learner.gpus_per_rank=1", "reference.gpus_per_actor=0.5", "rollout.dtype=float32"])
    assert (config.learner.dtype, config.reference.dtype) == ("bfloat16", "bfloat16")
    assert (config.teacher.dtype, config.rollout.dtype) == ("float32", "float32")
    assert configs.from_dict(configs.to_dict(config)) == config, "what auto stood for is what is saved"


def test_an_engine_on_a_fraction_of_a_gpu_takes_that_fraction_of_its_share() -> None:
    """vLLM's gpu_memory_utilization is of the whole card: two engines on halves took .85 of it each."""
    config = configs.load(None, ["rollout.gpus_per_generator=0.5", "teacher.gpus_per_actor=2"])
    assert config.rollout.memory_share == pytest.approx(0.425)
    assert config.teacher.memory_share == config.reference.memory_share == 0.85


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learner.lrr=1"], "unknown field 'learner.lrr'; did you mean 'learner.lr'?"),
        (["leaner.lr=1"], "unknown field 'leaner'; did you mean 'learner'?"),
        (["sede=1"], "unknown field 'sede'; did you mean 'seed'?"),
        # The bug: it was learner.zero_stage, whose letters are more alike.
        (["learner.learning_rate=1e-6"], "unknown field 'learner.learning_rate'; did you mean 'learner.lr'?"),
        (["lr=1e-6"], "did you mean 'learner.lr'?"),
        (["rollout.max_new_tokens=9"], "did you mean 'rollout.max_response_tokens'?"),
        (["evaluation.sets.a.max_new_tokens=9"], "did you mean 'evaluation.sets.a.max_tokens'?"),
        (["optimizer.lr=1"], "did you mean 'learner'?"),
        (["jobs/gkd.yaml"], "section.field=value; a file is read with --config jobs/gkd.yaml"),
        # These were taken as they stand.
        (["learner.lr=inf"], "learner.lr: Input should be a finite number"),
        (["loss.golden.coef=[[0,.nan]]"], "loss.golden.coef"),
        (["learner.steps=true"], "config: learner.steps: is true, expected a number"),
        (["learner.adam_betas=[0.9,no]"], "config: learner.adam_betas: is false, expected a number"),
        (["loss.student.coef=yes"], "config: loss.student.coef: is true, expected a number"),
        (["buffer.max_staleness=100000"], "buffer.max_staleness: Input should be less than or equal to 64, got 100000"),
        (["learner.warmup_steps=151"], "warmup_steps=151 is longer than the run, which has steps=150"),
        (["checkpoint.directory=~/x"], "config: checkpoint: directory='~/x' is taken as it stands; give a whole path"),
        (["data.golden=none"], "config: data: golden=none names no source; give null for none"),
        (["data.prompts=[a.jsonl,'']"], "config: data: prompts=a.jsonl,  names no source; give a file"),
        (["student.lora.rnak=4"], "unknown field 'student.lora.rnak'; did you mean 'student.lora.rank'?"),
        (["rollout.repetition_detection.min_cuont=4"], "did you mean 'rollout.repetition_detection.min_count'?"),
        (["rollout.repetition_detection.min_pattern_size=70"], "min_pattern_size=70 is above max_pattern_size=64"),
        (["rollout.repetition_detection={}"], "min_count = 256 tokens, but no response has more than 80"),
        (
            ["loss.loop_advantage=-1"],
            "loss.loop_advantage=-1.0 is of student rollouts that rollout.repetition_detection",
        ),
        (["loss.loop_advantage=0", *LOOPS, *SFT], "ends, but there are no student rollouts"),
        (
            ["loss.loop_advantage=-1", *LOOPS, "rollout.top_p=0.9"],
            "loop_advantage=-1.0 estimates a mean over the student",
        ),
        (["loss.loop_advantage=1", *LOOPS], "loss.loop_advantage: Input should be less than or equal to 0"),
        (["rollout.horizon=80"], "rollout: horizon is at no step below max_response_tokens"),
        (["rollout.horizon=[[0,90],[9,100]]"], "rollout: horizon is at no step below max_response_tokens"),
        (["rollout.horizon=9", *SFT], "cuts student rollouts off, but there are none"),
        (["student.lora.rank=0"], "student.lora.rank: Input should be greater than or equal to 1, got 0"),
        (["student.lora.targets=[]"], "student.lora.targets"),
        (["learner.lr=fast"], "learner.lr"),
        (["learner.lr=0"], "learner.lr"),
        (["learner.zero_stage=4"], "learner.zero_stage"),
        (["learner=3"], "learner"),
        (["rollout.engine=sglang"], "rollout.engine"),
        (["seed"], "override 'seed' is not of the form section.field=value"),
        (["data.golden=null"], "data.golden is null"),
        (["buffer.golden_per_prompt=0"], "loss.golden.coef is above 0 but there are no golden rollouts"),
        (["loss.golden.coef=0"], "loss.golden.coef is 0"),
        (["loss.student.coef=0"], "student rollouts are made"),
        (["loss.teacher.coef=1"], "there are no teacher rollouts"),
        (["buffer.teacher_per_prompt=1"], "loss.teacher.coef is 0"),
        (["loss.student.coef=-1"], "loss.student.coef: expected values of 0 or more"),
        (["loss.student.coef=much"], "loss.student.coef"),
        (["loss.student.coef=[[10,1],[5,0]]"], "rising steps"),
        (["buffer.golden_per_prompt=-1"], "buffer.golden_per_prompt: expected values of 0 or more"),
        (["buffer.on_policy_probability=1.5"], "at most 1"),
        (["loss.student.top_k=0"], "loss.student.top_k"),
        (["loss.student.beta=1"], "loss.student.beta"),
        (["loss.golden.divergence=k3"], "needs tokens that the student sampled"),
        (["loss.golden.divergence=reverse_kl", "loss.golden.support=student_top_k"], "that the student sampled"),
        (["loss.student.entropy_gate=1", "loss.student.divergence=jsd"], "entropy_gate adds to"),
        (["loss.advantage.clip=2"], "advantage.* shapes student.divergence=k1"),
        (["loss.student.divergence=k1", "loss.advantage.reward_std=false"], "there is no reward"),  # was ignored
        # The bug: weights of the sampled token, .53 and .22 in the mean, on a divergence that does not depend on it.
        (["loss.importance.correction=truncate"], "it would correct nothing; take none, or divergence k1, k2 or k3"),
        (
            ["loss.importance.correction=mask", "loss.student.divergence=jsd"],
            "student.divergence=jsd does not depend on it",
        ),
        (
            ["loss.importance.correction=clip", "loss.student.divergence=k2"],
            "importance.correction=clip needs student.divergence=k1",
        ),
        (["loss.student.divergence=k1", "loss.advantage.discount=1"], "needs advantage.policy=behaviour"),
        (["loss.student.divergence=k1", "loss.advantage.teacher_coef=0"], "there is no advantage"),
        (
            [
                "loss.student.divergence=k1",
                "loss.student.entropy_gate=1",
                "loss.advantage.teacher_coef=0",
                "loss.advantage.reward_coef=1",
            ],
            "entropy_gate looks at a teacher",
        ),
        (
            [
                "loss.student.divergence=k1",
                "loss.student.position_weight=1.5",
                "loss.advantage.teacher_coef=0",
                "loss.advantage.constant=-0.5",
            ],
            "student.position_weight looks at a teacher",
        ),
        (["loss.student.outliers=mask"], "outliers=mask is about divergence=k1"),
        (["loss.student.divergence=cross_entropy", "loss.student.position_weight=2"], "position_weight looks at a"),
        (["loss.advantage.constant=-1"], "advantage.* shapes student.divergence=k1"),
        (["loss.student.divergence=k1", "loss.advantage.constant=0.2"], "loss.advantage.constant"),
        (["loss.student.divergence=k1", "loss.advantage.reward_coef=1"], "responses_per_prompt must be 2 or more"),
        (["loss.student.divergence=k1", "rollout.temperature=0.7"], "rollout.temperature=1"),
        (
            ["loss.importance.correction=truncate", "loss.student.divergence=cross_entropy", "rollout.top_p=0.9"],
            "rollout.top_p=1",
        ),
        (["loss.student.support=full", "teacher.engine=vllm"], "teacher.engine=torch"),
        (["loss.student.support=full", "teacher.engine=vllm", "teacher.gpus_per_actor=1"], "teacher.engine=torch"),
        (["loss.student.support=student_top_k", "teacher.engine=vllm"], "on GPUs alone (gpus_per_actor)"),
        (["loss.reference.estimator=full", "reference.engine=vllm"], "reference.engine=torch"),
        (["loss.reference.estimator=k3", "rollout.temperature=0.7"], "loss.reference.estimator=k3 estimates a mean"),
        (["loss.reference.estimator=k2", "rollout.top_p=0.9"], "or estimator=top_k or full"),
        (["loss.reference.estimator=k3", "loss.reference.on_golden=true"], "take estimator=top_k or full"),
        (["loss.reference.estimator=k2", "loss.reference.on_golden=true"], "that the student sampled"),
        (["reference.update=average", "reference.engine=vllm"], "needs engine=torch"),
        (["reference.update=average", "loss.reference.estimator=full"], "cannot be compared with"),
        (["teacher.update=average", "loss.student.support=full"], "cannot be compared with loss.student.support=full"),
        (["buffer.golden_pairing=prompt", "buffer.golden_per_step=5"], "golden_per_step must be 0"),
        (["buffer.prompts_per_step=4", "buffer.golden_per_prompt=0.1"], "rounds to no golden rollouts"),
        (
            ["rollout.responses_per_prompt=0", "loss.student.coef=0", "loss.reference.coef=0"]
            + ["buffer.on_policy_probability=0.5"],
            "needs student rollouts for its on-policy steps",
        ),
        (
            ["rollout.responses_per_prompt=0", "loss.student.coef=0", "loss.reference.coef=0"]
            + ["buffer.golden_per_prompt=0", "loss.golden.coef=0"],
            "no rollouts of any source",
        ),
        (["learner.adam_betas=[2,-1]"], "learner.adam_betas"),
        (["buffer.golden_pairing=prompt", "buffer.golden_per_prompt=2"], "golden_per_prompt is at most 1"),
        (["rollout.max_response_tokens=[[0,0],[5,80]]"], "1 or more at every step"),
        (["more_teachers.teacher.path=x"], "the name 'teacher' is taken"),
        (
            ["buffer.golden_per_prompt=0", "loss.golden.coef=0", "loss.golden.divergence=forward_kl"],
            "only the guard mixes golden rollouts in",
        ),
        (["guard.truncation_rate=[0.5,0.2,0.9]"], "guard"),
        (["buffer.prompts_per_step=0", "buffer.golden_per_prompt=0"], "train on nothing"),
        (["weights.backend=nccl"], "needs GPUs"),
        (
            ["weights.backend=nccl", "learner.gpus_per_rank=0.5", "rollout.gpus_per_generator=0.5"],
            "refuses two members on one GPU",
        ),
        (["learner.gpus_per_rank=0.5", "learner.num_ranks=2"], "may put two of 2 ranks on one GPU"),
        (["rollout.gpus_per_generator=0.5", "rollout.tensor_parallel_size=2"], "spans whole GPUs"),
        # Once accepted: the first broadcast waited for workers that there were not.
        (["rollout.engine=torch", "rollout.tensor_parallel_size=2"], "needs engine=vllm, but it is torch"),
        (["teacher.engine=vllm", "teacher.gpus_per_actor=0.5", "teacher.tensor_parallel_size=2"], "spans whole GPUs"),
        (
            ["learner.gpus_per_rank=1", "rollout.gpus_per_generator=1", "reference.update=average"],
            "reference.update=average joins the broadcast",
        ),
        (["student=[1]"], "student: Input should be a dictionary"),  # was a traceback of OmegaConf's
        (["rollout=???"], "rollout: Input should be a dictionary"),  # its word for what is missing was no value at all
    ],
)
def test_impossible_values_are_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        configs.load(None, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vllm_on_a_gpu_scores_the_students_top_k() -> None:
    student_top_k = ["loss.student.support=student_top_k", "teacher.engine=vllm", "teacher.gpus_per_actor=1"]
    assert configs.load(None, student_top_k).teacher.may_choose_tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "expected a mapping"),
        ("a: [1\n", "run.yaml"),
        (None, "No such file"),
        ("a: 1\n", "unknown field 'a'"),
        ("rollout.top_p: 1\n", "stands in its section, as rollout: {top_p: ...}$"),  # was asked whether it meant itself
        ("student: {lora.rank: 1}\n", "'student.lora.rank'; .* as lora: {rank: ...}$"),
        ("a: {b: 1, b: 2}\n", "duplicate key"),
        ("", "run.yaml: sets nothing; set a field"),
        ("#learner:\n#  steps: 3\n", "run.yaml: sets nothing; set a field"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        configs.load(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "method"),
    [
        ([], "stableopd"),
        (["loss.reference.coef=0"], "opd+mixture"),
        (["buffer.golden_per_prompt=0", "loss.golden.coef=0"], "opd+reference_kl"),
        (["buffer.golden_per_prompt=0", "loss.golden.coef=0", "loss.reference.coef=0"], "opd"),
        (["buffer.on_policy_probability=0.5"], "gkd"),
        (
            ["buffer.prompts_per_step=0", "buffer.golden_per_step=8", "loss.student.coef=0", "loss.reference.coef=0"],
            "sft",
        ),
    ],
)
def test_the_method_is_named_after_what_the_coefficients_amount_to(overrides: list[str], method: str) -> None:
    assert configs.load(None, overrides).method == method


def test_a_bare_off_in_yaml_is_the_guards_off() -> None:
    """The bug: YAML reads it as false, and false was refused."""
    assert configs.load(None, ["guard.level=off"]).guard.level == "off"


@pytest.mark.parametrize(
    ("overrides", "scorers"),
    [
        (["student.lora={}"], ["teacher"]),
        (["student.lora.rank=4", "student.path=/s", "reference.path=/s"], ["teacher"]),
        (["student.lora={}", "loss.reference.estimator=full", "reference.engine=vllm"], ["teacher"]),
        (["student.lora={}", "reference.path=/other"], ["teacher", "reference"]),
        (["student.lora={}", "reference.update=average"], ["teacher", "reference"]),
        (["student.lora={}", "reference.url=http://host:1"], ["teacher", "reference"]),
        ([], ["teacher", "reference"]),
    ],
)
def test_with_adapters_the_base_is_the_reference_and_no_actors_start_for_it(
    overrides: list[str], scorers: list[str]
) -> None:
    own = ["teacher.path=/t", "data.prompts=p", "data.golden=g", "data.evaluation=e"]
    config = configs.load(None, [*overrides, *own])
    assert list(config.scorers) == scorers and config.uses_reference
    asked = score_requests(config, (1,))["student"]
    assert list(asked) == scorers and config.learner_is_reference == ("reference" not in scorers)


def test_adapters_are_of_the_run_and_their_scale_is_alpha_over_rank() -> None:
    config = configs.load(None, ["student.lora.rank=8", "student.lora.targets=[q_proj, v_proj]"])
    assert config.student.lora == LoraConfig(rank=8, alpha=32, targets=("q_proj", "v_proj"))
    assert config.student.lora.scale == 4 and configs.from_dict(configs.to_dict(config)) == config
    assert configs.binding.binding(Config, "student.lora.rank") == configs.RUN


def test_loops_end_in_the_engine_where_that_is_asked_for() -> None:
    assert configs.load().rollout.repetition_rule is None
    config = configs.load(None, ["rollout.repetition_detection={min_pattern_size: 4}"])
    assert config.rollout.repetition_rule == RepetitionRule(64, 4, 8)
    assert configs.from_dict(configs.to_dict(config)) == config


def test_setting_another_field_of_the_reference_leaves_it_the_student() -> None:
    """The bug: given one field, the section forgot that its path is the student's and took the teacher's."""
    assert configs.load(None, ["reference.num_actors=2"]).reference.path == configs.STUDENT


def test_what_other_trainers_names_stand_for_is_there() -> None:
    names = {doc.name for doc in (*describe(), *describe_absent())}
    assert [
        ours for ours in hints._ELSEWHERE.values() if not any(f"{name}.".startswith(f"{ours}.") for name in names)
    ] == []


def test_models_of_less_than_three_million_parameters_generate_with_torch_on_cpus_unless_vllms_fields_are_set(
    tiny_model: dict[str, Path],
) -> None:
    rollout, path = RolloutConfig(), str(tiny_model["tied"])
    assert [rollout.engine_for(size) for size in (1e6, 3e6, 1e9)] == ["torch", "vllm", "vllm"]
    assert chosen_engine(path, rollout) == "torch"
    vllms = {"gpus_per_generator": 1, "tensor_parallel_size": 2, "kv_cache_bytes": 10**5, "engine_args": {"x": 1}}
    for field, value in {**vllms, "engine": "vllm"}.items():
        asks = RolloutConfig(**{field: value})
        assert asks.engine_for(1e6) == chosen_engine("not looked at", asks) == "vllm"
    assert RolloutConfig(engine="torch").engine_for(1e9) == "torch"
