"""What a learner rank needs: memory while the student loads, packed rows and padded ones, a step, and its logits.

    python jobs/bench_learner.py [--json FILE] [--layers N] [--ranks N] [--turns N] [loading|packing|step|logits ...]

Loading: a random model of some 400 million parameters in bfloat16 is loaded by two ranks on the CPU at ZeRO-3: split
from the first parameter on, as a run does, and whole on every rank first, as a plain from_pretrained would. Resident
memory has the pages of the checkpoint's file in it, which ranks share and the kernel drops when it needs to; private
memory has not.

Packing: forward and backward passes over the same rollouts, padded and packed in turn, on one thread: of lengths that
scatter as rollouts' do, and all of one length, where padding wastes nothing.

Step: Learner.train_step, packed (the default) and padded, beside a loop in plain torch and transformers, in one process
with one thread and without Ray, a step of each in turn. The models of race_material.py, rollouts that end as theirs do,
the reverse KL on the whole vocabulary from the teacher's hidden states, clipping, fused AdamW. The loop pads; it has
its tensors ready, makes logits of response tokens alone and measures nothing. train_step begins with the payloads and
measures what a run logs.

Logits: a forward and a backward pass of that loss on given states: the learner's, with learner.logits_mb at its
default, and the loop's, which has all logits at once. float32, one thread, a process for each. What logits take does
not depend on the states' width, which is small but for the last row.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
from race_material import EOS_SHARE, ROWS, Material, Row, overrides, prepare
from rich.console import Console
from rich.table import Table

from opd_ray import config as configs
from opd_ray.config import Config, from_dict
from opd_ray.config.help import OutputFile
from opd_ray.messages import ROLLOUT_SCHEMA, Coefficients, Entry, RolloutMeta, StepPlan
from opd_ray.rooms.node import free_port

console = Console(width=120)
_MIB = 2**20
_SAMPLE_S = 0.002
_ROLLOUTS, _ROUNDS = 32, 8
_STUDENTS = {"58 k": (1, 20, 12), "1 M": (2, 1 / EOS_SHARE, 3), "36 M": (4, 1 / EOS_SHARE, 1)}
"""By parameters: row of the race, the mean length that responses would have there without a limit, steps of a turn."""
_PROMPT_TOKENS = 16
_COEFFICIENTS = Coefficients(student=1.0, golden=0.0, teacher=0.0, reference=0.0)
_VOCABULARY = 151_936
_LOGITS = {64: ((1024, True), (2048, True), (4096, True), (16_384, False)), 896: ((1024, True),)}
"""Width of the states: numbers of tokens, and whether all their logits at once are tried."""


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


def _step(size: str, turns: int, answers: Any) -> None:
    """Answers with the step's tokens, each side's loss before any step, and (wall, CPU) seconds of its steps."""
    tokens, sides = _sides(size)
    losses = {side: take() for side, take in sides.items()}
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(turns * _STUDENTS[size][2]):
        for side, take in sides.items():
            began, spent = time.perf_counter(), time.process_time()
            take()
            seconds[side].append((time.perf_counter() - began, time.process_time() - spent))
    answers.put({"tokens": tokens, "losses": losses, "seconds": seconds})


def _sides(size: str) -> tuple[int, dict[str, Callable[[], float]]]:
    """Tokens of a step, and what takes one, by side."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    from opd_ray.learn.microbatch import collate, fetch_payloads
    from opd_ray.models.heads import load_head

    torch.set_num_threads(1)
    number, mean, _ = _STUDENTS[size]
    row, sides = ROWS[number], {}
    with tempfile.TemporaryDirectory() as directory:
        material = prepare(row, Path(directory))
        head = load_head(material.teacher, torch.float32, torch.device("cpu")).weight
        for side, packing in (("learner", True), ("learner, padded", False)):
            fixed = [f"teacher.path={material.teacher}", "evaluation.num_problems=0", f"learner.packing={packing}"]
            config = configs.load(None, [*overrides(row, material), *fixed])
            entries = _entries(row, mean, len(head), config, material)
            sides[side], plan = _learner_side(config, material.student, entries, first=not sides)
        bare = _BareLoop(material.student, head)
    payloads, _ = fetch_payloads(plan, _as_they_are)
    batches = [collate(each, payloads, packing=False) for each in plan.micro_batches]
    tokens = plan.denominators.tokens
    return tokens, sides | {"bare loop": lambda: bare.step(batches, tokens, config.learner.gradient_clip)}


def _learner_side(
    config: Config, student: Path, entries: list[Entry], *, first: bool
) -> tuple[Callable[[], float], StepPlan]:
    """What takes a step of the learner, and its plan."""
    from opd_ray.buffer.plan import plan_step
    from opd_ray.learn.learner import Learner

    learner = Learner(config, 0)
    if first:  # a process joins once
        learner.setup("127.0.0.1", 0, "")
    learner.begin(config, str(student), (1,))
    budget, packing = config.learner.micro_batch_tokens, config.learner.packing
    how = {"num_ranks": 1, "micro_batch_tokens": budget, "packing": packing, "coefficients": _COEFFICIENTS}
    [plan] = plan_step(entries, step=0, **how)
    return lambda: learner.train_step(plan, _as_they_are).metrics["loss"], plan


