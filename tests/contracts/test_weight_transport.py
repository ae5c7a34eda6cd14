"""Broadcasts of weights: what is sent arrives bit for bit, or an error says why not."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import stopped_member
from engine_host import EngineHost
from opd_ray.errors import WeightSyncError
from opd_ray.messages import TransferGroup
from opd_ray.rooms.node import free_port
from opd_ray.weights import wires
from opd_ray.weights.manifest import manifest_of, weights_of
from opd_ray.weights.transfer import WeightTransfer, plan_buckets


def weights() -> list[tuple[str, torch.Tensor]]:
    """Several dtypes, an odd size, a scalar, and values that a cast or a sum would change."""
    torch.manual_seed(0)
    return [
        ("matrix", torch.randn(7, 5)),
        ("half", torch.randn(3).to(torch.bfloat16)),
        ("not_a_number", torch.tensor([math.nan, -0.0, math.inf])),
        ("scalar", torch.tensor(3.25)),
        ("transposed", torch.randn(4, 6).T),
        ("large", torch.randn(300)),
    ]


def group(rank: int, world_size: int, port: int, **changes: float) -> TransferGroup:
    settings = {"timeout_s": 20.0, "bucket_bytes": 256, "secret": stopped_member.SECRET} | changes
    return TransferGroup(backend="gloo", host="127.0.0.1", port=port, rank=rank, world_size=world_size, **settings)


@pytest.fixture
def port() -> int:
    return free_port()


def together(*calls: Callable[[], object]) -> list[object]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


def connect_all(port: int, num_receivers: int, **changes: float) -> tuple[WeightTransfer, list[WeightTransfer]]:
    """The sender and the receivers of a group."""
    members = [WeightTransfer() for _ in range(num_receivers + 1)]
    groups = [group(rank, num_receivers + 1, port, **changes) for rank in range(num_receivers + 1)]
    together(*(partial(member.connect, each) for member, each in zip(members, groups, strict=True)))
    return members[0], members[1:]


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


@pytest.mark.parametrize("bucket_bytes", [1, 64, 256, 2**20])
def test_two_receivers_get_every_bit(port: int, bucket_bytes: int) -> None:
    sender, receivers = connect_all(port, 2, bucket_bytes=bucket_bytes)
    sent = weights()
    manifest = manifest_of(sent, version=3)
    takes = [lambda r=receiver: list(r.receive(manifest)) for receiver in receivers]
    _, *received = together(lambda: sender.send(manifest, sent), *takes)
    for got in received:
        for (name, tensor), (got_name, got_tensor) in zip(sent, got, strict=True):
            assert (got_name, got_tensor.dtype, got_tensor.shape) == (name, tensor.dtype, tensor.shape)
            assert bits(got_tensor) == bits(tensor)


def test_a_group_carries_many_broadcasts(port: int) -> None:
    sender, (receiver,) = connect_all(port, 1)
    for version in range(3):
        sent = [("scale", torch.full((4,), float(version)))]
        manifest = manifest_of(sent, version)
        _, got = together(lambda s=sent, m=manifest: sender.send(m, s), lambda m=manifest: list(receiver.receive(m)))
        assert got[0][1].tolist() == [version] * 4


def test_received_tensors_outlive_the_next_bucket(port: int) -> None:
    """vLLM holds the tensors of a layer until all of them came; a reused buffer would overwrite them."""
    sender, (receiver,) = connect_all(port, 1, bucket_bytes=8)
    sent = [("first", torch.ones(4)), ("second", torch.zeros(4))]
    manifest = manifest_of(sent, 0)
    _, got = together(lambda: sender.send(manifest, sent), lambda: list(receiver.receive(manifest)))
    assert got[0][1].tolist() == [1.0] * 4


def test_a_broadcast_ends_for_nobody_before_all_are_through(port: int) -> None:
    """Who left earlier, as a learner does that had a group for joiners only, was taken for dead by a member that was
    still passing the last bucket on, over a slow network."""
    sender, receivers = connect_all(port, 2)
    sent = weights()
    manifest = manifest_of(sent, 0)
    with ThreadPoolExecutor(2) as threads:
        quick, slow = (receiver.receive(manifest) for receiver in receivers)
        ends = [threads.submit(sender.send, manifest, sent), threads.submit(list, quick)]
        for _ in sent:
            next(slow)
        time.sleep(0.3)
        assert not any(end.done() for end in ends)
        assert next(slow, None) is None
        assert len(ends[1].result()) == len(sent) and ends[0].result() is None


def test_buckets_keep_order_and_size() -> None:
    sent = weights()
    buckets = plan_buckets(manifest_of(sent, 0), bucket_bytes=256)
    assert [part.name for bucket in buckets for part in bucket] == [name for name, _ in sent]
    assert [part.name for part in buckets[-1]] == ["large"]
    assert all(bucket[-1].end <= 256 for bucket in buckets[:-1])


def test_a_missing_member_ends_the_wait_by_the_timeout(port: int) -> None:
    with pytest.raises(WeightSyncError, match=rf"rank 0 of 2 could not join .* within 0\.3 s .*127\.0\.0\.1:{port}"):
        WeightTransfer().connect(group(0, 2, port, timeout_s=0.3))


def test_a_missing_sender_ends_the_wait_by_the_timeout(port: int) -> None:
    with pytest.raises(WeightSyncError, match="rank 1 of 2 could not join .* rank 0 did not answer"):
        WeightTransfer().connect(group(1, 2, port, timeout_s=0.3))


def test_a_silent_sender_ends_the_wait_by_the_timeout(port: int) -> None:
    _sender, (receiver,) = connect_all(port, 1, timeout_s=1.0)
    with pytest.raises(WeightSyncError, match="rank 1 of 2 could not receive the header within 1 s"):
        list(receiver.receive(manifest_of(weights(), 0)))


def test_a_member_that_is_stopped_ends_a_broadcast_for_all_and_the_rest_goes_on_without_it(port: int) -> None:
    timeout_s, large = 2.0, stopped_member.weights()
    groups = [group(rank, 3, port, timeout_s=timeout_s, bucket_bytes=4_000_000) for rank in range(3)]
    sender, receiver, manifest = WeightTransfer(), WeightTransfer(), manifest_of(large, 1)
    with stopped_member.stopped_member(groups[2], "receiving") as process, ThreadPoolExecutor(2) as threads:
        together(lambda: sender.connect(groups[0]), lambda: receiver.connect(groups[1]))
        ends = [
            threads.submit(lasted, WeightSyncError, sender.send, manifest, large),
            threads.submit(lasted, WeightSyncError, lambda: list(receiver.receive(manifest))),
        ]
        stopped_member.wait_until_stopped(process)
        assert all(end.result() < timeout_s + 1.5 for end in ends)

        new = group(0, 2, free_port(), timeout_s=20.0)
        together(lambda: sender.connect(new), lambda: receiver.connect(dataclasses.replace(new, rank=1)))
        _, got = together(lambda: sender.send(manifest, large), lambda: list(receiver.receive(manifest)))
    assert all(torch.equal(tensor, wanted) for (_, tensor), (_, wanted) in zip(got, large, strict=True))


def test_a_member_that_dies_in_the_middle_of_a_tensor_ends_a_broadcast_for_all_at_once(port: int) -> None:
    """Also for those that do not hear from it themselves."""
    large = stopped_member.weights()
    groups = [group(rank, 4, port, timeout_s=60.0, bucket_bytes=4_000_000) for rank in range(4)]
    sender, receivers, manifest = WeightTransfer(), [WeightTransfer(), WeightTransfer()], manifest_of(large, 1)
    with stopped_member.stopped_member(groups[1], "receiving") as process, ThreadPoolExecutor(3) as threads:
        joins = [partial(receiver.connect, each) for receiver, each in zip(receivers, groups[2:], strict=True)]
        together(lambda: sender.connect(groups[0]), *joins)
        ends = [threads.submit(lasted, WeightSyncError, sender.send, manifest, large)]
        for receiver in receivers:
            ends.append(threads.submit(lasted, WeightSyncError, lambda r=receiver: list(r.receive(manifest))))
        stopped_member.wait_until_stopped(process)
        process.kill()
        assert all(end.result() < 30.0 for end in ends)


def test_a_wire_that_was_closed_neither_reads_nor_writes_tensors_any_more(port: int) -> None:
    """The memory of a broadcast that failed takes the next one; a sender's weights change in its next step."""
    sender, receiver = together(*(partial(wires.join, group(rank, 2, port, timeout_s=60.0)) for rank in range(2)))
    sent, taken = torch.ones(200_000_000, dtype=torch.uint8), torch.zeros(200_000_000, dtype=torch.uint8)
    sender.start(sent)
    receiver.start(taken)
    deadline = time.monotonic() + 30.0
    while not taken[1_000_000]:
        assert time.monotonic() < deadline
    receiver.close()
    had = taken.clone()
    with pytest.raises((RuntimeError, OSError)):
        sender.finish()
    sender.close()
    assert not had[-1]
    assert torch.equal(taken, had)


