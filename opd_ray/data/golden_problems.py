"""A golden solution and what can be the matter with it: StableOPD's are complete, do not repeat themselves, and end in
EOS."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from opd_ray import tasks
from opd_ray.config import Config
from opd_ray.data import kept
from opd_ray.data.prompts import Prompts, limits
from opd_ray.data.rows import question
from opd_ray.errors import InputError
from opd_ray.messages import REFERENCE
from opd_ray.models.checkpoints import ModelFacts
from opd_ray.repetition import is_repetitive
from opd_ray.tasks.judge import Judge

KINDS = {
    "unverified": "without a response that is marked as right and complete",
    "without_eos": "without EOS",
    "eos_inside": "with an EOS inside",
    "over_length": "over length",
    "repetitive": "that repeat themselves",
    "wrong": "judged wrong",
    "held_out": "of held-out problems",
}
"""In the order in which they are looked for; a row counts once."""
_SHOWN_ROWS = 5
_JUDGED_BY = ("math-verify", "latex2sympy2_extended", "sympy", "reasoning-gym")

Problem = tuple[str, str]
"""Kind and reason."""
Problems = dict[int, Problem]
"""By the number of the row."""


@dataclasses.dataclass(frozen=True)
class Solution:
    """One row of the golden file, tokenised."""

    number: int
    """Row of the file, from 1."""
    row: Mapping[str, Any]
    """For the task: id, prompt and answer are there, the last two "" where unknown."""
    prompt_tokens: np.ndarray
    response_tokens: np.ndarray
    """With the EOS at the end."""
    text: str
    privileged_prompt_tokens: Sequence[int] = ()


def find_problems(
    config: Config, models: Mapping[str, ModelFacts], eos_token_ids: Sequence[int], solutions: Sequence[Solution]
) -> Problems:
    """Of the solutions that have one. Wrong answers are not looked for here."""
    teachers = config.teachers if config.needs_teacher("golden") else {}
    reference = {REFERENCE} & models.keys() if config.needs_reference("golden") else set()
    scored_by = ["student", *reference, *teachers]
    shown_to = [role for role in teachers if teachers[role].privileged]
    bare = limits([models[role] for role in scored_by if role not in shown_to], config)
    shown = limits([models[role] for role in shown_to], config) if shown_to else []
    problems = {
        each.number: _unverified(each)
        or _ending(each, sorted(eos_token_ids))
        or _length(each, config, bare, shown)
        or _loop(each, config)
        for each in solutions
    }
    return {number: problem for number, problem in problems.items() if problem}


def _unverified(solution: Solution) -> Problem | None:
    if solution.row.get("response") == "":  # what opd_ray.data.columns leaves where no mark is good
        return "unverified", "none of its generations is marked as right and complete"
    return None


def _ending(solution: Solution, eos: list[int]) -> Problem | None:
    response = solution.response_tokens
    if (reason := solution.row.get("finish_reason", "stop")) != "stop":
        return "without_eos", f"finish_reason is {reason!r}, expected 'stop'"
    if not len(response) or response[-1] not in eos:
        last = f"its last token is {response[-1]}" if len(response) else "it has no tokens"
        return "without_eos", f"{last}, none of the EOS set {eos}"
    if len(inside := np.flatnonzero(np.isin(response[:-1], eos))):
        hint = "; one is appended to rows of text, remove it" if "response" in solution.row else ""
        return "eos_inside", f"token {inside[0] + 1} of {len(response)} is the EOS {response[inside[0]]}{hint}"
    return None


def _length(
    solution: Solution, config: Config, bare: Sequence[tuple[str, int]], shown: Sequence[tuple[str, int]]
) -> Problem | None:
    """``bare`` and ``shown`` are the limits of those that score it behind its prompt and behind the privileged one."""
    response, budget = len(solution.response_tokens), config.rollout.longest_response
    if response > budget:
        reason = f"{response} response tokens, EOS included, exceed rollout.max_response_tokens={budget}"
        return "over_length", reason
    for prompt, most in ((solution.prompt_tokens, bare), (solution.privileged_prompt_tokens, shown)):
        for name, limit in most:
            if (total := len(prompt) + response) > limit:
                reason = f"prompt, response and EOS are {total} tokens, more than the context of {limit} of {name}"
                return "over_length", reason
    return None


def _loop(solution: Solution, config: Config) -> Problem | None:
    window, ratio = config.repetition
    if is_repetitive(solution.text, window, ratio):
        return "repetitive", f"its last {window} characters compress by more than metrics.repetition_ratio={ratio:.3g}"
    return None


def held_out_problems(solutions: Sequence[Solution], held_out: Sequence[Prompts]) -> Problems:
    """Of the solutions of problems that evaluations ask: trained on, they would measure memory."""
    asked = {question(row) for problems in held_out for row in problems.rows}
    bare = any(not each.row["prompt"] for each in solutions)  # tokens alone can only be compared with tokens
    tokens = {problems[i].tobytes() for problems in held_out for i in range(len(problems))} if bare else set()
    found = (
        each.number
        for each in solutions
        if (question(each.row) in asked if each.row["prompt"] else each.prompt_tokens.tobytes() in tokens)
    )
    return dict.fromkeys(found, ("held_out", "an evaluation asks it"))


def judged_wrong(where: str, solutions: Sequence[Solution], judge: Judge) -> Problems:
    """What the task's verifier calls wrong or, in a row without an answer, a mark."""
    problems, asked = {}, [solution for solution in solutions if solution.row["answer"]]
    for solution in solutions:
        if solution.row["answer"]:
            continue
        if "correct" not in solution.row:
            raise InputError(
                f"{where} row {solution.number}: has no answer to verify the response with, which "
                "data.golden_filter=correct asks for; add the column answer (or correct), or set "
                "data.golden_filter=none"
            )
        if not solution.row["correct"]:
            problems[solution.number] = "wrong", "it is marked as not correct"
    verdicts = _verdicts([(solution.text, _without_tokens(solution.row)) for solution in asked], judge)
    for solution, verdict in zip(asked, verdicts, strict=True):
        if not verdict:
            verifier = "gave up comparing it with" if verdict is None else "disagrees with"
            reason = f"the task's verifier {verifier} its answer {solution.row['answer']!r}"
            problems[solution.number] = "wrong", reason
    return problems


