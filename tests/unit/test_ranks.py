"""Where a learner's ranks meet."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psutil

from opd_ray.learn import ranks
from opd_ray.rooms.node import free_port


def test_the_store_of_the_ranks_listens_at_its_address_alone_and_its_keys_are_the_group_s():
    where, limit = ("127.0.0.1", free_port()), timedelta(seconds=10)
    with ThreadPoolExecutor() as threads:
        ours, theirs = threads.map(lambda rank: ranks._store(rank, 2, where, "5ec2e7", limit), range(2))
    ours.set("address", "of rank 0")
    assert theirs.get("address") == b"of rank 0"
    stranger = ranks._store(1, 2, where, "bad0", limit)
    assert not stranger.check(["address"])
    sockets = psutil.Process().net_connections("tcp")
    assert {each.laddr.ip for each in sockets if each.laddr.port == where[1] and each.status == "LISTEN"} == {
        "127.0.0.1"
    }


def test_a_rank_that_is_alone_tells_nobody():
    assert ranks.everyones({"loss": 1.0}) == [{"loss": 1.0}]
