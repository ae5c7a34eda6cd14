"""What a step consists of and what of it travels: through Ray's object store and in the weight broadcast. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opd_ray.config import Config, schedule
from opd_ray.messages import RolloutMeta, ScoreRequest, Source
from opd_ray.models.size import DTYPE_BYTES, ModelSize
from opd_ray.score.requests import roles_of, score_requests

_TEXT_BYTES_PER_TOKEN = 4
"""UTF-8 of a token, as English and LaTeX have it with vocabularies of 32 to 152 thousand."""


@dataclass(frozen=True)
class Step:
    """One optimizer step: how many rollouts of each source, and how long they are."""

    rollouts: Mapping[Source, int]
    prompt_tokens: float
    """Of one rollout."""
    response_tokens: float
    """Of one rollout."""
    student_response_tokens: float | None = None
    """Of one of the student's that are trained on, where a horizon leaves fewer; None for as many."""

    @property
    def num_rollouts(self) -> int:
        return sum(self.rollouts.values())

    @property
    def sequence_tokens(self) -> float:
        """Prompt and response of one rollout."""
        return self.prompt_tokens + self.response_tokens

    @property
    def tokens(self) -> float:
        """Of all rollouts, prompts included."""
        return self.num_rollouts * self.sequence_tokens

    @property
    def student_tokens(self) -> float:
        """Response tokens of the student that are trained on."""
        each = self.student_response_tokens
        return self.rollouts.get("student", 0) * (self.response_tokens if each is None else each)

    @property
    def trained_tokens(self) -> float:
        """Response tokens of all sources that are trained on."""
        return (self.num_rollouts - self.rollouts.get("student", 0)) * self.response_tokens + self.student_tokens


def step_of(metas: Sequence[RolloutMeta]) -> Step:
    """One that took place, with the mean lengths of its rollouts."""
    number = max(1, len(metas))
    return Step(
        Counter(meta.source for meta in metas),
        sum(meta.num_prompt_tokens for meta in metas) / number,
        sum(meta.num_response_tokens for meta in metas) / number,
    )


def largest_step(config: Config, max_prompt_tokens: int) -> Step:
    """The most that a step of the run can be: every schedule at its highest, every response at its budget, of which
    the student's are trained on up to the horizon."""
    buffer, prompts = config.buffer, config.buffer.prompts_per_step
    rollouts = {
        "student": prompts * config.rollout.responses_per_prompt,
        "golden": round(prompts * schedule.highest(buffer.golden_per_prompt)) + buffer.golden_per_step,
        "teacher": round(prompts * schedule.highest(buffer.teacher_per_prompt)),
    }
    used = {source: rollouts[source] for source in config.sources}
    rollout = config.rollout
    trained = max(rollout.horizon_at(step) or rollout.budget(step) for step in _courses(config))
    return Step(used, max_prompt_tokens, rollout.longest_response, trained)


@dataclass(frozen=True)
class Horizon:
    """What a horizon makes of the student's rollouts, at the step with the most of each."""

    probes: int
    """Prompts of a step that are sampled to the budget nevertheless."""
    tokens: int
    """After which the rollouts of the other prompts end."""
    sampled_tokens: int
    """Response tokens that the student samples in a step."""


def horizon(config: Config) -> Horizon | None:
    """That of ``rollout.horizon``; None without one. What the guard makes of it is less."""
    rollout, prompts = config.rollout, config.buffer.prompts_per_step
    if rollout.horizon is None:
        return None
    probes = rollout.num_probes(prompts)

    def sampled(step: int) -> int:
        budget = rollout.budget(step)
        ends = rollout.horizon_at(step) or budget
        return rollout.responses_per_prompt * (probes * budget + (prompts - probes) * ends)

    tokens = max(rollout.horizon_at(step) or rollout.budget(step) for step in _courses(config))
    return Horizon(probes, tokens, max(map(sampled, _courses(config))))


def _courses(config: Config) -> range:
    """The steps of the run until budget and horizon have come to rest."""
    rest = schedule.turns(config.rollout.max_response_tokens, config.rollout.horizon)[-1]
    return range(min(config.learner.steps, rest + 1))


def store_bytes(
    config: Config, step: Step, sizes: Mapping[str, ModelSize], stop_token_ids: tuple[int, ...]
) -> dict[str, float]:
    """Bytes of a step's payloads in the object store: "rollouts", and each scorer's answers by its role.

    Columns of ROLLOUT_SCHEMA and SCORE_SCHEMA, T response tokens a rollout: tokens 4·T, with log-probs and versions of
    the student's own 8·T more, 4·k·T where it names its top-k; a score is 4·T, and 8·k·T for a top-k, 4·k'·T for given
    tokens, 4·T for P(stop), 2·H·T or 4·H·T for states.
    """
    requests = score_requests(config, stop_token_ids)
    found = {"rollouts": 0.0}
    if evidence := config.buffer.evidence:
        judged = 2 * evidence.probes * config.buffer.prompts_per_step
        found["rollouts"] += judged * ((4 + _TEXT_BYTES_PER_TOKEN) * step.response_tokens + 4 * step.prompt_tokens)
    for source, number in step.rollouts.items():
        tokens = number * step.response_tokens
        own = 8 + 4 * config.student_top_k if source == "student" else 0
        found["rollouts"] += (4 + _TEXT_BYTES_PER_TOKEN + own) * tokens + 4 * number * step.prompt_tokens
        of_source = requests.get(source, {})
        asked = {} if not of_source else roles_of(config, of_source, "teacher")
        for role, request in asked.items():
            each = _score_bytes_per_token(config, role, request, sizes[role], sizes["student"])
            found[role] = found.get(role, 0.0) + each * tokens
            if request.privileged:
                found["rollouts"] += 4 * number * step.prompt_tokens
    return found


def _score_bytes_per_token(
    config: Config, role: str, request: ScoreRequest, scorer: ModelSize, student: ModelSize
) -> int:
    top_k = min(request.top_k, scorer.vocab_size)
    given = min(config.student_top_k, student.vocab_size) if request.given else 0
    states = 0
    if request.hidden:
        half = config.scorers[role].dtype == "bfloat16"  # which travels as float16
        states = scorer.hidden_size * (2 if half else 4)
    return 4 + 8 * top_k + 4 * given + (4 if request.stop_token_ids else 0) + states


def broadcast_bytes(config: Config, student: ModelSize) -> int:
    """Bytes that every receiver of one weight broadcast gets: each parameter once, in the learner's precision, or those
    of adapters alone (:func:`opd_ray.weights.manifest.num_bytes`)."""
    return student.trained * DTYPE_BYTES[config.learner.dtype]


def num_receivers(config: Config) -> int:
    """Processes that a broadcast reaches: generators, and scorers that follow the student."""
    followers = sum(scorer.num_actors for scorer in config.scorers.values() if scorer.follows_student)
    return config.rollout.num_generators + followers


def steps_per_epoch(config: Config, num_prompts: int) -> float | None:
    """Optimizer steps in which every prompt is trained on once; None where a run trains on golden rollouts alone."""
    per_step = config.buffer.prompts_per_step
    return num_prompts / per_step if per_step else None
