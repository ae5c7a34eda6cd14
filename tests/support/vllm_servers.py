"""Real vLLM servers on this machine's CPU, each with an engine of its own.

    with VllmServers([path, path], python=executable) as servers:
        servers.urls; servers.swap(0, other_path); servers.stop(0)

Importing vLLM takes longer than all the rest, and a server of its own imports it twice: this file, run as a script, is
a server, in a process that has imported it before (preloaded_workers.py).
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from opd_ray.rooms.node import free_port

_START_S = 120.0
_SETTINGS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc, by which another model is loaded
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


class VllmServers:
    """One server for each path; they are up when the block begins."""

    def __init__(self, paths: Sequence[Path], *, python: str, max_model_len: int, key: str | None = None) -> None:
        self._python = python.split()
        self.paths, self._max_model_len, self._key = list(map(str, paths)), max_model_len, key
        self.urls: list[str] = []

    def __enter__(self) -> VllmServers:
        if importlib.util.find_spec("vllm") is None:
            pytest.skip("vLLM is not installed (the extras cpu and gpu bring it)")
        ports = [free_port() for _ in self.paths]
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        environment = os.environ | _SETTINGS
        self._processes = [
            subprocess.Popen(
                [*self._python, __file__, path, str(port), *self._arguments()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
            for path, port in zip(self.paths, ports, strict=True)
        ]
        until = time.monotonic() + _START_S
        for url in self.urls:
            while not _is_up(url):
                assert time.monotonic() < until, f"{url} did not come up within {_START_S:g} s"
                time.sleep(0.1)  # of another process's start nobody tells us
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(timeout=30)

    def _arguments(self) -> list[str]:
        given = {
            "--served-model-name": "tiny",
            "--dtype": "float32",
            "--max-model-len": str(self._max_model_len),
            "--max-num-seqs": "16",
            "--max-logprobs": "-1",
            "--kv-cache-memory-bytes": str(8 * 2**20),
            "--distributed-executor-backend": "uni",  # a worker in a process of its own would import vLLM once more
            "--worker-extension-cls": "opd_ray.weights.vllm_worker.WorkerExtension",
        } | ({"--api-key": self._key} if self._key else {})
        return [part for pair in given.items() for part in pair] + ["--enforce-eager", "--disable-log-stats"]

    def swap(self, number: int, path: Path) -> None:
        """Another model behind the same URL."""
        body = {"method": "opd_load", "args": [str(path)]}
        httpx.post(f"{self.urls[number]}/collective_rpc", json=body, timeout=60).raise_for_status()

    def stop(self, number: int) -> None:
        """As SIGKILL does; its engine goes with it."""
        self._processes[number].kill()
        until = time.monotonic() + 30
        while _is_up(self.urls[number]):
            assert time.monotonic() < until, f"{self.urls[number]} answers after it was killed"
            time.sleep(0.01)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.TransportError:
        return False


def _serve(path: str, port: str, *more: str) -> None:
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine import utils

    utils.get_mp_context = lambda: multiprocessing.get_context("fork")  # where there is no GPU, vLLM insists on spawn
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    command = ["--model", path, "--host", "127.0.0.1", "--port", port, "--uvicorn-log-level", "error", *more]
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(command)
    validate_parsed_serve_args(arguments)
    uvloop.run(run_server(arguments))


if __name__ == "__main__":
    _serve(*sys.argv[1:])
