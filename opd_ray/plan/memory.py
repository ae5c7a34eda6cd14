"""Bytes of every process of a run at its fullest, by what they are for. Pure.

P parameters, N learner ranks, b bytes of the precision that forward and backward run in; V, H, L, A, K, d, I as in
:class:`~opd_ray.models.size.ModelSize`. What a process holds before any model does is measured, not derived.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from opd_ray.config import STUDENT, Config, LearnerConfig, RolloutConfig, ScorerConfig
from opd_ray.models.size import DTYPE_BYTES, ModelSize, cache_bytes
from opd_ray.plan.flow import Step, store_bytes
from opd_ray.weights import BUCKET_BYTES

BASE_BYTES = {
    "learn": 440_000_000,
    "torch": 360_000_000,
    "vllm": 910_000_000,
    "record": 115_000_000,
    "driver": 400_000_000,
    "ray": 630_000_000,
}
"""A process with its libraries imported and no model: a learner rank, one with transformers, one with vLLM, the
recorder, the driver, and Ray's own on the head's node. Anonymous pages and its share of mapped files, as measured with
CPU builds of torch 2.13 and vLLM 0.32 on Linux (a generator's is .73 GB before its first step and .91 to .93 when it
holds as many kernels as :data:`opd_ray.rooms.memory.KERNEL_CACHES` allows); libraries for CUDA take more."""
_CUDA_BYTES = 1_000_000_000
"""CUDA's context, workspaces of cuBLAS and NCCL's buffers: about this on Hopper, as PyTorch reports it; not measured
here."""
_BUCKET_PARAMETERS = 200_000_000
"""Largest reduce and gather bucket that the learner gives DeepSpeed."""
_LIVE_PARAMETERS = 1_000_000_000
"""stage3_max_live_parameters of DeepSpeed: as many stay gathered under ZeRO-3."""
_SCORED_LOGITS_BYTES = 256 * 2**20
"""Logits that the torch scorer holds at once."""
_PREFILLED_TOKENS = 8192
"""Of one step of a vLLM generator."""


@dataclass(frozen=True)
class Process:
    """What one process of a room needs where its model is: on its GPU, or else in the memory of its node."""

    room: str
    number: int
    """Processes alike."""
    parts: Mapping[str, float]
    """Name to bytes; they add up to the most that it holds at one time."""
    gpus: float = 0.0
    """Share of a GPU that each reserves; above 1 for several of tensor parallelism, each of which needs ``parts``."""
    host_parts: Mapping[str, float] = field(default_factory=dict)
    """In the memory of its node beside what is on the GPU."""
    takes_share: float | None = None
    """Share of the card that a vLLM engine takes on a GPU, whatever it needs."""

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> float:
        """What it takes of its node's memory."""
        return sum(self.host_parts.values()) if self.gpus else self.bytes


def processes(config: Config, sizes: Mapping[str, ModelSize], step: Step, max_context_tokens: int) -> list[Process]:
    """Every process of the run's rooms; ``sizes`` by role, "student" included."""
    student = sizes["student"]
    mapping = _mapping(config, sizes)
    found = [
        learner(config, student, sizes, step, max(1, mapping[config.student.path])),
        generator("generate", config.rollout, config.rollout.dtype, student, step, max_context_tokens),
    ]
    rollouts = _rollouts_per_call(config, step)
    for role, scorer in config.scorers.items():
        sharing = mapping[_path(config, scorer)] if _is_mapped(scorer, sizes[role]) else 1
        found.append(scorer_process(role, scorer, sizes[role], step, max_context_tokens, rollouts, sharing))
    if config.buffer.has_teacher_write:
        rollout, teacher = config.rollout, sizes["teacher"]
        found.append(generator("teacher_generate", rollout, config.teacher.dtype, teacher, step, max_context_tokens))
    found.append(Process("record", 1, {"process": BASE_BYTES["record"]}))
    return found


