"""Arithmetic chains modulo 7: the task of the embedded default.

A problem is a first operand and two or three operations (three to five in the harder
setting), applied from left to right without precedence, every result reduced modulo 7::

    prompt            ^5-0-6+6=
    clean solution    5-0=5;5-6=6;6+6=5#5
    self-correcting   5-0=5;5-6=2?5-6=6;6+6=5#5      "?" = that was wrong, again
    looping           5-0=5;5-6=2?5-6=2?5-6=2?…      one try again and again until the budget ends

An answer is the digit after the last ``#``.  The end-of-sequence token is not part of
any text here: training appends it to finished texts, and whoever verifies a rollout
checks that it ended by itself.

The problems (67,914 of two or three operations, 30 million of three to five) are hashed
into train / validation / test, so that the split of a problem is a property of its text: no
list to ship, and no run can train on a test problem by drawing with another seed.

This module knows no tensors and no models; `opd_ray.embedded` turns texts into batches.
"""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

MODULUS = 7
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_SYMBOLS = tuple(OPERATORS)
REDO_PROBABILITY = 0.35  # of a step in a self-correcting text
SHARE_OF_RIGHT_LOOPS = 0.5  # of the looping texts, so many repeat a right try

Split = Literal["train", "validation", "test"]
_SPLIT_BOUNDS: tuple[tuple[int, Split], ...] = ((85, "train"), (90, "validation"), (100, "test"))


@dataclass(frozen=True)
class Chains:
    """Which problems are drawn, and how long an answer may be."""

    shares: tuple[tuple[int, float], ...]
    """(number of operations, share of the problems that have so many); the shares add up to 1."""
    max_new_tokens: int
    """Length budget of a response, EOS included."""


# Only 3,087 problems have two operations.  Drawing them with 1/4 leaves enough of them in every split for sets of
# distinct problems.  A clean solution needs 14 or 20 tokens.
SHORT = Chains(((2, 0.25), (3, 0.75)), max_new_tokens=80)
# A clean solution needs 20 to 32 tokens; one that redoes every step as often as texts do it 122.
LONG = Chains(((3, 0.2), (4, 0.4), (5, 0.4)), max_new_tokens=128)


@dataclass(frozen=True)
class Problem:
    """``first`` followed by ``(operator, operand)`` pairs; operands are 0 … 6."""

    first: int
    operations: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        return _prompt(self.first, self.operations)

    @property
    def results(self) -> tuple[int, ...]:
        """The running value after each operation."""
        values = accumulate(self.operations, lambda value, step: _apply(value, *step), initial=self.first)
        return tuple(values)[1:]

    @property
    def answer(self) -> str:
        return str(self.results[-1])

    @property
    def calls(self) -> tuple[str, ...]:
        """The left-hand sides of the steps of the right solution: ``("5-0=", "5-6=", "6+6=")``."""
        starts = (self.first, *self.results[:-1])
        return tuple(f"{start}{op}{operand}=" for start, (op, operand) in zip(starts, self.operations, strict=True))


@dataclass(frozen=True)
class Text:
    """A response to train on.

    ``loss_mask`` has one flag per character: does that character enter the loss?
    ``finished`` tells whether EOS follows (and enters the loss) or the text was cut.
    """

    response: str
    loss_mask: tuple[bool, ...]
    finished: bool


def _prompt(first: int, operations: Sequence[tuple[str, int]]) -> str:
    return f"^{first}{''.join([f'{op}{operand}' for op, operand in operations])}="


def _apply(left: int, op: str, right: int) -> int:
    return OPERATORS[op](left, right) % MODULUS


