"""The configuration's sections that say who generates, who scores and what a step consists of."""

from __future__ import annotations

from statistics import NormalDist
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from opd_ray.config import schedule
from opd_ray.config.binding import NOTHING, ROOMS, RUN
from opd_ray.config.data import EMBEDDED
from opd_ray.config.devices import (
    check_spans_one_device,
    check_spans_whole_gpus,
    check_takes_engine_args,
    memory_share,
    settle_dtype,
)
from opd_ray.config.method import STRICT
from opd_ray.config.runtime import check_size
from opd_ray.config.schedule import Schedule
from opd_ray.messages import PoolSize, RepetitionRule

STUDENT = "student"
"""Value of reference.path that stands for the student's own checkpoint, as it was before training."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """Low-rank adapters: what is trained and sent in place of the student's weights, which stay frozen."""

    rank: int = Field(16, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(32.0, gt=0)
    """α: a layer works with W + (α / rank) · B A, of which A and B are trained."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Linear layers that get an adapter, by the ends of their names, as [q_proj, v_proj]; all-linear: every one but the
    output layer."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StudentConfig:
    """The model that is trained."""

    path: str = EMBEDDED
    """Hugging Face checkpoint directory, or org/name[@REVISION] of its Hub (a branch, tag or commit: what it is at the
    start is loaded in all of a run); "embedded" builds a small one for the seed, "embedded-hard" a larger one
    for longer problems."""
    max_context_tokens: Annotated[int | None, RUN | ROOMS] = Field(None, gt=0)
    """Cap on prompt + response; by default what the checkpoint allows."""
    lora: LoraConfig | None = None
    """Adapters to train (lora.rank and so on, {} for their defaults); null trains every weight. The student without
    them is then the reference where reference.path is the student's, in the learner: no reference actors start."""


def _addresses(given: Any) -> Any:
    """One URL or several as a tuple, without the /v1 that OpenAI's clients want behind them."""
    listed = () if given is None else tuple(given) if isinstance(given, list | tuple) else (given,)
    return tuple(_address(each) if isinstance(each, str) else each for each in listed)


def _address(url: str) -> str:
    """Raises ValueError for what is no address of a server."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        fits = False
    if not fits or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"'{url}' is no address of a server; expected http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScorerConfig:
    """A pool of scorers on one frozen model, in one role."""

    path: str = EMBEDDED
    """Checkpoint directory, or org/name[@REVISION] of the Hub; "embedded" is the teacher of the embedded student's
    problems, "embedded-other-end" the same with another end token, "embedded-pairs" one with another tokenizer,
    "embedded-misled" one that is wrong on a third of the problems. With url: of the tokenizer and the EOS ids alone, no
    weights, by default the student's."""
    url: Annotated[tuple[str, ...], BeforeValidator(_addresses), ROOMS] = ()
    """Address of a vLLM server that scores in place of an engine of the run's own, or a list of them: replicas of one
    model."""
    url_model: Annotated[str | None, ROOMS] = None
    """Name of the model at the servers, where they have several."""
    url_key_env: Annotated[str | None, ROOMS] = None
    """Environment variable of the process that starts the run with the servers' API key, which is never written."""
    url_drift_nats: Annotated[float | None, ROOMS] = Field(None, gt=0)
    """Mean distance of log-probs from those of another replica, or from its own at the start, beyond which a server
    counts as another model; by default ten times what its answers scatter by at the start, but .005 to .05, and .05
    with any dtype but float32."""
    engine: Annotated[Literal["torch", "vllm"], ROOMS] = "torch"
    """Inference engine: a plain transformers forward pass, or vLLM's prompt log-probs."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], RUN | ROOMS] = "auto"
    """Precision of the weights, here or at the servers: auto is bfloat16 on GPUs of Ray, else float32; log-probs are
    float32 in any case."""
    num_actors: Annotated[int, ROOMS] = Field(1, ge=1)
    """Scorer actors that the pool starts with."""
    min_actors: Annotated[int | None, ROOMS] = Field(None, ge=1)
    """Fewest that the run goes on with for longer than recovery.below_min_s; by default num_actors."""
    max_actors: Annotated[int | None, ROOMS] = Field(None, ge=1)
    """Most that the pool may grow to on demand; by default num_actors."""
    node_resource: Annotated[str | None, ROOMS] = None
    """Custom Ray resource of the nodes that may host them; by default any node."""
    cpus_per_actor: Annotated[float, ROOMS] = Field(0.1, ge=0)
    """Ray CPUs each actor reserves."""
    gpus_per_actor: Annotated[float, ROOMS] = Field(0.0, ge=0)
    """Ray GPUs each actor reserves, for each of tensor_parallel_size; 0 runs on the CPU."""
    max_batch_tokens: Annotated[int, ROOMS] = Field(8192, gt=0)
    """Padded tokens per forward pass of the torch engine."""
    tensor_parallel_size: Annotated[int, ROOMS] = Field(1, ge=1)
    """GPUs that one vLLM scorer spans."""
    max_num_seqs: Annotated[int, ROOMS] = Field(64, ge=1)
    """Sequences that a vLLM scorer works on at once, or that an actor has under way at the servers of url."""
    kv_cache_bytes: Annotated[int | None, ROOMS] = Field(None, gt=0)
    """Key-value cache of a vLLM scorer on a CPU; by default for max_num_seqs of the longest sequences, at most 1 GiB or
    what one of them takes."""
    gpu_memory_utilization: Annotated[float, ROOMS] = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that a vLLM scorer takes; of a fraction of a GPU, that share of it."""
    engine_args: Annotated[dict[str, Any], ROOMS] = Field(default_factory=dict)
    """Further arguments of a vLLM scorer, by the names of vLLM's EngineArgs."""
    eos_token_ids: tuple[int, ...] | None = None
    """Tokens this model ends with, if not those of its checkpoint; P(stop) sums over its and the student's."""
    update: Literal["fixed", "periodic", "average"] = "fixed"
    """Frozen; renewed from the student every update_every_steps; or the exponential average of its weights."""
    update_every_steps: int = Field(50, ge=1)
    """Steps between two renewals of update=periodic."""
    update_decay: float = Field(0.99, gt=0, lt=1)
    """Share of the old weights that update=average keeps at every step."""

    @property
    def gpus_in_all(self) -> float:
        """Ray GPUs of one actor with all the GPUs that its engine spans."""
        return self.gpus_per_actor * self.tensor_parallel_size

    @property
    def memory_share(self) -> float:
        """Of a whole card, that a vLLM scorer takes."""
        return memory_share(self.gpu_memory_utilization, self.gpus_per_actor)

    def drift_nats(self, scatter: float) -> float:
        """Mean distance of log-probs that two servers of one model may have, where answers scatter by so much at the
        start. In bfloat16 a batch of another shape moves a token's by hundredths of a nat (logits of 16 to 32 are an
        eighth apart), in float32 by less than a thousandth; another checkpoint is tenths of a nat away."""
        return min(0.05, max(0.005, scatter)) if self.dtype == "float32" else 0.05

    @property
    def may_choose_tokens(self) -> bool:
        """Can it give log-probs of tokens that others choose, as the student's top-k? Servers are asked before the run
        begins."""
        return bool(self.url) or self.engine == "torch" or self.gpus_per_actor > 0

    @property
    def follows_student(self) -> bool:
        """Does it take in the student's weights while the run goes on?"""
        return self.update != "fixed"

    def __post_init__(self) -> None:
        check_size("actors", self.num_actors, self.min_actors, self.max_actors)
        self._check_servers()
        settle_dtype(self, self.gpus_per_actor)
        check_spans_whole_gpus("gpus_per_actor", self.gpus_per_actor, self.tensor_parallel_size)
        check_takes_engine_args(self.engine, self.engine_args)
        check_spans_one_device(self.engine, self.tensor_parallel_size)
        if self.follows_student and self.engine != "torch":
            raise ValueError(f"update={self.update} needs engine=torch, but it is {self.engine}")
        if self.follows_student and self.size != PoolSize.fixed(self.num_actors):
            raise ValueError(f"update={self.update} gives the pool a state: min_actors and max_actors don't apply")

    def _check_servers(self) -> None:
        """With url the model is elsewhere; without, nothing that is of servers may be given."""
        if not self.url:
            for name in ("url_model", "url_key_env", "url_drift_nats"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)} is of servers, but there is no url")
            return
        if len(set(self.url)) < len(self.url):
            raise ValueError(f"url names a server twice: {', '.join(self.url)}")
        for name, where_unset in (("engine", "torch"), ("gpus_per_actor", 0), ("tensor_parallel_size", 1)):
            if getattr(self, name) != where_unset:
                raise ValueError(
                    f"{name}={getattr(self, name)} is of a model in this run, but with url the servers have it; "
                    f"leave {name} out, or url"
                )
        if self.follows_student:
            raise ValueError(f"update={self.update} changes the model in this run, but with url the servers have it")

    @property
    def size(self) -> PoolSize:
        return PoolSize.of(self.num_actors, self.min_actors, self.max_actors)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TeacherConfig(ScorerConfig):
    """A teacher: a scorer, and how much it counts."""

    weight: float = Field(1.0, gt=0)
    """Share of this teacher where loss.teachers=weighted, relative to the others'."""
    privileged: bool = False
    """Show it the prompt's golden solution (self-distillation, with path: student)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReferenceConfig(ScorerConfig):
    """The frozen reference: a scorer on the student as it was before training, unless told otherwise."""

    path: str = STUDENT
    """Checkpoint directory, or org/name[@REVISION] of the Hub; "student" is student.path."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RepetitionConfig:
    """When the engine ends a response that repeats itself: as vLLM's RepetitionDetectionParams, for both engines."""

    max_pattern_size: int = Field(64, ge=1)
    """Most tokens of the pattern that is repeated. vLLM looks for every size at every token, half a microsecond each;
    the torch engine counts for all at once."""
    min_pattern_size: int = Field(32, ge=1)
    """Fewest tokens of the pattern; a shorter one is found as a multiple of it, after so many tokens times min_count:
    honest zeros and rules are shorter."""
    min_count: int = Field(8, ge=2)
    """Times that it stands at the end of the response, one after the other."""

    @property
    def rule(self) -> RepetitionRule:
        return RepetitionRule(self.max_pattern_size, self.min_pattern_size, self.min_count)

    def __post_init__(self) -> None:
        if self.min_pattern_size > self.max_pattern_size:
            raise ValueError(
                f"min_pattern_size={self.min_pattern_size} is above max_pattern_size={self.max_pattern_size}"
            )