def learner(
    config: Config, student: ModelSize, sizes: Mapping[str, ModelSize], step: Step, sharing: int = 1
) -> Process:
    """One rank: what stays, and the fullest of forward with backward, the optimizer step, and a snapshot's copy.

    Weights, gradients and Adam's two moments in float32, 4·P + 4·P + 8·P, without ZeRO. With it (Rajbhandari et al.,
    arXiv 1910.02054, figure 1; DeepSpeed 0.19, stage_1_and_2.py and stage3.py) weights b·P or, at stage 3, b·P/N and
    what is gathered; float32 master weights 4·P/N; moments 8·P/N; gradients summed in float32, 4·P at stage 1 (b·P of
    the pass itself beside them where b is 2), else 4·P/N. Of a student with adapters the weights are those of both, and
    P is the adapters' in all else; its own, which nothing changes, are its share of the mapped files where ``sharing``
    rooms have them.
    """
    settings, trained = config.learner, student.trained
    parameters = student.parameters / (sharing if _maps_its_base(config, student) else 1) + student.adapters
    stage, width, ranks = zero_stage(settings), DTYPE_BYTES[settings.dtype], settings.num_ranks
    share = trained / ranks
    if stage == 0:
        stays = {"weights": 4.0 * parameters, "gradients": 4.0 * trained, "optimizer": 8.0 * trained}
    else:
        weights = width * (parameters / ranks + min(parameters, _LIVE_PARAMETERS) if stage == 3 else parameters)
        gradients = 4.0 * share if stage > 1 else 4.0 * trained + (2.0 * trained if width == 2 else 0.0)
        stays = {"weights": weights, "gradients": gradients, "optimizer": 12.0 * share}
    bucket = float(min(trained, _BUCKET_PARAMETERS) * width)
    buckets = (2 * bucket if stage else bucket) if ranks > 1 or stage else 0.0
    stays["buckets"] = max(buckets, float(min(2 * BUCKET_BYTES, trained * width)))
    if heads := _frozen_heads(config, sizes):
        stays["scorers' output layers"] = heads
    passing = {
        "activations": activation_bytes(settings, student, step),
        "logits": loss_bytes(config, sizes, step),
    }
    keeps = config.checkpoint.memory_every_steps > 0 or config.checkpoint.every_steps > 0
    copy = snapshot_bytes(student) / ranks if keeps else 0.0
    if settings.gpus_per_rank:
        parts = stays | _fuller(passing, {"optimizer step": 4.0 * share if stage else 0.0})
        host = {"process": float(BASE_BYTES["learn"])} | ({"snapshot's copy": copy} if copy else {})
        return Process("learn", ranks, {"CUDA": float(_CUDA_BYTES)} | parts, settings.gpus_per_rank, host)
    step_copy = {"optimizer step": 4.0 * share} if stage else {}
    parts = stays | _fuller(passing, step_copy, {"snapshot's copy": copy})
    return Process("learn", ranks, {"process": float(BASE_BYTES["learn"])} | parts)


def zero_stage(settings: LearnerConfig) -> int:
    """The stage that the learner runs: bfloat16 without ZeRO runs as stage 1."""
    return max(settings.zero_stage, int(settings.dtype == "bfloat16"))


def activation_bytes(settings: LearnerConfig, student: ModelSize, step: Step) -> float:
    """What a micro-batch of n tokens keeps of the forward pass for the backward one.

    A layer of transformers' Llama, Mistral or Qwen keeps, a token, b·(6·H + (6·A + K)·d + 4·I): two norms with what
    goes in, the normalised and the weighted; queries and keys, the three as attention reads them, its output and the
    copy that the projection reads; gate, its SiLU, up and their product. In 16 bits the norms keep 8·H bytes of float32
    more. The backward pass works on as much again as one layer keeps. With gradient checkpointing (Chen et al., arXiv
    1604.06174) each layer keeps its b·H alone; one layer at a time is made again, while the one before is still there.
    Checked against peaks of a Llama and a Qwen3 of 2 and 6 layers: within 6 %.

    With adapters on a CPU, b·(2·H + (A + 2·K)·d + 2·I) more: what a layer's projections give before their adapters'
    products are added is freed, but the narrow A x, kept for the backward pass, comes to lie in its place in glibc's
    heap, where the next one then does not fit. With pages of its own for each tensor (mallopt) that was gone.
    """
    tokens, width = micro_batch_tokens(settings, step), DTYPE_BYTES[settings.dtype]
    heads = (6 * student.num_heads + student.num_kv_heads) * student.head_dim
    layer = width * (6 * student.hidden_size + heads + 4 * student.intermediate_size)
    layer += 8 * student.hidden_size if width == 2 else 0
    if student.adapters and not settings.gpus_per_rank:
        queries_keys_values = (student.num_heads + 2 * student.num_kv_heads) * student.head_dim
        layer += width * (2 * student.hidden_size + queries_keys_values + 2 * student.intermediate_size)
    if settings.gradient_checkpointing:
        return tokens * (student.num_layers * width * student.hidden_size + 3 * layer)
    return tokens * (student.num_layers + 1) * layer


