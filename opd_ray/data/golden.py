"""Golden solutions: complete responses to train on, checked and in the form that rollouts have.

StableOPD's golden data is complete, not truncated, not repetitive, and ends in EOS (METHOD §3). A row that is not is
refused or, where ``data.golden_problems=skip``, left out and counted. Preflight and the loader share these checks.

    rows of text      prompt and response; the first token of the EOS set is appended
    rows of tokens    a rollout log's prompt_tokens and response_tokens, as they are: the last one must be an EOS
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from opd_ray.config import Config
from opd_ray.data.files import Rows, read_golden, read_prompts
from opd_ray.data.prompts import DEFAULT_TEACHER
from opd_ray.errors import InputError
from opd_ray.messages import MOST_VALUES, ROLLOUT_SCHEMA, RolloutMeta
from opd_ray.models.checkpoints import ModelFacts, inspect_run
from opd_ray.repetition import is_repetitive, tail_period
from opd_ray.tasks import Task, get_task
from opd_ray.tasks.judge import Judge

_KINDS = {
    "without_eos": "without EOS",
    "eos_inside": "with an EOS inside",
    "over_length": "over length",
    "repetitive": "that repeat themselves",
    "wrong": "judged wrong",
}
"""What can be the matter with a row, in the order in which it is looked for; a row counts once."""
_SHOWN_ROWS = 5
_CHUNK = 1024


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


def is_privileged(config: Config) -> bool:
    """Is any teacher that the run uses shown golden solutions?"""
    return config.uses_teacher and any(teacher.privileged for teacher in config.teachers.values())


def needs_pairs(config: Config) -> bool:
    """Does it matter which prompt a golden solution belongs to?"""
    return is_privileged(config) or (config.loads_golden and config.buffer.golden_pairing == "prompt")


def load_golden(
    config: Config, eos_token_ids: Sequence[int]
) -> tuple[list[RolloutMeta], pa.RecordBatch, dict[str, int]]:
    """Metas and a batch of ROLLOUT_SCHEMA, a row per usable solution in the file's order, and the counts.

    The counts: rows of the file, used, and for each kind of problem the rows that were left out for it. Where
    prompts need their solutions, prompt_id is that of the prompt it belongs to (see `pair`). Raises InputError.
    """
    models = inspect_run(config)
    solutions, report = check_golden(config, models, eos_token_ids)
    metas = [_meta(solution) for solution in solutions]
    empty: list[list[int]] = [[] for _ in metas]
    columns: dict[str, Any] = {
        "rollout_id": [meta.rollout_id for meta in metas],
        "slot": [meta.slot for meta in metas],
        "prompt_id": [meta.prompt_id for meta in metas],
        "source": ["golden"] * len(metas),
        "prompt_tokens": _lists("prompt_tokens", [solution.prompt_tokens for solution in solutions]),
        "response_tokens": _lists("response_tokens", [solution.response_tokens for solution in solutions]),
        "behaviour_logprobs": empty,
        "weight_versions": empty,
        "topk_ids": empty,
        "privileged_prompt_tokens": _lists(
            "privileged_prompt_tokens", [solution.privileged_prompt_tokens for solution in solutions]
        ),
        "finish_reason": ["stop"] * len(metas),
        "correct": [meta.correct for meta in metas],
        "text": [solution.text for solution in solutions],
    }
    return metas, pa.RecordBatch.from_pydict(columns, schema=ROLLOUT_SCHEMA), report


def load_solutions(config: Config, eos_token_ids: Sequence[int]) -> dict[str, str]:
    """Prompt id to the text of its golden solution, for all of data.prompts: what a privileged teacher is shown."""
    solutions, _ = check_golden(config, inspect_run(config), eos_token_ids)
    pairs = pair_solutions(read_prompts(config.data.prompts, need_answer=False), solutions)
    return {prompt_id: solutions[index].text for prompt_id, index in pairs.items()}


def pair(prompts: Sequence[Mapping[str, Any]], golden: Sequence[RolloutMeta]) -> dict[str, int]:
    """Prompt id to the index of its golden solution (the first, if it has several); prompts without one are absent.

    ``golden`` comes from `load_golden`, which has already matched the files: by id where every row of both has
    one, else by the prompt. Prompts of the same text share a solution.
    """
    return _pair(prompts, [meta.prompt_id for meta in golden])


def pair_solutions(prompts: Sequence[Mapping[str, Any]], solutions: Sequence[Solution]) -> dict[str, int]:
    """The same for what `check_golden` returns."""
    return _pair(prompts, [solution.row["id"] for solution in solutions])


def _pair(prompts: Sequence[Mapping[str, Any]], prompt_ids: Sequence[str]) -> dict[str, int]:
    index: dict[str, int] = {}
    for i, prompt_id in enumerate(prompt_ids):
        index.setdefault(prompt_id, i)
    by_text = {row["prompt"].strip(): index[row["id"]] for row in reversed(prompts) if row["id"] in index}
    pairs = {row["id"]: index.get(row["id"], by_text.get(row["prompt"].strip())) for row in prompts}
    return {prompt_id: found for prompt_id, found in pairs.items() if found is not None}


def check_golden(
    config: Config, models: Mapping[str, ModelFacts], eos_token_ids: Sequence[int]
) -> tuple[list[Solution], dict[str, int]]:
    """The usable rows of data.golden and the counts that `load_golden` returns.

    ``models``: "student" and every scorer's role to its facts. Raises InputError for rows with problems, unless
    they are to be skipped; if none is left; and if prompts that need a solution have none.
    """
    where, task, tokenizer = (
        f"data.golden {config.data.golden}",
        get_task(config.data.task),
        models["student"].tokenizer,
    )
    rows = read_golden(str(config.data.golden))
    prompts = read_prompts(config.data.prompts, need_answer=False) if needs_pairs(config) else None
    owners = _match(prompts, rows, task, tokenizer) if prompts is not None else None
    solutions = _tokenise(where, rows, task, models["student"], eos_token_ids[0])
    if prompts is not None:
        solutions = [_owned(each, prompts, owner) for each, owner in zip(solutions, owners, strict=True)]
    if is_privileged(config):
        solutions = [_with_privileged_prompt(where, each, task, tokenizer) for each in solutions]
    limits = _limits(config, models)
    problems = {kind: [] for kind in _KINDS}
    used = []
    found_in = [_problem(solution, config, frozenset(eos_token_ids), limits) for solution in solutions]
    if config.data.golden_filter == "correct":
        found_in = _verified(where, solutions, found_in, task)
    for solution, found in zip(solutions, found_in, strict=True):
        if found is None:
            used.append(solution)
        else:
            problems[found[0]].append((solution.number, found[1]))
    counts = {kind: len(found) for kind, found in problems.items()}
    report = {"rows": len(rows), "used": len(used), **counts}
    if any(counts.values()) and config.data.golden_problems == "refuse":
        raise InputError(_describe(where, len(rows), problems))
    if not used:
        raise InputError(f"{_describe(where, len(rows), problems, skipped=True)}; none is left to train on")
    if prompts is not None and config.buffer.prompts_per_step:
        _check_pairs(config, prompts, pair_solutions(prompts, used), report)
    return used, report


def _tokenise(where: str, rows: Rows, task: Task, student: ModelFacts, eos_token_id: int) -> list[Solution]:
    tokenizer, solutions = student.tokenizer, []
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        texts = [row["response"] for row in chunk if "response" in row]
        encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
        for number, row in enumerate(chunk, start=start + 1):
            if "response" in row:
                prompt = np.asarray(
                    render_prompt(where, number, lambda row=row: task.format_prompt(row, tokenizer)), np.int32
                )
                response = np.asarray([*next(encoded), eos_token_id], np.int32)
                solutions.append(Solution(number, row, prompt, response, row["response"]))
            else:
                solutions.append(_from_tokens(where, number, row, student))
    return solutions


def _from_tokens(where: str, number: int, row: dict[str, Any], student: ModelFacts) -> Solution:
    prompt, response = row["prompt_tokens"], row["response_tokens"]
    if not len(prompt):
        raise InputError(f"{where} row {number}: has no prompt_tokens; give the prompt that the response answers")
    both = np.concatenate([prompt, response])
    wrong = both[(both < 0) | (both >= student.vocab_size)]
    if len(wrong):
        raise InputError(
            f"{where} row {number}: token {wrong[0]} is outside the vocabulary of {student.name} "
            f"({student.vocab_size} tokens); give rows of its tokenizer, or rows of text"
        )
    text, marked = (student.tokenizer.decode(response, skip_special_tokens=skip) for skip in (True, False))
    if "text" in row and "".join(row["text"].split()) not in ("".join(each.split()) for each in (text, marked)):
        raise InputError(
            f"{where} row {number}: its response_tokens read {text[:40]!r} with the tokenizer of {student.name}, "
            f"but its text is {row['text'][:40]!r}; give rows of this tokenizer, or rows of text"
        )
    return Solution(number, row, prompt.astype(np.int32), response.astype(np.int32), text)


def _match(prompts: Rows, rows: Rows, task: Task, tokenizer: Any) -> list[int | None]:
    """For each golden row the index of the first prompt that it answers."""
    if prompts.has_ids and rows.has_ids:
        by_id = {row["id"]: i for i, row in enumerate(prompts)}
        return [by_id.get(row["id"]) for row in rows]
    by_prompt: dict[Any, int] = {}
    for i, row in enumerate(prompts):
        by_prompt.setdefault(row["prompt"].strip(), i)
    if any(not row["prompt"] for row in rows):  # tokens alone can only be compared with tokens
        for i, row in enumerate(prompts):
            by_prompt.setdefault(np.asarray(task.format_prompt(row, tokenizer), np.int64).tobytes(), i)
    return [by_prompt.get(row["prompt"].strip() or row["prompt_tokens"].astype(np.int64).tobytes()) for row in rows]


def _owned(solution: Solution, prompts: Rows, owner: int | None) -> Solution:
    """The solution with its prompt's id, and what only the prompt's row knows."""
    if owner is None:  # its own id may be that of another prompt
        return dataclasses.replace(solution, row={**solution.row, "id": f"golden-{solution.number}"})
    known = {key: value for key, value in solution.row.items() if value is not None and not _is_blank(value)}
    return dataclasses.replace(solution, row={**prompts[owner], **known, "id": prompts[owner]["id"]})


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value


def _with_privileged_prompt(where: str, solution: Solution, task: Task, tokenizer: Any) -> Solution:
    if not solution.row["prompt"]:
        raise InputError(
            f"{where} row {solution.number}: has tokens only, and its prompt is not in data.prompts; "
            "a privileged teacher is shown text: add the column prompt or remove the row"
        )
    tokens = render_prompt(
        where,
        solution.number,
        lambda: task.format_privileged_prompt(solution.row, solution.text, tokenizer),
    )
    return dataclasses.replace(solution, privileged_prompt_tokens=tokens)


def render_prompt(where: str, number: int, render: Callable[[], list[int]]) -> list[int]:
    """``render()``, a call of the task; what it cannot render is refused by file and row (1-based)."""
    try:
        return render()
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where} row {number}: the task cannot render the prompt ({reason})") from None


def _limits(config: Config, models: Mapping[str, ModelFacts]) -> list[tuple[str, int, bool]]:
    """Who limits a golden sequence, to how many tokens, and whether with the privileged prompt."""
    cap = config.student.max_context_tokens
    found = [("student.max_context_tokens", cap, False)] if cap else []
    for role, facts in models.items():
        if facts.context_tokens is None:
            continue
        if role == "student" or (role == "reference" and config.needs_reference("golden")):
            found.append((facts.name, facts.context_tokens, False))
        elif role in config.teachers and config.needs_teacher("golden"):
            found.append((facts.name, facts.context_tokens, config.teachers[role].privileged))
    return found


def _problem(
    solution: Solution,
    config: Config,
    eos: frozenset[int],
    limits: Sequence[tuple[str, int, bool]],
) -> tuple[str, str] | None:
    """Kind and reason of what is the matter with a row, if anything."""
    row, response, ids = solution.row, solution.response_tokens, sorted(eos)
    if (reason := row.get("finish_reason", "stop")) != "stop":
        return "without_eos", f"finish_reason is {reason!r}, expected 'stop'"
    if not len(response) or response[-1] not in eos:
        last = f"its last token is {response[-1]}" if len(response) else "it has no tokens"
        return "without_eos", f"{last}, none of the EOS set {ids}"
    inside = np.flatnonzero(np.isin(response[:-1], ids))
    if len(inside):
        hint = "; one is appended to rows of text, remove it" if "response" in row else ""
        return "eos_inside", f"token {inside[0] + 1} of {len(response)} is the EOS {response[inside[0]]}{hint}"
    if len(response) > config.rollout.longest_response:
        budget = config.rollout.longest_response
        return (
            "over_length",
            f"{len(response)} response tokens, EOS included, exceed rollout.max_response_tokens={budget}",
        )
    for name, limit, privileged in limits:
        total = len(solution.privileged_prompt_tokens if privileged else solution.prompt_tokens) + len(response)
        if total > limit:
            return (
                "over_length",
                f"prompt, response and EOS are {total} tokens, more than the context of {limit} of {name}",
            )
    window, ratio = config.repetition
    if is_repetitive(solution.text, window, ratio):
        return "repetitive", f"its last {window} characters compress by more than metrics.repetition_ratio={ratio:.3g}"
    return None


def _verified(
    where: str, solutions: Sequence[Solution], problems: Sequence[tuple[str, str] | None], task: Task
) -> list[tuple[str, str] | None]:
    """The problems, with those of solutions that had none but are judged wrong."""
    found = list(problems)
    asked = []
    for i, solution in enumerate(solutions):
        if found[i] is not None:
            continue
        if solution.row["answer"]:
            asked.append(i)
        elif "correct" not in solution.row:
            raise InputError(
                f"{where} row {solution.number}: has no answer to verify the response with, which "
                "data.golden_filter=correct asks for; add the column answer (or correct), or set "
                "data.golden_filter=none"
            )
        elif not solution.row["correct"]:
            found[i] = "wrong", "it is marked as not correct"
    with Judge(task) as judge:
        verdicts = judge.ask("verify", [(solutions[i].text, _without_tokens(solutions[i].row)) for i in asked])
    for i, verdict in zip(asked, verdicts, strict=True):
        answer = solutions[i].row["answer"]
        if verdict is None:
            found[i] = "wrong", f"the task's verifier gave up comparing it with its answer {answer!r}"
        elif not verdict:
            found[i] = "wrong", f"the task's verifier disagrees with its answer {answer!r}"
    return found


def _without_tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    """Long arrays that no verdict needs, and numpy, which a judging process would have to import."""
    return {key: value for key, value in row.items() if not isinstance(value, np.ndarray)}


def _describe(where: str, num_rows: int, problems: Mapping[str, list[tuple[int, str]]], skipped: bool = False) -> str:
    """ "data.golden F: 3 of 128 rows cannot be trained on: 2 without EOS (rows 4, 9), 1 over length (row 17); …"."""
    parts = []
    for kind, found in problems.items():
        if found:
            shown = ", ".join(str(number) for number, _ in found[:_SHOWN_ROWS])
            more = ", ..." if len(found) > _SHOWN_ROWS else ""
            parts.append(f"{len(found)} {_KINDS[kind]} (row{'s' if len(found) > 1 else ''} {shown}{more})")
    total = sum(map(len, problems.values()))
    number, reason = min(each for found in problems.values() for each in found)
    advice = "" if skipped else "; mend or remove them, or leave them out with data.golden_problems=skip"
    return (
        f"{where}: {total} of {num_rows} rows cannot be trained on: {', '.join(parts)}; row {number}: {reason}{advice}"
    )


def _check_pairs(config: Config, prompts: Rows, pairs: Mapping[str, int], report: Mapping[str, int]) -> None:
    missing = [(number, row["id"]) for number, row in enumerate(prompts, start=1) if row["id"] not in pairs]
    if not missing:
        return
    number, prompt_id = missing[0]
    asked = "a privileged teacher is shown" if is_privileged(config) else "buffer.golden_pairing=prompt takes"
    left_out = report["rows"] - report["used"]
    skipped = f" ({left_out} of its rows were left out for their problems)" if left_out else ""
    otherwise = "" if is_privileged(config) else " or set buffer.golden_pairing=shuffled"
    raise InputError(
        f"data.prompts {config.data.prompts}: {len(missing)} of {len(prompts)} prompts have no golden solution in "
        f"{config.data.golden}{skipped}, as row {number} (id {prompt_id!r}), but {asked} each prompt's own; "
        f"add solutions (same id, or same prompt), remove the prompts{otherwise}"
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
        newest_version=-1,
        mean_version=-1.0,
        mean_behaviour_logprob=float("nan"),
        teacher=solution.row.get("teacher", DEFAULT_TEACHER),
        tail_period=tail_period(solution.response_tokens),
    )


def _lists(name: str, rows: Sequence[Sequence[int]]) -> pa.ListArray:
    """A list column from one array per row, without going through Python numbers."""
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    if offsets[-1] > MOST_VALUES:
        raise InputError(
            f"data.golden: {len(rows)} rows have {offsets[-1]} {name}, more than one batch can hold ({MOST_VALUES}); "
            "give fewer rows"
        )
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(np.concatenate(rows).astype(np.int32)))
