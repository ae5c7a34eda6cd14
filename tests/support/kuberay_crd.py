"""The schema of KubeRay 1.6's RayCluster and RayJob, and of the Prometheus operator's PodMonitor and PrometheusRule, as
far as users write them; unknown fields are refused.

Fields and values are those of the API references of these releases. What is Kubernetes' own (pod templates, services,
volume claims, policies) is checked against Kubernetes' schemas, as the package kubernetes-validate carries them.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

import jsonschema
import referencing

KUBERNETES = "v1.37.0"
_CORE = "io.k8s.api.core.v1"
_META = "io.k8s.apimachinery.pkg.apis.meta.v1"
_GROUPS = {"v1": _CORE, "networking.k8s.io/v1": "io.k8s.api.networking.v1"}

_STRING = {"type": "string"}
_BOOLEAN = {"type": "boolean"}
_COUNT = {"type": "integer", "minimum": 0}
_NUMBER = {"type": "number", "minimum": 0}
_STRINGS = {"type": "object", "additionalProperties": _STRING}
_MANAGER = {"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]}
_AFTERWARDS = {"enum": ["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]}


def validate(manifest: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError when a manifest is not one that the API server would take as written."""
    kind = manifest["apiVersion"], manifest["kind"]
    schema = _SCHEMAS[kind] if kind in _SCHEMAS else _kubernetes(f"{_GROUPS[kind[0]]}.{kind[1]}")
    jsonschema.Draft202012Validator(schema, registry=_registry()).validate(manifest)


@cache
def _registry() -> referencing.Registry[Any]:
    directory = files("kubernetes_validate") / "kubernetes-json-schema" / f"{KUBERNETES}-local-strict"
    definitions = json.loads((directory / "_definitions.json").read_text())
    return referencing.Registry().with_resource("kubernetes", referencing.Resource.from_contents(definitions))


def _kubernetes(name: str) -> dict[str, Any]:
    return {"$ref": f"kubernetes#/$defs/{name}"}


def _list(items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


def _object(required: tuple[str, ...] = (), **fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def _kind(name: str, spec: dict[str, Any], group: str = "ray.io/v1") -> dict[str, Any]:
    return _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": group},
        kind={"const": name},
        metadata=_kubernetes(f"{_META}.ObjectMeta"),
        spec=spec,
    )


_GROUP = {
    "template": _kubernetes(f"{_CORE}.PodTemplateSpec"),
    "rayStartParams": _STRINGS,
    "resources": _STRINGS,
    "labels": _STRINGS,
}
_HEAD_GROUP = _object(
    ("template",),
    **_GROUP,
    headService=_kubernetes(f"{_CORE}.Service"),
    enableIngress=_BOOLEAN,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
)
_WORKER_GROUP = _object(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    **_GROUP,
    groupName=_STRING,
    suspend=_BOOLEAN,
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    numOfHosts=_COUNT,
    idleTimeoutSeconds=_COUNT,
    scaleStrategy=_object(workersToDelete=_list(_STRING)),
)
_AUTOSCALER = _object(
    version={"enum": ["v1", "v2"]},
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    idleTimeoutSeconds=_COUNT,
    image=_STRING,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    resources=_kubernetes(f"{_CORE}.ResourceRequirements"),
    securityContext=_kubernetes(f"{_CORE}.SecurityContext"),
    env=_list(_kubernetes(f"{_CORE}.EnvVar")),
    envFrom=_list(_kubernetes(f"{_CORE}.EnvFromSource")),
    volumeMounts=_list(_kubernetes(f"{_CORE}.VolumeMount")),
)
_CREDENTIAL = _object(value=_STRING, valueFrom=_kubernetes(f"{_CORE}.EnvVarSource"))
_CLUSTER_SPEC = _object(
    ("headGroupSpec",),
    rayVersion=_STRING,
    suspend=_BOOLEAN,
    managedBy=_MANAGER,
    upgradeStrategy=_object(type={"enum": ["Recreate", "None"]}),
    authOptions=_object(mode={"enum": ["disabled", "token"]}, secretName=_STRING, enableK8sTokenAuth=_BOOLEAN),
    enableInTreeAutoscaling=_BOOLEAN,
    autoscalerOptions=_AUTOSCALER,
    headServiceAnnotations=_STRINGS,
    gcsFaultToleranceOptions=_object(
        ("redisAddress",),
        redisAddress=_STRING,
        redisUsername=_CREDENTIAL,
        redisPassword=_CREDENTIAL,
        externalStorageNamespace=_STRING,
    ),
    headGroupSpec=_HEAD_GROUP,
    workerGroupSpecs=_list(_WORKER_GROUP),
)
_DELETION = _object(
    onSuccess=_object(policy=_AFTERWARDS),
    onFailure=_object(policy=_AFTERWARDS),
    deletionRules=_list(
        _object(
            ("policy", "condition"),
            policy=_AFTERWARDS,
            condition=_object(jobStatus=_STRING, jobDeploymentStatus=_STRING, ttlSeconds=_COUNT),
        ),
        minItems=1,
    ),
)
_JOB_SPEC = _object(
    entrypoint=_STRING,
    runtimeEnvYAML=_STRING,
    jobId=_STRING,
    metadata=_STRINGS,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterPodTemplate=_kubernetes(f"{_CORE}.PodTemplateSpec"),
    submitterConfig=_object(backoffLimit=_COUNT),
    entrypointNumCpus=_NUMBER,
    entrypointNumGpus=_NUMBER,
    entrypointResources=_STRING,
    backoffLimit=_COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
    ttlSecondsAfterFinished=_COUNT,
    shutdownAfterJobFinishes=_BOOLEAN,
    suspend=_BOOLEAN,
    managedBy=_MANAGER,
    deletionStrategy=_DELETION,
    clusterSelector=_STRINGS,
    rayClusterSpec=_CLUSTER_SPEC,
)
_MONITORING = "monitoring.coreos.com/v1"
_DURATION = {"type": "string", "pattern": r"^(\d+(ms|[smhdwy]))+$"}
_POD_MONITOR_SPEC = _object(
    ("selector", "podMetricsEndpoints"),
    selector=_kubernetes(f"{_META}.LabelSelector"),
    namespaceSelector=_object(any=_BOOLEAN, matchNames=_list(_STRING)),
    jobLabel=_STRING,
    podTargetLabels=_list(_STRING),
    podMetricsEndpoints=_list(
        _object(port=_STRING, path=_STRING, interval=_DURATION, scrapeTimeout=_DURATION), minItems=1
    ),
)
_RULE = _object(
    ("expr",),
    alert=_STRING,
    record=_STRING,
    expr=_STRING,
    labels=_STRINGS,
    annotations=_STRINGS,
    **{"for": _DURATION, "keep_firing_for": _DURATION},
)
_PROMETHEUS_RULE_SPEC = _object(
    groups=_list(_object(("name",), name=_STRING, interval=_DURATION, rules=_list(_RULE), labels=_STRINGS))
)
_SCHEMAS = {
    ("ray.io/v1", "RayCluster"): _kind("RayCluster", _CLUSTER_SPEC),
    ("ray.io/v1", "RayJob"): _kind("RayJob", _JOB_SPEC),
    (_MONITORING, "PodMonitor"): _kind("PodMonitor", _POD_MONITOR_SPEC, _MONITORING),
    (_MONITORING, "PrometheusRule"): _kind("PrometheusRule", _PROMETHEUS_RULE_SPEC, _MONITORING),
}
