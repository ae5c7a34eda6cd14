"""The whole loop beside TRL's DistillationTrainer: the same checkpoints, prompts, batch and limit on the same machine.

    python jobs/bench_peers.py [--rows 1,2] [--steps N] [--turns N] [--json FILE]

TRL comes from PyPI at the version below, into the cache and on top of this environment, so that both sides have the
same torch and transformers. What is compared is the plainest method that both have, reverse KL on the whole vocabulary
along the student's own samples (TRL: beta=1), in float32 on CPUs with AdamW: student tokens that were trained on per
second of wall clock, after warm-up. The lengths and the loss that stand beside them tell whether both did the same.

race_material.py has the rows and their models. Learning rate: both sides' default, 1e-6, at which lengths stay the
checkpoints'.

Where the two differ:
- opd_ray is asynchronous, at its default staleness of 2 steps, with one thread in each of its processes (generator,
  teacher, learner, driver; Ray's own beside them). TRL is one process, which does one thing at a time, with two threads
  and, as a second column, with one.
- TRL takes a batch as one micro-batch, opd_ray at most its default of 4,096 tokens. TRL's gradient checkpointing, on by
  default, is off. TRL samples with transformers' generate until the longest of a batch has ended.
- opd_ray also verifies each answer, measures its repetition and entropy, keeps a snapshot of every tenth step in memory
  and writes its metrics; TRL logs nothing, saves nothing.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import psutil
from race_material import LEARNING_RATE, ROWS, Material, Row, overrides, prepare
from rich.console import Console
from rich.table import Table

from opd_ray.config.help import OutputFile
from opd_ray.disk import cache_root
from opd_ray.errors import InputError, OpdError, RunError
from opd_ray.run.provenance import command, commit

TRL_VERSION = "1.16.0"
SIDES = {"opd_ray": 1, "TRL, 2 threads": 2, "TRL, 1 thread": 1}
"""Who is measured, and with how many threads in a process."""
_DOWNLOAD_S = 600
_SIDE_S = 1800
_END_S = 60
console = Console(highlight=False, soft_wrap=True)


@click.command()
@click.option("--rows", default=",".join(map(str, ROWS)), show_default=True, help="Rows to race.")
@click.option("--steps", type=click.IntRange(1), help="Steps that are measured; by default each row's own number.")
@click.option("--turns", default=2, show_default=True, type=click.IntRange(1), help="Races of each row.")
@click.option("--json", "json_file", type=OutputFile(), help="Write what was measured to this file.")
def main(rows: str, steps: int | None, turns: int, json_file: Path | None) -> None:
    """Races opd_ray against TRL."""
    try:
        chosen = _chosen(rows)
        site = fetch()
        found = {}
        for number in chosen:
            row = ROWS[number]
            found[number] = race(row, steps or row.steps, turns, site)
    except OpdError as error:
        print(f"bench_peers: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    _show(found)
    if json_file:
        json_file.write_text(json.dumps(_written(found), indent=2))


def _chosen(rows: str) -> list[int]:
    numbers = [each.strip() for each in rows.split(",")]
    if unknown := [each for each in numbers if each not in map(str, ROWS)]:
        raise InputError(f"--rows {rows}: there is no row '{unknown[0]}'; take of {', '.join(map(str, ROWS))}")
    return [int(each) for each in numbers]


def fetch(package: str = "trl", release: str = TRL_VERSION) -> Path:
    """The directory in the cache that a package is imported from, filled where it is not there.

    It alone: what it needs is in this environment, so that torch and transformers are the same on both sides.
    """
    site = cache_root() / f"{package}-{release}"
    if site.is_dir():
        return site
    if missing := [name for name in ("accelerate", "datasets") if find_spec(name) is None]:
        raise InputError(f"{package} needs {missing[0]}, which is not installed; pip install 'opd_ray[data,deepspeed]'")
    site.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=site.parent) as scratch:
        target = Path(scratch) / "site"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        done = subprocess.run(
            [*pip, f"{package}=={release}"], capture_output=True, text=True, timeout=_DOWNLOAD_S, check=False
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise InputError(
                f"{package} {release} could not be installed ({reason}); is PyPI, or a mirror that pip knows, there?"
            )
        target.rename(site)
    return site


def race(row: Row, steps: int, turns: int, site: Path) -> dict[str, Any]:
    """What each side measured, by side, one turn after the other."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        material = prepare(row, Path(scratch))
        for _ in range(turns):
            for side, threads in SIDES.items():
                figures = Path(scratch) / "figures.json"
                if side == "opd_ray":
                    done = _ours(row, steps, material, figures)
                else:
                    done = _theirs(row, steps, material, figures, site, threads)
                runs[side].append(done)
                console.print(
                    f"{row.models}, limit {row.limit}, {side}: {done['tokens_per_s']:,.0f} tokens/s, "
                    f"{done['step_s']:.2f} s a step, mean length {done['mean_length']:.1f}, loss {done['loss']:.4f}"
                )
    return {"row": asdict(row) | {"steps": steps}, "runs": runs}


