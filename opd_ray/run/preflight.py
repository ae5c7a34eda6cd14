"""Looks at everything a run will need before a model loads or a file is written.

    check_files       packages, prompt files, checkpoints: are they there, whole, and do they agree?
    check_resources   does the cluster have what the rooms ask for?

Each refusal is an InputError of one line: what was got, what was expected,
where, and what to do. Paths are real here; what "embedded" and "student" stand for is resolved before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from opd_ray.config import Config
from opd_ray.data.files import Rows, read_prompts
from opd_ray.data.golden import Solution, check_golden, is_privileged, pair_solutions, render_prompt
from opd_ray.data.prompts import DEFAULT_TEACHER
from opd_ray.errors import InputError, near
from opd_ray.models import checkpoints
from opd_ray.models.checkpoints import ModelFacts, inspect, inspect_run
from opd_ray.tasks import Task, get_task
from opd_ray.tasks.judge import Judge


@dataclass(frozen=True)
class Preflight:
    """What the checks found out on the way, and the run needs."""

    eos_token_ids: tuple[int, ...]
    """Every token that ends a response, for the student or for a scorer; golden responses get the first."""
    pad_token_id: int
    vocab_size: int
    tied_embeddings: bool
    max_context_tokens: int
    """Longest prompt + response that the student and all scorers take."""
    max_prompt_tokens: int
    """Longest prompt of the training and evaluation files, as the task renders it."""
    num_prompts: int
    num_golden: int
    """Golden solutions that can be trained on."""
    num_problems: int
    golden: Mapping[str, int] = field(default_factory=dict)
    """Rows of the golden file, used, and left out by kind of problem; empty where no golden data is read."""


def check_evaluation(config: Config) -> Preflight:
    """The checks of an evaluation alone: the student and the held-out problems."""
    _check_packages(config, evaluation_only=True)
    task = get_task(config.data.task)
    problems = read_prompts(config.data.evaluation)
    _check_readable("data.evaluation", config.data.evaluation, problems, task)
    student = inspect("student.path", config.student.path)
    length = _check_prompts("data.evaluation", config.data.evaluation, problems, task, [student], config)
    return _facts(config, {"student": student}, student.eos_token_ids, length, num_problems=len(problems))


def check_files(config: Config) -> Preflight:
    """Packages, data files and checkpoints, and that they fit each other."""
    _check_packages(config)
    data, task = config.data, get_task(config.data.task)
    prompts, problems = read_prompts(data.prompts, need_answer=False), read_prompts(data.evaluation)
    _check_answers(config, prompts, task)
    _check_readable("data.evaluation", data.evaluation, problems, task)
    _check_routes(f"data.prompts {data.prompts}", enumerate(prompts, start=1), config)
    models = inspect_run(config)
    renamed = {role: checkpoints.check_agreement(models["student"], facts) for role, facts in models.items()}
    eos_token_ids = stop_token_ids(config, models)
    lengths = (
        _check_prompts("data.prompts", data.prompts, prompts, task, list(models.values()), config),
        _check_prompts("data.evaluation", data.evaluation, problems, task, [models["student"]], config),
    )
    _check_markup(f"data.prompts {data.prompts}", prompts, task, models, renamed)
    solutions: list[Solution] = []
    report: dict[str, int] = {}
    if config.loads_golden or is_privileged(config):
        solutions, report = check_golden(config, models, eos_token_ids)
        _check_routes(f"data.golden {data.golden}", ((each.number, each.row) for each in solutions), config)
    if is_privileged(config) and config.buffer.prompts_per_step:
        _check_privileged_prompts(config, prompts, solutions, models, task)
    _check_disjoint(config, problems, prompts, solutions, models["student"].tokenizer, task)
    return _facts(
        config,
        models,
        eos_token_ids,
        max(lengths),
        num_prompts=len(prompts),
        num_golden=len(solutions),
        num_problems=len(problems),
        golden=report,
    )


Capacity = Callable[[str | None], Mapping[str, float]]
"""How much of each resource the nodes of a cluster have; with the name of a custom resource, only nodes that have it
(opd_ray.placement.capacity.cluster_capacity)."""


@dataclass(frozen=True)
class _Asked:
    actors: int
    cpus: float
    gpus: float
    node_resource: str | None


def check_generators(config: Config, capacity: Capacity) -> None:
    """Refuses more generators than the cluster has room for; what an evaluation needs."""
    _check_fits({"generators": _generators(config, config.rollout.num_generators)}, capacity)


def check_resources(config: Config, capacity: Capacity) -> None:
    """Refuses more ranks, engines or scorers, as few of them as the run goes on with, than the cluster has room for."""
    learner, rollout = config.learner, config.rollout
    ranks = _Asked(learner.num_ranks, learner.cpus_per_rank, learner.gpus_per_rank, learner.node_resource)
    asked = {"learner": ranks, "generators": _generators(config, rollout.size.minimum)}
    if config.buffer.uses_teacher_rollouts:
        asked["teacher generators"] = _generators(config, rollout.teacher_generators)
    for role, scorer in config.scorers.items():
        asked[role] = _Asked(scorer.size.minimum, scorer.cpus_per_actor, scorer.gpus_in_all, scorer.node_resource)
    _check_fits(asked, capacity)


def _facts(
    config: Config,
    models: Mapping[str, ModelFacts],
    eos_token_ids: tuple[int, ...],
    max_prompt_tokens: int,
    **found: Any,
) -> Preflight:
    student = models["student"]
    limits = [model.context_tokens for model in models.values() if model.context_tokens is not None]
    cap = config.student.max_context_tokens
    needed = max_prompt_tokens + config.rollout.longest_response
    return Preflight(
        eos_token_ids=eos_token_ids,
        pad_token_id=student.pad_token_id,
        vocab_size=student.vocab_size,
        tied_embeddings=student.tied_embeddings,
        max_context_tokens=min([*limits, *([cap] if cap else [])], default=needed),
        max_prompt_tokens=max_prompt_tokens,
        **{"num_prompts": 0, "num_golden": 0, "num_problems": 0, **found},
    )


def _generators(config: Config, number: int) -> _Asked:
    rollout = config.rollout
    gpus = rollout.gpus_per_generator * rollout.tensor_parallel_size
    return _Asked(number, rollout.cpus_per_generator, gpus, rollout.node_resource)


def _check_fits(asked: Mapping[str, _Asked], capacity: Capacity) -> None:
    for resource in dict.fromkeys(room.node_resource for room in asked.values()):
        there = capacity(resource)
        if resource is not None and not there.get(resource):
            room = next(name for name, room in asked.items() if room.node_resource == resource)
            raise InputError(
                f"cluster: {room} ask for nodes with the custom resource {resource!r} (node_resource), but no node "
                "has it; add it to a node type, or leave node_resource out"
            )
        # Those that ask for no node in particular may fill up any, so all rooms count where none is named.
        here = {name: room for name, room in asked.items() if resource in (None, room.node_resource)}
        nodes = f" on nodes with {resource}" if resource else ""
        for kind in ("CPU", "GPU"):
            each = {name: room.cpus if kind == "CPU" else room.gpus for name, room in here.items()}
            total = sum(room.actors * each[name] for name, room in here.items())
            if total > there.get(kind, 0) + 1e-6:
                parts = ", ".join(f"{name} {room.actors} x {each[name]:g}" for name, room in here.items() if each[name])
                raise InputError(
                    f"cluster: {total:g} {kind}s asked{nodes} ({parts}), {there.get(kind, 0):g} there; ask for less "
                    f"(learner.num_ranks, rollout.num_generators, *.{kind.lower()}s_per_*) or add nodes"
                )


def _check_packages(config: Config, evaluation_only: bool = False) -> None:
    engines = {"rollout.engine": config.rollout.engine}
    if not evaluation_only:
        engines |= {f"{role}.engine": scorer.engine for role, scorer in config.scorers.items()}
    for name, engine in engines.items():
        if engine == "vllm" and find_spec("vllm") is None:
            raise InputError(
                f"{name}=vllm, but vLLM is not installed; run 'make setup' (CPU) or "
                f"pip install 'opd_ray[gpu]' (CUDA), or set {name}=torch"
            )
    if not evaluation_only and find_spec("deepspeed") is None:
        raise InputError("the learner needs DeepSpeed, which is not installed; pip install 'opd_ray[deepspeed]'")
    if config.data.task == "math" and find_spec("math_verify") is None:
        raise InputError("data.task=math needs math-verify, which is not installed; pip install 'opd_ray[math]'")


def _check_answers(config: Config, prompts: Rows, task: Task) -> None:
    """What asks for the task's verdict on a response needs an answer in every row."""
    asking = []
    if config.loss.student.used and config.loss.advantage.reward_coef > 0:
        asking.append(f"loss.advantage.reward_coef={config.loss.advantage.reward_coef:g}")
    if config.buffer.uses_teacher_rollouts and config.buffer.teacher_filter == "correct":
        asking.append("buffer.teacher_filter=correct")
    missing = [number for number, row in enumerate(prompts, start=1) if not row["answer"]]
    if asking and missing:
        raise InputError(
            f"data.prompts {config.data.prompts} row {missing[0]}: has no 'answer' ({len(missing)} of {len(prompts)} "
            f"rows lack it), which {asking[0]} needs to judge responses; add the answers, or choose another setting"
        )
    if asking:
        _check_readable("data.prompts", config.data.prompts, prompts, task)


