"""``opd-ray push``: a student with its model card to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from opd_ray.errors import InputError, RunError
from opd_ray.rooms.threads import within
from opd_ray.run.export import run_of, student_in

_T = TypeVar("_T")
_ANSWER_S = 60.0
"""What the Hub may take to answer a question."""
_LEAST_BYTES_PER_S = 2**20
"""A slower upload is given up."""


def push(checkpoint: str, repository: str, *, private: bool = False) -> str:
    """Uploads the student of a run, or of one of its checkpoints/step-N; returns its address.

    The repository is made where there is none, ``private`` if asked for. Raises InputError, and has changed nothing,
    where there is no run, no token or no answer; RunError where the upload fails.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if run_of(Path(checkpoint)) is None:
        raise InputError(f"push: {checkpoint} is no run directory or checkpoint of one; give the --run-dir of a run")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"push: {repository} is no name of a repository, as org/name ({error})") from None
    if get_token() is None:
        raise InputError("push: there is no token for the Hugging Face Hub; set HF_TOKEN, or log in: hf auth login")
    with student_in(checkpoint) as student:
        size = sum(file.stat().st_size for file in Path(student).rglob("*") if file.is_file())
        hub = HfApi()
        made = _asked(
            lambda: hub.create_repo(repository, private=private or None, exist_ok=True),
            _ANSWER_S,
            InputError,
            f"push: {repository} cannot be written",
        )
        _asked(
            lambda: hub.upload_folder(repo_id=made.repo_id, folder_path=student, commit_message=f"From {checkpoint}"),
            _ANSWER_S + size / _LEAST_BYTES_PER_S,
            RunError,
            f"push: the upload to {repository} failed, and can be tried again",
        )
    return str(made)


def _asked(call: Callable[[], _T], most_s: float, kind: type[Exception], what: str) -> _T:
    """What the Hub answers; what it raises, or no answer, becomes one line."""
    import httpx

    try:
        return within(most_s, call)
    except (OSError, httpx.HTTPError) as error:  # TimeoutError and the Hub's own errors are OSErrors
        raise kind(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error
