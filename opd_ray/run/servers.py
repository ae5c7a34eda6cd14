"""Looks at the servers that a run's teachers are (``teacher.url``), before a model loads.

Are they there, do they let us in, do they serve one model whose tokens are the student's, with which tokens does it
end, do they give what the losses ask for, and do they agree with each other and with themselves? What they answer to
the probe now is what the standing check goes by while the run goes on. Each refusal is an InputError of one line that
begins with the URL's field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any

import numpy as np

from opd_ray.config import Config, ScorerConfig
from opd_ray.data.dataset import Dataset
from opd_ray.errors import InputError, KeyRefused, NotOffered, ServerFailed, ServerRefused, near
from opd_ray.messages import ScoreRequest
from opd_ray.models.checkpoints import ModelFacts, ending_tokens, field_of
from opd_ray.score.alternatives import chosen_ids, num_alternatives
from opd_ray.score.engine import Rollout
from opd_ray.score.replicas import Baseline
from opd_ray.score.requests import score_requests
from opd_ray.score.server import CONNECT_S, Server, key_in
from opd_ray.score.standing import distance, probe_opinion
from opd_ray.score.translation import Translation

_MOST_PROMPTS = 16
"""First prompts of a run that are of use here."""
_PROBE_TOKENS = 128
"""Of the first prompts, one behind the other: as much as a mean needs, and scored in a moment."""
_SCORE_S = 60.0
"""The most that a server may take for the probe."""
_AT_ONCE = 8
_MOST_ENDINGS = 256
"""Tokens that are tried as the end of a response."""
_SCATTER = 10
"""How many times the scatter of a server's own answers another answer may be away."""
_TEXTS = (
    "The answer is 12 + 3.5 = 15.5, so x^2 \\leq \\frac{1}{2}.\n\n",
    "def f(n):\n\treturn [n for _ in range(10)]  # naïve\n",
    "Zahlen über 1000; 数学 の 答え; ответ 42 🙂",
)
"""Read by both tokenizers, as are the first prompts."""


