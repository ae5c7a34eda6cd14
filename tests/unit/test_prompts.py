"""Orders over data: complete epochs, reproducible, addressable by position."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.data.orders import Mix, Mixed, Shuffled
from opd_ray.data.prompts import Prompts, PromptStream


@given(num_rows=st.integers(1, 50), seed=st.integers(0, 1000), epoch=st.integers(0, 5))
def test_every_epoch_visits_every_row_once(num_rows, seed, epoch):
    order = Shuffled(num_rows, seed)
    assert sorted(order[epoch * num_rows + i] for i in range(num_rows)) == list(range(num_rows))


@given(positions=st.lists(st.integers(0, 200), min_size=1))
def test_a_position_means_the_same_row_in_whatever_order_it_is_asked(positions):
    one, other = Shuffled(17, seed=3), Shuffled(17, seed=3)
    expected = {i: one[i] for i in range(201)}
    assert [other[i] for i in positions] == [expected[i] for i in positions]


def test_epochs_and_seeds_differ():
    orders = {tuple(Shuffled(20, seed)[epoch * 20 + i] for i in range(20)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_without_shuffling_rows_come_as_they_lie_in_every_epoch():
    order = Shuffled(3, seed=1, shuffle=False)
    assert [order[position] for position in (7, 0, 1, 2, 3, 4)] == [1, 0, 1, 2, 0, 1]


class FakeRenderer:
    def prompt(self, row, solution=None):
        return ["_ab".index(c) for c in (solution or "") + row["prompt"]]


def prompts(rows, solutions=None):
    return Prompts("rows", rows, FakeRenderer(), solutions)


def stream(seed=0, responses=2):
    rows = [{"id": str(i), "prompt": "ab"[i % 2] * 2, "answer": "x"} for i in range(4)]
    return PromptStream(prompts(rows), order=Shuffled(4, seed), num_responses=responses, seed=seed)


def test_a_slot_is_the_same_prompt_and_seed_in_every_run_with_the_seed():
    assert [stream()[i] for i in range(8)] == [stream()[i] for i in range(8)]
    assert stream(seed=1)[0].seed != stream(seed=0)[0].seed


def test_no_two_responses_share_a_sampling_seed():
    found = stream()
    seeds = [found[i].seed + j for i in range(100) for j in range(2)]
    assert len(set(seeds)) == len(seeds)


def test_every_response_has_its_seed_even_where_only_the_teacher_writes():
    found = stream(responses=0)
    assert len({found[i].seed for i in range(100)}) == 100


def test_a_row_names_its_teacher_or_has_the_first_one():
    rows = [{"id": "1", "prompt": "a", "answer": "x", "teacher": "code"}, {"id": "2", "prompt": "b", "answer": "x"}]
    found = PromptStream(prompts(rows))
    assert [found[0].teacher, found[1].teacher] == ["code", "teacher"]


def test_solutions_fill_the_privileged_prompt():
    rows = [{"id": "1", "prompt": "a", "answer": "x"}]
    assert PromptStream(prompts(rows))[0].privileged_prompt_tokens == ()
    assert PromptStream(prompts(rows), shown=prompts(rows, ["bb"]))[0].privileged_prompt_tokens == (2, 2, 1)


def test_weights_decide_how_much_of_an_epoch_is_whose_and_every_source_goes_through_its_rows():
    mix = Mix((np.arange(0, 6), np.arange(6, 12)), (2.0, 1.0))
    order = Mixed(mix, seed=3)
    epochs = [[order[epoch * 12 + i] for i in range(12)] for epoch in range(3)]
    assert [sum(row < 6 for row in epoch) for epoch in epochs] == [8, 8, 8]
    assert Counter(row for epoch in epochs for row in epoch if row < 6) == dict.fromkeys(range(6), 4)
    assert Counter(row for epoch in epochs for row in epoch if row >= 6) == dict.fromkeys(range(6, 12), 2)
    assert epochs[0] != epochs[1]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
    positions=st.lists(st.integers(0, 99), min_size=1),
)
def test_a_weighted_position_means_the_same_row_in_whatever_order_it_is_asked(sizes, weights, positions):
    ends = np.cumsum(sizes)
    groups = tuple(np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True))
    mix = Mix(groups, tuple(weights[: len(sizes)]))
    order = Mixed(mix, seed=1)
    assert [order[i] for i in positions] == [Mixed(mix, seed=1)[i] for i in positions]


def test_unshuffled_sources_alternate_and_keep_their_order():
    order = Mixed(Mix((np.arange(0, 4), np.arange(4, 8)), (3.0, 1.0)), seed=0, shuffle=False)
    assert [order[i] for i in range(8)] == [0, 1, 4, 2, 3, 0, 5, 1]