def _verdicts(questions: Sequence[tuple[str, Mapping[str, Any]]], judge: Judge) -> list[bool | None]:
    """As far as they are known from an earlier run; where there was no verdict, it is asked for again."""
    kind = type(judge.task)
    if kind.__module__.rpartition(".")[0] != tasks.__name__:  # what else a task of the user's depends on, nobody knows
        return judge.ask("verify", questions)
    code = [file.read_text() for file in sorted(Path(tasks.__file__).parent.glob("*.py"))]
    asked = [part for text, row in questions for part in (text, json.dumps(row, sort_keys=True, default=repr))]
    name = kept.key(kind.__name__, *code, kept.versions(*_JUDGED_BY), *asked)
    known = kept.find(name, pa.bool_(), len(questions))
    verdicts = known.to_pylist() if known is not None else [None] * len(questions)
    if left := [i for i, verdict in enumerate(verdicts) if verdict is None]:
        for i, verdict in zip(left, judge.ask("verify", [questions[i] for i in left]), strict=True):
            verdicts[i] = verdict
        kept.keep(name, pa.array(verdicts, pa.bool_()))
    return verdicts


def _without_tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    """Long arrays that no verdict needs, and numpy, which a judging process would have to import."""
    return {key: value for key, value in row.items() if not isinstance(value, np.ndarray)}


def describe(where: str, num_rows: int, problems: Problems) -> str:
    """ "data.golden F: 3 of 128 rows cannot be trained on: 2 without EOS (rows 4, 9), 1 over length (row 17); …"."""
    parts = []
    for kind, words in KINDS.items():
        if numbers := sorted(number for number, (found, _) in problems.items() if found == kind):
            shown = ", ".join(map(str, numbers[:_SHOWN_ROWS])) + (", ..." if len(numbers) > _SHOWN_ROWS else "")
            parts.append(f"{len(numbers)} {words} (row{'s' if len(numbers) > 1 else ''} {shown})")
    first = min(problems)
    return (
        f"{where}: {len(problems)} of {num_rows} rows cannot be trained on: {', '.join(parts)}; "
        f"row {first}: {problems[first][1]}"
    )
