"""Looks at everything a run will need before a model loads or the run directory is written.

    check_files       packages, prompt files, checkpoints: are they there, whole, and do they agree?
    check_weights     are the weights those of the models?
    check_resources   does the cluster have what the rooms ask for?

Each refusal is an InputError of one line: what was got, what was expected,
where, and what to do. Paths are real here; what "embedded" and "student" stand for is resolved before. Models of the
Hub get their commits in check_files, behind the checks of data: who goes on does so with Preflight.commits.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from opd_ray.config import STUDENT, Config
from opd_ray.data import checks
from opd_ray.data.checks import Longest
from opd_ray.data.dataset import Dataset
from opd_ray.embedded.prepare import is_embedded
from opd_ray.errors import InputError, RunError
from opd_ray.models import checkpoints, hub, weights
from opd_ray.models.adapters import adapted_layers
from opd_ray.models.checkpoints import ModelFacts, inspect, inspect_run, locate_models
from opd_ray.models.engine_args import check_engine_args
from opd_ray.models.size import DTYPE_BYTES, ModelSize, cache_bytes
from opd_ray.placement.wanted import Wanted
from opd_ray.run import translations
from opd_ray.tasks import look_here
from opd_ray.tasks.judge import Judge
from opd_ray.watch.trackers import check_trackers

if TYPE_CHECKING:
    from opd_ray.run.servers import Look
    from opd_ray.score.replicas import Baseline
    from opd_ray.score.translation import Translation

_NO_LIMIT = 2**20
"""Tokens."""


@dataclass(frozen=True)
class Preflight:
    """What the checks found out on the way, and the run needs."""

    eos_token_ids: tuple[int, ...]
    """Every token that ends a response, for the student or for a scorer; golden responses get the first."""
    max_context_tokens: int
    """Longest prompt + response that the run can have, golden and privileged ones included: what engines are made for,
    which may be far less than what the checkpoints allow."""
    max_prompt_tokens: int
    """Longest prompt of the training and evaluation files, as the task renders it."""
    num_prompts: int
    num_problems: int
    prompts: Mapping[str, int]
    """Rows of the prompts' sources, used, and left out by kind of problem."""
    golden: Mapping[str, int]
    """Rows of the golden file, used, and left out by kind of problem; empty where no golden data is read."""
    data: Dataset = field(repr=False, compare=False)
    sizes: Mapping[str, ModelSize] = field(default_factory=dict, repr=False, compare=False)
    """Of "student" and of every other model by its role."""
    servers: Mapping[str, Baseline] = field(default_factory=dict, repr=False, compare=False)
    """By role that is scored by servers: what they are when the run begins."""
    translations: Mapping[str, Translation] = field(default_factory=dict, repr=False)
    """By teacher with another tokenizer than the student's: how it is asked about the student's rollouts."""
    commits: Mapping[str, str] = field(default_factory=dict)
    """Of models of the Hub: what they are called in the configuration, and org/name@COMMIT, which was looked at."""


def _without_torch(check: Callable[[Config], Preflight]) -> Callable[[Config], Preflight]:
    """The check in a fork that has no torch, where this process has not imported it yet.

    Tokenizers need none, and without it transformers is there in a third of the time: what is refused is refused at
    once. A process with threads is not forked: they may hold locks.
    """

    @functools.wraps(check)
    def run(config: Config) -> Preflight:
        if "torch" in sys.modules or threading.active_count() > 1 or sys.platform != "linux":
            return check(config)
        look_here()  # the fork hands over a task of the user's, which is to be found here as well
        try:
            with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), initializer=_hide_torch) as fork:
                return fork.submit(run, config).result()
        except ImportError:  # a task of the user's own may need torch
            return check(config)
        except BrokenProcessPool:
            raise RunError(
                "the process that looked at data and checkpoints was killed, for lack of memory as a rule; see the "
                "kernel's log, and give smaller files or a machine with more memory"
            ) from None

    return run


