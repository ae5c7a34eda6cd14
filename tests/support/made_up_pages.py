"""The report's page of some runs, as a test reads it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

from opd_ray.report import write_report


def report(*runs: Path, **options: Any) -> tuple[str, dict[str, Any]]:
    """The page's text and its embedded data."""
    output = runs[0].parent / "report.html"
    write_report(runs, output, **options)
    page = output.read_text()
    packed = re.search(r'id="data">([^<]*)<', page)[1]
    return page, json.loads(gzip.decompress(base64.b64decode(packed)))


def panels(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {panel["title"]: panel for group in data["groups"] for panel in group["panels"]}
