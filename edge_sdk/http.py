"""One device over HTTP, for apps in other languages: on a Unix socket, or on loopback.

The event loop only reads, waits and writes. Bodies are decoded, predicted on and encoded in worker threads; there are
few, as each of the model's sessions has one thread. As many requests as allowed wait for a worker, and the next one is
refused at once. A browser on this machine can reach loopback too, so that pages of other sites are refused there.
"""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import stat
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from os import umask
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import msgspec
import numpy as np
import uvicorn
from msgspec import UNSET
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_sdk.ask import LabelRequest
from edge_sdk.errors import (
    ConfigError,
    DuplicateIdError,
    EdgeError,
    InputError,
    LabelError,
    StoppedError,
    StoreError,
    TransportError,
)
from edge_sdk.openapi import (
    BINARY_PARAMETERS,
    DTYPES,
    MAX_LINEAGE,
    MAX_NAME_CHARS,
    AskReply,
    AskRequest,
    BatchReply,
    ErrorDetail,
    ErrorReply,
    ForgetReply,
    ForgetRequest,
    Health,
    LabelRuling,
    LearnNowRequest,
    LineageReply,
    ObserveRequest,
    PredictReply,
    PredictRequest,
    RewardRequest,
    SkewReply,
    document,
    read_state,
)
from edge_sdk.skew import Skew
from edge_sdk.status import Status
from edge_sdk.store import Lineage
from edge_sdk.types import AnyArray, Prediction

T = TypeVar("T")
_LOOPBACK = ("127.0.0.1", "::1")
_LOCAL_NAMES = frozenset({*_LOOPBACK, "localhost"})
_JSON, _BINARY = "application/json", "application/octet-stream"
_WAITING_THREADS = 16
_LINGER_S = 2.0
_RETRY_S = 1
_CLIENT_LEFT = 499
_BODIES = (
    PredictRequest, ObserveRequest, RewardRequest, AskRequest, LabelRuling, LearnNowRequest, ForgetRequest,
)  # fmt: skip
_READ: dict[type, msgspec.json.Decoder[Any]] = {kind: msgspec.json.Decoder(kind) for kind in _BODIES}
"""Built before any thread reads a body: of a type that two of them meet at once for the first time, msgspec may end the
process."""


class Device(Protocol):
    """What is served: an `EdgeDevice`, or whatever does the same."""

    @property
    def ready(self) -> bool:
        """Whether there is a model to predict with."""

    def predict(
        self,
        x: Any,
        *,
        id: str | None = None,  # noqa: A002
        state: Mapping[str, AnyArray] | None = None,
        slice: str = "",  # noqa: A002
    ) -> Prediction:
        """Predict one sample."""

    def predict_batch(self, x: Any, *, slice: str = "") -> list[Prediction]:  # noqa: A002
        """Predict several."""

    def observe(self, id: str, truth: Any, /, *, source: str = "", durable: bool = False) -> None:  # noqa: A002
        """Give the truth about a prediction."""

    def reward(self, id: str, value: float, /, *, source: str = "") -> None:  # noqa: A002
        """Say how right a prediction proved."""

    def label_requests(self, count: int, /) -> list[LabelRequest]:
        """Ask which predictions to label."""

    def accept_label(self, label: str, /) -> None:
        """A new label may be learned."""

    def refuse_label(self, label: str, /) -> None:
        """A new label is none."""

    def learn_now(self) -> None:
        """Learn as soon as there are enough rows."""

    def forget(self, ids: list[str], /) -> int:
        """Erase what is kept of predictions."""

    def forget_all(self) -> object:
        """Erase all that was learned."""

    def skew(self) -> Skew:
        """Scores of the head in use."""

    def lineage(self, *, limit: int) -> list[Lineage]:
        """How each head came to be."""

    def status(self) -> Status:
        """How the device is."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server takes on."""

    workers: int = 1
    """Predictions at a time."""
    queue: int = 64
    """Requests that wait for a worker; beyond it they are refused with 429."""
    max_body_bytes: int = 16_000_000
    """Of one request; all requests together hold at most four times as much."""
    max_rows: int = 1_000
    """Of one batch."""
    body_timeout_s: float = 10.0
    """For a body to come in whole."""
    stop_timeout_s: float = 30.0
    """For requests in flight when it is told to stop."""


