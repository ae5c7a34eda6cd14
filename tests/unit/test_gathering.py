"""What each rank does with a split student while it is broadcast: in which order, and on which stream."""

from __future__ import annotations

import pytest
import torch

from fake_streams import DEFAULT, SIDE, FakeStreams
from opd_ray.config import from_dict
from opd_ray.errors import WeightSyncError
from opd_ray.learn.learner import Learner
from opd_ray.messages import TransferGroup
from opd_ray.weights import gathering, transfer

BUCKET_BYTES = 72
BUCKETS = ["first.weight+first.bias", "second.weight", "third.weight"]


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gathering.whole_weights
    monkeypatch.setattr(
        "opd_ray.learn.learner.whole_weights",
        lambda weights, device, *, split: whole(weights, device, split=split, bucket_bytes=BUCKET_BYTES),
    )
    monkeypatch.setenv("DS_ACCELERATOR", "")  # which a learner sets


def send(rank: int, streams: FakeStreams, monkeypatch: pytest.MonkeyPatch) -> FakeStreams:
    """A ZeRO-3 rank sends its student once."""
    torch.manual_seed(0)
    parts = {"first": torch.nn.Linear(3, 2), "second": torch.nn.Linear(4, 4, bias=False)}
    model = torch.nn.ModuleDict(parts | {"third": torch.nn.Linear(2, 4, bias=False)})
    streams.install(monkeypatch)
    monkeypatch.setattr(transfer, "join", lambda group: streams)
    learner = Learner(from_dict({"learner": {"num_ranks": 2, "zero_stage": 3}}), rank)
    learner._device, learner._zero_stage = torch.device("cuda", 0), 3
    learner._model, learner._adapters = streams.split(model), None
    learner.open_transport(TransferGroup("nccl", "127.0.0.1", 1, 0, 2, 1.0, BUCKET_BYTES, "00"))
    learner.send_weights(learner.manifest(1))
    return streams


def gathered(streams: FakeStreams) -> list[tuple[str, ...]]:
    return [entry for entry in streams.journal if entry[0] != "broadcast"]


def test_each_bucket_is_gathered_sent_and_dropped_before_the_next_all_on_the_default_stream(monkeypatch) -> None:
    """The deadlock: rank 0 gathered inside a packed producer, bucket n + 1 on a side stream while bucket n was sent,
    when the other ranks gathered on their default streams."""
    header, *rest = send(0, FakeStreams(), monkeypatch).journal
    assert header == ("broadcast", "16", SIDE)
    sizes = dict(zip(BUCKETS, ("72", "64", "32"), strict=True))
    assert rest == [
        (what, with_what, DEFAULT)
        for names in BUCKETS
        for what, with_what in (("gather", names), ("wait", ""), ("broadcast", sizes[names]), ("release", names))
    ]


def test_the_other_ranks_gather_the_same_in_the_same_order_and_hold_one_bucket_at_a_time(monkeypatch) -> None:
    ours, theirs = (send(rank, FakeStreams(), monkeypatch) for rank in (0, 1))
    assert theirs.journal == gathered(ours)
    assert {stream for *_, stream in theirs.journal} == {DEFAULT}
    assert ours.current == theirs.current == SIDE, "the thread's stream was not put back"


@pytest.mark.parametrize("broken_at", [0, 1, 2, 3])
def test_a_broadcast_that_breaks_off_leaves_no_rank_waiting_in_a_gathering(monkeypatch, broken_at: int) -> None:
    """The header is broadcast 0."""
    expected = gathered(send(1, FakeStreams(), monkeypatch))
    streams = FakeStreams(broken_at=broken_at)
    with pytest.raises(WeightSyncError, match="the connection broke"):
        send(0, streams, monkeypatch)
    assert gathered(streams) == expected
