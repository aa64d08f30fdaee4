"""Who a request comes from, and what stands between a browser and an order: sessions, form tokens, limits."""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from urllib.parse import parse_qsl, urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from edge_server.endpoint import Caller, read_body
from edge_server.limits import Limiter
from edge_server.records import Role
from edge_server.registry import Registry
from edge_server.users import may

_FIELD = "form_token"
_SESSION, _VISITOR = "edge_session", "edge_visitor"
OPEN_ROLE: Role = "operator"
"""What everybody on this machine may do while there are no users: look, give commands, pause and abort."""


class Access:
    """Decides who calls. To be used on one thread.

    Args:
        registry: The fleet's records.
    """

    def __init__(self, registry: Registry) -> None:
        self._users, self._clock, settings = registry.users, registry.clock, registry.settings.http
        self._secure, self._session_s = settings.is_secure, int(settings.session_hours * 3600)
        self._by_user = Limiter(settings.requests_per_minute)
        self._wrong = Limiter(settings.logins_per_minute)
        self._secret = secrets.token_bytes(32)

    # ---- who it is

    def caller(self, request: HTTPConnection, *, open_name: str, counted: bool = True) -> Caller | None:
        """Who asks; None: nobody that is known.

        Args:
            request: What came.
            open_name: For the audit log, while there are no users.
            counted: It counts for how often somebody may ask.

        Raises:
            HTTPException: The token is wrong, or there were too many requests or wrong tokens.
        """
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind:
            return self._by_token(request, token.strip() if kind.lower() == "bearer" else "", counted=counted)
        secret = request.cookies.get(self._cookie(_SESSION))
        if secret and (user := self._users.by_session(secret)) is not None:
            if counted:
                self._count(user.name)
            return Caller(user.name, user.role, "session")
        return None if self._users.exist() else Caller(open_name, OPEN_ROLE, "open")

    def require(self, request: HTTPConnection, role: Role | None, *, open_name: str) -> Caller:
        """Who asks, if they may.

        Raises:
            HTTPException: 401: nobody that is known; 403: the role is not enough; 429.
        """
        if role is None:
            return Caller("anybody", "viewer", "open")
        found = self.caller(request, open_name=open_name)
        if found is None:
            raise HTTPException(
                401, "a token is needed: Authorization: Bearer TOKEN", headers={"www-authenticate": "Bearer"}
            )
        if not may(found.role, role):
            raise HTTPException(403, f"this needs the role {role}; {found.name} is {found.role}")
        return found

    def _by_token(self, request: HTTPConnection, token: str, *, counted: bool) -> Caller:
        user = self._users.by_token(token)
        if user is None:
            self._count_wrong(request)
            raise HTTPException(401, "this token is nobody's", headers={"www-authenticate": "Bearer"})
        if counted:
            self._count(user.name)
        return Caller(user.name, user.role, "token")

    def _count(self, user: str) -> None:
        if wait_s := self._by_user.wait_s(user, self._clock.now()):
            raise too_many("requests", wait_s)

    def _count_wrong(self, request: HTTPConnection) -> None:
        """Tokens are too long to be guessed: who has a right one is let in, whoever else tries from that address."""
        if wait_s := self._wrong.wait_s(address(request), self._clock.now()):
            raise too_many("wrong tokens", wait_s)

    # ---- browsers

    def log_in(self, request: Request, token: str, response: Response) -> bool:
        """Begin a session with a token; False: it is nobody's.

        Raises:
            HTTPException: There were too many wrong ones from that address.
        """
        secret = self._users.log_in(token)
        if secret is None:
            self._count_wrong(request)
            return False
        self._set_cookie(response, _SESSION, secret, self._session_s)
        return True

    def log_out(self, request: Request, response: Response) -> None:
        """End the browser's session."""
        if secret := request.cookies.get(self._cookie(_SESSION)):
            self._users.log_out(secret)
        response.delete_cookie(self._cookie(_SESSION), path="/", secure=self._secure, httponly=True, samesite="strict")

    def form_token(self, request: Request) -> tuple[str, str]:
        """What the forms of this browser must carry, and the secret to tie it to if it has none yet, for `greet`."""
        known = request.cookies.get(self._cookie(_SESSION)) or request.cookies.get(self._cookie(_VISITOR))
        secret = known or secrets.token_urlsafe(32)
        token = hmac.new(self._secret, secret.encode(), hashlib.sha256).hexdigest()
        return token, "" if known else secret

    def greet(self, response: Response, secret: str) -> None:
        """Give a browser without a session something that its forms are tied to."""
        self._set_cookie(response, _VISITOR, secret, None)

    async def read_form(self, request: Request) -> dict[str, str]:
        """The fields of a form, which this browser was given by a page of ours.

        Raises:
            HTTPException: It was not, or the body is too large or no form.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
            raise HTTPException(415, "the content type must be application/x-www-form-urlencoded")
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise HTTPException(403, "forms of other sites are refused")
        try:
            fields = dict(parse_qsl((await read_body(request)).decode(), keep_blank_values=True, max_num_fields=50))
        except ValueError as error:
            raise HTTPException(400, "the form cannot be read") from error
        expected, unknown = self.form_token(request)
        if unknown or not hmac.compare_digest(expected.encode(), fields.pop(_FIELD, "").encode()):
            raise HTTPException(403, "this form is from before you logged in, or the coordinator began anew: reload it")
        return fields

    def _set_cookie(self, response: Response, name: str, value: str, max_age_s: int | None) -> None:
        response.set_cookie(
            self._cookie(name),
            value,
            max_age=max_age_s,
            path="/",
            secure=self._secure,
            httponly=True,
            samesite="strict",
        )

    def _cookie(self, name: str) -> str:
        return f"__Host-{name}" if self._secure else name


def address(request: HTTPConnection) -> str:
    """Where a request comes from."""
    return request.client.host if request.client else "unknown"


def too_many(what: str, wait_s: float) -> HTTPException:
    """The refusal of whoever asks too often."""
    seconds = max(1, math.ceil(wait_s))
    return HTTPException(429, f"too many {what}: again in {seconds} s", headers={"retry-after": str(seconds)})
