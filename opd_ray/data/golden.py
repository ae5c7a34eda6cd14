"""Golden solutions: complete responses to train on, checked and in the form that rollouts have.

A row that cannot be trained on is refused or, where ``data.golden_problems=skip``, left out and counted (METHOD §3).

    rows of text      prompt and response; the first token of the EOS set is appended. Of several responses the first
                      that can be trained on is taken
    rows of tokens    a rollout log's prompt_tokens and response_tokens, as they are: the last one must be an EOS
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from opd_ray.config import Config, written
from opd_ray.data import kept
from opd_ray.data.golden_problems import (
    KINDS,
    Problems,
    Solution,
    describe,
    find_problems,
    held_out_problems,
    judged_wrong,
)
from opd_ray.data.orders import Mix
from opd_ray.data.prompts import DEFAULT_TEACHER, Prompts
from opd_ray.data.rendering import BYTES_PER_TOKEN
from opd_ray.data.rows import Rows, question
from opd_ray.errors import InputError
from opd_ray.messages import MOST_VALUES, ROLLOUT_SCHEMA, RolloutMeta
from opd_ray.models.checkpoints import ModelFacts
from opd_ray.progress import watched
from opd_ray.repetition import tail_period
from opd_ray.tasks.judge import Judge

_CHUNK = 1024
_IDS = pa.list_(pa.int32())
_TOKENS = ("prompt_tokens", "response_tokens", "privileged_prompt_tokens")


@dataclasses.dataclass
class Golden:
    """The rows of data.golden that can be trained on."""

    where: str
    """data.golden and what it names."""
    solutions: list[Solution]
    """In the order of the file."""
    report: dict[str, int]
    """Rows of the file, used, and for each kind of problem the rows that were left out for it."""
    pairs: dict[str, int] | None
    """Prompt id to the index of its solution, for the prompts that have one; None where they do not need theirs."""
    mix: Mix | None
    """Which solutions are of which source, where these have weights."""
    asked: pa.RecordBatch | None = None
    """What each solution answers, once they are handed over: ``prompt`` and ``answer``, "" where unknown."""

    def hand_over(self) -> tuple[list[RolloutMeta], pa.RecordBatch]:
        """Metas and a batch of ROLLOUT_SCHEMA, a row per solution. The solutions are gone then: they may be gigabytes.

        Where prompts need their solutions, prompt_id is that of the prompt it belongs to.
        """
        solutions, self.solutions = self.solutions, []
        metas = [_meta(solution) for solution in solutions]
        asked = [(question(solution.row), solution.row["answer"]) for solution in solutions]
        self.asked = pa.RecordBatch.from_arrays(
            [pa.array(column, pa.string()) for column in zip(*asked, strict=True)], names=["prompt", "answer"]
        )
        columns: dict[str, Any] = dict.fromkeys(ROLLOUT_SCHEMA.names, [[] for _ in metas])
        for name in ("rollout_id", "slot", "prompt_id", "source", "finish_reason", "correct"):
            columns[name] = [getattr(meta, name) for meta in metas]
        for name in (*_TOKENS, "text"):
            columns[name] = [getattr(solution, name) for solution in solutions]
        return metas, pa.RecordBatch.from_pydict(columns, schema=ROLLOUT_SCHEMA)


def is_privileged(config: Config) -> bool:
    """Is any teacher that the run uses shown golden solutions?"""
    return config.uses_teacher and any(teacher.privileged for teacher in config.teachers.values())


def check_golden(
    config: Config,
    every: Rows,
    models: Mapping[str, ModelFacts],
    eos_token_ids: Sequence[int],
    prompts: Prompts,
    held_out: Sequence[Prompts],
    judge: Judge,
) -> Golden:
    """Looks at each of the rows of data.golden, which are ``every``.

    ``models``: "student" and every scorer's role to its facts. Raises InputError for rows with problems, unless
    they are to be skipped; if none is left; and if prompts that need a solution have none.
    """
    where = f"data.golden {written(config.data.golden)}"
    rows: Sequence[Mapping[str, Any]] = every
    # Does it matter which prompt a solution belongs to?
    paired = is_privileged(config) or (config.loads_golden and config.buffer.golden_pairing == "prompt")
    if paired:
        rows = [_of_prompt(number, *each) for number, each in enumerate(_matched(prompts, rows), start=1)]

    def look(rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> tuple[list[Solution], Problems]:
        golden = Prompts(where, rows, prompts.renderer, numbers=numbers)
        solutions = _tokenise(golden, models["student"], eos_token_ids[0], config.rollout.longest_response)
        if is_privileged(config):
            solutions = _with_privileged_prompts(where, solutions, prompts)
        problems = find_problems(config, models, eos_token_ids, solutions)
        if config.data.golden_filter == "correct":
            problems |= judged_wrong(where, [each for each in solutions if each.number not in problems], judge)
        return solutions, problems

    solutions, problems = _first_good(rows, look)
    problems = held_out_problems(solutions, held_out) | problems
    if problems and config.data.golden_problems == "refuse":
        advice = "mend or remove them, or leave them out with data.golden_problems=skip"
        raise InputError(f"{describe(where, len(rows), problems)}; {advice}")
    used = [_alone(each) for each in solutions if each.number not in problems]
    if not used:
        raise InputError(f"{describe(where, len(rows), problems)}; none is left to train on")
    for name in _TOKENS:
        if (total := sum(len(getattr(each, name)) for each in used)) > MOST_VALUES:
            most = f"more than one batch can hold ({MOST_VALUES})"
            raise InputError(f"{where}: {len(used)} rows have {total} {name}, {most}; give fewer rows")
    counts = Counter(kind for kind, _ in problems.values())
    report = {"rows": len(rows), "used": len(used), **{kind: counts[kind] for kind in KINDS}}
    pairs = None
    if paired and config.buffer.prompts_per_step:
        pairs = _pair(config, prompts, used, left_out=len(problems))
    return Golden(where, used, report, pairs, every.mix(where, (each.number for each in used)))


def _first_good(
    rows: Sequence[Mapping[str, Any]],
    look: Callable[[Sequence[Mapping[str, Any]], Sequence[int]], tuple[list[Solution], Problems]],
) -> tuple[list[Solution], Problems]:
    """Of rows with several responses the first without a problem, or the first one with its problem."""
    solutions, problems = look(rows, range(1, len(rows) + 1))
    left = [(each.number, each.row, each.row.get("others", ())) for each in solutions if each.number in problems]
    while left := [(number, row, others) for number, row, others in left if others]:
        found, still = look([row | {"response": others[0]} for _, row, others in left], [number for number, *_ in left])
        for solution in found:
            if solution.number not in still:
                solutions[solution.number - 1] = solution
                del problems[solution.number]
        left = [(number, row, others[1:]) for number, row, others in left if number in still]
    return solutions, problems


def _matched(prompts: Prompts, rows: Any) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any] | None]]:
    """Each golden row with the first row of data.prompts that it answers."""
    if prompts.rows.has_ids and rows.has_ids:
        by_id = {row["id"]: row for row in prompts.rows}
        yield from ((row, by_id.get(row["id"])) for row in rows)
        return
    by_prompt: dict[Any, Mapping[str, Any]] = {}
    for row in prompts.rows:
        by_prompt.setdefault(question(row), row)
    if any(not row["prompt"] for row in rows):  # tokens alone can only be compared with tokens
        for index, row in enumerate(prompts.rows):
            by_prompt.setdefault(prompts[index].tobytes(), row)
    for row in rows:
        yield row, by_prompt.get(question(row) or row["prompt_tokens"].astype(np.int32).tobytes())


def _of_prompt(number: int, row: Mapping[str, Any], prompt: Mapping[str, Any] | None) -> dict[str, Any]:
    """A golden row with its prompt's id, and what only the prompt's row knows."""
    if prompt is None:  # its own id may be that of another prompt
        return {**row, "id": f"golden-{number}"}
    return {**prompt, **row, "id": prompt["id"], **{key: row[key] or prompt[key] for key in ("prompt", "answer")}}


def _alone(solution: Solution) -> Solution:
    """Without the responses that it might have had instead."""
    row = {name: value for name, value in solution.row.items() if name != "others"}
    return dataclasses.replace(solution, row=row)


def _tokenise(golden: Prompts, student: ModelFacts, eos_token_id: int, budget: int) -> list[Solution]:
    """Rows of text, whose prompts ``golden`` renders, and rows of tokens. Of a response far beyond ``budget`` tokens
    the beginning, which is beyond it as well."""
    texts = [
        golden.renderer.continuation(golden[index], row["response"]) if "response" in row else None
        for index, row in enumerate(golden.rows)
    ]
    beginnings = [text[: BYTES_PER_TOKEN * budget] for text in texts if text is not None]
    responses = _encoded(beginnings, student.tokenizer)
    solutions = []
    for index, (number, row, text) in enumerate(zip(golden.numbers, golden.rows, texts, strict=True)):
        if text is not None:
            response = next(responses)
            if len(text) > BYTES_PER_TOKEN * budget and len(response) < budget:  # it is of very long tokens
                (response,) = _encoded([text], student.tokenizer)
            response = np.append(response, np.int32(eos_token_id))
            solutions.append(Solution(number, row, golden[index], response, text))
        else:
            text = _check_tokens(f"{golden.where} row {number}", row, student)
            tokens = (row[name].astype(np.int32) for name in ("prompt_tokens", "response_tokens"))
            solutions.append(Solution(number, row, *tokens, text))
    return solutions


def _encoded(texts: Sequence[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """Many in a call, which a tokenizer works off side by side, but not all: besides ids it returns what we drop."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    of = (
        kept.key(backend.to_str(), type(tokenizer).__name__, kept.versions("tokenizers", "transformers"))
        if backend and len(texts) >= kept.FEW
        else ""
    )
    for start in watched(range(0, len(texts), _CHUNK), "thousands of golden responses", -(-len(texts) // _CHUNK)):
        some = texts[start : start + _CHUNK]
        name = kept.key(of, *some)
        found = kept.find(name, _IDS, len(some)) if of else None
        if found is None:
            found = pa.array(tokenizer(some, add_special_tokens=False)["input_ids"], _IDS)
            if of:
                kept.keep(name, found)
        yield from (each.values.to_numpy() for each in found)


def _check_tokens(where: str, row: Mapping[str, Any], student: ModelFacts) -> str:
    """The text of a row of tokens; refuses those of another tokenizer."""
    if not len(row["prompt_tokens"]):
        raise InputError(f"{where}: has no prompt_tokens; give the prompt that the response answers")
    both = np.concatenate([row["prompt_tokens"], row["response_tokens"]])
    wrong = both[(both < 0) | (both >= student.vocab_size)]
    if len(wrong):
        raise InputError(
            f"{where}: token {wrong[0]} is outside the vocabulary of {student.name} "
            f"({student.vocab_size} tokens); give rows of its tokenizer, or rows of text"
        )
    decode = student.tokenizer.decode
    text, marked = (decode(row["response_tokens"], skip_special_tokens=skip) for skip in (True, False))
    if "text" in row and "".join(row["text"].split()) not in ("".join(each.split()) for each in (text, marked)):
        raise InputError(
            f"{where}: its response_tokens read {text[:40]!r} with the tokenizer of {student.name}, "
            f"but its text is {row['text'][:40]!r}; give rows of this tokenizer, or rows of text"
        )
    return text


def _with_privileged_prompts(where: str, solutions: Sequence[Solution], prompts: Prompts) -> list[Solution]:
    if unknown := [solution.number for solution in solutions if not solution.row["prompt"]]:
        raise InputError(
            f"{where} row {unknown[0]}: has tokens only, and its prompt is not in data.prompts; "
            "a privileged teacher is shown text: add the column prompt or remove the row"
        )
    rows, texts = [each.row for each in solutions], [each.text for each in solutions]
    shown = Prompts(where, rows, prompts.renderer, texts)
    return [dataclasses.replace(each, privileged_prompt_tokens=shown[i]) for i, each in enumerate(solutions)]


def _pair(config: Config, prompts: Prompts, solutions: Sequence[Solution], left_out: int) -> dict[str, int]:
    """Prompt id to the index of its solution (the first, if it has several); refuses prompts without one,
    unless they are to be left out, or to be taught by something else (buffer.evidence, if any has one).

    Solutions have the ids of their prompts by now; prompts of the same text share a solution.
    """
    rows = prompts.rows
    index: dict[str, int] = {}
    for i, solution in enumerate(solutions):
        index.setdefault(solution.row["id"], i)
    by_text = {question(row): index[row["id"]] for row in reversed(rows) if row["id"] in index}
    found = {row["id"]: index.get(row["id"], by_text.get(question(row))) for row in rows}
    pairs = {prompt_id: i for prompt_id, i in found.items() if i is not None}
    missing = [(number, row["id"]) for number, row in zip(prompts.numbers, rows, strict=True) if row["id"] not in pairs]
    if not missing or config.data.prompt_problems == "skip" or (config.buffer.evidence and pairs):
        return pairs
    number, prompt_id = missing[0]
    asked = "a privileged teacher is shown" if is_privileged(config) else "buffer.golden_pairing=prompt takes"
    skipped = f" ({left_out} of its rows were left out for their problems)" if left_out else ""
    otherwise = "" if is_privileged(config) else ", or set buffer.golden_pairing=shuffled"
    raise InputError(
        f"{prompts.where}: {len(missing)} of {len(prompts)} prompts have no golden solution in "
        f"{written(config.data.golden)}{skipped}, as row {number} (id {prompt_id!r}), but {asked} each prompt's own; "
        f"add solutions (same id, or same prompt), leave out such prompts with data.prompt_problems=skip{otherwise}"
    )


def _meta(solution: Solution) -> RolloutMeta:
    return RolloutMeta(
        rollout_id=f"golden-{solution.number}",
        slot=-1,
        prompt_id=solution.row["id"],
        source="golden",
        num_prompt_tokens=len(solution.prompt_tokens),
        num_response_tokens=len(solution.response_tokens),
        finish_reason="stop",
        correct=solution.row.get("correct", True),
        repetitive=False,
        oldest_version=-1,
        mean_version=-1.0,
        mean_behaviour_logprob=float("nan"),
        teacher=solution.row.get("teacher", DEFAULT_TEACHER),
        tail_period=tail_period(solution.response_tokens),
    )
