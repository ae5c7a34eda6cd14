"""What needs several CUDA devices: ranks of ZeRO-3 that gather over NCCL while rank 0 sends over NCCL."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import learner_ranks
from learner_ranks import Host, Ranks
from opd_ray.config import from_dict
from opd_ray.messages import TransferGroup, WeightManifest
from opd_ray.rooms.node import free_port
from opd_ray.weights.transfer import WeightTransfer

NUM_GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ray,
    pytest.mark.deepspeed,
    pytest.mark.skipif(NUM_GPUS < 3, reason=f"needs three CUDA devices, and this machine has {NUM_GPUS}"),
]
LEARNER = {"num_ranks": 2, "gpus_per_rank": 1, "zero_stage": 3, "dtype": "bfloat16"}


class Receiver:
    """A member of the broadcast on a device of its own."""

    def __init__(self) -> None:
        self._transfer = WeightTransfer()

    def connect(self, group: TransferGroup) -> None:
        self._transfer.connect(group)

    def receive(self, manifest: WeightManifest) -> dict[str, torch.Tensor]:
        return {name: tensor.cpu() for name, tensor in self._transfer.receive(manifest)}


def test_a_split_student_reaches_a_receiver_over_nccl_again_and_again(ray_here: None, tiny_model: Any) -> None:
    """The deadlock: a gathering on one stream beside a broadcast on another. Each bucket here is one parameter."""
    ray.cloudpickle.register_pickle_by_value(learner_ranks)
    config = from_dict({"learner": LEARNER, "rollout": {"gpus_per_generator": 1}, "weights": {"timeout_s": 30}})
    path: Path = tiny_model["tied"]
    hosts = [ray.remote(num_gpus=1)(Host).remote(rank, config) for rank in range(2)]
    receiver = ray.remote(num_gpus=1)(Receiver).remote()
    address = ray.get(hosts[0].call.remote("node_address"))
    ray.get([host.call.remote("setup", *address, "5ec2e7") for host in hosts])
    ranks = Ranks(hosts, config, path, (1,))
    group = TransferGroup("nccl", "127.0.0.1", free_port(), 0, 2, 30.0, 1, "5ec2e7")
    joined = receiver.connect.remote(dataclasses.replace(group, rank=1))
    ranks.call("open_transport", group)
    ray.get(joined)
    expected = ranks.sent_weights()
    for version in range(1, 6):
        manifest = ranks.call("manifest", version)[0]
        received = receiver.receive.remote(manifest)
        ranks.call("send_weights", manifest)
        got = ray.get(received, timeout=60)
        assert all(torch.equal(got[name], tensor.cpu()) for name, tensor in expected.items())
