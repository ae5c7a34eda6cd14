"""aws.yaml in an account that aws/account.yaml prepared: Ray's own bootstrap and node provider against moto."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from iam_policies import allowed

pytestmark = pytest.mark.slow  # moto and cfn-lint read what they know of AWS: some seconds
DIRECTORY = Path(__file__).parents[2] / "cluster"
_SSH_FROM = "203.0.113.7/32"
_IMAGE = "ami-12c6146b"  # one of moto's
_WORKERS = ("learner", "teacher", "generator")


@dataclass
class Account:
    """In which aws.yaml was bootstrapped."""

    config: dict[str, Any]
    """What the head's autoscaler works with."""
    before: dict[str, list[str]]
    """The security groups and roles that there were when the bootstrap began."""
    _policies: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def node_config(self, kind: str) -> dict[str, Any]:
        found: dict[str, Any] = self.config["available_node_types"][kind]["node_config"]
        return found

    def role(self, kind: str) -> Any:
        profile = boto3.resource("iam").InstanceProfile(self.node_config(kind)["IamInstanceProfile"]["Name"])
        (role,) = profile.roles
        return role

    def may(self, kind: str, action: str, resource: str = "*", **context: str) -> bool:
        """Whether a machine of this kind may; a key of ``context`` has _ where IAM's has a colon."""
        if kind not in self._policies:
            role = self.role(kind)
            assert not list(role.attached_policies.all())
            documents = [str(policy.policy_document) for policy in role.policies.all()]
            self._policies[kind] = [yaml.safe_load(document) for document in documents]  # moto's are no JSON
        seen = {key.replace("_", ":"): value for key, value in context.items()}
        return allowed(self._policies[kind], action, resource, seen)


def _there_is() -> dict[str, list[str]]:
    return {
        "security groups": sorted(group.id for group in boto3.resource("ec2").security_groups.all()),
        "roles": sorted(role.name for role in boto3.resource("iam").roles.all()),
        "profiles": sorted(profile.name for profile in boto3.resource("iam").instance_profiles.all()),
    }


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    from moto import mock_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # where Ray puts the SSH key that it makes
        patch.setenv("AWS_DEFAULT_REGION", "us-west-2")
        template = (DIRECTORY / "aws/account.yaml").read_text()
        (image,) = (line.split()[-1] for line in template.splitlines() if "Default: /aws/service" in line)
        boto3.client("ssm").put_parameter(Name="/image", Value=_IMAGE, Type="String")
        parameters = {"SshFrom": _SSH_FROM, "Bucket": "some-bucket"}
        boto3.client("cloudformation").create_stack(
            StackName="opd-ray",
            TemplateBody=template.replace(image, "/image"),
            Capabilities=["CAPABILITY_NAMED_IAM"],
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
        )
        before = _there_is()
        config = prepare_config(yaml.safe_load((DIRECTORY / "aws.yaml").read_text()))
        yield Account(AWSNodeProvider.bootstrap_config(config), before)


