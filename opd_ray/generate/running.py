"""The responses that run in TorchGenerationEngine, in arrays with a row for each: a step does nothing row by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opd_ray.generate.repeats import Repeats
from opd_ray.generate.sampling import uniform
from opd_ray.messages import Finished, FinishReason, GenerationRequest

_NO_TOKEN = -1


class Response:
    """A request and what was sampled for it when it last left the rows."""

    def __init__(self, request: GenerationRequest, budget: int) -> None:
        self.request, self.budget = request, budget
        self.tokens = np.empty(0, np.int32)
        self.logprobs = np.empty(0, np.float32)
        self.versions = np.empty(0, np.int32)
        self.topk_ids: list[np.ndarray] = []

    def finished(self, reason: FinishReason) -> Finished:
        return Finished(
            request_id=self.request.request_id,
            tokens=self.tokens,
            logprobs=self.logprobs,
            weight_versions=self.versions,
            finish_reason=reason,
            topk_ids=np.stack(self.topk_ids) if self.topk_ids else None,
        )


class Running:
    """``rows`` responses at most, the first of which are in use."""

    def __init__(self, rows: int) -> None:
        self.responses: list[Response] = []
        """Each in its row."""
        self._repeats = Repeats(rows)
        self._counts, self._budgets = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self._temperatures, self._top_ps = np.ones(rows, np.float32), np.ones(rows, np.float32)
        self._stops = np.full((rows, 1), _NO_TOKEN, np.int64)
        self._tokens = np.empty((rows, 0), np.int32)
        self._logprobs = np.empty((rows, 0), np.float32)
        self._versions = np.empty((rows, 0), np.int32)
        self._drawn = np.empty((rows, 0))
        """[rows, largest budget], like the three above."""

    def __len__(self) -> int:
        return len(self.responses)

    def enter(self, entering: Sequence[Response]) -> None:
        """Into the rows behind those in use."""
        self._widen(entering)
        rules = [(response.request.sampling.repetition_rule, response.tokens) for response in entering]
        self._repeats.enter(len(self), rules)
        for row, response in enumerate(entering, len(self)):
            sampling, done = response.request.sampling, len(response.tokens)
            self._counts[row], self._budgets[row] = done, response.budget
            self._temperatures[row], self._top_ps[row] = sampling.temperature, sampling.top_p
            self._stops[row] = _NO_TOKEN
            self._stops[row, : len(sampling.stop_token_ids)] = sampling.stop_token_ids
            self._tokens[row, :done] = response.tokens
            self._logprobs[row, :done] = response.logprobs
            self._versions[row, :done] = response.versions
            self._drawn[row, : response.budget] = uniform(response.request.seed, response.budget)
        self.responses += entering

    def last_tokens(self) -> np.ndarray:
        """[rows] int64, of responses that each have one."""
        rows = np.arange(len(self))
        return self._tokens[rows, self._counts[rows] - 1].astype(np.int64)

    def settings(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Temperature, top-p, and what the next token is drawn with: [rows] each."""
        rows = np.arange(len(self))
        return self._temperatures[: len(self)], self._top_ps[: len(self)], self._drawn[rows, self._counts[rows]]

    def append(self, tokens: np.ndarray, logprobs: np.ndarray, version: int) -> dict[int, FinishReason]:
        """The next token of each row; the rows that end with it, and why."""
        rows = np.arange(len(self))
        counts, budgets, stops = self._counts[rows], self._budgets[rows], self._stops[rows]
        self._tokens[rows, counts], self._logprobs[rows, counts] = tokens, logprobs
        self._versions[rows, counts] = version
        self._counts[rows] += 1
        ended: dict[int, FinishReason] = dict.fromkeys(self._repeats.extend(tokens), "repetition")
        ended |= dict.fromkeys(np.flatnonzero(counts + 1 >= budgets).tolist(), "length")
        return ended | dict.fromkeys(np.flatnonzero((stops == tokens[:, None]).any(1)).tolist(), "stop")

    def taken(self, row: int) -> Response:
        """The response of a row with what was sampled for it."""
        response, done = self.responses[row], self._counts[row]
        response.tokens = self._tokens[row, :done].copy()
        response.logprobs = self._logprobs[row, :done].copy()
        response.versions = self._versions[row, :done].copy()
        return response

    def leave(self, was: Sequence[int]) -> None:
        """Rows are left; for each, which one it was."""
        moved = [(row, before) for row, before in enumerate(was) if row != before]
        if moved:
            rows, before = map(list, zip(*moved, strict=True))
            for each in (self._counts, self._budgets, self._temperatures, self._top_ps, self._stops):
                each[rows] = each[before]
            for each in (self._tokens, self._logprobs, self._versions, self._drawn):
                each[rows] = each[before]
        self._repeats.leave(was)
        self.responses = [self.responses[row] for row in was]

    def _widen(self, entering: Sequence[Response]) -> None:
        """Room for the largest budget and the most stop tokens."""
        budget = max(response.budget for response in entering)
        if (more := budget - self._tokens.shape[1]) > 0:
            self._tokens, self._logprobs, self._versions, self._drawn = (
                np.pad(each, ((0, 0), (0, more)))
                for each in (self._tokens, self._logprobs, self._versions, self._drawn)
            )
        stops = max(len(response.request.sampling.stop_token_ids) for response in entering)
        if (more := stops - self._stops.shape[1]) > 0:
            self._stops = np.pad(self._stops, ((0, 0), (0, more)), constant_values=_NO_TOKEN)
