"""What Ray starts as a worker where workers are preloaded: it has one forked, and lives as long as that one does.

    python -SE forked_worker.py SOCKET default_worker.py ...

Imports next to nothing, for it runs once for every worker. See preloaded_workers.py for the other end.
"""

from __future__ import annotations

import json
import os
import socket
import sys


def main() -> None:
    server, *arguments = sys.argv[1:]
    order = {"arguments": arguments, "directory": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        message = json.dumps(order).encode()
        socket.send_fds(connection, [len(message).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(message)
        connection.recv(1)  # nothing, when the worker has ended


if __name__ == "__main__":
    main()