_LARGE_MODEL = 3_000_000
"""Parameters from which on vLLM's kernels save on a CPU what it does around a step: at 4 million both take as long."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RolloutConfig:
    """How the student generates."""

    engine: Annotated[Literal["auto", "vllm", "torch"], ROOMS] = "auto"
    """Generation engine: auto is torch on CPUs for models of less than 3 million parameters, where it takes less for a
    token (jobs/bench_engines.py), and vllm for all others. torch, on transformers alone, is also the one for systems
    that vLLM has no wheels for."""
    num_generators: Annotated[int, ROOMS] = Field(1, ge=1)
    """StudentGenerator actors that the run starts with."""
    min_generators: Annotated[int | None, ROOMS] = Field(None, ge=1)
    """Fewest that the run goes on with for longer than recovery.below_min_s; by default num_generators."""
    max_generators: Annotated[int | None, ROOMS] = Field(None, ge=1)
    """Most that the pool may grow to on demand; by default num_generators."""
    node_resource: Annotated[str | None, ROOMS] = None
    """Custom Ray resource of the nodes that may host generators; by default any node."""
    tensor_parallel_size: Annotated[int, ROOMS] = Field(1, ge=1)
    """GPUs that one vLLM engine spans."""
    responses_per_prompt: Annotated[int, RUN] = Field(4, ge=0)
    """G: responses the student samples for each prompt; 0 leaves them to the teacher (buffer.teacher_per_prompt)."""
    max_response_tokens: Annotated[Schedule, RUN] = 4096
    """Length budget of a response, or [[step, tokens], ...]; one that exhausts it without EOS counts as truncated."""
    horizon: Annotated[Schedule | None, RUN] = None
    """Tokens after which training rollouts are cut off before their budget, or [[step, tokens], ...]; null samples to
    the budget. What is cut off so is trained on and does not count as truncated."""
    horizon_probes: Annotated[float, RUN] = Field(0.25, gt=0, le=1)
    """Share of a step's prompts, at least one, that are sampled to the budget while the horizon is shorter: what
    rollouts come to is measured on them alone. No more of them is trained on than of the others."""
    temperature: Annotated[float, RUN] = Field(1.0, gt=0)
    """Sampling temperature of training rollouts."""
    top_p: Annotated[float, RUN] = Field(1.0, gt=0, le=1)
    """Nucleus of training rollouts; 1 samples from the whole distribution."""
    repetition_detection: Annotated[RepetitionConfig | None, RUN] = None
    """End responses that repeat themselves, of training and of evaluations (repetition_detection.min_count and so on,
    {} for their defaults); null lets them fill their budget. They count as truncated."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], ROOMS] = "auto"
    """Precision of the generator's weights: auto is bfloat16 on GPUs and float32 on CPUs."""
    prompts_per_call: int = Field(8, ge=1)
    """Prompts handed to a generator in one call; they are scored together when all have ended."""
    max_num_seqs: Annotated[int, ROOMS] = Field(64, ge=1)
    """Responses that one engine runs at once."""
    in_flight: Literal["keep", "recompute", "drain", "abort"] = "keep"
    """Unfinished responses at a weight update: keep on (with the keys and values of the old weights), recompute them
    and go on, drain (finish them first, new ones wait), or abort (begin them again)."""
    kv_cache_bytes: Annotated[int | None, ROOMS] = Field(None, gt=0)
    """Key-value cache of a vLLM generator on a CPU; by default for max_num_seqs of the longest sequences, at most 1 GiB
    or what one of them takes."""
    gpu_memory_utilization: Annotated[float, ROOMS] = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that a vLLM generator takes; of a fraction of a GPU, that share of it."""
    engine_args: Annotated[dict[str, Any], ROOMS] = Field(default_factory=dict)
    """Further arguments of a vLLM generator, by the names of vLLM's EngineArgs, as {enable_prefix_caching: false}."""
    cpus_per_generator: Annotated[float, ROOMS] = Field(0.5, ge=0)
    """Ray CPUs each generator reserves."""
    gpus_per_generator: Annotated[float, ROOMS] = Field(0.0, ge=0)
    """Ray GPUs each generator reserves; 0 runs its engine on the CPU."""
    teacher_generators: Annotated[int, ROOMS] = Field(1, ge=1)
    """Generators on the teacher, where buffer.teacher_per_prompt asks for them; each as large as a student's."""
    teacher_temperature: Annotated[float, RUN] = Field(1.0, gt=0)
    """Sampling temperature of the teacher's rollouts."""

    def engine_for(self, parameters: float) -> Literal["vllm", "torch"]:
        """The engine of a model of so many parameters."""
        if self.engine != "auto":
            return self.engine
        several = self.tensor_parallel_size > 1
        asks_for_vllm = several or self.gpus_per_generator or self.engine_args or self.kv_cache_bytes
        return "torch" if parameters < _LARGE_MODEL and not asks_for_vllm else "vllm"

    @property
    def repetition_rule(self) -> RepetitionRule | None:
        return self.repetition_detection.rule if self.repetition_detection else None

    @property
    def memory_share(self) -> float:
        """Of a whole card, that a vLLM generator takes."""
        return memory_share(self.gpu_memory_utilization, self.gpus_per_generator)

    @property
    def calls_at_once(self) -> int:
        """Calls whose responses keep one engine full. A call lasts as long as its longest response, and half of its
        places are free for most of that time: with as many calls as just fill them, engines were a quarter empty."""
        return -(-2 * self.max_num_seqs // (self.prompts_per_call * max(1, self.responses_per_prompt)))

    def budget(self, step: int) -> int:
        """Length budget of the responses that a 0-based step trains on."""
        return round(schedule.at(self.max_response_tokens, step))

    def horizon_at(self, step: int, share: float = 1.0) -> int | None:
        """Tokens of responses that a 0-based step trains on, where the horizon, or a ``share`` of it, is below their
        budget; else None."""
        budget = self.budget(step)
        configured = budget if self.horizon is None else min(budget, schedule.at(self.horizon, step))
        tokens = max(1, round(share * configured))
        return tokens if tokens < budget else None

    def num_probes(self, prompts_per_step: int) -> int:
        """Prompts of a step that are sampled to the budget while the horizon is shorter."""
        return max(1, round(self.horizon_probes * prompts_per_step))

    @property
    def longest_response(self) -> int:
        """The largest budget of the run, which is also that of evaluations."""
        return round(schedule.highest(self.max_response_tokens))

    @property
    def size(self) -> PoolSize:
        return PoolSize.of(self.num_generators, self.min_generators, self.max_generators)

    def __post_init__(self) -> None:
        check_size("generators", self.num_generators, self.min_generators, self.max_generators)
        settle_dtype(self, self.gpus_per_generator)
        check_spans_whole_gpus("gpus_per_generator", self.gpus_per_generator, self.tensor_parallel_size)
        check_takes_engine_args(self.engine, self.engine_args)
        check_spans_one_device(self.engine, self.tensor_parallel_size)
        if schedule.lowest(self.max_response_tokens) < 1:
            raise ValueError("max_response_tokens must be 1 or more at every step")
        if self.horizon is not None and schedule.lowest(self.horizon) < 1:
            raise ValueError("horizon must be 1 or more at every step")
        turns = schedule.turns(self.max_response_tokens, self.horizon)
        if self.horizon is not None and all(self.horizon_at(step) is None for step in turns):
            raise ValueError("horizon is at no step below max_response_tokens: lower it, or leave it out")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvidenceConfig:
    """When the teacher is trusted with a prompt, by verdicts on its own responses; TGOPD is confidence .5, threshold
    .66. The rule stands in opd_ray/buffer/evidence.py."""

    probes: int = Field(3, ge=1)
    """Responses of the teacher to a prompt that are judged (K_T of TGOPD), once in a run; as many again where they
    leave it open. What buffer.teacher_per_prompt has it write counts."""
    threshold: float = Field(0.5, gt=0, le=1)
    """Share of right responses from which on the teacher is trusted with a prompt (τ of TGOPD)."""
    confidence: float = Field(0.9, ge=0.5, lt=1)
    """How sure that has to be, by a one-sided Wilson bound; .5 takes the share itself, as TGOPD does."""
    half_life_steps: float = Field(20.0, gt=0)
    """Steps after which a verdict on the student's responses counts half; those on the teacher's keep their weight."""

    @property
    def z(self) -> float:
        """Standard errors from a share to its bound."""
        return NormalDist().inv_cdf(self.confidence)

    def __post_init__(self) -> None:
        most = 2 * self.probes
        if most / (most + self.z**2) < self.threshold:  # the bound where all are right
            raise ValueError(
                f"{most} right responses, twice probes={self.probes}, do not show threshold={self.threshold:g} with "
                f"confidence={self.confidence:g}: no teacher would be trusted; raise probes or lower one of the others"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BufferConfig:
    """What one step trains on, and how old it may be."""

    prompts_per_step: int = Field(64, ge=0)
    """On-policy prompts in one step; 0 trains on golden rollouts only (plain SFT)."""
    golden_per_prompt: Schedule = 1.0
    """Golden rollouts for each on-policy prompt (StableOPD: 1 beside G of the student); a number or a schedule."""
    golden_per_step: int = Field(0, ge=0)
    """Golden rollouts of a step besides those that come with prompts; for SFT without prompts."""
    golden_pairing: Literal["shuffled", "prompt"] = "shuffled"
    """Golden rollouts in an order of their own, or the solutions of the step's own prompts (by id)."""
    teacher_per_prompt: Schedule = 0.0
    """Rollouts that the teacher samples live for each prompt that is its own; number or schedule."""
    teacher_filter: Literal["none", "finished", "correct"] = "correct"
    """Teacher rollouts that are trained on: all, those that ended by themselves, or those the task verified; of the
    last two none that is repetitive (rep(o) of metrics.*)."""
    evidence: EvidenceConfig | None = None
    """Let verdicts decide what each prompt is taught by: the teacher, its golden solution, or the reward
    (evidence.probes and so on, {} for their defaults); null teaches all alike."""
    on_policy_probability: Schedule | None = None
    """λ of GKD: a step trains on student rollouts only with this probability, else on golden and teacher ones only."""
    max_staleness: Annotated[int, NOTHING] = Field(2, ge=0, le=64)
    """Largest difference between the weights that train and those that sampled; 0 is synchronous. So many steps are
    held in memory."""

    @property
    def uses_golden(self) -> bool:
        """Are golden rollouts mixed in at any step?"""
        per_prompt = schedule.highest(self.golden_per_prompt) if self.prompts_per_step else 0
        return per_prompt > 0 or self.golden_per_step > 0

    @property
    def uses_teacher_rollouts(self) -> bool:
        """Are responses that the teacher samples trained on at any step?"""
        return self.prompts_per_step > 0 and schedule.highest(self.teacher_per_prompt) > 0

    @property
    def has_teacher_write(self) -> bool:
        """Does the teacher sample responses, whether they are trained on or only judged?"""
        return self.uses_teacher_rollouts or self.evidence is not None

    @property
    def num_slots(self) -> int:
        """Prompts that may be under way at once; with admission-ordered steps it bounds staleness."""
        return (self.max_staleness + 1) * self.prompts_per_step

    def __post_init__(self) -> None:
        paired, most = self.golden_pairing == "prompt", schedule.highest(self.golden_per_prompt)
        if paired and (most > 1 or self.golden_per_step > 0 or self.prompts_per_step == 0):
            raise ValueError(
                "golden_pairing=prompt has one solution for each of a step's prompts: golden_per_prompt is at most 1, "
                "golden_per_step must be 0 and prompts_per_step above 0"
            )
        if self.on_policy_probability is not None and schedule.highest(self.on_policy_probability) > 1:
            raise ValueError("on_policy_probability is a probability: at most 1")