def _ours(row: Row, steps: int, material: Material, figures: Path) -> dict[str, Any]:
    bench = [sys.executable, str(Path(__file__).with_name("bench_loop.py")), "--json", str(figures)]
    length = ["--warmup", str(row.warmup), "--steps", str(steps)]
    found = _measured([*bench, *length, *overrides(row, material)], {"OMP_NUM_THREADS": "1"}, figures)
    return found["modes"][0]


def _theirs(row: Row, steps: int, material: Material, figures: Path, site: Path, threads: int) -> dict[str, Any]:
    work = {name: str(path) for name, path in vars(material).items()}
    work |= {"batch": row.batch, "limit": row.limit, "warmup": row.warmup, "steps": steps}
    paths = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    settings = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    return _measured([sys.executable, __file__, "--trl", json.dumps(work), str(figures)], settings, figures)


def _measured(arguments: Sequence[str], settings: Mapping[str, str], figures: Path) -> dict[str, Any]:
    """What a process of its own writes to ``figures``."""
    script = Path(arguments[1]).name
    figures.unlink(missing_ok=True)
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            arguments, env=os.environ | settings, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(_SIDE_S)
        except subprocess.TimeoutExpired:
            raise RunError(f"{script} took longer than {_SIDE_S} s; give fewer --steps") from None
        finally:
            _end(process)
        if status or not figures.exists():
            said.seek(0)
            raise RunError(f"{script} ended with {status}; the last that it said:\n{said.read()[-3000:]}")
    return json.loads(figures.read_text())


def _end(process: subprocess.Popen) -> None:
    """Whatever still runs of it, gently first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def train_with_trl(work: Mapping[str, Any], figures: Path) -> None:
    """DistillationTrainer on ``work``; what it trained on is read where it computes its loss."""
    sys.modules["vllm"] = None  # TRL imports it where it is, though nothing here uses it, and it takes torch's threads
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    tokens: list[int] = []
    losses: list[float] = []
    ends: list[float] = []

    class Counting(DistillationTrainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **more: Any) -> Any:
            tokens.append(int(inputs["completion_mask"].sum()))
            loss = super().compute_loss(model, inputs, *arguments, **more)
            losses.append(float(loss.detach()))
            return loss

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.monotonic())

    warmup, steps = work["warmup"], work["steps"]
    with tempfile.TemporaryDirectory() as directory:
        settings = DistillationConfig(
            directory,
            beta=1.0,
            max_completion_length=work["limit"],
            per_device_train_batch_size=work["batch"],
            max_steps=warmup + steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        prompts = [json.loads(line)["prompt"] for line in Path(work["prompts"]).read_text().splitlines()]
        trainer = Counting(
            model=work["student"],
            teacher_model=work["teacher"],
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            callbacks=[Clock()],
        )
        trainer.train()
    assert len(tokens) == len(ends) == warmup + steps  # one micro-batch a step
    parameters = [*trainer.model.parameters(), *trainer.teacher_model.parameters()]
    assert {each.dtype for each in parameters} == {torch.float32}
    wall, total = ends[-1] - ends[warmup - 1], sum(tokens[warmup:])
    found = {
        "steps": steps,
        "step_s": wall / steps,
        "tokens_per_s": total / wall,
        "mean_length": total / (steps * work["batch"]),
        "loss": mean(losses[warmup:]),
        "threads": torch.get_num_threads(),
    }
    figures.write_text(json.dumps(found))


def _show(found: Mapping[int, Mapping[str, Any]]) -> None:
    table = Table("row", "student / teacher", "batch, limit", "mean length", "loss", *SIDES, title="student tokens/s")
    for number, raced in found.items():
        row, runs = ROWS[number], raced["runs"]
        rates = {side: median(run["tokens_per_s"] for run in runs[side]) for side in SIDES}
        lengths, losses = (
            " / ".join(format(mean(run[name] for run in runs[side]), form) for side in list(SIDES)[:2])
            for name, form in (("mean_length", ".1f"), ("loss", ".4f"))
        )
        cells = [f"{rate:,.0f}" + _times(rates["opd_ray"], rate) * (side != "opd_ray") for side, rate in rates.items()]
        table.add_row(str(number), row.models, f"{row.batch}, {row.limit}", lengths, losses, *cells)
    console.print(table)
    console.print("medians; in brackets how many times as much opd_ray trains; lengths and losses: opd_ray / TRL")


def _times(ours: float, theirs: float) -> str:
    return f" ({ours / theirs:.2f}x)"


def _written(found: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    names = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "ray", "opd_ray")
    machine = {"cpu": _cpu(), "cores": psutil.cpu_count(), "memory_gib": round(psutil.virtual_memory().total / 2**30)}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": command(),
        "commit": commit(),
        "machine": machine | {"python": platform.python_version()},
        "versions": {"trl": TRL_VERSION} | {name: version(name) for name in names},
        "rows": found,
    }


def _cpu() -> str:
    """Its name where the system tells it as Linux does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trl"]:
        train_with_trl(json.loads(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
