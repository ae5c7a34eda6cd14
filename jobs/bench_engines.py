"""What the two generation engines give on this machine, by the size of the model.

    python jobs/bench_engines.py [--rows N] [--tokens N] [--top-k K] [--seconds S] [--json FILE]

The models of race_material.py: the embedded student, and random ones. As many responses as there are rows run at any
time, of lengths that are spread evenly around the mean; no weight updates. Each engine in a process of its own with one
thread, one after the other, twice in turn. What counts is the time that its core was at work, which other work on the
machine makes longer by what it takes of the caches alone.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from statistics import mean

import click
from race_material import ROWS, prepare
from rich.console import Console
from rich.table import Table

from opd_ray.config.help import OutputFile

MODELS = {"58 k": (1, "student"), "1 M": (2, "student"), "4 M": (2, "teacher"), "36 M": (4, "student")}
"""By their parameters: of which row of the race, and who there. The context of the first ends at 96 tokens."""
ENGINES = ("torch", "vllm")
_PROMPT_TOKENS = 24
_MOST_S, _WARM_S = 600, 2.0


@click.command()
@click.option("--rows", default=96, show_default=True, help="Responses that run at once.")
@click.option("--tokens", default=20, show_default=True, help="Mean length of a response.")
@click.option("--top-k", default=0, show_default=True, help="Most probable tokens to return with each.")
@click.option("--seconds", default=10, show_default=True, help="Time for each measurement, after two of warm-up.")
@click.option("--json", "json_file", type=OutputFile(), help="Write what was measured to this file.")
def main(rows: int, tokens: int, top_k: int, seconds: int, json_file: Path | None) -> None:
    """Compares the torch engine and vLLM by the size of the model."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for size, (row, who) in MODELS.items():
            path = getattr(prepare(ROWS[row], Path(directory) / str(row)), who)
            found[size] = {engine: [] for engine in ENGINES}
            for engine in (*ENGINES, *ENGINES):
                measured = _elsewhere(engine, str(path), *map(str, (rows, tokens, top_k, seconds)))
                found[size][engine].append(json.loads(measured))
    table = Table("parameters", *ENGINES, "vllm / torch", title="core-ms for 1,000 tokens (tokens/s)")
    for size, runs in found.items():
        torch, vllm = ([mean(each) for each in zip(*runs[engine], strict=True)] for engine in ENGINES)
        cells = [f"{core_s * 1e6:,.0f} ({rate:,.0f})" for rate, core_s in (torch, vllm)]
        table.add_row(size, *cells, f"{vllm[1] / torch[1]:.2f}")
    Console().print(table)
    if json_file:
        measured = {"rows": rows, "tokens": tokens, "top_k": top_k, "tokens_per_s, core_s_per_token": found}
        json_file.write_text(json.dumps(measured, indent=2))


def rate(kind: str, path: str, rows: int, tokens: int, top_k: int, seconds: int) -> tuple[float, float]:
    """Tokens a second, and core-seconds a token."""
    from opd_ray.config import RolloutConfig
    from opd_ray.generate import make_generation_engine
    from opd_ray.messages import GenerationRequest, SamplingSettings

    most = 2 * tokens - 1
    engine = make_generation_engine(path, RolloutConfig(engine=kind, max_num_seqs=rows), _PROMPT_TOKENS + most)
    rng, number = random.Random(0), count()

    def submit() -> None:
        prompt = tuple(rng.randrange(2, 16) for _ in range(_PROMPT_TOKENS))
        sampling = SamplingSettings(1.0, 1.0, rng.randint(1, most), stop_token_ids=(), top_k=top_k)
        engine.submit(GenerationRequest(str(index := next(number)), prompt, index, sampling))

    for _ in range(rows):
        submit()

    def run(for_s: float) -> int:
        done, end = 0, time.monotonic() + for_s
        while time.monotonic() < end:
            finished = engine.step()
            done += sum(len(each.tokens) for each in finished)
            for _ in finished:
                submit()
        return done

    run(_WARM_S)
    began, spent = time.monotonic(), time.process_time()
    done = run(seconds)
    return done / (time.monotonic() - began), (time.process_time() - spent) / done


def _elsewhere(*what: str) -> str:
    """The last line that a process of its own prints."""
    settings = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, __file__, "--elsewhere", *what]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=_MOST_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().rpartition("\n")[2]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--elsewhere"]:
        kind, model, *numbers = sys.argv[2:]
        print(f"\n{json.dumps(rate(kind, model, *map(int, numbers)))}")
    else:
        main()
