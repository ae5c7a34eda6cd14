"""Do a run's prompts, golden solutions and held-out problems fit its task, its models and each other?

What does not is refused or, where ``data.prompt_problems=skip``, left out and counted. A part of
:mod:`opd_ray.run.preflight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from opd_ray.config import Config, written
from opd_ray.data.dataset import Dataset
from opd_ray.data.prompts import DEFAULT_TEACHER, Prompts, limits, unknown_tokens
from opd_ray.data.rows import question
from opd_ray.errors import InputError, near
from opd_ray.models.checkpoints import ModelFacts
from opd_ray.tasks import reasoning_gym
from opd_ray.tasks.judge import Judge


class Longest(NamedTuple):
    """Tokens of the longest prompt, and of the longest prompt with its response: not always the same prompt's, as
    sets of problems have budgets of their own."""

    prompt: int = 0
    sequence: int = 0

    def of_both(self, other: Longest) -> Longest:
        return Longest(max(self.prompt, other.prompt), max(self.sequence, other.sequence))


def check_texts(config: Config, data: Dataset, judge: Judge) -> None:
    """What can be told without a tokenizer: answers, teachers, and that no prompt is a held-out problem."""
    for prompts in filter(None, (data.prompts, *data.problems.values())):
        _check_verifier(config, prompts)
    if data.prompts:
        _check_answers(config, data.prompts, judge)
    for name, problems in data.problems.items():
        _check_readable(problems, judge)
        asked = config.evaluation.sets[name].num_problems if name in config.evaluation.sets else None
        if asked and asked > len(problems):
            raise InputError(
                f"evaluation.sets.{name}.num_problems={asked}, but {problems.where} has {len(problems)}; leave it out "
                "for all, or give at most that"
            )
    if data.prompts:
        _check_apart(config, data)
        _check_routes(data.prompts.where, zip(data.prompts.numbers, data.prompts.rows, strict=True), config)


def check_prompts(config: Config, data: Dataset, models: Mapping[str, ModelFacts]) -> Longest:
    """The longest of prompts and problems, each of which must leave room for a response."""
    scorers = list(models.values())
    if config.data.prompt_problems == "skip":
        data.leave_out("over_length", _too_long(data.prompts, scorers, config))
    _check_known(data, data.prompts, models["student"])
    return _check_length(data.prompts, scorers, config).of_both(check_problems(config, data, models))


def check_problems(config: Config, data: Dataset, models: Mapping[str, ModelFacts]) -> Longest:
    """The longest of held-out problems: the student answers all, and the first teacher looks at what is sampled
    plainly, if it is among the ``models``."""
    longest = Longest()
    looks = [models["teacher"]] if "teacher" in config.scorers.keys() & models and not config.teacher.privileged else []
    for name, problems in data.problems.items():
        _check_known(data, problems, models["student"])
        own = config.evaluation.sets[name].max_tokens if name in config.evaluation.sets else None
        budget = None if own is None else (f"evaluation.sets.{name}.max_tokens", own)
        meet = [models["student"], *(looks if config.evaluation_sets[name].sampled_plainly else [])]
        longest = longest.of_both(_check_length(problems, meet, config, budget=budget))
    return longest


def check_golden(config: Config, data: Dataset, models: Mapping[str, ModelFacts]) -> None:
    """The teachers that golden rows ask for, and the length of prompts that have their solutions in them."""
    if data.golden:
        solutions = ((each.number, each.row) for each in data.golden.solutions)
        _check_routes(data.golden.where, solutions, config)
    if data.shown:
        privileged = [models[name] for name, teacher in config.teachers.items() if teacher.privileged]
        if config.data.prompt_problems == "skip":
            data.leave_out("over_length", _too_long(data.shown, privileged, config))
        _check_length(data.shown, privileged, config, "with its golden solution, ")


def check_translated(config: Config, data: Dataset, models: Mapping[str, ModelFacts]) -> None:
    """The length of prompts in the tokens of teachers with another tokenizer; the student's cap is on its own."""
    config = replace(config, student=replace(config.student, max_context_tokens=None))
    for name in data.translated:
        if config.data.prompt_problems == "skip":
            data.leave_out("over_length", _too_long(data.translated[name], [models[name]], config))
        _check_length(data.translated[name], [models[name]], config, "in the tokens of its teacher, ")


def check_teachers(config: Config, data: Dataset) -> None:
    """Every further teacher has something to score."""
    if not config.uses_teacher or config.loss.teachers != "routed":
        return
    rows = [*data.prompts.rows] if config.buffer.prompts_per_step else []
    rows += [each.row for each in data.golden.solutions] if data.golden else []
    for name in sorted(config.more_teachers.keys() - {row.get("teacher") for row in rows}):
        raise InputError(
            f"more_teachers.{name}: no row names it in the column teacher, so that it would score nothing; name it "
            "there, leave it out, or set loss.teachers=weighted, where all score every rollout"
        )


def check_markup(prompts: Prompts, models: Mapping[str, ModelFacts], renamed: Mapping[str, frozenset[int]]) -> None:
    """The markup around a prompt, which is that of its first row, must mean the same to student and scorers."""
    student = models["student"]
    for role, ids in renamed.items():
        if shared := sorted(ids.intersection(prompts[0].tolist())):
            ours = student.tokenizer.convert_ids_to_tokens(shared[0])
            theirs = models[role].tokenizer.convert_ids_to_tokens(shared[0])
            raise InputError(
                f"{prompts.where} row {prompts.numbers[0]}: its prompt holds token {shared[0]}, {ours!r} in "
                f"{student.name} but {theirs!r} in {models[role].name}; give the student the tokenizer and chat "
                "template of its teacher"
            )


