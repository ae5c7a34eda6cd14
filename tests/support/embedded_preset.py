"""What tests with small models of their own take over from the embedded ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd_ray.config.loading import embedded_preset, leaves


def preset(beside: Mapping[str, Any] | None = None) -> list[str]:
    """The embedded models' settings as overrides, but for those that ``beside`` has."""
    taken = dict(leaves(beside or {}))
    return [f"{name}={value}" for name, value in leaves(embedded_preset()) if name not in taken]
