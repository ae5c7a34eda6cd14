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
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

if TYPE_CHECKING:
    from ray import ObjectRef

Source = Literal["student", "golden"]
FinishReason = Literal["stop", "length"]

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
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)
"""One row per rollout. The response ends with its EOS token when finish_reason is "stop".
Golden rows have no behaviour policy: their behaviour_logprobs and weight_versions are empty."""

SCORE_SCHEMA = pa.schema(
    [
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("topk_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("topk_logprobs", pa.list_(pa.float32()), nullable=False),
    ]
)
"""A scorer's answer to one rollout batch: the log-prob of each response token, and the scorer's
k most probable tokens at each position, flattened position-major (k entries per position,
none when k is 0)."""


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are sampled, the same for all requests of one call."""

    temperature: float
    """0 means greedy."""
    top_p: float
    max_response_tokens: int
    stop_token_ids: tuple[int, ...]
    """The EOS set: generation ends after any of these, and the token is part of the response."""


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
    """Seed of the first response; response i uses seed + i."""


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
    """rep(o) of METHOD: the tail compresses by more than the configured ratio."""
    oldest_version: int
    """Weight version of the first response token; -1 for golden rollouts."""
    newest_version: int
    """Weight version of the last response token; -1 for golden rollouts."""
    mean_version: float
    """Mean weight version over the response tokens; -1 for golden rollouts."""
    mean_behaviour_logprob: float
    """Mean over the response tokens, nats; nan for golden rollouts."""

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_response_tokens

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Entry:
    """One rollout in the buffer: its meta and where its columns live."""

    meta: RolloutMeta
    row: int
    """Row of this rollout in every payload below."""
    rollouts: ObjectRef
    """RecordBatch of ROLLOUT_SCHEMA."""
    scores: dict[str, ObjectRef] = field(default_factory=dict)
    """Role ("teacher", "reference") to a RecordBatch of SCORE_SCHEMA; empty for golden rollouts."""


@dataclass(frozen=True)
class Denominators:
    """Global counts of one step, over every rank and micro-batch: what a mean divides by."""

    student_rollouts: int
    student_tokens: int
    golden_rollouts: int
    golden_tokens: int


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step for one learner rank."""

    step: int
    """0-based; the weights it produces are version step + 1."""
    micro_batches: tuple[tuple[Entry, ...], ...]
    """Every rank gets the same number of micro-batches (ZeRO-3 is collective); some may be empty."""
    denominators: Denominators


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


@dataclass(frozen=True)
class WeightManifest:
    """The parameters a broadcast sends, in order, in Hugging Face names."""

    version: int
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    """torch dtype names without the prefix, as "float32"."""
    shapes: tuple[tuple[int, ...], ...]


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


@dataclass(frozen=True)
class GenerationRequest:
    """One response to sample."""

    request_id: str
    prompt_tokens: tuple[int, ...]
    seed: int
    sampling: SamplingSettings
