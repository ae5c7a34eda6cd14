"""Which Ray a run joins, and what it says of one that it cannot join."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import grpc
import pytest
from ray._private import ray_constants

from opd_ray import config as configs
from opd_ray.config.binding import RUN, binding
from opd_ray.errors import InputError, RunError
from opd_ray.placement import launch
from opd_ray.placement.session import Session, cluster


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_address_at_which_nobody_answers_is_refused_at_once(monkeypatch, free_port):
    """The bug: Ray tried it again and again for minutes, and then came a traceback."""
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port}")
    match = rf"RAY_ADDRESS=127.0.0.1:{free_port}: nobody answers there .*; start a head"
    with pytest.raises(InputError, match=match), cluster():
        pytest.fail("joined a cluster that is not there")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "takes connections, but gave no sign of life within 0.5 s; start a head"),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", "is no head of a Ray cluster (unavailable)"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "is no head of a Ray cluster (unavailable)"),
    ],
    ids=["silent", "HTTP", "SSH"],
)
def test_whoever_is_no_head_of_a_cluster_is_told_within_the_deadline(monkeypatch, answer, said):
    """The bug: Ray waited for a silent one for ever."""
    monkeypatch.setattr("opd_ray.placement.session._CONNECT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        callers = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    callers.append(server.accept()[0])
                    if answer:
                        callers[-1].sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(InputError) as refusal, cluster():
            pytest.fail("joined something that is no cluster")
        assert str(refusal.value).startswith(f"RAY_ADDRESS={address}: ") and said in str(refusal.value)
        assert time.monotonic() - began < 5
        for caller in callers:
            caller.close()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, "it asks for another token, or for one at all; copy the head's"),
        (grpc.StatusCode.UNIMPLEMENTED, "is no head of a Ray cluster (unimplemented)"),
    ],
)
def test_a_head_that_turns_the_token_away_is_told_at_once(monkeypatch, code, said):
    """The bug: Ray printed the same line for ever."""

    class TurnsAway(grpc.GenericRpcHandler):
        def service(self, _details):
            return grpc.unary_unary_rpc_method_handler(lambda _request, context: context.abort(code, "no"))

    server = grpc.server(ThreadPoolExecutor(1), handlers=[TurnsAway()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        with pytest.raises(InputError) as refusal, cluster():
            pytest.fail("joined a cluster that turned it away")
        assert said in str(refusal.value)
    finally:
        server.stop(None)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "localhost", "host:port"])
def test_an_address_of_another_kind_is_refused(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    match = f"RAY_ADDRESS={address} is no HOST:PORT, .* hand the run in at its dashboard"
    with pytest.raises(InputError, match=match), cluster():
        pytest.fail("joined a cluster in another way")


@pytest.fixture
def session(monkeypatch) -> Session:
    """Rooms that a first run has started, following the student, with a teacher that writes."""
    monkeypatch.setattr(launch, "start_rooms", lambda *_, **__: object())
    writes = ["buffer.teacher_per_prompt=1", "loss.teacher.coef=1", "reference.update=average"]
    session = Session(configs.load(None, writes))
    session.rooms(configs.load(None, writes), 100)
    return session


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rollout.gpu_memory_utilization=0.5", "rollout.gpu_memory_utilization=0.85, but this run asks for 0.5"),
        ("rollout.node_resource=big", "rollout.node_resource=None, but this run asks for big"),
        ("student.max_context_tokens=90", "student.max_context_tokens=None, but this run asks for 90"),
        ("env.NCCL_DEBUG=INFO", "env.NCCL_DEBUG=None, but this run asks for INFO"),
        ("teacher.max_batch_tokens=64", "teacher.max_batch_tokens=8192, but this run asks for 64"),
        ("deadlines.score_s=5", "deadlines.score_s=600.0, but this run asks for 5.0"),
        ("reference.dtype=bfloat16", "reference.dtype=float32, but this run asks for bfloat16"),
        ("teacher.update=average", "teacher.update=fixed, but this run asks for average"),
        ("learner.num_ranks=2", "learner.num_ranks=1, but this run asks for 2"),
    ],
)
def test_a_run_that_needs_other_actors_is_kept_out_of_the_rooms(session, change, message):
    """The bug: five lists kept by hand had drifted, and arms of a study ran with another one's values unsaid."""
    with pytest.raises(RunError, match=f"the rooms were started with {message}"):
        session.rooms(configs.load(None, [change]), 100)


def test_a_writing_teacher_stays_the_one_that_the_rooms_have(session):
    writes = ["buffer.teacher_per_prompt=1", "loss.teacher.coef=1", "teacher.path=/another"]
    with pytest.raises(RunError, match=r"teacher.path=embedded, but this run asks for /another"):
        session.rooms(configs.load(None, writes), 100)


def test_what_needs_no_other_actor_may_change_from_run_to_run(session):
    changes = ["learner.lr=1e-4", "seed=4", "teacher.path=/another", "rollout.temperature=0.9", "learner.zero_stage=2"]
    rooms = session.rooms(configs.load(None, changes), 100)
    less = ["loss.reference.coef=0", "reference.dtype=bfloat16"]  # the reference is not asked anything
    assert session.rooms(configs.load(None, less), 100) is rooms


def test_every_field_of_the_method_binds_a_run():
    names = [doc.name for doc in configs.describe() if doc.name.startswith(("loss.", "data.golden", "buffer.golden"))]
    assert all(RUN in binding(configs.Config, name) for name in names)
    assert RUN in binding(configs.Config, "more_teachers.algebra.path")
    assert RUN not in binding(configs.Config, "more_teachers.algebra.num_actors")


def test_a_ray_of_one_machine_leaves_no_trace_for_a_cluster_that_is_joined_later(monkeypatch):
    """The bug: a notebook's driver called itself 127.0.0.1 in that cluster, where no other node found it."""
    seen = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", lambda *_, **__: seen.append(ray_constants.ENABLE_RAY_CLUSTER) or mock.Mock())
    monkeypatch.setattr("ray.shutdown", lambda: None)
    before = ray_constants.ENABLE_RAY_CLUSTER
    with cluster():
        assert seen == [False] and before == ray_constants.ENABLE_RAY_CLUSTER
