"""The doctor's checks: each asks the nodes something, by a deadline of its own, and none stops the others."""

from __future__ import annotations

import dataclasses
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray.actor import ActorHandle

from opd_ray.config import EMBEDDED_STUDENTS, Config, RolloutConfig, ScorerConfig
from opd_ray.doctor import findings
from opd_ray.doctor.findings import Finding
from opd_ray.doctor.inspector import EngineHolder, Inspector, NodeReport, Talker, report
from opd_ray.errors import InputError, RunError, ServerFailed
from opd_ray.generate import chosen_engine
from opd_ray.messages import TransferGroup
from opd_ray.placement.nodes import Node, answers, nodes, pinned
from opd_ray.rooms.threads import within
from opd_ray.score.server import Key, Server, key_in
from opd_ray.snapshots import Storage

_QUICK_S, _TALK_S, _STORE_S, _DISK_S, _ENGINE_S = 60.0, 180.0, 120.0, 120.0, 300.0
_MEETING_S = 30.0
"""Within which two processes form a group and send each other a message."""
_MESSAGE_BYTES = 16 * 2**20
_OBJECT_BYTES = 64 * 2**20
_STORE_TRIES = 3
"""Of which the best counts: what else a machine does in a moment is not its network."""
_DISK_BYTES = 64 * 2**20
_CLOCK_LOOKS = 5
_FILE = ".opd-ray-doctor"