class Look:
    """At the servers of one role. Raises InputError."""

    def __init__(
        self, name: str, scorer: ScorerConfig, student: ModelFacts, facts: ModelFacts, prompts: Sequence[np.ndarray]
    ) -> None:
        """``facts`` of the tokenizer in the role's path; ``prompts`` are token ids of prompts of the run, in the tokens
        of ``student``: the role's own facts once more, where it is asked in its own tokens."""
        self._name, self._scorer, self._student, self._facts = name, scorer, student, facts
        self._prompts, self._key = prompts, key_in(scorer.url_key_env)
        if scorer.url_key_env and not self._key:
            raise InputError(
                f"{name}.url_key_env={scorer.url_key_env}: there is no such environment variable here, or it is empty; "
                "export it where the run is started"
            )
        self._cards = {url: self._card(url) for url in scorer.url}
        self._servers = [Server(url, model=card["id"], key=self._key) for url, card in self._cards.items()]
        # A server insists on sampling one token, which needs room.
        contexts = [(card["max_model_len"] - 1, url) for url, card in self._cards.items() if card.get("max_model_len")]
        self._context, self._narrowest = min(contexts, default=(None, None))

    @cached_property
    def facts(self) -> ModelFacts:
        """Of the served model: the context that every server takes, and the tokens that it ends with."""
        name = f"{self._name}.url={self._narrowest}" if self._narrowest else self._facts.name
        found = dataclasses.replace(self._facts, name=name, context_tokens=self._context)
        own_path = self._facts.tokenizer is not self._student.tokenizer
        if own_path or self._scorer.eos_token_ids is not None:
            return found
        return dataclasses.replace(found, eos_token_ids=self._endings() or found.eos_token_ids)

    def baseline(self, requests: Sequence[ScoreRequest], eos_token_ids: Sequence[int]) -> Baseline:
        """What they are, if they do. ``requests``: all that will be asked of them."""
        for server in self._servers:
            self._check_tokens(server, eos_token_ids)
        probe = _probe(self._prompts, self._context)
        chosen = self._check_answers(probe, requests)
        answers = {server.url: self._asked(server, probe) for server in self._servers}
        allowed = self._check_agreement(probe, answers)
        models = {url: card["id"] for url, card in self._cards.items()}
        return Baseline(models, probe, answers, self._facts.vocab_size, chosen, allowed)

    def _refusal(self, error: Exception, mend: str) -> InputError:
        return InputError(f"{self._name}.url={error}; {mend}")

    def _card(self, url: str) -> dict[str, Any]:
        """What a server says of its model."""
        given, variable = self._scorer.url_model, self._scorer.url_key_env
        try:
            cards = Server(url, key=self._key).models()
        except KeyRefused as error:
            mend = f"see the key in {variable}" if variable else "name the variable with its key: url_key_env"
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

    def _endings(self) -> tuple[int, ...]:
        """The tokens after which the servers' model stops: each that may end a text is tried, as the only one that may
        come next. Without a path there is no other way to know; a teacher that ends with others than the student would
        contradict every end (METHOD: sum P(stop) over both sets)."""
        tokens, prompt = ending_tokens(self._student.tokenizer)[:_MOST_ENDINGS], self._prompts[0]
        ends = partial(self._servers[0].ends_with, prompt, timeout_s=CONNECT_S)
        try:
            return tuple(token for token, last in zip(tokens, _at_once(ends, tokens), strict=True) if last)
        except ServerFailed as error:
            raise self._refusal(error, f"see its log, or give {self._name}.eos_token_ids") from None

    def _check_tokens(self, server: Server, eos_token_ids: Sequence[int]) -> None:
        """The student's token ids must be the same text to the server, those that end a response included."""
        tokenizer = self._student.tokenizer
        texts = [*_TEXTS, *(tokenizer.decode(prompt.tolist()) for prompt in self._prompts[:2])]
        try:
            for text in texts:
                ours = tokenizer(text, add_special_tokens=False)["input_ids"]
                if server.tokenize(text) != ours and server.detokenize(ours) != tokenizer.decode(ours):
                    self._refuse_tokens(server, ours, text)
            for eos in eos_token_ids:
                if (theirs := server.detokenize([eos])) != (ours := tokenizer.decode([eos])):
                    raise InputError(
                        f"{self._name}.url={server.url}: token {eos}, which ends a response, is {theirs!r} there but "
                        f"{ours!r} in {self._student.name}; serve a model of that tokenizer"
                    )
        except ServerFailed as error:
            raise self._refusal(error, "expected a vLLM server with its tokenizer (/tokenize, /detokenize)") from None

    def _refuse_tokens(self, server: Server, ours: Sequence[int], text: str) -> None:
        for token in ours:
            here, there = self._student.tokenizer.decode([token]), server.detokenize([token])
            if here != there:
                raise InputError(
                    f"{self._name}.url={server.url}: token {token} is {there!r} there but {here!r} in "
                    f"{self._student.name}; serve a model of that tokenizer"
                )
        raise InputError(
            f"{self._name}.url={server.url}: the student's tokens of {text!r} are another text there; serve a model of "
            "that tokenizer"
        )

    def _check_answers(self, probe: np.ndarray, requests: Sequence[ScoreRequest]) -> bool:
        """Do they give what the losses ask for? Returns whether they give log-probs of chosen tokens."""
        problems = filter(None, (self._cannot_choose(server, probe, requests) for server in self._servers))
        if (problem := next(problems, None)) is None:
            return True
        most = max(num_alternatives(request, self._facts.vocab_size) for request in requests)
        if any(request.given for request in requests):
            raise InputError(
                f"{self._name}.url={problem}; a support of student_top_k needs vLLM servers on CUDA that were started "
                f"with --enable-scale-out --max-logprobs {most}, or a teacher with engine=torch"
            )
        for server in self._servers:
            try:
                server.alternatives(probe, 1, most, _SCORE_S)
            except ServerRefused as error:
                raise self._refusal(error, f"start it with --max-logprobs {most}, or ask for a smaller top_k") from None
            except ServerFailed as error:
                raise self._refusal(error, "see its log") from None
        return False

    def _cannot_choose(self, server: Server, probe: np.ndarray, requests: Sequence[ScoreRequest]) -> str | None:
        """Why a server gives no log-probs of the chosen tokens that will be asked for; None where it does."""
        vocab_size = self._facts.vocab_size
        for request in dict.fromkeys(requests):
            given = np.tile(np.arange(min(request.top_k, vocab_size), dtype=np.int32), (len(probe) - 1, 1))
            ids = chosen_ids(Rollout(probe[:1], probe[1:], given), request, vocab_size)
            try:
                server.chosen(probe, 1, num_alternatives(request, vocab_size, chosen=True), ids, _SCORE_S)
            except (NotOffered, ServerRefused) as error:
                return str(error)
            except ServerFailed as error:  # it may be able to, when it is well
                raise self._refusal(error, "see its log") from None
        return None

    def _asked(self, server: Server, probe: np.ndarray) -> np.ndarray:
        try:
            return probe_opinion(probe)(server, _SCORE_S)
        except ServerFailed as error:
            raise self._refusal(error, "see its log") from None

    def _check_agreement(self, probe: np.ndarray, answers: Mapping[str, np.ndarray]) -> float:
        """Of every server with itself, and with the first; returns the distance that is allowed from now on.

        Each is asked alone, and again in a crowd: a batch of another shape is what moves log-probs.
        """
        scatter = {}
        for server in self._servers:
            crowd = [probe[: max(2, len(probe) - shorter)] for shorter in range(_AT_ONCE)]
            among_others = _at_once(partial(self._asked, server), crowd)
            far = [distance(answers[server.url][: len(each)], each) for each in among_others]
            scatter[server.url] = max(far)
        allowed = self._scorer.url_drift_nats or self._scorer.drift_nats(_SCATTER * max(scatter.values()))
        first = self._servers[0].url
        for url, own in scatter.items():
            if (far := own) > allowed:
                whom = "from itself, asked again"
            elif (far := distance(answers[url], answers[first])) > allowed:
                whom = f"from {first}"
            else:
                continue
            raise InputError(
                f"{self._name}.url={url}: its log-probs of {len(probe)} tokens differ {whom}, by {far:.3g} nats in the "
                f"mean, and {allowed:.3g} are allowed; serve one model, or set {self._name}.url_drift_nats"
            )
        return allowed


