"""The objective of a step: what it adds up, how it may be cut, and what it says about itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from objective_step import COEFFICIENTS, Step, config_with, cut, take, whole
from opd_ray.errors import RunError
from opd_ray.learn.heads import ResponseModel
from opd_ray.learn.losses.diagnostics import finish
from opd_ray.learn.microbatch import collate, fetch_payloads
from opd_ray.messages import SCORE_SCHEMA, Coefficients, Entry, RepetitionRule
from opd_ray.repetition import repeated_ngrams
from opd_ray.watch.catalogue import METRICS, metric
from scored_rollouts import Scoring, head_of, scored_entries

BOTH = ("teacher", "reference")
STOPS = (1, 2)
EVERYTHING = Scoring(
    given=6, hidden=True, stop_token_ids=STOPS, roles={"student": BOTH, "golden": BOTH, "teacher": BOTH}
)
SIZES = {"student": [(3, 9), (8, 2), (5, 14), (1, 1), (6, 6)], "golden": [(4, 12), (2, 5)], "teacher": [(3, 4), (2, 8)]}
MASKED = dataclasses.replace(COEFFICIENTS, mask_truncated_tails=True)


def scorer_of(entries: list[Entry], role: str) -> torch.Tensor:
    """[N, V] float64 of a scorer, from its hidden states."""
    rows = [entry.scores[role].slice(entry.row, 1).to_pylist()[0]["hidden"] for entry in entries]
    hidden = torch.tensor([value for row in rows for value in row]).reshape(-1, head_of(role).weight.shape[1])
    return head_of(role)(hidden).double().log_softmax(-1)


def make_step(stop_token_ids: tuple[int, ...]) -> list[Entry]:
    scoring = dataclasses.replace(EVERYTHING, stop_token_ids=stop_token_ids)
    entries = scored_entries(*SIZES.values(), seed=3, scoring=scoring, truncated=[0], looping=[2])
    return [dataclasses.replace(entry, reward_advantage=0.5 - index) for index, entry in enumerate(entries)]


STEPS = {stops: make_step(stops) for stops in ((1,), STOPS)}
STEP = STEPS[(1,)]


@pytest.fixture(scope="module")
def module(tiny_model: dict[str, Path]) -> ResponseModel:
    return ResponseModel(AutoModelForCausalLM.from_pretrained(tiny_model["tied"], dtype="float32"))


LOSSES: dict[str, dict[str, Any]] = {
    "default": {},
    "full jsd": {
        "student": {"divergence": "jsd", "support": "full"},
        "golden": {"divergence": "forward_kl", "support": "full"},
        "teacher": {"coef": 1, "divergence": "forward_kl"},
        "reference": {"estimator": "full", "on_golden": True},
    },
    "student's top-k": {
        "student": {"divergence": "reverse_kl", "support": "student_top_k", "tail": "stop_gradient"},
    },
    "k3": {
        "student": {"divergence": "k3"},
        "importance": {"correction": "mask", "mask_low": 0.9, "mask_high": 1.1},
    },
    "gated": {"student": {"entropy_gate": 1.0, "tail": "renormalise"}, "reduction": "sequence"},
    "policy gradient": {
        "student": {"divergence": "k1"},
        "advantage": {"reward_coef": 0.5, "extrapolation": 1.25, "clip": 2.0},
        "importance": {"correction": "clip"},
        "reference": {"estimator": "k3"},
        "reduction": "sum",
    },
    "reward to go": {"student": {"divergence": "k1"}, "advantage": {"policy": "behaviour", "discount": 0.9}},
    "gated policy gradient": {"student": {"divergence": "k1", "entropy_gate": 1.0, "support": "full"}},
    "grpo": {"student": {"divergence": "k1"}, "advantage": {"teacher_coef": 0, "reward_coef": 1}},
    "bounded": {
        "student": {"divergence": "k1", "outliers": "forward_kl", "position_weight": 1.5, "lowest_share": 0.4},
        "advantage": {"proximal": 0.2, "constant": -0.1},
    },
    "k2": {"student": {"divergence": "k2"}, "importance": {"correction": "truncate", "cap": 1.0}},
    "loops": {"student": {"divergence": "jsd", "support": "full"}, "loop_advantage": -1.5},
    "loops by sampled tokens": {"student": {"divergence": "k1"}, "loop_advantage": -0.5, "reduction": "sequence"},
}


def assert_same(step: Step, expected: Step) -> None:
    assert step.loss == pytest.approx(expected.loss, abs=2e-5, rel=1e-5)
    assert step.metrics == pytest.approx(expected.metrics, abs=2e-5, rel=1e-4)
    for gradient, wanted in zip(step.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=2e-5 * max(1.0, float(wanted.abs().max())), rtol=1e-4)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    loss=st.sampled_from(sorted(LOSSES)),
    num_ranks=st.integers(1, 12),
    budget=st.integers(1, 200),
    packing=st.booleans(),
    chunk_rows=st.integers(1, 90),
    masked=st.booleans(),
    stops=st.sampled_from(sorted(STEPS)),
)
def test_loss_and_gradient_do_not_depend_on_how_a_step_is_cut(
    module: ResponseModel,
    loss: str,
    num_ranks: int,
    budget: int,
    packing: bool,
    chunk_rows: int,
    masked: bool,
    stops: tuple[int, ...],
) -> None:
    """Against one padded micro-batch in one piece: packing, accumulation, more ranks than rollouts, chunks."""
    config, coefficients = config_with(LOSSES[loss]), MASKED if masked else COEFFICIENTS
    plans = cut(STEPS[stops], num_ranks, budget, packing, coefficients)
    step = take(module, plans, config, packing=packing, chunk_rows=chunk_rows, stop_token_ids=stops)
    assert_same(step, take(module, [whole(STEPS[stops], coefficients)], config, stop_token_ids=stops))


def logprobs_of(module: ResponseModel, entries: list[Entry]) -> torch.Tensor:
    """[N, V] float64 of the student, rollout by rollout, from the plain model."""
    rows = []
    for entry in entries:
        row = entry.rollouts.slice(entry.row, 1).to_pylist()[0]
        prompt, response = row["prompt_tokens"], row["response_tokens"]
        with torch.no_grad():
            logits = module.causal_lm(torch.tensor([prompt + response])).logits[0]
        rows.append(logits[len(prompt) - 1 : -1].double().log_softmax(-1))
    return torch.cat(rows)


def mean_kl(log_a: torch.Tensor, log_b: torch.Tensor) -> float:
    return (log_a.exp() * (log_a - log_b)).sum(-1).mean().item()


def test_the_step_loss_equals_its_definition(module: ResponseModel) -> None:
    """Σ coef · mean over each source's tokens, and the mean KL to the reference over all, straight from the logits."""
    config = config_with(
        {
            "student": {"divergence": "reverse_kl", "support": "full"},
            "teacher": {"coef": 1, "divergence": "forward_kl", "support": "full"},
            "reference": {"estimator": "full", "on_golden": True},
        }
    )
    scoring = dataclasses.replace(EVERYTHING, stop_token_ids=(1,))
    entries = scored_entries(*SIZES.values(), seed=3, scoring=scoring)
    step = take(module, [whole(entries)], config)
    parts = {name: [e for e in entries if e.meta.source == name] for name in SIZES}
    student, teacher = logprobs_of(module, parts["student"]), logprobs_of(module, parts["teacher"])
    golden_tokens = [
        token for e in parts["golden"] for token in e.rollouts.slice(e.row, 1).to_pylist()[0]["response_tokens"]
    ]
    golden = logprobs_of(module, parts["golden"])
    expected = {
        "loss_student": mean_kl(student, scorer_of(parts["student"], "teacher")),
        "loss_golden": -golden.gather(-1, torch.tensor(golden_tokens)[:, None]).mean().item(),
        "loss_teacher": mean_kl(scorer_of(parts["teacher"], "teacher"), teacher),
        "loss_reference": mean_kl(logprobs_of(module, entries), scorer_of(entries, "reference")),
    }
    assert {name: step.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    weights = zip((0.7, 0.4, 0.2, 0.3), expected.values(), strict=True)
    assert step.loss == pytest.approx(sum(weight * value for weight, value in weights), abs=1e-5)


def test_coefficients_are_the_plans_and_not_the_configurations(module: ResponseModel) -> None:
    step = take(module, [whole(STEP, Coefficients(0.0, 2.0, 0.0, 0.0))], config_with())
    assert step.loss == pytest.approx(2 * step.metrics["loss_golden"], rel=1e-6)


def test_the_kl_to_the_reference_leaves_golden_states_out_unless_told(module: ResponseModel) -> None:
    students = [entry for entry in STEP if entry.meta.source == "student"]
    apart = take(module, [whole(students)], config_with()).metrics["loss_reference"]
    together = take(module, [whole(STEP)], config_with()).metrics["loss_reference"]
    everywhere = take(module, [whole(STEP)], config_with({"reference": {"on_golden": True}})).metrics["loss_reference"]
    assert together == pytest.approx(apart, abs=1e-6)
    assert abs(everywhere - apart) > 1e-3


def test_a_masked_tail_gives_no_loss_and_keeps_its_place_in_the_mean(module: ResponseModel) -> None:
    """Rollout 2 is truncated and repeats from its seventh token on; rollout 0 is truncated without repeating itself."""
    config = config_with({"student": {"divergence": "k2"}, "reference": {"coef": 0.0}})
    students = [entry for entry in STEP if entry.meta.source == "student"]
    plain, masked = take(module, [whole(students)], config), take(module, [whole(students, MASKED)], config)
    logprobs = logprobs_of(module, students)
    values, kept, start = [], [], 0
    for entry in students:
        row = entry.rollouts.slice(entry.row, 1).to_pylist()[0]
        score = entry.scores["teacher"].slice(entry.row, 1).to_pylist()[0]["logprobs"]
        tokens = torch.tensor(row["response_tokens"])
        own = logprobs[start : start + len(tokens)].gather(-1, tokens[:, None]).squeeze(-1)
        values += (0.5 * (torch.tensor(score) - own).square()).tolist()
        kept += [not (entry is students[2] and t >= 6) for t in range(len(tokens))]
        start += len(tokens)
    count = len(values)
    assert plain.metrics["loss_student"] == pytest.approx(sum(values) / count, rel=1e-4)
    expected = sum(value for value, keep in zip(values, kept, strict=True) if keep) / count
    assert masked.metrics["loss_student"] == pytest.approx(expected, rel=1e-4)
    assert plain.metrics["truncated_weight_share"] == pytest.approx((9 + 14) / 32)
    assert masked.metrics["truncated_weight_share"] == pytest.approx((9 + 6) / (32 - 8))


@pytest.mark.parametrize(
    "student",
    [{"divergence": "reverse_kl", "support": "full"}, {"divergence": "k1"}],
    ids=lambda term: term["divergence"],
)
@pytest.mark.parametrize("advantage", [-0.5, 0.0])
def test_copies_of_a_loop_have_an_advantage_of_their_own_and_no_teacher(
    module: ResponseModel, student: dict[str, Any], advantage: float
) -> None:
    """Rollout 2 says one token 14 times and was ended for it: by the rule's first copy it was said once, the others are
    in the mean with −min(ρ A, clip(ρ, .8, 1.2) A), masked tail or not."""
    students = [entry for entry in STEP if entry.meta.source == "student"]
    config = config_with({"student": student, "reference": {"coef": 0.0}, "loop_advantage": advantage})
    logprobs = logprobs_of(module, students)
    taught, looped, start = [], [], 0
    for entry in students:
        row = entry.rollouts.slice(entry.row, 1).to_pylist()[0]
        tokens = torch.tensor(row["response_tokens"])
        ours, theirs = logprobs[start : start + len(tokens)], scorer_of([entry], "teacher")
        own, other = (each.gather(-1, tokens[:, None]).squeeze(-1) for each in (ours, theirs))
        kl = (ours.exp() * (ours - theirs)).sum(-1) if student["divergence"] == "reverse_kl" else -(other - own) * own
        ratio = (own - torch.tensor(row["behaviour_logprobs"])).exp()
        pushed = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        first = len(tokens) if entry is not students[2] else 1
        taught += kl[:first].tolist()
        looped += pushed[first:].tolist()
        start += len(tokens)
    for coefficients in (COEFFICIENTS, MASKED):
        step = take(module, [whole(students, coefficients)], config)
        assert step.metrics["loss_loop"] == pytest.approx(sum(looped) / start, rel=1e-4)
        assert len(looped) == 13 and step.metrics["loss_student"] == pytest.approx(sum(taught) / start, rel=1e-4)
        expected = 0.7 * (step.metrics["loss_student"] + step.metrics["loss_loop"])
        assert step.loss == pytest.approx(expected, rel=1e-5)


def test_the_part_of_a_loop_that_a_horizon_leaves_is_told_by_the_whole_response(module: ResponseModel) -> None:
    cut_off = dataclasses.replace(STEP[2], meta=dataclasses.replace(STEP[2].meta, horizon=4))
    for entry, expected in ((cut_off, [0, 1, 1, 1]), (STEP[0], [0] * 9), (STEP[5], None)):
        payloads, _ = fetch_payloads(whole([entry]), lambda refs: refs)
        [segment] = collate([entry], payloads, packing=False, loops=RepetitionRule(4, 3, 4)).segments
        assert (segment.looped if expected is None else segment.looped.tolist()) == expected


def test_sums_do_not_divide(module: ResponseModel) -> None:
    means, sums = (take(module, [whole(STEP)], config_with({"reduction": how})) for how in ("token", "sum"))
    assert sums.metrics["loss_student"] == pytest.approx(32 * means.metrics["loss_student"], rel=1e-5)
    assert sums.metrics["loss_golden"] == pytest.approx(17 * means.metrics["loss_golden"], rel=1e-5)


def test_metrics_are_means_over_the_tokens_that_they_concern(module: ResponseModel) -> None:
    """P(stop) of both models at true ends and at cuts, the advantage of repetitive tokens: from the plain models."""
    scoring = dataclasses.replace(EVERYTHING, stop_token_ids=(1,))
    entries = scored_entries(SIZES["student"], seed=3, scoring=scoring, truncated=[0], looping=[2])
    metrics = take(module, [whole(entries)], config_with()).metrics
    ours, theirs = logprobs_of(module, entries), scorer_of(entries, "teacher")
    lengths = torch.tensor([size for _, size in SIZES["student"]])
    last = lengths.cumsum(0) - 1
    ends, cuts = last[[1, 3, 4]], last[[0, 2]]
    for name, logprobs in (("student", ours), ("teacher", theirs)):
        assert metrics[f"eos_{name}_end"] == pytest.approx(logprobs[ends, 1].exp().mean().item(), abs=1e-6)
        assert metrics[f"eos_{name}_cut"] == pytest.approx(logprobs[cuts, 1].exp().mean().item(), abs=1e-6)
    [segment] = collate(entries, fetch_payloads(whole(entries), lambda refs: refs)[0], packing=False).segments
    teacher, tokens = segment.tokens.teachers["teacher"].logprobs, segment.tokens.tokens
    advantage = teacher - ours.gather(-1, tokens[:, None]).squeeze(-1)
    repetitive = torch.from_numpy(repeated_ngrams(tokens.numpy(), lengths.numpy())).bool()
    assert metrics["repetitive_share"] == pytest.approx(8 / 32)
    assert metrics["advantage"] == pytest.approx(advantage.mean().item(), abs=1e-5)
    assert metrics["advantage_repetitive"] == pytest.approx(advantage[repetitive].mean().item(), abs=1e-5)
    assert metrics["advantage_other"] == pytest.approx(advantage[~repetitive].mean().item(), abs=1e-5)
    assert metrics["teacher_logprob_repetitive"] == pytest.approx(teacher[repetitive].mean().item(), abs=1e-5)
    assert not any(name.startswith("_") for name in metrics)


def test_what_no_token_concerns_is_left_out() -> None:
    sums = {
        "advantage": -0.5,
        "repetitive_share": 0.25,
        "advantage_repetitive": 0.25,
        "_cut": 0.0,
        "eos_student_cut": 0.0,
    }
    assert finish(sums) == {
        "advantage": -0.5,
        "repetitive_share": 0.25,
        "advantage_repetitive": 1.0,
        "advantage_other": -1.0,
    }
    assert "advantage_repetitive" not in finish(sums | {"repetitive_share": 0.0, "advantage_repetitive": 0.0})
    assert finish({"loss_golden": 1.0}) == {"loss_golden": 1.0}


def test_a_source_that_the_step_lacks_has_no_metrics(module: ResponseModel) -> None:
    for source, own in (("student", "advantage"), ("golden", "golden_logprob"), ("teacher", "teacher_rollout_logprob")):
        entries = [entry for entry in STEP if entry.meta.source == source]
        metrics = take(module, [whole(entries)], config_with()).metrics
        assert {f"loss_{source}", own} <= metrics.keys()
        assert [name for name in metrics if name in ("loss_student", "loss_golden", "loss_teacher")] == [
            f"loss_{source}"
        ]


def test_every_metric_of_the_objective_is_in_the_catalogue_and_the_other_way_round(module: ResponseModel) -> None:
    logged = {name for loss in LOSSES.values() for name in take(module, [whole(STEP)], config_with(loss)).metrics}
    logged |= take(module, [whole(in_spans(STEP, np.arange))], config_with(SPANS)).metrics.keys()
    assert {name for name in logged if metric(f"learner/{name}") is None} == set()
    others = {
        "grad_norm",
        "lr",
        "trained_tokens",
        "wait_s",
        "train_s",
        "weight_sync_s",
    }  # the learner's, the pipeline's
    known = {name.removeprefix("learner/") for name in METRICS if name.startswith("learner/")}
    assert {metric(f"learner/{name}").name.removeprefix("learner/") for name in logged} == known - others


SPANS = LOSSES["reward to go"] | {"advantage": {"policy": "behaviour"}}


def in_spans(entries: list[Entry], number: Callable[[int], Any]) -> list[Entry]:
    """As a teacher with another tokenizer scores them: ``number`` gives the spans [T] of T tokens."""
    changed = []
    for entry in entries:
        scores = {}
        for role, payload in entry.scores.items():
            rows = payload.to_pylist()
            if role == "teacher" and entry.meta.source == "student":
                for row in rows:
                    row["spans"] = np.asarray(number(len(row["logprobs"])), np.int32)
            scores[role] = pa.RecordBatch.from_pylist(rows, schema=SCORE_SCHEMA)
        changed.append(dataclasses.replace(entry, scores=scores))
    return changed


@pytest.mark.parametrize(
    "advantage", [{}, {"proximal": 0.2}, {"extrapolation": 1.25, "clip": 2.0}, {"reward_coef": 0.5}], ids=str
)
def test_spans_of_one_token_are_the_tokens(module: ResponseModel, advantage: dict[str, Any]) -> None:
    config = config_with(SPANS | {"advantage": {"policy": "behaviour"} | advantage})
    step = take(module, [whole(in_spans(STEP, np.arange))], config)
    assert step.sums.pop("unaligned_share") == 0
    assert_same(step, take(module, [whole(STEP)], config))


def test_every_token_of_a_span_has_the_advantage_of_the_whole_span_and_one_of_none_has_0(module: ResponseModel) -> None:
    """However the step is cut: the sums are taken before it is."""
    entries = [entry for entry in STEP if entry.meta.source == "student"]
    config = config_with(SPANS | {"reference": {"coef": 0.0}})
    spans = [np.where(np.arange(length) < length - length % 3, np.arange(length) // 3, -1) for length in range(100)]
    expected, last, tokens = 0.0, 0, sum(entry.meta.num_response_tokens for entry in entries)
    for entry, logprobs in zip(entries, [logprobs_of(module, [entry]) for entry in entries], strict=True):
        row = entry.rollouts.slice(entry.row, 1).to_pylist()[0]
        scores = entry.scores["teacher"].slice(entry.row, 1).to_pylist()[0]
        own = logprobs.gather(-1, torch.tensor(row["response_tokens"])[:, None])[:, 0]
        ratios = np.array(scores["logprobs"]) - np.array(row["behaviour_logprobs"])
        number = spans[len(ratios)]
        last += (number < 0).sum()
        for span in range(number.max() + 1):
            expected -= ratios[number == span].sum() * own[number == span].sum().item() / tokens
    scored = in_spans(entries, lambda length: spans[length])
    for chunk_rows in (None, 4):
        for packing in (False, True):
            step = take(module, [whole(scored)], config, packing=packing, chunk_rows=chunk_rows)
            assert step.metrics["loss_student"] == pytest.approx(expected, rel=1e-4)
            assert step.metrics["unaligned_share"] == pytest.approx(last / tokens)


def test_a_span_of_which_a_horizon_leaves_a_part_is_none() -> None:
    """What the teacher says of all of it says nothing of a part."""
    entry = next(entry for entry in STEP if entry.meta.num_response_tokens == 9)
    for horizon, expected in ((4, [0, 0, 1, 1]), (5, [0, 0, 1, 1, -1]), (9, [0, 0, 1, 1, 2, 2, 3, 3, 4])):
        cut_off = dataclasses.replace(entry, meta=dataclasses.replace(entry.meta, horizon=horizon))
        [scored] = in_spans([cut_off], lambda length: np.arange(length) // 2)
        payloads, _ = fetch_payloads(whole([scored]), lambda refs: refs)
        [segment] = collate([scored], payloads, packing=False).segments
        assert segment.tokens.teachers["teacher"].spans.tolist() == expected


def test_scores_of_a_checkpoint_from_before_there_were_spans_have_none() -> None:
    """The bug: a run of an earlier version that was continued ended with a KeyError."""
    before = {role: payload.drop_columns(["spans"]) for role, payload in STEP[0].scores.items()}
    entry = dataclasses.replace(STEP[0], scores=before)
    payloads, _ = fetch_payloads(whole([entry]), lambda refs: refs)
    [segment] = collate([entry], payloads, packing=False).segments
    assert segment.tokens.teachers["teacher"].spans is None


def test_spans_are_compared_with_what_they_were_sampled_with(module: ResponseModel) -> None:
    config = config_with(SPANS | {"advantage": {}})
    with pytest.raises(RunError, match=r"set loss.advantage.policy=behaviour"):
        take(module, [whole(in_spans(STEP, np.arange))], config)


def test_the_reward_alone_needs_no_scores(module: ResponseModel) -> None:
    bare = [dataclasses.replace(entry, scores={}) for entry in STEP]
    config = config_with(LOSSES["grpo"] | {"reference": {"coef": 0.0}})
    step = take(module, [whole(bare)], config, heads={})
    assert math.isfinite(step.loss) and "advantage" not in step.metrics and "advantage_used" in step.metrics


TWO = {"more_teachers": {"code": {"weight": 3.0}}}


def scored_by(entries: list[Entry], roles: tuple[str, ...], seed: int = 3) -> list[Entry]:
    scoring = dataclasses.replace(EVERYTHING, roles={"student": (*roles, "reference")})
    other = scored_entries(SIZES["student"], seed=seed, scoring=scoring, truncated=[0, 2])
    return [dataclasses.replace(entry, scores=new.scores) for entry, new in zip(entries, other, strict=True)]


STUDENTS = scored_entries(SIZES["student"], seed=3, scoring=EVERYTHING, truncated=[0, 2])
ONLY_STUDENT = {"reference": {"coef": 0.0}, "student": {"divergence": "jsd", "support": "full"}}


def test_each_rollout_is_taught_by_its_own_teacher(module: ResponseModel) -> None:
    """The gradient of a routed step is the sum of those of its parts, each with the other's tokens in its mean."""
    first, second = scored_by(STUDENTS, ("teacher",)), scored_by(STUDENTS, ("code",))
    mixed = [*first[:2], *second[2:]]
    config = config_with(ONLY_STUDENT, **TWO)
    step = take(module, [whole(mixed)], config)
    losses = []
    for part in (mixed[:2], mixed[2:]):
        plan = dataclasses.replace(whole(part), denominators=whole(mixed).denominators)
        losses.append(take(module, [plan], config).loss)
    assert step.loss == pytest.approx(sum(losses), rel=1e-5)


def test_a_step_by_evidence_is_opd_on_some_prompts_and_grpo_on_others(module: ResponseModel) -> None:
    """Equation 6 of TGOPD: each rollout has one of the two, and both divide by all; golden ones have their weight."""
    every = STEPS[(1,)][:7]
    taught = [dataclasses.replace(each, reward_advantage=0.0) for each in every[:2]]
    rewarded = every[2:5]
    left = [dataclasses.replace(each, weight=0.0) for each in rewarded]
    golden = [dataclasses.replace(every[5], weight=2.5), every[6]]
    no_anchor = {"reference": {"coef": 0.0}, "teacher": {"coef": 0.0}}
    student, reward = {"divergence": "reverse_kl", "support": "full"}, {"reward_coef": 0.5}
    buffer = {"golden_pairing": "prompt", "evidence": {}}
    by_evidence = config_with(no_anchor | {"student": student, "advantage": reward}, buffer=buffer)
    step = take(module, [whole([*taught, *left, *golden])], by_evidence)
    plain = {"teacher_per_prompt": 0}
    opd = config_with(no_anchor | {"student": student}, buffer=plain)
    grpo = {
        "student": {"divergence": "k1"},
        "advantage": reward | {"teacher_coef": 0},
        "importance": {"correction": "clip"},
    }
    denominators = whole([*taught, *left, *golden]).denominators
    parts = [(taught, opd), (rewarded, config_with(no_anchor | grpo, buffer=plain)), (golden[1:], opd)]
    steps = [take(module, [dataclasses.replace(whole(part), denominators=denominators)], of) for part, of in parts]
    alone = take(module, [dataclasses.replace(whole([every[5]]), denominators=denominators)], opd)
    assert step.loss == pytest.approx(sum(each.loss for each in steps) + 2.5 * alone.loss, rel=1e-5)
    for at, gradient in enumerate(step.gradients):
        wanted = sum(each.gradients[at] for each in steps) + 2.5 * alone.gradients[at]
        torch.testing.assert_close(gradient, wanted, atol=2e-6, rtol=1e-4)
    assert step.metrics["loss_reward"] == pytest.approx(steps[1].metrics["loss_student"], rel=1e-5)


def test_weighted_teachers_are_averaged(module: ResponseModel) -> None:
    both = scored_by(STUDENTS, ("teacher", "code"))
    apart = [[dataclasses.replace(e, scores={name: e.scores[name]}) for e in both] for name in ("teacher", "code")]
    routed = [take(module, [whole(entries)], config_with(ONLY_STUDENT, **TWO)).loss for entries in apart]
    config = config_with(ONLY_STUDENT | {"teachers": "weighted"}, **TWO)
    assert take(module, [whole(both)], config).loss == pytest.approx(0.25 * routed[0] + 0.75 * routed[1], rel=1e-5)


@pytest.mark.parametrize(
    ("roles", "loss", "message"),
    [
        (("reference",), {}, "s0-0 carries no teacher scores"),
        (("teacher",), {}, "s0-0 carries no reference scores"),
        (("teacher", "code", "reference"), {}, r"\['code', 'teacher'\].*routed"),
        (("teacher", "reference"), {"teachers": "weighted"}, "s0-0 carries no code scores"),
    ],
)
def test_scores_that_the_loss_needs_are_asked_for_by_rollout(
    module: ResponseModel, roles: tuple[str, ...], loss: dict[str, Any], message: str
) -> None:
    scored = scored_by(STUDENTS, ("teacher", "code"))
    scored = [dataclasses.replace(e, scores={role: e.scores[role] for role in roles}) for e in scored]
    with pytest.raises(RunError, match=message):
        take(module, [whole(scored)], config_with(loss, **TWO))


@pytest.mark.parametrize("chunk_rows", [3, 1000])
def test_a_loss_that_is_not_finite_names_its_rollouts_and_spoils_the_gradient_on_purpose(
    module: ResponseModel, chunk_rows: int
) -> None:
    rows = STEP[1].scores["teacher"].to_pylist()
    rows[STEP[1].row]["topk_logprobs"][0] = math.nan
    poisoned = pa.RecordBatch.from_pylist(rows, schema=SCORE_SCHEMA)
    entry = dataclasses.replace(STEP[1], scores=STEP[1].scores | {"teacher": poisoned})
    step = take(module, [whole([STEP[0], entry, *STEP[2:]])], config_with(), chunk_rows=chunk_rows)
    assert step.problems == [f"the loss is not finite for {entry.meta.rollout_id} (loss_student)"]
    assert any(gradient.isnan().any() for gradient in step.gradients)


@pytest.mark.parametrize(
    "loss",
    [
        {"student": {"divergence": "k1"}},
        {"student": {"divergence": "k1"}, "advantage": {"policy": "behaviour"}},
        {"student": {"divergence": "k2"}},
        {"student": {"divergence": "reverse_kl", "support": "student_top_k"}},
    ],
    ids=str,
)
def test_a_token_that_the_teacher_rules_out_is_nothing_to_a_loss_that_leaves_it_out(
    module: ResponseModel, loss: dict[str, Any]
) -> None:
    """The bug: 0 · ∞ was nan where evidence had the teacher teach nothing, or a repetitive tail was masked."""
    config = config_with(loss | {"reference": {"coef": 0.0}})

    def step(rules_out: bool) -> Step:
        rows = STEP[1].scores["teacher"].to_pylist()
        if rules_out:
            row = rows[STEP[1].row]
            for name in ("logprobs", "given_logprobs", "stop_logprobs"):
                row[name] = [-math.inf, *row[name][1:]]
        payload = pa.RecordBatch.from_pylist(rows, schema=SCORE_SCHEMA)
        entry = dataclasses.replace(STEP[1], weight=0.0, scores=STEP[1].scores | {"teacher": payload})
        return take(module, [whole([STEP[0], entry])], config)

    found, expected = step(True), step(False)
    assert found.problems == [] and found.loss == expected.loss
    assert all(map(torch.equal, found.gradients, expected.gradients))
    assert all(map(math.isfinite, found.metrics.values()))


def test_an_output_layer_that_is_not_the_scorers_is_found_out(module: ResponseModel) -> None:
    config = config_with({"student": {"support": "full"}})
    with pytest.raises(RunError, match="teacher: its output layer does not make its log-probs"):
        take(module, [whole(STEP)], config, heads={"teacher": head_of("another model")})
