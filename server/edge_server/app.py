"""The JSON API and the dashboard. Loopback only: there is no authentication yet, so `Settings` refuses other hosts.

What still guards it: a page of another site cannot post (JSON content type and `Origin` are checked), nor read by
rebinding a name of its own to this machine (`Host` is checked), and everything shown is escaped.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from edge_sdk.errors import EdgeError, ProtocolError, StoreError
from edge_sdk.messages import check_name
from edge_server.errors import RolloutError, UnknownDeviceError, UnknownRolloutError
from edge_server.records import as_json
from edge_server.registry import Registry

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HERE = Path(__file__).parent
_LARGEST = 2**63 - 1
_MAX_PAGE = 500
_MAX_BODY = 4096
_LOCAL = ("127.0.0.1", "localhost", "::1")
_POLICY = "; ".join(
    f"{name} {value}"
    for name, value in {
        "default-src": "'none'",
        "style-src": "'self'",
        "img-src": "'self'",
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }.items()
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
_STATUS: tuple[tuple[type[EdgeError], int], ...] = (
    (UnknownDeviceError, 404),
    (UnknownRolloutError, 404),
    (RolloutError, 409),
    (StoreError, 503),
)


class BadRequestError(EdgeError):
    """A parameter or body of a request cannot be used; the message says which and why."""


class _Abort(msgspec.Struct, forbid_unknown_fields=True):
    reason: str = ""

    def __post_init__(self) -> None:
        if len(self.reason) > 500:
            raise ValueError("reason has at most 500 characters")


class _Guard:
    """Answers only to this machine's own names, and adds the security headers to every response."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        app = self._app
        if scope["type"] == "http" and _host_name(Headers(scope=scope).get("host", "")) not in self._hosts:
            app = _error(400, "HTTPError", "unexpected Host header: use http://127.0.0.1")
        await app(scope, receive, send_with_headers)


def create_app(registry: Registry) -> Starlette:
    """The web application. Its endpoints run on the event loop's thread, which `registry` must be used from.

    Args:
        registry: The fleet's records.
    """
    api = _Api(registry)
    routes = [
        Route("/", api.dashboard),
        Route("/healthz", api.healthz),
        Route("/api/v1/fleet", api.fleet),
        Route("/api/v1/devices", api.devices),
        Route("/api/v1/devices/{name}", api.device),
        Route("/api/v1/releases", api.releases),
        Route("/api/v1/rollouts", api.rollouts),
        Route("/api/v1/rollouts/{number}", api.rollout),
        Route("/api/v1/rollouts/{number}/abort", api.abort, methods=["POST"]),
        Route("/api/v1/events", api.events),
        Route("/updates/blobs/{digest}", api.blob),
        Route("/updates/tuf/{name}.json", api.metadata),
        Mount("/static", StaticFiles(directory=_HERE / "static")),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(_Guard, hosts=frozenset({*_LOCAL, registry.settings.http.host})),
        ],
        exception_handlers={EdgeError: _edge_error, HTTPException: _http_error, Exception: _unforeseen},
    )


