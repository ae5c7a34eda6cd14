"""No key gets into what is written or uploaded."""

from __future__ import annotations

import os
import stat
from fnmatch import fnmatch
from pathlib import Path

import pytest

from opd_ray import config as configs
from opd_ray.disk import private, whole
from opd_ray.errors import InputError
from opd_ray.run.upload import check_upload
from opd_ray.snapshots.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
PLANTED = "AKIA" + "QWERTYUIOPASDFGH"
NAMES = [
    ".env",
    ".env.local",
    "infra/.aws/credentials",
    "deploy/server.pem",
    ".ssh/id_ed25519",
    "gcp-service-account.json",
]


@pytest.mark.parametrize(
    "override",
    [
        f"checkpoint.directory=s3://{PLANTED}:geheim@bucket/runs",
        f"checkpoint.directory=s3://{PLANTED}:geheim/auch@bucket/runs",
        f"checkpoint.directory=s3://bucket/runs?access_key={PLANTED}&secret_key=geheim",
        f"checkpoint.directory=abfs://container@account/x?sig={PLANTED}",
        f"teacher.url=['http://user:{PLANTED}@host:8000']",
        f"env.AWS_SECRET_ACCESS_KEY={PLANTED}",
        f"env.HF_TOKEN={PLANTED}",
        f"env.GITHUB_PAT={PLANTED}",
        f"env.HF_TOKEN_2={PLANTED}",
        f"env.CLIENT_SECRET_VALUE={PLANTED}",
    ],
)
def test_a_key_in_the_configuration_is_refused_and_not_repeated(override):
    instead = "give the nodes a role, or set them in the environment|name the variable that holds it in url_key_env"
    with pytest.raises(InputError, match=instead) as caught:
        configs.load(None, [override])
    assert PLANTED not in str(caught.value) and "geheim" not in str(caught.value)
    assert override.partition("=")[0] in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint.directory=s3://bucket/runs/{run}?region=eu-central-1&endpoint_override=minio:9000",
        "teacher.url=['http://host:8000']",
        "env.TOKENIZERS_PARALLELISM=0",
        "env.NCCL_DEBUG=INFO",
        "env.HF_TOKEN_PATH=/secrets/token",
        "env.MAX_TOKEN=5",
        "checkpoint.directory=s3://bucket/runs?max_tokens=5",
    ],
)
def test_what_is_no_key_is_taken(override):
    configs.load(None, [override])


def test_a_run_of_a_former_version_that_holds_a_key_is_reported_without_it(tmp_path):
    from made_up_runs import make_run
    from opd_ray.report.runs import read_run

    make_run(tmp_path / "run", seed=1, steps=2)
    before = (tmp_path / "run" / "config.yaml").read_text()
    saved = f"{before}\ncheckpoint: {{directory: 's3://{PLANTED}:geheim@bucket/runs'}}\n"
    (tmp_path / "run" / "config.yaml").write_text(saved)
    assert read_run(tmp_path / "run").config["checkpoint.directory"] == "s3://bucket/runs"


def checkout(directory: Path, files: dict[str, str]) -> Path:
    for name, content in {".rayignore": (ROOT / ".rayignore").read_text(), **files}.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return directory


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("notes.txt", f"my key is {PLANTED}", "an AWS access key"),
        ("jobs/deep/settings.yaml", "token: hf_" + "a" * 34, "a Hugging Face token"),
        ("key.txt", "-----BEGIN RSA " + "PRIVATE KEY-----\n" + "MIIE" * 16, "a private key"),
    ],
)
def test_a_checkout_with_a_key_in_it_is_not_handed_in(tmp_path, name, content, kind):
    with pytest.raises(InputError, match=f"{name} holds {kind} and would be uploaded") as caught:
        check_upload(checkout(tmp_path, {name: content}))
    assert content not in str(caught.value)


def test_a_key_where_keys_are_kept_is_left_out_and_does_not_hinder(tmp_path):
    check_upload(checkout(tmp_path, dict.fromkeys(NAMES, PLANTED) | {"runs/a/x.txt": PLANTED}))


def test_ray_s_package_of_a_checkout_has_no_file_that_is_a_key(tmp_path):
    """By Ray's own reading of what is left out."""
    from ray._private.runtime_env import packaging

    source, target = (
        checkout(tmp_path / "checkout", dict.fromkeys(NAMES, PLANTED) | {"jobs/a.py": "1"}),
        tmp_path / "a.zip",
    )
    packaging.create_package(str(source), target, include_gitignore=False, excludes=[])
    import zipfile

    with zipfile.ZipFile(target) as package:
        names = package.namelist()
        assert any(name.endswith("a.py") for name in names)
        assert not [name for name in names if PLANTED.encode() in package.read(name)]


def test_neither_git_nor_docker_takes_a_file_that_is_a_key():
    for ignored in (".gitignore", ".dockerignore", ".rayignore"):
        lines = [line.strip().removeprefix("**/").rstrip("/") for line in (ROOT / ignored).read_text().splitlines()]
        for name in NAMES:
            assert any(fnmatch(part, line) for part in Path(name).parts for line in lines), f"{ignored}: {name}"


def test_this_checkout_could_be_handed_in():
    check_upload(ROOT)


def test_what_a_run_writes_is_its_user_s_alone(tmp_path):
    before = os.umask(0o022)
    try:
        with private():
            (tmp_path / "run").mkdir()
            with whole(tmp_path / "run" / "config.yaml") as partial:
                partial.write_text("seed: 1")
        Storage(tmp_path / "elsewhere" / "checkpoints").write("step-1/state.json", [b"{}"])
        (tmp_path / "other").mkdir()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {
        "run": 0o700,
        "config.yaml": 0o600,
        "elsewhere": 0o700,
        "checkpoints": 0o700,
        "step-1": 0o700,
        "state.json": 0o600,
        "other": 0o755,
    }