def _check_readable(name: str, path: str, rows: Rows, task: Task) -> None:
    """Every response to a problem whose answer the task cannot read would be judged wrong."""
    answers = list(dict.fromkeys(row["answer"] for row in rows))
    with Judge(task) as judge:
        read = dict(zip(answers, judge.ask("reads", [(answer,) for answer in answers]), strict=True))
    wrong = [(number, row) for number, row in enumerate(rows, start=1) if not read[row["answer"]]]
    if wrong:
        number, row = wrong[0]
        raise InputError(
            f"{name} {path} row {number} (id {row['id']!r}): the task cannot read its answer {row['answer'][:100]!r} "
            f"({len(wrong)} of {len(rows)} rows); expected a number or an expression, plain or LaTeX; mend them"
        )


def _check_routes(where: str, rows: Iterator[tuple[int, Mapping[str, Any]]], config: Config) -> None:
    """Each row's teacher must be one of the run's."""
    if not config.uses_teacher:
        return
    for number, row in rows:
        if (name := row.get("teacher", DEFAULT_TEACHER)) not in config.teachers:
            raise InputError(
                f"{where} row {number}: asks for the teacher {name!r}, which the configuration does not have"
                f"{near(name, config.teachers)} (teacher, or a name in more_teachers)"
            )