def loss_bytes(config: Config, sizes: Mapping[str, ModelSize], step: Step) -> float:
    """Of the loss of a micro-batch with N response tokens: float32 copies of the logits that are there at once, and
    where these are made in pieces the gradient of the output layer and one piece's share of it, 8·V·H; states
    4·N·(2·H + H_t), 60·N for the rest (the docstring of learn/objective.py, whose twelve copies are a bound)."""
    settings, student = config.learner, sizes["student"]
    tokens = micro_batch_tokens(settings, step) * step.response_tokens / step.sequence_tokens
    logits, most = 4.0 * tokens * student.vocab_size, settings.logits_mb * 2.0**20
    head = 8.0 * student.head_parameters if logits > most and not student.adapters else 0.0
    states = 4.0 * tokens * (2 * student.hidden_size + _states_width(config, sizes))
    return _logit_copies(config) * min(logits, most) + head + states + 60.0 * tokens


def _logit_copies(config: Config) -> int:
    """Of float32 logits at the peak of a backward pass, as measured on 49,152 of them: 3 of a loss on the sampled
    token or a top-k (logits, and the gradients of two terms) and of the reverse KL on the whole vocabulary, 6 of
    another KL there or with an entropy gate, 9 of its JSD; one more with a KL to the reference."""
    on_all = [term for term in config.loss.terms.values() if term.used and term.on_distributions]
    compared = [term for term in on_all if term.support == "full" and not term.is_plain_reverse_kl]
    copies = max([3, *(9 if term.divergence == "jsd" else 6 for term in compared)])
    return copies + int(config.uses_reference)


def micro_batch_tokens(settings: LearnerConfig, step: Step) -> float:
    """Tokens of the largest forward pass of a rank: what is configured, what a step has for it, or one rollout."""
    there = step.tokens / settings.num_ranks
    return max(min(settings.micro_batch_tokens, there), step.sequence_tokens)


def generator(
    room: str, rollout: RolloutConfig, dtype: str, model: ModelSize, step: Step, max_context_tokens: int
) -> Process:
    """One engine: weights b·P/TP, the key-value cache, and the logits of the responses it runs. On a GPU vLLM takes
    ``gpu_memory_utilization`` of the card, and what the rest leaves of that is cache: here the cache that one response
    of full length needs; broadcasts come into what the share leaves of the card, where that is enough. On a CPU vLLM
    holds the weights as they are, repacked for its kernels, and once more while a broadcast is installed, and passes
    the most tokens of a step through the model while it starts: together 3.0 GB of a process with SmolLM2-135M, as
    measured; the memory that the next broadcast comes into added half of the weights at 130 M parameters. The torch
    engine has those of the next broadcast as well; its cache has twice the columns of its longest row, and while it
    grows that of before beside it; its sampling holds a logit in 24 bytes."""
    number = rollout.num_generators if room == "generate" else rollout.teacher_generators
    engine = rollout.engine_for(model.parameters)
    width, tensor_parallel = DTYPE_BYTES[dtype], rollout.tensor_parallel_size
    weights = width * model.parameters / tensor_parallel
    logits = (12.0 if engine == "vllm" else 24.0) * rollout.max_num_seqs * model.vocab_size
    one = max_context_tokens * model.kv_bytes_per_token(width) / tensor_parallel
    cache = one if engine == "vllm" else 3 * one * rollout.max_num_seqs
    parts = {"weights": weights, "key-value cache": cache, "logits": logits}
    if engine == "torch" and room == "generate":
        parts["weights coming in"] = weights
    gpus = rollout.gpus_per_generator
    if gpus:
        parts |= {"CUDA": float(_CUDA_BYTES)}
        share = rollout.memory_share if engine == "vllm" else None
        host = {"process": float(BASE_BYTES[engine])}
        return Process(room, number, parts, gpus * tensor_parallel, host, share)
    if engine == "vllm":
        token_bytes = model.kv_bytes_per_token(width)
        cache = float(rollout.kv_cache_bytes or cache_bytes(token_bytes, max_context_tokens, rollout.max_num_seqs))
        parts |= {
            "key-value cache": cache,
            "weights repacked and coming in": 2.5 * weights,
            "activations": pass_bytes(model, max(_PREFILLED_TOKENS, max_context_tokens), width),
        }
    return Process(room, number, {"process": float(BASE_BYTES[engine])} | parts)