class Doctor:
    """Checks the connected cluster for one configuration."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._config, self._run_dir = config, run_dir
        self._nodes: dict[str, Node] = {}
        """By name; those that answer."""
        self._inspectors: dict[str, ActorHandle] = {}
        self._reports: dict[str, NodeReport] = {}

    def findings(self) -> Iterator[Finding]:
        """What each check finds, one after the other."""
        yield from self._bounded("nodes", _QUICK_S, self._look)
        if not self._nodes:
            return
        for name, limit_s, check in (
            ("driver", _QUICK_S, lambda: [findings.drivers(self._reports)]),
            ("packages", _QUICK_S, lambda: [findings.packages(self._reports, "this process", report())]),
            ("clocks", _QUICK_S, self._clocks),
            ("limits", _QUICK_S, self._limits),
            ("object store", _STORE_S, self._store),
            ("disk", _DISK_S, self._disk),
            (f"{self._config.weight_backend} broadcast", _TALK_S, self._broadcast),
            ("engine", _ENGINE_S, self._engine),
            ("teacher", _ENGINE_S, self._teacher),
        ):
            yield from self._bounded(name, limit_s, check)

    def _bounded(self, name: str, limit_s: float, check: Callable[[], list[Finding]]) -> list[Finding]:
        try:
            return within(limit_s, check)
        except Exception as error:  # of whatever kind: the other checks go on
            cause = " ".join(str(getattr(error, "cause", None) or error).split()) or type(error).__name__
            return [Finding(name, cause[:400], "see the logs of its actors in the Ray dashboard")]

    # ---- the checks ----

    def _look(self) -> list[Finding]:
        there = {f"{node.name}, node {node.id[:6]}": node for node in nodes()}
        asked = {name: _start(Inspector, node) for name, node in there.items()}
        said = answers({name: actor.report.remote() for name, actor in asked.items()}, _QUICK_S / 2)
        found = []
        for name, answer in said.items():
            if isinstance(answer, NodeReport):
                self._nodes[name], self._inspectors[name], self._reports[name] = there[name], asked[name], answer
            else:
                found.append(Finding("nodes", f"{name}: {answer}", "see its raylet's log, or leave the node out"))
        gpus = sum(node.gpus for node in self._nodes.values())
        text = f"{len(self._nodes)} of {len(there)} answer, with {gpus:g} GPUs"
        return found or [Finding("nodes", text)]

    def _clocks(self) -> list[Finding]:
        skews = {}
        for name, inspector in self._inspectors.items():
            looks = []
            for _ in range(_CLOCK_LOOKS):
                before = time.time()
                there = ray.get(inspector.now.remote(), timeout=_QUICK_S)
                after = time.time()
                looks.append((there - (before + after) / 2, (after - before) / 2))
            skews[name] = min(looks, key=lambda look: look[1])
        return [findings.clocks(skews)]

    def _limits(self) -> list[Finding]:
        return findings.limits(self._reports, {name: node.store_bytes for name, node in self._nodes.items()})

    def _store(self) -> list[Finding]:
        """Every node's store into the next one's process; of a single node into its own."""
        names = list(self._inspectors)
        rates = {}
        for giver, taker in zip(names, names[1:] + names[:1], strict=True):
            rates[giver, taker] = max(
                self._rate(self._inspectors[giver], self._inspectors[taker]) for _ in range(_STORE_TRIES)
            )
        return [findings.store(rates)]

    def _rate(self, giver: ActorHandle, taker: ActorHandle) -> float:
        put_s, [ref] = ray.get(giver.put.remote(_OBJECT_BYTES), timeout=_STORE_S)
        return _OBJECT_BYTES / (put_s + ray.get(taker.get.remote([ref]), timeout=_STORE_S))

    def _disk(self) -> list[Finding]:
        """Where the run directory would be, and where checkpoints would go if that is elsewhere."""
        found = [_written(self._run_dir)]
        elsewhere = self._config.checkpoint.directory
        if elsewhere is not None:
            storage = Storage(self._config.checkpoint.location(self._run_dir))
            found.append(_written(Path(storage.location)) if storage.is_local else _timed(storage, None))
        return found

    def _broadcast(self) -> list[Finding]:
        """Between every two nodes, as many pairs at once as there are nodes for; two processes of a single one."""
        config, places = self._config, list(self._nodes.items())
        gpus = config.weight_backend == "nccl"
        places = [(name, node) for name, node in places if node.gpus or not gpus]
        if gpus and (number := sum(node.gpus for _, node in places)) < 2:
            there = "one GPU" if number else "no GPU"
            return [Finding("nccl broadcast", f"there is {there}: nothing to send weights between")]
        if len(places) == 1:
            places *= 2
        talkers = [_start(Talker, node, num_gpus=1 if gpus else 0) for _, node in places]
        name, failed, seconds = f"{config.weight_backend} broadcast", [], []
        for pairs in findings.tournament(range(len(talkers))):
            met = [(one, other, self._meet(talkers[one], talkers[other])) for one, other in pairs]
            for one, other, refs in met:
                for answer in answers(dict(enumerate(refs)), 2 * _MEETING_S).values():
                    if isinstance(answer, float):
                        seconds.append(answer)
                    else:
                        failed.append(f"{places[one][0]} and {places[other][0]}: {answer}")
        for talker in talkers:
            ray.kill(talker)
        if failed:
            mend = "open the ports between them, and set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME to their interface"
            return [Finding(name, f"{failed[0]} ({len(failed)} failures)", mend)]
        rate = findings.gigabytes(_MESSAGE_BYTES / max(seconds))
        return [Finding(name, f"{rate}/s at least, between {len(seconds) // 2} pairs of processes")]

    def _meet(self, one: ActorHandle, other: ActorHandle) -> list[Any]:
        host, port = ray.get(one.meeting_place.remote(), timeout=_QUICK_S)
        backend = self._config.weight_backend
        ours = TransferGroup(backend, host, port, 0, 2, _MEETING_S, _MESSAGE_BYTES, secrets.token_hex(32))
        groups = (dataclasses.replace(ours, rank=rank) for rank in range(2))
        return [talker.talk.remote(group) for talker, group in zip((one, other), groups, strict=True)]

    def _engine(self) -> list[Finding]:
        rollout = self._config.rollout
        path = self._config.student.path
        try:  # the embedded ones, which may not have been built yet, are small
            engine = rollout.engine_for(0) if path in EMBEDDED_STUDENTS else chosen_engine(path, rollout)
        except InputError as error:  # which begins with the path
            mend = "put the checkpoint there: rollout.engine=auto goes by its size; or set rollout.engine"
            return [Finding("engine", f"student.path={error}", mend)]
        alike = {"engine": engine, "tensor_parallel_size": 1, "max_num_seqs": 4, "kv_cache_bytes": None}
        small = partial(dataclasses.replace, rollout, **alike)
        gpus = min(1.0, rollout.gpus_per_generator)
        differences = self._on_holders("generated", gpus, small(gpus_per_generator=gpus))
        return [findings.engine(differences, engine, rollout.dtype)]

    def _teacher(self) -> list[Finding]:
        teacher = self._config.teacher
        if teacher.url:
            return list(map(partial(_server, key=key_in(teacher.url_key_env)), teacher.url))
        small = partial(dataclasses.replace, teacher, tensor_parallel_size=1, max_num_seqs=4, kv_cache_bytes=None)
        gpus = min(1.0, teacher.gpus_per_actor)
        differences = self._on_holders("scored_twice", gpus, small(gpus_per_actor=gpus))
        return [findings.teacher(differences, teacher.engine, teacher.dtype)]

    def _on_holders(self, method: str, gpus: float, settings: RolloutConfig | ScorerConfig) -> dict[str, float]:
        """The answer of every node, from a process of its own: an engine binds the memory that it finds. Raises
        RunError with the first failure."""
        places = {name: node for name, node in self._nodes.items() if node.gpus >= gpus}
        holders = {name: _start(EngineHolder, node, num_gpus=gpus) for name, node in places.items()}
        refs = {name: getattr(holder, method).remote(settings) for name, holder in holders.items()}
        found = answers(refs, _ENGINE_S - 10)
        for holder in holders.values():
            ray.kill(holder)
        for name, answer in found.items():
            if not isinstance(answer, float):
                raise RunError(f"{name}: {answer}")
        if not found:
            raise RunError(f"no node has the {gpus:g} GPUs that it asks for")
        return found


def _server(url: str, key: Key | None) -> Finding:
    """Does a server of the teacher's let this machine in? Preflight asks it for the rest."""
    try:
        served = ", ".join(card["id"] for card in Server(url, key=key).models())
    except ServerFailed as error:
        return Finding("teacher", str(error), "start a vLLM server there; see teacher.url and teacher.url_key_env")
    return Finding("teacher", f"{url} serves {served}")


def _start(kind: type, node: Node, num_gpus: float = 0.0) -> ActorHandle:
    variables = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    options = {"num_cpus": 0, "num_gpus": num_gpus, "runtime_env": {"env_vars": variables}}
    return ray.remote(kind).options(scheduling_strategy=pinned(node), **options).remote()


def _written(directory: Path) -> Finding:
    """Of a directory of this machine, or of the nearest that is there already; it is left as it was."""
    directory = next(each for each in (directory, *directory.parents) if each.is_dir())
    with tempfile.TemporaryDirectory(prefix=_FILE, dir=directory) as inside:
        return _timed(Storage(inside), directory)


def _timed(storage: Storage, directory: Path | None) -> Finding:
    chunk = np.random.default_rng(0).bytes(2**20)
    began = time.perf_counter()
    storage.write(_FILE, (chunk for _ in range(_DISK_BYTES // len(chunk))))
    rate = _DISK_BYTES / (time.perf_counter() - began)
    storage.delete(_FILE)
    if directory is None:
        return findings.disk(storage.url(), rate, None)
    return findings.disk(str(directory), rate, psutil.disk_usage(str(directory)).free)
