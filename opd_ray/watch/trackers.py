"""Where a run's curves can be looked at: TensorBoard, Weights & Biases, MLflow, behind one Protocol.

Who a run belongs to over there is said by their own environment variables (WANDB_PROJECT, WANDB_ENTITY,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME), and so are keys (WANDB_API_KEY, MLFLOW_TRACKING_TOKEN), which stand in no
file of a run. What a run is called over there is kept in its directory, so that a resumed run goes on where it stopped.
"""

from __future__ import annotations

import importlib.util
import json
import netrc
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.errors import InputError

PROJECT = "opd_ray"
"""Project or experiment of runs that no environment variable has put into another."""
_EVENTS = "events.out.tfevents.*"
_AT_ONCE = 100
"""Parameters that MLflow takes in one call."""


@dataclass(frozen=True)
class Tracked:
    """The run that is tracked."""

    directory: Path
    config: Config

    def kept(self, name: str) -> Path:
        """The file that keeps what a tracker calls the run."""
        return self.directory / "trackers" / f"{name}.id"


class Tracker(Protocol):
    """Constructed from a Tracked. All calls come from one thread, in order, and whatever they raise is taken care of
    there (:mod:`opd_ray.watch.tracking`)."""

    def begin(self, step: int, *, continued: bool) -> None:
        """What follows comes after ``step``; ``continued``: in place of what may have come after it before."""

    def log(self, step: int, metrics: Mapping[str, float], said: Sequence[tuple[str, str]]) -> None:
        """Finite values after ``step``, and what there is to say of it: titles and sentences."""

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """The run's summary.json."""

    def close(self) -> None:
        """Returns when everything is where it belongs."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run directory."""

    def __init__(self, run: Tracked) -> None:
        self._run, self._board = run, None

    def begin(self, step: int, *, continued: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter  # brings torch, which the command line can do without

        self.close()
        purge_step = step + 1 if continued else None
        directory = self._run.directory / "tensorboard"
        before = set(directory.glob(_EVENTS))
        self._board = SummaryWriter(str(directory), purge_step=purge_step)
        [new] = set(directory.glob(_EVENTS)) - before
        if new != max(before | {new}):
            # Files are read in the order of their names, and only the second that they were begun in is in order there.
            self._board.close()
            new.unlink()
            time.sleep(1.0 - time.time() % 1.0)
            self._board = SummaryWriter(str(directory), purge_step=purge_step)
        if not continued:
            self._board.add_text("config", _code(configs.to_yaml(self._run.config)), step)

    def log(self, step: int, metrics: Mapping[str, float], said: Sequence[tuple[str, str]]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # One record instead of one for each name: TensorBoard opens its file anew for each.
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._board.file_writer.add_summary(Summary(value=values), step)
        for title, text in said:
            self._board.add_text(title, text, step)

    def summarise(self, summary: Mapping[str, Any]) -> None:
        self._board.add_text("summary", _code(json.dumps(summary, indent=2)), summary["steps"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


class WeightsAndBiases:
    """A run of Weights & Biases (wandb); offline, where WANDB_MODE says so, in ``trackers/wandb/``."""

    def __init__(self, run: Tracked) -> None:
        import wandb

        kept = run.kept("wandb")
        kept.parent.mkdir(exist_ok=True)
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.directory.name,
            group=run.config.name or run.config.method,
            id=kept.read_text(),
            resume="allow",
            dir=kept.parent,
            config=configs.to_dict(run.config),
            reinit="create_new",  # a study has several runs in one process
            settings=wandb.Settings(console="off", silent=True, finish_timeout=60),
        )
        # Its own count of steps only rises, and a run may go back.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def begin(self, step: int, *, continued: bool) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float], said: Sequence[tuple[str, str]]) -> None:
        self._run.log({"step": step, **metrics})
        for title, text in said:
            self._run.alert(title, f"step {step}: {text}")

    def summarise(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of the MLflow server that MLFLOW_TRACKING_URI names."""

    def __init__(self, run: Tracked) -> None:
        from mlflow import MlflowClient

        self._client, kept = MlflowClient(), run.kept("mlflow")
        if kept.exists():
            self._id = kept.read_text()
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(number, run_name=run.directory.name).info.run_id
        self._log_parameters(run.config)
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(self._id)

    def _log_parameters(self, config: Config) -> None:
        from mlflow.entities import Param

        parameters = [Param(name, str(value)) for name, value in configs.leaves(configs.to_dict(config))]
        for first in range(0, len(parameters), _AT_ONCE):
            self._client.log_batch(self._id, params=parameters[first : first + _AT_ONCE])

    def begin(self, step: int, *, continued: bool) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float], said: Sequence[tuple[str, str]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])
        for title, text in said:
            self._client.set_tag(self._id, f"{title} step {step}", text)

    def summarise(self, summary: Mapping[str, Any]) -> None:
        self._client.log_dict(self._id, dict(summary), "summary.json")

    def close(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS: Mapping[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


def check_trackers(config: Config) -> None:
    """Raises InputError where a tracker's package, its key or its server is not there."""
    for name in config.metrics.trackers:
        asked = f"metrics.trackers has {name}, but"
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{asked} its package is not installed: pip install 'opd_ray[{name}]'")
        if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
            raise InputError(f"{asked} MLFLOW_TRACKING_URI is not set; set it to your server, as http://HOST:5000")
        online = os.environ.get("WANDB_MODE", "online") == "online"
        if name == "wandb" and online and not (os.environ.get("WANDB_API_KEY") or _is_logged_in()):
            raise InputError(
                f"{asked} WANDB_API_KEY is not set; set it, or log in (wandb login), or set WANDB_MODE=offline to keep "
                "the run here"
            )


def _is_logged_in() -> bool:
    """Has `wandb login` left a key of the server in a netrc file? Where W&B looks for one."""
    named, home = os.environ.get("NETRC"), Path.home()
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    for file in [Path(named).expanduser()] if named else [home / ".netrc", home / "_netrc"]:
        try:
            _, _, key = netrc.netrc(file).authenticators(server) or ("", "", "")
            return bool(key)
        except FileNotFoundError:
            continue
        except (OSError, netrc.NetrcParseError):  # W&B passes over it, too
            return False
    return False


def _code(text: str) -> str:
    """As TensorBoard's text page shows it letter by letter: an indented block of Markdown."""
    return "".join(f"    {line}\n" for line in text.splitlines())