# ---- errors that only HTTP has


class RequestError(EdgeError):
    """A request that does not reach the device. `status` is the HTTP status."""

    status = 400


class MalformedError(RequestError):
    """The body or a parameter cannot be read."""


class ForeignSiteError(RequestError):
    """A page of another site asks."""

    status = 403


class SlowBodyError(RequestError):
    """The body took too long."""

    status = 408


class TooLargeError(RequestError):
    """The body or the batch is larger than allowed."""

    status = 413


class ContentTypeError(RequestError):
    """The body is of a type that is not read here."""

    status = 415


class BusyError(RequestError):
    """As many requests as allowed wait already. A retry helps."""

    status = 429


class NotReadyError(RequestError):
    """No release is installed yet. A retry helps."""

    status = 503


_STATUS: tuple[tuple[type[EdgeError], int], ...] = (
    (DuplicateIdError, 409),
    (InputError, 422),
    (LabelError, 422),
    (StoreError, 503),
    (StoppedError, 503),
)
_HTTP_ERRORS = {404: "NotFoundError", 405: "MethodNotAllowedError"}


# ---- the application


def create_app(
    device: Device, limits: Limits | None = None, *, hosts: frozenset[str] | None = _LOCAL_NAMES
) -> Starlette:
    """The web application.

    Args:
        device: Is called from several threads.
        limits: What to take on.
        hosts: Names that a request may call this server by; None: any (a Unix socket, which no browser reaches).
    """
    api = _Api(device, limits or Limits())
    return Starlette(
        routes=[
            Route("/predict", api.predict, methods=["POST"]),
            Route("/observe", api.observe, methods=["POST"]),
            Route("/reward", api.reward, methods=["POST"]),
            Route("/label-requests", api.label_requests, methods=["POST"]),
            Route("/labels", api.labels, methods=["POST"]),
            Route("/learn-now", api.learn_now, methods=["POST"]),
            Route("/forget", api.forget, methods=["POST"]),
            Route("/skew", api.skew),
            Route("/lineage", api.lineage),
            Route("/status", api.status),
            Route("/healthz", api.healthz),
            Route("/openapi.json", api.openapi),
        ],
        middleware=[Middleware(_Linger), Middleware(_Guard, hosts=hosts)],
        exception_handlers={
            EdgeError: _edge_error,
            HTTPException: _http_error,
            ClientDisconnect: _client_left,
            Exception: _unforeseen,
        },
    )


