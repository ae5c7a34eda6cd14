"""What a role's policies allow, by IAM's rules: an Allow whose action, resource and conditions all match.

moto checks neither conditions nor which roles a call passes on, which is where Ray's own role fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any


def allowed(
    policies: Sequence[Mapping[str, Any]], action: str, resource: str = "*", context: Mapping[str, str] | None = None
) -> bool:
    """``policies`` are documents; ``context`` is what IAM compares conditions with, as {"iam:PassedToService": ...}."""
    statements = [statement for policy in policies for statement in policy["Statement"]]
    assert all(statement["Effect"] == "Allow" for statement in statements)
    return any(
        _matches(statement["Action"], action)
        and _matches(statement["Resource"], resource)
        and _fulfilled(statement.get("Condition", {}), context or {})
        for statement in statements
    )


def _matches(patterns: str | list[str], value: str) -> bool:
    return any(fnmatchcase(value, each) for each in ([patterns] if isinstance(patterns, str) else patterns))


def _fulfilled(conditions: Mapping[str, Mapping[str, str]], context: Mapping[str, str]) -> bool:
    assert conditions.keys() <= {"StringEquals", "StringLike"}
    return all(
        fnmatchcase(context.get(key, ""), wanted) if operator == "StringLike" else context.get(key) == wanted
        for operator, wanted_by_key in conditions.items()
        for key, wanted in wanted_by_key.items()
    )
