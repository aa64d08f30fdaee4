"""The dashboard: renders pages, takes forms, logs in and out. What each page shows is in `views.py`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from edge_server.access import Access
from edge_server.background import Background, apart
from edge_server.endpoint import Call, Caller, Param, json_response, read_query
from edge_server.forms import FORMS, Form, Shown
from edge_server.live import TOPICS, seen, stream
from edge_server.records import Role, megabytes, memory
from edge_server.registry import Registry
from edge_server.users import may
from edge_server.views import DATA, VIEWS, View

_HERE = Path(__file__).parent
_OPEN_NAME = "dashboard"
_MAX_DETAILS = 300
_LIVE = (Param("topics", "text", "Of the page.", ""), Param("seen", "text", "What it shows.", ""))
_AGAIN = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="0">'
    '<title>edge-coordinator</title></head><body><p><a href="">Go on</a></p></body></html>'
)
"""For who follows a link from elsewhere: browsers keep the session's cookie back then, and send it when we ask."""
_A_DAY = (b"cache-control", b"private, max-age=86400")


class Pages:
    """The dashboard's routes.

    Args:
        registry: The fleet's records.
        access: Who may see what.
        background: Runs what takes long.
        stopping: Whether the server ends: streams end then.
    """

    def __init__(
        self, registry: Registry, access: Access, background: Background, *, stopping: Callable[[], bool]
    ) -> None:
        self._registry, self._access, self._background, self._stopping = registry, access, background, stopping
        self._templates = Environment(
            loader=FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=StrictUndefined
        )
        self._templates.filters |= {
            "when": _when, "iso": _iso, "percent": _percent, "details": _details, "words": _words, "figure": _figure,
            "shortened": _shortened, "megabytes": megabytes, "memory": memory,
        }  # fmt: skip

    def routes(self) -> list[BaseRoute]:
        """All of them."""
        return [
            *(Route(view.path, self._view(view)) for view in VIEWS),
            *(Route(view.path, self._data(view)) for view in DATA),
            *(Route(form.path, self._form(form), methods=["POST"]) for form in FORMS),
            Route("/login", self._login_page, methods=["GET"]),
            Route("/login", self._log_in, methods=["POST"]),
            Route("/logout", self._log_out, methods=["POST"]),
            Route("/live", self._live),
            Route("/vendor/plotly.min.js", self._plotly),
        ]

    def error_page(self, request: Request, status: int, problem: str) -> Response:
        """What a browser is shown in place of what it asked for."""
        if status == 401:
            if request.headers.get("sec-fetch-site") == "cross-site" and request.method == "GET":
                return HTMLResponse(_AGAIN)
            path = request.url.path if request.method == "GET" else "/"
            return RedirectResponse(f"/login?next={quote(path)}", 303)
        heading = {403: "Not allowed", 404: "Not found", 409: "Not now", 429: "Too many requests"}.get(
            status, "Refused"
        )
        back = urlsplit(request.headers.get("referer", "")).path or request.url.path
        try:
            caller = self._access.caller(request, open_name=_OPEN_NAME)
        except HTTPException:
            caller = None
        return self._html(request, "error.html", caller, {"heading": heading, "problem": problem, "back": back}, status)

    # ---- kinds of routes

    def _view(self, view: View) -> Callable[[Request], Awaitable[Response]]:
        topics = view.live.split()

        async def answer(request: Request) -> Response:
            call = self._call(request, view.role, read_query(request, view.query))
            now = seen(self._registry, topics) if topics else ""
            context = await self._context(view, call)
            frame = {"live": view.live, "seen": now, "section": view.section}
            return self._html(request, view.template, call.caller, {**context, **frame})

        return answer

    def _data(self, view: View) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            call = self._call(request, view.role, read_query(request, view.query))
            return json_response(await self._context(view, call))

        return answer

    async def _context(self, view: View, call: Call) -> Any:
        if not view.slow:
            return view.handle(call)
        key = f"{view.path} {sorted(call.query.items())}"
        return await self._background.run(key, lambda registry: view.handle(call.using(registry)))

    def _form(self, form: Form) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            fields = await self._access.read_form(request)
            call = self._call(request, form.role, {}, fields)
            if form.apart:
                done = await apart(self._registry, lambda registry: form.handle(call.using(registry)))
            else:
                done = form.handle(call)
            if isinstance(done, Shown):
                return self._html(request, done.template, call.caller, {**done.context, "section": done.section})
            return RedirectResponse(done, 303)

        return answer

    def _call(self, request: Request, role: Role, query: dict[str, Any], fields: dict[str, str] | None = None) -> Call:
        caller = self._access.require(request, role, open_name=_OPEN_NAME)
        return Call(self._registry, caller, request.path_params, query, fields)

    # ---- sessions

    async def _login_page(self, request: Request) -> Response:
        if not self._registry.users.exist():
            return RedirectResponse("/", 303)
        context = {"next": _local(request.query_params.get("next")), "problem": ""}
        return self._html(request, "login.html", None, context)

    async def _log_in(self, request: Request) -> Response:
        fields = await self._access.read_form(request)
        response = RedirectResponse(_local(fields.get("next")), 303)
        if self._access.log_in(request, fields.get("token", "").strip(), response):
            return response
        problem = "This token is nobody's: it was mistyped, or revoked."
        return self._html(request, "login.html", None, {"next": _local(fields.get("next")), "problem": problem}, 401)

    async def _log_out(self, request: Request) -> Response:
        await self._access.read_form(request)
        response = RedirectResponse("/login", 303)
        self._access.log_out(request, response)
        return response

    # ---- the rest

    async def _live(self, request: Request) -> Response:
        self._access.require(request, "viewer", open_name=_OPEN_NAME)

        def allowed() -> bool:
            # who was revoked, or logged out elsewhere, hears no more
            try:
                caller = self._access.caller(request, open_name=_OPEN_NAME, counted=False)
            except HTTPException:
                return False
            return caller is not None and not self._stopping()

        query = read_query(request, _LIVE)
        topics = [topic for topic in query["topics"].split() if topic in TOPICS]
        return stream(self._registry, allowed, topics=topics, shown=query["seen"])

    async def _plotly(self, _request: Request) -> Response:
        script = resources.files("plotly").joinpath("package_data/plotly.min.js")
        response = FileResponse(Path(str(script)), media_type="text/javascript")
        response.raw_headers.append(_A_DAY)
        return response

    def _html(
        self, request: Request, template: str, caller: Caller | None, context: dict[str, Any], status: int = 200
    ) -> Response:
        token, new_visitor = self._access.form_token(request)
        html = self._templates.get_template(template).render(
            {"live": "", "section": "", **context},
            caller=caller,
            form_token=token,
            allowed=lambda role: caller is not None and may(caller.role, role),
        )
        response = HTMLResponse(html, status)
        if new_visitor:
            self._access.greet(response, new_visitor)
        return response


def is_page(request: Request) -> bool:
    """Whether a person looks at what is answered."""
    return not request.url.path.startswith(("/api/", "/updates/", "/metrics", "/healthz", "/readyz", "/static/"))


def _local(path: str | None) -> str:
    """Where to go after logging in: a page of ours, wherever the link came from."""
    if not path or not path.startswith("/") or path.startswith(("//", "/\\")) or urlsplit(path).netloc:
        return "/"
    return path


# ---- how things are told


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _details(detail: dict[str, Any]) -> str:
    return _shortened(", ".join(f"{key} {value}" for key, value in detail.items() if value != ""))


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_DETAILS else text[: _MAX_DETAILS - 1] + "…"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figure(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else msgspec.json.encode(value).decode()
