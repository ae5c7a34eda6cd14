"""What a run says it was made with."""

from __future__ import annotations

import json
import subprocess
import sys

from made_up_pages import report
from made_up_runs import make_run
from opd_ray.placement.nodes import Node
from opd_ray.run import provenance as module


def test_the_command_is_as_typed_without_keys(monkeypatch):
    typed = [
        "/opt/venv/bin/python",
        "jobs/stableopd.py",
        "student.path=a b",
        "checkpoint.directory=s3://id:key@bucket/x",
    ]
    monkeypatch.setattr(sys, "orig_argv", typed)
    assert module.command() == "python jobs/stableopd.py 'student.path=a b' checkpoint.directory=s3://bucket/x"


def test_the_commit_is_that_of_the_package_s_checkout_and_says_if_it_was_changed(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_PACKAGE", tmp_path)

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    git("init")
    (tmp_path / "__init__.py").write_text("")
    assert module.commit.__wrapped__() is None  # somebody else's checkout
    git("add", ".")
    git("commit", "-m", "first")
    assert module.commit.__wrapped__() == git("rev-parse", "HEAD").strip()
    (tmp_path / "__init__.py").write_text("1")
    assert module.commit.__wrapped__().endswith(" and changes")


def test_nodes_that_are_alike_are_one_line():
    cards = frozenset({"accelerator_type:H100", "GPU"})
    found = module.hardware(
        [Node("a", "a", 8, 4, 62e9, 1e9, cards), Node("b", "b", 8, 4, 62e9, 1e9, cards), Node("c", "c", 2, 0, 5e9, 1e9)]
    )
    assert found == ["2 nodes of 8 CPUs, 4 GPUs (H100), 62 GB for processes", "1 node of 2 CPUs, 5 GB for processes"]


def test_the_report_shows_it_of_an_unfinished_run_too(tmp_path):
    known = {"command": "python <x>", "commit": "abc", "versions": {"torch": "2"}, "hardware": ["1 node of 2 CPUs"]}
    (make_run(tmp_path / "a", finished=False) / "events.jsonl").write_text(
        "cut off\n"
        + json.dumps({"kind": "start", **known})
        + "\n"
        + json.dumps({"kind": "end", "text": '"start"'})
        + "\n"
    )
    page, _ = report(tmp_path / "a", make_run(tmp_path / "b", seed=2))
    for text in ("python &lt;x&gt;", "abc", "torch 2", "1 node of 2 CPUs"):
        assert f"<code>{text}</code>" in page