def looks(config: Config, models: Mapping[str, ModelFacts], data: Dataset) -> dict[str, Look]:
    """At the servers of every role that has some."""
    found = {}
    for role, scorer in config.scorers.items():
        if scorer.url:
            student, prompts = models["student"], data.prompts
            if role in data.translated:
                student, prompts = models[role], data.translated[role]
            some = [prompts[index] for index in range(min(len(prompts), _MOST_PROMPTS))]
            found[role] = Look(field_of(config, role), scorer, student, models[role], some)
    return found


def baselines(
    config: Config,
    found: Mapping[str, Look],
    eos_token_ids: tuple[int, ...],
    translations: Mapping[str, Translation],
) -> dict[str, Baseline]:
    """Of every role that has servers."""
    asked = score_requests(config, eos_token_ids).values()
    made = {}
    for role, look in found.items():
        requests, ends = [each[role] for each in asked if role in each], eos_token_ids
        if role in translations:
            ends = translations[role].own_stop_token_ids
            requests = [ScoreRequest(stop_token_ids=ends)]
        made[role] = look.baseline(requests, ends)
    return made


def _at_once(ask: Callable[[Any], Any], what: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(ask, what))


def _probe(prompts: Sequence[np.ndarray], context: int | None) -> np.ndarray:
    """The first prompts one behind the other, as many tokens as fit."""
    tokens = np.concatenate(prompts)[: min(_PROBE_TOKENS, context or _PROBE_TOKENS)]
    return np.tile(tokens, 2)[: max(2, len(tokens))]
