"""The golden rollouts of a run, in the object store."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import ray

from opd_ray.buffer.replay import GoldenSet
from opd_ray.config import Config
from opd_ray.data.golden import Golden
from opd_ray.data.orders import order_of
from opd_ray.messages import Entry
from opd_ray.rooms.threads import in_thread

_BLOCK_BYTES = 2**20


class GoldenRollouts:
    """Put into the object store once, for all attempts of a run, some rows to an object: a learner rank fetches those
    with rows that it trains on, where it fetched the whole set."""

    def __init__(self, config: Config, golden: Golden | None) -> None:
        self._config, self._golden = config, golden if config.loads_golden else None
        self._entries: list[Entry] | None = None
        self._rows: dict[str, int] = {}

    async def load(self) -> None:
        """Puts them there, where that was not done yet."""
        if self._golden is None or self._entries is not None:
            return
        metas, batch = self._golden.hand_over()
        places = await in_thread(lambda: list(_put(batch)))
        self._rows = {meta.rollout_id: row for row, meta in enumerate(metas)}
        self._entries = [Entry(meta, row, block) for meta, (block, row) in zip(metas, places, strict=True)]

    def asked(self, rollout_id: str) -> tuple[str, str]:
        """Prompt and expected answer of one of them; "" where unknown."""
        if (row := self._rows.get(rollout_id)) is None:  # of an earlier start, which had others
            return "", ""
        prompt, answer = (column[row].as_py() for column in self._golden.asked.columns)
        return prompt, answer

    def from_the_first_on(self) -> GoldenSet:
        """In the order in which steps take them."""
        config, entries = self._config, self._entries or []
        order = order_of(len(entries), self._golden and self._golden.mix, config.seed + 1, config.data.shuffle)
        paired = config.buffer.golden_pairing == "prompt"
        return GoldenSet(entries, order, self._golden.pairs if paired and self._golden else None)


def _put(batch: pa.RecordBatch) -> Iterator[tuple[ray.ObjectRef, int]]:
    """Where each row of a batch is then: its block, and its row in that."""
    rows = max(1, len(batch) * _BLOCK_BYTES // max(1, batch.nbytes))
    for start in range(0, len(batch), rows):
        # A slice would be sent with all that it is a slice of.
        block = batch.take(pa.array(np.arange(start, min(start + rows, len(batch)))))
        ref = ray.put(block)
        yield from ((ref, row) for row in range(len(block)))
