"""What an endpoint of the API is: one entry says its path, who may call it, what it takes and what it gives.

Routing, access, checks of parameters and bodies, and the OpenAPI document all follow from these entries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from edge_sdk.errors import ArtifactError, ConfigError, DiskFullError, EdgeError, ProtocolError, StoreError
from edge_sdk.messages import check_name
from edge_server.errors import (
    ReleaseError,
    RolloutError,
    SegmentError,
    UnknownAlertError,
    UnknownCandidateError,
    UnknownDeviceError,
    UnknownReleaseError,
    UnknownRolloutError,
    UnknownSegmentError,
    UnknownUserError,
    UploadError,
    UploadTooLargeError,
    UserError,
)
from edge_server.records import Role, as_json
from edge_server.registry import Registry

MAX_PAGE = 500
MAX_BODY = 16_384
_LARGEST = 2**63 - 1
_MAX_TEXT = 256


class BadRequestError(EdgeError):
    """A parameter or body of a request cannot be used; the message says which and why."""


STATUS: tuple[tuple[type[EdgeError], int], ...] = (
    (BadRequestError, 400),
    (UnknownDeviceError, 404),
    (UnknownRolloutError, 404),
    (UnknownReleaseError, 404),
    (UnknownCandidateError, 404),
    (UnknownAlertError, 404),
    (UnknownUserError, 404),
    (UnknownSegmentError, 404),
    (RolloutError, 409),
    (ReleaseError, 409),
    (UserError, 409),
    (SegmentError, 409),
    (UploadTooLargeError, 413),
    (UploadError, 400),
    (ArtifactError, 422),
    (DiskFullError, 507),
    (StoreError, 503),
    (ConfigError, 400),
)
"""The first that fits; 400 for other typed errors."""


class Caller(msgspec.Struct, frozen=True):
    """Who asks."""

    name: str
    """For the audit log."""
    role: Role
    way: Literal["token", "session", "open"]
    """A header with a token; a browser that logged in; nobody was asked, as there are no users."""


class Reason(msgspec.Struct, forbid_unknown_fields=True):
    """Why, for the audit log."""

    reason: str = ""

    def __post_init__(self) -> None:
        if len(self.reason) > 500:
            raise ValueError("reason has at most 500 characters")


@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter of the query.

    Attributes:
        name: Of the parameter.
        kind: name: of a device, group or user; text; number: a whole one from 1 on; hours: a number above 0.
        what: It means.
        default: When it is left out.
        most: Largest number.
        choices: All that a text may be; none: any.
    """

    name: str
    kind: Literal["name", "text", "number", "hours"]
    what: str
    default: str | int | float | None = None
    most: int = _LARGEST
    choices: tuple[str, ...] = ()

    def read(self, given: str | None) -> Any:
        """The value.

        Raises:
            BadRequestError: It cannot be used.
        """
        if given is None:
            return self.default
        if self.kind == "number":
            return whole_number(given, self.name, most=self.most)
        if self.kind == "hours":
            return _hours(given, self.name, self.most)
        if len(given) > _MAX_TEXT:
            raise BadRequestError(f"{self.name} has at most {_MAX_TEXT} characters")
        if self.choices and given not in self.choices:
            raise BadRequestError(f"{self.name} must be {', '.join(self.choices)}, got {given[:64]!r}")
        return checked_name(given, self.name) if self.kind == "name" else given


BEFORE = Param("before", "number", "Only those with a number below it: `next` of the page before.")
LIMIT = Param("limit", "number", "Most entries of a page.", 100, MAX_PAGE)


