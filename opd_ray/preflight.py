"""Looks at everything a run will need before a model loads or a file is written.

    check_run_dir     may this run write there, and does --resume continue the same run?
    check_files       packages, prompt files, checkpoints: are they there, whole, and do they agree?
    check_resources   does the cluster have what the rooms ask for?

Each refusal is an InputError of one line: what was got, what was expected,
where, and what to do. Paths are real here; what "embedded" stands for is resolved before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from opd_ray import config as configs
from opd_ray.config import Config, ScorerConfig
from opd_ray.data import read_prompts
from opd_ray.errors import InputError
from opd_ray.models import ModelFacts, check_agreement, inspect
from opd_ray.tasks import Task, get_task

Rows = Sequence[Mapping[str, str]]

# A run that resumes must agree in these with the run it continues: they decide what step n trains on,
# or in what form the checkpoint is. Anything else (steps, deadlines, actors, …) may change on the way.
_FIXED_BY_RUN = (
    "seed",
    "student.path",
    "teacher.path",
    "teacher.eos_map",
    "reference.path",
    "reference.eos_map",
    "data.task",
    "data.prompts",
    "data.golden",
    "data.shuffle",
    "rollout.responses_per_prompt",
    "rollout.max_response_tokens",
    "rollout.temperature",
    "rollout.top_p",
    "buffer.prompts_per_step",
    "buffer.golden_per_prompt",
    "buffer.golden_per_step",
    "loss.opd",
    "loss.opd_coef",
    "loss.sft_coef",
    "loss.reference_kl_coef",
    "learner.num_ranks",
    "learner.zero_stage",
    "learner.dtype",
)


@dataclass(frozen=True)
class Preflight:
    """What the checks found out on the way, and the run needs."""

    eos_token_ids: tuple[int, ...]
    """Every token that ends a response; the first is the one that golden responses get."""
    pad_token_id: int
    vocab_size: int
    tied_embeddings: bool
    max_context_tokens: int
    """Longest prompt + response that student, teacher and reference all take."""
    max_prompt_tokens: int
    """Longest prompt of the training and evaluation files, as the task renders it."""
    num_prompts: int
    num_golden: int
    num_problems: int


def check_evaluation(config: Config) -> Preflight:
    """The checks of an evaluation alone: the student and the held-out problems."""
    _check_packages(config, evaluation_only=True)
    task = get_task(config.data.task)
    problems = read_prompts(config.data.evaluation)
    student = inspect("student.path", config.student.path)
    length = _check_prompts("data.evaluation", config.data.evaluation, problems, task, [student], config)
    return _facts(config, [student], length, num_problems=len(problems))


def check_run_dir(run_dir: Path, config: Config, resume: bool) -> None:
    """Refuses to write over another run, and to continue a run as a different one."""
    saved = run_dir / "config.yaml"
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"--run-dir {run_dir}: is a file; give a new directory")
    if resume and not saved.is_file():
        raise InputError(f"--run-dir {run_dir}: has no run to resume (no config.yaml); leave out --resume to start one")
    if not resume:
        if saved.exists():
            raise InputError(
                f"--run-dir {run_dir}: holds another run; add --resume to go on with it, or give another name"
            )
        return
    before, now = configs.to_dict(configs.load(saved)), configs.to_dict(config)
    for name in _FIXED_BY_RUN:
        old, new = _lookup(before, name), _lookup(now, name)
        # Stand-ins ("embedded", "student") are paths in the saved file: the seed decides what they are.
        if old != new and new not in (configs.EMBEDDED, configs.STUDENT):
            raise InputError(
                f"--resume: {name} is {new!r}, but the run in {run_dir} has {old!r}; "
                f"continue it with {name}={old} or give another --run-dir"
            )


def check_files(config: Config) -> Preflight:
    """Packages, data files and checkpoints, and that they fit each other."""
    _check_packages(config)
    task = get_task(config.data.task)
    data = config.data
    prompts, problems = read_prompts(data.prompts), read_prompts(data.evaluation)
    golden = read_prompts(data.golden, need_response=True) if data.golden and config.buffer.num_golden else []
    _check_disjoint(data.evaluation, problems, {data.prompts: prompts, str(data.golden): golden})
    student = inspect("student.path", config.student.path)
    scorers = _inspect_scorers(config, student)
    lengths = (
        _check_prompts("data.prompts", data.prompts, prompts, task, [student, *scorers], config),
        _check_prompts("data.evaluation", data.evaluation, problems, task, [student], config),
    )
    _check_golden(str(data.golden), golden, task, student, config)
    return _facts(
        config,
        [student, *scorers],
        max(lengths),
        num_prompts=len(prompts),
        num_golden=len(golden),
        num_problems=len(problems),
    )


def check_generators(config: Config, cluster_resources: Mapping[str, float]) -> None:
    """Refuses more generators than the cluster has room for; what an evaluation needs."""
    _check_fits(_generators(config), cluster_resources)


def check_resources(config: Config, cluster_resources: Mapping[str, float]) -> None:
    """Refuses more ranks, engines or scorers than the cluster has CPUs and GPUs for.

    ``cluster_resources`` is what ``ray.cluster_resources()`` returns.
    """
    learner = config.learner
    asked = {"learner": (learner.num_ranks, learner.cpus_per_rank, learner.gpus_per_rank), **_generators(config)}
    for role, scorer in _scorers(config).items():
        asked[role] = (scorer.num_actors, scorer.cpus_per_actor, scorer.gpus_per_actor)
    _check_fits(asked, cluster_resources)


def _facts(config: Config, models: Sequence[ModelFacts], max_prompt_tokens: int, **counts: int) -> Preflight:
    student = models[0]
    limits = [model.context_tokens for model in models if model.context_tokens is not None]
    cap = config.student.max_context_tokens
    needed = max_prompt_tokens + config.rollout.max_response_tokens
    return Preflight(
        eos_token_ids=student.eos_token_ids,
        pad_token_id=student.pad_token_id,
        vocab_size=student.vocab_size,
        tied_embeddings=student.tied_embeddings,
        max_context_tokens=min([*limits, *([cap] if cap else [])], default=needed),
        max_prompt_tokens=max_prompt_tokens,
        **{"num_prompts": 0, "num_golden": 0, "num_problems": 0, **counts},
    )


def _generators(config: Config) -> dict[str, tuple[int, float, float]]:
    rollout = config.rollout
    gpus = rollout.gpus_per_generator * rollout.tensor_parallel_size
    return {"generators": (rollout.num_generators, rollout.cpus_per_generator, gpus)}


def _scorers(config: Config) -> dict[str, ScorerConfig]:
    """The scorer pools that this run starts."""
    pools = {"teacher": config.teacher} if config.buffer.prompts_per_step else {}
    return pools | ({"reference": config.reference} if config.loss.needs_reference else {})


def _check_fits(asked: Mapping[str, tuple[int, float, float]], there: Mapping[str, float]) -> None:
    """``asked``: room to (actors, CPUs each, GPUs each)."""
    for kind, index in (("CPU", 1), ("GPU", 2)):
        total = sum(room[0] * room[index] for room in asked.values())
        if total > there.get(kind, 0) + 1e-6:
            parts = ", ".join(f"{name} {room[0]} x {room[index]:g}" for name, room in asked.items() if room[index])
            raise InputError(
                f"cluster: {total:g} {kind}s asked ({parts}), {there.get(kind, 0):g} there; "
                f"ask for less (learner.num_ranks, rollout.num_generators, *.{kind.lower()}s_per_*) or add nodes"
            )


def _check_packages(config: Config, evaluation_only: bool = False) -> None:
    engines = {"rollout.engine": config.rollout.engine}
    if not evaluation_only:
        engines |= {f"{role}.engine": scorer.engine for role, scorer in _scorers(config).items()}
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


def _inspect_scorers(config: Config, student: ModelFacts) -> list[ModelFacts]:
    found = []
    for role, scorer in _scorers(config).items():
        facts = student if scorer.path == config.student.path else inspect(f"{role}.path", scorer.path)
        check_agreement(student, facts, scorer.eos_map, f"{role}.eos_map")
        found.append(facts)
    return found


def _check_disjoint(path: str, problems: Rows, training: Mapping[str, Rows]) -> None:
    """A held-out problem that is trained on measures memory."""
    for other, rows in training.items():
        trained = {row["prompt"].strip() for row in rows}
        shared = [number for number, row in enumerate(problems, start=1) if row["prompt"].strip() in trained]
        if shared:
            raise InputError(
                f"data.evaluation {path} row {shared[0]}: {len(shared)} of {len(problems)} held-out problems are also "
                f"in {other}; remove them from one of the two files"
            )


def _check_prompts(name: str, path: str, rows: Rows, task: Task, models: Sequence[ModelFacts], config: Config) -> int:
    """Tokens of the longest prompt; refuses it where it leaves no room for a response."""
    longest, number = _longest_prompt(f"{name} {path}", rows, task, models[0].tokenizer)
    response = config.rollout.max_response_tokens
    for model, limit in _limits(models, config):
        if longest + response > limit:
            raise InputError(
                f"{name} {path} row {number}: its {longest} prompt tokens + rollout.max_response_tokens={response} are "
                f"{longest + response}, more than the context of {limit} of {model}; "
                f"shorten the prompt or set rollout.max_response_tokens={max(limit - longest, 1)}"
            )
    return longest


def _longest_prompt(where: str, rows: Rows, task: Task, tokenizer: Any) -> tuple[int, int]:
    """Tokens and row number (1-based) of the longest prompt.

    From the longest text downwards, and not further than a prompt could still win: a text has at most one
    token per byte, besides those of the template around it. So a few rows of a large file are tokenised.
    """
    sizes = [len(row["prompt"].encode()) for row in rows]
    order = sorted(range(len(rows)), key=sizes.__getitem__, reverse=True)
    shortest = order[-1]
    bare = len(tokenizer(rows[shortest]["prompt"], add_special_tokens=False)["input_ids"])
    around = len(_render(where, shortest, rows, task, tokenizer)) - bare
    longest, number = 0, 0
    for index in order:
        if sizes[index] + around <= longest:
            break
        tokens = len(_render(where, index, rows, task, tokenizer))
        if tokens > longest:
            longest, number = tokens, index + 1
    return longest, number


def _render(where: str, index: int, rows: Rows, task: Task, tokenizer: Any) -> list[int]:
    try:
        return task.format_prompt(rows[index], tokenizer)
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where} row {index + 1}: the task cannot render the prompt ({reason})") from None


def _check_golden(path: str, rows: Rows, task: Task, student: ModelFacts, config: Config) -> None:
    """A golden row must fit the student with its EOS, which the package appends."""
    if not rows:
        return
    where, eos = f"data.golden {path}", set(student.eos_token_ids)
    limits = _limits([student], config)
    responses = student.tokenizer([row["response"] for row in rows], add_special_tokens=False)["input_ids"]
    for index, response in enumerate(responses):
        if eos & set(response):
            token = student.tokenizer.convert_ids_to_tokens(min(eos & set(response)))
            raise InputError(
                f"{where} row {index + 1}: the response contains the EOS {token!r}; remove it, one is appended to each"
            )
        total = len(_render(where, index, rows, task, student.tokenizer)) + len(response) + 1
        for model, limit in limits:
            if total > limit:
                raise InputError(
                    f"{where} row {index + 1}: prompt, response and EOS have {total} tokens, "
                    f"more than the context of {limit} of {model}; shorten or remove the row"
                )


def _limits(models: Sequence[ModelFacts], config: Config) -> list[tuple[str, int]]:
    """Who limits the length of a sequence, and to how many tokens."""
    limits = [(model.name, model.context_tokens) for model in models if model.context_tokens is not None]
    cap = config.student.max_context_tokens
    return limits + ([("student.max_context_tokens", cap)] if cap else [])


def _lookup(raw: Mapping[str, Any], name: str) -> Any:
    for part in name.split("."):
        raw = raw[part]
    return raw
