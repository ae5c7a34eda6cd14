"""The command line: exit codes, one line on stderr, and nothing written for what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import ray
from click.testing import CliRunner

import made_up_verdicts as made_up
from opd_ray import __main__ as command_line
from opd_ray import config as configs
from opd_ray.config.help import EVALUATES, OutputFile
from opd_ray.errors import RunError
from opd_ray.placement.nodes import Node
from opd_ray.run import evaluate as evaluation
from opd_ray.run import train as running
from opd_ray.status import state
from opd_ray.status.state import CallStatus, RoomStatus, Status
from tiny_checkpoints import CHARACTERS, make_checkpoint, make_setting, write_jsonl

Outcome = tuple[int, str, str]


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """Runs the command line in an empty directory; returns exit code, stdout and stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("OPD_RAY_DEBUG", "")  # and so taken back after a test that asked for tracebacks
    for module in ("run.train", "run.evaluate", "placement.session"):
        monkeypatch.setattr(f"opd_ray.{module}.cluster", contextlib.nullcontext)
    monkeypatch.setattr("opd_ray.placement.capacity.cluster_capacity", lambda node_resource=None: {"CPU": 2.0})
    monkeypatch.setattr("opd_ray.placement.capacity.may_grow", lambda: False)
    # The setting's checkpoints have one number for weights.
    monkeypatch.setattr("opd_ray.models.weights.check_weights", lambda *_, **__: None)
    for module in ("run.train", "placement.nodes"):
        monkeypatch.setattr(f"opd_ray.{module}.nodes", lambda: [Node("", "here", 2.0, 0.0, 8e9, 1e9)])

    def call(*arguments: str) -> Outcome:
        with pytest.raises(SystemExit) as caught:
            command_line.main(arguments)
        return (caught.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, str]:
    return make_setting(tmp_path)


def overrides(setting: dict[str, str], **changes: str) -> list[str]:
    merged = setting | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in merged.items()]


