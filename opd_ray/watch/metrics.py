"""What is measured on rollouts, and where measurements go.

One name, three places: ``rollouts/length`` in TensorBoard (or another tracker) is ``ray_opd_rollouts_length`` on Ray's
metrics port, and ``rollouts/length`` in metrics.jsonl; :mod:`opd_ray.watch.catalogue` says what each is. On the port
every metric carries ``run``, the last two names of the run's directory, and there are four that only make sense while a
run runs: those of ``run/``, whose ``run/guard_events`` counts on, for the port shows no more than one step in ten
seconds.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from ray.util.metrics import Gauge

from opd_ray.disk import writing
from opd_ray.messages import RolloutMeta
from opd_ray.watch.tracking import Tracking

_BLOCK = 1 << 20
"""Bytes of metrics.jsonl that are looked at together."""


def rollout_metrics(metas: Sequence[RolloutMeta], version: int, budget: int) -> dict[str, float]:
    """Metrics of the student rollouts that a step trains on; ``version`` is that of the weights it trains,
    ``budget`` the most tokens that a response could have. Where a horizon cut responses off, what they come to is that
    of those that had the whole budget."""
    if not metas:
        return {}
    whole = [meta for meta in metas if meta.whole] or metas
    lengths = np.array([meta.num_response_tokens for meta in whole])
    truncated = np.array([meta.truncated for meta in whole])
    looped = [meta for meta in metas if meta.finish_reason == "repetition"]
    saved = [(budget if meta.whole else meta.horizon) - meta.num_response_tokens for meta in looped]
    oldest = np.array([meta.oldest_version for meta in metas])
    sampled = [meta.num_response_tokens for meta in metas]
    return (
        _outcomes("rollouts", whole)
        | _horizon(metas, whole)
        | {
            "rollouts/truncated_token_share": float(lengths[truncated].sum() / lengths.sum()),
            "rollouts/periodic_tail_rate": float(np.mean([meta.tail_period > 0 for meta in whole])),
            "rollouts/repetition_stops": len(looped) / len(metas),
            "rollouts/tokens": float(sum(sampled)),
            "rollouts/saved_tokens": float(sum(saved)),
            "rollouts/length_budget": float(budget),
            "rollouts/length_p50": float(np.quantile(lengths, 0.5)),
            "rollouts/length_p95": float(np.quantile(lengths, 0.95)),
            "rollouts/behaviour_logprob": float(np.mean([meta.mean_behaviour_logprob for meta in metas])),
            "staleness/mean": float(version - np.average([meta.mean_version for meta in metas], weights=sampled)),
            "staleness/max": float(version - oldest.min()),
        }
    )


def _horizon(metas: Sequence[RolloutMeta], whole: Sequence[RolloutMeta]) -> dict[str, float]:
    """Nothing where there is none."""
    horizons = [meta.horizon for meta in metas if meta.horizon is not None]
    if not horizons:
        return {}
    return {
        "rollouts/horizon": float(np.mean(horizons)),
        "rollouts/horizon_rate": float(np.mean([meta.finish_reason == "horizon" for meta in metas])),
        "rollouts/whole": float(len(whole)),
    }


def teacher_rollout_metrics(metas: Sequence[RolloutMeta]) -> dict[str, float]:
    """Of the teacher's own rollouts that a step trains on, after the filter."""
    return _outcomes("teacher_rollouts", metas) if metas else {}


def _outcomes(of: str, metas: Sequence[RolloutMeta]) -> dict[str, float]:
    return {
        f"{of}/accuracy": float(np.mean([meta.correct for meta in metas])),
        f"{of}/verify_timeouts": float(sum(meta.no_verdict for meta in metas)),
        f"{of}/truncation_rate": float(np.mean([meta.truncated for meta in metas])),
        f"{of}/repetition_rate": float(np.mean([meta.repetitive for meta in metas])),
        f"{of}/length": float(np.mean([meta.num_response_tokens for meta in metas])),
    }


