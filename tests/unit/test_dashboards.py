"""The Grafana dashboard and the alert rules, without Grafana and without a run."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import promql_parser
import pytest

import exported_metrics
from opd_ray.watch.catalogue import METRICS
from opd_ray.watch.metrics import port_name


@pytest.fixture(scope="module")
def built():
    return SimpleNamespace(**runpy.run_path(str(exported_metrics.GRAFANA / "build.py")))


def test_the_dashboard_and_the_table_of_metrics_are_those_that_their_script_builds(built):
    assert exported_metrics.DASHBOARD.read_text() == built.text(), "run python cluster/grafana/build.py"
    assert built.README.read_text() == built.readme(), "run python cluster/grafana/build.py"


def test_the_catalogue_names_the_alerts_that_read_a_metric():
    named = {(alert, each.name) for each in METRICS.values() for alert in each.alerts.split(", ") if alert}
    read = set()
    for rule in exported_metrics.rules():
        for pattern in exported_metrics.names(rule["expr"]):
            read |= {
                (rule["alert"], name)
                for name in METRICS
                if pattern.fullmatch(f"ray_{port_name(name.replace('*', 'learn'))}")
            }
    assert named == read


@pytest.mark.parametrize("where", exported_metrics.queries())
def test_every_query_is_promql_on_our_metrics(where):
    query = exported_metrics.queries()[where]
    promql_parser.parse(query)
    assert exported_metrics.names(query)
    if where.startswith("panel"):
        assert query.count('run=~"$Run"') == len(exported_metrics.names(query)), "a query that keeps to no run"


def test_panels_do_not_share_ids_or_space():
    panels = exported_metrics.panels()
    assert max(Counter(panel["id"] for panel in panels).values()) == 1
    taken = Counter()
    for panel in panels:
        x, y, w, h = (panel["gridPos"][side] for side in "xywh")
        assert x + w <= 24
        taken.update((x + i, y + j) for i in range(w) for j in range(h))
    assert max(taken.values()) == 1


def test_a_row_for_everything_one_wants_to_know():
    rows = [panel["title"] for panel in exported_metrics.panels() if panel["type"] == "row"]
    assert rows == [
        "Overview",
        "Rooms",
        "Lengths, truncation, repetition",
        "Staleness",
        "Loss",
        "Mixture",
        "Guard",
        "Restarts and recovery",
        "Weight sync",
        "Checkpoints",
    ]


def test_a_pattern_gives_one_line_for_each_room(built):
    line = built.Line("pool/*_ready")
    pattern = exported_metrics.names(line.expr)[0]
    assert pattern.fullmatch("ray_opd_pool_teacher_generate_ready")[1] == "teacher_generate"
    assert line.label == "{{part}} · {{run}}"
    assert built.Line("{run/step} - {checkpoint/step}").expr.count("max by (run)") == 2


def test_every_alert_says_how_bad_what_and_where_to_read_on():
    headings = re.findall(r"^### (\w+)$", (exported_metrics.GRAFANA / "README.md").read_text(), re.MULTILINE)
    names = [rule["alert"] for rule in exported_metrics.rules()]
    assert headings == names, "README.md has one heading for every alert, in their order"
    for rule in exported_metrics.rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert re.search(r"\$labels\.(run|instance) ", rule["annotations"]["summary"])
        assert len(rule["annotations"]["description"]) > 80
        file, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert Path(file) == Path("cluster/grafana/README.md")
        assert anchor == rule["alert"].lower()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian's package prometheus)")
def test_alerts_fire_when_they_should_and_only_then():
    rules = subprocess.run(
        ["promtool", "test", "rules", "alerts-test.yaml"], cwd=exported_metrics.GRAFANA, capture_output=True, text=True
    )
    assert rules.returncode == 0, rules.stdout + rules.stderr


def test_every_alert_has_a_test():
    tests = (exported_metrics.GRAFANA / "alerts-test.yaml").read_text()
    assert {rule["alert"] for rule in exported_metrics.rules()} == set(re.findall(r"Opd\w+", tests))
