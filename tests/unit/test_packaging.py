"""What is installed where: the wheel, the lock of GPU environments, the image."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETUP = (ROOT / ".ci/setup").read_text()
EXTRAS = re.search(r"^extras=(.*)$", SETUP, re.MULTILINE)[1].split(",")
DOCKERFILE = (ROOT / "cluster/Dockerfile").read_text()


def locked() -> dict[str, list[str]]:
    """Versions by package; several where they differ by Python's."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / ".ci/gpu-lock.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            found.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    return found


def test_the_lock_has_what_the_project_asks_for() -> None:
    """It was made of an older pyproject.toml otherwise: run .ci/lock."""
    versions = locked()
    asked = [*PROJECT["dependencies"], "s3fs>=2026", "gcsfs>=2026", "boto3", "google-api-python-client"]
    for extra in ["gpu", *EXTRAS]:
        asked += PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, asked):
        there = versions.get(canonicalize_name(requirement.name), [])
        assert there and all(requirement.specifier.contains(version) for version in there), str(requirement)


def test_the_image_is_of_the_lock_on_cuda_13() -> None:
    versions = locked()
    assert re.search(r"^FROM nvidia/cuda:13\.", DOCKERFILE, re.MULTILINE)
    assert {"nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= versions.keys()
    assert not [name for name in versions if re.fullmatch(r"nvidia-(cudnn|nccl|cublas|cuda-runtime)-cu1[0-2]", name)]
    assert "--constraints /tmp/gpu-lock.txt" in DOCKERFILE
    assert re.findall(r"\buv(?:==|:)([\d.]+)", DOCKERFILE + (ROOT / "cluster/node/setup").read_text()) == ["0.13.9"] * 2
    assert set(re.findall(r"--extra (\w+)", DOCKERFILE)) == {"gpu", *EXTRAS} - {"dev"}
    for name in ("kuberay-cluster", "kuberay-job"):
        manifests = yaml.safe_load_all((ROOT / f"cluster/{name}.yaml").read_text())
        text = str(list(manifests))
        assert re.findall(r"'rayVersion': '([\d.]+)'", text) == versions["ray"]


def test_docker_is_not_sent_what_git_ignores() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for pattern in (ROOT / ".gitignore").read_text().split():
        assert {pattern.rstrip("/"), f"**/{pattern.rstrip('/')}"} & set(ignored), pattern


def test_every_file_of_the_package_is_in_the_wheel() -> None:
    """The build leaves out what git ignores: a room of the name `build` or `runs` would be missing in it."""
    files = [str(path.relative_to(ROOT)) for path in (ROOT / "opd_ray").rglob("*") if "__pycache__" not in path.parts]
    told = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        cwd=ROOT,
        input="\n".join(files),
        capture_output=True,
        text=True,
    )
    if told.returncode == 128:
        pytest.skip("no git repository")
    assert told.stdout == ""
    assert {"opd_ray/py.typed", "opd_ray/config/embedded.yaml", "opd_ray/recipes/gkd.yaml"} <= set(files)
