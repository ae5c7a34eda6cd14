"""The files of cluster/: their schemas take them and refuse misspelt fields, they fit each other, nothing is open."""

from __future__ import annotations

import copy
import os
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

import kuberay_crd
from opd_ray import config as configs
from opd_ray.config import Config

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "cluster"
LAUNCHED = ("aws", "gcp", "on-premises", "local")
KUBERNETES = ("kuberay-cluster", "kuberay-job", "kuberay-common", "kuberay-monitoring")
JOBS = ("job", "local-job")
ROLES = ("learner_node", "teacher_node", "generator_node")


def read(name: str) -> str:
    text = (DIRECTORY / f"{name}.yaml").read_text()
    if name == "kuberay-monitoring":  # its last spec is the alerts, as its header puts them together
        return text + "".join(f"  {line}" for line in (DIRECTORY / "grafana/alerts.yaml").read_text().splitlines(True))
    return text


def launched(name: str) -> dict[str, Any]:
    """As `ray up` reads it, with Ray's defaults."""
    return prepare_config(yaml.safe_load(read(name)))


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(read(name)))


def ray_cluster() -> dict[str, Any]:
    (found,) = (each for each in manifests("kuberay-cluster") if each["kind"] == "RayCluster")
    found["metadata"]["namespace"] = "default"
    return found


def cluster(name: str) -> dict[str, Any]:
    """The configuration that the autoscaler works with."""
    return _derive_autoscaling_config_from_ray_cr(ray_cluster()) if name == "kuberay-cluster" else launched(name)


def job(name: str) -> Config:
    return configs.load(DIRECTORY / f"{name}.yaml")


@pytest.mark.parametrize("name", LAUNCHED)
def test_rays_own_schema_takes_each_cluster(name: str) -> None:
    validate_config(launched(name))


