"""Who computes what their documentation says: one batch, float64 references, ours and others' losses in float32.

    python jobs/conformance.py [--without-peers] [--write DIR] [--json FILE] [--page FILE]

The batch is drawn from a seed: rollouts of a student of sharp and flat distributions, a teacher that agrees and
contradicts, a reference, an older student that sampled, a pair of EOS ids. ``--write`` puts it into batch.parquet, a
row a token, and every entry's reference value and gradient into references.parquet, for whoever wants to be compared.

A reference is the formula in float64, differentiated by torch's autograd, with what is documented as a constant
detached. What is compared is the loss of the batch and its gradient with respect to all of the student's logits: the
relative error of the one, and the largest error of the other beside the largest gradient. Ours go through the objective
that trains (opd_ray/learn/objective.py): entries, reductions, weights and all.

Others: TRL and Liger come from PyPI at the versions below, into the cache, on top of this environment. Liger's fused
JSD kernel needs Triton and a GPU; what is compared of it is its chunked JSD, which is torch.
"""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from opd_ray import config as configs
from opd_ray.errors import OpdError
from opd_ray.learn.losses import ScoredTokens, Tokens
from opd_ray.learn.microbatch import MicroBatch, Segment
from opd_ray.learn.objective import Objective
from opd_ray.messages import Coefficients, Count, Denominators

SEED, LENGTHS, VOCABULARY, TOP_K = 0, (1, 5, 24, 34), 64, 8
STOPS = (3, 11)
AGREES = 1e-4
"""Error under which float32 arithmetic says the same as the formula. Of this batch: where a top-k leaves a tail of mass
m, float32 log-probs know it to about 1e-7 / m."""
BETAS = (0.1, 0.5, 0.9)
LIGER_VERSION = "0.8.5"

Reference = Callable[["Batch"], torch.Tensor]
"""[N] float64 of a batch whose student logits take a gradient; the loss is their sum with the weights of the entry."""
Peer = Callable[["Batch", torch.Tensor], torch.Tensor]
"""Of float32 logits that take a gradient, the loss of the batch."""


@dataclass(frozen=True)
class Batch:
    """N tokens of packed rollouts, logits [N, V] float32 of everybody."""

    lengths: torch.Tensor
    tokens: torch.Tensor
    student: torch.Tensor
    teacher: torch.Tensor
    reference: torch.Tensor
    behaviour: torch.Tensor

    def double(self) -> Batch:
        """The same in float64, ready to be differentiated."""
        wide = {name: getattr(self, name).double() for name in ("student", "teacher", "reference", "behaviour")}
        wide["student"].requires_grad_()
        return Batch(self.lengths, self.tokens, **wide)

    def of_token(self, logits: torch.Tensor) -> torch.Tensor:
        """[N] log-probs of the sampled tokens."""
        return logits.log_softmax(-1).gather(-1, self.tokens[:, None])[:, 0]


def draw(seed: int = SEED, lengths: Sequence[int] = LENGTHS, vocabulary: int = VOCABULARY) -> Batch:
    """Every second token's distributions are five times as sharp as the others', and every third teacher's agrees."""
    rng, n = np.random.default_rng(seed), sum(lengths)
    student, teacher, reference, drift = (rng.normal(size=(n, vocabulary)) for _ in range(4))
    teacher[::3] = student[::3] + 0.3 * teacher[::3]
    sharp = np.where(np.arange(n) % 2, 4.0, 0.8)[:, None]
    logits = [sharp * each for each in (student, teacher, reference, student + 0.2 * drift)]
    p = np.exp(logits[3] - logits[3].max(-1, keepdims=True)).cumsum(-1)
    tokens = (p < rng.random((n, 1)) * p[:, -1:]).sum(-1)
    parts = [torch.from_numpy(each.astype(np.float32)) for each in logits]
    return Batch(torch.tensor(lengths), torch.from_numpy(tokens), *parts)


