"""How the members of a transfer group meet, and how each proves that it is one of them.

Everyone who belongs to a group was told its secret, over Ray. Rank 0 listens at its node's address until all have come,
and no longer; whoever comes and does not know the secret is turned away, without having been told anything:

    rank 0 → member    a nonce
    member → rank 0    its rank, a nonce and its facts, under an HMAC of them and of rank 0's nonce
    rank 0 → member    everyone's facts, when all have come, under an HMAC of them and of the member's nonce

Facts are bytes by name, as addresses; they travel as JSON, never pickled. Nothing of this is encrypted: it needs a
network in which no stranger reads or changes what others send (docs/security.md).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Mapping

import torch

from opd_ray.messages import TransferGroup
from opd_ray.rooms import logs

_NONCE_BYTES = _PROOF_BYTES = 32
_MOST_BYTES = 2**16
"""Of one member's message: a stranger can make nobody read more."""
_PROOF_S = 5.0
"""How long one who has come may take to prove itself."""
_AGAIN_S = 0.05
_log = logs.get(__name__)


def meet(group: TransferGroup, facts: Mapping[str, bytes]) -> dict[str, bytes]:
    """Everyone's facts. Blocks until all members have come, or raises OSError by the group's timeout."""
    words = {name: base64.b64encode(value).decode() for name, value in facts.items()}
    meeting = _receive(group, words) if group.rank == 0 else _come(group, words)
    found = asyncio.run(meeting)
    return {name: base64.b64decode(value) for name, value in found.items()}


def prove(secret: str, rank: int, world_size: int, exchange: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Raises PermissionError unless every member that this one is connected to knows the secret, each asked over the
    very connection that will be used.

    Called by all at once. ``exchange``, of [world_size, 32] bytes: gives row j to member j, returns what each gave us.
    """
    ours = torch.frombuffer(bytearray(secrets.token_bytes(world_size * _NONCE_BYTES)), dtype=torch.uint8).view(-1, 32)
    theirs = exchange(ours)
    proofs = [_proof(secret, f"{rank} to {other}", nonce) for other, nonce in enumerate(map(_bytes, theirs))]
    given = exchange(torch.frombuffer(bytearray(b"".join(proofs)), dtype=torch.uint8).view(-1, 32))
    for other, (proof, nonce) in enumerate(zip(map(_bytes, given), map(_bytes, ours), strict=True)):
        if not hmac.compare_digest(proof, _proof(secret, f"{other} to {rank}", nonce)):
            raise PermissionError(f"whoever is connected as rank {other} does not know the group's secret")


async def _receive(group: TransferGroup, facts: dict[str, str]) -> dict[str, str]:
    """Rank 0's side."""
    missing, all_here, turned_away = set(range(1, group.world_size)), asyncio.Event(), []
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        with contextlib.closing(writer):
            try:
                writer.write(nonce)
                async with asyncio.timeout(_PROOF_S):
                    message = await _read(reader, _MOST_BYTES, group.secret, "to rank 0", nonce)
                missing.remove(rank := message["rank"])
            except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
                stranger = writer.get_extra_info("peername")
                turned_away.append(stranger)
                _log.warning("weights: %s came to the meeting of a group and was turned away: %r", stranger, error)
                return
            serving.add(asyncio.current_task())
            facts.update(message["facts"])
            if not missing:
                all_here.set()
            await all_here.wait()
            writer.write(_framed(facts, group.secret, f"to rank {rank}", bytes.fromhex(message["nonce"])))
            await writer.drain()

    server = await asyncio.start_server(serve, group.host, group.port)
    if not missing:
        all_here.set()
    try:
        async with asyncio.timeout(group.timeout_s):
            await all_here.wait()
            server.close()
            await asyncio.gather(*serving, return_exceptions=True)
    except TimeoutError:
        strangers = f", {len(turned_away)} strangers did" if turned_away else ""
        raise TimeoutError(f"rank {min(missing, default=0)} did not come{strangers}") from None
    finally:
        server.close()  # not waiting for strangers, who may say nothing for a while
    return facts


async def _come(group: TransferGroup, facts: dict[str, str]) -> dict[str, str]:
    """Another member's side."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    message = {"rank": group.rank, "nonce": nonce.hex(), "facts": facts}
    try:
        return await asyncio.wait_for(_ask(group, message, nonce), group.timeout_s)
    except TimeoutError:
        raise TimeoutError("rank 0 did not answer, or others did not come") from None


async def _ask(group: TransferGroup, message: object, nonce: bytes) -> dict[str, str]:
    """Goes to rank 0 as soon as it is there, and waits for what it says."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):  # rank 0 is not there yet
            reader, writer = await asyncio.open_connection(group.host, group.port)
            break
        await asyncio.sleep(_AGAIN_S)
    with contextlib.closing(writer):
        try:
            theirs = await reader.readexactly(_NONCE_BYTES)
            writer.write(_framed(message, group.secret, "to rank 0", theirs))
            most = _MOST_BYTES * group.world_size
            return await _read(reader, most, group.secret, f"to rank {group.rank}", nonce)
        except EOFError:
            raise ConnectionError("rank 0 turned this member away, or ended") from None


def _framed(message: object, secret: str, way: str, nonce: bytes) -> bytes:
    body = json.dumps(message).encode()
    return len(body).to_bytes(4) + _proof(secret, way, nonce + body) + body


async def _read(
    reader: asyncio.StreamReader, most_bytes: int, secret: str, way: str, nonce: bytes
) -> dict[str, object]:
    """A message of one who knows the secret."""
    length = int.from_bytes(await reader.readexactly(4))
    if length > most_bytes:
        raise ValueError(f"a message of {length} bytes; a member's has at most {most_bytes}")
    proof, body = await reader.readexactly(_PROOF_BYTES), await reader.readexactly(length)
    if not hmac.compare_digest(proof, _proof(secret, way, nonce + body)):
        raise PermissionError("it does not know the group's secret")
    return json.loads(body)


def _proof(secret: str, way: str, content: bytes) -> bytes:
    return hmac.digest(bytes.fromhex(secret), f"{way}\n".encode() + content, hashlib.sha256)


def _bytes(row: torch.Tensor) -> bytes:
    return bytes(row.tolist())