@pytest.mark.parametrize("name", LAUNCHED)
def test_rays_own_schema_refuses_a_misspelt_field(name: str) -> None:
    config = launched(name)
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config(config | {"idle_timeout_minute": 1})
    node_type = next(iter(config["available_node_types"].values()))
    node_type["max_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(config)


@pytest.mark.parametrize("name", KUBERNETES)
def test_the_resources_schema_takes_each_manifest(name: str) -> None:
    for manifest in manifests(name):
        kuberay_crd.validate(manifest)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is a mapping whose keys Kubernetes decides on, not the user."""
    free = ("metadata", "resources", "requests", "limits", "nodeSelector", "rayStartParams", "labels")
    free += ("matchLabels", "annotations")
    found = [path] if isinstance(value, dict) else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        if key not in free or key == "resources" and "containers" in path:
            found += _paths(each, (*path, key))
    return found


@pytest.mark.parametrize("name", KUBERNETES)
def test_the_resources_schema_refuses_a_misspelt_field_at_any_depth(name: str) -> None:
    places = 0
    for manifest in manifests(name):
        for path in _paths(manifest):
            damaged = copy.deepcopy(manifest)
            place = damaged
            for key in path:
                place = place[key]
            place["replicaz"] = 1
            with pytest.raises(jsonschema.ValidationError):
                kuberay_crd.validate(damaged)
            places += 1
    assert places > 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("enableInTreeAutoscaling", "yes"),
        ("authOptions", {"mode": "tokens"}),
        ("autoscalerOptions", {"version": 2}),
        ("headGroupSpec", {"rayStartParams": {"num-cpus": 0}}),
    ],
)
def test_the_resources_schema_refuses_values_of_another_kind(field: str, value: Any) -> None:
    damaged = ray_cluster()
    damaged["spec"][field] = value
    with pytest.raises(jsonschema.ValidationError):
        kuberay_crd.validate(damaged)


def test_the_job_on_kubernetes_has_the_same_cluster() -> None:
    (ray_job,) = (each for each in manifests("kuberay-job") if each["kind"] == "RayJob")
    assert ray_job["spec"]["rayClusterSpec"] == ray_cluster()["spec"]


def test_the_job_on_kubernetes_runs_a_configuration_that_loads_and_continues_after_a_loss() -> None:
    (ray_job,) = (each for each in manifests("kuberay-job") if each["kind"] == "RayJob")
    words = shlex.split(ray_job["spec"]["entrypoint"])
    assert words[:5] == ["/opt/opd_ray/cluster/node/job", "python", "-m", "opd_ray", "train"]
    assert "--auto-resume" in words
    assert ray_job["spec"]["backoffLimit"] > 0
    config = configs.load(ROOT / words[words.index("--config") + 1], [word for word in words if "=" in word])
    results = words[words.index("--run-dir") + 1]
    assert config.checkpoint.location(Path(results)) == f"{results}/checkpoints"
    mounts = ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert any(results.startswith(mount["mountPath"]) for mount in mounts)


def test_two_runs_of_one_configuration_have_their_checkpoints_apart() -> None:
    """The bug: the directory was the same for all runs, and the second deleted what the first was writing."""
    for name in ("job", "local-job"):
        checkpoint = configs.load(DIRECTORY / f"{name}.yaml", []).checkpoint
        assert checkpoint.location(Path("/runs/first")) != checkpoint.location(Path("/runs/second"))


@pytest.mark.parametrize("name", ["aws", "gcp", "local", "kuberay-cluster"])
def test_one_kind_of_node_for_each_role_and_spot_machines_only_generate(name: str) -> None:
    node_types = cluster(name)["available_node_types"]
    for kind in node_types.values():
        roles = [role for role in ROLES if role in kind["resources"]]
        spot = re.search("spot", yaml.safe_dump(kind["node_config"]), re.IGNORECASE)
        assert not spot or roles == ["generator_node"]
    held = {role for kind in node_types.values() for role in ROLES if role in kind["resources"]}
    assert held == set(ROLES)


def test_spot_pods_only_generate() -> None:
    for group in ray_cluster()["spec"]["workerGroupSpecs"]:
        spot = "spot" in yaml.safe_dump(group["template"]["spec"]["nodeSelector"])
        assert spot == ("generator_node" in group["resources"])


def test_pods_offer_ray_what_they_request() -> None:
    spec = ray_cluster()["spec"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        assert group["resources"]["CPU"] == resources["requests"]["cpu"]
        assert group["resources"].get("GPU") == resources["requests"].get("nvidia.com/gpu")


@pytest.mark.parametrize(
    ("job_name", "cluster_name"), [("job", "aws"), ("job", "gcp"), ("job", "kuberay-cluster"), ("local-job", "local")]
)
def test_every_room_fits_its_nodes_when_it_has_grown_to_its_maximum(job_name: str, cluster_name: str) -> None:
    config, found = job(job_name), cluster(cluster_name)
    rollout, learner, scorers = config.rollout, config.learner, config.scorers.values()
    rooms = [
        (rollout.node_resource, rollout.size.maximum, rollout.cpus_per_generator, rollout.gpus_per_generator),
        (learner.node_resource, learner.num_ranks, learner.cpus_per_rank, learner.gpus_per_rank),
        *((each.node_resource, each.size.maximum, each.cpus_per_actor, each.gpus_per_actor) for each in scorers),
    ]
    assert {role for role, *_ in rooms} == set(ROLES)
    head = found["available_node_types"][found["head_node_type"]]["resources"]
    for role in ROLES:
        kinds = [kind for kind in found["available_node_types"].values() if kind["resources"].get(role)]
        on_head = head if head.get(role) else {}
        for resource, place in (("CPU", 2), ("GPU", 3)):
            asked = sum(room[1] * room[place] for room in rooms if room[0] == role)
            held = sum(kind["resources"].get(resource, 0) * kind["max_workers"] for kind in kinds)
            assert asked <= held + on_head.get(resource, 0)


@pytest.mark.parametrize("name", ["aws", "gcp", "on-premises"])
def test_token_authentication_is_on_and_the_dashboard_listens_on_the_head_only(name: str) -> None:
    config = launched(name)
    head, workers = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    starts = [command for command in (*head, *workers) if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command
        assert command.index("RAY_AUTH_MODE=token") < command.index("ray start")
    assert "--dashboard-host=127.0.0.1" in head[-1]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_a_job_that_is_stopped_has_time_to_save() -> None:
    grace = job("job").checkpoint.grace_s
    for name in ("aws", "gcp", "on-premises"):
        found = re.search(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", launched(name)["head_start_ray_commands"][-1])
        assert found and int(found[1]) > grace
    pod = ray_cluster()["spec"]["headGroupSpec"]["template"]["spec"]
    (wait,) = (each for each in pod["containers"][0]["env"] if each["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
    drain_s = 30  # of Ray's own, after pre-stop
    assert grace < int(wait["value"]) <= pod["terminationGracePeriodSeconds"] - drain_s


def test_generators_on_spot_machines_end_by_themselves_and_hear_of_the_machine_s_end() -> None:
    pod = pods()["generator"]["spec"]
    (drain,) = (each for each in pod["containers"][0]["env"] if each["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
    assert int(drain["value"]) < pod["terminationGracePeriodSeconds"] <= 25
    for name in ("aws", "gcp"):
        *_, start, listen = launched(name)["worker_start_ray_commands"]
        assert "ray start" in start and f"node/spot-notice {name} " in listen


def pods() -> dict[str, dict[str, Any]]:
    """Their templates by group; the head's is "head"."""
    spec = ray_cluster()["spec"]
    return {"head": spec["headGroupSpec"]["template"]} | {
        group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]
    }