def test_the_template_is_one_that_cloudformation_takes() -> None:
    program = Path(sys.executable).with_name("cfn-lint")
    done = subprocess.run([program, DIRECTORY / "aws/account.yaml"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_bootstrap_makes_no_group_and_no_role_of_its_own(account: Account) -> None:
    assert _there_is() == account.before
    assert account.role("head").name == "opd-ray-head"
    assert {account.role(kind).name for kind in _WORKERS} == {"opd-ray-worker"}


def test_nothing_is_open_but_ssh_from_the_range_that_was_given(account: Account) -> None:
    """The bug: beside the range of the file Ray's own group let SSH in from 0.0.0.0/0."""
    groups = {group for kind in ("head", *_WORKERS) for group in account.node_config(kind)["SecurityGroupIds"]}
    (group,) = (boto3.resource("ec2").SecurityGroup(each) for each in groups)
    rules = {rule["IpProtocol"]: rule for rule in group.ip_permissions}
    assert rules.keys() == {"tcp", "-1"}
    assert [each["CidrIp"] for each in rules["tcp"]["IpRanges"]] == [_SSH_FROM]
    assert (rules["tcp"]["FromPort"], rules["tcp"]["ToPort"]) == (22, 22)
    assert [each["GroupId"] for each in rules["-1"]["UserIdGroupPairs"]] == [group.id]
    for rule in rules.values():
        assert not rule["Ipv6Ranges"] and not rule["PrefixListIds"]
    assert not rules["tcp"]["UserIdGroupPairs"] and not rules["-1"]["IpRanges"]


def _needed(operation: str, params: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """The permissions that a call asks for, with what its conditions see."""
    if operation == "RunInstances":
        yield "ec2:RunInstances", "*", {}
        if params["TagSpecifications"]:
            yield "ec2:CreateTags", "*", {"ec2_CreateAction": "RunInstances"}
        profile = boto3.resource("iam").InstanceProfile(params["IamInstanceProfile"]["Name"])
        for role in profile.roles:
            yield "iam:PassRole", role.arn, {"iam_PassedToService": "ec2.amazonaws.com"}
    elif operation in ("CreateTags", "TerminateInstances"):
        for instance in params.get("InstanceIds", params.get("Resources")):
            tags = {tag["Key"]: tag["Value"] for tag in boto3.resource("ec2").Instance(instance).tags}
            yield f"ec2:{operation}", "*", {f"aws_ResourceTag/{key}": value for key, value in tags.items()}
    else:
        yield f"ec2:{operation}", "*", {}


def test_the_head_may_do_all_that_its_autoscaler_does_for_workers(account: Account) -> None:
    """The bug: the role that Ray makes has no iam:PassRole, so no worker with a profile of its own ever started."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(account.config["provider"], account.config["cluster_name"])
    calls: list[str] = []

    def check(params: dict[str, Any], model: Any, **_: Any) -> None:
        calls.append(model.name)
        for action, resource, context in _needed(model.name, params):
            assert account.may("head", action, resource, **context), (action, resource, context)

    clients = {id(each): each for each in (provider.ec2.meta.client, provider.ec2_fail_fast.meta.client)}
    for client in clients.values():
        client.meta.events.register("provide-client-params.ec2.*", check, unique_id="the head's role")
    try:
        nodes = [node for kind in _WORKERS for node in provider.create_node(account.node_config(kind), {}, 1)]
        assert sorted(provider.non_terminated_nodes({})) == sorted(nodes)
        provider.set_node_tags(nodes[0], {"ray-node-status": "up-to-date"})
        machines = [boto3.resource("ec2").Instance(node) for node in nodes]
        for machine in machines:
            machine.load()
        provider.terminate_nodes(nodes)
    finally:
        for client in clients.values():
            client.meta.events.unregister("provide-client-params.ec2.*", check, unique_id="the head's role")
    assert {"RunInstances", "CreateTags", "DescribeInstances", "TerminateInstances"} <= set(calls)
    assert {machine.iam_instance_profile["Arn"].split("/")[-1] for machine in machines} == {"opd-ray-worker"}
    assert {machine.placement["AvailabilityZone"] for machine in machines} == {"us-west-2a"}
    assert {boto3.resource("ec2").Instance(node).state["Name"] for node in nodes} == {"terminated"}


def test_the_head_passes_no_other_role_and_ends_no_other_machine(account: Account) -> None:
    passed = {"iam_PassedToService": "ec2.amazonaws.com"}
    assert account.may("head", "iam:PassRole", account.role("generator").arn, **passed)
    assert not account.may("head", "iam:PassRole", account.role("head").arn, **passed)
    assert not account.may("head", "iam:PassRole", account.role("generator").arn, iam_PassedToService="lambda")
    assert not account.may("head", "iam:CreateRole")
    for action in ("ec2:TerminateInstances", "ec2:CreateTags"):
        assert not account.may("head", action)
        assert not account.may("head", action, **{"aws_ResourceTag/ray-cluster-name": "somebody-elses"})


def test_workers_use_the_bucket_and_nothing_else(account: Account) -> None:
    for kind in ("head", "generator"):
        assert account.may(kind, "s3:PutObject", "arn:aws:s3:::some-bucket/runs/first/state.json")
        assert account.may(kind, "s3:ListBucket", "arn:aws:s3:::some-bucket")
        assert not account.may(kind, "s3:GetObject", "arn:aws:s3:::some-buckets/x")
        assert not account.may(kind, "s3:DeleteBucket", "arn:aws:s3:::some-bucket")
    for action in ("ec2:RunInstances", "ec2:TerminateInstances", "iam:PassRole", "ec2:DescribeInstances"):
        assert not account.may("generator", action)


def test_images_are_the_same_on_every_machine_and_spot_ones_only_generate(account: Account) -> None:
    kinds = {kind: account.node_config(kind) for kind in ("head", *_WORKERS)}
    assert {config["ImageId"] for config in kinds.values()} == {_IMAGE}
    assert [kind for kind, config in kinds.items() if "InstanceMarketOptions" in config] == ["generator"]