@dataclasses.dataclass(frozen=True)
class Call:
    """One request to an endpoint, checked.

    Attributes:
        registry: The fleet's records, for the thread that answers.
        caller: Who asks.
        path: Parameters of the path.
        query: Those of the query, all of them, with their defaults.
        body: As the endpoint declares it, or None; of an upload the folder of its files.
    """

    registry: Registry
    caller: Caller
    path: dict[str, str]
    query: dict[str, Any]
    body: Any

    def using(self, registry: Registry) -> Call:
        """The same call by another thread, which has its own records."""
        return dataclasses.replace(self, registry=registry)

    @property
    def number(self) -> int:
        """The `{number}` of the path."""
        return whole_number(self.path["number"], "number")

    @property
    def name(self) -> str:
        """The `{name}` of the path."""
        return checked_name(self.path["name"], "name")


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """One operation of the API.

    Attributes:
        method: HTTP's.
        path: Below `/api/v1`.
        role: The least that may call it; None: anybody.
        handle: Gives what is answered: a struct, plain data, or None.
        summary: For the document.
        query: Parameters.
        body: Struct of the JSON body.
        reply: What is answered: a struct or a list of them; None: nothing, with status 204.
        page: Name of the list of entries and the kind of `next`, if the reply is a page of structs.
        status: Of the answer.
        slow: It reads much: answered in a thread of its own, and from what was found a moment ago.
        apart: It works long on files: on a thread of its own.
        upload: The body is a tar archive, see `upload.py`. It is taken in apart.
    """

    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str
    role: Role | None
    handle: Callable[[Call], Any]
    summary: str
    query: tuple[Param, ...] = ()
    body: type[msgspec.Struct] | None = None
    reply: Any = None
    page: tuple[str, type] | None = None
    status: int = 200
    slow: bool = False
    apart: bool = False
    upload: bool = False


def page(name: str, records: Sequence[Any], limit: int, key: Callable[[Any], Any]) -> dict[str, Any]:
    """A page of records, of which one more than the limit was read; `next` is what to ask for after it, or null."""
    shown = records[:limit]
    return {name: list(shown), "next": key(shown[-1]) if len(records) > limit else None}


def plain(value: Any) -> Any:
    """Data for JSON: structs with their computed properties."""
    if isinstance(value, msgspec.Struct):
        return as_json(value)
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def json_response(value: Any, status: int = 200) -> Response:
    """JSON of structs and plain data."""
    return Response(msgspec.json.encode(plain(value)), status, media_type="application/json")


# ---- errors


def status_of(error: EdgeError) -> int:
    """The HTTP status of a typed error."""
    return next((code for kind, code in STATUS if isinstance(error, kind)), 400)


def error_response(status: int, kind: str, message: str) -> Response:
    """What every refusal looks like."""
    return json_response({"error": {"type": kind, "message": message}}, status)


# ---- what came in


def read_query(request: Request, params: tuple[Param, ...]) -> dict[str, Any]:
    """All parameters, with their defaults.

    Raises:
        BadRequestError: One is unknown, or cannot be used.
    """
    known = ", ".join(param.name for param in params) or "none"
    names = {param.name for param in params}
    for name, value in request.query_params.multi_items():
        if name not in names:
            raise BadRequestError(f"unknown parameter {name[:64]!r}; known here: {known}")
        if len(value) > _MAX_TEXT:
            raise BadRequestError(f"{name} has at most {_MAX_TEXT} characters")
    return {param.name: param.read(request.query_params.get(param.name)) for param in params}


def decode_body(body: bytes, kind: type[msgspec.Struct]) -> Any:
    """The struct of a JSON body; an empty body is an empty object.

    Raises:
        BadRequestError: It is none.
    """
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRequestError(f"body: {error}") from error


async def read_body(request: Request) -> bytes:
    """The whole body, if it is no larger than allowed."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"the body has at most {MAX_BODY} bytes")
    return body


def require_same_site(request: Request, content_type: str) -> None:
    """Refuse what a page of another site could make a browser send."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != content_type:
        raise HTTPException(415, f"the content type must be {content_type}")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, "requests from other sites are refused")


def whole_number(text: str, name: str, *, least: int = 1, most: int = _LARGEST) -> int:
    """A whole number from `least` to `most`.

    Raises:
        BadRequestError: It is none.
    """
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise BadRequestError(f"{name} must be a whole number from {least} to {most}, got {text[:32]!r}")
    return int(text)


def checked_name(text: str, what: str) -> str:
    """A name that may stand in a topic.

    Raises:
        BadRequestError: It may not.
    """
    try:
        return check_name(text, what)
    except ProtocolError as error:
        raise BadRequestError(str(error)[:300]) from error


def _hours(text: str, name: str, most: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= most:
        raise BadRequestError(f"{name} must be a number above 0 and up to {most}, got {text[:32]!r}")
    return value
