"""Data sets of the Hub: read, kept in the cache for when there is no network, and refused in one line."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fake_hub import COMMIT, fake_hub
from opd_ray.data import hub
from opd_ray.data.rows import read_prompts
from tiny_checkpoints import refused

_READ = """
import json, sys
from opd_ray.data.rows import read_prompts
from opd_ray.errors import InputError
for source in json.loads(sys.argv[1]):
    try:
        print(json.dumps(read_prompts(source)))
    except InputError as error:
        print(json.dumps(str(error)))
"""
ROWS = [{"problem": "1+1=", "answer": "2", "level": 1}, {"problem": "2+2=", "answer": "4", "level": 2}]
EXPECTED = [{"id": "1", "prompt": "1+1=", "answer": "2"}, {"id": "2", "prompt": "2+2=", "answer": "4"}]


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


def read(home: Path, address: str, *sources: str) -> list[Any]:
    """What another process reads, or is told, from the Hub at ``address`` with its cache in ``home``."""
    environment = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": address, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _READ, json.dumps(sources)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_data_set_is_read_kept_and_read_again_without_a_network(tmp_path: Path) -> None:
    with fake_hub("org/data", {"train-0.parquet": parquet()}) as address:
        found, part, pinned, split, revision, missing = read(
            tmp_path,
            address,
            "org/data:train",
            "org/data/default:train[1:]",
            f"org/data:train@{COMMIT}",
            "org/data:trian",
            "org/data:train@v9",
            "org/other:train",
        )
    assert found == pinned == EXPECTED
    assert [row["prompt"] for row in part] == ["2+2="]
    assert split.startswith("org/data:trian: datasets cannot load it (Unknown split")
    assert revision.startswith("org/data:train@v9: the Hub has no such data set") and "\n" not in revision
    assert missing.startswith("org/other:train: the Hub has no such data set")

    kept, pinned, other = read(tmp_path, address, "org/data:train", f"org/data:train@{COMMIT}", "org/other:train")
    assert kept == EXPECTED
    for source, said in ((f"org/data:train@{COMMIT}", pinned), ("org/other:train", other)):
        assert said.startswith(f"{source}: the Hugging Face Hub cannot be reached (")
        assert ".to_parquet('rows.parquet'), and give that file" in said and "\n" not in said


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_waited_for_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        message = refused(lambda: read_prompts("org/data:train"))
    assert message.startswith("org/data:train: the Hugging Face Hub cannot be reached (")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("org/data:train", ("org/data", None, "train", None)),
        ("open-r1/OpenR1-Math-220k/all:train[:10%]@v1.0", ("open-r1/OpenR1-Math-220k", "all", "train[:10%]", "v1.0")),
        ("org/data", None),
        ("data/prompts.jsonl", None),
        ("C:/data/prompts.jsonl", None),
    ],
)
def test_how_they_are_written(source: str, parts: tuple[str | None, ...] | None) -> None:
    assert hub.is_hub(source) is (parts is not None)
    if parts:
        assert tuple(hub._NAME.fullmatch(source).groupdict().values()) == parts


def test_a_name_without_a_split_is_told_of_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(lambda: read_prompts("org/data"))
    assert "no such file" in message and "org/name:split of the Hugging Face Hub" in message


def test_a_data_set_without_any_column_that_is_read_is_told_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug: of a data set with none of the columns nothing was selected, and that ended in a traceback."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(hub, "_load", lambda *_, **__: datasets.Dataset.from_list([{"task": "1+1=", "label": "2"}]))
    message = refused(lambda: read_prompts("org/data:train"))
    assert message == (
        "org/data:train row 1: has no 'prompt' (it has: label, task); say which column it is, as "
        "data.columns={prompt: NAME}"
    )
    [row] = read_prompts("org/data:train", columns={"prompt": "task", "answer": "label"})
    assert row == {"id": "1", "prompt": "1+1=", "answer": "2"}
    monkeypatch.setattr(hub, "_load", lambda *_, **__: datasets.Dataset.from_list([]))
    assert refused(lambda: read_prompts("org/data:train")).startswith("org/data:train: has no rows")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'opd_ray[data]'" in refused(lambda: read_prompts("org/data:train"))
