"""A teacher with another tokenizer: what it is given of a rollout, and its scores at the student's tokens.

It reads the text of the student's tokens in tokens of its own, behind the prompt as its own chat template has it. What
both models can be asked is the probability of a span (:mod:`opd_ray.score.spans`):

    log p_T(span) = Σ log p_T(its tokens | prompt, its tokens before)     log π(span) = Σ log π(the student's)

the chain rule on either side. It is the one segmentation of the text that the teacher's tokenizer makes, not the sum
over all, as in every method of this kind (GOLD, TRL's GOLDTrainer; SimCT, arXiv 2605.07711; DPCA, arXiv 2606.09456).

The end is a span of its own: the student's EOS, whichever it was, against the sum over all of the teacher's. Left out,
so that the loss has nothing to say of them, are the student's tokens behind the last place where both meet:

    of a rollout that was cut off, the last tokens from which a longer one of the teacher's might still have come (of
    "=" at a cut the teacher would say that it is not "=5", which may have come next); a character without its end
    what is beyond the teacher's context
    what the teacher's tokenizer changes before it reads (normalization, tokens it does not know), and all behind it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from opd_ray.errors import RunError
from opd_ray.messages import ScoreRequest
from opd_ray.models.checkpoints import load_tokenizer
from opd_ray.models.texts import TokenTexts
from opd_ray.score.engine import Rollout, Scores, ScoringEngine
from opd_ray.score.spans import ends, readable, spans

_NOWHERE = 2**62 + 1
"""A place where nothing meets."""


@dataclass(frozen=True)
class Translation:
    """What it takes to ask one teacher about the student's rollouts."""

    student_path: str
    """Of the student's tokenizer."""
    path: str
    """Of the teacher's."""
    stop_token_ids: tuple[int, ...]
    """Every token of the student's that ends a response."""
    own_stop_token_ids: tuple[int, ...]
    """The teacher's."""
    most_tokens: int
    """Of prompt and response, in the teacher's tokens; what is beyond is not scored."""


@dataclass(frozen=True)
class _Reading:
    """One rollout as the teacher reads it: [S] tokens of the student's, [T] of the teacher's."""

    sequence: Rollout
    own: np.ndarray
    """[S] int32: the span of each of the student's tokens; -1 for none."""
    theirs: np.ndarray
    """[T] int32: of each of the teacher's."""


