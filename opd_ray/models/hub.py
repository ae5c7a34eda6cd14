"""Models of the Hugging Face Hub: one commit of each for all of a run, and its files on this node.

org/name                the newest commit of the main branch
org/name@REVISION       that of a branch or a tag, or a commit

Before anything is loaded each becomes org/name@COMMIT (``pin``): a branch may move while workers that come later, or a
run that goes on, still fetch what it was. Who loads asks for a ``local_directory``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from opd_ray.config import Config, leaves, to_dict
from opd_ray.disk import whole
from opd_ray.errors import InputError, brief

_NAME = re.compile(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@(\w[\w.+/-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHOWN_DIGITS = 7
_TIMEOUT_S = 10.0
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
"""Configuration, tokenizer, the index of the weights; the licence goes with every student that is made of a model."""
_WEIGHTS = ("*.safetensors",)
_LEFT_OUT = ("*/*", "consolidated*")
"""The same weights once more, in the formats of others: original/, onnx/, Mistral's own files."""
_FROM_CACHE: set[str] = set()
"""Models of which this process could ask nobody: what the cache has of them is all there is."""
_Section = TypeVar("_Section")


def parts(path: str) -> tuple[str, str | None] | None:
    """Repository and revision (None where there is none) of what may be a model of the Hub; None of any other path."""
    found = _NAME.fullmatch(path)
    return None if found is None or ".." in path else (found[1], found[2])


def is_pinned(path: str) -> bool:
    """Does it name a commit of a model of the Hub?"""
    _, revision = parts(path) or (path, None)
    return revision is not None and bool(_COMMIT.fullmatch(revision))


def shown(path: str) -> str:
    """For people: a commit by its first digits."""
    return path[: _SHOWN_DIGITS - 40] if is_pinned(path) else path


def weight_names(files: Iterable[str]) -> list[str]:
    """Of the names of a repository's files those of the weights that are fetched."""
    return [
        file
        for file in files
        if any(fnmatch(file, kind) for kind in _WEIGHTS) and not any(fnmatch(file, kind) for kind in _LEFT_OUT)
    ]


def pin(name: str, path: str) -> tuple[str, list[str]]:
    """org/name@COMMIT of what ``path`` names now, and the names of its files there.

    One request with a deadline; where it gets no answer, what the cache here was told last, and no names of files.
    Raises InputError, which begins with ``name``, where there is no such model.
    """
    if (found := parts(path)) is None:
        raise InputError(
            f"{name}: no such directory; give a Hugging Face checkpoint directory, or org/name or org/name@REVISION (a "
            "branch, tag or commit) of its Hub"
        )
    repository, revision = found
    from huggingface_hub import HfApi

    try:
        # from_pretrained and snapshot_download would retry for half a minute without a network.
        about = HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT_S)
    except Exception as error:
        if (there := cached(path)) is None:
            # Of the Hub's own errors the first line is a status alone.
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(
                f"{name}: neither a directory here nor a checkpoint of the Hugging Face Hub or its local cache "
                f"({said}); give an existing directory, org/name or org/name@REVISION"
            ) from None
        _FROM_CACHE.add(pinned := f"{repository}@{there.name}")
        return pinned, []
    _remember(repository, revision or "main", about.sha)
    _FROM_CACHE.discard(pinned := f"{repository}@{about.sha}")
    return pinned, [each.rfilename for each in about.siblings or ()]


def pinned(config: Config, commits: Mapping[str, str]) -> Config:
    """``config`` with what ``commits`` has for it in the place of each path of a model."""

    def moved(section: _Section) -> _Section:
        return dataclasses.replace(section, path=commits.get(section.path, section.path))

    others = {name: moved(teacher) for name, teacher in config.more_teachers.items()}
    of_one = {name: moved(getattr(config, name)) for name in ("student", "teacher", "reference")}
    return dataclasses.replace(config, **of_one, more_teachers=others)


def commits_of(config: Config, saved: Mapping[str, Any]) -> dict[str, str]:
    """What the models of ``config`` are in ``saved``, the nested plain values of another: org/name@COMMIT, where the
    same field has one of the same repository."""
    theirs, found = dict(leaves(saved)), {}
    for name, path in leaves(to_dict(config)):
        its = str(theirs.get(name))
        if name.endswith(".path") and is_pinned(its) and parts(its)[0] == (parts(str(path)) or (None,))[0]:
            found[path] = its
    return found


def local_directory(path: str | Path, *, weights: bool = True) -> Path:
    """Where the files of a checkpoint directory, or of org/name@COMMIT, lie on this node: fetched first where they do
    not yet, the ``weights`` only where they are needed. Raises InputError where they cannot be had."""
    return Path(path) if os.path.isdir(path) else _fetched(str(path), weights)


@functools.cache
def _fetched(path: str, weights: bool) -> Path:
    """Asked for once in a process: adapters are merged with their base at every broadcast."""
    if not is_pinned(path):
        raise InputError(f"{path}: no such directory on this node; put it there, or give org/name of the Hub")
    repository, commit = parts(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # they go to stderr, where a refusal is one line
    try:
        return Path(
            snapshot_download(
                repository,
                revision=commit,
                allow_patterns=[*_SMALL, *(_WEIGHTS if weights else ())],
                ignore_patterns=list(_LEFT_OUT),
                local_files_only=path in _FROM_CACHE,
            )
        )
    except Exception as error:  # OSError, and of the library's HTTP client, by what is the matter
        raise InputError(
            f"{path}: cannot be fetched from the Hugging Face Hub ({brief(error)}), and is not whole in its cache on "
            "this node; see that the Hub can be reached, and that HF_TOKEN may read it"
        ) from None


def cached(path: str) -> Path | None:
    """The directory of a model of the Hub in the cache on this node, whole or not; of a branch or tag what it was when
    the Hub was last asked."""
    from huggingface_hub import try_to_load_from_cache

    repository, revision = parts(path) or (path, None)
    with contextlib.suppress(ValueError):  # no name that the Hub could have
        found = try_to_load_from_cache(repository, "config.json", revision=revision)
        return Path(found).parent if isinstance(found, str) else None
    return None


def _remember(repository: str, revision: str, commit: str) -> None:
    """Notes in the cache what a branch or tag is, as the library does: without a network it is this commit."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"))
    file = folder / "refs" / revision
    if revision != commit:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole(file) as partial:
                partial.write_text(commit)
