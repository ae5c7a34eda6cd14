"""What tests with small models of their own take over from the embedded ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from opd_ray.config.loading import embedded_preset


def leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``a.b`` and its value, of nested mappings."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def preset(beside: Mapping[str, Any] | None = None) -> list[str]:
    """The embedded models' settings as overrides, but for those that ``beside`` has."""
    taken = dict(leaves(beside or {}))
    return [f"{name}={value}" for name, value in leaves(embedded_preset()) if name not in taken]