class Translator:
    """Asks a scoring engine in its own tokens. Used from one thread at a time, as the engine is."""

    def __init__(self, translation: Translation, student: TokenTexts, teacher: TokenTexts) -> None:
        self._facts, self._student, self._teacher = translation, student, teacher

    @classmethod
    def of(cls, translation: Translation) -> Translator:
        """Reads both tokenizers."""
        texts = (TokenTexts(load_tokenizer(path)) for path in (translation.student_path, translation.path))
        return cls(translation, *texts)

    def score(self, engine: ScoringEngine, rollouts: pa.RecordBatch, request: ScoreRequest) -> list[Scores]:
        """A Scores for each row of ROLLOUT_SCHEMA, in the student's tokens, with ``spans``."""
        if request.top_k or request.given or request.hidden:
            raise RunError(
                "a teacher with another tokenizer was asked for its distribution over tokens, which are not the "
                "student's; compare spans (loss.student.divergence=k1), or take a teacher with the student's tokenizer"
            )
        readings = self.read(rollouts)
        own = ScoreRequest(stop_token_ids=self._facts.own_stop_token_ids)
        scores = engine.score([reading.sequence for reading in readings], own)
        behaviour = (np.asarray(each.values) for each in rollouts["behaviour_logprobs"])
        with_stops = bool(request.stop_token_ids)
        return [_told(*each, with_stops) for each in zip(readings, scores, behaviour, strict=True)]

    def read(self, rollouts: pa.RecordBatch) -> list[_Reading]:
        """Raises RunError for a row without a prompt in the teacher's tokens."""
        rows = []
        columns = (rollouts[name] for name in ("rollout_id", "response_tokens", "finish_reason"))
        for rollout_id, response, finish in zip(*columns, strict=True):
            tokens = np.asarray(response.values).tolist()
            ended = finish.as_py() == "stop" and tokens[-1:] != [] and tokens[-1] in self._facts.stop_token_ids
            pieces = self._student.pieces(tokens[: len(tokens) - ended])
            if self._student.begins_with_space and pieces[:1] and pieces[0].startswith(b" "):
                pieces[0] = pieces[0][1:]
            rows.append((rollout_id, 2 * ends(pieces), ended, *readable(b"".join(pieces), whole=ended)))
        encoded = self._teacher.encode([text for *_, text, _ in rows])
        prompts = rollouts["privileged_prompt_tokens"]
        return [
            self._reading(str(rollout_id), np.asarray(prompt.values), ids, text, own_places, text_places, ended)
            for (rollout_id, own_places, ended, text, text_places), ids, prompt in zip(
                rows, encoded, prompts, strict=True
            )
        ]

    def _reading(
        self,
        rollout_id: str,
        prompt: np.ndarray,
        ids: Sequence[int],
        text: str,
        own_places: np.ndarray,
        text_places: np.ndarray,
        ended: bool,
    ) -> _Reading:
        if not len(prompt):
            raise RunError(
                f"rollout {rollout_id} has no prompt in the tokens of its teacher, which has another tokenizer than "
                "the student; prompts are rendered for it before the run begins"
            )
        prompt = prompt[: self._facts.most_tokens]
        room = self._facts.most_tokens - len(prompt)
        fits = len(ids) + ended <= room
        theirs = self._places(ids, text.encode(), text_places, whole=ended)[:room]
        ids = list(ids[:room])
        own, other = spans(own_places, theirs)
        if ended:
            last = 1 + max(own.max(initial=-1), other.max(initial=-1))
            own = np.append(own, np.int32(last if fits else -1))
            if fits:
                other, ids = np.append(other, np.int32(last)), [*ids, self._facts.own_stop_token_ids[0]]
        return _Reading(Rollout(prompt, np.asarray(ids, np.int32)), own, other)

    def _places(self, ids: Sequence[int], text: bytes, places: np.ndarray, *, whole: bool) -> np.ndarray:
        """Where each of the teacher's tokens ends, as ``places`` [bytes + 1] counts them; _NOWHERE for those that stand
        for another text, and, unless ``whole``, for the last that might have become a longer one."""
        pieces = self._teacher.pieces(ids)
        own = b"".join(pieces)
        same = _common(own, text)
        if own.startswith(b" ") and _common(own[1:], text) > same:  # SentencePiece puts a space in front of a text
            pieces = [pieces[0][1:], *pieces[1:]]
            own = own[1:]
            same = _common(own, text)
        found = ends(pieces)
        if same < len(own):
            found[found > same] = -1
        if not whole:
            start = len(own)
            for number in range(len(pieces) - 1, -1, -1):
                start -= len(pieces[number])
                if len(own) - start >= self._teacher.longest:
                    break
                if self._teacher.begin_longer_token(own[start:]):
                    found[number:] = -1
        return np.where(found < 0, _NOWHERE, places[np.minimum(found, len(places) - 1)])


def _common(one: bytes, other: bytes) -> int:
    """Bytes that both begin with."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size
    return int(np.argmax(np.frombuffer(one[:size], np.uint8) != np.frombuffer(other[:size], np.uint8)))


def _told(reading: _Reading, scores: Scores, behaviour: np.ndarray, with_stops: bool) -> Scores:
    """The teacher's scores at the student's tokens: log p_T of a span in equal parts at each of its tokens. A token of
    no span has the log-prob that it was sampled with."""
    own, theirs = reading.own, reading.theirs
    inside, known = own >= 0, theirs >= 0
    number = int(own.max(initial=-1)) + 1
    sums, sizes = np.zeros(number), np.bincount(own[inside], minlength=number)
    np.add.at(sums, theirs[known], scores.logprobs[known].astype(np.float64))
    logprobs = behaviour.astype(np.float32) if len(behaviour) else np.zeros(len(own), np.float32)
    logprobs[inside] = (sums / np.maximum(sizes, 1))[own[inside]]
    stops = np.zeros(0, np.float32)
    if with_stops:
        # The teacher may stop where it begins a token; within a span nobody knows.
        stops = np.full(len(own), -np.inf, np.float32)
        first = np.flatnonzero(np.diff(own, prepend=-2))
        of_spans = np.full(number + 1, len(theirs))  # the last: of what is in none
        np.minimum.at(of_spans, np.where(known, theirs, number), np.arange(len(theirs)))
        begins = of_spans[own[first]]
        there = begins < len(scores.stop_logprobs)
        stops[first[there]] = scores.stop_logprobs[begins[there]]
    nothing = np.zeros((len(own), 0), np.float32)
    return Scores(logprobs, nothing.astype(np.int32), nothing, nothing, stops, nothing, spans=own)
