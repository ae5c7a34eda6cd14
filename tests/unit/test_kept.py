"""Tokens and verdicts of golden solutions are made once, for whatever run comes next."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerBase

from opd_ray.data import kept
from opd_ray.run import preflight
from opd_ray.tasks.judge import Judge
from tiny_checkpoints import CHARACTERS, configured, make_checkpoint, make_setting, refused, write_jsonl

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1), "response": f"#{i + 1}"} for i in range(4)]


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("OPD_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "FEW", 1)
    setting = make_setting(tmp_path) | {"data.golden_filter": "correct"}
    write_jsonl(Path(setting["data.golden"]), ROWS)
    return setting


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many responses were made into tokens, and how many were judged."""
    made: Counter[str] = Counter()
    call, ask = PreTrainedTokenizerBase.__call__, Judge.ask

    def counted(tokenizer: Any, text: Any, **options: Any) -> Any:
        made["tokens"] += len(text) if isinstance(text, list) else 0
        return call(tokenizer, text, **options)

    def asked(judge: Judge, method: str, questions: Any) -> Any:
        made["verdicts"] += len(questions) if method == "verify" else 0
        return ask(judge, method, questions)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", counted)
    monkeypatch.setattr(Judge, "ask", asked)
    return made


def trained(setting: dict[str, str]) -> dict[str, list[Any]]:
    return preflight.check_files(configured(setting)).data.golden.hand_over()[1].to_pydict()


def test_the_next_run_reads_what_the_first_has_made(setting: dict[str, str], made: Counter[str]) -> None:
    first = trained(setting)
    assert made == {"tokens": 4, "verdicts": 4}
    assert trained(setting) == first
    assert made == {"tokens": 4, "verdicts": 4}


@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], lambda _: b"", lambda _: b"no Parquet"]
)
def test_a_broken_file_is_made_anew(setting: dict[str, str], made: Counter[str], tmp_path: Path, damage: Any) -> None:
    first = trained(setting)
    files = sorted((tmp_path / "cache/golden").iterdir())
    assert len(files) == 2
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    assert trained(setting) == first
    assert made == {"tokens": 8, "verdicts": 8}
    assert trained(setting) == first
    assert made == {"tokens": 8, "verdicts": 8}


def test_a_flipped_byte_is_found_wherever_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPD_RAY_CACHE", str(tmp_path))
    tokens = pa.array([[number % 16, 7] for number in range(300)], pa.list_(pa.int32()))
    kept.keep("x", tokens)
    assert kept.find("x", tokens.type, 300).equals(tokens)
    assert kept.find("x", tokens.type, 299) is None
    file = tmp_path / "golden/x.parquet"
    content, damaged = file.read_bytes(), 0
    for at in range(len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        found = kept.find("x", tokens.type, 300)
        assert found is None or found.equals(tokens)
        damaged += found is None
    assert damaged > len(content) / 2


def test_what_decides_them_is_told_apart(setting: dict[str, str], made: Counter[str], tmp_path: Path) -> None:
    trained(setting)
    write_jsonl(Path(setting["data.golden"]), [ROWS[0] | {"answer": "7"}, *ROWS[1:]])
    assert "1 judged wrong (row 1)" in refused(lambda: trained(setting))
    assert made == {"tokens": 4, "verdicts": 8}, "another answer: other verdicts"
    swapped = [*CHARACTERS[:3], *reversed(CHARACTERS[3:])]
    for role in ("student", "teacher"):
        make_checkpoint(tmp_path / role, tokens=swapped)
    write_jsonl(Path(setting["data.golden"]), ROWS)
    assert trained(setting)["response_tokens"][0] == [0, swapped.index("1"), 1]
    assert made == {"tokens": 8, "verdicts": 8}, "another tokenizer: other tokens"


def test_where_there_was_no_verdict_it_is_asked_for_again(
    setting: dict[str, str], made: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine may have been why."""
    with monkeypatch.context() as patch:
        patch.setattr(
            Judge,
            "ask",
            lambda _, method, questions: [True, None, True, True] if method == "verify" else [True] * len(questions),
        )
        assert "gave up comparing" in refused(lambda: trained(setting))
    trained(setting)
    assert made["verdicts"] == 1


def test_few_are_not_kept_nor_what_nobody_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPD_RAY_CACHE", str(tmp_path))
    kept.keep("few", pa.array([True] * 128))
    assert not list(tmp_path.iterdir())
    many = pa.array([True] * 500)
    kept.keep("old", many)
    kept.keep("read", many)
    for name in ("old", "read"):
        os.utime(tmp_path / f"golden/{name}.parquet", (0, 0))
    assert kept.find("read", many.type, len(many)).equals(many)
    kept.keep("new", many)
    assert {each.stem for each in (tmp_path / "golden").iterdir()} == {"read", "new"}


def test_a_cache_that_cannot_be_written_changes_nothing(
    setting: dict[str, str], made: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_RAY_CACHE", "/dev/null/cache")
    assert trained(setting) == trained(setting)
    assert made == {"tokens": 8, "verdicts": 8}
