"""How a transfer group's members meet, and what becomes of those who do not know its secret."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import psutil
import pytest
import torch

from opd_ray.errors import WeightSyncError
from opd_ray.messages import TransferGroup
from opd_ray.rooms.node import free_port
from opd_ray.weights.manifest import manifest_of
from opd_ray.weights.meeting import meet, prove
from opd_ray.weights.transfer import WeightTransfer
from rogue_member import join_by_torch


@pytest.fixture
def learner() -> TransferGroup:
    return TransferGroup("gloo", "127.0.0.1", free_port(), 0, 2, 10.0, 256, secret="5ec2e7" * 8)


@pytest.fixture
def threads():
    with ThreadPoolExecutor() as executor:
        yield executor


def other(learner: TransferGroup, **changes: object) -> TransferGroup:
    return dataclasses.replace(learner, rank=1, **changes)


def once_it_listens(port: int) -> None:
    """Ends when somebody does, without having connected."""
    ours = psutil.Process()
    deadline = threading.Event()
    for _ in range(500):
        if any(each.laddr.port == port and each.status == "LISTEN" for each in ours.net_connections("tcp")):
            return
        deadline.wait(0.01)
    raise AssertionError("nobody listened")


def test_everybody_is_told_everyone_s_facts(learner, threads):
    groups = [dataclasses.replace(learner, rank=rank, world_size=3) for rank in range(3)]
    told = threads.map(lambda group: meet(group, {f"of {group.rank}": bytes([group.rank, 255])}), groups)
    assert list(told) == [{"of 0": b"\0\xff", "of 1": b"\1\xff", "of 2": b"\2\xff"}] * 3


def test_one_who_is_alone_waits_for_nobody(learner):
    assert meet(dataclasses.replace(learner, world_size=1), {"a": b"b"}) == {"a": b"b"}


def _silent(stranger: socket.socket) -> None: ...


def _shouting(stranger: socket.socket) -> None:
    stranger.sendall(b"\xff" * 100)


def _unproven(stranger: socket.socket) -> None:
    body = json.dumps({"rank": 1, "nonce": "00", "facts": {}}).encode()
    stranger.sendall(len(body).to_bytes(4) + bytes(32) + body)


@pytest.mark.parametrize("behaves", [_silent, _shouting, _unproven])
def test_a_stranger_hears_a_nonce_and_nothing_more_and_the_others_meet_all_the_same(learner, threads, behaves):
    meeting = threads.submit(meet, learner, {"nccl": b"the group's id"})
    once_it_listens(learner.port)
    with socket.create_connection((learner.host, learner.port), timeout=5.0) as stranger:
        behaves(stranger)
        assert threads.submit(meet, other(learner), {}).result(5.0) == {"nccl": b"the group's id"}
        assert meeting.result(5.0)
        heard = _all_of(stranger)
    assert len(heard) <= 32


def _all_of(stranger: socket.socket) -> bytes:
    heard = b""
    try:
        while more := stranger.recv(4096):
            heard += more
    except ConnectionResetError:
        pass
    return heard


@pytest.mark.slow
def test_a_member_with_another_secret_is_turned_away(learner, threads):
    meeting = threads.submit(meet, dataclasses.replace(learner, timeout_s=0.5), {})
    with pytest.raises(ConnectionError, match="turned this member away"):
        meet(other(learner, secret="bad0" * 8), {})
    with pytest.raises(TimeoutError, match="rank 1 did not come, 1 strangers did"):
        meeting.result(5.0)


def test_a_second_one_of_the_same_rank_is_turned_away(learner, threads):
    """Also one that says again what a member has said: the nonce is another."""
    group = dataclasses.replace(learner, world_size=3)
    meeting = threads.submit(meet, group, {})
    first = threads.submit(meet, other(group), {})
    once_it_listens(group.port)
    second: list[Future[object]] = [threads.submit(meet, other(group), {}), first]
    done = next(each for each in _ended(second))
    assert isinstance(done.exception(), ConnectionError)
    meet(dataclasses.replace(group, rank=2), {})
    assert meeting.result(5.0) == {}


def _ended(futures: list[Future[object]]):
    from concurrent.futures import as_completed

    return as_completed(futures, timeout=5.0)


def test_a_member_believes_nothing_of_one_who_listens_in_rank_0_s_place(learner, threads):
    with socket.create_server((learner.host, learner.port)) as impostor:
        coming = threads.submit(meet, other(learner), {})
        connection, _ = impostor.accept()
        with connection:
            body = b"{}"
            connection.sendall(bytes(32) + len(body).to_bytes(4) + bytes(32) + body)
            with pytest.raises(PermissionError, match="does not know the group's secret"):
                coming.result(5.0)


def test_rank_0_listens_at_its_address_alone_and_no_longer_than_they_meet(learner, threads):
    ours = psutil.Process()
    before = {each.laddr for each in ours.net_connections() if each.status == "LISTEN"}
    meeting = threads.submit(meet, learner, {})
    once_it_listens(learner.port)
    new = {each.laddr for each in ours.net_connections() if each.status == "LISTEN"} - before
    assert new == {("127.0.0.1", learner.port)}
    meet(other(learner), {})
    meeting.result(5.0)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((learner.host, learner.port), timeout=1.0)


@pytest.mark.slow
def test_one_who_knows_torch_and_the_port_gets_no_weights(learner, threads):
    """It did: rank 0's store told everybody where gloo's members listen, and gloo took whoever came."""
    sender, receiver, sent = WeightTransfer(), WeightTransfer(), [("weight", torch.arange(4.0))]
    ready = threads.submit(sender.connect, learner)
    once_it_listens(learner.port)
    with pytest.raises(RuntimeError):
        join_by_torch(learner.host, learner.port, 1, 2, timeout_s=0.3)
    receiver.connect(other(learner))
    ready.result(5.0)
    manifest = manifest_of(sent, 1)
    sending = threads.submit(sender.send, manifest, sent)
    assert [tensor.tolist() for _, tensor in receiver.receive(manifest)] == [[0.0, 1.0, 2.0, 3.0]]
    sending.result(5.0)


def _exchanges(threads: ThreadPoolExecutor, secrets: list[str]) -> list[Future[None]]:
    """Everybody's proof, over connections of which each has another end."""
    barrier, table = threading.Barrier(len(secrets)), {}

    def exchange(rank: int, rows: torch.Tensor) -> torch.Tensor:
        table[rank] = rows
        barrier.wait(5.0)
        got = torch.stack([table[other][rank] for other in range(len(secrets))])
        barrier.wait(5.0)
        return got

    calls: list[Callable[[], None]] = [
        partial(prove, secret, rank, len(secrets), partial(exchange, rank)) for rank, secret in enumerate(secrets)
    ]
    return [threads.submit(call) for call in calls]


def test_each_proves_to_each_that_it_knows_the_secret(threads):
    assert [proof.result(5.0) for proof in _exchanges(threads, ["5ec2e7"] * 3)] == [None] * 3


def test_one_who_took_a_member_s_connection_is_found_out_by_all_whom_it_is_connected_to(threads):
    proofs = _exchanges(threads, ["5ec2e7", "bad0", "5ec2e7"])
    for honest in (proofs[0], proofs[2]):
        with pytest.raises(PermissionError, match="connected as rank 1 does not know"):
            honest.result(5.0)


def test_the_secret_is_not_shown(learner):
    assert learner.secret not in repr(learner)
    with pytest.raises(WeightSyncError) as caught:
        WeightTransfer().connect(dataclasses.replace(learner, timeout_s=0.1))
    assert learner.secret not in str(caught.value)
