"""The model card, and the way of a student to the Hub. The Hub is a fake."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from opd_ray import config as configs
from opd_ray.__main__ import main
from opd_ray.run import push as module
from opd_ray.run.card import card, write_card

OWN = ["student.path=Qwen/Qwen2.5-Math-1.5B", "teacher.path=/models/t", "data.prompts=p", "data.evaluation=e"]
SCORES = {"accuracy_greedy": 0.5, "truncation_rate": 0.25, "repetition_rate": 0.0, "mean_length": 20.5}


def scores(accuracy: float, error: float | None = None, **sets: dict[str, Any]) -> dict[str, Any]:
    return SCORES | {"accuracy_sampled": accuracy, "accuracy_sampled_se": error, "num_problems": 30, "sets": sets}


def test_a_card_says_what_the_student_was_made_of_and_what_became_of_it() -> None:
    config = configs.load(
        None,
        [
            *(*OWN, "data.golden=g.jsonl", "seed=4", "learner.steps=7", "teacher.url=http://10.0.0.7"),
            *("env.WHO_KNOWS_WHAT=s3cret", "rollout.engine=vllm", "rollout.engine_args.hf_token=s3cret"),
        ],
    )
    aime, amc = ({"samples": 32, "accuracy_sampled": value} for value in (0.125, 0.5))
    text = card(config, {"eval_before": scores(0.25, 0.03), "eval_after": scores(0.75, 0.02, aime24=aime, amc=amc)})
    found = ModelCard(text)
    assert found.data.base_model == "Qwen/Qwen2.5-Math-1.5B"
    assert "stableopd" in found.data.tags and found.data.library_name == "transformers"
    for line in (
        "# stableopd: Qwen2.5-Math-1.5B after 7 steps",
        "| student | Qwen/Qwen2.5-Math-1.5B |",
        "| golden solutions | g.jsonl |",
        "| accuracy, sampled | 0.250 ± 0.030 | 0.750 ± 0.020 |",
        "| tokens per answer | 20.5 | 20.5 |",
        "| aime24, avg@32 | – | 0.125 |",
        "seed: 4",
    ):
        assert line in text.splitlines(), line
    assert "10.0.0.7" not in text and "s3cret" not in text
    assert "num_actors" not in text, "a default"


def test_a_card_without_an_evaluation_has_no_table_of_it(tmp_path: Path) -> None:
    config = configs.load(None, [*OWN, f"student.path={tmp_path}", "data.golden=g"])
    text = card(config, {"eval_before": None, "eval_after": None, "stopped_at": 3})
    assert "Before" not in text and "after 3 steps" in text
    assert ModelCard(text).data.base_model is None, "a directory is no name on the Hub"


class FakeHub:
    """Notes what is uploaded; ``fails`` names the call that raises ``error``."""

    fails, error = "", None

    def __init__(self) -> None:
        FakeHub.last, self.uploaded = self, {}

    def create_repo(self, repository: str, **how: Any) -> Any:
        self.how = how
        self._may_fail("create_repo")
        return type("Made", (), {"repo_id": repository, "__str__": lambda _: f"https://huggingface.co/{repository}"})()

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        self._may_fail("upload_folder")
        self.uploaded[repo_id] = {path.name for path in Path(folder_path).iterdir()}

    def _may_fail(self, call: str) -> None:
        if FakeHub.fails == call:
            raise FakeHub.error() if callable(FakeHub.error) else FakeHub.error


@pytest.fixture
def push(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Calls `opd-ray push` where a run lies in "run"; returns exit code and what was said."""
    monkeypatch.chdir(tmp_path)
    student = tmp_path / "run/student"
    student.mkdir(parents=True)
    (student / "config.json").write_text("{}")
    (tmp_path / "run/config.yaml").write_text(configs.to_yaml(configs.load()))
    write_card(student, tmp_path / "run")
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.setattr(FakeHub, "fails", "")

    def call(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            main(["push", *arguments])
        said = capsys.readouterr()
        return caught.value.code, said.out + said.err

    return call


def test_a_student_goes_to_the_hub_with_its_card(push: Callable[..., tuple[int, str]]) -> None:
    assert push("run", "org/name", "--private") == (0, "pushed: https://huggingface.co/org/name\n")
    assert FakeHub.last.uploaded == {"org/name": {"config.json", "README.md"}}
    assert FakeHub.last.how == {"private": True, "exist_ok": True}
    push("run", "org/name")
    assert FakeHub.last.how["private"] is None, "a repository that is there is left as it is"


def http_error(status: int) -> HfHubHTTPError:
    request = httpx.Request("POST", "https://huggingface.co/api/repos/create")
    return HfHubHTTPError(f"{status} Client Error:\n you may not", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("fails", "error", "code", "said"),
    [
        ("create_repo", http_error(403), 2, "push: org/name cannot be written: 403 Client Error: you may not"),
        ("create_repo", httpx.ConnectError("[Errno -2] Name or service not known"), 2, "Name or service not known"),
        ("upload_folder", http_error(413), 1, "push: the upload to org/name failed, and can be tried again: 413"),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_line(push, fails: str, error: Exception, code: int, said: str) -> None:
    FakeHub.fails, FakeHub.error = fails, error
    found, line = push("run", "org/name")
    assert found == code and said in line and line.count("\n") == 1


def test_a_hub_that_does_not_answer_is_given_up(push, monkeypatch) -> None:
    gate = threading.Event()
    FakeHub.fails, FakeHub.error = "create_repo", lambda: gate.wait(30)
    monkeypatch.setattr(module, "_ANSWER_S", 0.05)
    assert push("run", "org/name") == (2, "opd-ray: push: org/name cannot be written: no answer within 0.05 s\n")
    gate.set()


@pytest.mark.parametrize(
    ("arguments", "token", "said"),
    [
        (("run", "org/name"), None, "push: there is no token for the Hugging Face Hub; set HF_TOKEN"),
        (("nothing", "org/name"), "secret", "push: nothing is no run directory"),
        (("run", "org/na me"), "secret", "push: org/na me is no name of a repository"),
    ],
)
def test_nothing_is_asked_of_the_hub_without_what_it_needs(push, monkeypatch, arguments, token, said: str) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    code, line = push(*arguments)
    assert code == 2 and said in line and line.count("\n") == 1