def stop_token_ids(config: Config, models: Mapping[str, ModelFacts]) -> tuple[int, ...]:
    """The EOS set of the student and of all that score it; the first id stands for all."""
    given = {role: scorer.eos_token_ids for role, scorer in config.scorers.items()}
    given |= {"teacher": config.teacher.eos_token_ids} if "teacher" in models else {}
    asked = {checkpoints.field_of(config, role): (models[role], ids) for role, ids in given.items()}
    return checkpoints.eos_set(models["student"], asked)


def _check_markup(
    where: str, rows: Rows, task: Task, models: Mapping[str, ModelFacts], renamed: Mapping[str, frozenset[int]]
) -> None:
    """The markup around a prompt, which is that of its first row, must mean the same to student and scorers."""
    student = models["student"]
    prompt = render_prompt(where, 1, lambda: task.format_prompt(rows[0], student.tokenizer))
    for role, ids in renamed.items():
        if shared := sorted(ids.intersection(prompt)):
            ours = student.tokenizer.convert_ids_to_tokens(shared[0])
            theirs = models[role].tokenizer.convert_ids_to_tokens(shared[0])
            raise InputError(
                f"{where} row 1: its prompt holds token {shared[0]}, {ours!r} in {student.name} but {theirs!r} in "
                f"{models[role].name}; give the student the tokenizer and chat template of its teacher"
            )


