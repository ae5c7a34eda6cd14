"""The catalogue of metrics has what a run logs, and nothing else; what the objective logs is in test_objective.py."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

from driven_run import cast_of, drive
from opd_ray.evaluation.evaluate import teacher_view
from opd_ray.watch import metrics
from opd_ray.watch.catalogue import METRICS, metric
from opd_ray.watch.metrics import port_name

EVERYTHING = {
    "buffer": {"golden_per_prompt": 1, "teacher_per_prompt": 1, "teacher_filter": "none"},
    "loss": {"golden": {"coef": 0.1}, "teacher": {"coef": 0.1}, "reference": {"coef": 0.1}},
    "data": {"golden": "some"},
    "evaluation": {
        "num_problems": 4,
        "every_steps": 3,
        "num_problems_during": 2,
        "sets": {"hard": {"samples": 2, "greedy": True, "num_problems": 4}},
    },
    "guard": {"level": "warn"},
    "rollout": {"horizon": 9},
    "teacher": {"url": "http://one:8000"},
}


def test_every_metric_of_a_run_is_in_the_catalogue_and_the_other_way_round(tmp_path, monkeypatch):
    on_port = set()

    def gauge(name, description, tag_keys):
        on_port.add(name)
        return SimpleNamespace(set=lambda value, tags: None)

    monkeypatch.setattr(metrics, "Gauge", gauge)
    drive(tmp_path / "one", cast_of(**EVERYTHING))
    drive(tmp_path / "other", cast_of(buffer={"golden_per_prompt": 0, "evidence": {}}))  # which takes no horizon
    files = [tmp_path / each / "metrics.jsonl" for each in ("one", "other")]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    logged = {name for line in lines for name in line} - {"step"}
    logged |= {name for name in METRICS if port_name(name) in on_port}
    assert {port_name(name) for name in logged} == on_port
    logged |= {f"evaluation/{name}" for name in teacher_view(Counter(tokens=2, repetitive_tokens=1, ends=1, cuts=1))}
    assert {name for name in logged if metric(name) is None} == set()
    of_learner = {"learner/loss", "learner/wait_s", "learner/train_s", "learner/weight_sync_s"}
    assert {metric(name).name for name in logged} | of_learner == {
        name for name in METRICS if not name.startswith("learner/") or name in of_learner
    }


def test_a_name_has_its_own_row_before_that_of_a_pattern():
    assert metric("restarts/total").name == "restarts/total" and metric("restarts/generate").name == "restarts/*"
    assert metric("learner/advantage_clip_fraction").meaning != metric("learner/clip_fraction").meaning
    assert metric("something/new") is None