def split_of(prompt: str) -> Split:
    """The split a problem belongs to: a hash of its prompt, 85 / 5 / 10 percent."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100
    return next(split for bound, split in _SPLIT_BOUNDS if bucket < bound)


def draw_problem(rng: random.Random, split: Split, chains: Chains = SHORT) -> Problem:
    """A random problem of ``split``."""
    while True:
        num_operations = _num_operations(rng.random(), chains)
        first = rng.randrange(MODULUS)
        operations = [(rng.choice(_SYMBOLS), rng.randrange(MODULUS)) for _ in range(num_operations)]
        if split_of(_prompt(first, operations)) == split:
            return Problem(first, tuple(operations))


def _num_operations(point: float, chains: Chains) -> int:
    for number, share in chains.shares:
        if point < share:
            return number
        point -= share
    return chains.shares[-1][0]  # what rounding left


def draw_distinct(rng: random.Random, split: Split, count: int, chains: Chains = SHORT) -> list[Problem]:
    """``count`` different problems of ``split``, in random order."""
    drawn: dict[str, Problem] = {}
    while len(drawn) < count:
        problem = draw_problem(rng, split, chains)
        drawn.setdefault(problem.prompt, problem)
    return list(drawn.values())


def clean_text(problem: Problem) -> Text:
    """The concise solution: every step once, then the answer."""
    steps = [f"{call}{value}" for call, value in zip(problem.calls, problem.results, strict=True)]
    response = ";".join(steps) + f"#{problem.answer}"
    return Text(response, (True,) * len(response), finished=True)


def self_correcting_text(problem: Problem, rng: random.Random, share_of_doubt: float = 0.0) -> Text:
    """A right solution in which a step may be preceded by one to three tries that are redone.

    Wrong digits are kept out of the loss: the model shall learn to notice and redo a wrong
    step, not to make one.  ``share_of_doubt`` of the tries were right and are redone all the
    same: even a good model now and then doubts a right step, as large ones do that check
    everything twice.
    """
    pieces: list[str] = []
    mask: list[bool] = []
    last = len(problem.results) - 1
    for index, (call, value) in enumerate(zip(problem.calls, problem.results, strict=True)):
        num_tries = rng.randint(1, 3) if rng.random() < REDO_PROBABILITY else 0
        for _ in range(num_tries):
            doubted = rng.random() < share_of_doubt
            pieces.append(f"{call}{value if doubted else wrong_digit(value, rng)}?")
            mask += [True] * len(call) + [doubted, True]
        ending = f"{value}#{value}" if index == last else f"{value};"
        pieces.append(call + ending)
        mask += [True] * (len(call) + len(ending))
    return Text("".join(pieces), tuple(mask), finished=True)


def looping_text(problem: Problem, rng: random.Random, length: int = SHORT.max_new_tokens) -> Text:
    """One try repeated until the budget of ``length`` characters ends, in the loss from its second copy on.

    It teaches in-context copying, which large models have by themselves: the more often a try
    stands there, the likelier it comes once more.
    """
    index = rng.randrange(len(problem.results))
    steps = zip(problem.calls[:index], problem.results[:index], strict=True)
    head = "".join(f"{call}{value};" for call, value in steps)
    right = problem.results[index]
    digit = right if rng.random() < SHARE_OF_RIGHT_LOOPS else wrong_digit(right, rng)
    copy = f"{problem.calls[index]}{digit}?"
    response = (head + copy * length)[:length]
    num_unscored = len(head) + len(copy)
    mask = tuple(position >= num_unscored for position in range(len(response)))
    return Text(response, mask, finished=False)


def wrong_digit(right: int, rng: random.Random) -> int:
    """A digit other than ``right``, each of the six with the same probability."""
    return (right + rng.randrange(1, MODULUS)) % MODULUS


def to_row(problem: Problem, *, with_solution: bool = False) -> dict[str, str]:
    """The JSONL row of a problem: ``id``, ``prompt``, ``answer`` (and ``response`` when golden)."""
    row = {"id": f"chain-{problem.prompt[1:-1]}", "prompt": problem.prompt, "answer": problem.answer}
    return row | ({"response": clean_text(problem).response} if with_solution else {})


class ChainTask:
    """The `opd_ray.tasks.Task` of the chains: row fields ``prompt`` and ``answer``."""

    verify_limit_s = None

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The problem as it stands."""
        return row["prompt"]

    def privileged_prompt(self, row: Mapping[str, Any], solution: str) -> str:
        """The solution and then the problem: ``5-0=5;5-6=6;6+6=5#5^5-0-6+6=``."""
        return solution + row["prompt"]

    def verify(self, response: str, row: Mapping[str, Any]) -> bool:
        """Is exactly one character written after the last ``#``, and is it the right digit?"""
        _, mark, answer = response.rpartition("#")
        return mark == "#" and answer.strip() == row["answer"] != ""

    def reads(self, answer: str) -> bool:
        """Any character can be compared."""
        return True

    def load(self) -> None:
        """Needs nothing."""
