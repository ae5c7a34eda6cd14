"""Looks at the servers that a run's teachers are (``teacher.url``), before a model loads.

Are they there, do they let us in, do they serve one model whose tokens are the student's, do they give what the losses
ask for, and do they agree with each other and with themselves? What they answer to the probe now is what the standing
check goes by while the run goes on. Each refusal is an InputError of one line that begins with the URL's field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd_ray.config import Config, ScorerConfig
from opd_ray.errors import InputError, KeyRefused, ServerFailed, ServerRefused, near
from opd_ray.messages import ScoreRequest
from opd_ray.models.checkpoints import ModelFacts, field_of
from opd_ray.score.alternatives import num_alternatives
from opd_ray.score.replicas import Baseline
from opd_ray.score.requests import score_requests
from opd_ray.score.server import Server, key_in
from opd_ray.score.standing import distance, probe_opinion

MOST_PROMPTS = 16
"""First prompts of a run that are of use here."""
_PROBE_TOKENS = 128
"""Of the first prompts, one behind the other: as much as a mean needs, and scored in a moment."""
_SCORE_S = 60.0
"""The most that a server may take for the probe."""
_TEXTS = (
    "The answer is 12 + 3.5 = 15.5, so x^2 \\leq \\frac{1}{2}.\n\n",
    "def f(n):\n\treturn [n for _ in range(10)]  # naïve\n",
    "Zahlen über 1000; 数学 の 答え; ответ 42 🙂",
)
"""Read by both tokenizers, as are the first prompts."""


def look_at_servers(
    config: Config, models: Mapping[str, ModelFacts], prompts: Sequence[np.ndarray], eos_token_ids: tuple[int, ...]
) -> dict[str, tuple[ModelFacts, Baseline]]:
    """By role that has servers: its facts, with the context that they take, and what they answered.

    ``prompts`` are token ids of prompts of the run. Raises InputError.
    """
    found = {}
    for role, scorer in config.scorers.items():
        if scorer.url:
            requests = [asked[role] for asked in score_requests(config, eos_token_ids).values() if role in asked]
            look = _Look(field_of(config, role), scorer, models["student"], models[role])
            found[role] = look.facts(prompts, requests, eos_token_ids)
    return found


class _Look:
    """At the servers of one role."""

    def __init__(self, name: str, scorer: ScorerConfig, student: ModelFacts, facts: ModelFacts) -> None:
        self._name, self._scorer, self._student, self._facts = name, scorer, student, facts
        self._key = key_in(scorer.url_key_env)
        if scorer.url_key_env and not self._key:
            raise InputError(
                f"{name}.url_key_env={scorer.url_key_env}: there is no such environment variable here, or it is empty; "
                "export it where the run is started"
            )

    def facts(
        self, prompts: Sequence[np.ndarray], requests: Sequence[ScoreRequest], eos_token_ids: tuple[int, ...]
    ) -> tuple[ModelFacts, Baseline]:
        cards = {url: self._card(url) for url in self._scorer.url}
        servers = [Server(url, model=card["id"], key=self._key) for url, card in cards.items()]
        # A server insists on sampling one token, which needs room.
        contexts = [(card["max_model_len"] - 1, url) for url, card in cards.items() if card.get("max_model_len")]
        context, url = min(contexts, default=(None, None))
        for server in servers:
            self._check_tokens(server, prompts, eos_token_ids)
        probe = _probe(prompts, context)
        chosen = self._check_answers(servers, probe, requests)
        answers = {server.url: self._asked(server, probe) for server in servers}
        self._check_agreement(servers, probe, answers)
        name = f"{self._name}.url={url}" if url else self._facts.name
        models = {url: card["id"] for url, card in cards.items()}
        return dataclasses.replace(self._facts, name=name, context_tokens=context), Baseline(
            models, probe, answers, self._facts.vocab_size, chosen
        )

    def _refusal(self, error: Exception, mend: str) -> InputError:
        return InputError(f"{self._name}.url={error}; {mend}")

    def _card(self, url: str) -> dict[str, Any]:
        """What a server says of its model."""
        given, variable = self._scorer.url_model, self._scorer.url_key_env
        try:
            cards = Server(url, key=self._key).models()
        except KeyRefused as error:
            mend = (
                f"see the key in {variable}"
                if variable
                else f"name the variable with its key: {self._name}.url_key_env"
            )
            raise self._refusal(error, mend) from None
        except ServerFailed as error:
            raise self._refusal(error, "start a vLLM server there, or give another URL") from None
        named = {card["id"]: card for card in cards}
        own = [card["id"] for card in cards if not card.get("parent")]  # the others are adapters
        if given is None and len(own) == 1:
            return named[own[0]]
        if given in named:
            return named[given]
        what = f"serves {', '.join(named) or 'no model'}" + (f", not {given}{near(given, named)}" if given else "")
        raise InputError(f"{self._name}.url={url}: {what}; name one of them in {self._name}.url_model")

    def _check_tokens(self, server: Server, prompts: Sequence[np.ndarray], eos_token_ids: tuple[int, ...]) -> None:
        """The student's token ids must be the same text to the server, those that end a response included."""
        tokenizer = self._student.tokenizer
        texts = [*_TEXTS, *(tokenizer.decode(prompt.tolist()) for prompt in prompts[:2])]
        try:
            for text in texts:
                ours = tokenizer(text, add_special_tokens=False)["input_ids"]
                if server.tokenize(text) != ours and server.detokenize(ours) != (text_of := tokenizer.decode(ours)):
                    self._refuse_tokens(server, ours, text_of)
            for eos in eos_token_ids:
                if (theirs := server.detokenize([eos])) != (ours := tokenizer.decode([eos])):
                    raise InputError(
                        f"{self._name}.url={server.url}: token {eos}, which ends a response, is {theirs!r} there but "
                        f"{ours!r} in {self._student.name}; serve a model of the student's tokenizer"
                    )
        except ServerFailed as error:
            raise self._refusal(error, "expected a vLLM server with its tokenizer (/tokenize, /detokenize)") from None

    def _refuse_tokens(self, server: Server, ours: Sequence[int], text: str) -> None:
        for token in ours:
            here, there = self._student.tokenizer.decode([token]), server.detokenize([token])
            if here != there:
                raise InputError(
                    f"{self._name}.url={server.url}: token {token} is {there!r} there but {here!r} in "
                    f"{self._student.name}; serve a model of the student's tokenizer"
                )
        raise InputError(
            f"{self._name}.url={server.url}: the student's tokens of {text!r} are another text there; serve a model of "
            "the student's tokenizer"
        )

    def _check_answers(self, servers: Sequence[Server], probe: np.ndarray, requests: Sequence[ScoreRequest]) -> bool:
        """Do they give what the losses ask for? Returns whether they give log-probs of chosen tokens."""
        needed = any(request.given for request in requests)
        for server in servers:
            if problem := self._cannot_choose(server, probe):
                if needed:
                    raise InputError(
                        f"{self._name}.url={problem}; a support of student_top_k needs vLLM servers on CUDA that were "
                        "started with --enable-scale-out, or a teacher with engine=torch"
                    )
                break
        else:
            return True
        most = max(num_alternatives(request, self._facts.vocab_size) for request in requests)
        for server in servers:
            try:
                server.alternatives(probe, 1, most, _SCORE_S)
            except ServerRefused as error:
                raise self._refusal(error, f"start it with --max-logprobs {most}, or ask for a smaller top_k") from None
            except ServerFailed as error:
                raise self._refusal(error, "see its log") from None
        return False

    def _cannot_choose(self, server: Server, probe: np.ndarray) -> str | None:
        """Why a server gives no log-probs of chosen tokens; None where it does."""
        try:
            server.chosen(probe, 1, 0, probe[1:, None], _SCORE_S)
        except ServerFailed as error:
            return str(error)
        return None

    def _asked(self, server: Server, probe: np.ndarray) -> np.ndarray:
        try:
            return probe_opinion(probe)(server, _SCORE_S)
        except ServerFailed as error:
            raise self._refusal(error, "see its log") from None

    def _check_agreement(self, servers: Sequence[Server], probe: np.ndarray, answers: Mapping[str, np.ndarray]) -> None:
        """Of every server with itself, and with the first."""
        allowed, first = self._scorer.drift_nats, servers[0]
        for server in servers:
            for other, theirs in ((server, self._asked(server, probe)), (first, answers[first.url])):
                if (far := distance(answers[server.url], theirs)) > allowed:
                    whom = "from itself, asked twice" if other is server else f"from {other.url}"
                    raise InputError(
                        f"{self._name}.url={server.url}: its log-probs of {len(probe)} tokens differ {whom}, by "
                        f"{far:.3g} nats in the mean, and {allowed:g} are allowed; serve one model, or set "
                        f"{self._name}.dtype to the servers' or {self._name}.url_drift_nats"
                    )


def _probe(prompts: Sequence[np.ndarray], context: int | None) -> np.ndarray:
    """The first prompts one behind the other, as many tokens as fit."""
    tokens = np.concatenate(prompts)[: min(_PROBE_TOKENS, context or _PROBE_TOKENS)]
    return np.tile(tokens, 2)[: max(2, len(tokens))]
