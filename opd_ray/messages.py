"""What the rooms say to each other: every command, meta and payload schema of the system.

Metas and commands are small frozen dataclasses and pass through the driver. Payloads are
`pyarrow.RecordBatch` objects that stay in Ray's object store; the driver only holds their refs.
Both payload schemas have one row per rollout, in the order of the metas that came with them,
and each list column's flat values are the packed token stream of the batch.

Alignment: entry ``t`` of every per-response-token column belongs to response token ``t``. Its
log-prob is the one the token had *when it was predicted*, so it comes from position ``t - 1``
of the sequence (for ``t = 0``: the last prompt position). Log-probs are in nats, float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import pyarrow as pa

if TYPE_CHECKING:
    from ray import ObjectRef

Source = Literal["student", "golden", "teacher"]
"""Who wrote a rollout: the student (on-policy), the golden data, or the teacher, live."""
SOURCES: tuple[Source, ...] = get_args(Source)
FinishReason = Literal["stop", "length", "repetition", "horizon"]
"""By itself, with a token of the EOS set; at the end of its budget; by the engine, for it had repeated itself; or at a
horizon before the end of its budget, where nothing is known of how it would have ended."""
TaughtBy = Literal["teacher", "golden", "reward", "nothing"]
"""What a prompt is taught by, where evidence decides it."""
TAUGHT_BY: tuple[TaughtBy, ...] = get_args(TaughtBy)
REFERENCE = "reference"
"""The reference's role among the scorers; every other role is the name of a teacher."""

MOST_VALUES = 2**31 - 1
"""Of one column of lists: Arrow counts them in int32."""