def test_the_drivers_pod_may_write_its_results() -> None:
    """The bug: a volume is root's unless fsGroup says otherwise, and the image's user is 1000."""
    image = (DIRECTORY / "Dockerfile").read_text()
    assert "--uid 1000" in image and "\nUSER ray\n" in image
    for name, pod in pods().items():
        user = pod["spec"]["securityContext"]
        assert user["runAsUser"] == user["fsGroup"] == 1000 and user["runAsNonRoot"], name


def test_who_holds_the_newest_state_stays_until_the_driver_has_saved_it() -> None:
    found = pods()
    for name in ("head", "learner"):
        (container,) = found[name]["spec"]["containers"]
        program, root = container["lifecycle"]["preStop"]["exec"]["command"]
        assert root == "1" and Path(program).relative_to("/opt/opd_ray") == Path("cluster/node/pre-stop")
        assert os.access(ROOT / "cluster/node/pre-stop", os.X_OK)
    graces = {found[name]["spec"]["terminationGracePeriodSeconds"] for name in ("head", "learner")}
    assert len(graces) == 1


def test_policy_and_monitor_choose_the_pods_by_the_label_that_they_have() -> None:
    labels = {"app.kubernetes.io/part-of": "opd-ray"}
    assert [pod["metadata"]["labels"] for pod in pods().values()] == [labels] * 4
    (policy,) = (each["spec"] for each in manifests("kuberay-common") if each["kind"] == "NetworkPolicy")
    (monitor,) = (each["spec"] for each in manifests("kuberay-monitoring") if each["kind"] == "PodMonitor")
    assert policy["podSelector"] == monitor["selector"] == {"matchLabels": labels}
    assert all(each for rule in policy["ingress"] for each in rule["from"]), "an empty one is everybody"
    (job,) = manifests("kuberay-job")
    (name,) = policy["ingress"][1]["from"][0]["podSelector"]["matchExpressions"][0]["values"]
    assert name == job["metadata"]["name"]


def test_what_needs_a_disk_has_one() -> None:
    """Spilled objects and models went into the container's own layer, which a node gives a few GB."""
    for name, pod in pods().items():
        (container,) = pod["spec"]["containers"]
        mounts = {each["mountPath"] for each in container["volumeMounts"]}
        assert mounts == ({"/results"} if name == "head" else {"/dev/shm", "/tmp/ray"})


def test_nothing_is_reachable_from_everywhere() -> None:
    """For clouds: test_aws.py, test_gcp.py."""
    spec = ray_cluster()["spec"]
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not spec["headGroupSpec"].get("enableIngress")
    assert spec["authOptions"] == {"mode": "token", "secretName": "opd-ray-token"}


@pytest.mark.parametrize("name", [*LAUNCHED, *KUBERNETES, *JOBS])
def test_no_secret_stands_in_a_file(name: str) -> None:
    text = read(name)
    assert not re.search(r"\b[0-9a-f]{32}\b|AKIA[0-9A-Z]{16}|-----BEGIN|hf_[A-Za-z0-9]{20}", text)
    assert "kind: Secret" not in text


def test_the_readme_starts_the_local_cluster_as_its_header_says() -> None:
    def start(text: str) -> list[str]:
        (found,) = re.findall(r"^(?:# *)?RAY_FAKE_CLUSTER=1.*?local\.yaml", text, re.MULTILINE | re.DOTALL)
        return shlex.split(re.sub(r"\\\n(# )?", " ", found.removeprefix("#")))

    assert start(read("local")) == start((DIRECTORY / "README.md").read_text())


@pytest.mark.parametrize("name", [*LAUNCHED, *KUBERNETES])
def test_each_header_says_what_it_costs_and_what_to_change(name: str) -> None:
    header = "".join(line for line in read(name).splitlines(True) if line.startswith("#"))
    assert "What it costs" in header and "What to change" in header
    marks = "CHANGE-ME marks it" in header
    assert marks == ("CHANGE-ME" in read(name).replace(header, ""))
