"""Data sets of the Hugging Face Hub, by the library `datasets`: downloaded once, kept in its cache by content.

org/name:split              open-r1/OpenR1-Math-220k:train, or a part of it: train[:1000]
org/name/config:split       openai/gsm8k/main:test
org/name:split@revision     of a branch, tag or commit
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from opd_ray.errors import InputError

_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<config>[\w.-]+))?:(?P<split>[^@]+)(?:@(?P<revision>.+))?"
)
_TIMEOUT_S = 10.0


def is_hub(source: str) -> bool:
    """Is it written as a data set of the Hub?"""
    return bool(_NAME.fullmatch(source))


def read(source: str, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Row numbers and rows, nulls left out: the ``columns`` that are there, and the names of the others with None.

    Raises InputError where it cannot be had, within seconds where there is no network.
    """
    dataset = _load(source, **_NAME.fullmatch(source).groupdict())
    # Of no columns at all it would have no rows, and nobody could say what it has.
    there = [name for name in dict.fromkeys(columns) if name in dataset.column_names] or dataset.column_names[:1]
    others = dict.fromkeys(name for name in dataset.column_names if name not in there)
    for number, row in enumerate(dataset.select_columns(there), start=1):
        yield number, others | {name: value for name, value in row.items() if value is not None}


def _load(source: str, name: str, config: str | None, split: str, revision: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        if error.name != "datasets":
            raise
        raise InputError(f"{source} needs datasets, which is not installed; pip install 'opd_ray[data]'") from None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    datasets.logging.set_verbosity_error()
    online = datasets.config.HF_HUB_OFFLINE
    problem = None
    try:
        # One request with a deadline: load_dataset alone would retry for minutes without a network.
        HfApi().dataset_info(name, revision=revision, timeout=_TIMEOUT_S)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError(f"{source}: the Hub has no such data set, or asks who you are ({_brief(error)})") from None
    except Exception as error:
        problem, datasets.config.HF_HUB_OFFLINE = error, True
    try:
        if problem and revision:
            raise problem  # the library would take whatever revision is in its cache
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # ValueError, DatasetNotFoundError, ConnectionError, ... by what is the matter
        if not problem:
            raise InputError(f"{source}: datasets cannot load it ({_brief(error)})") from None
        call = f"datasets.load_dataset({name!r}, {config!r}, split={split!r}).to_parquet('rows.parquet')"
        raise InputError(
            f"{source}: the Hugging Face Hub cannot be reached ({_brief(problem)}), and its cache here does not have "
            f"it; where there is a network: {call}, and give that file"
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = online


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