def _as_they_are(refs: list[Any]) -> list[Any]:
    return refs


class _BareLoop:
    """Plain torch and transformers."""

    def __init__(self, student: Path, teacher_head: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).train()
        self._teacher_head = teacher_head
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def step(self, batches: list[Any], num_tokens: int, clip: float) -> float:
        import torch

        total = 0.0
        for batch in batches:
            states = self._model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            [segment] = batch.segments
            loss = _reverse_kl(
                states.flatten(0, 1)[batch.logit_index],
                self._model.lm_head.weight,
                segment.tokens.teachers["teacher"].hidden,
                self._teacher_head,
            )
            (loss / num_tokens).backward()
            total += loss.item() / num_tokens
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total


def _reverse_kl(hidden: Any, head: Any, teacher_hidden: Any, teacher_head: Any) -> Any:
    """Summed over the tokens, with all of their logits at once."""
    import torch

    log_p = torch.nn.functional.linear(hidden, head).log_softmax(-1)
    with torch.no_grad():
        log_q = torch.nn.functional.linear(teacher_hidden, teacher_head).log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _entries(row: Row, mean: float, vocabulary: int, config: Config, material: Material) -> list[Entry]:
    """A step of rollouts that end at random, as in the race, with the teacher's scores of them."""
    import asyncio

    import numpy as np
    import pyarrow as pa

    from opd_ray.score.requests import score_requests
    from opd_ray.score.scorer import Scorer
    from opd_ray.score.torch import TorchScoringEngine

    random, entries = np.random.default_rng(0), []
    teacher = TorchScoringEngine(path=str(material.teacher))
    scorer = Scorer(make_engine=lambda: teacher, scorer=config.teacher, member=False)
    request = score_requests(config, (1,))["student"]["teacher"]
    # Evenly spread over the exponential distribution that ends at the limit, so that few rollouts have its mean.
    levels = (np.arange(row.batch) + 0.5) / row.batch
    lengths = np.clip(np.log(1 - levels) * -mean, 1, row.limit).astype(int)
    for chunk in np.array_split(random.permutation(lengths), -(-row.batch // config.rollout.prompts_per_call)):
        rows = [_rollout(random.integers(2, vocabulary, _PROMPT_TOKENS + length)) for length in chunk.tolist()]
        payload = pa.RecordBatch.from_pylist(rows, schema=ROLLOUT_SCHEMA)
        _, scores = asyncio.run(scorer.score(payload, request))
        for index, length in enumerate(chunk.tolist()):
            meta = RolloutMeta(
                rollout_id=str(len(entries)),
                slot=0,
                prompt_id="0",
                source="student",
                num_prompt_tokens=_PROMPT_TOKENS,
                num_response_tokens=length,
                finish_reason="stop",
                correct=False,
                repetitive=False,
                oldest_version=0,
                mean_version=0.0,
                mean_behaviour_logprob=0.0,
            )
            entries.append(Entry(meta, index, payload, {"teacher": scores}))
    return entries


def _rollout(tokens: Any) -> dict[str, Any]:
    """A row of ROLLOUT_SCHEMA."""
    response = tokens[_PROMPT_TOKENS:]
    return {
        "rollout_id": "",
        "slot": 0,
        "prompt_id": "0",
        "source": "student",
        "prompt_tokens": tokens[:_PROMPT_TOKENS],
        "response_tokens": response,
        "behaviour_logprobs": [-3.0] * len(response),
        "weight_versions": [0] * len(response),
        "topk_ids": [],
        "privileged_prompt_tokens": [],
        "finish_reason": "stop",
        "correct": False,
        "text": "",
    }


def _logits(whole: bool, tokens: int, width: int, answers: Any) -> None:
    """Answers with the peak of private bytes, the CPU seconds and the loss."""
    import torch

    from opd_ray.learn.heads import ResponseHead
    from opd_ray.learn.losses import ScoredTokens, Tokens
    from opd_ray.learn.microbatch import MicroBatch, Segment
    from opd_ray.learn.objective import Objective
    from opd_ray.messages import Count, Denominators
    from opd_ray.models.heads import FrozenHead

    torch.set_num_threads(1)
    torch.manual_seed(0)
    head, other = (
        ResponseHead(width, _VOCABULARY, bias=False),
        FrozenHead(torch.randn(_VOCABULARY, width) / width, None),
    )
    hidden, states = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    ids, scores = torch.randint(0, _VOCABULARY, (tokens,)), torch.zeros(tokens)
    probed = slice(0, 16)  # whose log-probs the objective compares with what the teacher's output layer makes
    scores[probed] = other(states[probed]).log_softmax(-1).gather(-1, ids[probed, None])[:, 0]
    segment = Segment(
        source="student",
        rollout_ids=("0",),
        lengths=torch.tensor([tokens]),
        truncated=torch.tensor([False]),
        tokens=Tokens(ids, scores, {"teacher": ScoredTokens(scores, hidden=states)}),
        repetitive=torch.zeros(tokens),
    )
    batch = MicroBatch(torch.zeros(1, 1, dtype=torch.int64), None, torch.zeros(0, dtype=torch.int64), (segment,))
    loss = {"student": {"divergence": "reverse_kl", "support": "full"}, "reference": {"coef": 0.0}}
    objective = Objective(from_dict({"loss": loss}), vocab_size=_VOCABULARY, heads={"teacher": other})
    peak, began = Peak(), time.process_time()
    if whole:
        total = _reverse_kl(hidden, head.weight, states, other.weight) / tokens
    else:
        total = objective.of(batch, Denominators(Count(1, tokens)), _COEFFICIENTS)(hidden, head)
    total.backward()
    seconds = time.process_time() - began
    answers.put({"bytes": peak.bytes()["private"], "s": seconds, "loss": total.item()})


def _elsewhere(function: Callable[..., None], *args: Any) -> Any:
    """What a process of its own answers."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=function, args=(*args, answers), daemon=True)
    process.start()
    try:
        return answers.get(timeout=900)
    finally:
        process.kill()
        process.join()


def _show_loading(layers: int, ranks: int) -> dict[str, Any]:
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
    console.print(f"{parameters / 1e6:.0f} million parameters, {2 * parameters / _MIB:,.0f} MiB on disk; peaks in MiB")
    console.print(table)
    return {"parameters": parameters, "ranks": ranks, "memory": found}


def _show_packing() -> dict[str, Any]:
    packing = _packing()
    for kind, rates in packing.items():
        said = ", ".join(f"{name} {rate:,.0f} tokens a second" for name, rate in rates.items())
        console.print(f"{_ROLLOUTS} rollouts of {kind} length: {said} ({rates['packed'] / rates['padded']:.2f} times)")
    return packing


def _show_steps(turns: int) -> dict[str, Any]:
    table = Table("parameters", "tokens", "side", "ms a step", "CPU", "tokens/s", "of the bare loop", "loss")
    found = {}
    for size in _STUDENTS:
        found[size] = each = _elsewhere(_step, size, turns)
        medians = {side: [median(part) for part in zip(*taken, strict=True)] for side, taken in each["seconds"].items()}
        for side, (wall, spent) in medians.items():
            times = [f"{1000 * wall:,.1f}", f"{1000 * spent:,.1f}", f"{each['tokens'] / wall:,.0f}"]
            ratio, loss = medians["bare loop"][0] / wall, each["losses"][side]
            table.add_row(size, f"{each['tokens']:,}", side, *times, f"{ratio:.2f}", f"{loss:.6f}")
    console.print(table)
    return found


def _show_logits() -> list[dict[str, Any]]:
    table = Table("width", "tokens", "loss", "MiB at the peak", "KiB a token", "CPU s", "value")
    found = []
    for width, sizes in _LOGITS.items():
        for tokens, both in sizes:
            for whole in (True, False) if both else (False,):
                each = _elsewhere(_logits, whole, tokens, width)
                kind = "all logits at once" if whole else "the learner's"
                figures = [f"{each['bytes'] / _MIB:,.0f}", f"{each['bytes'] / 1024 / tokens:,.0f}", f"{each['s']:.1f}"]
                table.add_row(str(width), f"{tokens:,}", kind, *figures, f"{each['loss']:.5f}")
                found.append({"width": width, "tokens": tokens, "whole": whole} | each)
    console.print(table)
    return found


@click.command()
@click.option("--json", "json_file", type=OutputFile(), help="Write the figures there.")
@click.option("--layers", default=28, show_default=True, help="Layers of the model that is loaded.")
@click.option("--ranks", default=2, show_default=True, help="Learner ranks that load it.")
@click.option("--turns", default=3, show_default=True, type=click.IntRange(1), help="Turns of the steps.")
@click.argument("parts", nargs=-1, type=click.Choice(["loading", "packing", "step", "logits"]))
def main(json_file: Path | None, layers: int, ranks: int, turns: int, parts: tuple[str, ...]) -> None:
    """Measures a learner rank: all of it, or the parts that are named."""
    measures: dict[str, Callable[[], Any]] = {
        "loading": lambda: _show_loading(layers, ranks),
        "packing": _show_packing,
        "step": lambda: _show_steps(turns),
        "logits": _show_logits,
    }
    found = {part: measure() for part, measure in measures.items() if not parts or part in parts}
    if json_file:
        json_file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
