"""A vLLM server over HTTP: what is asked of it, and what each failure means.

It speaks vLLM's OpenAI-style protocol in token ids and knows nothing of rollouts, other servers or the run.
"""

from __future__ import annotations

import base64
import io
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from opd_ray.errors import KeyRefused, NotOffered, ServerFailed, ServerRefused

CONNECT_S = 10.0
"""The most that it may take to reach a server, and to get an answer that needs no model."""
_PASSES = (401, 403, 408, 425, 429)
"""Client errors that are no verdict on the request: of the key, or of the moment."""
_KEYS = (401, 403)
_CHOSEN = "/inference/v1/generate"
"""Who scores chosen tokens; vLLM has it off by default and says 403 then, others do not have it."""
_NOT_OFFERED = (403, 404, 405, 501)
"""What is said of it where it is not served."""
_CLAMPED = -9999.0
"""What vLLM writes for -inf, which JSON has not."""
_LARGEST = 1e-3
"""Log-prob that rounding may make of certainty."""

logging.getLogger("httpx").setLevel(logging.WARNING)  # one line for every request


@dataclass(frozen=True)
class Key:
    """What servers let in with; it travels in memory alone, and never shows where things are printed."""

    value: str = field(repr=False)


def key_in(variable: str | None) -> Key | None:
    """What stands in an environment variable of this process; None where nothing does."""
    value = os.environ.get(variable, "").strip() if variable else ""
    return Key(value) if value else None


