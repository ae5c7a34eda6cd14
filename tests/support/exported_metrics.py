"""What the dashboard and the alert rules ask Prometheus for; tests compare it with what a run exports."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import yaml

GRAFANA = Path(__file__).parents[2] / "cluster" / "grafana"
DASHBOARD, RULES = GRAFANA / "opd-ray.json", GRAFANA / "alerts.yaml"


def panels() -> list[dict]:
    return json.loads(DASHBOARD.read_text())["panels"]


def rules() -> list[dict]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@functools.cache
def queries() -> dict[str, str]:
    """PromQL by where it stands."""
    asked = {f"panel {panel['title']}, {t['refId']}": t["expr"] for panel in panels() for t in panel.get("targets", [])}
    return asked | {f"alert {rule['alert']}": rule["expr"] for rule in rules()}


def names(query: str) -> list[re.Pattern[str]]:
    """The metrics that a query reads, as patterns of whole names."""
    by_pattern = re.findall(r'__name__=~"([^"]+)"', query)
    plain = re.findall(r"\bray_(?!io_cluster)\w+", re.sub(r'"[^"]*"', "", query))
    return [re.compile(pattern) for pattern in (*by_pattern, *plain)]
