"""Who computes what their documentation says: one batch, float64 references, ours and others' losses in float32.

    python jobs/conformance.py [--without-peers] [--write DIR] [--json FILE] [--page FILE]

The batch is drawn from a seed: rollouts of a student of sharp and flat distributions, a teacher that agrees and
contradicts, a reference, an older student that sampled, a pair of EOS ids. ``--write`` puts it into batch.parquet, a
row a token, and every entry's reference value and gradient into references.parquet, for whoever wants to be compared.

A reference is the formula in float64 (jobs/conformance_formulas.py), differentiated by torch's autograd. What is
compared is the loss of the batch and its gradient with respect to all of the student's logits: the relative error of
the one, and the largest error of the other beside the largest gradient. Ours go through the objective that trains
(opd_ray/learn/objective.py): entries, reductions, weights and all.

Others: TRL and Liger come from PyPI at the versions below, into the cache, on top of this environment. Liger's fused
JSD kernel needs Triton and a GPU; what is compared of it is its chunked JSD, which is torch.
"""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from conformance_formulas import BETAS, STOPS, TOP_K, Batch, Entry, draw, entries, loops, top
from rich.console import Console
from rich.table import Table

from opd_ray import config as configs
from opd_ray.config.help import OutputFile
from opd_ray.errors import OpdError
from opd_ray.learn.losses import ScoredTokens, Tokens
from opd_ray.learn.microbatch import MicroBatch, Segment
from opd_ray.learn.objective import Objective
from opd_ray.messages import Coefficients, Count, Denominators

AGREES = 1e-4
"""Error under which float32 arithmetic says the same as the formula. Of this batch: where a top-k leaves a tail of mass
m, float32 log-probs know it to about 1e-7 / m."""
LIGER_VERSION = "0.8.5"

Peer = Callable[["Batch", torch.Tensor], torch.Tensor]
"""Of float32 logits that take a gradient, the loss of the batch."""


# ---- ours ----


def scores(batch: Batch, logits: torch.Tensor, entry: Entry) -> ScoredTokens:
    """What a scorer of these logits says; its hidden states are the logits."""
    logprobs = logits.double().log_softmax(-1)
    own, stop = logprobs.gather(-1, batch.tokens[:, None])[:, 0], logprobs[:, list(STOPS)].logsumexp(-1)
    if entry.eos:
        own = torch.where(torch.isin(batch.tokens, torch.tensor(STOPS)), stop, own)
    best = logprobs.topk(TOP_K, -1)
    given = logprobs.gather(-1, top(batch, "student_top_k"))
    return ScoredTokens(
        logprobs=own.float(),
        topk_ids=best.indices if entry.top_k else None,
        topk_logprobs=best.values.float() if entry.top_k else None,
        given_logprobs=given.float() if entry.top_k else None,
        stop_logprobs=stop.float() if entry.eos else None,
        hidden=None if entry.top_k else logits,
    )


class Identity:
    """An output layer whose states are the logits."""

    weight = torch.zeros(1, 1)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.clone()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def ours(batch: Batch, entry: Entry) -> Peer:
    """The objective's loss of one micro-batch."""
    loss = {"golden": {"coef": 0}, "reference": {"coef": 0}} | entry.loss
    others = {"data": {"golden": None}, "buffer": {"golden_per_prompt": 0}}
    looped = loops(batch).float() if "loop_advantage" in loss else None
    ends = {"repetition_detection": None if looped is None else {"min_pattern_size": 1}}
    config = configs.from_dict(others | {"loss": loss, "rollout": ends})
    heads: Any = {"teacher": Identity(), "reference": Identity()}
    stops = STOPS if entry.eos else STOPS[:1]
    objective = Objective(config, vocab_size=batch.student.shape[-1], stop_token_ids=stops, heads=heads)
    count = Count(len(batch.lengths), len(batch.tokens))
    tokens = Tokens(
        tokens=batch.tokens,
        behaviour_logprobs=batch.of_token(batch.behaviour.double()).float(),
        teachers={"teacher": scores(batch, batch.teacher, entry)},
        reference=scores(batch, batch.reference, entry),
        given_ids=top(batch, "student_top_k") if entry.top_k else None,
    )
    nothing = torch.zeros(len(batch.tokens))
    names = tuple(map(str, range(len(batch.lengths))))
    ended = torch.zeros(len(names), dtype=torch.bool)
    segment = Segment("student", names, batch.lengths, ended, tokens, nothing, looped=looped)
    only_reference = "reference" in entry.loss
    coefficients = Coefficients(student=1 - only_reference, golden=0, teacher=0, reference=float(only_reference))
    part = MicroBatch(batch.tokens[None], None, torch.arange(len(batch.tokens)), (segment,))
    of = objective.of(part, Denominators(student=count), coefficients)
    return lambda _, logits: of(logits, Identity())


