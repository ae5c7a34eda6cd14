"""A task whose verdicts misbehave on request; a module of its own, for the judging processes import it."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path


class Hostile:
    """The response says what the verifier does."""

    verify_limit_s = 1.0

    def load(self):
        pass

    def verify(self, response, row):
        return getattr(self, f"_{response}")(row)

    def _right(self, row):
        return True

    def _wrong(self, row):
        return False

    def _sleep(self, row):
        time.sleep(60)

    def _hold_the_gil(self, row):
        ctypes.PyDLL(None).sleep(60)

    def _die(self, row):
        os.kill(os.getpid(), signal.SIGKILL)

    def _eat_memory(self, row):
        return bool(bytearray(1 << 34))

    def _raise(self, row):
        raise RecursionError("too deep")

    def _say_exit(self, row):
        raise SystemExit

    def _stop(self, row):
        os.kill(os.getppid(), signal.SIGSTOP)
        time.sleep(60)

    def _meet(self, row):
        """Right once the other is here as well."""
        me, other = map(Path, row["files"])
        me.touch()
        while not other.exists():
            time.sleep(0.01)
        return True

    def _hang_known(self, row):
        """Holds the GIL once its process and the one above are written down."""
        Path(row["part"]).write_text(f"{os.getpid()} {os.getppid()}")
        os.replace(row["part"], row["pids"])
        return self._hold_the_gil(row)


class Unloadable(Hostile):
    def load(self):
        raise ImportError("no such library")
