"""A fake vLLM server: the protocol of tokens and prompt log-probs over a model of one table, and every way to fail.

``FakeServer.transport`` answers in the process; ``serving(fake)`` puts it behind a real port of this machine.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np

VOCAB_SIZE = 24
Failure = Callable[[str], tuple[int, Any] | None]
"""What a request to a path is answered instead, as (status, JSON or bytes); None for what is right. It may raise an
httpx.TransportError, or wait."""


def table(model: int, noise: float = 0.0, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    """[vocabulary, vocabulary] log-probs of each token behind each other one; ``noise`` as of another batch shape."""
    logits = np.random.default_rng(model).normal(size=(vocab_size, vocab_size)) * 2
    logits += np.random.default_rng(99).normal(size=logits.shape) * noise
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


class FakeServer:
    """Serves ``model`` as ``name``; what it does can be changed at any time."""

    def __init__(
        self, url: str = "http://one:8000", *, model: int = 0, name: str = "m", key: str | None = None
    ) -> None:
        self.url, self.name, self.key = url, name, key
        self.table = table(model)
        self.max_model_len, self.max_logprobs, self.chooses = 64, 1000, False
        self.fail: Failure = lambda path: None
        self.adapters: list[str] = []
        self.endings = (1,)
        """Tokens that it ends with."""
        self.words: Sequence[str] = [f"<{number}>" if number < 3 else chr(94 + number) for number in range(VOCAB_SIZE)]
        self.asked: list[tuple[str, Any]] = []
        """Path and body of every request."""

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self._over_httpx)

    def scored(self) -> list[list[int]]:
        """Every sequence that it was asked to score."""
        scoring = ("/v1/completions", "/inference/v1/generate")
        bodies = [body for path, body in self.asked if path in scoring and "allowed_token_ids" not in body]
        return [body.get("prompt") or body["token_ids"] for body in bodies]

    def answer(self, path: str, body: Any, authorization: str | None) -> tuple[int, Any]:
        """Status and JSON."""
        self.asked.append((path, body))
        if (failure := self.fail(path)) is not None:
            return failure
        if path.startswith(("/v1", "/inference")) and self.key and authorization != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        return self._answers[path](self, body) if path in self._answers else (404, {"detail": "Not Found"})

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        """[T - 1, vocabulary] behind each token but the last."""
        return self.table[list(tokens[:-1])]

    def _over_httpx(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else {}
        status, answer = self.answer(request.url.path, body, request.headers.get("Authorization"))
        return httpx.Response(status, content=answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def _models(self, body: Any) -> tuple[int, Any]:
        own = {"id": self.name, "max_model_len": self.max_model_len, "parent": None}
        return 200, {"data": [own, *({"id": each, "parent": self.name} for each in self.adapters)]}

    def _tokenize(self, body: Any) -> tuple[int, Any]:
        return 200, {"tokens": [self.words.index(each) for each in body["prompt"] if each in self.words]}

    def _detokenize(self, body: Any) -> tuple[int, Any]:
        return 200, {"prompt": "".join(self.words[token] for token in body["tokens"])}

    def _completions(self, body: Any) -> tuple[int, Any]:
        if only := body.get("allowed_token_ids"):
            return 200, {"choices": [{"finish_reason": "stop" if only[0] in self.endings else "length"}]}
        if problem := self._problem(body["prompt"], body["prompt_logprobs"]):
            return 400, {"error": {"message": problem}}
        return 200, {"choices": [{"prompt_logprobs": self._entries(body["prompt"], body["prompt_logprobs"])}]}

    def _generate(self, body: Any) -> tuple[int, Any]:
        if not self.chooses:
            return 403, {"error": {"message": "Scale-out endpoints are disabled."}}
        tokens, sampling = body["token_ids"], body["sampling_params"]
        ids = np.array(sampling["prompt_logprob_token_ids"])
        if (problem := self._problem(tokens, max(ids.shape[1], sampling["prompt_logprobs"] or 0))) is not None:
            return 400, {"error": {"message": problem}}
        rows = self.logprobs(tokens)[sampling["prompt_logprob_start"] :]
        found = np.where(ids < 0, -np.inf, np.take_along_axis(rows, ids.clip(min=0), 1)).astype(np.float32)
        np.save(file := io.BytesIO(), found)
        asked = sampling["prompt_logprobs"]
        return 200, {
            "prompt_logprobs": None if asked is None else self._entries(tokens, asked),
            "prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode(),
        }

    def _problem(self, tokens: Sequence[int], asked: int) -> str | None:
        if asked > self.max_logprobs:
            return f"Requested prompt logprobs of {asked}, which is greater than max allowed: {self.max_logprobs}"
        if len(tokens) >= self.max_model_len:
            return f"This model's maximum context length is {self.max_model_len} tokens."
        return None

    def _entries(self, tokens: Sequence[int], asked: int) -> list[Any]:
        """As vLLM writes them: none for the first token, then its own and the most probable ones, by id."""
        entries: list[Any] = [None]
        for token, row in zip(tokens[1:], self.logprobs(tokens), strict=True):
            ids = dict.fromkeys([token, *np.argsort(-row)[:asked].tolist()])
            entries.append({str(each): {"logprob": max(row[each], -9999.0), "rank": 1} for each in ids})
        return entries

    _answers = {
        "/v1/models": _models,
        "/tokenize": _tokenize,
        "/detokenize": _detokenize,
        "/v1/completions": _completions,
        "/inference/v1/generate": _generate,
    }


@contextlib.contextmanager
def serving(fake: FakeServer) -> Iterator[FakeServer]:
    """Behind a port of this machine, which is then its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else {}
            status, answer = fake.answer(self.path, body, self.headers.get("Authorization"))
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
