"""A project of Google Cloud in memory, as far as `ray up` asks for one, behind Google's own client.

The client builds every request from Google's description of the API, which it carries, so a field or a method that
there is not fails as it would there.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import jsonschema
from googleapiclient import discovery
from googleapiclient.discovery_cache import get_static_doc
from httplib2 import Response


class FakeProject:
    """``http`` of Google's client. ``accounts`` are emails of service accounts that there are."""

    credentials = None

    def __init__(self, name: str, accounts: list[str]) -> None:
        self.name, self.accounts = name, accounts
        self.bindings: list[dict[str, Any]] = []
        """Who has which roles in the project, as Ray left it."""
        self.instances: list[dict[str, Any]] = []
        """Bodies of the instances that were asked for."""

    def client(self, api: str) -> Any:
        return discovery.build(api, "v1", http=self, cache_discovery=False, static_discovery=True)

    def request(self, uri: str, method: str = "GET", body: str | None = None, **_: Any) -> tuple[Response, bytes]:
        found = json.loads(body) if body else {}
        place = re.sub(r"^https://[^/]+/(compute/)?v1/|\?.*", "", uri)
        answer = self._answer(method, place, found)
        status = 404 if answer is None else 200
        return Response({"status": status, "content-type": "application/json"}), json.dumps(answer or {}).encode()

    def close(self) -> None:
        pass

    def _answer(self, method: str, place: str, body: dict[str, Any]) -> dict[str, Any] | None:
        project = f"projects/{self.name}"
        if (method, place) == ("GET", project):
            return {"projectId": self.name, "name": self.name, "lifecycleState": "ACTIVE", "commonInstanceMetadata": {}}
        if place == f"{project}:getIamPolicy":
            return {"bindings": self.bindings}
        if place == f"{project}:setIamPolicy":
            self.bindings = body["policy"]["bindings"]
            return body["policy"]
        if method == "GET" and place.startswith(f"{project}/serviceAccounts/"):
            email = place.rpartition("/")[2].replace("%40", "@")
            return {"email": email, "projectId": self.name} if email in self.accounts else None
        if place == f"{project}/setCommonInstanceMetadata":
            return {"name": "operation"}
        if place == f"{project}/global/operations/operation":
            return {"status": "DONE"}
        if method == "POST" and re.fullmatch(f"{project}/zones/[^/]+/instances", place):
            validate_instance(body)
            self.instances.append(body)
            return {"name": "operation"}
        raise AssertionError(f"no answer to {method} {place}")


def validate_instance(body: dict[str, Any]) -> None:
    """jsonschema.ValidationError where Google describes no such field of an instance, or another kind of value."""
    _instance().validate(body)


@cache
def _instance() -> jsonschema.Draft202012Validator:
    schemas = json.loads(get_static_doc("compute", "v1"))["schemas"]
    known = {name: _strict(each) for name, each in schemas.items()}
    return jsonschema.Draft202012Validator({"$ref": "#/$defs/Instance", "$defs": known})


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return {"$ref": f"#/$defs/{schema['$ref']}"}
    if schema.get("format") in ("int64", "uint64"):  # which JSON of others than JavaScript may have as numbers
        return {"type": ["string", "integer"]}
    kept = {key: schema[key] for key in ("type", "enum") if key in schema and schema[key] != "any"}
    if "properties" in schema:
        kept["properties"] = {name: _strict(each) for name, each in schema["properties"].items()}
        kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = _strict(schema["additionalProperties"])
    if "items" in schema:
        kept["items"] = _strict(schema["items"])
    return kept
