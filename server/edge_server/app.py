"""The web application: API, dashboard, updates and what watches the coordinator, put together."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from edge_sdk.errors import EdgeError
from edge_server.access import Access
from edge_server.api import READING
from edge_server.api_orders import ORDERING
from edge_server.background import Background, apart
from edge_server.endpoint import (
    Call,
    Caller,
    Endpoint,
    decode_body,
    error_response,
    json_response,
    read_body,
    read_query,
    require_same_site,
    status_of,
)
from edge_server.guard import Guard
from edge_server.monitoring import CONTENT_TYPE, Pulse, metrics_text, problems
from edge_server.openapi import PREFIX, document
from edge_server.pages import Pages, is_page
from edge_server.registry import Registry
from edge_server.upload import TAR, Uploads

logger = logging.getLogger(__name__)
ENDPOINTS = (*READING, *ORDERING)
_STATIC = Path(__file__).parent / "static"


def create_app(
    registry: Registry, *, pulse: Callable[[], Pulse] | None = None, stopping: Callable[[], bool] = lambda: False
) -> Starlette:
    """The web application. Its endpoints run on the event loop's thread, which `registry` must be used from.

    Args:
        registry: The fleet's records.
        pulse: How the coordinator that runs beside it is; None: there is none.
        stopping: Whether the server ends: streams end then.
    """
    access, background = Access(registry), Background(registry)
    web = _Web(registry, access, background, pulse)
    pages = Pages(registry, access, background, stopping=stopping)
    routes: list[BaseRoute] = [
        Route("/healthz", web.healthz),
        Route("/readyz", web.readyz),
        Route("/metrics", web.metrics),
        Route(f"{PREFIX}/openapi.json", web.openapi),
        *web.api_routes(),
        *pages.routes(),
        Route("/updates/blobs/{digest}", web.blob),
        Route("/updates/tuf/{name}.json", web.metadata),
        Mount("/static", StaticFiles(directory=_STATIC)),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, settings=registry.settings.http, clock=registry.clock)],
        exception_handlers=_handlers(pages),
    )


class _Web:
    """What is neither a page nor an endpoint of its own."""

    def __init__(
        self, registry: Registry, access: Access, background: Background, pulse: Callable[[], Pulse] | None
    ) -> None:
        self._registry, self._access, self._background, self._pulse = registry, access, background, pulse
        self._uploads = Uploads(
            registry.home / "uploads",
            max_bytes=registry.settings.http.max_upload_bytes,
            min_free_bytes=registry.settings.alerts.min_disk_mb * 1e6,
        )
        self._document = msgspec.json.encode(document(ENDPOINTS))

    async def healthz(self, _request: Request) -> Response:
        self._registry.store.read("SELECT 1")
        return json_response({"status": "ok"})

    async def readyz(self, _request: Request) -> Response:
        found = problems(self._registry, self._pulse() if self._pulse else None)
        return json_response({"status": "not ready" if found else "ok", "problems": found}, 503 if found else 200)

    async def metrics(self, request: Request) -> Response:
        self._access.require(request, "viewer", open_name="api")
        text = metrics_text(self._registry, self._pulse() if self._pulse else None)
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    async def openapi(self, _request: Request) -> Response:
        return Response(self._document, media_type="application/json")

    async def blob(self, request: Request) -> Response:
        path = self._registry.blobs.path(request.path_params["digest"])
        return Response(status_code=404) if path is None else FileResponse(path)  # it knows ranges

    async def metadata(self, request: Request) -> Response:
        path = self._registry.repository.path(request.path_params["name"])
        return Response(status_code=404) if path is None else FileResponse(path)

    def api_routes(self) -> list[Route]:
        """A route for each path, so that a wrong method is told from a wrong path."""
        by_path: dict[str, dict[str, Endpoint]] = {}
        for endpoint in ENDPOINTS:
            by_path.setdefault(endpoint.path, {})[endpoint.method] = endpoint
        return [Route(PREFIX + path, self._endpoint(found), methods=list(found)) for path, found in by_path.items()]

    def _endpoint(self, by_method: dict[str, Endpoint]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            endpoint = by_method["GET" if request.method == "HEAD" else request.method]
            caller = self._access.require(request, endpoint.role, open_name="api")
            if endpoint.upload:
                return await self._take_upload(request, endpoint, caller)
            body = None
            if endpoint.method != "GET":
                require_same_site(request, "application/json")
                data = await read_body(request)
                body = None if endpoint.body is None else decode_body(data, endpoint.body)
            query = read_query(request, endpoint.query)
            call = Call(self._registry, caller, request.path_params, query, body)
            if endpoint.slow:
                key = f"{endpoint.path} {sorted(query.items())}"
                found = await self._background.run(key, lambda registry: endpoint.handle(call.using(registry)))
            elif endpoint.apart:
                found = await apart(self._registry, lambda registry: endpoint.handle(call.using(registry)))
            else:
                found = endpoint.handle(call)
            return Response(status_code=204) if endpoint.status == 204 else json_response(found, endpoint.status)

        return answer

    async def _take_upload(self, request: Request, endpoint: Endpoint, caller: Caller) -> Response:
        require_same_site(request, TAR)
        query = read_query(request, endpoint.query)
        async with self._uploads.unpacked(request) as folder:
            call = Call(self._registry, caller, request.path_params, query, folder)
            found = await apart(self._registry, lambda registry: endpoint.handle(call.using(registry)))
        return json_response(found, endpoint.status)


def _handlers(pages: Pages) -> dict[Any, Any]:
    """By kind of error: what is answered, to a program as JSON, to a person as a page."""

    async def typed(request: Request, error: EdgeError) -> Response:
        if is_page(request):
            return pages.error_page(request, status_of(error), str(error))
        return error_response(status_of(error), type(error).__name__, str(error))

    async def http(request: Request, error: HTTPException) -> Response:
        if is_page(request):
            response = pages.error_page(request, error.status_code, error.detail)
        else:
            response = error_response(error.status_code, "HTTPError", error.detail)
        response.headers.update(error.headers or {})
        return response

    async def unforeseen(_request: Request, _error: Exception) -> Response:
        return error_response(500, "InternalError", "something unforeseen happened; the log says what")

    return {EdgeError: typed, HTTPException: http, Exception: unforeseen}