def pass_bytes(model: ModelSize, tokens: float, width: int) -> float:
    """The widest point of a forward pass without a graph: b·(2·H + max(3·I, 5·A·d)) a token, and a norm's float32
    copies, 8·H."""
    widest = max(3 * model.intermediate_size, 5 * model.num_heads * model.head_dim)
    return tokens * (width * (2 * model.hidden_size + widest) + 8.0 * model.hidden_size)


def _rollouts_per_call(config: Config, step: Step) -> int:
    """The most that a scorer is given at once: those of one call to a generator, or all golden ones of a step."""
    source = max(step.rollouts.get(source, 0) for source in ("student", "teacher"))
    prompts = max(1, config.buffer.prompts_per_step)
    of_call = source * min(config.rollout.prompts_per_call, prompts) / prompts
    return math.ceil(max(1, of_call, step.rollouts.get("golden", 0)))


def _mapping(config: Config, sizes: Mapping[str, ModelSize]) -> Counter[str]:
    """Path of a checkpoint to how many rooms have its files mapped. All processes of a node share them."""
    scorers = config.scorers.items()
    found = Counter(_path(config, scorer) for role, scorer in scorers if _is_mapped(scorer, sizes[role]))
    found[config.student.path] += _maps_its_base(config, sizes["student"])
    return found


def _path(config: Config, scorer: ScorerConfig) -> str:
    return config.student.path if scorer.path == STUDENT else scorer.path


def _is_mapped(scorer: ScorerConfig, model: ModelSize) -> bool:
    """Are a frozen model's weights its files, mapped into memory as they are?"""
    elsewhere = scorer.gpus_per_actor or scorer.url or scorer.engine != "torch"
    changed = scorer.follows_student or model.stored_bytes != DTYPE_BYTES[scorer.dtype]
    return not (elsewhere or changed)


def _maps_its_base(config: Config, student: ModelSize) -> bool:
    """The same of the base beside the adapters that a learner trains. ZeRO-3 copies each rank's part."""
    settings = config.learner
    elsewhere = settings.gpus_per_rank or settings.zero_stage == 3
    return bool(student.adapters) and not elsewhere and student.stored_bytes == DTYPE_BYTES[settings.dtype]


