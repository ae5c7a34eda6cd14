"""The configuration of a run: frozen dataclasses, one sentence under each field.

``load`` merges defaults, a YAML file and ``section.field=value`` overrides (OmegaConf), and checks types,
ranges and names (pydantic). What needs a look outside — files, checkpoints, the cluster —
is checked by :mod:`opd_ray.preflight`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from yaml import YAMLError

from opd_ray.errors import InputError, near

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)

EMBEDDED = "embedded"
"""Value of a path that stands for the small models and data that the package makes itself."""
STUDENT = "student"
"""Value of reference.path that stands for the student's own checkpoint, as it was before training."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class StudentConfig:
    """The model that is trained."""

    path: str = EMBEDDED
    """Hugging Face checkpoint directory; "embedded" builds a small one for the seed."""
    max_context_tokens: int | None = Field(None, gt=0)
    """Cap on prompt + response; by default what the checkpoint allows."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ScorerConfig:
    """A pool of scorers on one frozen model, in one role."""

    path: str = EMBEDDED
    """Checkpoint directory; "embedded" is the shipped teacher."""
    engine: Literal["torch", "vllm"] = "torch"
    """Inference engine: a plain transformers forward pass, or vLLM's prompt log-probs."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights; log-probs are float32 in any case."""
    num_actors: int = Field(1, ge=1)
    """Scorer actors in the pool."""
    cpus_per_actor: float = Field(0.1, ge=0)
    """Ray CPUs each actor reserves."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """Ray GPUs each actor reserves; 0 runs on the CPU."""
    max_batch_tokens: int = Field(8192, gt=0)
    """Padded tokens per forward pass of the torch engine."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that a vLLM scorer takes."""
    eos_map: dict[int, int] = Field(default_factory=dict)
    """Student EOS id to this model's EOS id, where the two stop with different tokens."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ReferenceConfig(ScorerConfig):
    """The frozen reference: a scorer on the student as it was before training, unless told otherwise."""

    path: str = STUDENT
    """Checkpoint directory; "student" is student.path."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """Prompts, golden solutions, held-out problems and the task that verifies answers."""

    task: str = "chain"
    """Registered task: renders prompts and verifies answers (chain, math)."""
    prompts: str = EMBEDDED
    """JSONL or Parquet file with one training prompt per row (prompt, answer, optional id)."""
    golden: str | None = EMBEDDED
    """JSONL or Parquet file of prompts with a correct, complete response each; null for none."""
    evaluation: str = EMBEDDED
    """JSONL or Parquet file of held-out problems."""
    shuffle: bool = True
    """Visit prompts and golden rows in a new random order every epoch."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RolloutConfig:
    """How the student generates."""

    engine: Literal["vllm", "torch"] = "vllm"
    """Generation engine; torch is a small reference implementation for tests and comparisons."""
    num_generators: int = Field(1, ge=1)
    """StudentGenerator actors."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that one vLLM engine spans."""
    responses_per_prompt: int = Field(1, ge=1)
    """G: responses sampled for each prompt."""
    max_response_tokens: int = Field(80, ge=1)
    """Length budget of a response; one that exhausts it without EOS counts as truncated."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of training rollouts."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of training rollouts; 1 samples from the whole distribution."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the generator's weights."""
    prompts_per_call: int = Field(8, ge=1)
    """Prompts handed to a generator in one call; they are scored together when all have ended."""
    max_num_seqs: int = Field(64, ge=1)
    """Responses that one engine runs at once."""
    in_flight: Literal["keep", "drain", "abort"] = "keep"
    """Unfinished responses at a weight update: keep on (prefix recomputed), finish first, or begin again."""
    kv_cache_bytes: int = Field(256 * 2**20, gt=0)
    """Key-value cache of an engine on a CPU."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that a vLLM generator takes."""
    cpus_per_generator: float = Field(0.5, ge=0)
    """Ray CPUs each generator reserves."""
    gpus_per_generator: float = Field(0.0, ge=0)
    """Ray GPUs each generator reserves; 0 runs vLLM on the CPU."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BufferConfig:
    """What one step trains on, and how old it may be."""

    prompts_per_step: int = Field(32, ge=0)
    """On-policy prompts in one step; 0 trains on golden rollouts only (plain SFT)."""
    golden_per_prompt: float = Field(1.0, ge=0)
    """Golden rollouts mixed in for each on-policy prompt (StableOPD: 1 beside G student rollouts)."""
    golden_per_step: int = Field(0, ge=0)
    """Golden rollouts of a step besides those that come with prompts; for SFT without prompts."""
    max_staleness: int = Field(2, ge=0)
    """Largest difference between the weights that train and those that sampled; 0 is synchronous."""

    @property
    def num_golden(self) -> int:
        """Golden rollouts of one step."""
        return round(self.prompts_per_step * self.golden_per_prompt) + self.golden_per_step

    @property
    def num_slots(self) -> int:
        """Prompts that may be under way at once; with admission-ordered steps it bounds staleness."""
        return (self.max_staleness + 1) * self.prompts_per_step

    def __post_init__(self) -> None:
        if self.prompts_per_step + self.num_golden == 0:
            raise ValueError("prompts_per_step and golden rollouts are both 0: a step would train on nothing")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LossConfig:
    """L = opd_coef·L_OPD + sft_coef·L_SFT + reference_kl_coef·KL(π_θ‖π_ref) (StableOPD, arXiv 2604.08527)."""

    opd: Literal["reverse_kl", "policy_gradient"] = "reverse_kl"
    """Back-propagated reverse KL on the teacher's top-k, or the sampled-token advantage with clipped ratio."""
    opd_coef: float = Field(0.25, ge=0)
    """Weight of L_OPD."""
    sft_coef: float = Field(0.75, ge=0)
    """λ_gold: weight of the cross-entropy on golden rollouts."""
    reference_kl_coef: float = Field(0.025, ge=0)
    """β_KL: weight of the KL to the frozen reference on student tokens; 0 starts no reference model."""
    top_k: int = Field(64, ge=1)
    """Support of the KL terms: the scorer's k most probable tokens and a tail bucket; k ≥ vocabulary is exact."""
    reference_estimator: Literal["top_k", "k3"] = "top_k"
    """KL to the reference on its top-k support, or the k3 estimate on the sampled token."""
    clip_ratio: float = Field(0.2, gt=0)
    """ε of the policy gradient's clipped importance ratio against the behaviour log-probs."""
    reduction: Literal["sequence", "token"] = "token"
    """Mean over tokens, or mean per rollout and then over rollouts; both with the global denominator."""

    @property
    def needs_reference(self) -> bool:
        return self.reference_kl_coef > 0

    @property
    def teacher_top_k(self) -> int:
        """Alternatives the teacher must return for each token."""
        return self.top_k if self.opd == "reverse_kl" else 0

    @property
    def reference_top_k(self) -> int:
        """Alternatives the reference must return for each token."""
        return self.top_k if self.reference_estimator == "top_k" else 0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LearnerConfig:
    """The trainer: a group of DeepSpeed ranks."""

    num_ranks: int = Field(1, ge=1)
    """Data-parallel ranks, one actor each."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: 1 shards the optimizer, 2 gradients, 3 parameters as well; 0 with bfloat16 runs as 1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward and backward; the optimizer keeps float32 master weights."""
    steps: int = Field(150, ge=1)
    """Optimizer steps."""
    lr: float = Field(1.5e-3, gt=0)
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; linear and cosine end at 0."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest global gradient norm."""
    micro_batch_tokens: int = Field(4096, gt=0)
    """Tokens of one forward and backward pass per rank (padded, unless packing); more are accumulated."""
    packing: bool = False
    """Concatenate rollouts into one row with block-diagonal attention instead of padding them."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    cpus_per_rank: float = Field(0.5, ge=0)
    """Ray CPUs each rank reserves."""
    gpus_per_rank: float = Field(0.0, ge=0)
    """Ray GPUs each rank reserves; 0 trains on the CPU."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class WeightsConfig:
    """The broadcast from the learner to the generators."""

    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Transport; auto takes nccl where generators and learner have GPUs, else gloo."""
    bucket_bytes: int = Field(64 * 2**20, gt=0)
    """Parameters are packed into messages of at most this size."""
    timeout_s: float = Field(120.0, gt=0)
    """Deadline of one broadcast."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvaluationConfig:
    """Held-out accuracy of the student, before, during and after."""

    num_problems: int = Field(512, ge=0)
    """Problems before and after, the first of the file; 0 evaluates nothing."""
    every_steps: int = Field(50, ge=0)
    """Evaluate during training every so many steps; 0 for never."""
    num_problems_during: int = Field(128, ge=1)
    """Problems of an evaluation during training."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of the sampled answers (the greedy ones have none)."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MetricsConfig:
    """What is logged, and what counts as repetitive."""

    repetition_window_chars: int = Field(40, ge=1)
    """L of rep(o): the tail of a response that is compressed (paper: 10 000, for long answers)."""
    repetition_ratio: float = Field(1.7, gt=1)
    """τ of rep(o): repetitive when the tail shrinks by more than this factor (paper: 10)."""
    rollout_log_every_steps: int = Field(10, ge=0)
    """Write the rollouts of every n-th step to rollouts/*.parquet; 1 for all, 0 for none."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CheckpointConfig:
    """Checkpoints that --resume continues from."""

    every_steps: int = Field(100, ge=0)
    """Save every so many steps; 0 for never."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept; older ones are deleted."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DeadlineConfig:
    """How long the driver waits before it ends the run with an error that names the room."""

    start_s: float = Field(600.0, gt=0)
    """Placement, model loading and the rendezvous of one room."""
    generate_s: float = Field(1800.0, gt=0)
    """One call to a generator, evaluation calls included."""
    score_s: float = Field(600.0, gt=0)
    """One call to a scorer."""
    train_s: float = Field(1800.0, gt=0)
    """One optimizer step, one checkpoint or one export."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Config:
    """One run."""

    seed: int = Field(0, ge=0)
    """Seed of prompt order, sampling, initial embedded student and training."""
    student: StudentConfig = Field(default_factory=StudentConfig)
    teacher: ScorerConfig = Field(default_factory=ScorerConfig)
    reference: ReferenceConfig = Field(default_factory=ReferenceConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    buffer: BufferConfig = Field(default_factory=BufferConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    weights: WeightsConfig = Field(default_factory=WeightsConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    deadlines: DeadlineConfig = Field(default_factory=DeadlineConfig)

    def __post_init__(self) -> None:
        on_policy, golden = self.buffer.prompts_per_step > 0, self.buffer.num_golden > 0
        if golden and self.data.golden is None:
            raise ValueError("buffer asks for golden rollouts but data.golden is null")
        if golden and self.loss.sft_coef == 0:
            raise ValueError("buffer mixes golden rollouts in but loss.sft_coef is 0: they would not be trained on")
        if self.loss.sft_coef > 0 and not golden:
            raise ValueError(
                "loss.sft_coef is above 0 but no golden rollouts are mixed in; "
                "set it to 0 or raise buffer.golden_per_prompt"
            )
        if on_policy and self.loss.opd_coef == 0:
            raise ValueError("buffer.prompts_per_step is above 0 but loss.opd_coef is 0: rollouts would not be used")
        if not on_policy and (self.loss.opd_coef > 0 or self.loss.needs_reference):
            raise ValueError("buffer.prompts_per_step is 0: loss.opd_coef and loss.reference_kl_coef must be 0")
        reshaped = self.rollout.temperature != 1 or self.rollout.top_p < 1
        if self.loss.opd == "policy_gradient" and reshaped:
            raise ValueError(
                "loss.opd=policy_gradient compares the student with the distribution that was sampled from: "
                "it needs rollout.temperature=1 and rollout.top_p=1 (or loss.opd=reverse_kl)"
            )
        gpus = (self.learner.gpus_per_rank > 0, self.rollout.gpus_per_generator > 0)
        if self.weights.backend == "nccl" and not all(gpus):
            raise ValueError("weights.backend=nccl needs GPUs for the learner and for the generators")

    @property
    def method(self) -> str:
        """What the coefficients amount to, for the summary."""
        if self.buffer.prompts_per_step == 0:
            return "sft"
        mixture, anchor = self.buffer.num_golden > 0, self.loss.needs_reference
        if mixture and anchor:
            return "stableopd"
        return "opd" + ("+mixture" if mixture else "") + ("+reference_kl" if anchor else "")

    @property
    def weight_backend(self) -> str:
        if self.weights.backend != "auto":
            return self.weights.backend
        gpu = self.learner.gpus_per_rank > 0 and self.rollout.gpus_per_generator > 0
        return "nccl" if gpu else "gloo"


_ADAPTER = TypeAdapter(Config)


def load(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file, then the overrides. Raises InputError with one line."""
    merged = OmegaConf.create({})
    try:
        if path is not None:
            loaded = OmegaConf.load(path)
            if not OmegaConf.is_dict(loaded):
                raise InputError(f"{path}: expected a mapping of sections, got a list")
            merged = loaded
        for override in overrides:
            if "=" not in override:
                raise InputError(f"override '{override}' is not of the form section.field=value")
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides)))
        raw = OmegaConf.to_container(merged, resolve=True)
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}; give an existing YAML file") from None
    except (YAMLError, OmegaConfBaseException) as error:
        where = f"--config {path}" if path else "overrides"
        raise InputError(f"{where}: {' '.join(str(error).split())}") from None
    return from_dict(raw)


def from_dict(raw: Any) -> Config:
    """A checked Config from nested plain values; unknown names and impossible values are refused."""
    try:
        return _ADAPTER.validate_python(raw)
    except ValidationError as error:
        raise InputError(_one_line(error)) from None


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values; ``from_dict(to_dict(c)) == c``."""
    return _ADAPTER.dump_python(config, mode="json")


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


@dataclasses.dataclass(frozen=True)
class FieldDoc:
    """One line of the reference that --help prints."""

    name: str
    default: Any
    doc: str


def describe() -> Iterator[FieldDoc]:
    """Every field as ``section.field`` with its default and sentence."""
    defaults = to_dict(Config())
    for section in dataclasses.fields(Config):
        default = defaults[section.name]
        if not isinstance(default, dict):
            yield FieldDoc(section.name, default, _doc(Config, section.name))
            continue
        cls = type(getattr(Config(), section.name))
        for field in dataclasses.fields(cls):
            yield FieldDoc(f"{section.name}.{field.name}", default[field.name], _doc(cls, field.name))


def _doc(cls: type, name: str) -> str:
    """A field's sentence; pydantic does not pass it on to a section that inherits the field."""
    found = (
        base.__pydantic_fields__[name].description for base in cls.__mro__[:-1] if name in base.__pydantic_fields__
    )
    return next(filter(None, found), "")


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        section, _, _ = where.rpartition(".")
        siblings = {".".join(field.name.split(".")[: len(first["loc"])]) for field in describe()}
        known = [name for name in siblings if name.startswith(section)]
        return f"config: unknown field '{where}'{near(where, known)}"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"config: {where + ': ' if where else ''}{message}{got}"
