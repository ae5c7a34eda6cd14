"""What the doctor makes of nodes' answers: every line is "ok …", or says what to do."""

from __future__ import annotations

import itertools
import resource
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from opd_ray import config as configs
from opd_ray.doctor import findings, inspector
from opd_ray.doctor.checks import Doctor
from opd_ray.doctor.findings import Finding, tournament
from opd_ray.doctor.inspector import NodeReport
from opd_ray.placement import nodes
from opd_ray.placement.nodes import Card, Node

CARD = Card("H200", 150e9, "580.65.06")
PLAIN = NodeReport({"python": "3.11.9", "torch": "2.13.0+cu130", "vllm": "0.32.0"}, (CARD,), 65_536, 64e9)


def test_a_line_is_ok_or_says_what_to_do() -> None:
    assert str(Finding("disk", "fast")) == "ok disk: fast"
    assert str(Finding("disk", "slow", "take another")) == "disk: slow: take another"


def test_drivers_are_there_new_enough_and_the_same() -> None:
    assert findings.drivers({"a": PLAIN, "b": replace(PLAIN, cards=())}).text == (
        "580.65.06, torch 2.13.0+cu130, 1 x H200 on a"
    )
    assert findings.drivers({"a": replace(PLAIN, cards=())}).ok
    assert findings.drivers({"a": replace(PLAIN, cards=(replace(CARD, driver="[N/A]"),))}).ok
    old = replace(PLAIN, cards=(replace(CARD, driver="570.1"),))
    assert "570.1 on b" in str(findings.drivers({"a": PLAIN, "b": old}))
    assert findings.drivers({"a": old}).mend == "install 580 or newer"
    without = replace(old, packages={"torch": "2.13.0+cu126"})
    assert findings.drivers({"a": without}).ok, "only vLLM's wheel asks for it"


def test_a_cpu_build_on_a_node_with_gpus_is_found() -> None:
    """The adversary: `make setup` for CPUs run on a GPU node, whose GPUs nobody would use."""
    built = replace(PLAIN, packages={"torch": "2.13.0+cpu"})
    assert "torch 2.13.0+cpu on a, which has GPUs" in str(findings.drivers({"a": built}))


def test_packages_must_be_the_same_everywhere() -> None:
    assert findings.packages({"a": PLAIN, "b": PLAIN}, "this process", PLAIN).ok
    other = replace(PLAIN, packages=PLAIN.packages | {"torch": "2.12.0"})
    assert "torch is 2.12.0 on b, 2.13.0+cu130 in this process" in str(
        findings.packages({"a": PLAIN, "b": other}, "this process", PLAIN)
    )
    fewer = replace(PLAIN, packages={"python": "3.11.9", "torch": "2.13.0+cu130"})
    assert "vllm is none on a" in str(findings.packages({"a": fewer}, "this process", PLAIN))


def test_a_clock_is_wrong_only_beyond_what_the_network_explains() -> None:
    assert findings.clocks({"a": (0.01, 0.02), "b": (-4.0, 3.0)}).ok
    assert "b is 4.0 s behind the driver" in str(findings.clocks({"a": (0.0, 0.1), "b": (-4.0, 0.5)}))


def test_limits_name_the_node_that_is_short() -> None:
    files, shm = findings.limits({"a": PLAIN}, {"a": 60e9})
    assert files.ok and shm.ok
    short = replace(PLAIN, open_files=1024, shm_bytes=64e6)
    files, shm = findings.limits({"a": PLAIN, "b": short}, {"a": 60e9, "b": 60e9})
    assert "1,024 for a process on b" in files.text and "ulimit" in files.mend
    assert "/dev/shm of b has 64.0 MB, its object store 60.0 GB" in shm.text and "--shm-size" in shm.mend
    unlimited = replace(PLAIN, open_files=float("inf"))
    assert str(findings.limits({"a": unlimited}, {"a": 0})[0]) == "ok open files: no limit"
    assert "1,024 for a process on b" in findings.limits({"a": unlimited, "b": short}, {"a": 0, "b": 0})[0].text


def test_a_process_without_a_limit_has_more_files_than_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug: RLIM_INFINITY is -1, the least of all nodes, so that another node's limit was not seen."""
    limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    assert inspector.report().open_files == float("inf")


def test_a_card_of_which_nvidia_smi_knows_little_is_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug: "[N/A]" for the memory that a chip shares with its host ended `plan` and the doctor's first check."""
    said = "NVIDIA H200, 143771, 580.65.06\nNVIDIA GB10, [N/A], [N/A]\n"
    monkeypatch.setattr(nodes.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said))
    assert nodes.cards() == [
        Card("NVIDIA H200", 143771 * 2**20, "580.65.06"),
        Card("NVIDIA GB10", float("inf"), "[N/A]"),
    ]


