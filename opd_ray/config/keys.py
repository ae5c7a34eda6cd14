"""Keys in a configuration: it is written into the run directory, into every checkpoint and into the report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from opd_ray.errors import InputError

_IN_ADDRESS = re.compile(r"://[^/@\s]*:[^/@\s]*@")
_IN_OPTIONS = re.compile(r"://.*[?&]([^=&]*(?:key|secret|token|password|signature|credential)[^=&]*|sig|sv)=[^&]", re.I)
_VARIABLE = re.compile(r"(?:^|_)(?:API_?KEY|ACCESS_KEY(?:_ID)?|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS)(?:$|_)", re.I)
_INSTEAD = (
    "give the nodes a role, or set them in the environment that Ray starts in there (AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ...)"
)


def check_no_keys(raw: Any, name: str = "") -> None:
    """Raises InputError for a URI that carries a password or a key, and for an environment variable that is one; what
    it is, the message does not say."""
    if isinstance(raw, str):
        if _IN_ADDRESS.search(raw) or _IN_OPTIONS.search(raw):
            uri = re.sub(r"//[^/@]*@", "//", raw).partition("?")[0]
            raise InputError(
                f"{name}={uri}: the address carries a key, which would be written into config.yaml, checkpoints and "
                f"the report; leave it out of the address and {_INSTEAD}"
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