def _check_known(data: Dataset, prompts: Prompts, student: ModelFacts) -> None:
    """A prompt of which the tokenizer knows nothing is the same as any other such."""
    share, none = unknown_tokens(prompts)
    if none:
        raise InputError(
            f"{prompts.where} row {prompts.numbers[none[0]]}: the tokenizer of {student.name} knows no token of its "
            f"prompt {prompts.rows[none[0]]['prompt'][:60]!r}; give prompts of its alphabet, or another student"
        )
    if share:
        data.notes.append(f"{prompts.where}: the tokenizer of {student.name} does not know {share:.1%} of its tokens")


def _check_verifier(config: Config, prompts: Prompts) -> None:
    """A library's own verifier knows its own problems, and would call every response to another one wrong."""
    if config.data.task != reasoning_gym.SOURCE:
        return
    if others := [number for number, row in zip(prompts.numbers, prompts.rows, strict=True) if "entry" not in row]:
        raise InputError(
            f"{prompts.where} row {others[0]}: {len(others)} of {len(prompts)} rows are none of reasoning_gym's, whose "
            "verifier data.task=reasoning_gym asks; give its sources alone, or a task that judges all (module:Class)"
        )


def _check_answers(config: Config, prompts: Prompts, judge: Judge) -> None:
    """What asks for the task's verdict on a response needs an answer in every row."""
    asking = []
    if config.loss.student.used and config.loss.advantage.reward_coef > 0:
        asking.append(f"loss.advantage.reward_coef={config.loss.advantage.reward_coef:g}")
    if config.buffer.uses_teacher_rollouts and config.buffer.teacher_filter == "correct":
        asking.append("buffer.teacher_filter=correct")
    if config.buffer.evidence:
        asking.append("buffer.evidence")
    if not asking:
        return
    if missing := [number for number, row in zip(prompts.numbers, prompts.rows, strict=True) if not row["answer"]]:
        raise InputError(
            f"{prompts.where} row {missing[0]}: has no 'answer' ({len(missing)} of {len(prompts)} "
            f"rows lack it), which {asking[0]} needs to judge responses; add the answers, or choose another setting"
        )
    _check_readable(prompts, judge)


def _check_readable(prompts: Prompts, judge: Judge) -> None:
    """Every response to a problem whose answer the task cannot read would be judged wrong."""
    answers = list(dict.fromkeys(row["answer"] for row in prompts.rows))
    read = dict(zip(answers, judge.ask("reads", [(answer,) for answer in answers]), strict=True))
    if wrong := [(number, row) for number, row in enumerate(prompts.rows, start=1) if not read[row["answer"]]]:
        number, row = wrong[0]
        raise InputError(
            f"{prompts.where} row {number} (id {row['id']!r}): the task cannot read its answer "
            f"{row['answer'][:100]!r} ({len(wrong)} of {len(prompts)} rows); expected a number or an expression, plain "
            "or LaTeX; mend them"
        )


def _check_routes(where: str, rows: Iterable[tuple[int, Mapping[str, Any]]], config: Config) -> None:
    """Each row's teacher must be one of the run's."""
    if not config.uses_teacher:
        return
    for number, row in rows:
        if (name := row.get("teacher", DEFAULT_TEACHER)) not in config.teachers:
            raise InputError(
                f"{where} row {number}: asks for the teacher {name!r}, which the configuration does not have"
                f"{near(name, config.teachers)} (teacher, or a name in more_teachers)"
            )


def _check_apart(config: Config, data: Dataset) -> None:
    """A held-out problem that is trained on measures memory. Of golden solutions this is one problem among others."""
    questions = [question(row) for row in data.prompts.rows]
    if config.data.prompt_problems == "skip":
        held_out = {question(row) for problems in data.problems.values() for row in problems.rows}
        data.leave_out("held_out", [index for index, asked in enumerate(questions) if asked in held_out])
        return
    trained = set(questions)
    for problems in data.problems.values():
        if shared := [number for number, row in enumerate(problems.rows, start=1) if question(row) in trained]:
            raise InputError(
                f"{problems.where} row {shared[0]}: {len(shared)} of {len(problems)} held-out problems are also in "
                f"{written(config.data.prompts)}; remove them from one of the two, or leave them out of the prompts "
                "with data.prompt_problems=skip"
            )


def _too_long(prompts: Prompts, models: Sequence[ModelFacts], config: Config) -> list[int]:
    """Indices of the prompts that leave one of these models no room for a response."""
    bounds = [limit for _, limit in limits(models, config)]
    return prompts.longer_than(min(bounds) - config.rollout.longest_response) if bounds else []


def _check_length(
    prompts: Prompts,
    models: Sequence[ModelFacts],
    config: Config,
    what: str = "",
    budget: tuple[str, int] | None = None,
) -> Longest:
    """The longest prompt, and it with a response; refuses it where it leaves these models no room for a response.

    ``budget``: the field that says how long a response may be, and what it says; by default that of rollouts.
    """
    longest, number = prompts.longest()
    field, response = budget or ("rollout.max_response_tokens", config.rollout.longest_response)
    skip = "" if budget else ", or leave out such prompts with data.prompt_problems=skip"
    for model, limit in limits(models, config):
        if longest + response > limit:
            raise InputError(
                f"{prompts.where} row {number}: {what}its {longest} prompt tokens + {field}={response} are "
                f"{longest + response}, more than the context of {limit} of {model}; "
                f"shorten the prompt or set {field}={max(limit - longest, 1)}{skip}"
            )
    return Longest(longest, longest + response)
