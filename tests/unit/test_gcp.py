"""gcp.yaml in a project that gcp/account prepared: Ray's own bootstrap, and machines as Google's client takes them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from fake_google import FakeProject, validate_instance

DIRECTORY = Path(__file__).parents[2] / "cluster"
_PROJECT = "some-project"
_SSH_FROM = "203.0.113.7/32"
_GCLOUD = """#!/bin/bash
# Notes what it is asked to do; nothing is there yet, but for $BUDGETS.
[[ " $* " == *" billing projects describe "* ]] && echo billingAccounts/0X0X && exit
[[ " $* " == *" describe "* ]] && exit 1
printf '%q ' "$@" >> "$NOTED"; echo >> "$NOTED"
[[ " $* " == *" budgets list "* ]] && echo "$BUDGETS"
exit 0
"""


def _account(tmp_path: Path, *args: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """gcp/account with these arguments, and what it asked gcloud to do."""
    (tmp_path / "gcloud").write_text(_GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    noted = tmp_path / "noted"
    noted.touch()
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTED": str(noted)}
    done = subprocess.run(
        [DIRECTORY / "gcp/account", *args], env=environment, capture_output=True, text=True, timeout=30
    )
    prefix = ["--quiet", "--project", args[0]] if args else []
    calls = [shlex.split(line) for line in noted.read_text().splitlines()]
    assert all(call[:3] == prefix for call in calls)
    return done, [call[3:] for call in calls]


def _options(call: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in call if word.startswith("--"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeProject:
    """As gcp/account leaves it."""
    from ray.autoscaler._private.gcp import config, node

    _, calls = _account(tmp_path, _PROJECT, "us-central1", _SSH_FROM)
    made = [call[3] for call in calls if call[:3] == ["iam", "service-accounts", "create"]]
    found = FakeProject(_PROJECT, [f"{name}@{_PROJECT}.iam.gserviceaccount.com" for name in made])
    clients = (found.client("cloudresourcemanager"), found.client("iam"), found.client("compute"), None)
    monkeypatch.setattr(config, "construct_clients_from_provider_config", lambda _: clients)
    monkeypatch.setattr(node.GCPCompute, "get_new_authorized_http", lambda self, http: found)
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray puts the SSH key that it makes
    return found


def _cluster() -> dict[str, Any]:
    text = (DIRECTORY / "gcp.yaml").read_text()
    return prepare_config(yaml.safe_load(re.sub("project_id: CHANGE-ME|@CHANGE-ME", _filled, text)))


def _filled(found: re.Match[str]) -> str:
    return found[0].replace("CHANGE-ME", _PROJECT)


def test_head_and_workers_have_their_own_accounts_and_what_ray_grants_nobody_can_use(
    project: FakeProject, tmp_path: Path
) -> None:
    """`ray up` gives an account of its own compute.admin, storage.objectAdmin and every other account there is."""
    from ray.autoscaler._private.gcp.config import bootstrap_gcp
    from ray.autoscaler._private.gcp.node import GCPCompute

    config = bootstrap_gcp(_cluster())
    compute = GCPCompute(project.client("compute"), _PROJECT, config["provider"]["availability_zone"], "opd-ray")
    for kind, found in config["available_node_types"].items():
        # As in Ray's get_or_create_head_node: the head is what the bootstrap found, then its node_config.
        first = config["head_node"] if kind == config["head_node_type"] else {}
        compute.create_instance(first | found["node_config"], {"ray-node-name": f"ray-opd-ray-{kind}"}, False)
    accounts = [each["email"] for body in project.instances for each in body["serviceAccounts"]]
    domain = f"@{_PROJECT}.iam.gserviceaccount.com"
    assert accounts == [f"opd-ray-head{domain}", *[f"opd-ray-worker{domain}"] * 3]
    assert {member for binding in project.bindings for member in binding["members"]} == {
        f"serviceAccount:ray-autoscaler-sa-v1{domain}"
    }
    for body in project.instances:
        (interface,) = body["networkInterfaces"]
        assert interface["subnetwork"] == "regions/us-central1/subnetworks/opd-ray"
        assert body["tags"] == {"items": ["opd-ray"]}


def test_nothing_is_open_but_ssh_from_the_range_that_was_given(tmp_path: Path) -> None:
    done, calls = _account(tmp_path, _PROJECT, "us-central1", _SSH_FROM, "some-bucket")
    assert done.returncode == 0, done.stderr
    rules = {call[3]: _options(call) for call in calls if call[:3] == ["compute", "firewall-rules", "create"]}
    inside = {"network": "opd-ray", "allow": "all", "source-tags": "opd-ray", "target-tags": "opd-ray"}
    ssh = {"network": "opd-ray", "allow": "tcp:22", "source-ranges": _SSH_FROM, "target-tags": "opd-ray"}
    assert rules == {"opd-ray-nodes": inside, "opd-ray-ssh": ssh}
    (network,) = (call for call in calls if call[:3] == ["compute", "networks", "create"])
    assert network[3:] == ["opd-ray", "--subnet-mode=custom"]  # one that has no rule of its own


def test_the_head_may_start_machines_with_the_workers_account_and_no_other(tmp_path: Path) -> None:
    _, calls = _account(tmp_path, _PROJECT, "us-central1", _SSH_FROM, "some-bucket")
    head, worker = (f"opd-ray-{name}@{_PROJECT}.iam.gserviceaccount.com" for name in ("head", "worker"))
    grants = [
        (call[call.index("add-iam-policy-binding") + 1], _options(call)["member"].split(":")[1], _options(call)["role"])
        for call in calls
        if "add-iam-policy-binding" in call
    ]
    assert sorted(grants) == sorted(
        [
            (_PROJECT, head, "roles/compute.instanceAdmin.v1"),
            (worker, head, "roles/iam.serviceAccountUser"),
            ("gs://some-bucket", head, "roles/storage.objectUser"),
            ("gs://some-bucket", worker, "roles/storage.objectUser"),
        ]
    )
    disabled = ["iam", "service-accounts", "disable", f"ray-autoscaler-sa-v1@{_PROJECT}.iam.gserviceaccount.com"]
    assert disabled in calls


def test_a_budget_writes_when_half_and_when_all_of_it_is_spent(tmp_path: Path) -> None:
    done, calls = _account(tmp_path, _PROJECT, "us-central1", _SSH_FROM, "some-bucket", "500USD")
    assert done.returncode == 0, done.stderr
    (made,) = (call for call in calls if call[:3] == ["billing", "budgets", "create"])
    assert made[3:] == [
        "--billing-account=0X0X",
        f"--display-name=opd-ray-{_PROJECT}",
        "--budget-amount=500USD",
        f"--filter-projects=projects/{_PROJECT}",
        "--threshold-rule=percent=0.5",
        "--threshold-rule=percent=1.0",
    ]


def test_a_budget_that_is_there_gets_the_new_amount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUDGETS", "billingAccounts/0X0X/budgets/b")
    done, calls = _account(tmp_path, _PROJECT, "us-central1", _SSH_FROM, "some-bucket", "700USD")
    assert done.returncode == 0, done.stderr
    asked = [call for call in calls if call[:2] == ["billing", "budgets"] and call[2] != "list"]
    update = ["billing", "budgets", "update", "billingAccounts/0X0X/budgets/b"]
    assert asked == [[*update, "--billing-account=0X0X", "--budget-amount=700USD"]]


@pytest.mark.parametrize(
    "args",
    [
        (),
        (_PROJECT, "us-central1"),
        (_PROJECT, "us-central1", "0.0.0.0/0"),
        (_PROJECT, "us-central1", _SSH_FROM, "some-bucket", "500"),
    ],
)
def test_what_would_open_it_to_everybody_is_refused_before_anything_is_made(
    tmp_path: Path, args: tuple[str, ...]
) -> None:
    done, calls = _account(tmp_path, *args)
    assert (done.returncode, calls) == (2, [])
    assert done.stderr.startswith("account: ") and done.stderr.count("\n") == 1


def test_a_field_that_google_does_not_know_is_found() -> None:
    body = _cluster()["available_node_types"]["generator"]["node_config"]
    validate_instance(body)
    with pytest.raises(jsonschema.ValidationError, match="onHostMaintenanze"):
        validate_instance(body | {"scheduling": {"onHostMaintenanze": "TERMINATE"}})