class Server:
    """One server; its methods may be called by many threads at once.

    Raises ServerFailed, with the URL and one line, for what another server may do better, or this one later, and
    ServerRefused for a request that it would refuse again.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        key: Key | None = None,
        most_at_once: int = 8,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """``model``: its name there, for all that needs one; ``transport``: another way than the network."""
        self.url, self._model = url, model
        headers = {"Authorization": f"Bearer {key.value}"} if key else {}
        limits = httpx.Limits(max_connections=most_at_once, max_keepalive_connections=most_at_once)
        self._client = httpx.Client(base_url=url, headers=headers, limits=limits, transport=transport)

    def models(self) -> list[dict[str, Any]]:
        """What it serves: at least ``id`` each; vLLM's name ``max_model_len`` and, for adapters, ``parent``."""
        listed = _at(self._ask("/v1/models", None, CONNECT_S), "data")
        if not isinstance(listed, list) or not all(isinstance(each, dict) and "id" in each for each in listed):
            raise ServerRefused(f"{self.url}: its /v1/models is no list of models; expected a vLLM server")
        return listed

    def tokenize(self, text: str) -> list[int]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        return _at(self._ask("/tokenize", body, CONNECT_S), "tokens")

    def detokenize(self, tokens: Sequence[int]) -> str:
        body = {"model": self._model, "tokens": [int(token) for token in tokens]}
        return _at(self._ask("/detokenize", body, CONNECT_S), "prompt")

    def ends_with(self, prompt: Sequence[int], token: int, timeout_s: float) -> bool:
        """Does the model's answer end after this token? It is the only one that may come."""
        body = {"prompt": [int(each) for each in prompt], "max_tokens": 2, "allowed_token_ids": [int(token)]}
        answer = self._ask("/v1/completions", {"model": self._model, **body}, timeout_s)
        return _at(answer, "choices", 0, "finish_reason") == "stop"

    def alternatives(
        self, tokens: Sequence[int], first: int, asked: int, timeout_s: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log-probs and ids, [T, 1 + asked] each, of the T tokens from position ``first`` on: the token itself, then
        the most probable ones."""
        tokens = [int(token) for token in tokens]
        body = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": asked}
        answer = self._ask("/v1/completions", {"model": self._model, **body}, timeout_s)
        return self._columns(_at(answer, "choices", 0, "prompt_logprobs"), tokens, first, asked)

    def chosen(
        self, tokens: Sequence[int], first: int, asked: int, ids: np.ndarray, timeout_s: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same, and the log-probs [T, n] of chosen ``ids`` [T, n]. Raises NotOffered: only some servers can."""
        tokens = [int(token) for token in tokens]
        sampling = {
            "max_tokens": 1,
            "temperature": 0,
            "detokenize": False,
            "prompt_logprobs": asked or None,
            "prompt_logprob_token_ids": ids.tolist(),
            "prompt_logprob_start": first - 1,
        }
        body = {"model": self._model, "token_ids": tokens, "sampling_params": sampling}
        answer = self._ask(_CHOSEN, body, timeout_s)
        if (encoded := _at(answer, "prompt_token_id_logprobs")) is None:
            raise NotOffered(f"{self.url}: {_CHOSEN} gives no log-probs of chosen tokens")
        try:
            found = np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
        except (TypeError, ValueError) as error:
            raise ServerFailed(f"{self.url}: gave no log-probs of chosen tokens ({error})") from None
        if found.shape != ids.shape or np.isnan(found).any():
            raise ServerFailed(f"{self.url}: gave log-probs of {found.shape} chosen tokens for {ids.shape}")
        if not asked:
            return np.zeros((len(ids), 1), np.float32), np.zeros((len(ids), 1), np.int32), found
        return *self._columns(_at(answer, "prompt_logprobs"), tokens, first, asked), found

    def _columns(self, entries: Any, tokens: Sequence[int], first: int, asked: int) -> tuple[np.ndarray, np.ndarray]:
        """From vLLM's list of {token: {"logprob": ...}}, one for each position, of which the first has none."""
        if not isinstance(entries, list) or len(entries) != len(tokens):
            there = f"{len(entries)} for {len(tokens)} tokens" if isinstance(entries, list) else "none"
            raise ServerRefused(f"{self.url}: gives no prompt_logprobs ({there}); expected a vLLM server")
        logprobs = np.empty((len(tokens) - first, 1 + asked), np.float32)
        ids = np.empty((len(tokens) - first, 1 + asked), np.int32)
        try:
            for row, (token, entry) in enumerate(zip(tokens[first:], entries[first:], strict=True)):
                named = [(int(name), float(each["logprob"])) for name, each in entry.items()]
                own = dict(named)[token]
                # A token that is among the most probable ones is named once.
                others = [each for each in named if each[0] != token] if len(named) > asked else named
                others.sort(key=lambda each: -each[1])
                ids[row] = token, *(name for name, _ in others[:asked])
                logprobs[row] = own, *(value for _, value in others[:asked])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ServerFailed(
                f"{self.url}: its prompt_logprobs are not those of the tokens that were sent "
                f"({type(error).__name__}: {error})"
            ) from None
        logprobs[logprobs <= _CLAMPED] = -np.inf
        if not (logprobs <= _LARGEST).all():  # not a number, or a logit
            raise ServerFailed(f"{self.url}: gave no log-probs; start it with --logprobs-mode raw_logprobs")
        return logprobs, ids

    def _ask(self, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        """The answer, from JSON."""
        limit = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S))
        try:
            if body is None:
                response = self._client.get(path, timeout=limit)
            else:
                response = self._client.post(path, json=body, timeout=limit)
        except httpx.ConnectTimeout:
            raise ServerFailed(f"{self.url}: cannot be reached within {limit.connect:g} s") from None
        except httpx.TimeoutException:
            raise ServerFailed(f"{self.url}: gave no answer within {timeout_s:g} s") from None
        except httpx.HTTPError as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ServerFailed(f"{self.url}: cannot be reached ({reason})") from None
        if response.is_success:
            try:
                return response.json()
            except ValueError:
                raise ServerFailed(f"{self.url}: its answer to {path} is no JSON") from None
        said = f"{self.url}: {path} answers {response.status_code} ({_reason(response)})"
        if path == _CHOSEN and response.status_code in _NOT_OFFERED:
            raise NotOffered(said)
        if response.status_code in _KEYS:
            raise KeyRefused(said)
        if response.is_server_error or response.status_code in _PASSES:
            raise ServerFailed(said)
        raise ServerRefused(said)


def _at(answer: Any, *path: str | int) -> Any:
    """What stands there in nested JSON; None where nothing does."""
    for step in path:
        try:
            answer = answer[step]
        except (KeyError, IndexError, TypeError):
            return None
    return answer


def _reason(response: httpx.Response) -> str:
    """What the server says about its refusal, shortened to one line."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    text = _at(answer, "error", "message") or _at(answer, "error") or _at(answer, "detail") or response.text
    return " ".join(str(text).split())[:200] or response.reason_phrase
