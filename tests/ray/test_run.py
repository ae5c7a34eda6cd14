"""A whole run on real Ray, with real vLLM, real DeepSpeed and small models, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch

import exported_metrics
from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.embedded.prepare import TEACHER_DIR
from opd_ray.learn.losses.diagnostics import RATIOS
from opd_ray.placement.session import cluster
from opd_ray.report.lanes import lanes
from opd_ray.report.runs import read_run
from opd_ray.rooms import logs
from opd_ray.run.evaluate import evaluate
from opd_ray.run.replay import replay
from opd_ray.run.train import train
from opd_ray.watch.metrics import port_name
from rollout_log import rows

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.deepspeed]

STEPS = 6
OPTIONS = [
    f"student.path={TEACHER_DIR}",  # the shipped teacher stands in for the student: there is an accuracy to compare
    "buffer.prompts_per_step=8",
    "rollout.engine=vllm",
    "rollout.max_response_tokens=48",
    "rollout.max_num_seqs=16",
    "evaluation.sets.chains.samples=4",
    "evaluation.sets.chains.greedy=true",
    "evaluation.every_steps=0",
    "metrics.rollout_log_every_steps=1",
    "learner.lr=1e-4",
    f"learner.steps={STEPS}",
    f"checkpoint.every_steps={STEPS // 2}",
]
SELDOM = {f"ray_{port_name(f'learner/{name}')}" for name in (*RATIOS, "advantage_other")}
"""Means over some of the tokens, which a step without such tokens leaves out."""
OF_GPUS = {"ray_node_gram_used", "ray_node_gram_available"}
"""Ray's own, on nodes that have some."""
PLANTED = "planted-and-never-to-be-written"
"""A key in the environment that Ray starts in."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where PyTorch keeps what it compiles."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def ray_here(compiled: Path) -> Iterator[None]:
    """As a run starts it, with more logical CPUs than this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        patch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"CPU": 8}))
        patch.setenv("AWS_SECRET_ACCESS_KEY", PLANTED)
        with cluster():
            yield


@contextlib.contextmanager
def listening() -> Iterator[set[tuple[str, str]]]:
    """(process, address) of all that this process and those that it started listen on meanwhile, as `ss -ltn`."""
    found: set[tuple[str, str]] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
            names = {each.pid: each.info["name"] for each in psutil.process_iter(["name"]) if each in ours}
            sockets = psutil.net_connections("tcp")
            found.update((names[s.pid], s.laddr.ip) for s in sockets if s.status == "LISTEN" and s.pid in names)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join(30)


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    directory: Path
    config: Config
    summary: dict[str, Any]
    port: str
    """What Prometheus read of it."""
    listened: set[tuple[str, str]]
    """Process and address."""

    @property
    def steps(self) -> list[dict[str, float]]:
        """The metrics of each step."""
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "learner/loss" in line]


