"""The student's weights, whole, one bucket after the other, on every rank.

ZeRO-3 leaves each rank a part of every parameter. NCCL answers two orders of gathering, or a gathering on one stream
beside a broadcast on another, by waiting for ever. Therefore every rank gathers the same buckets in the same order on
its default stream and waits for each before it goes on: rank 0 to send it, the others to drop it. Without that wait
they would hold the whole model while rank 0 sends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from opd_ray.rooms import spans
from opd_ray.weights import BUCKET_BYTES
from opd_ray.weights.manifest import manifest_of
from opd_ray.weights.transfer import plan_buckets


def whole_weights(
    weights: Sequence[tuple[str, torch.nn.Parameter]],
    device: torch.device,
    *,
    split: bool,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each of the ``weights`` of a model on ``device`` whole, in their order; a tied one once.

    Where ZeRO-3 has ``split`` them it is collective, every rank must take all of them, and one is valid until the next
    is asked for. Whoever takes them does so on the default stream.
    """
    parameters, manifest = dict(weights), manifest_of(weights, 0)
    if not split:
        yield from ((name, parameters[name].data) for name in manifest.names)
        return
    import deepspeed  # whose zero is no module that could be imported from

    with _default_stream(device) as stream:
        for bucket in plan_buckets(manifest, bucket_bytes):
            with ExitStack() as gathered:
                with spans.span("gather"):
                    whole = deepspeed.zero.GatheredParameters([parameters[part.name] for part in bucket])
                    gathered.enter_context(whole)
                    if stream is not None:
                        stream.synchronize()
                yield from ((part.name, parameters[part.name].data) for part in bucket)


@contextmanager
def _default_stream(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """Makes the default stream of ``device`` that of this thread, which vLLM may have given one of its own. None on a
    CPU."""
    if device.type != "cuda":
        yield None
        return
    stream = torch.cuda.default_stream(device)
    with torch.cuda.stream(stream):
        yield stream
