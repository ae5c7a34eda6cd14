"""Rooms that are up: started for one run, or kept for several runs one after another.

Starting the rooms (placement, imports, models, rendezvous) takes as long as a short run. A study therefore keeps
them, and each of its runs only loads its own student.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import ray
from ray._private import ray_constants
from ray.exceptions import AuthenticationError

from opd_ray.config import Config
from opd_ray.errors import InputError, RunError
from opd_ray.placement.wanted import Wanted
from opd_ray.rooms import Rooms, logs

if TYPE_CHECKING:
    from opd_ray.score.replicas import Baseline

_CONNECT_S = 10.0
_SIGN_OF_LIFE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""Of the service that every node of a cluster asks, as well."""
_OTHERWISE = "start a head with `ray start --head`, or unset RAY_ADDRESS for a Ray of the run's own"


@contextlib.contextmanager
def cluster() -> Iterator[str | None]:
    """The cluster of `ray job submit` or of RAY_ADDRESS, or a Ray of its own that ends with the block.

    Gives the address of its dashboard, if it has one and this call connected to it. Raises InputError where RAY_ADDRESS
    names no cluster that can be joined.
    """
    if ray.is_initialized():
        yield None
        return
    # It says with every start that token authentication is on, which is what we want.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    # A payload that is gone with its node is made again; Ray would complain of each that nobody asked for.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_address(address)
    try:
        with contextlib.nullcontext() if address else _on_loopback():
            context = ray.init(
                # Left alone, Ray would also try, for many minutes, a cluster that was once started on this machine.
                None if address else "local",
                logging_level="WARNING",
                log_to_driver=bool(os.environ.get("OPD_RAY_ACTOR_LOGS")),
                job_config=logs.job_config(),
            )
    except (ConnectionError, AuthenticationError, RuntimeError) as error:  # RuntimeError: of another version of Ray
        if not address:
            raise
        raise InputError(f"RAY_ADDRESS={address}: {' '.join(str(error).split())}; {_OTHERWISE}") from error
    try:
        yield context.dashboard_url
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started here has the loopback address, as on macOS, and listens there alone.

    What _node_ip_address="127.0.0.1" asks for, Ray takes for the address of the network. What sets this from outside,
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, is read when Ray is imported. It is as before afterwards: in a cluster that
    this process joins later, as a notebook may, it would call itself 127.0.0.1, where no other node finds it.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _check_address(address: str) -> None:
    """Raises InputError where no head of a cluster answers at an address; Ray would try it for many minutes, and the
    same with a token that is turned away."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise InputError(
            f"RAY_ADDRESS={address} is no HOST:PORT, as `ray start` prints it; from outside, hand the run in "
            "at its dashboard: `ray job submit --address http://HOST:8265 -- python jobs/stableopd.py`"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"RAY_ADDRESS={address}: nobody answers there ({error}); {_OTHERWISE}") from error
    if refusal := _refusal(address):
        raise InputError(f"RAY_ADDRESS={address}: {refusal}; {_OTHERWISE}")


def _refusal(address: str) -> str | None:
    """Why the head of a cluster gives no sign of life at an address where somebody listens; None where it does."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel  # with the token, and with TLS, as Ray itself connects

    channel = init_grpc_channel(address)
    try:
        channel.unary_unary(_SIGN_OF_LIFE)(b"", timeout=_CONNECT_S)
    except grpc.RpcError as error:
        code = error.code()
    else:
        return None
    finally:
        channel.close()
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return (
            "it asks for another token, or for one at all; copy the head's (`ray get-auth-token` prints it) to "
            "~/.ray/auth_token, or into RAY_AUTH_TOKEN, and set RAY_AUTH_MODE=token"
        )
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"it takes connections, but gave no sign of life within {_CONNECT_S:g} s"
    return f"who answers there is no head of a Ray cluster ({code.name.lower()}); expected its port, 6379 as a rule"


class Session:
    """Rooms for one run after another, all with the same actors and engines."""

    def __init__(self, *runs: Config, max_context_tokens: int = 0) -> None:
        """The rooms are those that any of ``runs`` needs, ``max_context_tokens`` is the longest that any of them asks
        for; by default the first run's own."""
        self._wanted, self._max_context_tokens = Wanted.of(runs) if runs else None, max_context_tokens
        self._rooms: Rooms | None = None

    def rooms(
        self, config: Config, max_context_tokens: int, servers: Mapping[str, Baseline] = MappingProxyType({})
    ) -> Rooms:
        """The rooms for a run: those of the run before, or new ones, whose actors are starting. ``servers``: by role
        that is scored by servers, what they are."""
        self._wanted = self._wanted or Wanted.of([config])
        for field, theirs, ours in self._wanted.unlike(config):
            raise RunError(
                f"the rooms were started with {field}={theirs}, but this run asks for {ours}; runs that share their "
                "rooms must agree on it"
            )
        if self._rooms is None:
            from opd_ray.placement import launch  # torch: whoever is refused before needs none

            self._max_context_tokens = max(self._max_context_tokens, max_context_tokens)
            self._rooms = launch.start_rooms(self._wanted, self._max_context_tokens, servers)
        if max_context_tokens > self._max_context_tokens:
            raise RunError(
                f"the rooms were started for sequences of at most {self._max_context_tokens} tokens, but this run has "
                f"prompt + response of up to {max_context_tokens}; begin with the run that has the longest"
            )
        return self._rooms

    @property
    def up(self) -> Rooms | None:
        """The rooms of the run before; None where none was started."""
        return self._rooms

    def close(self) -> None:
        """Ends the actors."""
        if self._rooms is not None:
            self._rooms.stop()
            self._rooms = None
