"""jobs/conformance.py: our losses against its float64 references; others' are what the job is for."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import get_args

import pyarrow.parquet as pq
import pytest
import torch

from opd_ray.config.method import Correction, Divergence, Support, Tail

JOB = Path(__file__).parents[2] / "jobs" / "conformance.py"


@pytest.fixture(scope="module")
def job() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(JOB.parent)
        yield importlib.import_module("conformance")


@pytest.mark.slow
def test_every_loss_of_ours_is_what_its_formula_says(job: ModuleType) -> None:
    batch = job.draw()
    found = job.compare(batch, {})
    assert {name: row["opd_ray"] for name, row in found.items() if not row["opd_ray"].agrees} == {}
    assert len(found) == len(job.entries())


def test_there_is_an_entry_for_all_that_a_configuration_can_ask_for(job: ModuleType) -> None:
    losses = [entry.loss for entry in job.entries()]
    students = [loss["student"] for loss in losses if "reference" not in loss]
    on_top_k = {(each["divergence"], each["support"], each["tail"]) for each in students if "tail" in each}
    distributions = ("reverse_kl", "forward_kl", "jsd")
    supports = [each for each in get_args(Support) if each != "full"]
    assert on_top_k == {(name, on, tail) for name in distributions for on in supports for tail in get_args(Tail)}
    assert {each["divergence"] for each in students} == {*get_args(Divergence)}
    assert {loss.get("importance", {}).get("correction", "none") for loss in losses} == {*get_args(Correction)}
    assert {loss.get("reduction", "token") for loss in losses} == {"token", "sequence", "sum"}
    shaped = {name for loss in losses for name in loss.get("advantage", {})}
    assert shaped == {"policy", "clip", "extrapolation", "proximal", "teacher_coef", "constant"}
    assert any("loop_advantage" in loss for loss in losses)
    assert {"outliers", "position_weight", "lowest_share", "entropy_gate"} <= {
        name for each in students for name in each
    }


def test_a_loss_that_is_off_is_seen(job: ModuleType) -> None:
    """What is plausible and wrong: the forward KL in the reverse one's place, and a gradient of another scale."""
    batch = job.draw(lengths=(3, 5), vocabulary=24)
    by_name = {entry.name: entry for entry in job.entries()}
    entry = by_name["reverse_kl, full"]
    wanted = job.exact(batch, entry)
    other = dataclasses.replace(entry, loss=by_name["forward_kl, full"].loss)
    assert not job.error(batch, job.ours(batch, other), wanted).agrees

    def halved(of, logits: torch.Tensor) -> torch.Tensor:
        value = job.ours(batch, entry)(of, logits)
        return value.detach() + 0.5 * (value - value.detach())

    off = job.error(batch, halved, wanted)
    assert off.value < 1e-5 and off.gradient == pytest.approx(0.5, rel=1e-3) and not off.agrees


@pytest.mark.slow
def test_batch_and_references_are_the_same_each_time(job: ModuleType, tmp_path: Path) -> None:
    batch = job.draw(lengths=(2, 3), vocabulary=24)
    for name in ("a", "b"):
        job.write(batch, tmp_path / name)
    again = [pq.read_table(tmp_path / name / "references.parquet") for name in ("a", "b")]
    assert again[0].equals(again[1]) and again[0]["entry"].to_pylist() == [each.name for each in job.entries()]
    table = pq.read_table(tmp_path / "a" / "batch.parquet")
    assert table["token"].to_pylist() == batch.tokens.tolist()
    assert len(table["student_logits"][0]) == 24 and table["rollout"].to_pylist() == [0, 0, 1, 1, 1]
