"""Models of the Hub: one commit for all of a run, whoever loads and whenever, and what a resumed run makes of it.

The Hub is a fake; its library and its cache are the real ones.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from fake_hub import FakeRepository, use_hub
from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.errors import InputError
from opd_ray.models import checkpoints, hub
from opd_ray.models.weights import on_this_node
from opd_ray.report import page
from opd_ray.run import preflight, resuming
from opd_ray.run import train as running
from opd_ray.study import study
from opd_ray.study.arms import Arm
from tiny_checkpoints import configured, make_checkpoint, make_setting, refused

FIRST, SECOND = "1" * 40, "2" * 40
NOBODY = "http://127.0.0.1:9"
"""Where nobody answers."""
OTHERS = {
    "README.md": b"",
    "pytorch_model.bin": b"the same once more",
    "original/consolidated.00.safetensors": b"and again",
    "original/params.json": b"{}",
    "consolidated.safetensors": b"and again",
}


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, str]:
    """One of Hub ids: student and reference are org/s, the teacher is org/t."""
    return make_setting(tmp_path) | {"student.path": "org/s", "reference.path": "org/s", "teacher.path": "org/t"}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRepository]:
    """org/s on a fake Hub, whose two commits differ in the context; main is the first. org/t is in the cache alone."""
    commits = {}
    for commit, context in ((FIRST, 64), (SECOND, 48)):
        path = make_checkpoint(tmp_path / commit, context=context)
        commits[commit] = {file.name: file.read_bytes() for file in path.iterdir()} | OTHERS
    made = FakeRepository("org/s", commits, {"main": FIRST, "v1": FIRST, "v2": SECOND, "pr/3": SECOND})
    in_cache(tmp_path / "hub", "org/t", make_checkpoint(tmp_path / "cached"))
    on_another_node(monkeypatch, tmp_path / "hub")
    with made.served() as address:
        use_hub(monkeypatch, address)
        yield made


def in_cache(cache: Path, name: str, checkpoint: Path, commit: str = FIRST) -> Path:
    """What preflight has fetched of a model when main was this commit."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    shutil.copytree(checkpoint, folder / "snapshots" / commit, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder / "snapshots" / commit


