"""Keys in a configuration: it is written into the run directory, into every checkpoint and into the report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from opd_ray.errors import InputError

_IN_ADDRESS = re.compile(r"://[^/@\s]*:(?!\d+(?:/|$))[^@\s?]*@")
"""A key of AWS may have a slash in it; a port has none before it."""
_IN_OPTIONS = re.compile(
    r"://.*[?&]([^=&]*(?:key|secret|token(?!s)|password|signature|credential)[^=&]*|sig|sv)=[^&]", re.I
)
_VARIABLE = re.compile(
    r"(?:^|_)(?:API_?KEY|ACCESS_KEY(?:_ID)?|(?:PRIVATE|SECRET)_KEY|SECRET|(?<!MAX_)TOKEN|PAT|PASS(?:WORD|WD)?|"
    r"CREDENTIALS|CONNECTION_STRING)(?:$|_(?!(?:PATH|FILE|DIR)$))",
    re.I,
)
"""HF_TOKEN and HF_TOKEN_2 are keys, and HF_TOKEN_PATH says where one lies."""
_INSTEAD = (
    "give the nodes a role, or set them in the environment that Ray starts in there (AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ...)"
)


def without_keys(text: str) -> str:
    """A text to show: an address without its password, and without its options where these hold a key."""
    shown = _IN_ADDRESS.sub("://", text)
    return shown.partition("?")[0] if _IN_OPTIONS.search(text) else shown


def check_no_keys(raw: Any, name: str = "") -> None:
    """Raises InputError for a URI that carries a password or a key, and for an environment variable that is one; what
    it is, the message does not say."""
    if isinstance(raw, str):
        if (shown := without_keys(raw)) != raw:
            instead = "name the variable that holds it in url_key_env" if name.endswith(".url") else _INSTEAD
            raise InputError(
                f"{name}={shown}: the address carries a key, which would be written into config.yaml, checkpoints and "
                f"the report; leave it out of the address and {instead}"
            )
    elif isinstance(raw, Mapping):
        for key, value in raw.items():
            if name == "env" and _VARIABLE.search(str(key)):
                raise InputError(
                    f"env.{key} would be written into config.yaml, checkpoints and the report, and Ray shows it to "
                    f"all; {_INSTEAD}"
                )
            check_no_keys(value, f"{name}.{key}" if name else str(key))
    elif isinstance(raw, Sequence):
        for value in raw:
            check_no_keys(value, name)