# ---- the formulas ----


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor, name: str, beta: float) -> torch.Tensor:
    if name == "reverse_kl":
        return _kl(log_p, log_q)
    if name == "forward_kl":
        return _kl(log_q, log_p)
    log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def _on(log_p: torch.Tensor, log_q: torch.Tensor, ids: torch.Tensor | None, tail: str, name: str, beta: float):
    """A divergence of two whole distributions on the outcomes ``ids`` [N, k] with what becomes of the rest."""
    if ids is None:
        return _divergence(log_p, log_q, name, beta)
    inside = [each.gather(-1, ids) for each in (log_p, log_q)]
    if tail == "bucket":
        rest = [torch.log1p(-each.exp().sum(-1, keepdim=True)) for each in inside]
        return _divergence(*(torch.cat(pair, -1) for pair in zip(inside, rest, strict=True)), name, beta)
    if tail == "renormalise":
        return _divergence(*(each - each.logsumexp(-1, keepdim=True) for each in inside), name, beta)
    p, q = (each.exp() for each in inside)
    slope = {"reverse_kl": (p / q).log(), "forward_kl": -q / p}.get(
        name, (1 - beta) * (p / (beta * q + (1 - beta) * p)).log()
    )
    through = (p * slope.detach()).sum(-1)
    return _divergence(*inside, name, beta).detach() + through - through.detach()


def _merged(log_p: torch.Tensor) -> torch.Tensor:
    """The EOS set as one outcome."""
    others = [id_ for id_ in range(log_p.shape[-1]) if id_ not in STOPS[1:]]
    stop = log_p[:, list(STOPS)].logsumexp(-1, keepdim=True)
    return torch.cat([log_p[:, : STOPS[0]], stop, log_p[:, STOPS[0] + 1 :]], -1)[:, others]


def on_support(
    name: str, support: str = "full", tail: str = "bucket", beta: float = 0.5, eos: bool = False
) -> Reference:
    def reference(batch: Batch) -> torch.Tensor:
        log_p, log_q = batch.student.log_softmax(-1), batch.teacher.log_softmax(-1)
        if eos:
            return _divergence(_merged(log_p), _merged(log_q), name, beta)
        ids = None if support == "full" else top(batch, support)
        return _on(log_p, log_q, ids, tail, name, beta)

    return reference


def top(batch: Batch, support: str) -> torch.Tensor:
    """[N, k] of the teacher's most probable tokens, or of those of the student, which sampled them itself here."""
    return (batch.teacher if support == "teacher_top_k" else batch.student).detach().topk(TOP_K, -1).indices


