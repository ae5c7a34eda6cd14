"""The Protocol of generation engines: what a generator asks of an inference engine.

Engines know tokens. They know nothing of tasks, text, slots, Ray or the driver. An engine
is used from one thread at a time, but for what it does beside its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from opd_ray.errors import InputError
from opd_ray.messages import Finished, GenerationRequest, TransferGroup, WeightManifest

Unfinished = Literal["keep", "recompute", "restart"]


class GenerationEngine(Protocol):
    """Continuous batching of responses, with weights that change while responses are under way."""

    weight_version: int
    """Version of the weights that the next token will be sampled from; 0 at the start."""

    beside_steps: bool
    """May ``connect`` and ``receive``, one at a time, run in another thread than the rest?"""

    def submit(self, request: GenerationRequest) -> None:
        """Adds a request; it runs from the next step on."""

    def step(self) -> list[Finished]:
        """Advances every running response by about one token and returns those that ended."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drops unfinished requests; ``step`` will not return them. Unknown ids are ignored."""

    def connect(self, group: TransferGroup) -> None:
        """Joins the weight-transfer group; blocks until all members joined or the group's timeout.

        Tensor-parallel engines occupy the ranks ``group.rank`` … ``group.rank + tp - 1``.
        Called again, it leaves the former group first.
        """

    def receive(self, manifest: WeightManifest) -> None:
        """Takes one broadcast in, beside the weights in use: one that breaks off changes nothing."""

    def install(self, unfinished: Unfinished) -> None:
        """Serves what was received last from the next step on.

        "keep": unfinished responses go on with the keys and values that they have; what is submitted from now on
        has none of the old weights. "recompute": their next tokens equal a recompute of the prefix under the new
        weights. "restart": they are begun again from their prompt.
        """


def response_budget(request: GenerationRequest, max_context_tokens: int) -> int:
    """Tokens the response may take before it ends with "length": its budget, or what is left of the
    context. Raises InputError for a prompt that leaves no room."""
    room = max_context_tokens - len(request.prompt_tokens)
    if room < 1:
        raise InputError(
            f"request {request.request_id}: its prompt has {len(request.prompt_tokens)} tokens, but prompt and "
            f"response share a context of {max_context_tokens}; shorten the prompt or raise student.max_context_tokens"
        )
    return min(request.sampling.max_response_tokens, room)
