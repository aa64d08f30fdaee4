"""What every request passes first: the name it was sent to, how many came, the headers of the answer, the log."""

from __future__ import annotations

import ipaddress
import logging
import math
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_sdk.clock import Clock
from edge_server.endpoint import error_response
from edge_server.limits import Limiter
from edge_server.settings import HttpSettings, is_loopback

logger = logging.getLogger(__name__)
LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
_UNCOUNTED = ("/updates/", "/healthz", "/readyz")
_EMPTY_STYLE = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
"""Plotly makes an empty style element and adds its rules from the script, and sets style="" on parts of its charts."""
_MAP_STYLE = "'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='"
"""Style sheet of the maps in plotly 7.1, which no page shows; that of another version is blocked, to no harm."""
_POLICY = "; ".join(
    f"{name} {value}"
    for name, value in {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": f"'self' 'unsafe-hashes' {_EMPTY_STYLE} {_MAP_STYLE}",
        # plotly draws heat maps on a canvas, and shows them as images of their own data
        "img-src": "'self' data:",
        "connect-src": "'self'",
        "form-action": "'self'",
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
    }.items()
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    # with no-referrer, browsers hide the origin of our own forms too
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)
_NOT_KEPT = (b"cache-control", b"no-store")
_TLS_ONLY = (b"strict-transport-security", b"max-age=31536000")


class Guard:
    """Answers only to names of this machine, limits how often an address asks, adds the security headers, logs.

    Args:
        app: What it guards.
        settings: Where it listens.
        clock: Where the time comes from.
    """

    def __init__(self, app: ASGIApp, settings: HttpSettings, clock: Clock) -> None:
        self._app, self._clock = app, clock
        self._knows = _names(settings)
        self._headers = (*_HEADERS, _TLS_ONLY) if settings.is_secure else _HEADERS
        self._by_address = Limiter(settings.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        began, status = self._clock.timer(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = list(message["headers"])
                if not any(name.lower() == b"cache-control" for name, _ in own):
                    own.append(_NOT_KEPT)
                message["headers"] = [*own, *self._headers]
            await send(message)

        try:
            await (self._refusal(scope) or self._app)(scope, receive, send_with_headers)
        finally:
            # what only looked is told with --debug alone
            quiet = scope["method"] in ("GET", "HEAD") and status < 400
            logger.log(
                logging.DEBUG if quiet else logging.INFO,
                "%s %s %s",
                scope["method"],
                scope["path"],
                status,
                extra={
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "ms": round(1000 * (self._clock.timer() - began), 1),
                    "address": _client(scope),
                },
            )

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        if not self._knows(_host_name(Headers(scope=scope).get("host", ""))):
            return error_response(400, "HTTPError", "unexpected Host header: use http://127.0.0.1, or set public_url")
        if scope["path"].startswith(_UNCOUNTED):
            return None
        if wait_s := self._by_address.wait_s(_client(scope), self._clock.now()):
            seconds = math.ceil(wait_s)
            response = error_response(429, "HTTPError", f"too many requests: again in {seconds} s")
            response.headers["retry-after"] = str(seconds)
            return response
        return None


def _names(settings: HttpSettings) -> Callable[[str], bool]:
    """Whether a request was sent to a name of ours. Who rebinds a name of their own to this machine uses that name."""
    public = urlsplit(settings.public_url or "").hostname
    known = LOCAL | {settings.host.lower()} | ({public} if public else set())
    if is_loopback(settings.host):
        return known.__contains__
    own = known | {socket.gethostname().lower(), socket.getfqdn().lower()}

    def knows(host: str) -> bool:
        return host in own or _is_address(host)

    return knows


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _client(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else "unknown"
