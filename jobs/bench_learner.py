"""What a learner rank needs of its host's memory while the student loads, and what packing costs or saves on a CPU.

    python jobs/bench_learner.py [--json FILE] [--layers N] [--ranks N]

Memory: a random model of some 400 million parameters in bfloat16 is loaded by two ranks on the CPU at ZeRO-3: split
from the first parameter on, as a run does, and whole on every rank first, as a plain from_pretrained would. Resident
memory has the pages of the checkpoint's file in it, which ranks share and the kernel drops when it needs to; private
memory has not.

Packing: forward and backward passes over the same rollouts, padded and packed in turn, on one thread: of lengths that
scatter as rollouts' do, and all of one length, where padding wastes nothing.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from opd_ray.config import from_dict
from opd_ray.rooms.node import free_port

_MIB = 2**20
_SAMPLE_S = 0.002
_ROLLOUTS, _ROUNDS = 32, 8


class Peak:
    """The most memory of this process since it was made, sampled in a thread."""

    def __init__(self) -> None:
        self._begin = _memory()
        self._most = dict(self._begin)
        threading.Thread(target=self._watch, daemon=True).start()

    def bytes(self) -> dict[str, int]:
        """Kind of memory to its peak, beyond what there was at the beginning."""
        return {kind: most - self._begin[kind] for kind, most in self._most.items()}

    def _watch(self) -> None:
        while True:
            for kind, now in _memory().items():
                self._most[kind] = max(self._most[kind], now)
            time.sleep(_SAMPLE_S)


def _memory() -> dict[str, int]:
    """Resident and private bytes of this process."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {kind: int(lines[name].split()[0]) * 1024 for kind, name in (("resident", "VmRSS"), ("private", "RssAnon"))}


def _make_model(directory: Path, layers: int, width: int = 1024, vocabulary: int = 16_000) -> int:
    """A Qwen3 with random weights; its number of parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def _rank(rank: int, ranks: int, port: int, path: str, dtype: str, split: bool, answers: Any) -> None:
    """Loads the student as one rank, and answers with bytes beyond those of the process before."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from opd_ray.learn import learner as room
    from opd_ray.learn import student

    if not split:
        student._split_while_loading = lambda dtype: contextlib.nullcontext()
    settings = {"num_ranks": ranks, "zero_stage": 3, "dtype": dtype, "cpus_per_rank": 1}
    config = from_dict({"learner": settings})
    learner = room.Learner(config, rank)
    learner.setup("127.0.0.1", port, "5ec2e7")
    peak, loaded = Peak(), {}
    load = room.load_student

    def measured(*args: Any) -> Any:
        began = time.monotonic()
        model = load(*args)
        loaded.update(load=peak.bytes(), load_s=time.monotonic() - began)
        return model

    room.load_student = measured
    learner.begin(config, path, (1,))
    answers.put(loaded | {"rank": rank, "begin": peak.bytes()})


def _measure(path: str, ranks: int, dtype: str, split: bool) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    answers, port = context.Queue(), free_port()
    processes = [
        context.Process(target=_rank, args=(rank, ranks, port, path, dtype, split, answers), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        return sorted((answers.get(timeout=600) for _ in processes), key=lambda answer: answer["rank"])
    finally:
        for process in processes:
            process.kill()
            process.join()


def _packing() -> dict[str, dict[str, float]]:
    """Tokens a second, of CPU time."""
    import numpy as np
    import torch

    from opd_ray.learn.heads import ResponseModel
    from opd_ray.learn.student import load_student
    from opd_ray.models.inputs import lay_out

    torch.set_num_threads(1)
    found, random = {}, np.random.default_rng(0)
    lengths = {"scattered": random.lognormal(4, 0.7, _ROLLOUTS).astype(int) + 1, "equal": np.full(_ROLLOUTS, 64)}
    with tempfile.TemporaryDirectory() as directory:
        _make_model(Path(directory), layers=2, width=256, vocabulary=1024)
        modules = {}
        for packing in (False, True):
            learner = from_dict({"learner": {"packing": packing}}).learner
            modules[packing] = ResponseModel(load_student(Path(directory), learner, 0, torch.device("cpu")))
    for kind, sizes in lengths.items():
        rollouts = [random.integers(0, 1024, size) for size in sorted(sizes, reverse=True)]
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(_ROUNDS):
            for packing, module in modules.items():
                began = time.process_time()
                module.consume(lambda hidden, head: head.logits(hidden).square().mean())
                module(*lay_out([each[:1] for each in rollouts], rollouts, packing=packing)).backward()
                seconds[packing].append(time.process_time() - began)
        rates = {packing: float(sizes.sum() / median(each[1:])) for packing, each in seconds.items()}
        found[kind] = {"padded": rates[False], "packed": rates[True]}
    return found


@click.command()
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
@click.option("--layers", default=28, show_default=True, help="Layers of the model.")
@click.option("--ranks", default=2, show_default=True, help="Learner ranks.")
def main(json_file: Path | None, layers: int, ranks: int) -> None:
    """Measures a learner rank's memory while it loads, and packing on a CPU."""
    with tempfile.TemporaryDirectory() as directory:
        parameters = _make_model(Path(directory), layers)
        found = [
            {"dtype": dtype, "kind": kind} | answer
            for dtype in ("bfloat16", "float32")
            for kind in ("whole", "split")
            for answer in _measure(directory, ranks, dtype, kind == "split")
        ]
    columns = "learner.dtype", "load", "rank", "loading: resident", "private", "with DeepSpeed: resident", "private"
    table = Table(*columns, "s")
    for each in found:
        sizes = [f"{each[when][kind] / _MIB:,.0f}" for when in ("load", "begin") for kind in ("resident", "private")]
        table.add_row(each["dtype"], each["kind"], str(each["rank"]), *sizes, f"{each['load_s']:.1f}")
    console = Console(width=120)
    console.print(f"{parameters / 1e6:.0f} million parameters, {2 * parameters / _MIB:,.0f} MiB on disk; peaks in MiB")
    console.print(table)
    packing = _packing()
    for kind, rates in packing.items():
        said = ", ".join(f"{name} {rate:,.0f} tokens a second" for name, rate in rates.items())
        console.print(f"{_ROLLOUTS} rollouts of {kind} length: {said} ({rates['packed'] / rates['padded']:.2f} times)")
    if json_file:
        measured = {"parameters": parameters, "ranks": ranks, "memory": found, "packing": packing}
        json_file.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