class _Api:
    """The endpoints."""

    def __init__(self, device: Device, limits: Limits) -> None:
        self._device, self._limits = device, limits
        self._predictions = _Workers(limits.workers, limits.queue, "edge-predict")
        # what waits for a flush or a step (all but predictions and plain feedback) must not keep predictions waiting
        self._waits = _Workers(_WAITING_THREADS, limits.queue, "edge-wait")
        self._held_bytes = 0
        self._document = msgspec.json.encode(document())

    async def predict(self, request: Request) -> Response:
        self._check_ready()
        kind = _content_type(request, _JSON, _BINARY)
        self._predictions.check_room()
        async with self._body(request) as body:
            if kind == _JSON:
                job = partial(_predict_json, self._device, self._limits, body)
            else:
                job = partial(_predict_binary, self._device, self._limits, body, _query(request, BINARY_PARAMETERS))
            return _json(await _unless_client_leaves(request, self._predictions.run(job)))

    async def observe(self, request: Request) -> Response:
        given = await self._told(request, ObserveRequest)
        if not given.durable:
            self._device.observe(given.id, given.given, source=given.source)  # touches memory only
            return Response(status_code=202)
        await self._wait(
            request, partial(self._device.observe, given.id, given.given, source=given.source, durable=True)
        )
        return Response(status_code=204)

    async def reward(self, request: Request) -> Response:
        given = await self._told(request, RewardRequest)
        self._device.reward(given.id, given.value, source=given.source)  # touches memory only
        return Response(status_code=202)

    async def label_requests(self, request: Request) -> Response:
        given = await self._told(request, AskRequest)
        return _json(_encode(AskReply(await self._wait(request, partial(self._device.label_requests, given.count)))))

    async def labels(self, request: Request) -> Response:
        given = await self._told(request, LabelRuling)
        rule = self._device.accept_label if given.accept else self._device.refuse_label
        await self._wait(request, partial(rule, given.label))
        return Response(status_code=204)

    async def learn_now(self, request: Request) -> Response:
        await self._told(request, LearnNowRequest)
        await self._wait(request, self._device.learn_now)
        return Response(status_code=202)

    async def forget(self, request: Request) -> Response:
        given = await self._told(request, ForgetRequest)
        if given.ids is UNSET:
            await self._wait(request, self._device.forget_all)
            return Response(status_code=204)
        rows = await self._wait(request, partial(self._device.forget, given.ids))
        return _json(_encode(ForgetReply(rows)))

    async def skew(self, request: Request) -> Response:
        return _json(await self._wait(request, lambda: _encode(SkewReply.of(self._device.skew()))))

    async def lineage(self, request: Request) -> Response:
        limit = _query(request, frozenset({"limit"})).get("limit", "100")
        if not (limit.isascii() and limit.isdecimal() and len(limit) <= 9 and 1 <= int(limit) <= MAX_LINEAGE):
            raise MalformedError(f"limit={limit[:32]!r}: a number from 1 to {MAX_LINEAGE}")
        job = partial(self._device.lineage, limit=int(limit))
        return _json(await self._wait(request, lambda: _encode(LineageReply.of(job()))))

    async def status(self, request: Request) -> Response:
        return _json(await self._wait(request, lambda: _encode(self._device.status())))

    async def healthz(self, _request: Request) -> Response:
        self._check_ready()
        return _json(_encode(Health(ready=True)))

    async def openapi(self, _request: Request) -> Response:
        return _json(self._document)

    async def _told(self, request: Request, kind: type[T]) -> T:
        """The JSON body of a request to a device that is ready."""
        self._check_ready()
        _content_type(request, _JSON)
        async with self._body(request) as body:
            return _decode(body, kind)

    async def _wait(self, request: Request, job: Callable[[], T]) -> T:
        """What `job` gives, in a thread that may wait for the device's own turn."""
        return await _unless_client_leaves(request, self._waits.run(job))

    def _check_ready(self) -> None:
        if not self._device.ready:
            raise NotReadyError(
                "no release is installed yet: give a checkpoint, or wait for the coordinator's first one"
            )

    @asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytearray]:
        """The body, counted against what all requests may hold for as long as it is used."""
        most, timeout = self._limits.max_body_bytes, self._limits.body_timeout_s
        too_large = TooLargeError(f"the body has more than {most} bytes; send less at a time")
        if (declared := request.headers.get("content-length", "")).isdecimal() and int(declared) > most:
            raise too_large
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(timeout):
                    async for chunk in request.stream():
                        if len(body) + len(chunk) > most:
                            raise too_large
                        if self._held_bytes + len(chunk) > 4 * most:
                            raise BusyError("the bodies of waiting requests fill the memory set aside; try again")
                        body += chunk
                        self._held_bytes += len(chunk)
            except TimeoutError as error:
                raise SlowBodyError(f"the body did not come within {timeout:g} s") from error
            yield body
        finally:
            self._held_bytes -= len(body)