def sampled(
    advantage: Callable[..., torch.Tensor], weight: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Reference:
    """−A log π_θ with A of (log π_T, log π_θ, log π_ref, log μ), or a ``weight`` of ρ in the place of log π_θ."""

    def reference(batch: Batch) -> torch.Tensor:
        own, *others = (
            batch.of_token(each) for each in (batch.student, batch.teacher, batch.reference, batch.behaviour)
        )
        a = advantage(others[0], own.detach(), *others[1:])
        return -a * own if weight is None else weight(a, (own - others[2]).exp(), own)

    return reference


def ratio(a: torch.Tensor, rho: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return -a * rho


def clip(a: torch.Tensor, rho: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return -torch.minimum(a * rho, a * rho.clamp(0.8, 1.2))


def truncate(a: torch.Tensor, rho: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return -rho.detach().clamp(max=2.0) * a * own


def mask(a: torch.Tensor, rho: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    rho = rho.detach()
    return -rho * ((rho >= 0.5) & (rho <= 2.0)) * a * own


def trusted(outlier: str) -> Reference:
    def reference(batch: Batch) -> torch.Tensor:
        own, teacher = batch.of_token(batch.student), batch.of_token(batch.teacher)
        trust = (teacher - own.detach()).exp().clamp(max=1)
        values = -trust * (teacher - own.detach()) * own
        rest = on_support("forward_kl")(batch) if outlier == "forward_kl" else 0.0
        return values + (1 - trust) * rest

    return reference


def k2(batch: Batch) -> torch.Tensor:
    return 0.5 * (batch.of_token(batch.teacher) - batch.of_token(batch.student)).square()


def k3(batch: Batch) -> torch.Tensor:
    """As it is documented, with log r between −20 and 20."""
    log_ratio = (batch.of_token(batch.teacher) - batch.of_token(batch.student)).clamp(-20, 20)
    return log_ratio.exp() - 1 - log_ratio


def gated(batch: Batch) -> torch.Tensor:
    log_p, log_q = batch.student.log_softmax(-1), batch.teacher.log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    return _kl(log_p, log_q) + 0.5 * (entropy > 2.0) * _kl(log_q, log_p)


def to_reference(name: str) -> Reference:
    def reference(batch: Batch) -> torch.Tensor:
        swapped = Batch(batch.lengths, batch.tokens, batch.student, batch.reference, batch.reference, batch.behaviour)
        if name in ("k2", "k3"):
            return {"k2": k2, "k3": k3}[name](swapped)
        return on_support("reverse_kl", *(() if name == "full" else ("teacher_top_k",)))(swapped)

    return reference


# ---- the entries ----


def by_token(batch: Batch) -> torch.Tensor:
    return torch.full((len(batch.tokens),), 1 / len(batch.tokens), dtype=torch.float64)


def by_sequence(batch: Batch) -> torch.Tensor:
    return (1.0 / (batch.lengths.double() * len(batch.lengths))).repeat_interleave(batch.lengths)


def by_sum(batch: Batch) -> torch.Tensor:
    return torch.ones(len(batch.tokens), dtype=torch.float64)


def by_position(batch: Batch) -> torch.Tensor:
    """IW-OPD's weights, rollout by rollout."""
    d = (batch.of_token(batch.teacher) - batch.of_token(batch.behaviour)).abs().double()
    rows = [1 + 0.5 * (1 - (row.cumsum(0) - row) / row.sum()) for row in d.split(batch.lengths.tolist())]
    return torch.cat(rows) * by_token(batch)


def by_rarity(batch: Batch) -> torch.Tensor:
    """The fifth of each rollout's tokens that the student found least likely, one at least."""
    rows = batch.of_token(batch.behaviour).split(batch.lengths.tolist())
    chosen = [(row <= row.sort().values[max(1, len(row) // 5) - 1]).double() for row in rows]
    return torch.cat(chosen) * by_token(batch)


@dataclass(frozen=True)
class Entry:
    """A loss: what it says, and how we are asked for it."""

    name: str
    reference: Reference
    loss: dict[str, Any]
    """Our ``loss`` section."""
    weights: Callable[[Batch], torch.Tensor] = by_token
    top_k: bool = False
    """Do scorers give a top-k, and no more?"""
    eos: bool = False


def entries() -> list[Entry]:
    """Every divergence, estimator, support, tail, weight and reduction that a configuration can ask for."""
    found = []
    names = [("reverse_kl", 0.5), ("forward_kl", 0.5), *(("jsd", beta) for beta in BETAS)]
    for name, beta in names:
        title = f"{name} β={beta:g}" if name == "jsd" else name
        term = {"divergence": name, "beta": beta, "top_k": TOP_K}
        found.append(Entry(f"{title}, full", on_support(name, beta=beta), {"student": term | {"support": "full"}}))
        for support in ("teacher_top_k", "student_top_k"):
            for tail in ("bucket", "renormalise", "stop_gradient"):
                asked = {"student": term | {"support": support, "tail": tail}}
                found.append(
                    Entry(f"{title}, {support}, {tail}", on_support(name, support, tail, beta), asked, top_k=True)
                )
        merged = {"student": term | {"support": "full"}}
        found.append(Entry(f"{title}, full, two EOS ids", on_support(name, beta=beta, eos=True), merged, eos=True))
    plain = {"student": {"divergence": "k1"}}

    def log_ratio(teacher, own, *_):
        return teacher - own

    def k1(name: str, formula=log_ratio, weight=None, **more: Any) -> Entry:
        return Entry(f"k1{name}", sampled(formula, weight), plain | more)

    found += [
        k1(""),
        k1(", policy=behaviour", lambda t, own, ref, mu: t - mu, advantage={"policy": "behaviour"}),
        k1(", advantage.clip", lambda t, own, *_: (t - own).clamp(-1, 1), advantage={"clip": 1.0}),
        k1(", extrapolation", lambda t, own, ref, mu: t - own + 0.25 * (t - ref), advantage={"extrapolation": 1.25}),
        k1(", proximal (TOP-D)", lambda t, own, *_: (0.2 * (t - own).exp() + 0.8).log(), advantage={"proximal": 0.2}),
        k1(
            ", constant (OPSA)", lambda t, *_: torch.full_like(t, -0.5), advantage={"teacher_coef": 0, "constant": -0.5}
        ),
        *(k1(f", {each.__name__}", weight=each, importance={"correction": each.__name__}) for each in (ratio, clip)),
        *(k1(f", {each.__name__}", weight=each, importance={"correction": each.__name__}) for each in (truncate, mask)),
    ]
    for outlier in ("mask", "forward_kl"):
        asked = {"student": {"divergence": "k1", "outliers": outlier, "support": "full"}}
        found.append(Entry(f"k1, outliers={outlier} (TrOPD)", trusted(outlier), asked))
    weighted = {"student": {"divergence": "k1", "position_weight": 1.5}, "advantage": {"policy": "behaviour"}}
    lowest = {"student": {"divergence": "reverse_kl", "support": "full", "lowest_share": 0.2}}
    behaviour = sampled(lambda t, own, ref, mu: t - mu)
    found += [
        Entry("k1, position_weight (IW-OPD)", behaviour, weighted, weights=by_position),
        Entry("reverse_kl, full, lowest_share", on_support("reverse_kl"), lowest, weights=by_rarity),
        Entry("k2", k2, {"student": {"divergence": "k2"}}),
        Entry("k3", k3, {"student": {"divergence": "k3"}}),
        Entry("cross_entropy", lambda b: -b.of_token(b.student), {"student": {"divergence": "cross_entropy"}}),
        Entry(
            "reverse_kl, full, entropy_gate (EOPD)",
            gated,
            {"student": {"divergence": "reverse_kl", "support": "full", "entropy_gate": 2.0, "entropy_gate_coef": 0.5}},
        ),
    ]
    full = {"student": {"divergence": "reverse_kl", "support": "full"}}
    for reduction, weights in (("sequence", by_sequence), ("sum", by_sum)):
        found.append(
            Entry(
                f"reverse_kl, full, mean by {reduction}" if reduction == "sequence" else "reverse_kl, full, sum",
                on_support("reverse_kl"),
                full | {"reduction": reduction},
                weights=weights,
            )
        )
    for estimator in ("full", "top_k", "k2", "k3"):
        asked = {"student": {"divergence": "cross_entropy"}}  # which has no weight
        asked |= {"reference": {"coef": 1.0, "estimator": estimator, "top_k": TOP_K}}
        found.append(
            Entry(f"to the reference: {estimator}", to_reference(estimator), asked, top_k=estimator == "top_k")
        )
    return found


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
    config = configs.from_dict(others | {"loss": loss})
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
    segment = Segment("student", names, batch.lengths, torch.zeros(len(names), dtype=torch.bool), tokens, nothing)
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
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the errors to this file.")
@click.option("--page", type=click.Path(path_type=Path), help="Write the table to this HTML file.")
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
