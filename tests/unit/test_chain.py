"""The embedded task: what its texts say, what counts as right, and that the splits keep apart."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.errors import InputError
from opd_ray.tasks import chain, get_task
from opd_ray.tasks.chain import ChainTask, Problem

# A busy machine must not fail a test that measures nothing.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

operations = st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 6)), min_size=2, max_size=5)
problems = st.builds(Problem, st.integers(0, 6), operations.map(tuple))
seeds = st.integers(0, 2**32)
shares = st.sampled_from([0.0, 0.3, 1.0])
EXAMPLE = Problem(5, (("-", 0), ("-", 6), ("+", 6)))


def python_says(step: str) -> bool:
    """Is a step such as "5-6=6" right, judged by Python's own arithmetic?"""
    left, right = step.split("=")
    return eval(left) % 7 == int(right)  # noqa: S307 - digits and one operator, checked by the callers


def test_example_of_the_docs():
    assert EXAMPLE.prompt == "^5-0-6+6="
    assert EXAMPLE.answer == "5"
    assert chain.clean_text(EXAMPLE).response == "5-0=5;5-6=6;6+6=5#5"


@given(problems)
def test_clean_text_is_right_step_by_step(problem):
    steps, _, answer = chain.clean_text(problem).response.partition("#")
    assert all(python_says(step) for step in steps.split(";"))
    assert steps[-1] == answer == problem.answer
    assert ChainTask().verify(f"{steps}#{answer}", chain.to_row(problem))


@given(problems, seeds, shares)
def test_self_correcting_text_is_right_once_the_redone_tries_are_removed(problem, seed, share):
    text = chain.self_correcting_text(problem, random.Random(seed), share)
    assert text.finished
    assert re.sub(r"\d[-+*]\d=\d\?", "", text.response) == chain.clean_text(problem).response
    assert ChainTask().verify(text.response, chain.to_row(problem))


@given(problems, seeds, shares)
def test_wrong_digits_and_only_they_stay_out_of_the_loss(problem, seed, share):
    text = chain.self_correcting_text(problem, random.Random(seed), share)
    assert len(text.loss_mask) == len(text.response)
    unscored = {position for position, scored in enumerate(text.loss_mask) if not scored}
    tries = re.finditer(r"\d[-+*]\d=\d", text.response)
    assert unscored == {match.end() - 1 for match in tries if not python_says(match.group())}


@given(problems, seeds)
def test_looping_text_fills_the_budget_with_one_try(problem, seed):
    text = chain.looping_text(problem, random.Random(seed))
    assert len(text.response) == len(text.loss_mask) == chain.SHORT.max_new_tokens
    assert not text.finished
    tries = re.findall(r"\d[-+*]\d=\d\?", text.response)
    assert len(set(tries)) == 1
    second_copy = text.response.index(tries[0]) + len(tries[0])
    assert text.loss_mask == tuple(position >= second_copy for position in range(chain.SHORT.max_new_tokens))


@given(seeds, shares)
def test_every_text_of_long_chains_fits_their_budget(seed, share):
    rng = random.Random(seed)
    problem = chain.draw_problem(rng, "train", chain.LONG)
    assert 3 <= len(problem.operations) <= 5
    assert len(chain.self_correcting_text(problem, rng, share).response) < chain.LONG.max_new_tokens  # and EOS
    assert len(chain.looping_text(problem, rng, chain.LONG.max_new_tokens).response) == chain.LONG.max_new_tokens


def test_long_chains_have_the_promised_lengths_and_their_splits_no_problem_in_common():
    drawn = {
        split: chain.draw_distinct(random.Random(0), split, 500, chain.LONG)
        for split in ("train", "validation", "test")
    }
    for split, problems in drawn.items():
        assert {chain.split_of(problem.prompt) for problem in problems} == {split}
        assert len({problem.prompt for problem in problems}) == 500
    lengths = [len(problem.operations) for problems in drawn.values() for problem in problems]
    for number, share in chain.LONG.shares:
        assert lengths.count(number) / 1500 == pytest.approx(share, abs=0.04)


def test_short_chains_are_drawn_as_they_were_before_there_were_long_ones():
    # Another order of draws would silently change every student and every set of problems of the default.
    drawn = chain.draw_distinct(random.Random("test"), "test", 3)
    assert [problem.prompt for problem in drawn] == ["^1+4-4-2=", "^5-0+1+6=", "^6*3-5+2="]


@pytest.mark.slow
def test_splits_are_disjoint_and_of_the_promised_sizes():
    drawn = {
        split: {problem.prompt for problem in chain.draw_distinct(random.Random(0), split, 2000)}
        for split in ("train", "validation", "test")
    }
    assert not drawn["train"] & drawn["validation"]
    assert not drawn["train"] & drawn["test"]
    assert not drawn["validation"] & drawn["test"]
    rng = random.Random(1)
    count = {"train": 0, "validation": 0, "test": 0}
    for _ in range(20_000):
        operations = tuple((rng.choice("+-*"), rng.randrange(7)) for _ in range(3))
        count[chain.split_of(Problem(rng.randrange(7), operations).prompt)] += 1
    assert count["train"] / 20_000 == pytest.approx(0.85, abs=0.015)
    assert count["validation"] / 20_000 == pytest.approx(0.05, abs=0.015)
    assert count["test"] / 20_000 == pytest.approx(0.10, abs=0.015)


def test_the_split_of_a_problem_never_changes():
    # A changed hash would silently move test problems into the training sets of shipped models.
    known = {"^5-0-6+6=": "train", "^1+1+1=": "validation", "^3+4*5=": "test", "^6*6*6*6=": "train", "^5*5+5=": "test"}
    assert {prompt: chain.split_of(prompt) for prompt in known} == known


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("5-0=5;5-6=6;6+6=5#5", True),
        ("#5", True),
        ("#3#5", True),
        ("#5#3", False),
        ("5-0=5;5-6=6;6+6=5", False),
        ("#", False),
        ("", False),
        ("#55", False),
        ("#5;", False),
        ("#4", False),
    ],
)
def test_only_the_digit_after_the_last_mark_counts(response, right):
    assert ChainTask().verify(response, chain.to_row(EXAMPLE)) is right


def test_a_row_without_an_answer_has_no_right_response():
    assert not ChainTask().verify("#", {"prompt": "^1+1+1=", "answer": ""})


def test_a_privileged_prompt_is_the_solution_and_then_the_problem():
    row = chain.to_row(EXAMPLE, with_solution=True)
    assert ChainTask().privileged_prompt(row, row["response"]) == "5-0=5;5-6=6;6+6=5#5^5-0-6+6="


def test_unknown_task_suggests_the_near_one():
    with pytest.raises(InputError, match="'chain'"):
        get_task("chian")


def test_tasks_are_found_by_name():
    assert isinstance(get_task("chain"), ChainTask)
