"""A server that says what the Hugging Face Hub says of one repository, as far as its library and `datasets` ask."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote

import pytest

COMMIT = "a" * 40


@dataclass
class FakeRepository:
    """A repository of a fake Hub."""

    name: str
    commits: Mapping[str, Mapping[str, bytes]]
    """Files by file name, of each commit."""
    revisions: dict[str, str]
    """Branches and tags, and their commits; main is one."""
    kind: Literal["models", "datasets"] = "models"
    asked: list[str] = field(default_factory=list)
    """Paths of the questions what the repository, or a revision of it, is; in their order."""
    sent: list[str] = field(default_factory=list)
    """Names of the files that were sent."""

    def answer(self, method: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers."""
        about = f"/api/{self.kind}/{self.name}"
        resolve = f"{'' if self.kind == 'models' else '/datasets'}/{self.name}/resolve/"
        if path.startswith(f"{about}/tree/"):
            files = self._files(path.removeprefix(f"{about}/tree/").partition("/")[0])
            listing = [{"type": "file", "path": each, "size": len(data), "oid": each} for each, data in files.items()]
            return 200, json.dumps(listing).encode(), {}
        if path == about or path.startswith(f"{about}/revision/"):
            self.asked.append(path)
            commit = self._commit(path.removeprefix(about).removeprefix("/revision/") or "main")
            if commit is None:
                return 404, b"", {"X-Error-Code": "RevisionNotFound"}
            siblings = [{"rfilename": each} for each in self.commits[commit]]
            return 200, json.dumps({"id": self.name, "sha": commit, "siblings": siblings, "tags": []}).encode(), {}
        if path.startswith(about):
            return 404, b"", {"X-Error-Code": "RevisionNotFound"}
        if not path.startswith(resolve):
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        revision, _, file = path.removeprefix(resolve).partition("/")
        files = self._files(revision)
        if file not in files:
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        if method == "GET":
            self.sent.append(file)
        commit = self._commit(revision) or ""
        # As the Hub: an ETag is of the content.
        return 200, files[file], {"ETag": f'"{hash(files[file]) % 2**63:x}"', "X-Repo-Commit": commit}

    def _commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.revisions.get(revision)

    def _files(self, revision: str) -> Mapping[str, bytes]:
        return self.commits.get(self._commit(revision) or "", {})

    @contextlib.contextmanager
    def served(self) -> Iterator[str]:
        """Its address, while the block runs."""
        answer = self.answer

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                code, body, headers = answer(self.command, unquote(self.path.partition("?")[0]))
                self.send_response(code)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


@contextlib.contextmanager
def fake_hub(name: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """The address of a Hub with the data set ``name``, while the block runs; ``files`` by file name."""
    with FakeRepository(name, {COMMIT: files}, {"main": COMMIT}, "datasets").served() as address:
        yield address


def use_hub(patch: pytest.MonkeyPatch, address: str) -> None:
    """Has the library ask there, in this process."""
    patch.setattr("huggingface_hub.constants.ENDPOINT", address)
    patch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