class _Workers:
    """Threads that run jobs: so many at a time, so many more wait, the next is refused."""

    def __init__(self, threads: int, queue: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._turn = asyncio.Semaphore(threads)
        self._free = threads + queue

    def check_room(self) -> None:
        """Refuse before anything is read, if there is no room."""
        if self._free <= 0:
            raise BusyError("as many requests as allowed wait already; try again")

    async def run(self, job: Callable[[], T]) -> T:
        """What `job` gives. Cancelled while it waits, its place is free at once; later, it runs to its end."""
        self.check_room()
        self._free -= 1
        try:
            await self._turn.acquire()
        except asyncio.CancelledError:
            self._free += 1
            raise
        future = asyncio.get_running_loop().run_in_executor(self._executor, job)
        future.add_done_callback(self._leave)
        return await asyncio.shield(future)

    def _leave(self, future: asyncio.Future[Any]) -> None:
        self._turn.release()
        self._free += 1
        if not future.cancelled():
            future.exception()  # who asked may be gone; asyncio complains of errors that nobody looked at


async def _unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled when the client hangs up."""
    task, left = asyncio.create_task(work), asyncio.create_task(_left(request))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        left.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ---- jobs, which run in worker threads


def _predict_json(device: Device, limits: Limits, body: bytearray) -> bytes:
    asked = _decode(body, PredictRequest)
    if asked.rows is not UNSET:
        _check_rows(len(asked.rows), limits)
        return _tell_batch(device.predict_batch(asked.rows, slice=asked.slice))
    state = None if asked.state is None else read_state(asked.state)
    return _tell(device.predict(asked.x, id=asked.id, state=state, slice=asked.slice))


def _predict_binary(device: Device, limits: Limits, body: bytearray, query: dict[str, str]) -> bytes:
    try:
        shape = tuple(int(size) for size in query.get("shape", "").split(","))
    except ValueError:
        shape = (-1,)
    if min(shape) < 0 or len(shape) > 16:
        raise MalformedError(f"shape={query.get('shape', '')[:64]!r}: give sizes with commas, as in shape=1,28,28")
    name = query.get("dtype", "float32")
    if name not in DTYPES:
        raise MalformedError(f"dtype={name[:32]!r}: known are {', '.join(DTYPES)}")
    dtype = np.dtype(name).newbyteorder("<")
    if (needed := math.prod(shape) * dtype.itemsize) != len(body):
        raise MalformedError(f"shape {shape} of {name} takes {needed} bytes, the body has {len(body)}")
    x = np.frombuffer(body, dtype).reshape(shape)
    batch, given, part = query.get("batch", "false"), query.get("id"), query.get("slice", "")
    if len(part) > MAX_NAME_CHARS:
        raise MalformedError(f"the name of a slice has at most {MAX_NAME_CHARS} characters")
    if batch not in ("true", "false"):
        raise MalformedError(f"batch={batch[:32]!r}: true or false")
    if batch == "true":
        if given is not None:
            raise MalformedError("id goes with one sample, not with a batch")
        _check_rows(shape[0], limits)
        return _tell_batch(device.predict_batch(x, slice=part))
    if given is not None and not 1 <= len(given) <= 128:
        raise MalformedError("an id has 1 to 128 characters")
    return _tell(device.predict(x, id=given, slice=part))


def _check_rows(rows: int, limits: Limits) -> None:
    if rows > limits.max_rows:
        raise TooLargeError(f"a batch has at most {limits.max_rows} rows, got {rows}; send less at a time")


def _tell(prediction: Prediction) -> bytes:
    return _encode(PredictReply.of(prediction))


def _tell_batch(predictions: list[Prediction]) -> bytes:
    return _encode(BatchReply([PredictReply.of(prediction) for prediction in predictions]))


def _encode(value: Any) -> bytes:
    return msgspec.json.encode(value)  # NaN and infinity become null


# ---- reading and answering


def _decode(body: bytearray, kind: type[T]) -> T:
    try:
        read: msgspec.json.Decoder[T] = _READ[kind]
        return read.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedError(f"body: {error}") from error


def _content_type(request: Request, *allowed: str) -> str:
    # a page of another site can make a browser send other types than these without asking first
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found not in allowed:
        raise ContentTypeError(f"the content type must be {' or '.join(allowed)}, got {found[:64]!r}")
    return found


def _query(request: Request, known: frozenset[str]) -> dict[str, str]:
    query = dict(request.query_params)
    if unknown := query.keys() - known:
        raise MalformedError(f"unknown parameter {min(unknown)[:64]!r}; known here: {', '.join(sorted(known))}")
    return query


def _json(content: bytes, status: int = 200) -> Response:
    return Response(content, status, media_type=_JSON)


def _error(status: int, kind: str, message: str) -> Response:
    response = _json(_encode(ErrorReply(ErrorDetail(kind, message))), status)
    if status in (429, 503):
        response.headers["retry-after"] = str(_RETRY_S)
    return response


async def _edge_error(_request: Request, error: Exception) -> Response:
    if isinstance(error, RequestError):
        status = error.status
    else:
        status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
    return _error(status, type(error).__name__, str(error))


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # registered for nothing else
    response = _error(error.status_code, _HTTP_ERRORS.get(error.status_code, "HTTPError"), error.detail)
    response.headers.update(error.headers or {})
    return response


async def _client_left(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)  # nobody reads it


async def _unforeseen(_request: Request, _exception: Exception) -> Response:
    return _error(500, "InternalError", "something unforeseen happened; the log says what")


class _Guard:
    """Refuses what a page of another site could make a browser send, or read by a name of its own for this machine."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and self._hosts is not None:
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            if _parts(f"//{host}")[1] not in self._hosts:
                app = _error(400, MalformedError.__name__, "unexpected Host header: use http://127.0.0.1")
            elif origin is not None and _parts(origin)[0] != host:
                app = _error(403, ForeignSiteError.__name__, "requests from other sites are refused")
        await app(scope, receive, send)


def _parts(address: str) -> tuple[str, str]:
    """Network location and host name of an address."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return "", ""
    return parts.netloc, parts.hostname or ""


class _Linger:
    """After an answer that came before the body was read, reads on for a moment.

    Closing a connection on data that nobody has read resets it, and the client would lose the answer that says why.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        unread = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers

        async def watched_receive() -> Message:
            nonlocal unread
            message = await receive()
            if not message.get("more_body", False):
                unread = False
            return message

        async def watched_send(message: Message) -> None:
            if unread and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            elif unread and not message.get("more_body", False):
                await send({**message, "more_body": True})
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LINGER_S):
                        while unread:
                            await watched_receive()
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        await self._app(scope, watched_receive, watched_send)