def on_another_node(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Another process, with this cache."""
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    patch.setattr(hub, "_FROM_CACHE", set())
    hub._fetched.cache_clear()


def context(path: str) -> int:
    return checkpoints.read_config(path).max_position_embeddings


# ---- names ----


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("org/name", ("org/name", None)),
        ("gpt2", ("gpt2", None)),
        ("Qwen/Qwen2.5-1.5B@main", ("Qwen/Qwen2.5-1.5B", "main")),
        ("org/name@refs/pr/3", ("org/name", "refs/pr/3")),
        ("org/name@v1.0+fp8", ("org/name", "v1.0+fp8")),
        (f"org/name@{FIRST}", ("org/name", FIRST)),
        ("org/name@", None),
        ("org/name@a b", None),
        ("org/name@../../etc", None),
        ("org/name@-v", None),
        ("org/name@a@b", None),
        ("@main", None),
        ("org/name/more@main", None),
        ("org/name/", None),
        ("/models/name", None),
        ("./name", None),
        ("~/name", None),
        (r"C:\models\name", None),
        ("C:/models/name", None),
        ("s3://bucket/name", None),
        ("org/nam\0e", None),
        ("", None),
    ],
)
def test_how_they_are_written(path: str, parts: tuple[str, str | None] | None) -> None:
    assert hub.parts(path) == parts
    if parts is None and "\0" not in path:
        message = refused(lambda: checkpoints.locate(f"teacher.path={path}", path))
        assert message.startswith(f"teacher.path={path}: no such directory; give a ")
        assert "org/name or org/name@REVISION (a branch, tag or commit)" in message


def test_only_a_whole_commit_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.is_pinned(f"org/name@{FIRST}")
    others = ("org/name", "org/name@main", f"org/name@{FIRST[:39]}", f"/org/name@{FIRST}", f"org/name@{'A' * 40}")
    assert not any(map(hub.is_pinned, others))
    assert hub.shown(f"org/name@{FIRST}") == "org/name@1111111" and hub.shown("/models/x") == "/models/x"


def test_a_directory_is_asked_of_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is called as a model of the Hub might be."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    config = configured(make_setting(tmp_path))
    assert checkpoints.locate_models(config) == {}
    make_checkpoint(tmp_path / "org/name@v1")
    assert checkpoints.locate("student.path=org/name@v1", "org/name@v1") == "org/name@v1"
    assert hub.local_directory("org/name@v1") == Path("org/name@v1")
    (tmp_path / "file").touch()
    assert "is a file" in refused(lambda: checkpoints.locate("student.path=file", "file"))


# ---- one commit for all ----


def test_a_branch_that_moves_leaves_a_run_where_it_is(
    repository: FakeRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug: a worker that joined after the branch had moved loaded other weights than those before it."""
    pinned = checkpoints.locate("student.path=org/s", "org/s")
    assert pinned == f"org/s@{FIRST}"
    assert context(pinned) == 64
    repository.revisions["main"] = SECOND
    on_another_node(monkeypatch, tmp_path / "late")
    assert context(pinned) == 64
    directory = hub.local_directory(pinned)
    assert directory.name == FIRST and directory.is_relative_to(tmp_path / "late")
    assert checkpoints.load_tokenizer(pinned).vocab_size == checkpoints.load_tokenizer(str(tmp_path / FIRST)).vocab_size
    assert context(checkpoints.locate("student.path=org/s", "org/s")) == 48


@pytest.mark.parametrize(
    ("revision", "commit"), [("main", FIRST), ("v2", SECOND), ("pr/3", SECOND), (SECOND, SECOND), (None, FIRST)]
)
def test_a_branch_a_tag_and_a_commit_take_one_question_each(
    repository: FakeRepository, revision: str | None, commit: str
) -> None:
    path = "org/s" + (f"@{revision}" if revision else "")
    assert checkpoints.locate(f"student.path={path}", path) == f"org/s@{commit}"
    assert len(repository.asked) == 1 and not repository.sent


def test_no_more_is_fetched_than_what_is_loaded(repository: FakeRepository) -> None:
    pinned = f"org/s@{FIRST}"
    small = hub.local_directory(pinned, weights=False)
    assert sorted(repository.sent) == sorted(file.name for file in small.iterdir())
    assert "tokenizer.json" in repository.sent and "model.safetensors" not in repository.sent
    assert on_this_node(pinned) is None
    before = len(repository.sent)
    assert hub.local_directory(pinned) == small
    assert repository.sent[before:] == ["model.safetensors"]
    assert on_this_node(pinned) == small
    assert not {file.name for file in small.iterdir()} & {name.partition("/")[0] for name in OTHERS}


def test_preflight_names_the_commits_and_leaves_the_weights_to_the_workers(
    repository: FakeRepository, setting: dict[str, str]
) -> None:
    config = configured(setting)
    facts = preflight.check_files(config)
    assert facts.commits == {"org/s": f"org/s@{FIRST}", "org/t": f"org/t@{FIRST}"}
    assert len(repository.asked) == 1, "student and reference are one"
    assert not [name for name in repository.sent if name.endswith(".safetensors")]
    assert facts.data.renderer.path == f"org/s@{FIRST}"
    found = hub.pinned(config, facts.commits)
    assert found.student.path == found.reference.path == f"org/s@{FIRST}"
    assert replace(found, student=config.student, teacher=config.teacher, reference=config.reference) == config
    preflight.check_weights(found)  # those that are not here yet are their loaders'


def test_with_adapters_the_student_stays_its_own_reference(repository: FakeRepository, setting: dict[str, str]) -> None:
    """The adversary: a commit in one of two paths that were the same would start reference actors."""
    config = configured(setting, student__lora="{}")
    assert config.learner_is_reference
    assert hub.pinned(config, preflight.check_files(config).commits).learner_is_reference


def test_wrong_data_are_told_before_the_hub_is_asked(repository: FakeRepository, setting: dict[str, str]) -> None:
    message = refused(lambda: preflight.check_files(configured(setting, data__prompts="/nonexistent.jsonl")))
    assert "/nonexistent.jsonl" in message and not repository.asked


def test_an_evaluation_is_of_one_commit(
    repository: FakeRepository, setting: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from opd_ray.run import evaluate

    seen = []
    monkeypatch.setattr(evaluate, "_measured", lambda student, _: seen.append(student))
    evaluate.measured(["org/s", "org/s@v2"], configured(setting))
    assert seen == [f"org/s@{FIRST}", f"org/s@{SECOND}"]


# ---- without a network, and refusals ----


def test_without_a_network_the_cache_says_which_commit(
    repository: FakeRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a model that was fetched by its commit alone: what main was then was noted."""
    for path in ("org/s", "org/s@v2"):
        hub.local_directory(checkpoints.locate("student.path=", path))
    repository.revisions["main"] = SECOND
    use_hub(monkeypatch, NOBODY)
    on_another_node(monkeypatch, tmp_path / "hub")
    for path, commit in (("org/s", FIRST), ("org/s@v2", SECOND), (f"org/s@{SECOND}", SECOND), ("org/t", FIRST)):
        pinned = checkpoints.locate(f"student.path={path}", path)
        assert pinned == path.partition("@")[0] + f"@{commit}"
        assert hub.local_directory(pinned).name == commit
    message = refused(lambda: checkpoints.locate("student.path=org/s@v1", "org/s@v1"))
    assert message.startswith(
        "student.path=org/s@v1: neither a directory here nor a checkpoint of the Hugging Face Hub"
    )
    assert message.endswith("give an existing directory, org/name or org/name@REVISION")


def test_what_the_hub_does_not_have_is_refused(repository: FakeRepository) -> None:
    for path in ("org/s@v9", "org/other", f"org/s@{'3' * 40}", "org/a--b", "x" * 300):
        message = refused(lambda path=path: checkpoints.locate(f"teacher.path={path}", path))
        assert message.startswith(f"teacher.path={path}: neither a directory here nor a checkpoint")
        assert "@" not in path or "Revision Not Found" in message
    repository.commits[FIRST].pop("model.safetensors")
    repository.commits[FIRST].pop("consolidated.safetensors")
    repository.commits[FIRST].pop("original/consolidated.00.safetensors")
    assert "has no *.safetensors on the Hub" in refused(lambda: checkpoints.locate("teacher.path=org/s", "org/s"))
    assert checkpoints.locate("teacher.path=org/s", "org/s", weights=False) == f"org/s@{FIRST}"


def test_what_a_worker_cannot_have_is_told_in_a_line(
    repository: FakeRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name without a commit is a directory that this node lacks, and is never fetched from whoever has that name."""
    message = refused(lambda: hub.local_directory("org/s"))
    assert message.startswith("org/s: no such directory on this node") and not repository.asked
    monkeypatch.setattr("huggingface_hub.snapshot_download", mock.Mock(side_effect=OSError("no space\nleft")))
    message = refused(lambda: hub.local_directory(f"org/s@{FIRST}"))
    assert message.startswith(f"org/s@{FIRST}: cannot be fetched from the Hugging Face Hub (no space)")
    message = refused(lambda: checkpoints.inspect("student.path", "org/s"))
    assert message.startswith(f"student.path=org/s@{FIRST}: cannot be fetched")


# ---- the saved configuration, and resuming ----


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Of checkpoints, of which it has none."""
    made = mock.Mock()
    made.check.return_value = None
    monkeypatch.setattr(running, "Shelf", lambda *_: made)
    monkeypatch.setattr(running, "Lease", mock.Mock())
    return made


@pytest.fixture
def train(shelf: mock.Mock, monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Instead of a driver: it is called with the configuration that workers get."""
    made = mock.Mock(side_effect=InputError("far enough"))
    monkeypatch.setattr("opd_ray.run.driver.Driver", made)
    monkeypatch.setattr(running, "cluster", contextlib.nullcontext)
    monkeypatch.setattr(running, "check_fits", lambda *_: None)
    monkeypatch.setattr(running, "with_room", lambda config, *_: (config, ""))
    monkeypatch.setattr(running, "nodes", list)
    return made


def test_a_run_saves_its_commits_and_goes_on_with_them(
    repository: FakeRepository,
    setting: dict[str, str],
    tmp_path: Path,
    train: mock.Mock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, run_dir = configured(setting | {"reference.path": "student"}), tmp_path / "run"
    assert refused(lambda: running.train(asked, run_dir)) == "far enough"
    saved = configs.load(run_dir / "config.yaml")
    assert [saved.student.path, saved.teacher.path] == [f"org/s@{FIRST}", f"org/t@{FIRST}"]
    assert saved.reference.path == "student"
    given = train.call_args.args[0]
    assert given.reference.path == given.student.path == f"org/s@{FIRST}"

    repository.revisions["main"] = SECOND
    use_hub(monkeypatch, NOBODY)
    on_another_node(monkeypatch, tmp_path / "hub")
    assert refused(lambda: running.train(asked, run_dir, resume=True)) == "far enough"
    assert train.call_args.args[0].student.path == f"org/s@{FIRST}"
    assert configs.load(run_dir / "config.yaml") == saved


def begun(run_dir: Path, config: Config) -> dict[str, object]:
    """A run that has saved this."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(configs.to_yaml(config))
    return configs.to_dict(config)


def test_what_was_begun_is_gone_on_with_by_the_command_that_began_it(
    repository: FakeRepository, setting: dict[str, str], tmp_path: Path
) -> None:
    commits = {"org/s": f"org/s@{FIRST}", "org/t": f"org/t@{FIRST}"}
    begun(tmp_path / "run", hub.pinned(configured(setting), commits))
    repository.revisions["main"] = SECOND

    def resumed(**changes: str) -> Config:
        return resuming.check_run_dir(tmp_path / "run", configured(setting, **changes), resume=True)

    assert resumed().student.path == resumed().reference.path == f"org/s@{FIRST}"
    assert not repository.asked
    both = {"student__path": "org/s@v1", "reference__path": "org/s@v1"}
    assert resumed(**both).student.path == "org/s@v1", "a tag that is still the commit"
    for other in ("v2", "main", SECOND):
        message = refused(lambda other=other: resumed(student__path=f"org/s@{other}"))
        assert message == (
            f"--resume: student.path is org/s@{other}, but the run in {tmp_path}/run has org/s@{FIRST}; "
            f"continue it with student.path=org/s@{FIRST} or give another --run-dir"
        )
    message = refused(lambda: resumed(teacher__path="org/s"))
    assert message.startswith(f"--resume: teacher.path is org/s@{FIRST}, but the run in")


def test_two_commits_of_one_repository_stay_two(setting: dict[str, str], tmp_path: Path) -> None:
    """The bug: a student without a revision went on with the commit of its teacher, another revision of the same."""
    paths = {"student.path": f"org/s@{FIRST}", "teacher.path": f"org/s@{SECOND}", "reference.path": "student"}
    begun(tmp_path / "run", configured(setting | paths))
    asked = configured(setting | paths | {"student.path": "org/s"})
    assert resuming.check_run_dir(tmp_path / "run", asked, resume=True) == configured(setting | paths)


def test_where_checkpoints_alone_are_left_the_run_goes_on_with_their_commits(
    repository: FakeRepository, setting: dict[str, str], tmp_path: Path, shelf: mock.Mock, train: mock.Mock
) -> None:
    """The bug: the branch had moved when the head came back without its disk, and the job was refused each time."""
    before = configured(setting, student__path=f"org/s@{FIRST}", teacher__path=f"org/t@{FIRST}")
    shelf.check.return_value = mock.Mock(where="s3://b/step-2", state={"config": configs.to_dict(before)})
    repository.revisions["main"] = SECOND
    message = refused(lambda: running.train(configured(setting), tmp_path / "again", auto_resume=True))
    assert message == "far enough" and train.call_args.args[0].student.path == f"org/s@{FIRST}"
    assert configs.load(tmp_path / "again/config.yaml").student.path == f"org/s@{FIRST}"


def test_what_has_not_moved_is_looked_at_once(
    repository: FakeRepository, setting: dict[str, str], tmp_path: Path, shelf: mock.Mock, train: mock.Mock
) -> None:
    before = configured(setting, student__path=f"org/s@{FIRST}", teacher__path=f"org/t@{FIRST}")
    shelf.check.return_value = mock.Mock(where="s3://b/step-2", state={"config": configs.to_dict(before)})
    with mock.patch.object(preflight, "check_files", wraps=preflight.check_files) as looked:
        refused(lambda: running.train(configured(setting), tmp_path / "again", auto_resume=True))
    assert looked.call_count == 1 and repository.asked == ["/api/models/org/s"]


def test_a_directory_in_the_place_of_a_model_of_the_hub_is_another_model(
    setting: dict[str, str], tmp_path: Path
) -> None:
    """The bug: an IndexError."""
    begun(tmp_path / "run", configured(setting, teacher__path=f"org/t@{FIRST}"))
    moved = configured(setting, teacher__path="/models/t")
    message = refused(lambda: resuming.check_run_dir(tmp_path / "run", moved, resume=True))
    assert message.startswith(f"--resume: teacher.path is /models/t, but the run in {tmp_path}/run has org/t@{FIRST};")


def test_a_checkpoint_elsewhere_goes_on_with_its_commit_alone(setting: dict[str, str]) -> None:
    saved = configs.to_dict(configured(setting, teacher__path=f"org/t@{FIRST}"))
    moved = configured(setting, teacher__path=f"org/t@{SECOND}")
    message = refused(lambda: resuming.check_same_run("the checkpoint s3://b/step-2", saved, moved))
    assert message == (
        f"--resume: teacher.path is org/t@{SECOND}, but the checkpoint s3://b/step-2 has org/t@{FIRST}; "
        f"continue it with teacher.path=org/t@{FIRST} or give another --run-dir"
    )


def test_a_run_of_before_there_were_commits_goes_on(setting: dict[str, str], tmp_path: Path) -> None:
    saved = begun(tmp_path / "run", configured(setting))
    assert resuming.check_run_dir(tmp_path / "run", configured(setting), resume=True) == configured(setting)
    resuming.check_same_run("the checkpoint", saved, configured(setting, teacher__path=f"org/t@{FIRST}"))
    other = configured(setting, teacher__path=f"org/u@{FIRST}")
    assert "teacher.path is org/u@" in refused(lambda: resuming.check_same_run("the checkpoint", saved, other))


def test_all_runs_of_a_study_have_one_commit(
    setting: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a later day. The adversary: branches and tags that move whenever anybody looks."""
    moves = map("{:040x}".format, itertools.count())
    asked = configs.to_dict(configured(setting, teacher__path="org/s@v1"))
    arms = [Arm(name, asked | {"seed": 0, "name": name}) for name in ("one", "other")]
    trained = []

    def check_files(config: Config) -> SimpleNamespace:
        paths = (config.student.path, config.teacher.path)
        commits = {path: path if hub.is_pinned(path) else f"org/s@{next(moves)}" for path in paths}
        return SimpleNamespace(commits=commits, max_context_tokens=64)

    def train(config: Config, run_dir: Path, **_: object) -> None:
        trained.append((config.student.path, config.teacher.path, config.reference.path))
        begun(run_dir, config)
        done = {"eval_before": None, "eval_after": None, "steps": 1, "max_truncation_rate": 0.0}
        (run_dir / "summary.json").write_text(json.dumps(done))

    monkeypatch.setattr(study, "cluster", contextlib.nullcontext)
    monkeypatch.setattr(study, "check_fits", lambda *_: None)
    monkeypatch.setattr(study, "Session", mock.Mock())
    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "_outcome", str)
    monkeypatch.setattr(preflight, "check_files", check_files)
    monkeypatch.setattr(preflight, "check_weights", lambda _: None)
    study.run_study(arms, [0], tmp_path / "study", lambda _: None)
    study.run_study(arms, [0, 1], tmp_path / "study", lambda _: None)
    first, second = (f"org/s@{number:040x}" for number in (0, 1))
    assert trained == [(first, second, first)] * 4
    assert study.Session.call_args.args[0].student.path == first


def test_a_report_has_the_first_digits_of_a_commit() -> None:
    runs = [SimpleNamespace(config={"student.path": path}) for path in (f"org/s@{FIRST}", "/models/a/s")]
    assert page._model(runs[:1], "student.path") == "org/s@1111111"
    assert page._model(runs[1:], "student.path") == "a/s"


def test_an_exported_adapter_and_the_card_name_the_repository(tmp_path: Path, setting: dict[str, str]) -> None:
    import torch
    from huggingface_hub import ModelCard

    from opd_ray.config import LoraConfig
    from opd_ray.learn.adapters import write_adapter
    from opd_ray.run.card import card

    weights = {f"model.layers.0.q_proj.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"}
    write_adapter(tmp_path / "adapter", weights, f"org/s@{FIRST}", LoraConfig())
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("org/s", FIRST)
    text = card(configured(setting, student__path=f"org/s@{FIRST}"), {})
    assert ModelCard(text).data.base_model == "org/s"
    assert "# stableopd: s after " in text and f"| student | org/s@{FIRST} |" in text
