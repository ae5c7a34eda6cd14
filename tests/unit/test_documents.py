"""Every YAML and every command in the documents is one that would be taken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from documented_commands import ROOT, blocks, commands, problems
from made_up_runs import make_run
from run_documents import failures

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "cluster/**/*.md", "opd_ray/**/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_tells_to_type_would_be_taken(document: str) -> None:
    assert problems((ROOT / document).read_text(encoding="utf-8")) == []


def test_the_documents_have_something_to_check() -> None:
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "cluster/README.md", "opd_ray/recipes/README.md"} <= texts.keys()
    assert len(commands(texts["README.md"])) > 10
    assert len(commands(texts["docs/runs.md"])) > 5
    assert len(commands(texts["cluster/README.md"])) > 5
    assert blocks(texts["docs/cluster.md"], "yaml")
    assert texts["README.md"].count("\n") < 120, "one page to the first result; the ways on are in docs/"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings_that_are_there(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), path
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings]


def test_the_example_of_the_rollout_log_shows_wrong_answers_beside_what_was_expected(
    tmp_path, monkeypatch, capsys
) -> None:
    make_run(tmp_path / "runs" / "first", logged_steps=[1, 20])
    (example,) = blocks((ROOT / "docs" / "runs.md").read_text(encoding="utf-8"), "python")
    assert len([*filter(None, example.splitlines())]) == 3
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    shown = capsys.readouterr().out
    assert "What is 1+1?" in shown and "1+1=3" in shown and "1+1=2" not in shown
    assert shown.index("│    20 │") < shown.index("│     1 │")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```yaml\nlearner: {lrr: 1}\n```\n", "unknown field 'learner.lrr'"),
        ("```yaml\nlearner: {zero_stage: 7}\n```\n", "learner.zero_stage"),
        ("```\nopd-ray trian\n```\n", "no verb trian"),
        ("```\nopd-ray train --confg x\n```\n", "No such option"),
        ("```\nopd-ray train learner.lrr=1\n```\n", "unknown field 'learner.lrr'"),
        ("```\nray job submit -- \\\n    python jobs/stableopd.py --run-dir x seed=-1\n```\n", "seed"),
        ("or `python -m opd_ray status --jsn RUN`,", "No such option"),
        ("`python jobs/stable.py`", "there is no jobs/stable.py"),
        ("`PYTHONPATH=. python tests/support/a_million.py 4`", "there is no tests/support/a_million.py"),
        ("`opd-ray export RUN --step last`", "'last' is not a valid integer"),
        ("`python jobs/bench_loop.py --stepz 3`", "bench_loop.py has no --stepz"),
        ("`opd-ray train --config opd_ray/recipes/gkdd.yaml`", "there is no opd_ray/recipes/gkdd.yaml"),
        ("    python jobs/stableopd.py --config opd_ray/recipes/gkd.yaml learner.step=3\n", "learner.step"),
        ("```\nmake demmo    # all of it\n```\n", "no target demmo"),
        ('`make demo ARGS="learner.step=3"`', "learner.step"),
        ("`make setup DEVIZE=gpu`", "knows no DEVIZE"),
        ("with `guard.levl=stop`", "no field guard.levl"),
        ("with `guard.level=stopp`", "guard.level"),
        ("`buffer.max_stale`", "no field buffer.max_stale"),
        ("`~/venv/bin/opd-ray stat RUN`", "no verb stat"),
    ],
)
def test_what_would_be_refused_is_found(text: str, said: str) -> None:
    found = problems(text)
    assert len(found) == 1 and said in found[0]


def test_what_is_fine_is_left_alone() -> None:
    text = Path(ROOT / "README.md").read_text(encoding="utf-8")
    assert problems("`metrics.jsonl`, `elastic.*`, `loss.<source>`, `opd-ray --help`, `make`, makes more, `loss`") == []
    assert problems("`opd-ray report RUN [RUN ...]`") == []
    assert "make more" not in commands(text)


@pytest.mark.slow
@pytest.mark.parametrize("document", ["README.md", "docs/cluster.md", "cluster/README.md"])
def test_the_commands_of_a_document_run_in_a_fresh_account(document: str, tmp_path: Path) -> None:
    """The bug: "by hand" started a Ray that asks for a token, and nothing before it had made one."""
    assert failures((ROOT / document).read_text(encoding="utf-8"), tmp_path) == []


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("export RAY_AUTH_MODE=token\nray start --head", "there is no token"),
        ("source .venv/bin/activat", "No such file"),
        ("ray start --haed", "No such option"),
        ("ray job submti -- x", "no command submti"),
        ("ray job submit -- python -m opd_ray train learner.stepz=3", "learner.stepz"),
        ("ray up", "Missing argument"),
        ("kubectl apply -f cluster/kuberay.yaml", "there is no cluster/kuberay.yaml"),
        ("kubectl delete raycluster opd-rey", "no manifest makes opd-rey"),
        ("kubectl create secret generic token --from-literal=x=y", "no manifest takes a secret token"),
        ("aws cloudformation deploy --template-file cluster/aws/account.yaml x Bukket=b", "no parameter Bukket"),
        ("pip install '.[gpuu]'", "no extra gpuu"),
        ("ray stop\ncp .ci/lock.txt dist/", "cannot stat"),
        ("ray stop && terraform apply", "terraform"),
    ],
)
def test_what_would_fail_in_a_fresh_account_is_found(block: str, said: str, tmp_path: Path) -> None:
    found = failures(f"```\n{block}\n```\n", tmp_path)
    assert found and said in found[0]
