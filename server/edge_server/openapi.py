"""The OpenAPI 3.1 document of the coordinator's API, made from its endpoints."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, get_args, get_origin

import msgspec

from edge_sdk import __version__
from edge_server.endpoint import MAX_PAGE, Endpoint, Param
from edge_server.records import COMPUTED
from edge_server.upload import TAR

PREFIX = "/api/v1"
_ERRORS = {
    400: "A parameter or the body cannot be used",
    401: "A token is needed, or this one is nobody's",
    403: "The role is not enough, or the request comes from another site",
    404: "There is none of that name or number",
    409: "It cannot be done now",
    413: "The body is too large",
    415: "The body is of another content type",
    422: "A file of the checkpoint is missing, altered, or of a form that is not read here",
    429: "Too many requests: wait for Retry-After",
    503: "The database failed; again later",
    507: "There is no room for it",
}
_REF = "#/components/schemas/{name}"


class ErrorDetail(msgspec.Struct):
    """What was wrong, with which value, and what to do."""

    type: str
    message: str


class Error(msgspec.Struct):
    """A refusal."""

    error: ErrorDetail


def document(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """The description of these endpoints."""
    endpoints = list(endpoints)
    kinds: dict[str, Any] = {"Error": Error}
    for endpoint in endpoints:
        for kind in (endpoint.body, *(get_args(endpoint.reply) or (endpoint.reply,))):
            if kind is not None:
                kinds[kind.__name__] = kind
    _, schemas = msgspec.json.schema_components(kinds.values(), ref_template=_REF)
    for name, kind in kinds.items():
        _add_computed(schemas[name], kind)
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        paths.setdefault(PREFIX + endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "edge-coordinator",
            "version": __version__,
            "description": "A fleet of devices: what they report, and what they are told. Times are seconds since the "
            "epoch, shares lie in 0 to 1. Lists come in pages: `next` is what to send as `before` (or `after`) for the "
            "following page, or null.",
        },
        "security": [{"token": []}],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    names = re.findall(r"{(\w+)}", endpoint.path)
    numbers = {"type": "integer", "minimum": 1}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": numbers if name == "number" else {"type": "string"}}
        for name in names
    ]
    parameters += [_parameter(param) for param in endpoint.query]
    codes = {400, 429, 503}
    codes |= {401, 403} if endpoint.role else set()
    codes |= {404} if names else set()
    codes |= {409, 413, 415} if endpoint.method != "GET" else set()
    codes |= {422, 507} if endpoint.upload else set()
    responses: dict[str, Any] = {str(endpoint.status): _reply(endpoint)}
    responses |= {
        str(code): {"description": _ERRORS[code], "content": _json({"$ref": _REF.format(name="Error")})}
        for code in sorted(codes)
    }
    role = f" Role: {endpoint.role}." if endpoint.role else " Anybody may ask."
    found: dict[str, Any] = {
        "operationId": _operation_id(endpoint),
        "summary": endpoint.summary,
        "description": f"{endpoint.summary}.{role}",
        "tags": [endpoint.path.split("/")[1]],
        "responses": responses,
    }
    if parameters:
        found["parameters"] = parameters
    if endpoint.role is None:
        found["security"] = []
    if endpoint.upload:
        binary = {"schema": {"type": "string", "format": "binary"}}
        found["requestBody"] = {"required": True, "content": {TAR: binary}}
    if endpoint.body is not None:
        required = any(field.required for field in msgspec.structs.fields(endpoint.body))
        body = _json({"$ref": _REF.format(name=endpoint.body.__name__)})
        found["requestBody"] = {"required": required, "content": body}
    return found


def _operation_id(endpoint: Endpoint) -> str:
    parts = [part.strip("{}") for part in re.split(r"[/._]", endpoint.path) if part]
    return endpoint.method.lower() + "".join(part.capitalize() for part in parts)


def _parameter(param: Param) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": {"number": "integer", "hours": "number"}.get(param.kind, "string")}
    if param.kind == "number":
        schema["minimum"] = 1
    if param.kind == "hours":
        schema["exclusiveMinimum"] = 0
    if param.most <= max(MAX_PAGE, 100_000):
        schema["maximum"] = param.most
    if param.choices:
        schema["enum"] = list(param.choices)
    if param.default is not None:
        schema["default"] = param.default
    return {"name": param.name, "in": "query", "required": False, "description": param.what, "schema": schema}


def _reply(endpoint: Endpoint) -> dict[str, Any]:
    if endpoint.reply is None:
        return {"description": "Done"}
    if endpoint.page is not None:
        name, kind = endpoint.page
        following = {"type": ["string" if kind is str else "integer", "null"]}
        entries = {"type": "array", "items": {"$ref": _REF.format(name=endpoint.reply.__name__)}}
        schema: dict[str, Any] = {
            "type": "object",
            "required": [name, "next"],
            "properties": {name: entries, "next": following},
        }
    elif get_origin(endpoint.reply) is list:
        schema = {"type": "array", "items": {"$ref": _REF.format(name=get_args(endpoint.reply)[0].__name__)}}
    elif isinstance(endpoint.reply, type) and issubclass(endpoint.reply, msgspec.Struct):
        schema = {"$ref": _REF.format(name=endpoint.reply.__name__)}
    else:
        schema = {"type": "object"}
    return {"description": endpoint.summary, "content": _json(schema)}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _add_computed(schema: dict[str, Any], kind: type) -> None:
    """What `as_json` adds to the fields."""
    for name, form in COMPUTED.items():
        if hasattr(kind, name):
            schema.setdefault("properties", {})[name] = form