class _Api:
    """The endpoints."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        environment = Environment(
            loader=FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=StrictUndefined
        )
        environment.filters["when"] = _when
        environment.filters["percent"] = _percent
        environment.filters["details"] = _details
        self._page = environment.get_template("dashboard.html")

    async def healthz(self, _request: Request) -> Response:
        self._registry.store.read("SELECT 1")
        return _json({"status": "ok"})

    async def blob(self, request: Request) -> Response:
        path = self._registry.blobs.path(request.path_params["digest"])
        return Response(status_code=404) if path is None else FileResponse(path)  # it knows ranges

    async def metadata(self, request: Request) -> Response:
        path = self._registry.repository.path(request.path_params["name"])
        return Response(status_code=404) if path is None else FileResponse(path)

    async def fleet(self, _request: Request) -> Response:
        return _json(as_json(self._registry.fleet()))

    async def devices(self, request: Request) -> Response:
        query = _query(request, "group", "after", "limit")
        group = query.get("group")
        limit = _number(query, "limit", 100, most=_MAX_PAGE)
        found = self._registry.devices(
            group=None if group is None else _name(group, "group"), after=query.get("after", ""), limit=limit + 1
        )
        page = found[:limit]
        return _page("devices", page, page[-1].name if len(found) > limit else None)

    async def device(self, request: Request) -> Response:
        name = _name(request.path_params["name"], "device name")
        record = self._registry.device(name)
        return _json({**as_json(record), "last_report": self._registry.last_report(name)})

    async def releases(self, request: Request) -> Response:
        before, limit = _numbered(_query(request, "before", "limit"))
        found = self._registry.releases(before=before, limit=limit + 1)
        page = found[:limit]
        return _page("releases", page, page[-1].release if len(found) > limit else None)

    async def rollouts(self, request: Request) -> Response:
        before, limit = _numbered(_query(request, "before", "limit"))
        found = self._registry.rollouts(before=before, limit=limit + 1)
        page = found[:limit]
        return _page("rollouts", page, page[-1].id if len(found) > limit else None)

    async def rollout(self, request: Request) -> Response:
        return _json(as_json(self._registry.rollout(_number(request.path_params, "number"))))

    async def abort(self, request: Request) -> Response:
        number = _number(request.path_params, "number")
        _same_site(request)
        body = await _body(request)
        try:
            order = msgspec.json.decode(body or b"{}", type=_Abort)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise BadRequestError(f"body: {error}") from error
        self._registry.abort(number, reason=order.reason, actor="api")
        return _json(as_json(self._registry.rollout(number)))

    async def events(self, request: Request) -> Response:
        query = _query(request, "device", "name", "before", "limit")
        before, limit = _numbered(query)
        device = query.get("device")
        found = self._registry.events(
            device=None if device is None else _name(device, "device"),
            name=query.get("name"),
            before=before,
            limit=limit + 1,
        )
        page = found[:limit]
        return _page("events", page, page[-1].id if len(found) > limit else None)

    async def dashboard(self, request: Request) -> Response:
        after = _query(request, "after").get("after", "")
        devices = self._registry.devices(after=after, limit=101)
        html = self._page.render(
            fleet=self._registry.fleet(),
            devices=devices[:100],
            more=devices[99].name if len(devices) > 100 else None,
            rollouts=self._registry.rollouts(limit=10),
            events=self._registry.events(limit=30),
        )
        return HTMLResponse(html)


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _page(name: str, records: Any, following: str | int | None) -> Response:
    """A page of records; `next` is what to ask for to see the following page, or null."""
    return _json({name: [as_json(record) for record in records], "next": following})


def _error(status: int, kind: str, message: str) -> Response:
    return _json({"error": {"type": kind, "message": message}}, status)


async def _edge_error(_request: Request, error: Exception) -> Response:
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 400)
    return _error(status, type(error).__name__, str(error))


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # registered for nothing else
    response = _error(error.status_code, "HTTPError", error.detail)
    response.headers.update(error.headers or {})
    return response


async def _unforeseen(_request: Request, _exception: Exception) -> Response:
    return _error(500, "InternalError", "something unforeseen happened; the log says what")


def _query(request: Request, *allowed: str) -> dict[str, str]:
    for name, value in request.query_params.multi_items():
        if name not in allowed:
            raise BadRequestError(f"unknown parameter {name[:64]!r}; known here: {', '.join(allowed)}")
        if len(value) > 256:
            raise BadRequestError(f"{name} has at most 256 characters")
    return dict(request.query_params)


def _numbered(query: dict[str, str]) -> tuple[int | None, int]:
    before = _number(query, "before") if "before" in query else None
    return before, _number(query, "limit", 100, most=_MAX_PAGE)


def _number(values: dict[str, Any], name: str, default: int | None = None, *, most: int = _LARGEST) -> int:
    text = str(values.get(name, default))
    if not (text.isascii() and text.isdigit() and len(text) < 20 and 1 <= int(text) <= most):
        raise BadRequestError(f"{name} must be a whole number from 1 to {most}, got {text[:32]!r}")
    return int(text)


def _name(text: str, what: str) -> str:
    try:
        return check_name(text, what)
    except ProtocolError as error:
        raise BadRequestError(str(error)[:300]) from error


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _same_site(request: Request) -> None:
    """Refuse what a page of another site could make a browser send."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the content type must be application/json")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, "requests from other sites are refused")


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY:
            raise HTTPException(413, f"the body has at most {_MAX_BODY} bytes")
    return body


def _when(seconds: float | None) -> str:
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _details(detail: dict[str, Any]) -> str:
    text = ", ".join(f"{key} {value}" for key, value in detail.items())
    return text if len(text) <= 300 else text[:299] + "…"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
