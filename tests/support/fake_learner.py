"""A learner without DeepSpeed: a bigram model that one process really trains, with numpy alone.

It keeps a journal of what it did, and remembers in its state which slots it was trained on, in their order: what is
in the state at the end is the history of the final weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd_ray.config import Config
from opd_ray.messages import MemoryUse, StepOutcome, StepPlan, TransferGroup, WeightManifest
from opd_ray.rooms.node import free_port, node_ip, this_node

VOCAB_SIZE = 32
JOURNAL = "learner.jsonl"
"""Beside the directory of the checkpoints."""


@dataclass(frozen=True)
class Row:
    """What the model is trained on of one rollout."""

    slot: int
    tokens: np.ndarray
    """[T] the response."""
    teacher_logprobs: np.ndarray
    """[T]"""


class Bigram:
    """P(token | token before) as one table, Adam's moments of it, and the slots it has seen.

    Gradient and Adam are written out: torch takes longer to import than everything else that a fake learner needs.
    """

    def __init__(self, lr: float) -> None:
        self._table = np.random.default_rng(0).normal(size=(VOCAB_SIZE, VOCAB_SIZE))
        self._mean, self._square = np.zeros_like(self._table), np.zeros_like(self._table)
        self._lr = lr
        self.slots: list[int] = []
        self.steps = 0

    def step(self, rows: Sequence[Row]) -> float:
        """One optimizer step on the rows of a step, whatever their order; the loss before it."""
        rows = sorted(rows, key=lambda row: row.slot)
        tokens = np.concatenate([row.tokens for row in rows])
        before = np.concatenate([[0, *row.tokens[:-1]] for row in rows])
        teacher = np.concatenate([row.teacher_logprobs for row in rows]).astype(np.float64)
        logprobs = self._table[before] - np.log(np.exp(self._table[before]).sum(-1, keepdims=True))
        loss = (teacher - logprobs[np.arange(len(tokens)), tokens]).mean()
        gradient = np.zeros_like(self._table)
        np.add.at(gradient, before, np.exp(logprobs) / len(tokens))
        np.add.at(gradient, (before, tokens), -1 / len(tokens))
        self.steps += 1
        self._mean += 0.1 * (gradient - self._mean)
        self._square += 0.001 * (gradient**2 - self._square)
        mean, square = self._mean / (1 - 0.9**self.steps), self._square / (1 - 0.999**self.steps)
        self._table -= self._lr * mean / (np.sqrt(square) + 1e-8)
        self.slots += [row.slot for row in rows]
        return float(loss)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on, besides ``steps``; copies."""
        values = {"table": self._table, "mean": self._mean, "square": self._square}
        return {name: value.copy() for name, value in values.items()} | {"slots": np.array(self.slots, int)}

    def load(self, arrays: Mapping[str, np.ndarray], steps: int) -> None:
        """Goes on from ``arrays()``."""
        self._table, self._mean, self._square = (np.array(arrays[name]) for name in ("table", "mean", "square"))
        self.slots, self.steps = arrays["slots"].tolist(), steps


class FakeLearner:
    """What the driver calls of opd_ray.learn.learner.Learner, on a Bigram."""

    def __init__(self, config: Config, rank: int) -> None:
        """Nothing is shared between ranks: there is one."""

    def node(self) -> str:
        return this_node()

    def memory(self) -> MemoryUse:
        return MemoryUse(0, None)

    def node_address(self) -> tuple[str, int]:
        return node_ip(), free_port()

    def setup(self, master_host: str, master_port: int, secret: str) -> None:
        pass

    def begin(self, config: Config, student_path: str, stop_token_ids: Sequence[int]) -> None:
        self._journal = Path(config.checkpoint.directory).parent / JOURNAL
        self._model = Bigram(config.learner.lr)
        self._note(begun=0)

    def manifest(self, version: int) -> WeightManifest:
        return WeightManifest(version, ("table",), ("float64",), ((VOCAB_SIZE, VOCAB_SIZE),))

    def open_transport(self, group: TransferGroup) -> None:
        pass

    def send_weights(self, manifest: WeightManifest, group: TransferGroup | None = None) -> None:
        pass

    def train_step(self, plan: StepPlan) -> StepOutcome:
        import ray

        entries = [entry for micro_batch in plan.micro_batches for entry in micro_batch]
        rollouts = ray.get([entry.rollouts for entry in entries])
        scores = ray.get([entry.scores["teacher"] for entry in entries])
        rows = [
            Row(entry.meta.slot, column(batch, "response_tokens", entry.row), column(score, "logprobs", entry.row))
            for entry, batch, score in zip(entries, rollouts, scores, strict=True)
        ]
        loss = self._model.step(rows)
        self._note(trained=self._model.steps, slots=sorted(row.slot for row in rows))
        return StepOutcome({"loss": loss, "trained_tokens": float(sum(len(row.tokens) for row in rows))})

    def snapshot(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"steps": self._model.steps}, self._model.arrays()

    def restore(
        self, facts: Mapping[str, Any], parts: Sequence[Any], fetch: Callable[[Any], Any] | None = None
    ) -> None:
        import ray

        [part] = parts
        self._model.load((fetch or ray.get)(part), facts["steps"])
        self._note(restored=self._model.steps)

    def export(self) -> tuple[int, dict[str, np.ndarray]]:
        arrays = self._model.arrays()
        files = {f"{name}.bytes": np.frombuffer(array.tobytes(), np.uint8) for name, array in arrays.items()}
        return sum(map(len, files.values())), files

    def _note(self, **what: Any) -> None:
        with self._journal.open("a") as lines:
            lines.write(json.dumps({"process": os.getpid(), **what}) + "\n")


def column(batch: Any, name: str, row: int) -> np.ndarray:
    """One row's values of a list column."""
    return np.array(batch[name][row].as_py())
