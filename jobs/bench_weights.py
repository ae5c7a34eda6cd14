"""Weight broadcasts to two running generators, against a bare broadcast of as many bytes.

    python jobs/bench_weights.py [--megabytes N,N] [--turns N] [--json FILE]

Random Qwen3 models in float32. One process sends and two generate, each a torch engine in its EngineThread with one
thread of computation, all on this machine over gloo; a broadcast counts until both have installed it. The bare one is
that of one flat tensor in a group of the same three processes. Both in turns, after two of warm-up (a generator
changes over between two memories), with the generators idle, and with four responses under way in each. Paused is the
time between two of a generator's steps, beyond the median, from the start of a broadcast to its end.

    python jobs/bench_weights.py --changed [--json FILE]

How many weights a step changes in bfloat16, of what a sparse broadcast could save: a small Qwen3 learns text from a
random start, float32 master weights under AdamW, and goes on at each of two learning rates.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from itertools import count, pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_ray.config.help import OutputFile
from opd_ray.errors import RunError
from opd_ray.generate.engine_thread import EngineThread
from opd_ray.generate.torch import TorchGenerationEngine
from opd_ray.messages import GenerationRequest, SamplingSettings, TransferGroup
from opd_ray.rooms.node import free_port
from opd_ray.weights import BUCKET_BYTES
from opd_ray.weights.manifest import manifest_of, num_bytes, weights_of
from opd_ray.weights.transfer import WeightTransfer

_RECEIVERS, _ROWS, _LIMIT_S = 2, 4, 60.0
_ANSWER_S = 300.0
"""Of a member, which loads its model before its first answer."""
_LAYER_BYTES = 4 * 11 * 1024**2
"""Of a model of this width: 4 bytes for each of 11 · H² parameters."""
_RATES = (1e-6, 1e-5)


@click.command()
@click.option("--megabytes", default="100,1000", show_default=True, help="Sizes of the model.")
@click.option("--turns", default=4, show_default=True, help="Broadcasts of each kind, after two of warm-up.")
@click.option("--changed", is_flag=True, help="Count the bfloat16 weights that a step changes instead.")
@click.option("--json", "json_file", type=OutputFile(), help="Write what was measured to this file.")
def main(megabytes: str, turns: int, changed: bool, json_file: Path | None) -> None:
    """Measures weight broadcasts."""
    sizes = [int(size) for size in megabytes.split(",")]
    measured = changed_shares() if changed else [row for size in sizes for row in race(size, turns)]
    table = Table(*measured[0])
    for row in measured:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps(measured, indent=2))


def race(megabytes: int, turns: int) -> list[dict[str, Any]]:
    """Medians, with idle generators and with busy ones."""
    with tempfile.TemporaryDirectory() as path:
        model = _model(1024, max(1, megabytes * 10**6 // _LAYER_BYTES))
        model.save_pretrained(path)
        del model
        spawning, port = multiprocessing.get_context("spawn"), free_port()
        group = TransferGroup("gloo", "127.0.0.1", port, 0, _RECEIVERS + 1, _LIMIT_S, BUCKET_BYTES, "5ec2e7")
        members = []
        for rank in range(_RECEIVERS + 1):
            ours, theirs = spawning.Pipe()
            spawning.Process(target=_member, args=(theirs, replace(group, rank=rank), path), daemon=True).start()
            theirs.close()  # else nobody would see that it ended
            members.append(ours)
        sent_bytes = max(_ask(members, "join"))
        found = []
        for rows in (0, _ROWS):
            _ask(members, "generate", rows)
            taken = {kind: [_timed(members, kind) for _ in range(turns + 2)][2:] for kind in ("bare", "sync")}
            bare, sync = (median(seconds for seconds, _ in taken[kind]) for kind in ("bare", "sync"))
            paused = median(max(pauses) for _, pauses in taken["sync"])
            found.append(
                {"MB": sent_bytes // 10**6, "responses": rows, "bare GB/s": sent_bytes / bare / 1e9}
                | {"sync GB/s": sent_bytes / sync / 1e9, "ratio": bare / sync}
                | {"paused s": paused, "share of the sync": paused / sync}
            )
        for member in members:
            member.close()
    return found


def _timed(members: list[Connection], kind: str) -> tuple[float, list[float]]:
    """Seconds until all are through, and the pauses of each generator meanwhile."""
    began = time.monotonic()
    ends, pauses = zip(*_ask(members, kind), strict=True)
    return max(ends) - began, pauses[1:]


def _ask(members: list[Connection], *what: object) -> list[Any]:
    """All at once; what they answer. Raises RunError for one that gives no answer in time, or has ended."""
    for member in members:
        with contextlib.suppress(BrokenPipeError):  # of one that has ended, which is told below
            member.send(what)
    answers = []
    for rank, member in enumerate(members):
        who = "the sender" if rank == 0 else f"generator {rank}"
        try:
            if not member.poll(_ANSWER_S):
                raise RunError(
                    f"{who} gave no answer to {what[0]!r} within {_ANSWER_S:g} s; broadcast fewer --megabytes"
                )
            answers.append(member.recv())
        except (EOFError, ConnectionResetError):
            raise RunError(f"{who} ended before it answered to {what[0]!r}; what it said is above") from None
    return answers


def _member(pipe: Connection, group: TransferGroup, path: str) -> None:
    """A process: the sender, rank 0, or a generator. It ends with the pipe."""
    torch.set_num_threads(1)
    member = (Generator if group.rank else Sender)(group, path)
    while True:
        try:
            method, *arguments = pipe.recv()
        except EOFError:
            os._exit(0)  # gloo's threads do not expect the interpreter's end
        pipe.send(getattr(member, method)(*arguments))


class Sender:
    """The learner's part."""

    def __init__(self, group: TransferGroup, path: str) -> None:
        self._group, self._path = group, path
        self._versions = count(1)

    def join(self) -> int:
        """The bytes of the model."""
        model = Qwen3ForCausalLM.from_pretrained(self._path, dtype=torch.float32)
        self._weights = weights_of(model)
        self._manifest = manifest_of(self._weights, 0)
        self._connect()
        self._flat = torch.ones(num_bytes(self._manifest), dtype=torch.uint8)
        self._bare = _bare_group(self._group)
        return len(self._flat)

    def generate(self, rows: int) -> None:
        pass

    def bare(self) -> tuple[float, float]:
        """When it was through, and seconds between steps: a sender takes none."""
        self._bare.broadcast([self._flat], dist.BroadcastOptions()).wait()
        return time.monotonic(), 0.0

    def sync(self) -> tuple[float, float]:
        self._take(replace(self._manifest, version=next(self._versions)))
        return time.monotonic(), 0.0

    def _connect(self) -> None:
        self._transfer = WeightTransfer()
        self._transfer.connect(self._group)

    def _take(self, manifest: Any) -> None:
        self._transfer.send(manifest, self._weights)


