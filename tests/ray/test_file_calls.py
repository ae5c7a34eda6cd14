"""Where the functions of files run on a real Ray: in threads beside the files, in tasks beside the payloads."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pyarrow as pa
import pytest
import ray

from opd_ray.errors import DeadlineError, PayloadLost, RunError, StorageUnavailable
from opd_ray.snapshots import Storage, read_arrays, read_batch, write_arrays, write_batch
from opd_ray.snapshots.calls import FileCalls

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]

ARRAYS = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "mask": np.array([True, False])}
BATCH = pa.record_batch({"tokens": [[1, 2], []]})
BOTH = pytest.mark.parametrize("local", [True, False])


def storage_for(local, directory):
    """Files of this node, or, by fsspec, of every node."""
    return Storage(directory) if local else Storage(f"local://{directory}")


def unavailable(storage, name, value):
    raise StorageUnavailable(f"{name}: SLOW_DOWN")


def ignore(value):
    """Nothing is kept, so that the object can go."""


def too_slow(storage):
    time.sleep(30)


@BOTH
def test_payloads_are_written_and_come_back_as_payloads(local, tmp_path):
    async def scenario():
        call, storage = FileCalls(local=local, deadline_s=60.0), storage_for(local, tmp_path)
        facts = await asyncio.gather(
            call(write_arrays, storage, "step-1/a", ray.put(ARRAYS)), call(write_batch, storage, "step-1/b", BATCH)
        )
        arrays, batch = await asyncio.gather(
            call.payload(read_arrays, storage, facts[0], "do this"),
            call.payload(read_batch, storage, facts[1], "do this"),
        )
        assert {name: array.tolist() for name, array in (await arrays).items()} == {
            name: array.tolist() for name, array in ARRAYS.items()
        }
        assert (await batch).equals(BATCH)

    asyncio.run(scenario())
    assert sorted(path.name for path in (tmp_path / "step-1").iterdir()) == ["a", "b"]


@BOTH
def test_our_errors_arrive_as_what_they_are(local, tmp_path):
    async def scenario():
        call, storage = FileCalls(local=local, deadline_s=60.0), storage_for(local, tmp_path)
        payload = ray.put(ARRAYS)
        with pytest.raises(StorageUnavailable, match="^a: SLOW_DOWN$"):
            await call(unavailable, storage, "a", payload)
        fact = await call(write_batch, storage, "missing", BATCH)
        storage.delete("missing")
        with pytest.raises(RunError, match="missing cannot be read: it is not there"):
            await call.payload(read_batch, storage, fact, "do this")

    asyncio.run(scenario())


@BOTH
def test_a_payload_that_is_gone_with_its_owner_is_told(local, tmp_path):
    @ray.remote(num_cpus=0)
    class Owner:
        def put(self):
            return [ray.put(np.zeros(10**6))]

    async def scenario():
        owner = Owner.remote()
        [ref] = await owner.put.remote()
        ray.kill(owner)
        async with asyncio.timeout(60):
            while True:  # until Ray knows
                await FileCalls(local=local, deadline_s=60.0)(ignore, ref)

    with pytest.raises(PayloadLost, match="an object that it needs is gone"):
        asyncio.run(scenario())


@BOTH
def test_what_takes_too_long_is_given_up(local, tmp_path):
    async def scenario():
        with pytest.raises(DeadlineError, match=r"too_slow did not end within 0\.5 s \(deadlines\.train_s\)"):
            await FileCalls(local=local, deadline_s=0.5)(too_slow, storage_for(local, tmp_path))

    began = time.monotonic()
    asyncio.run(scenario())
    assert time.monotonic() - began < 20, "nobody waits for its thread"
