"""What jobs/conformance.py compares with: the batch, and every loss as its formula in float64.

Written from the definitions, without opd_ray: torch's autograd differentiates, and what is documented as a constant is
detached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

SEED, LENGTHS, VOCABULARY, TOP_K = 0, (1, 5, 24, 34), 64, 8
STOPS = (3, 11)
BETAS = (0.1, 0.5, 0.9)

Reference = Callable[["Batch"], torch.Tensor]
"""[N] float64 of a batch whose student logits take a gradient; the loss is their sum with the weights of the entry."""


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


def loops(batch: Batch) -> torch.Tensor:
    """[N] bool: what is taken for the repeats of a loop, the second half of each rollout that has two."""
    return torch.cat([torch.arange(length) >= (length + 1) // 2 for length in batch.lengths.tolist()])


def apart(of_others: Reference) -> Reference:
    """Loops have −min(ρ A, clip(ρ) A), A = −1; all other tokens have their divergence."""

    def reference(batch: Batch) -> torch.Tensor:
        rho = (batch.of_token(batch.student) - batch.of_token(batch.behaviour)).exp()
        pushed = clip(torch.full_like(rho, -1.0), rho, rho)
        return torch.where(loops(batch), pushed, of_others(batch))

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
    of_behaviour = {"student": {"divergence": "k1"}, "advantage": {"policy": "behaviour"}}
    full = {"student": {"divergence": "reverse_kl", "support": "full"}}
    found += [
        Entry("k1, position_weight (IW-OPD)", behaviour, weighted, weights=by_position),
        Entry("reverse_kl, full, lowest_share", on_support("reverse_kl"), lowest, weights=by_rarity),
        Entry("k1, policy=behaviour, loop_advantage", apart(behaviour), {"loop_advantage": -1.0} | of_behaviour),
        Entry("reverse_kl, full, loop_advantage", apart(on_support("reverse_kl")), {"loop_advantage": -1.0} | full),
        Entry("k2", k2, {"student": {"divergence": "k2"}}),
        Entry("k3", k3, {"student": {"divergence": "k3"}}),
        Entry("cross_entropy", lambda b: -b.of_token(b.student), {"student": {"divergence": "cross_entropy"}}),
        Entry(
            "reverse_kl, full, entropy_gate (EOPD)",
            gated,
            {"student": {"divergence": "reverse_kl", "support": "full", "entropy_gate": 2.0, "entropy_gate_coef": 0.5}},
        ),
    ]
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