def test_a_learner_that_is_stopped_does_not_hold_those_who_join_it(port: int) -> None:
    """torch's store has no timeout for a server that takes connections and says nothing."""
    members = group(0, 3, port, timeout_s=1.0)
    with stopped_member.stopped_member(members, "hosting") as process:
        stopped_member.wait_until_stopped(process)
        joins = [partial(WeightTransfer().connect, dataclasses.replace(members, rank=rank)) for rank in (1, 2)]
        assert all(each < 3.5 for each in together(*(partial(lasted, WeightSyncError, join) for join in joins)))


def lasted(error: type[Exception], call: Callable[..., object], *args: object) -> float:
    """Seconds until it raised."""
    start = time.monotonic()
    with pytest.raises(error):
        call(*args)
    return time.monotonic() - start


def test_a_dead_receiver_is_reported(port: int) -> None:
    sender, receivers = connect_all(port, 1, timeout_s=1.0)
    receivers.clear()
    large = [("large", torch.zeros(4_000_000))]  # more than the sockets' buffers hold
    with pytest.raises(WeightSyncError, match="rank 0 of 2 could not send"):
        sender.send(manifest_of(large, 0), large)


@pytest.mark.parametrize("field", ["version", "names"])
def test_sides_that_disagree_on_the_manifest_stop(port: int, field: str) -> None:
    sender, (receiver,) = connect_all(port, 1, timeout_s=2.0)
    manifest = manifest_of(weights(), 5)
    other = {"version": 6, "names": tuple(reversed(manifest.names))}[field]
    expected = dataclasses.replace(manifest, **{field: other})
    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(sender.send, manifest, weights()[:1])
        with pytest.raises(WeightSyncError, match="the sender announced version 5"):
            list(receiver.receive(expected))
        assert isinstance(sending.exception(), WeightSyncError)