def _check_disjoint(
    config: Config, problems: Rows, prompts: Rows, solutions: Sequence[Solution], tokenizer: Any, task: Task
) -> None:
    """A held-out problem that is trained on measures memory."""
    path, texts = config.data.evaluation, [row["prompt"].strip() for row in problems]
    _check_apart(path, texts, config.data.prompts, {row["prompt"].strip() for row in prompts})
    golden = str(config.data.golden)
    _check_apart(path, texts, golden, {solution.row["prompt"].strip() for solution in solutions})
    if bare := {tuple(each.prompt_tokens) for each in solutions if not each.row["prompt"]}:
        tokens = [tuple(task.format_prompt(row, tokenizer)) for row in problems]
        _check_apart(path, tokens, golden, bare)


def _check_apart(path: str, problems: Sequence[Any], other: str, trained: Set[Any]) -> None:
    shared = [number for number, problem in enumerate(problems, start=1) if problem in trained]
    if shared:
        raise InputError(
            f"data.evaluation {path} row {shared[0]}: {len(shared)} of {len(problems)} held-out problems are also "
            f"in {other}; remove them from one of the two files"
        )


def _check_prompts(name: str, path: str, rows: Rows, task: Task, models: Sequence[ModelFacts], config: Config) -> int:
    """Tokens of the longest prompt; refuses it where it leaves no room for a response."""
    tokenizer = models[0].tokenizer
    texts = [(row["prompt"],) for row in rows]
    where = f"{name} {path}"
    longest, number = _longest_prompt(where, texts, lambda i: task.format_prompt(rows[i], tokenizer), tokenizer)
    _check_room(f"{where} row {number}: its", longest, _limits(models, config), config)
    return longest


def _check_privileged_prompts(
    config: Config, prompts: Rows, solutions: Sequence[Solution], models: Mapping[str, ModelFacts], task: Task
) -> None:
    """The prompt with its golden solution in it must leave a teacher that is shown it room for a response."""
    where, tokenizer = f"data.prompts {config.data.prompts}", models["student"].tokenizer
    pairs = pair_solutions(prompts, solutions)
    texts = [(row["prompt"], solutions[pairs[row["id"]]].text) for row in prompts]
    longest, number = _longest_prompt(
        where, texts, lambda i: task.format_privileged_prompt(prompts[i], texts[i][1], tokenizer), tokenizer
    )
    shown = [models[name] for name, teacher in config.teachers.items() if teacher.privileged]
    _check_room(f"{where} row {number}: with its golden solution, its", longest, _limits(shown, config), config)


def _check_room(what: str, prompt: int, limits: Sequence[tuple[str, int]], config: Config) -> None:
    response = config.rollout.longest_response
    for model, limit in limits:
        if prompt + response > limit:
            raise InputError(
                f"{what} {prompt} prompt tokens + rollout.max_response_tokens={response} are "
                f"{prompt + response}, more than the context of {limit} of {model}; "
                f"shorten the prompt or set rollout.max_response_tokens={max(limit - prompt, 1)}"
            )


def _longest_prompt(
    where: str, texts: Sequence[tuple[str, ...]], render: Callable[[int], list[int]], tokenizer: Any
) -> tuple[int, int]:
    """Tokens and row number (1-based) of the longest prompt; ``render(i)`` makes it of ``texts[i]``.

    From the longest text downwards, and not further than a prompt could still win: a text has at most one
    token per byte, besides those of the template around it. So a few rows of a large file are tokenised.
    """
    sizes = [sum(len(text.encode()) for text in row) for row in texts]
    order = sorted(range(len(texts)), key=sizes.__getitem__, reverse=True)
    shortest = order[-1]
    bare = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts[shortest])
    around = len(render_prompt(where, shortest + 1, lambda: render(shortest))) - bare
    longest, number = 0, 0
    for index in order:
        if sizes[index] + around <= longest:
            break
        tokens = len(render_prompt(where, index + 1, lambda index=index: render(index)))
        if tokens > longest:
            longest, number = tokens, index + 1
    return longest, number


def _limits(models: Sequence[ModelFacts], config: Config) -> list[tuple[str, int]]:
    """Who limits the length of a sequence, and to how many tokens."""
    limits = [(model.name, model.context_tokens) for model in models if model.context_tokens is not None]
    cap = config.student.max_context_tokens
    return limits + ([("student.max_context_tokens", cap)] if cap else [])