def assert_refused(outcome: Outcome, *words: str) -> None:
    code, out, err = outcome
    assert (code, out) == (2, "")
    assert err.startswith("opd-ray: ")
    assert err.count("\n") == 1
    assert [word for word in words if word not in err] == []
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("verb", ["train", "preflight", "plan", "doctor"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["learner.lrr=1"], ["learner.lrr", "did you mean 'learner.lr'?"]),
        (["leaner.lr=1"], ["leaner", "did you mean 'learner'?"]),
        (["seed"], ["section.field=value"]),
        (["learner.lr=-1"], ["learner.lr", "got -1"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
        (["--confg", "x"], ["No such option", "--help"]),
    ],
)
def test_bad_arguments_are_refused(
    call: Callable[..., Outcome], verb: str, arguments: list[str], words: list[str]
) -> None:
    assert_refused(call(verb, *arguments), *words)


def test_an_unknown_verb_is_refused(call: Callable[..., Outcome]) -> None:
    assert_refused(call("trian"), "trian", "train")


@pytest.mark.parametrize(
    ("verb", "option"), [("train", "--run-dir"), ("train", "--config"), ("preflight", "--run-dir")]
)
def test_an_empty_path_is_refused(call: Callable[..., Outcome], verb: str, option: str) -> None:
    """The bug: --run-dir "" (a variable that is not set) wrote into the directory at hand."""
    assert_refused(call(verb, option, ""), option, "is an empty name")


def test_a_run_directory_may_be_in_the_users_home(
    call: Callable[..., Outcome], setting: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug: no shell expands --run-dir=~/x, and results went to ./~/x."""
    calls = _trained(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call("train", "--run-dir=~/x", *overrides(setting))[0] == 0
    assert calls[0][1] == tmp_path / "x"
    assert_refused(call("train", "--run-dir=~nobody-here/x", *overrides(setting)), "there is no such home")


def test_resume_needs_a_directory(call: Callable[..., Outcome]) -> None:
    assert_refused(call("train", "--resume"), "--run-dir")


def _bad_settings() -> dict[str, tuple[Callable[[Path], Any], dict[str, str], list[str]]]:
    """Every kind of bad input: how it comes about, the overrides that use it, and words of its refusal."""

    def nothing(_: Path) -> None:
        pass

    return {
        "missing checkpoint": (
            nothing,
            {"student__path": "/no/where"},
            ["student.path=/no/where", "no such directory"],
        ),
        "missing teacher": (nothing, {"teacher__path": "/no/where"}, ["teacher.path=/no/where"]),
        "empty prompts": (lambda root: (root / "prompts.jsonl").write_text(""), {}, ["prompts.jsonl", "is empty"]),
        "not JSONL": (lambda root: (root / "prompts.jsonl").write_text("prompt\n1\n"), {}, ["row 1", "not JSON"]),
        "bad row": (
            lambda root: write_jsonl(root / "prompts.jsonl", [{"prompt": "1", "answer": "1"}, {"answer": "1"}]),
            {},
            ["prompts.jsonl row 2", "'prompt'"],
        ),
        "bad golden row": (
            lambda root: write_jsonl(root / "golden.jsonl", [{"prompt": "1", "answer": "1"}]),
            {},
            ["golden.jsonl row 1", "'response'"],
        ),
        "other vocabulary": (
            lambda root: make_checkpoint(root / "teacher", tokens=[*CHARACTERS[:-1], "@"]),
            {},
            ["has another tokenizer than the student (token '@'", "loss.advantage.policy=behaviour"],
        ),
        "EOS that is text": (
            nothing,
            {"teacher__eos_token_ids": "[5]"},
            ["teacher.eos_token_ids names token 5", "ordinary text"],
        ),
        "golden without EOS": (
            lambda root: write_jsonl(
                root / "golden.jsonl",
                [{"prompt": "1", "response": "2", "finish_reason": reason} for reason in ("stop", "length", "length")],
            ),
            {},
            ["golden.jsonl", "2 of 3 rows", "2 without EOS (rows 2, 3)", "data.golden_problems=skip"],
        ),
        "golden loss without golden data": (nothing, {"data__golden": "null"}, ["data.golden is null"]),
        "β out of range": (nothing, {"loss__student__beta": "1.5"}, ["loss.student.beta", "got 1.5"]),
        "k out of range": (nothing, {"loss__student__top_k": "1"}, ["loss.student.top_k", "got 1"]),
        "too long": (nothing, {"rollout__max_response_tokens": "60"}, ["prompts.jsonl row 2", "context of 64"]),
        "too many ranks": (nothing, {"learner__num_ranks": "9"}, ["CPUs asked", "learner 9 x 0.5", "2 there"]),
        "too many GPUs": (nothing, {"learner__gpus_per_rank": "1"}, ["1 GPUs asked", "0 there"]),
        "unknown task": (nothing, {"data__task": "chian"}, ["'chian'", "did you mean 'chain'?"]),
    }


@pytest.mark.parametrize("verb", ["train", "preflight"])
@pytest.mark.parametrize("kind", _bad_settings())
def test_bad_input_is_refused_before_anything_is_written(
    call: Callable[..., Outcome], setting: dict[str, str], tmp_path: Path, verb: str, kind: str
) -> None:
    spoil, changes, words = _bad_settings()[kind]
    spoil(tmp_path)
    assert_refused(call(verb, "--run-dir", "run", *overrides(setting, **changes)), *words)


def test_a_directory_with_another_run_is_left_as_it_is(
    call: Callable[..., Outcome], setting: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    saved = configs.to_yaml(configs.load(None, overrides(setting)))
    (run_dir / "config.yaml").write_text(saved)
    assert_refused(call("train", "--run-dir", str(run_dir), *overrides(setting)), "holds another run", "--resume")
    assert_refused(call("train", "--run-dir", str(run_dir), "--resume", "seed=8"), "--resume: seed is 8")
    assert_refused(call("train", "--run-dir", str(tmp_path / "none"), "--resume"), "no run to resume")
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]
    assert (run_dir / "config.yaml").read_text() == saved


@pytest.mark.parametrize("verb", ["train", "preflight"])
def test_a_directory_of_something_else_is_left_as_it_is(
    call: Callable[..., Outcome], setting: dict[str, str], tmp_path: Path, verb: str
) -> None:
    """The bug: a run wrote student/, summary.json and its report between the files of a project."""
    outcome = call(verb, "--run-dir", str(tmp_path), *overrides(setting))
    assert_refused(outcome, f"--run-dir {tmp_path}: is a directory of something else, with golden.jsonl in it (6 such)")


def test_preflight_prints_what_it_found(call: Callable[..., Outcome], setting: dict[str, str]) -> None:
    code, out, _ = call("preflight", *overrides(setting))
    assert code == 0
    assert "max context tokens" in out
    assert "plan: at most 6,400 response tokens a step" in out, "64 prompts with 4 + 1 responses of 20 tokens"
    assert list(Path.cwd().iterdir()) == []


def test_a_plan_starts_nothing_and_says_what_fits_by_its_exit_code(
    call: Callable[..., Outcome], setting: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for free, code, verdict in ((64e9, 0, "it fits"), (1e9, 1, "does not fit: the processes need")):
        monkeypatch.setattr("opd_ray.run.plan.this_machine", lambda free=free: Node("", "here", 2.0, 0.0, free, free))
        found = call("plan", *overrides(setting))
        assert (found[0], verdict in found[1]) == (code, True), found
    assert_refused(call("plan", "--price-per-gpu-hour", "2", *overrides(setting)), "--price-per-gpu-hour needs --probe")
    assert_refused(call("plan", "--probe", "--price-per-gpu-hour", "inf"), "--price-per-gpu-hour is inf, expected a")


def _trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[configs.Config, Path, bool, bool]]:
    """(configuration, run directory, resume, auto_resume) of every run that is asked for, none of which takes place."""
    calls: list[tuple[configs.Config, Path, bool, bool]] = []

    def train(config: configs.Config, run_dir: Path, *, resume: bool, auto_resume: bool) -> dict[str, Any]:
        calls.append((config, run_dir, resume, auto_resume))
        return {"steps": 3, "wall_s": 1.0, "eval_before": None, "eval_after": None}

    monkeypatch.setattr(running, "train", train)
    return calls


def test_train_hands_over_and_resumes_with_the_configuration_of_the_run(
    call: Callable[..., Outcome], setting: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _trained(monkeypatch)
    logged = tmp_path / "logged"
    logged.mkdir()
    (logged / "job.log").touch()
    assert call("train", "--run-dir", str(logged), *overrides(setting, seed="4"))[0] == 0
    calls.clear()
    assert call("train", *overrides(setting, seed="4"))[0] == 0
    config, run_dir, resume, auto_resume = calls[0]
    assert run_dir.is_absolute()
    assert run_dir.name.startswith("stableopd-seed4-")
    assert not resume and not auto_resume
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(configs.to_yaml(config))
    assert call("train", "--run-dir", str(run_dir), "--resume", "learner.steps=7")[0] == 0
    resumed, _, resume, _ = calls[1]
    assert resume
    assert (resumed.seed, resumed.learner.steps) == (4, 7)
    assert resumed.student == config.student


def test_auto_resume_begins_a_run_and_goes_on_with_one_that_is_there(
    call: Callable[..., Outcome], setting: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, run_dir = _trained(monkeypatch), tmp_path / "run"
    arguments = ("train", "--auto-resume", "--run-dir", str(run_dir))
    assert call(*arguments, *overrides(setting, seed="4"))[0] == 0
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(configs.to_yaml(calls[0][0]))
    assert call(*arguments, *overrides(setting, seed="4", learner__steps="7"))[0] == 0
    assert [call[2:] for call in calls] == [(False, True), (True, True)]
    assert_refused(call(*arguments, *overrides(setting, seed="5")), "--resume: seed is 5")
    assert_refused(call("train", "--auto-resume"), "--run-dir")


def test_evaluate_prints_a_table_or_json(
    call: Callable[..., Outcome], setting: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = made_up.evaluation(held_out=made_up.rows({"p": [True], "q": [False]}, {"p": True, "q": True}))
    asked = []
    monkeypatch.setattr(evaluation, "_measured", lambda checkpoint, config: asked.append(config) or found)
    problems = f"data.evaluation={setting['data.evaluation']}"
    code, out, _ = call("evaluate", setting["student.path"], "--json", problems)
    assert code == 0
    assert json.loads(out) == found.saved()
    assert (asked[0].data.task, asked[0].rollout.max_response_tokens) == ("math", 4096)
    printed = call("evaluate", setting["student.path"], problems)[1]
    assert "accuracy greedy" in printed and "avg@" not in printed
    assert_refused(call("evaluate", "/no/where", problems), "/no/where", "no such directory")


def test_evaluate_compares_with_another_checkpoint_or_with_verdicts_that_were_kept(
    call: Callable[..., Outcome], setting: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = made_up.evaluation(aime=made_up.rows({"p": [True, True], "q": [False, True]}))
    other = made_up.evaluation(aime=made_up.rows({"p": [False, True], "q": [False, False]}))
    asked = []
    paths = {"teacher": other, "student": ours}
    monkeypatch.setattr(evaluation, "_measured", lambda path, _: asked.append(path) or paths[Path(path).name])
    student, teacher, kept = setting["student.path"], setting["teacher.path"], str(tmp_path / "kept")
    aime = f"evaluation.sets.aime.path={setting['data.evaluation']}"
    printed = call("evaluate", student, "--against", teacher, aime)[1]
    assert "avg@2 0.750 ± 0.250" in printed and "pass@2 1.000 ± 0.000" in printed and "+0.500 ± 0.000" in printed
    assert f"to {teacher}, paired by problem" in printed
    call("evaluate", teacher, "--verdicts", kept, aime)
    asked.clear()
    code, out, _ = call("evaluate", student, "--against", kept, "--json", aime)
    assert (code, asked) == (0, [student]), "what was kept is not asked again"
    assert json.loads(out)["against"] == {"aime": {"difference": 0.5, "difference_se": 0.0, "num_problems": 2}}
    asked.clear()
    assert_refused(
        call("evaluate", student, "--against", kept, aime.replace("aime", "math")), f"{kept} has verdicts on"
    )
    assert_refused(call("evaluate", student, "--against", "/no/where", aime), "/no/where", "no such directory")
    assert asked == [], "before a model loads"


def test_a_model_of_ones_own_is_not_evaluated_on_the_embedded_problems(
    call: Callable[..., Outcome], setting: dict[str, str]
) -> None:
    """The bug: without data.evaluation any checkpoint was asked the embedded chains, with 80 tokens for an answer."""
    assert_refused(call("evaluate", setting["student.path"]), "data.evaluation is the embedded one", "give data.eval")


def _status(run_dir: Path, **changes: Any) -> None:
    """A run of this process, one generator of which was lost."""
    generate = RoomStatus(
        room="generate",
        ready=1,
        starting=0,
        minimum=1,
        maximum=4,
        waiting=0,
        calls=(CallStatus("student-generator-0", "node-x", "generate", 40.0),),
        num_calls=1,
        restarts=2,
        last_loss="the actor [died]",
        below_min_s=None,
        busy_share=0.75,
    )
    values: dict[str, Any] = {
        "time": time.time(),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "phase": "waiting for rollouts",
        "phase_since_s": 42.0,
        "step": 57,
        "steps": 100,
        "version": 57,
        "last_step_s_ago": 50.0,
        "slots_taken": 96,
        "num_slots": 96,
        "buffered_slots": 20,
        "missing_slots": (1824,),
        "slots_at": {1824: "generate"},
        "checkpoint_step": 50,
        "rooms": (generate,),
    }
    run_dir.mkdir(exist_ok=True)
    state.write(run_dir / state.FILE, Status(**values | changes))


def test_status_prints_why_the_run_waits_and_its_rooms(call: Callable[..., Outcome], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    _status(run_dir)
    code, out, err = call("status", str(run_dir))
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert text.startswith("learner waits 42 s for step 57: slot 1824 is at generate; oldest call in room generate")
    for part in ("57 of 100", "96 of 96 taken", "step 50", "1–4", "75%", "the actor [died]", "student-generator-0"):
        assert part in text
    answer = json.loads(call("status", str(run_dir), "--json")[1])
    assert answer["explanation"].startswith("learner waits 42 s")
    assert answer["silence"] is None
    assert answer["rooms"][0]["calls"][0]["node"] == "node-x"


def test_status_says_that_the_driver_is_silent(call: Callable[..., Outcome], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    _status(run_dir, time=time.time() - 95, host="elsewhere")
    code, out, _ = call("status", str(run_dir))
    text = " ".join(out.split())
    assert code == 0
    assert text.startswith("the driver has not written for 95 s: it died, or its node elsewhere is gone; resume with")
    assert "--resume before that: learner waits" in text


def test_status_without_a_run_is_refused(call: Callable[..., Outcome], tmp_path: Path) -> None:
    assert_refused(call("status", str(tmp_path)), "status.json", "no such file")
    assert_refused(
        call("status", f"memory://{tmp_path}"), "memory:", "/status.json: no such file", "checkpoint.directory"
    )
    assert_refused(call("status", "--watch"), "--watch needs a run", "RUN_DIR")


def test_status_without_a_name_lists_the_runs(call: Callable[..., Outcome]) -> None:
    assert_refused(call("status"), "runs: no run in it", "--run-dir DIR")
    runs = Path("runs")
    (runs / "no run").mkdir(parents=True)
    _status(runs / "one", phase="done", note="sampled accuracy 0.3 -> 0.9, 61 s")
    _status(runs / "two")
    (runs / "old").mkdir()
    (runs / "old" / state.FILE).write_text("{}")
    os.utime(runs / "one" / state.FILE, (1e9, 1e9))
    code, out, err = call("status")
    text = " ".join(out.split())
    assert (code, err) == (0, "")
    assert text.index("runs/two") < text.index("runs/one") and "no run" not in text
    assert "learner waits 42 s for step 57" in text and "done: 57 of 100 steps: sampled accuracy 0.3 -> 0.9" in text
    assert "another version" in text
    listed = {each["run"]: each for each in json.loads(call("status", "--json")[1])}
    assert (listed["runs/two"]["phase"], listed["runs/two"]["step"]) == ("waiting for rollouts", 57)
    assert listed["runs/old"]["phase"] is None


def test_status_watches_until_the_run_has_ended(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    _status(run_dir)
    phases = iter(["training", "done"])
    monkeypatch.setattr("time.sleep", lambda _: _status(run_dir, phase=next(phases)))
    code, out, _ = call("status", str(run_dir), "--watch", "--json")
    assert code == 0
    assert [json.loads(line)["phase"] for line in out.splitlines()] == ["waiting for rollouts", "training", "done"]


def test_status_waits_for_a_run_that_is_not_there_yet(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "soon"
    later = iter([lambda: None, lambda: _status(run_dir), lambda: _status(run_dir, phase="done")])
    monkeypatch.setattr("time.sleep", lambda _: next(later)())
    code, out, err = call("status", str(run_dir), "--watch", "--json")
    assert code == 0
    assert [json.loads(line)["phase"] for line in out.splitlines()] == ["waiting for rollouts", "done"]
    assert err.startswith("waiting until it is there") and err.count("\n") == 1


def test_status_stops_watching_when_the_driver_is_gone_or_at_ctrl_c(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    _status(run_dir, time=1.0)  # this process is a later one: the driver's number was given again
    code, out, _ = call("status", str(run_dir), "--watch")
    assert code == 0
    assert f"process {os.getpid()} is gone" in " ".join(out.split())

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    _status(run_dir)
    monkeypatch.setattr("time.sleep", interrupt)
    assert call("status", str(run_dir), "--watch")[0] == 0


@pytest.mark.slow
def test_status_imports_neither_ray_nor_torch(tmp_path: Path) -> None:
    _status(tmp_path)
    program = (
        "import sys; from opd_ray.__main__ import main\ntry:\n    main(['status', sys.argv[1]])\n"
        "finally:\n    assert not {'ray', 'torch', 'transformers'} & sys.modules.keys()"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_failure_while_running_is_one_line_and_a_traceback_only_on_demand(
    call: Callable[..., Outcome], setting: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: object, **__: object) -> None:
        raise RunError("learn: learner-0 died\n(node a)")

    monkeypatch.setattr(running, "train", train)
    assert call("train", *overrides(setting)) == (1, "", "opd-ray: learn: learner-0 died (node a)\n")
    code, _, err = call("train", "--debug", *overrides(setting))
    assert code == 1
    assert "Traceback" in err


def test_an_unexpected_exception_keeps_its_traceback(
    call: Callable[..., Outcome], setting: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(running, "train", train)
    with pytest.raises(ZeroDivisionError):
        command_line.main(["train", *overrides(setting)])


@pytest.mark.parametrize("verb", ["train", "preflight", "plan", "doctor", "evaluate"])
def test_help_lists_every_field_that_the_verb_reads_with_its_sentence_and_choices(
    call: Callable[..., Outcome], verb: str
) -> None:
    code, out, _ = call(verb, "--help")
    assert code == 0
    words = " ".join(out.split())
    read = [doc for doc in configs.describe() if verb != "evaluate" or doc.name.partition(".")[0] in EVALUATES]
    assert [doc.name for doc in read if doc.name not in words or doc.doc.split()[0] not in words] == []
    assert [doc.name for doc in read for each in doc.choices if str(each) not in words] == []
    assert ("learner.lr" in words) == ("guard warns, acts, and rolls back" in words) == (verb != "evaluate")


def test_help_may_be_asked_for_of_a_section_or_a_field(call: Callable[..., Outcome]) -> None:
    code, out, _ = call("train", "learner.steps=3", "--help", "learner")
    assert code == 0 and out.startswith("Fields of learner:\n  The trainer: a group of DeepSpeed ranks.")
    assert "learner.lr" in out and "rollout." not in out
    assert "One of off, warn, act," in call("train", "-h", "guard.level=stop")[1]
    assert "evaluation.sets.NAME.samples" in call("evaluate", "--help=evaluation")[1]
    assert_refused(call("train", "--help", "lerner"), "no section 'lerner'", "did you mean 'learner'?")
    assert_refused(call("evaluate", "--help", "learner"), "no section 'learner'")


def test_an_output_that_could_not_be_written_is_refused_before_hours_of_work(tmp_path: Path) -> None:
    """The bug: benchmarks ended with a traceback, and their figures with it."""

    @click.command()
    @click.option("--json", "file", type=OutputFile())
    def bench(file: Path) -> None:
        file.write_text("{}")

    for path, why in ((tmp_path, "is a directory"), (tmp_path / "no" / "file.json", "make it first"), ("", "empty")):
        refused = CliRunner().invoke(bench, ["--json", str(path)])
        assert refused.exit_code == 2 and why in refused.output
    assert CliRunner().invoke(bench, ["--json", str(tmp_path / "file.json")]).exit_code == 0
    assert (tmp_path / "file.json").read_text() == "{}"