ROLLOUT_SCHEMA = pa.schema(
    [
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("slot", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("response_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("behaviour_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("weight_versions", pa.list_(pa.int32()), nullable=False),
        pa.field("topk_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("privileged_prompt_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)
"""One row per rollout. The response ends with its EOS token when finish_reason is "stop".
Golden and teacher rows have no behaviour policy that is a student: their behaviour_logprobs and weight_versions are
empty. topk_ids are the sampler's k most probable tokens at each position, position-major, empty unless asked for;
privileged_prompt_tokens is the prompt as its teacher is shown it, empty unless that is another than the student's: with
the golden solution in it, or in the tokens of a teacher with another tokenizer."""

SCORE_SCHEMA = pa.schema(
    [
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("topk_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("topk_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("given_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("stop_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("hidden", pa.list_(pa.float32()), nullable=False),
        pa.field("spans", pa.list_(pa.int32()), nullable=False),
    ]
)
"""A scorer's answer to one rollout batch, T response tokens a row; what a ScoreRequest did not ask for is empty.

logprobs        [T] of each response token
topk_ids        [T, k] the scorer's most probable tokens, position-major, and
topk_logprobs   [T, k] their log-probs
given_logprobs  [T, k'] log-probs of the rollout's own topk_ids
stop_logprobs   [T] log P(stop): of all tokens of the EOS set together
hidden          [T, H] the states that the output layer turns into logits (float32; float16 of a bfloat16 model)
spans           [T] of a teacher with another tokenizer, who has an opinion on stretches of text alone: the number of
                the span that each token is in, from 0 on, -1 for none. The log-probs of a span's tokens are equal parts
                of the teacher's log-prob of all of it; those of no span have the one that they were sampled with

All EOS tokens count as one, the first of the set: it carries their summed probability, the others have none."""


def score_schema(hidden: pa.DataType | None = None) -> pa.Schema:
    """SCORE_SCHEMA with hidden states of another precision."""
    if hidden is None:
        return SCORE_SCHEMA
    index = SCORE_SCHEMA.get_field_index("hidden")
    return SCORE_SCHEMA.set(index, pa.field("hidden", pa.list_(hidden), nullable=False))


@dataclass(frozen=True)
class ScoreRequest:
    """What a scorer is asked about each response token, besides its log-prob."""

    top_k: int = 0
    """Most probable alternatives."""
    given: bool = False
    """Log-probs of the rollout's own topk_ids (the student's top-k)."""
    hidden: bool = False
    """Hidden states in front of the output layer, for the exact distribution over the whole vocabulary."""
    stop_token_ids: tuple[int, ...] = ()
    """The EOS set of student and scorer together; more than one are merged into the first."""
    privileged: bool = False
    """Score behind privileged_prompt_tokens instead of prompt_tokens."""


class RepetitionRule(NamedTuple):
    """A response ends where its last tokens are one pattern, of any size in between, ``min_count`` times in a row."""

    max_pattern_size: int
    min_pattern_size: int
    min_count: int


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are sampled, the same for all requests of one call."""

    temperature: float
    """0 means greedy."""
    top_p: float
    max_response_tokens: int
    stop_token_ids: tuple[int, ...]
    """The EOS set: generation ends after any of these, and the token is part of the response."""
    top_k: int = 0
    """Ids of the most probable tokens to return with every sampled one."""
    repetition_rule: RepetitionRule | None = None
    """When a response ends for it repeats itself; None for never."""


@dataclass(frozen=True)
class PromptGroup:
    """One prompt and how many responses to sample for it."""

    slot: int
    """Admission number, 0-based over the whole run; batches are consumed in this order."""
    prompt_id: str
    prompt_tokens: tuple[int, ...]
    row: dict[str, Any]
    """The prompt file's row, for the task's verifier."""
    num_responses: int
    seed: int
    """Response i uses seed + i."""
    teacher: str = "teacher"
    """Name of the teacher that this prompt's row asks for."""
    privileged_prompt_tokens: tuple[int, ...] = ()
    """The prompt as its teacher is shown it, with its golden solution in it or in the teacher's own tokens; empty
    unless that is another than the student's."""
    horizon: int | None = None
    """Tokens after which a response is cut off and trained on no further, fewer than its budget; None for none."""
    probe: bool = False
    """Sample to the budget nevertheless."""
    first_response: int = 0
    """Number of the first response: those before it have been sampled in another call."""


@dataclass(frozen=True)
class RolloutMeta:
    """What the driver knows about one rollout without touching its payload."""

    rollout_id: str
    slot: int
    prompt_id: str
    source: Source
    num_prompt_tokens: int
    num_response_tokens: int
    finish_reason: FinishReason
    correct: bool
    """The task's verdict on the text; a truncated response is never correct."""
    repetitive: bool
    """rep(o) of METHOD: the tail compresses by more than the configured ratio; or it ended as a loop."""
    oldest_version: int
    """Weight version of the first response token; -1 unless the student sampled."""
    mean_version: float
    """Mean weight version over the response tokens; -1 unless the student sampled."""
    mean_behaviour_logprob: float
    """Mean over the response tokens, nats; nan unless the student sampled."""
    teacher: str = "teacher"
    """Name of the teacher that its prompt's row asks for."""
    tail_period: int = 0
    """Tokens after which the end of the response repeats itself; 0 where it does not."""
    worker: str = ""
    """The actor that sampled it; empty for golden rollouts."""
    no_verdict: bool = False
    """The verifier was given up: over its time or memory, or dead. Counts as wrong."""
    horizon: int | None = None
    """Tokens that it is trained on at most; None for all of its budget."""
    whole: bool = True
    """Might it have had all of its budget?"""

    @property
    def num_trained_tokens(self) -> int:
        """Response tokens that are trained on."""
        return min(self.num_response_tokens, self.horizon or self.num_response_tokens)

    @property
    def num_tokens(self) -> int:
        """Those of the prompt, and of the response that are trained on."""
        return self.num_prompt_tokens + self.num_trained_tokens

    @property
    def truncated(self) -> bool:
        """It did not end by itself: out of its budget, or a loop that would have filled it."""
        return self.finish_reason in ("length", "repetition")

    @property
    def cut_off(self) -> bool:
        """The last token that is trained on is no end of its own."""
        return self.finish_reason != "stop" or self.num_trained_tokens < self.num_response_tokens


@dataclass(frozen=True)
class Entry:
    """One rollout in the buffer: its meta and where its columns live."""

    meta: RolloutMeta
    row: int
    """Row of this rollout in every payload below."""
    rollouts: ObjectRef
    """RecordBatch of ROLLOUT_SCHEMA."""
    scores: dict[str, ObjectRef] = field(default_factory=dict)
    """Role (a teacher's name, or "reference") to a RecordBatch of SCORE_SCHEMA; only those its loss needs."""
    reward_advantage: float = 0.0
    """The task's reward, normalised over the responses to the same prompt; 0 unless the loss uses it."""
    taught_by: TaughtBy | None = None
    """What evidence leaves the rollout to: the student's of a prompt all to the same, a golden one that is in their
    place to "golden", and one of the teacher's that is only judged to "nothing"; else None."""
    weight: float = 1.0
    """Of its source's loss on it: 0 for the student's that the teacher does not teach."""

    @property
    def is_trained_on(self) -> bool:
        """Is it part of a step's plan, and of what its means divide by?"""
        return self.meta.source != "teacher" or self.taught_by != "nothing"


@dataclass(frozen=True)
class Count:
    """Rollouts of one source and their response tokens."""

    rollouts: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Denominators:
    """Global counts of one step, over every rank and micro-batch: what a mean divides by."""

    student: Count = Count()
    golden: Count = Count()
    teacher: Count = Count()

    def of(self, source: Source) -> Count:
        return getattr(self, source)

    @property
    def tokens(self) -> int:
        """Response tokens of all sources."""
        return self.student.tokens + self.golden.tokens + self.teacher.tokens


@dataclass(frozen=True)
class Coefficients:
    """The weights of the objective's terms in one step: schedules and the guard decide them, not the learner."""

    student: float
    golden: float
    teacher: float
    reference: float
    """β_KL."""
    mask_truncated_tails: bool = False


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step for one learner rank."""

    step: int
    """0-based; the weights it produces are version step + 1."""
    micro_batches: tuple[tuple[Entry, ...], ...]
    """Every rank gets the same number of micro-batches (ZeRO-3 is collective); some may be empty."""
    denominators: Denominators
    coefficients: Coefficients


@dataclass(frozen=True)
class TransferGroup:
    """How one process joins the group that weights are broadcast in; rank 0 is the learner."""

    backend: str
    host: str
    port: int
    rank: int
    world_size: int
    timeout_s: float
    bucket_bytes: int
    """Parameters are packed into buckets of at most this size (larger ones travel alone)."""
    secret: str = field(repr=False)
    """Which its members prove that they know, in hex; of this group alone."""


@dataclass(frozen=True)
class WeightManifest:
    """The parameters a broadcast sends, in order, in Hugging Face names."""

    version: int
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    """torch dtype names without the prefix, as "float32"."""
    shapes: tuple[tuple[int, ...], ...]
    tied: tuple[tuple[str, str], ...] = ()
    """(another name, the one of ``names`` whose tensor it stands for): receivers get it, the wire carries it once."""
    base: str | None = None
    """Checkpoint that low-rank adapters are sent of (A and B of each layer that has one); None where the parameters are
    the model's own."""
    scale: float = 1.0
    """Of the adapters: a layer's weight is that of the base + scale · B A."""


@dataclass(frozen=True)
class Finished:
    """One finished response as an engine returns it; arrays have one entry per response token."""

    request_id: str
    tokens: Any
    """int32 array, EOS included when finish_reason is "stop"."""
    logprobs: Any
    """float32 array: log-probs under the distribution that was sampled from, nats."""
    weight_versions: Any
    """int32 array: the weight version that computed each token's log-prob."""
    finish_reason: FinishReason
    topk_ids: Any = None
    """int32 [T, k]: the k most probable tokens at each position; None unless asked for."""


@dataclass(frozen=True)
class GenerationRequest:
    """One response to sample."""

    request_id: str
    prompt_tokens: tuple[int, ...]
    seed: int
    sampling: SamplingSettings


class Span(NamedTuple):
    """What a worker was at for a while."""

    kind: str
    began_s: float
    """Of the worker's own clock, which never goes back."""
    lasted_s: float
    facts: dict[str, float]
    """What else there is to say of it: a step, a number of rollouts."""


@dataclass(frozen=True)
class Spans:
    """What a worker was at since it was asked last: one thing at a time, in order."""

    now_s: float
    """Of the same clock, when it answered."""
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class MemoryUse:
    """The most memory that a process had since it began."""

    host_bytes: int
    """Of its node, without the object store."""
    gpu_bytes: int | None
    """Of its GPU; None without one."""


@dataclass(frozen=True)
class ServerState:
    """One of the servers that score for a role, as one actor sees it."""

    url: str
    state: Literal["in use", "resting", "out"]
    """Asked; not asked for a while, since it gave no answer; no longer asked, since its answers are another model's."""
    since_s: float
    """For how long."""
    why: str = ""
    """Why it is not in use, or what else is to be said of it; one line."""
    distance: float = 0.0
    """Mean distance of its log-probs from those of another server, or from its own at the start, when last compared;
    nats."""


@dataclass(frozen=True)
class PoolSize:
    """How many workers a pool has."""

    start: int
    minimum: int
    maximum: int

    @classmethod
    def of(cls, start: int, minimum: int | None, maximum: int | None) -> PoolSize:
        return cls(start, start if minimum is None else minimum, start if maximum is None else maximum)

    @classmethod
    def fixed(cls, number: int) -> PoolSize:
        return cls(number, number, number)


@dataclass(frozen=True)
class Strength:
    """The least that the guard asks of the next steps; the identity while it has not acted."""

    golden_per_prompt: float = 0.0
    golden_coef: float = 0.0
    reference_kl_coef: float = 0.0
    mask_truncated_tails: bool = False
    horizon: float = 1.0
    """Share of the configured horizon that is sampled at most; of rollouts that are yet to be asked for."""


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step came to; the same on every rank."""

    metrics: dict[str, float]
    """Means over all ranks' tokens, nats."""
    problem: str | None = None
    """Why the step was not taken: a loss or gradient that is not finite. Weights, optimizer and learning rate are
    then as before, and the metric ``loss`` is nan."""
    lost: tuple[str, ...] = ()
    """Rollouts whose payloads are gone from the object store, on any rank. Nothing was computed; there are no metrics
    and everything is as before."""
