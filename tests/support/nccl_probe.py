"""NcclTransport against vLLM's trainer engine, with a communicator that only records.

Lives in the vLLM host process. It shows that both sides' arguments are those that the installed
vLLM takes, and that its checks of names, dtypes and shapes accept what we send.
"""

from __future__ import annotations

import threading
import time
from unittest import mock

import torch
from vllm.distributed.weight_transfer import nccl_engine

from opd_ray.errors import WeightSyncError
from opd_ray.generate.vllm import init_info, update_info
from opd_ray.messages import TransferGroup, WeightManifest
from opd_ray.weights.nccl import LimitedNcclInitInfo, NcclTransport


class NcclProbe:
    def broadcast(self, group: TransferGroup, manifest: WeightManifest, rounds: int) -> list[list[str]]:
        """The names of each round's broadcast, in the order in which they would be packed."""
        sent: list[list[str]] = []
        columns = zip(manifest.names, manifest.dtypes, manifest.shapes, strict=True)
        weights = [(name, torch.zeros(shape, dtype=getattr(torch, dtype))) for name, dtype, shape in columns]

        def record(iterator, group, src, post_iter_func, buffer_size_bytes, num_buffers):  # vLLM's producer
            sent.append([name for name, _ in iterator])

        endpoint = mock.patch.object(nccl_engine, "open_trainer_endpoint", return_value=mock.Mock())
        producer = mock.patch.object(nccl_engine, "packed_nccl_broadcast_producer", record)
        with endpoint, producer:
            transport = NcclTransport()
            transport.open(group)
            for _ in range(rounds):
                transport.send(manifest, iter(weights))
            transport.close()
        return sent

    def parsed(self, group: TransferGroup, manifest: WeightManifest) -> dict[str, object]:
        """What vLLM's worker reads from the engine's two calls."""
        joined = LimitedNcclInitInfo(**init_info("nccl", group))
        update = nccl_engine.NCCLWeightTransferUpdateInfo(**update_info("nccl", manifest))
        return {
            "port": joined.master_port,
            "rank": joined.rank_offset,
            "packed": joined.packed,
            "bucket_bytes": joined.packed_buffer_size_bytes,
            "timeout_s": joined.timeout_s,
            "shapes": update.shapes,
        }

    def send_to_a_stopped_member(self, group: TransferGroup, manifest: WeightManifest) -> tuple[float, list[str]]:
        """Seconds that a broadcast took which only an abort ends, and the errors of it and of the next one."""
        columns = zip(manifest.names, manifest.dtypes, manifest.shapes, strict=True)
        weights = [(name, torch.zeros(shape, dtype=getattr(torch, dtype))) for name, dtype, shape in columns]
        communicator = mock.Mock(disabled=False, device=torch.device("cuda"))
        aborted = threading.Event()
        communicator.nccl.ncclCommAbort = lambda _comm: aborted.set()

        def wait(iterator, group, src, post_iter_func, buffer_size_bytes, num_buffers):  # vLLM's producer
            assert aborted.wait(60) and communicator.disabled

        endpoint = mock.patch.object(nccl_engine, "open_trainer_endpoint", return_value=communicator)
        errors = []
        with endpoint, mock.patch.object(nccl_engine, "packed_nccl_broadcast_producer", wait):
            transport = NcclTransport()
            transport.open(group)
            start = time.monotonic()
            for _ in range(2):
                try:
                    transport.send(manifest, iter(weights))
                except WeightSyncError as error:
                    errors.append(str(error))
        return time.monotonic() - start, errors

    def join_without_the_others(self, group: TransferGroup) -> str:
        """The error of a rendezvous that never ends by itself."""
        forever = threading.Event()
        with mock.patch.object(nccl_engine, "open_trainer_endpoint", side_effect=lambda _info: forever.wait()):
            try:
                NcclTransport().open(group)
            except WeightSyncError as error:
                return str(error)
        return "it ended without an error"