@pytest.fixture(scope="module")
def finished(world, ray_here, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """vLLM generates, torch scores, DeepSpeed learns, gloo broadcasts: six steps of StableOPD."""
    overrides = [each.replace("data.evaluation", "evaluation.sets.chains.path") for each in world.overrides()]
    config = configs.load(None, [*overrides, *OPTIONS, "metrics.trace=true"])
    directory = tmp_path_factory.mktemp("finished") / "runs" / "a"
    with listening() as listened:
        summary = train(config, directory)
    # Ray exports every ten seconds, and keeps what a run set last for twenty.
    deadline = time.monotonic() + 30
    last = [re.compile(rf"^ray_opd_{name}_step{{.*}} {STEPS}\.0$", re.MULTILINE) for name in ("run", "checkpoint")]
    while not all(each.search(text := port()) for each in last):
        assert time.monotonic() < deadline, "the last step and its checkpoint never came to the metrics port"
        time.sleep(1)
    return Finished(directory, config, summary, text, listened)


def port() -> str:
    """What Prometheus would read."""
    node = ray.nodes()[0]
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as answer:
        return answer.read().decode()


def test_the_default_rooms_train_and_leave_a_complete_run_behind(finished):
    saved = json.loads((finished.directory / "summary.json").read_text())
    assert saved == json.loads(json.dumps(finished.summary))
    assert saved["method"] == "stableopd"
    assert 0 < saved["staleness"]["mean"] <= saved["staleness"]["max"] <= 2
    assert saved["eval_after"]["num_problems"] == 32
    assert {"opd-ray", "torch", "ray"} <= saved["versions"].keys()

    files = sorted((finished.directory / "rollouts").glob("*.parquet"))
    assert [file.name for file in files] == [f"step-{step:06d}.parquet" for step in range(1, STEPS + 1)]
    student = [row for row in rows(finished.directory) if row["source"] == "student"]
    assert sorted(row["slot"] for row in student) == list(range(8 * STEPS)), "every prompt is trained on once"
    versions = [max(row["weight_versions"]) for row in student if row["step"] == STEPS]
    assert max(versions) >= 3, "rollouts come from the weights that were broadcast"
    assert all(len(row["teacher_logprobs"]) == len(row["response_tokens"]) for row in student)
    assert all(row["step"] - 1 - min(row["weight_versions"]) <= 2 for row in student)

    assert [row["step"] for row in finished.steps] == list(range(1, STEPS + 1))
    for name in (
        "learner/loss_student",
        "learner/loss_golden",
        "learner/loss_reference",
        "learner/eos_student_end",
        "idle/generate",
        "queue/buffer_slots",
    ):
        assert name in finished.steps[0]
    assert saved["eval_after"]["teacher"]["teacher_logprob"] < 0, "the teacher has seen the held-out answers, too"
    assert (finished.directory / "report.html").stat().st_size > 100_000
    assert any((finished.directory / "tensorboard").iterdir())
    assert (finished.directory / "checkpoints" / f"step-{STEPS}" / "state.json").is_file()


def test_a_run_of_one_machine_listens_nowhere_but_on_its_loopback(finished):
    names = " ".join(name for name, _ in finished.listened)
    assert all(part in names for part in ("gcs_server", "raylet", "Learner", "Generator", "Dashboard")), names
    assert {address.removeprefix("::ffff:") for _, address in finished.listened} == {"127.0.0.1"}, finished.listened


def test_what_a_run_leaves_behind_is_its_user_s_alone(finished):
    written = [finished.directory, *finished.directory.rglob("*")]
    assert [str(path) for path in written if path.stat().st_mode & 0o077] == []
    assert [str(path) for path in written if path.is_file() and PLANTED.encode() in path.read_bytes()] == []


def test_nothing_is_compiled(finished, compiled):
    """The bug: a function of vLLM's sampler was, with half a minute of g++ on the first run of a machine without a GPU;
    what forbade it was set when torch had looked already."""
    assert list(compiled.iterdir()) == []


def test_avg_at_4_and_pass_at_4_are_those_of_a_count_of_the_verdicts_that_are_kept(finished):
    for when, step in (("before", 0), ("after", STEPS)):
        scores = finished.summary[f"eval_{when}"]["sets"]["chains"]
        kept = pq.read_table(finished.directory / "evaluations" / f"step-{step}" / "chains.parquet").to_pylist()
        right: dict[str, list[bool]] = {}
        for row in kept:
            if row["sample"] is not None:
                right.setdefault(row["prompt_id"], []).append(row["correct"])
        assert [len(answers) for answers in right.values()] == [4] * 32
        assert scores["accuracy_sampled"] == pytest.approx(sum(map(sum, right.values())) / 128)
        assert scores["pass_at"]["4"] == pytest.approx(sum(map(any, right.values())) / 32)
        greedy = [row["correct"] for row in kept if row["sample"] is None]
        assert scores["accuracy_greedy"] == pytest.approx(sum(greedy) / 32)
    assert 'id="sets"' in (finished.directory / "report.html").read_text()


def test_the_exported_student_is_another_model_and_scores_as_it_did_in_the_run(finished):
    """The run sampled with vLLM; here the torch engine does, and transformers reads the checkpoint."""
    from transformers import AutoModelForCausalLM

    expected = finished.summary["eval_after"]
    assert expected["accuracy_greedy"] > 0.5
    before = AutoModelForCausalLM.from_pretrained(TEACHER_DIR).state_dict()
    after = AutoModelForCausalLM.from_pretrained(finished.directory / "student").state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    raw = configs.to_dict(finished.config)
    raw["rollout"]["engine"] = "torch"
    raw["evaluation"]["sets"]["chains"]["samples"] = 1
    again = evaluate(str(finished.directory / "student"), configs.from_dict(raw))
    # One answer of 32 may differ where two tokens are nearly equal.
    assert again["accuracy_greedy"] == pytest.approx(expected["accuracy_greedy"], abs=0.04)
    assert again["num_problems"] == expected["num_problems"]


@pytest.mark.parametrize(("step", "made_of"), [(1, "the student itself"), (4, "a checkpoint"), (6, "steps 4 and 5")])
def test_a_logged_step_replayed_has_the_loss_and_the_gradient_that_were_logged(finished, step, made_of):
    logged = finished.steps[step - 1]
    again = replay(finished.directory, [f"step={step}"]).again
    assert again.metrics["loss"] == pytest.approx(logged["learner/loss"], abs=1e-5), made_of
    assert again.metrics["grad_norm"] == pytest.approx(logged["learner/grad_norm"], rel=1e-3)
    assert again.metrics["loss_reference"] == pytest.approx(logged["learner/loss_reference"], abs=1e-5)


def test_a_step_replayed_under_another_loss_says_what_each_token_would_have_meant(finished):
    found = replay(finished.directory, ["step=4", "loss.student.divergence=k1", "loss.advantage.proximal=0.2"])
    floor = float(np.log1p(-0.2))
    for entry in found.entries:
        loss, push, size, advantage = found.instead.tokens[entry.meta.rollout_id].T
        assert len(loss) == entry.meta.num_response_tokens and (size >= np.abs(push)).all() and (size > 0).any()
        if entry.meta.source == "student":
            assert (advantage >= floor - 1e-6).all() and (np.sign(push) == np.sign(advantage)).mean() > 0.99
    mine = {entry.meta.rollout_id for entry in found.entries if entry.meta.source == "student"}
    tokens = sum(len(values) for name, values in found.again.tokens.items() if name in mine)
    shares = sum(values[:, 0].sum() for name, values in found.again.tokens.items() if name in mine)
    coefs = finished.config.loss
    expected = coefs.student.coef * found.again.metrics["loss_student"]
    expected += coefs.reference.coef * found.again.metrics["loss_reference"]
    assert shares / tokens == pytest.approx(expected, rel=1e-4), "the tokens' shares add up to the loss"
    assert found.instead.metrics["loss_golden"] == pytest.approx(found.again.metrics["loss_golden"], abs=1e-6)


def test_every_query_names_metrics_that_a_run_exports(finished):
    """Those of the dashboard in Grafana and of the alert rules."""
    lines = [line for line in finished.port.splitlines() if line.startswith("ray_")]
    assert all('run="runs/a"' in line for line in lines if line.startswith("ray_opd_"))
    names = {line.partition("{")[0] for line in lines} | SELDOM | OF_GPUS
    for labels in ('IsHeadNode="true"', 'Location="MMAP_SHM"', 'Location="SPILLED"', 'Name="object_store_memory"'):
        assert any(labels in line for line in lines), "an alert reads Ray's own metrics by it"
    missing = {
        pattern.pattern: where
        for where, query in exported_metrics.queries().items()
        for pattern in exported_metrics.names(query)
        if not any(pattern.fullmatch(name) for name in names)
    }
    assert missing == {}


def test_the_trace_has_a_lane_for_every_actor(finished):
    did = {}
    for lane in lanes([read_run(finished.directory)])[0]["lanes"]:
        did[lane["name"]] = {kind for kind, share in lane["shares"] if share}
    assert {"wait", "train", "broadcast", "record"} <= did["driver"]
    assert {"generate", "broadcast"} <= did["student-generator-0"]
    assert "score" in did["teacher-scorer-0"] & did["reference-scorer-0"]
    assert {"load", "train", "broadcast", "snapshot", "wait"} <= did["learner-0"]


def test_a_worker_s_log_line_names_actor_room_node_step_and_version(ray_here):
    """JSON in Ray's log directory, which `ray logs` reads."""

    class Worker:
        async def work(self) -> str:
            logs.at(version=4)
            logs.get("opd_ray.generate.generator").info("weights received", extra={"step": 5})
            return ray.get_runtime_context().get_worker_id()

    options = {"name": "student-generator-7", "runtime_env": {"env_vars": {logs.ROOM_VARIABLE: "generate"}}}
    worker = ray.remote(Worker).options(num_cpus=0, **options).remote()
    worker_id = ray.get(worker.work.remote())
    directory = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    [file] = directory.glob(f"worker-{worker_id}-*.err")
    [line] = [json.loads(each) for each in file.read_text().splitlines() if each.startswith("{")]
    expected = {
        "levelname": "INFO",
        "name": "opd_ray.generate.generator",
        "message": "weights received",
        "actor_name": "student-generator-7",
        "room": "generate",
        "step": 5,
        "version": 4,
        "job_id": ray.get_runtime_context().get_job_id(),
        "node_id": ray.get_runtime_context().get_node_id(),
    }
    assert {key: line.get(key) for key in expected} == expected
    assert line["node"] and line["asctime"]
    ray.kill(worker)