class Generator(Sender):
    """A receiver, with responses under way that never end."""

    def _connect(self) -> None:
        self._steps: list[tuple[float, float]] = []
        """When each began and ended."""

        def make() -> TorchGenerationEngine:
            engine = TorchGenerationEngine(path=self._path, max_num_seqs=_ROWS)
            step = engine.step

            def timed() -> Any:
                began = time.monotonic()
                finished = step()
                self._steps.append((began, time.monotonic()))
                return finished

            engine.step = timed
            return engine

        self._weights = []
        self._engine = EngineThread(make)
        self._engine.connect(self._group).result()

    def generate(self, rows: int) -> None:
        """Has so many responses under way from now on."""
        self._engine.abandon().result()
        self._rows = rows
        for row in range(rows):
            sampling = SamplingSettings(1.0, 1.0, 10**6, stop_token_ids=())
            self._engine.submit(GenerationRequest(str(row), tuple(range(24)), row, sampling))
        self._see_step(time.monotonic())

    def sync(self) -> tuple[float, float]:
        """When it was through, and seconds between steps beyond the median."""
        began = time.monotonic()
        ended, _ = super().sync()
        self._see_step(ended)
        gaps = [(start, start - end) for (_, end), (start, _) in pairwise(list(self._steps))]
        usual = median(gap for _, gap in gaps) if gaps else 0.0
        return ended, sum(gap - usual for start, gap in gaps if start > began)

    def _see_step(self, after: float) -> None:
        """Waits for one that begins then or later."""
        while self._rows and not (self._steps and self._steps[-1][0] >= after):
            time.sleep(0.01)

    def _take(self, manifest: Any) -> None:
        self._engine.update(manifest, "keep").result()


def _bare_group(group: TransferGroup) -> dist.ProcessGroupGloo:
    store = dist.TCPStore(group.host, group.port + 1, group.world_size, group.rank == 0)
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=group.host)]
    options._timeout = timedelta(seconds=_LIMIT_S)
    return dist.ProcessGroupGloo(store, group.rank, group.world_size, options)


def _model(hidden: int, layers: int, vocabulary: int = 4096) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128, "head_dim": 64}
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    shared = {"vocab_size": vocabulary, "max_position_embeddings": 2 * 10**6, "tie_word_embeddings": True}
    return Qwen3ForCausalLM(Qwen3Config(**heads, **sizes, **shared))


def changed_shares(warmup: int = 60, steps: int = 5) -> list[dict[str, Any]]:
    """Of the weights in bfloat16, by learning rate: the means over some steps."""
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    model, tokens, generator = _model(384, 6, 256), torch.tensor(list(text)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)

    def step() -> float:
        starts = torch.randint(len(tokens) - 128, (8,), generator=generator)
        batch = torch.stack([tokens[start : start + 128] for start in starts])
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    first = step()
    losses = [step() for _ in range(warmup)]
    found = []
    for rate in _RATES:
        optimizer.param_groups[0]["lr"] = rate
        shares = []
        for _ in range(steps):
            before = [parameter.detach().bfloat16() for parameter in model.parameters()]
            step()
            pairs = zip(before, model.parameters(), strict=True)
            changed = sum((old != new.detach().bfloat16()).sum().item() for old, new in pairs)
            shares.append(changed / sum(map(torch.numel, before)))
        found.append({"learning rate": f"{rate:g}", "changed share": sum(shares) / steps})
        found[-1] |= {"loss": f"{first:.2f} to {losses[-1]:.2f}", "parameters": sum(map(torch.numel, before))}
    return found


if __name__ == "__main__":
    main()
