"""What the doctor starts on nodes. Plain classes; :mod:`opd_ray.doctor.checks` makes actors of them."""

from __future__ import annotations

import platform
import resource
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import ray

from opd_ray.config import RolloutConfig, ScorerConfig
from opd_ray.messages import GenerationRequest, SamplingSettings, ScoreRequest, TransferGroup
from opd_ray.placement.nodes import Card, cards
from opd_ray.rooms.node import free_port, node_ip, versions

_PATTERN = 251
"""Bytes of a message count up to it; a prime, so that no part of one looks like another."""
_TOKENS = 24
_CONTEXT_TOKENS = 64


@dataclass(frozen=True)
class NodeReport:
    """What a node says about itself."""

    packages: dict[str, str]
    """Versions of the main ones, and of Python."""
    cards: tuple[Card, ...]
    open_files: float
    """That a process may have; infinite without a limit."""
    shm_bytes: float
    """Size of /dev/shm, where Ray keeps its object store; infinite where there is none."""


def report() -> NodeReport:
    """That of the node this runs on."""
    shm = float(psutil.disk_usage("/dev/shm").total) if psutil.LINUX else float("inf")
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if open_files == resource.RLIM_INFINITY:
        open_files = float("inf")
    packages = {"python": platform.python_version(), **versions()}
    return NodeReport(packages, tuple(cards()), open_files, shm)


class Inspector:
    """One on every node."""

    def report(self) -> NodeReport:
        return report()

    def now(self) -> float:
        """Seconds since 1970 by this node's clock."""
        return time.time()

    def put(self, num_bytes: int) -> tuple[float, list[Any]]:
        """Seconds that it took to put an object into this node's store, and its ref."""
        data = _message(num_bytes)
        began = time.perf_counter()
        ref = ray.put(data)
        return time.perf_counter() - began, [ref]

    def get(self, refs: list[Any]) -> float:
        """Seconds that it took to get an object and to read it. Raises ValueError where it is another."""
        began = time.perf_counter()
        data = ray.get(refs[0]).copy()
        seconds = time.perf_counter() - began
        if not np.array_equal(data, _message(len(data))):
            raise ValueError("the object came with other bytes than it was put with")
        return seconds


class Talker:
    """A member of a transfer group, as learner and generators are."""

    def meeting_place(self) -> tuple[str, int]:
        return node_ip(), free_port()

    def talk(self, group: TransferGroup) -> float:
        """Joins the group, sends or receives one broadcast, and leaves; seconds of the broadcast."""
        import torch

        from opd_ray.weights.wires import join

        wire = join(group)
        try:
            expected = torch.from_numpy(_message(group.bucket_bytes)).to(wire.device)
            data = expected.clone() if group.rank == 0 else torch.zeros_like(expected)
            began = time.perf_counter()
            wire.start(data)
            wire.finish()
            seconds = time.perf_counter() - began
            wire.settle()
            if not bool((data == expected).all()):
                raise ValueError("the broadcast came with other bytes than it was sent with")
            return seconds
        finally:
            wire.close()


class EngineHolder:
    """Engines on the small teacher that the package carries."""

    def generated(self, rollout: RolloutConfig) -> float:
        """The largest difference in nats between the log-probs that the generation engine gave its own tokens and those
        of a plain forward pass of transformers."""
        from opd_ray.generate import make_generation_engine

        path, prompt = _teacher()
        engine = make_generation_engine(path, rollout, _CONTEXT_TOKENS)
        # No token ends it, so that there are enough to compare.
        sampling = SamplingSettings(temperature=1.0, top_p=1.0, max_response_tokens=_TOKENS, stop_token_ids=())
        engine.submit(GenerationRequest("doctor", tuple(prompt.tolist()), 0, sampling))
        while not (finished := engine.step()):
            pass
        scorer = ScorerConfig(path=path, gpus_per_actor=rollout.gpus_per_generator)
        scored = _scored(scorer, prompt, finished[0].tokens)
        return float(np.abs(scored - finished[0].logprobs).max())

    def scored_twice(self, scorer: ScorerConfig) -> float:
        """The largest difference in nats between two answers of a scoring engine to the same request."""
        path, prompt = _teacher()
        tokens = np.tile(prompt, _TOKENS)[:_TOKENS]
        one, other = _scored_by(scorer, path, prompt, tokens, times=2)
        return float(np.abs(one - other).max())


def _teacher() -> tuple[str, np.ndarray]:
    """Its directory, and a prompt of four tokens."""
    from opd_ray.embedded.prepare import TEACHER_DIR

    return str(TEACHER_DIR), np.arange(4, 8, dtype=np.int32)


def _scored(scorer: ScorerConfig, prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return _scored_by(scorer, scorer.path, prompt, tokens, times=1)[0]


def _scored_by(
    scorer: ScorerConfig, path: str, prompt: np.ndarray, tokens: np.ndarray, *, times: int
) -> list[np.ndarray]:
    import dataclasses

    from opd_ray.score import make_scoring_engine
    from opd_ray.score.engine import Rollout

    engine = make_scoring_engine(dataclasses.replace(scorer, path=path), _CONTEXT_TOKENS)
    request = ScoreRequest()
    return [engine.score([Rollout(prompt, tokens)], request)[0].logprobs for _ in range(times)]


def _message(num_bytes: int) -> np.ndarray:
    return np.resize(np.arange(_PATTERN, dtype=np.uint8), num_bytes)