# ---- running


@contextmanager
def listen_unix(path: Path) -> Iterator[socket.socket]:
    """A Unix socket that only its owner may use, listening; it is removed at the end.

    Raises:
        ConfigError: There is something else than a socket, or no socket can be made there.
        TransportError: Another process listens there.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        before = umask(0o177)  # from the first moment on; nothing else runs yet
        try:
            _remove_stale(path)
            listener.bind(str(path))
            listener.listen()  # now, so that another process finds it taken while the model is still being loaded
        except OSError as error:
            reason = error.strerror or error  # a path that is too long has no number
            raise ConfigError(f"cannot listen on {path}: {reason}; choose another --socket") from error
        finally:
            umask(before)
        made = _identity(path)
        try:
            yield listener
        finally:
            listener.close()
            # the next process may have made its own while the last requests were answered
            if made is not None and _identity(path) == made:
                path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def _remove_stale(path: Path) -> None:
    """Remove the socket that a killed process left behind."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is there and is not a socket; remove it, or choose another --socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except TimeoutError:
            pass  # too busy to answer is alive
    raise TransportError(f"another process listens on {path}: stop it, or choose another --socket")


@contextmanager
def listen_loopback(host: str, port: int) -> Iterator[socket.socket]:
    """A TCP socket that only this machine reaches, listening.

    Args:
        host: 127.0.0.1 or ::1.
        port: 0: any that is free.

    Raises:
        ConfigError: Another host.
        TransportError: The port is taken.
    """
    if host not in _LOOPBACK:
        raise ConfigError(
            f"--host {host}: only {' and '.join(_LOOPBACK)} are served, as there is no authentication; "
            "for other machines put a proxy that authenticates in front"
        )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen()
        except OSError as error:
            raise TransportError(
                f"cannot listen on {host}, port {port}: {error.strerror}; set --port to a free one"
            ) from error
        yield listener


def address_of(listener: socket.socket) -> str:
    """Where clients find it: "http://127.0.0.1:8000", or "unix:/run/edge.sock"."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{name}"
    return f"http://[{name[0]}]:{name[1]}" if listener.family == socket.AF_INET6 else f"http://{name[0]}:{name[1]}"


def serve(device: Device, listener: socket.socket, limits: Limits, *, on_ready: Callable[[], None]) -> None:
    """Answer until SIGTERM or SIGINT, then finish what is in flight. Call it on the main thread.

    Args:
        device: Runs already, and is stopped by the caller.
        listener: Of `listen_unix` or `listen_loopback`.
        limits: What to take on.
        on_ready: Called before the first request is answered.
    """
    config = uvicorn.Config(
        create_app(device, limits, hosts=None if listener.family == socket.AF_UNIX else _LOCAL_NAMES),
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(limits.stop_timeout_s),
    )
    server = uvicorn.Server(config)
    # uvicorn catches the signals while it runs and raises them again when it is done: end quietly then
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    on_ready()
    asyncio.run(server.serve(sockets=[listener]))
