"""Every error that opd_ray raises on purpose, as one tree: an InputError is refused before a model
loads and the command exits with 2, a RunError is a failure while running and it exits with 1.

All of them carry one finished sentence: what was got, what was expected, where, and
what to do next. Ray pickles exceptions by ``args``, so the message is the only argument.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class OpdError(Exception):
    """Base of the tree; ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class InputError(OpdError):
    """Refused input or configuration. Nothing was loaded and nothing was written."""

    exit_code = 2


class RunError(OpdError):
    """A failure of a run that had started."""


class DeadlineError(RunError):
    """A wait reached its deadline; the message names the room, the actor and the node."""


class ActorError(RunError):
    """A worker raised; the message names it and repeats the cause."""


class MemberLost(ActorError):
    """A worker died, gave no answer or lost its engine; its call can go to another."""


class StartFailed(MemberLost):
    """A worker's constructor raised; another would most likely do the same."""


class GroupLost(ActorError):
    """A worker of a room that holds state (learner ranks, scorers that follow the student) is lost, and its state
    with it."""

    def __init__(self, message: str, room: str = "") -> None:
        super().__init__(message, room)
        self.room = room
        """Which room it is."""

    def __str__(self) -> str:
        return self.args[0]


class Terminated(RunError):
    """A signal ended the run; what was done is saved, or the message says that it is not."""

    exit_code = 143


class GuardStopped(RunError):
    """The guard ended the run, whose results are written: going on as it is configured would not mend it."""

    exit_code = 3


class PayloadLost(RunError):
    """An object in Ray's store is gone with the node that held it."""


class Unwritable(RunError):
    """A file of the run directory cannot be written, so that nothing would be left of the steps that follow."""


class StorageUnavailable(RunError):
    """A storage gave no answer, or an error that may pass by itself."""


class Superseded(RunError):
    """Another driver has taken over the checkpoints of the run; nothing of it is written or deleted any more."""


class EngineFailed(RunError):
    """An inference engine failed; it is not stepped again, and its worker is of no more use."""


class ServerFailed(RunError):
    """A server that scores gave no answer that is of use; another one may, or this one later."""


class ServerRefused(ServerFailed):
    """It says no to the request itself, and would again."""


class NotOffered(ServerFailed):
    """It does not know this kind of request."""


class KeyRefused(ServerFailed):
    """It lets nobody in with this key, or without one."""


class WeightSyncError(RunError):
    """A weight update did not reach every generation engine."""


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """For checks before a model loads: a RunError of the block becomes an InputError that begins with ``what``."""
    try:
        yield
    except RunError as error:
        raise InputError(f"{what}: {error}") from error


@contextlib.contextmanager
def only_said(what: str) -> Iterator[None]:
    """For the last words of a run that ends for another reason: what fails in the block is printed, behind ``what``."""
    try:
        yield
    except Exception as error:
        print(f"{what}: {error}", flush=True)


def near(name: str, known: Iterable[str]) -> str:
    """A clause that suggests what ``name`` may have meant: "; did you mean 'x'?" or a list."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(options)}"


def brief(error: Exception) -> str:
    """The first line of a foreign error, which may have many."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def first_failure(failures: BaseExceptionGroup) -> BaseException:
    """The failure that came first, out of a group of groups."""
    first = failures.exceptions[0]
    return first_failure(first) if isinstance(first, BaseExceptionGroup) else first