class MetricsWriter:
    """Writes one step's metrics to metrics.jsonl, to Ray's metrics ``port`` and to the trackers."""

    def __init__(
        self,
        run_dir: Path,
        tracking: Tracking,
        first_step: int = 0,
        *,
        continued: bool = False,
        steps: int | None = None,
    ) -> None:
        """``continued``: the run went on from ``first_step``, and trackers forget, where they can, what came after that
        before. ``steps``: how many are planned."""
        self._lines_at = run_dir / "metrics.jsonl"
        with writing(self._lines_at):
            self._lines = _open_lines(self._lines_at)
        self._tracking = tracking
        tracking.begin(first_step, continued=continued)
        self._lock, self._closed = threading.Lock(), False
        self.port = MetricsPort("/".join(run_dir.absolute().parts[-2:]), first_step, steps)

    def write(self, step: int, metrics: Mapping[str, float], said: Sequence[tuple[str, str]] = ()) -> None:
        """``step`` counts finished optimizer steps; values that are not finite are left out, and ``said`` are titles
        and sentences for the trackers. Blocks as long as the disk does; writes nothing after ``close``, when the run
        may have gone back behind ``step``. Raises Unwritable."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        with self._lock:
            if self._closed:
                return
            self.port.write(step, finite)
            with writing(self._lines_at):
                self._lines.write(json.dumps({"step": step, **finite}) + "\n")
            self._tracking.log(step, finite, said)

    def close(self) -> None:
        """Raises nothing: what a full disk did not take is lost with the run, which has said so."""
        self.port.close()
        with self._lock:
            self._closed = True
            try:
                self._lines.close()
            except OSError as error:
                print(f"{self._lines_at}: the last metrics were not written ({error})", flush=True)


def _open_lines(path: Path) -> TextIO:
    """To append lines to; the end of one that a killed driver did not finish is cut off."""
    if path.exists():
        with path.open("rb") as file:
            whole = file.seek(0, os.SEEK_END)
            while whole:  # from the end: the file of a long run is larger than memory
                size = min(whole, _BLOCK)
                file.seek(whole - size)
                if (at := file.read(size).rfind(b"\n")) >= 0:
                    whole += at + 1 - size
                    break
                whole -= size
        os.truncate(path, whole)
    return path.open("a", encoding="utf-8", buffering=1)


def port_name(name: str) -> str:
    """What Ray is told; it puts ``ray_`` in front, and would leave out a name with other characters."""
    return "opd_" + re.sub(r"\W", "_", name, flags=re.ASCII)


class MetricsPort:
    """The latest values on Ray's metrics port, from now until ``close``.

    Ray takes a gauge off the port that was not set for 20 to 30 s, and a step may take longer: a thread sets all of
    them anew, so that they stay while the run goes on, however slowly, and go when its driver is gone.
    """

    def __init__(self, run: str, first_step: int, steps: int | None, every_s: float = 5.0) -> None:
        self._tags, self._every_s = {"run": run}, every_s
        self._gauges: dict[str, Gauge] = {}
        self._values = {"run/step": float(first_step), "run/guard_events": 0.0}
        if steps is not None:
            self._values["run/steps"] = float(steps)
        self._since = time.monotonic()
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-port", daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes in finite values; those of earlier writes stay until there are new ones."""
        with self._lock:
            if step != self._values["run/step"]:
                self._since = time.monotonic()
            events = self._values["run/guard_events"] + metrics.get("guard/events", 0.0)
            self._values |= {**metrics, "run/step": float(step), "run/guard_events": events}
            self._set()

    def live(self, metrics: Mapping[str, float]) -> None:
        """Takes in what also changes while no step is done, finite values; call it every few seconds."""
        with self._lock:
            self._values |= metrics
            self._set()

    def close(self) -> None:
        """Sets the values for the last time."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        closed = False
        while not closed:
            with self._lock:
                self._set()
            closed = self._closed.wait(self._every_s)

    def _set(self) -> None:
        for name, value in {**self._values, "run/since_step_s": time.monotonic() - self._since}.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(port_name(name), f"opd_ray metric {name}", tag_keys=("run",))
            self._gauges[name].set(value, tags=self._tags)
