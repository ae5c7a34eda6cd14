"""A server that says what the Hugging Face Hub says of one data set, as far as the library `datasets` asks."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40


@contextlib.contextmanager
def fake_hub(name: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """Its address, while the block runs; the data set is ``name``, with ``files`` by file name."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(*self._found(self.path.partition("?")[0]))

        do_HEAD = do_GET

        def _found(self, path: str) -> tuple[int, bytes, dict[str, str]]:
            about, resolve = f"/api/datasets/{name}", f"/datasets/{name}/resolve/"
            if path.startswith(f"{about}/tree/"):
                listing = [
                    {"type": "file", "path": each, "size": len(data), "oid": each} for each, data in files.items()
                ]
                return 200, json.dumps(listing).encode(), {}
            if path in (about, f"{about}/revision/main", f"{about}/revision/{COMMIT}"):
                return 200, json.dumps({"id": name, "sha": COMMIT, "siblings": [], "tags": []}).encode(), {}
            if path.startswith(about):
                return 404, b"", {"X-Error-Code": "RevisionNotFound"}
            if not path.startswith(resolve):
                return 404, b"", {"X-Error-Code": "RepoNotFound"}
            file = path.rpartition("/")[2]
            if file not in files:
                return 404, b"", {"X-Error-Code": "EntryNotFound"}
            return 200, files[file], {"ETag": f'"{file}"', "X-Repo-Commit": COMMIT}

        def _answer(self, code: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