@pytest.mark.parametrize(("gpus", "said"), [([], "there is no GPU"), ([1.0], "there is one GPU"), ([0.0, 1.0], "one")])
def test_without_two_gpus_there_is_nothing_to_send_between(tmp_path: Path, gpus: list[float], said: str) -> None:
    overrides = ["weights.backend=nccl", "learner.gpus_per_rank=1", "rollout.gpus_per_generator=1"]
    doctor = Doctor(configs.load(None, overrides), tmp_path)
    doctor._nodes = {str(number): Node("", "", 1.0, each, 0.0, 0.0) for number, each in enumerate(gpus)}
    [finding] = doctor._broadcast()
    assert finding.ok and said in finding.text


def test_a_directory_that_is_still_to_be_made_is_where_its_parent_is(tmp_path: Path) -> None:
    """The bug: the disk's check failed for a checkpoint.directory that the run would make."""
    config = configs.load(None, [f"checkpoint.directory={tmp_path}/not/yet"])
    found = Doctor(config, tmp_path / "runs" / "first")._disk()
    assert all(each.ok and f"to {tmp_path}," in each.text for each in found) and len(found) == 2
    assert list(tmp_path.iterdir()) == []


def test_rates_and_space_have_a_floor() -> None:
    assert findings.store({("a", "b"): 1e9, ("b", "a"): 2e9}).ok
    assert "from b to a" in findings.store({("a", "b"): 1e9, ("b", "a"): 2e7}).text
    assert findings.disk("/runs", 1e9, 1e12).ok and findings.disk("s3://runs", 1e9, None).ok
    assert "free some space" in findings.disk("/runs", 1e9, 1e9).mend
    assert "faster directory" in findings.disk("/runs", 1e6, 1e12).mend


@pytest.mark.parametrize("difference", [0.5, float("nan")])
def test_engines_must_agree_within_their_precision(difference: float) -> None:
    assert findings.engine({"a": 1e-4}, "vllm", "float32").ok and findings.engine({"a": 0.1}, "vllm", "bfloat16").ok
    assert not findings.engine({"a": 0.0, "b": difference}, "vllm", "float32").ok
    assert findings.teacher({"a": 0.0}, "torch", "float32").ok
    assert "on b" in findings.teacher({"a": 0.0, "b": difference}, "torch", "bfloat16").text


def test_the_engine_that_a_size_decides_needs_no_embedded_student_and_says_which_checkpoint_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug: rollout.engine=auto looked for a directory called embedded, and sent people to the logs of actors."""
    asked = []
    monkeypatch.setattr(Doctor, "_on_holders", lambda _, method, gpus, settings: asked.append(settings) or {"a": 0.0})
    [finding] = Doctor(configs.load(None, ["rollout.engine=auto"]), tmp_path)._engine()
    assert finding.ok and asked[0].engine == "torch"
    config = configs.Config()
    elsewhere = replace(config, student=replace(config.student, path=str(tmp_path / "student")))
    [finding] = Doctor(elsewhere, tmp_path)._engine()
    assert finding.text.startswith(f"student.path={tmp_path}/student") and "rollout.engine=auto" in finding.mend
    assert len(asked) == 1


@pytest.mark.parametrize("number", range(2, 9))
def test_in_a_tournament_each_pair_meets_once_and_nobody_twice_at_a_time(number: int) -> None:
    rounds = tournament(range(number))
    pairs = [tuple(sorted(pair)) for each in rounds for pair in each]
    assert sorted(pairs) == list(itertools.combinations(range(number), 2))
    assert all(len({member for pair in each for member in pair}) == 2 * len(each) for each in rounds)


def test_a_check_that_fails_or_hangs_is_a_line_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """The adversaries: an error of any kind, and an answer that never comes."""
    doctor = Doctor(configs.load(), tmp_path)

    def look() -> list[Finding]:
        doctor._nodes["a"] = SimpleNamespace(store_bytes=0.0, gpus=0.0)
        doctor._reports["a"] = replace(PLAIN, cards=())
        return [Finding("nodes", "1 of 1 answer")]

    def fail() -> list[Finding]:
        raise ZeroDivisionError("a\nbug")

    monkeypatch.setattr(doctor, "_look", look)
    for check in ("_clocks", "_store", "_broadcast", "_engine"):
        monkeypatch.setattr(doctor, check, fail)
    monkeypatch.setattr("opd_ray.doctor.checks._ENGINE_S", 0.01)
    monkeypatch.setattr(doctor, "_teacher", lambda: time.sleep(60))
    monkeypatch.setattr("opd_ray.doctor.checks.report", lambda: doctor._reports["a"])
    lines = [str(each) for each in doctor.findings()]
    assert [line.partition(":")[0] for line in lines] == [
        *("ok nodes", "ok driver", "ok packages", "clocks", "ok open files", "ok shared memory"),
        *("object store", "ok disk", "gloo broadcast", "engine", "teacher"),
    ]
    assert lines[3] == "clocks: a bug: see the logs of its actors in the Ray dashboard"
    assert "no answer within 0.01 s" in lines[-1]
    assert list(tmp_path.iterdir()) == [], "the disk is left as it was"
