"""ScoringEngine on vLLM servers elsewhere, replicas of one model, that are checked while they score.

No score is trusted until the server that gave it has just answered the probe as it did when the run began: each call
ends with the probe at every server that scored in it, and with one of its sequences at a second server. One that has
become another model is put out, and what it scored in the call is scored again by the others. The probe is also what
breaks the tie between two servers that disagree: the one that departs from its own start is out.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from opd_ray.messages import ScoreRequest, ServerState
from opd_ray.score.alternatives import chosen_ids, num_alternatives, scores_of
from opd_ray.score.engine import Rollout, Scores
from opd_ray.score.replicas import Baseline, Replica, Replicas
from opd_ray.score.server import Server
from opd_ray.score.standing import StandingCheck

_PATIENCE = 0.9
"""Share of the time that a call may take after which it ends itself, with the URLs; the driver would only know that
it gave no answer."""
_TRIES = 4
"""Servers that may hang, one after the other, within the time of a call."""


@dataclass(frozen=True, eq=False)
class _Answer:
    replica: Replica | None
    """Who gave it; None where nobody needed to be asked."""
    logprobs: np.ndarray
    ids: np.ndarray
    chosen: np.ndarray | None = None


class RemoteScoringEngine:
    """Scores of servers; the actor that has it needs neither the model nor a GPU."""

    def __init__(self, *, servers: Sequence[Server], baseline: Baseline, most_at_once: int, deadline_s: float) -> None:
        """``most_at_once``: requests under way. Raises RunError from ``score`` when no server answers for most of
        ``deadline_s``, or when none is what it was."""
        self._baseline, self._patience_s = baseline, _PATIENCE * deadline_s
        replicas = [Replica(server, baseline.answers[server.url]) for server in servers]
        self._replicas = Replicas(replicas, request_s=deadline_s / _TRIES)
        self._threads = ThreadPoolExecutor(most_at_once, "request")
        self._check = StandingCheck(self._replicas, baseline.probe, baseline.allowed, self._threads)
        self._turns = itertools.count()

    def load(self, path: str) -> None:
        """Nothing: the servers have the model, and ``path`` only its tokenizer."""

    def servers(self) -> tuple[ServerState, ...]:
        """How each of them fares; from any thread."""
        return self._replicas.states()

    def score(self, sequences: Sequence[Rollout], request: ScoreRequest) -> list[Scores]:
        if request.hidden:
            raise ValueError("a server gives no hidden states; use a teacher with engine=torch and no url")
        if request.given and not self._baseline.chosen:
            raise ValueError("these servers give no log-probs of chosen tokens; use engine=torch and no url")
        until = time.monotonic() + self._patience_s
        found = {
            index: self._of_nothing(sequence, request)
            for index, sequence in enumerate(sequences)
            if not len(sequence.response_tokens)
        }
        while missing := [index for index in range(len(sequences)) if index not in found]:
            ask = partial(self._ask, request=request, until=until)
            answers = dict(zip(missing, self._threads.map(ask, [sequences[index] for index in missing]), strict=True))
            sound = self._sound(sequences, answers, until)
            found |= {index: answer for index, answer in answers.items() if answer.replica in sound}
        return [
            scores_of(sequence, request, self._baseline.vocab_size, answer.logprobs, answer.ids, answer.chosen)
            for sequence, answer in zip(sequences, (found[index] for index in range(len(sequences))), strict=True)
        ]

    def _ask(self, sequence: Rollout, request: ScoreRequest, until: float) -> _Answer:
        """From whichever server answers."""
        vocab_size, asked = self._baseline.vocab_size, self._num_alternatives(request)
        tokens, first = [*sequence.prompt_tokens, *sequence.response_tokens], len(sequence.prompt_tokens)

        def call(server: Server, timeout_s: float) -> tuple[np.ndarray, ...]:
            if self._baseline.chosen:
                return server.chosen(tokens, first, asked, chosen_ids(sequence, request, vocab_size), timeout_s)
            return server.alternatives(tokens, first, asked, timeout_s)

        replica, columns = self._replicas.ask(call, until)
        return _Answer(replica, *columns)

    def _of_nothing(self, sequence: Rollout, request: ScoreRequest) -> _Answer:
        """Of a response without tokens, for which nobody needs to be asked."""
        empty = np.zeros((0, 1 + self._num_alternatives(request)), np.float32)
        chosen = chosen_ids(sequence, request, self._baseline.vocab_size).astype(np.float32)
        return _Answer(None, empty, empty.astype(np.int32), chosen)

    def _num_alternatives(self, request: ScoreRequest) -> int:
        return num_alternatives(request, self._baseline.vocab_size, chosen=self._baseline.chosen)

    def _sound(self, sequences: Sequence[Rollout], answers: Mapping[int, _Answer], until: float) -> set[Replica]:
        """The servers whose answers count; one of the sequences, another in every call, is what a second is asked."""
        index = list(answers)[next(self._turns) % len(answers)]
        sequence, answer = sequences[index], answers[index]
        tokens, first = [*sequence.prompt_tokens, *sequence.response_tokens], len(sequence.prompt_tokens)
        own = answer.logprobs[:, 0] if answer.chosen is None else answer.chosen[:, 0]

        def opinion(server: Server, timeout_s: float) -> np.ndarray:
            return server.alternatives(tokens, first, 0, timeout_s)[0][:, 0]

        scored = {each.replica for each in answers.values()}
        return self._check.sound(scored, answer.replica, own, opinion, until)
