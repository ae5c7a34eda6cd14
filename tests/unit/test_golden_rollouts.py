"""Golden rollouts in the object store: which parts of them a learner rank fetches."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from opd_ray.buffer.plan import plan_step
from opd_ray.config import from_dict
from opd_ray.learn.microbatch import collate, fetch_payloads
from opd_ray.messages import ROLLOUT_SCHEMA, Coefficients, RolloutMeta
from opd_ray.run import golden as module
from opd_ray.run.golden import GoldenRollouts
from small_messages import meta


def solutions(number: int, tokens: int) -> tuple[list[RolloutMeta], pa.RecordBatch]:
    """Row i responds with i, again and again."""
    metas = [
        meta(-1, rollout_id=f"golden-{row}", source="golden", num_prompt_tokens=2, num_response_tokens=tokens)
        for row in range(number)
    ]
    columns = dict.fromkeys(ROLLOUT_SCHEMA.names, [[]] * number)
    columns |= {name: [str(getattr(each, name)) for each in metas] for name in ("rollout_id", "prompt_id", "source")}
    columns |= {"slot": [-1] * number, "finish_reason": ["stop"] * number, "correct": [True] * number}
    columns |= {"prompt_tokens": [[1, 2]] * number, "text": ["x" * tokens] * number}
    columns["response_tokens"] = [np.full(tokens, row, np.int32) for row in range(number)]
    return metas, pa.RecordBatch.from_pydict(columns, schema=ROLLOUT_SCHEMA)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> GoldenRollouts:
    """10 MB of solutions."""
    monkeypatch.setattr(module.ray, "put", _Ref)
    golden = SimpleNamespace(hand_over=lambda: solutions(2000, 1000), mix=None, pairs=None)
    rollouts = GoldenRollouts(from_dict({}), golden)
    asyncio.run(rollouts.load())
    return rollouts


class _Ref:
    def __init__(self, payload: pa.RecordBatch) -> None:
        self.payload = payload


def test_a_rank_fetches_the_parts_with_rows_that_it_trains_on(loaded: GoldenRollouts) -> None:
    """The bug: each rank fetched the whole set, gigabytes of which it trains on a few rows."""
    entries = loaded.from_the_first_on().take(8, [])
    plans = plan_step(
        entries, step=0, num_ranks=4, micro_batch_tokens=4096, packing=True, coefficients=Coefficients(0, 1, 0, 0)
    )
    trained = []
    for plan in plans:
        payloads, lost = fetch_payloads(plan, lambda refs: [ref.payload for ref in refs])
        assert not lost
        assert len(payloads) <= 2, "of its two rows"
        assert sum(each.nbytes for each in payloads.values()) <= 2 * 2**20
        for batch in plan.micro_batches:
            [segment] = collate(batch, payloads, packing=True).segments
            assert [f"golden-{each[0]}" for each in segment.tokens.tokens.split(segment.lengths.tolist())] == list(
                segment.rollout_ids
            )
            trained += segment.rollout_ids
    assert sorted(trained) == sorted(entry.meta.rollout_id for entry in entries)


def test_every_row_is_in_one_part_of_about_a_mebibyte(loaded: GoldenRollouts) -> None:
    entries = loaded.from_the_first_on().take(2000, [])
    for entry in entries:
        assert entry.rollouts.payload["rollout_id"][entry.row].as_py() == entry.meta.rollout_id
    parts = {id(entry.rollouts): entry.rollouts.payload for entry in entries}
    assert 8 <= len(parts) <= 12
    assert sum(map(len, parts.values())) == 2000
