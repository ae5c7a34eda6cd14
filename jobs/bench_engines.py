"""What the two generation engines give on this machine, by the size of the model.

    python jobs/bench_engines.py [--rows N] [--tokens N] [--seconds S] [--json FILE]

Random Qwen3 models; as many responses as there are rows run at any time, of lengths that are spread evenly around the
mean; no weight updates. Each engine in a process of its own with one thread, one after the other, twice in turn.
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
from typing import Any

import click
from rich.console import Console
from rich.table import Table

SIZES = {
    "58 k": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 64},
    "1 M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 512},
    "4 M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 512},
    "36 M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 4096},
}
ENGINES = ("torch", "vllm")
_PROMPT_TOKENS = 24
_MOST_S = 600


@click.command()
@click.option("--rows", default=96, show_default=True, help="Responses that run at once.")
@click.option("--tokens", default=20, show_default=True, help="Mean length of a response.")
@click.option("--seconds", default=10.0, show_default=True, help="Time for each measurement, after two of warm-up.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write what was measured to this file.")
def main(rows: int, tokens: int, seconds: float, json_file: Path | None) -> None:
    """Compares the torch engine and vLLM by the size of the model."""
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for size, shape in SIZES.items():
            path = Path(directory) / size.replace(" ", "-")
            _elsewhere("save", str(path), json.dumps(shape))
            found[size] = {engine: [] for engine in ENGINES}
            for engine in (*ENGINES, *ENGINES):
                rate = _elsewhere(engine, str(path), str(rows), str(tokens), str(seconds))
                found[size][engine].append(float(rate))
    table = Table("parameters", *(f"{engine}, tokens/s" for engine in ENGINES), "ratio")
    for size, rates in found.items():
        torch, vllm = (mean(rates[engine]) for engine in ENGINES)
        table.add_row(size, f"{torch:,.0f}", f"{vllm:,.0f}", f"{torch / vllm:.2f}")
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps({"rows": rows, "tokens": tokens, "tokens_per_s": found}, indent=2))


def save(path: str, shape: str) -> None:
    """A random model, whose tokenizer nobody asks for."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = json.loads(shape)
    heads = {"num_attention_heads": max(2, sizes["hidden_size"] // 64), "head_dim": 32, "num_key_value_heads": 2}
    config = Qwen3Config(**sizes, **heads, max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=0)
    Qwen3ForCausalLM(config).save_pretrained(path)


def rate(kind: str, path: str, rows: int, tokens: int, seconds: float) -> float:
    """Tokens a second."""
    from opd_ray.config import RolloutConfig
    from opd_ray.generate import make_generation_engine
    from opd_ray.messages import GenerationRequest, SamplingSettings

    most = 2 * tokens - 1
    engine = make_generation_engine(path, RolloutConfig(engine=kind, max_num_seqs=rows), _PROMPT_TOKENS + most)
    rng, number = random.Random(0), count()

    def submit() -> None:
        prompt = tuple(rng.randrange(1, 60) for _ in range(_PROMPT_TOKENS))
        sampling = SamplingSettings(1.0, 1.0, rng.randint(1, most), stop_token_ids=())
        engine.submit(GenerationRequest(str(index := next(number)), prompt, index, sampling))

    for _ in range(rows):
        submit()
    began, done = time.monotonic(), 0
    warm = began + 2
    while (now := time.monotonic()) < warm + seconds:
        finished = engine.step()
        done += sum(len(each.tokens) for each in finished) if now >= warm else 0
        for _ in finished:
            submit()
    return done / (time.monotonic() - warm)


def _elsewhere(*what: str) -> str:
    """The last line that a process of its own prints."""
    settings = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, __file__, "--elsewhere", *what]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=_MOST_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().rpartition("\n")[2]


def _there(what: str, *arguments: Any) -> None:
    if what == "save":
        save(*arguments)
    else:
        path, rows, tokens, seconds = arguments
        print(f"\n{rate(what, path, int(rows), int(tokens), float(seconds))}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--elsewhere"]:
        _there(*sys.argv[2:])
    else:
        main()