# ---- others ----


def peers(batch: Batch) -> dict[str, dict[str, tuple[str, Peer]]]:
    """Entry name to what others compute of it: who, and its documentation's word for it with the loss."""
    from bench_peers import TRL_VERSION, fetch

    sys.path[:0] = [str(fetch("trl", TRL_VERSION)), str(fetch("liger-kernel", LIGER_VERSION))]
    sys.modules["vllm"] = None  # TRL imports it where it is
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
    from trl.experimental.sdpo import loss_utils as sdpo
    from trl.experimental.server_distillation import server_distillation_trainer as server
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    eye, whole = torch.eye(batch.student.shape[-1]), torch.ones(1, len(batch.tokens))
    teacher, ids = batch.teacher, batch.tokens
    found: dict[str, dict[str, tuple[str, Peer]]] = collections.defaultdict(dict)

    def distillation(beta: float) -> Peer:
        return lambda _, z: _chunked_divergence_loss(z[None], teacher[None], eye, eye, whole, beta)[0]

    def gkd(beta: float) -> Peer:
        return lambda _, z: GKDTrainer.generalized_jsd_loss(z[None], teacher[None], labels=ids[None], beta=beta)

    def liger(beta: float) -> Peer:
        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
        return lambda _, z: loss(z, eye.clone(), teacher, eye, ids)

    def self_distilled(alpha: float, tail: bool) -> Peer:
        asked = {"distillation_topk": TOP_K, "distillation_alpha": alpha, "distillation_add_tail": tail}
        return lambda _, z: sdpo.compute_topk_self_distillation_loss(z, teacher, **asked).mean()

    def of_server(beta: float, tail: bool) -> Peer:
        best = top(batch, "teacher_top_k")
        theirs = teacher.log_softmax(-1).gather(-1, best)

        def loss(_: Batch, z: torch.Tensor) -> torch.Tensor:
            own, mine = z.log_softmax(-1).gather(-1, best), torch.ones_like(best, dtype=torch.bool)
            if tail:
                (own, both), (other, _both) = (server._add_tail_bucket(each, mine) for each in (own, theirs))
            else:
                own, other = (each - each.logsumexp(-1, keepdim=True) for each in (own, theirs))
                both = mine
            return server._jsd_divergence(own, other, beta, both).sum(-1).mean()

        return loss

    for title, beta in (("forward_kl", 0.0), ("reverse_kl", 1.0), *((f"jsd β={each:g}", each) for each in BETAS)):
        says = "beta 0 is the forward KL, 1 the reverse, between them the generalised JSD"
        found[f"{title}, full"] |= {
            "TRL Distillation": (says, distillation(beta)),
            "TRL GKD": (says, gkd(beta)),
            "Liger chunked JSD": (says, liger(beta)),
        }
        for tail in ("bucket", "renormalise"):
            says = "the student's top-k, " + ("the tail as one bucket" if tail == "bucket" else "renormalised")
            found[f"{title}, student_top_k, {tail}"]["TRL SDPO"] = says, self_distilled(beta, tail == "bucket")
            says = says.replace("student's", "teacher's")
            found[f"{title}, teacher_top_k, {tail}"]["TRL server"] = says, of_server(beta, tail == "bucket")

    def one_token(_: Batch, z: torch.Tensor) -> torch.Tensor:
        return sdpo.compute_sampled_token_self_distillation_loss(
            z[None], teacher[None], ids[None], distillation_alpha=1.0
        ).mean()

    found["k1"]["TRL SDPO"] = "the sampled token's reverse KL, its log-ratio detached", one_token

    def weighted(_: Batch, z: torch.Tensor) -> torch.Tensor:
        log = collections.defaultdict(lambda: collections.defaultdict(list))
        trainer = SimpleNamespace(
            temperature=1.0, iw_opd_gamma=0.5, iw_opd_epsilon=1e-8, model=SimpleNamespace(training=True), _metrics=log
        )
        lengths = batch.lengths.tolist()
        rows = [z, ids, batch.of_token(teacher), batch.of_token(batch.behaviour)]
        padded = [torch.nn.utils.rnn.pad_sequence(each.split(lengths), batch_first=True) for each in rows]
        labels = torch.nn.utils.rnn.pad_sequence(ids.split(lengths), batch_first=True, padding_value=-100)
        return IWOPDTrainer._compute_iw_opd_loss(trainer, padded[0], padded[1], labels, *padded[2:])

    says = "1 + γ (1 − Σ of earlier |A| / Σ of all), γ = .5, on A of the policy that sampled"
    found["k1, position_weight (IW-OPD)"]["TRL IW-OPD"] = says, weighted
    return found