def scorer_process(
    role: str,
    scorer: ScorerConfig,
    model: ModelSize,
    step: Step,
    max_context_tokens: int,
    rollouts_per_call: int,
    sharing: int = 1,
) -> Process:
    """One scorer: weights b·P/TP, its share of them where ``sharing`` rooms map the same files; and one forward pass
    without a graph, of n tokens (:func:`pass_bytes`). The float32 logits of their response tokens come 256 MiB at a
    time, with their exponentials and the top-k's copy. vLLM's has a key-value cache in the place of the pass."""
    if scorer.url:  # it has an HTTP client and what the rollouts and their scores take
        return Process(role, scorer.num_actors, {"process": float(BASE_BYTES["record"])})
    width = DTYPE_BYTES[scorer.dtype]
    parts = {"weights": width * model.parameters / scorer.tensor_parallel_size / sharing}
    tokens = max(min(scorer.max_batch_tokens, rollouts_per_call * step.sequence_tokens), step.sequence_tokens)
    if scorer.follows_student:  # it takes a broadcast in as a whole, and keeps averages in float32
        parts["the student's weights"] = float(width * model.parameters)
        if scorer.update == "average" and width == 2:
            parts["averages"] = 4.0 * model.parameters
    if scorer.engine == "torch":
        answered = tokens * step.response_tokens / step.sequence_tokens
        parts["activations"] = pass_bytes(model, tokens, width)
        parts["logits"] = 3.0 * min(4.0 * answered * model.vocab_size, _SCORED_LOGITS_BYTES)
    elif not scorer.gpus_per_actor:
        token_bytes = model.kv_bytes_per_token(width)
        cache = scorer.kv_cache_bytes or cache_bytes(token_bytes, max_context_tokens + 1, scorer.max_num_seqs)
        parts["key-value cache"] = float(cache)
    else:
        parts["key-value cache"] = max_context_tokens * model.kv_bytes_per_token(width) / scorer.tensor_parallel_size
    base = float(BASE_BYTES[scorer.engine])
    if not scorer.gpus_per_actor:
        return Process(role, scorer.num_actors, {"process": base} | parts)
    share = scorer.memory_share if scorer.engine == "vllm" else None
    parts = {"CUDA": float(_CUDA_BYTES)} | parts
    return Process(role, scorer.num_actors, parts, scorer.gpus_in_all, {"process": base}, share)


def snapshot_bytes(student: ModelSize) -> int:
    """The learner's state as a snapshot holds it: float32 weights and Adam's two moments, 12 bytes a parameter
    that is trained (:mod:`opd_ray.learn.state`)."""
    return 12 * student.trained


def object_store(
    config: Config, sizes: Mapping[str, ModelSize], step: Step, stop_token_ids: tuple[int, ...]
) -> dict[str, float]:
    """Bytes in Ray's object store of all nodes together: the payloads of the steps that may be under way, one that
    trains included; the newest snapshot and the one that takes its place, with the rollouts that they hold on to."""
    payloads = sum(store_bytes(config, step, sizes, stop_token_ids).values())
    found = {"rollouts and scores": payloads * (config.buffer.max_staleness + 2)}
    if config.checkpoint.memory_every_steps:
        found["snapshots"] = 2.0 * snapshot_bytes(sizes["student"]) + payloads * config.buffer.max_staleness
    elif config.checkpoint.every_steps:
        found["snapshots"] = float(snapshot_bytes(sizes["student"]))
    return found


def _frozen_heads(config: Config, sizes: Mapping[str, ModelSize]) -> float:
    """The output layers that the learner holds for scorers that are compared on the whole vocabulary."""
    known = {"reference": sizes["student"], **sizes}  # the learner's own, where it starts no scorer
    return float(sum(known[role].head_parameters * DTYPE_BYTES[scorer.dtype] for role, scorer in _full(config)))


def _states_width(config: Config, sizes: Mapping[str, ModelSize]) -> int:
    """H of all scorers whose states come to the learner."""
    return sum(sizes[role].hidden_size for role, _ in _full(config) if role in sizes)


def _full(config: Config) -> list[tuple[str, ScorerConfig]]:
    """Scorers that are compared on the whole vocabulary, as :func:`opd_ray.models.heads.load_heads` has them."""
    terms = [config.loss.terms[source] for source in config.sources if config.needs_teacher(source)]
    found: dict[str, ScorerConfig] = {}
    if any(term.on_distributions and term.support == "full" for term in terms):
        found |= config.teachers
    if config.loss.reference.estimator == "full" and config.uses_reference:
        found["reference"] = config.reference
    return list(found.items())


def _fuller(*phases: Mapping[str, float]) -> dict[str, float]:
    """The phase that takes most: they come one after another."""
    return dict(max(phases, key=lambda phase: sum(phase.values())))
