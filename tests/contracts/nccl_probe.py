"""NcclTransport against vLLM's trainer engine, with a communicator that only records.

Lives in the vLLM host process. It shows that both sides' arguments are those that the installed
vLLM takes, and that its checks of names, dtypes and shapes accept what we send.
"""

from __future__ import annotations

from unittest import mock

import torch
from vllm.distributed.weight_transfer import nccl_engine

from opd_ray.engines.vllm import init_info, update_info
from opd_ray.messages import TransferGroup, WeightManifest
from opd_ray.weights.nccl import NcclTransport


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
        joined = nccl_engine.NCCLWeightTransferInitInfo(**init_info("nccl", group))
        update = nccl_engine.NCCLWeightTransferUpdateInfo(**update_info("nccl", manifest))
        return {
            "port": joined.master_port,
            "rank": joined.rank_offset,
            "packed": joined.packed,
            "bucket_bytes": joined.packed_buffer_size_bytes,
            "shapes": update.shapes,
        }