# ---- the table ----


@dataclass(frozen=True)
class Error:
    """How far float32 is from float64."""

    value: float
    """Of the loss, relative."""
    gradient: float
    """Largest, beside the largest gradient."""

    @property
    def agrees(self) -> bool:
        return max(self.value, self.gradient) <= AGREES  # not where one is no number


def exact(batch: Batch, entry: Entry) -> tuple[float, torch.Tensor]:
    """(loss, gradient [N, V]) in float64."""
    wide = batch.double()
    loss = (entry.reference(wide) * entry.weights(batch)).sum()
    (gradient,) = torch.autograd.grad(loss, wide.student)
    return loss.item(), gradient


def error(batch: Batch, loss: Peer, wanted: tuple[float, torch.Tensor]) -> Error:
    logits = batch.student.clone().requires_grad_()
    value = loss(batch, logits)
    (gradient,) = torch.autograd.grad(value, logits)
    off = float((gradient.double() - wanted[1]).abs().max() / wanted[1].abs().max())
    return Error(abs(value.item() - wanted[0]) / abs(wanted[0]), off)


def compare(batch: Batch, others: Mapping[str, Mapping[str, tuple[str, Peer]]]) -> dict[str, dict[str, Error]]:
    """Entry to who computes it and how far off."""
    found = {}
    for entry in entries():
        wanted = exact(batch, entry)
        found[entry.name] = {"opd_ray": error(batch, ours(batch, entry), wanted)}
        found[entry.name] |= {who: error(batch, loss, wanted) for who, (_, loss) in others.get(entry.name, {}).items()}
    return found


def write(batch: Batch, directory: Path) -> None:
    """The batch, a row a token, and every entry's loss and gradient in float64."""
    directory.mkdir(parents=True, exist_ok=True)
    rollout = torch.arange(len(batch.lengths)).repeat_interleave(batch.lengths)
    columns = {"rollout": rollout.numpy(), "token": batch.tokens.numpy()}
    columns |= {
        f"{who}_logits": list(getattr(batch, who).numpy()) for who in ("student", "teacher", "reference", "behaviour")
    }
    pq.write_table(pa.table(columns), directory / "batch.parquet")
    rows = [(entry, *exact(batch, entry)) for entry in entries()]
    table = {
        "entry": [entry.name for entry, *_ in rows],
        "loss": [loss for _, loss, _ in rows],
        "gradient": [gradient.flatten().numpy() for *_, gradient in rows],
    }
    pq.write_table(pa.table(table), directory / "references.parquet")


def show(found: dict[str, dict[str, Error]], page: Path | None) -> None:
    who = list(dict.fromkeys(name for row in found.values() for name in row))
    table = Table("loss", *who, title="error of the loss / of its gradient, relative; red: more than float32's")
    for name, row in found.items():
        cells = []
        for each in who:
            off = row.get(each)
            text = "–" if off is None else f"{off.value:.0e} / {off.gradient:.0e}"
            cells.append(text if off is None or off.agrees else f"[red]{text}[/red]")
        table.add_row(name, *cells)
    console = Console(record=page is not None, width=max(120, 45 + 20 * len(who)))
    console.print(table)
    if page:
        page.write_text(console.export_html(), encoding="utf-8")


def _plain(found: dict[str, dict[str, Error]], others: Mapping[str, Mapping[str, tuple[str, Peer]]]) -> dict[str, Any]:
    """Entry to who, with errors and with what the documentation says."""
    says = {name: {who: each for who, (each, _) in row.items()} for name, row in others.items()}
    return {
        name: {who: vars(off) | {"agrees": off.agrees, "says": says.get(name, {}).get(who)} for who, off in row.items()}
        for name, row in found.items()
    }


@click.command()
@click.option("--without-peers", is_flag=True, help="Ours alone: nothing is installed.")
@click.option("--write", "directory", type=click.Path(path_type=Path), help="Batch and references, in Parquet.")
@click.option("--json", "json_file", type=OutputFile(), help="Write the errors to this file.")
@click.option("--page", type=OutputFile(), help="Write the table to this HTML file.")
def main(without_peers: bool, directory: Path | None, json_file: Path | None, page: Path | None) -> None:
    """Compares losses with their formulas; ends with 1 where one of ours is off."""
    batch = draw()
    if directory:
        write(batch, directory)
    try:
        others = {} if without_peers else peers(batch)
    except OpdError as failure:
        print(f"conformance: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
    found = compare(batch, others)
    show(found, page)
    if json_file:
        json_file.write_text(json.dumps(_plain(found, others), indent=2))
    if off := [name for name, row in found.items() if not row["opd_ray"].agrees]:
        print(f"conformance: opd_ray is off in {', '.join(off)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