def test_parameters_that_are_not_the_announced_ones_are_refused(port: int) -> None:
    sender, _ = connect_all(port, 0)
    with pytest.raises(WeightSyncError, match=r"announces matrix float32\[7, 5\].* sends other float32\[7, 5\]"):
        sender.send(manifest_of(weights(), 0), [("other", torch.randn(7, 5))])


def test_closing_twice_is_allowed(port: int) -> None:
    sender, _receivers = connect_all(port, 1)
    sender.close()
    sender.close()
    with pytest.raises(WeightSyncError, match="send was called before connect"):
        sender.send(manifest_of([], 0), [])


def test_what_is_in_no_group_sends_and_receives_nothing() -> None:
    with pytest.raises(WeightSyncError, match="send was called before connect"):
        WeightTransfer().send(manifest_of(weights(), 0), weights())
    with pytest.raises(WeightSyncError, match="receive was called before connect"):
        list(WeightTransfer().receive(manifest_of(weights(), 0)))


def test_a_tied_weight_arrives_under_both_names_and_is_sent_once() -> None:
    parts = {"embed_tokens": torch.nn.Embedding(4, 2), "lm_head": torch.nn.Linear(2, 4, bias=False)}
    model = torch.nn.ModuleDict(parts)
    model["lm_head"].weight = model["embed_tokens"].weight
    sent = weights_of(model)
    manifest = manifest_of(sent, 0)
    assert [name for name, _ in sent] == ["embed_tokens.weight", "lm_head.weight"]
    assert [part.name for bucket in plan_buckets(manifest, 256) for part in bucket] == ["embed_tokens.weight"]
    for given in (sent, sent[:1]):  # the learner gathers it once, under its first name
        sender, (receiver,) = connect_all(free_port(), 1)
        _, got = together(partial(sender.send, manifest, given), lambda r=receiver: list(r.receive(manifest)))
        assert [name for name, _ in got] == ["embed_tokens.weight", "lm_head.weight"]
        assert all(torch.equal(tensor, model["lm_head"].weight) for _, tensor in got)


def test_sides_that_disagree_on_what_is_tied_stop(port: int) -> None:
    """A receiver that was not told would keep its old output layer, without an error."""
    sender, (receiver,) = connect_all(port, 1, timeout_s=2.0)
    manifest = manifest_of(weights(), 5)
    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(sender.send, dataclasses.replace(manifest, tied=(("other", "matrix"),)), weights())
        with pytest.raises(WeightSyncError, match="another list of parameters"):
            list(receiver.receive(manifest))
        assert isinstance(sending.exception(), WeightSyncError)


@pytest.mark.vllm
def test_nccl_receivers_get_every_bit_as_well(vllm_host: EngineHost) -> None:
    """Without GPUs only as far as the installed vLLM's communicators, for which others stand in."""
    probe = vllm_host.build("nccl_probe:NcclProbe")
    groups = [dataclasses.replace(group(rank, 3, 4321), backend="nccl") for rank in range(3)]
    assert probe.broadcast(groups, 2) == [True] * 4


@pytest.mark.vllm
def test_an_nccl_wait_ends_by_the_timeout_and_its_group_is_not_used_again(vllm_host: EngineHost) -> None:
    """An aborted communicator returns from every further call at once, without an error."""
    probe = vllm_host.build("nccl_probe:NcclProbe")
    sender = dataclasses.replace(group(0, 3, 4321, timeout_s=0.5), backend="nccl")
    seconds, (first, second) = probe.send_to_a_stopped_member(sender)
    assert 0.5 <= seconds < 3.0
    assert "rank 0 of 3 could not send the header within 0.5 s (nccl group at 127.0.0.1:4321)" in first
    assert "before connect, or after a broadcast that failed" in second
    assert "could not join the group within 0.5 s (nccl group" in probe.join_without_the_others(sender)