def _hide_torch() -> None:
    """As if it were not installed; transformers then offers tokenizers and configurations."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    sys.modules["torch"] = None


@_without_torch
def check_evaluation(config: Config) -> Preflight:
    """The checks of an evaluation alone: the student and the held-out problems."""
    _check_packages(config, evaluation_only=True)
    data = Dataset(config, evaluation_only=True)
    with Judge(data.renderer.task) as judge:
        checks.check_texts(config, data, judge)
    student = inspect("student.path", config.student.path)
    data.renderer.tokenizer = student.tokenizer
    data.renderer.check(student.name)
    models = {"student": student}
    data.renderer.most_tokens = _longest_context(config, models)
    return _facts(config, models, student.eos_token_ids, data, checks.check_problems(config, data, models))


@_without_torch
def check_files(config: Config) -> Preflight:
    """Packages, data files and checkpoints, and that they fit each other."""
    _check_packages(config)
    data = Dataset(config)
    with Judge(data.renderer.task) as judge:
        checks.check_texts(config, data, judge)
        commits = locate_models(config)
        config = hub.pinned(config, commits)
        models = inspect_run(config)
        student = models["student"]
        _check_dense(student)
        _check_adapters(config, student)
        data.renderer.path, data.renderer.tokenizer = config.student.path, student.tokenizer
        data.renderer.check(student.name)
        data.renderer.most_tokens = _longest_context(config, models)
        foreign = translations.check(config, models)
        alike = {role: facts for role, facts in models.items() if role not in foreign}
        renamed = {role: checkpoints.check_agreement(student, facts) for role, facts in alike.items()}
        translations.prepare(config, data, models, foreign)
        servers = _look_at_servers(config, models, data)
        models |= {role: look.facts for role, look in servers.items()}
        eos_token_ids = stop_token_ids(config, models)
        longest = checks.check_prompts(config, data, {role: models[role] for role in models if role not in foreign})
        checks.check_markup(data.prompts, models, renamed)
        data.read_golden(models, eos_token_ids, judge)
    checks.check_golden(config, data, models)
    checks.check_translated(config, data, models)
    checks.check_teachers(config, data)
    asked = translations.translations(config, data, models, eos_token_ids)
    longest = longest._replace(sequence=max([longest.sequence, *(each.most_tokens for each in asked.values())]))
    facts = _facts(config, models, eos_token_ids, data, longest)
    facts = replace(facts, commits=commits, translations=asked)
    return replace(facts, servers=_baselines(config, servers, facts)) if servers else facts


def check_weights(config: Config, *, evaluation_only: bool = False) -> None:
    """The weights of every model that is loaded against its config.json: the one check that imports torch, once all
    others have passed. What the package made itself is not looked at."""
    asked = {config.student.path: ("student.path", False)}
    if not evaluation_only:
        for role, scorer in checkpoints.used(config).items():
            writes = role == "teacher" and config.buffer.has_teacher_write
            # Where it is left open, a quantised one is taken for a large one.
            engines = [scorer.engine] * (not scorer.url) + [config.rollout.engine_for(math.inf)] * writes
            if checkpoints.is_loaded(config, role) and scorer.path != STUDENT:
                name, may = asked.get(scorer.path, (f"{checkpoints.field_of(config, role)}.path", True))
                asked[scorer.path] = (name, may and "torch" not in engines)
    for path, (name, quantised) in asked.items():
        if not is_embedded(path):
            weights.check_weights(f"{name}={path}", path, quantised=quantised)


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
    check_rooms(Wanted.of([config]), capacity)


def check_rooms(wanted: Wanted, capacity: Capacity) -> None:
    """The same for the rooms of several runs, which are up at once."""
    learner, rollout = wanted.first.learner, wanted.first.rollout
    ranks = _Asked(learner.num_ranks, learner.cpus_per_rank, learner.gpus_per_rank, learner.node_resource)
    asked = {"learner": ranks, "generators": _generators(wanted.first, rollout.size.minimum)}
    if wanted.writer:
        asked["teacher generators"] = _generators(wanted.writer, wanted.writer.rollout.teacher_generators)
    for role, config in wanted.scorers.items():
        scorer = config.scorers[role]
        asked[role] = _Asked(scorer.size.minimum, scorer.cpus_per_actor, scorer.gpus_in_all, scorer.node_resource)
    _check_fits(asked, capacity)


def _facts(
    config: Config,
    models: Mapping[str, ModelFacts],
    eos_token_ids: tuple[int, ...],
    data: Dataset,
    found: Longest,
) -> Preflight:
    longest = found.sequence
    if data.shown:
        longest = max(longest, data.shown.longest()[0] + config.rollout.longest_response)
    for each in data.golden.solutions if data.golden else ():
        prompt = max(len(each.prompt_tokens), len(each.privileged_prompt_tokens))
        longest = max(longest, prompt + len(each.response_tokens))
    _check_caches(config, models, longest)
    writers = ["student", *(["teacher"] if config.buffer.has_teacher_write and "teacher" in models else [])]
    if "vllm" in (config.rollout.engine_for(models[role].size.parameters) for role in writers):
        _check_vllm("rollout", config.rollout.engine)
    return Preflight(
        eos_token_ids=eos_token_ids,
        max_context_tokens=longest,
        max_prompt_tokens=found.prompt,
        num_prompts=len(data.prompts or ()),
        num_problems=sum(map(len, data.problems.values())),
        prompts=data.report,
        golden=data.golden.report if data.golden else {},
        data=data,
        sizes={role: model.size for role, model in models.items()},
    )


def _longest_context(config: Config, models: Mapping[str, ModelFacts]) -> int:
    """Of all models; of one that sets no limit, what no prompt is longer than."""
    return config.student.max_context_tokens or max(each.context_tokens or _NO_LIMIT for each in models.values())


def _check_caches(config: Config, models: Mapping[str, ModelFacts], longest: int) -> None:
    """A key-value cache that cannot hold one sequence ends a vLLM engine while it starts."""
    engines = {"rollout": (config.rollout, "student")} | {role: (it, role) for role, it in config.scorers.items()}
    for section, (engine, role) in engines.items():
        if engine.kv_cache_bytes is None or engine.engine == "torch" or role not in models:
            continue
        # No more than the checkpoint takes; a scorer's sequences have the token that vLLM insists on sampling.
        tokens = min(longest, models[role].context_tokens or longest) + (role != "student")
        needed = cache_bytes(models[role].size.kv_bytes_per_token(DTYPE_BYTES[engine.dtype]), tokens, 1)
        if engine.kv_cache_bytes < needed:
            raise InputError(
                f"{checkpoints.field_of(config, section)}.kv_cache_bytes={engine.kv_cache_bytes}, but a sequence of "
                f"the longest prompt and response, {tokens} tokens, takes {needed}; leave it out, or give at least that"
            )


def _look_at_servers(config: Config, models: Mapping[str, ModelFacts], data: Dataset) -> dict[str, Look]:
    if not any(scorer.url for scorer in config.scorers.values()):
        return {}
    from opd_ray.run.servers import looks  # an HTTP client, which no other run needs

    return looks(config, models, data)


def _baselines(config: Config, found: Mapping[str, Look], facts: Preflight) -> dict[str, Baseline]:
    from opd_ray.run.servers import baselines

    return baselines(config, found, facts.eos_token_ids, facts.translations)


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
    if not evaluation_only:
        check_trackers(config)
        check_peft(config)
    engines = {"rollout": config.rollout}
    if not evaluation_only:
        engines |= {role: scorer for role, scorer in config.scorers.items() if not scorer.url}
    for section, room in engines.items():
        if room.engine == "vllm":
            _check_vllm(section, room.engine)
        check_engine_args(f"{section}.engine_args", room.engine_args)
    if not evaluation_only and find_spec("deepspeed") is None:
        raise InputError("the learner needs DeepSpeed, which is not installed; pip install 'opd_ray[deepspeed]'")
    if not evaluation_only and config.learner.attention == "flash" and find_spec("flash_attn") is None:
        raise InputError(
            "learner.attention=flash needs flash-attn, which is not installed; pip install 'opd_ray[flash]', or leave "
            "learner.attention out"
        )
    for task, package, extra in (("math", "math_verify", "math"), ("reasoning_gym", "reasoning_gym", "gym")):
        if config.data.task == task and find_spec(package) is None:
            name = package.replace("_", "-")
            raise InputError(f"data.task={task} needs {name}, which is not installed; pip install 'opd_ray[{extra}]'")


def _check_vllm(section: str, engine: str) -> None:
    if find_spec("vllm") is None:
        taken = f"{section}.engine={engine}" + (", which takes vLLM for this model" if engine == "auto" else "")
        raise InputError(
            f"{taken}, but vLLM is not installed; run 'make setup' (CPU) or "
            f"pip install 'opd_ray[gpu]' (CUDA), or set {section}.engine=torch"
        )


def check_peft(config: Config) -> None:
    """Refuses to train adapters, or to write them, without the package that makes them."""
    if config.student.lora and find_spec("peft") is None:
        raise InputError("student.lora needs peft, which is not installed; pip install 'opd_ray[lora]'")


def _check_dense(student: ModelFacts) -> None:
    """No test has shown yet that a broadcast reaches every expert of a vLLM engine."""
    if student.num_experts > 1:
        raise InputError(
            f"{student.name}: has {student.num_experts} experts a layer, but students must be dense so far; teachers "
            "and the reference may have experts"
        )


def _check_adapters(config: Config, student: ModelFacts) -> None:
    """Refuses targets that are none of the student's layers; of a name on the hub the learner does so."""
    if config.student.lora and (directory := Path(config.student.path)).is_dir():
        adapted_layers(student.name, directory, config.student.lora)


def stop_token_ids(config: Config, models: Mapping[str, ModelFacts]) -> tuple[int, ...]:
    """The EOS set of the student and of all that score it in its tokens; the first id stands for all."""
    foreign = translations.others(config, models)
    given = {role: scorer.eos_token_ids for role, scorer in config.scorers.items() if role not in foreign}
    given |= {"teacher": config.teacher.eos_token_ids} if "teacher" in models.keys() - foreign.keys() else {}
    asked = {checkpoints.field_of(config, role): (models[role], ids) for role, ids in given.items()}
    return checkpoints.eos_set(models["student"], asked)
