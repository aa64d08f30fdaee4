"""One device over HTTP: what it takes, what it gives, and what it refuses."""

import asyncio
import json
import socket
import sys
import threading

import httpx
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from edge_sdk import http
from edge_sdk.ask import LabelRequest
from edge_sdk.cli import main
from edge_sdk.errors import (
    ConfigError,
    DiskFullError,
    DtypeError,
    DuplicateIdError,
    LabelError,
    ModelError,
    NonFiniteError,
    RangeError,
    ShapeError,
    StoreError,
    TransportError,
    UnknownLabelError,
)
from edge_sdk.openapi import Health, PredictReply, document
from edge_sdk.reporter import Counters
from edge_sdk.skew import Score, Skew
from edge_sdk.status import Status
from edge_sdk.store import Lineage
from edge_sdk.types import Prediction

EMPTY = np.empty(0, np.float32)
POSTED = ("/predict", "/observe", "/reward", "/label-requests", "/labels", "/learn-now", "/forget")
DEADLINE_S = 30


def prediction(**changes):
    fields = {
        "id": "p-1", "label": "cat", "probabilities": np.array([0.75, 0.25], np.float32), "labels": ("cat", "dog"),
        "release": 3, "head": 2, "latency_ms": 1.5, "present": ("cat",), "values": EMPTY, "outputs": {}, "state": {},
    }  # fmt: skip
    return Prediction(**{**fields, **changes})


class FakeDevice:
    """Remembers what it is given. With `gate`, `predict` waits for it to open."""

    def __init__(self, answer=None, error=None, gate=None):
        self.ready, self.answer, self.error, self.gate = True, answer or prediction(), error, gate
        self.asked, self.observed, self.durable = [], [], []
        self.slices, self.sources, self.calls = [], [], []
        self.entered = threading.Semaphore(0)

    def predict(self, x, *, id=None, state=None, slice=""):  # noqa: A002
        self.asked.append((x, id, state))
        self.slices.append(slice)
        self._wait()
        return self.answer

    def predict_batch(self, x, *, slice=""):  # noqa: A002
        self.asked.append(x)
        self.slices.append(slice)
        self._wait()
        return [self.answer for _ in x]

    def observe(self, name, truth, /, *, source="", durable=False):
        if durable:
            self._wait()
        if self.error is not None:
            raise self.error
        self.observed.append((name, truth))
        self.durable.append(durable)
        self.sources.append(source)

    def reward(self, name, value, /, *, source=""):
        self._note("reward", name, value, source)

    def label_requests(self, count, /):
        self._note("label_requests", count)
        return [LabelRequest("p-7", "cat", 0.75, 1_767_312_000.0)]

    def accept_label(self, label, /):
        self._note("accept_label", label)

    def refuse_label(self, label, /):
        self._note("refuse_label", label)

    def learn_now(self):
        self._note("learn_now")

    def forget(self, ids, /):
        self._note("forget", ids)
        return 2

    def forget_all(self):
        self._note("forget_all")

    def skew(self):
        return Skew(training=Score(100, 100), judge=Score(60, 100), live=Score(5, 9))

    def lineage(self, *, limit):
        self._note("lineage", limit)
        return [Lineage(5.0, 3, 1, 2, "promoted", {"seed": 7, "config": {"learner": "hybrid"}})]

    def _note(self, *call):
        if self.error is not None:
            raise self.error
        self.calls.append(call)

    def status(self):
        return Status(
            device="pump-1", mode="adapt", ready=True, release=3, head=2, labels=["cat"], variant="int8",
            variant_reason="", phase="idle", waits="", release_on_probation=False, alarms=[], warnings=[],
            diagnosis="", estimated_accuracy=None, metrics={}, accuracy=None, fresh_rows=0, replay_rows=0,
            judge_rows=0, asked=0, new_labels={}, connected=False, outbox_rows=0, fetching=None, problem="",
            counters=Counters(),
        )  # fmt: skip

    def _wait(self):
        self.entered.release()
        if self.gate is not None:
            assert self.gate.wait(DEADLINE_S)
        if self.error is not None:
            raise self.error


@pytest.fixture
def device():
    return FakeDevice()


@pytest.fixture
def gate():
    gate = threading.Event()
    yield gate
    gate.set()


def client_of(app, base="http://127.0.0.1:8000"):
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url=base, timeout=DEADLINE_S
    )


@pytest.fixture
def ask(device):
    """Sends one request: `ask("POST", "/predict", json={...})`."""

    def send(method, path, *, limits=None, base="http://127.0.0.1:8000", **options):
        async def run():
            async with client_of(http.create_app(device, limits), base) as client:
                return await client.request(method, path, **options)

        return asyncio.run(run())

    return send


@pytest.fixture
def predict(ask):
    return lambda body, **options: ask("POST", "/predict", json=body, **options)


def refused(response):
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"type", "message"}
    assert error["message"]
    return response.status_code, error["type"]


def strict_json(response):
    """The body; NaN and Infinity, which Python would read, are not JSON."""
    return json.loads(response.content, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# ---- predicting


def test_a_sample_is_predicted_and_named(predict, device):
    response = predict({"x": [[1, 2.5]], "id": "mine"})
    assert response.status_code == 200
    assert response.json() == {
        "id": "p-1", "release": 3, "head": 2, "latency_ms": 1.5,
        "label": "cat", "probabilities": {"cat": 0.75, "dog": 0.25}, "present": ["cat"],
    }  # fmt: skip
    assert device.asked == [([[1, 2.5]], "mine", None)]


def test_a_row_of_columns_goes_to_the_device_as_it_came(predict, device):
    row = {"age": 41, "city": "Bern", "income": None}
    assert predict({"x": row}).status_code == 200
    assert device.asked == [(row, None, None)]


def test_rows_give_predictions_in_their_order(ask, device):
    answers = iter([prediction(id="a"), prediction(id="b")])
    device.predict_batch = lambda rows, **_: [next(answers) for _ in rows]
    response = ask("POST", "/predict", json={"rows": [[1], [2]]})
    assert [one["id"] for one in response.json()["predictions"]] == ["a", "b"]


def test_multilabel_says_which_labels_are_present_even_if_none_is(predict, device):
    device.answer = prediction(probabilities=np.array([0.4, 0.3], np.float32), present=())
    assert predict({"x": [1]}).json()["present"] == []


def test_regression_gives_values_by_target_and_no_label(predict, device):
    device.answer = prediction(
        label="", probabilities=EMPTY, labels=("kW", "°C"), present=(), values=np.array([1.5, np.nan], np.float32)
    )
    body = strict_json(predict({"x": [1]}))
    assert body == {"id": "p-1", "release": 3, "head": 2, "latency_ms": 1.5, "values": {"kW": 1.5, "°C": None}}


def test_a_raw_model_gives_its_outputs_and_nan_is_null(predict, device):
    outputs = {
        "boxes": np.array([[1.0, np.inf], [np.nan, -np.inf]], np.float32),
        "count": np.array(2, np.int64),
        "names": np.array(["a"]),
    }
    device.answer = prediction(label="", probabilities=EMPTY, labels=(), present=(), outputs=outputs)
    body = strict_json(predict({"x": [1]}))
    assert body["outputs"] == {"boxes": [[1.0, None], [None, None]], "count": 2, "names": ["a"]}
    assert not {"label", "probabilities", "present", "values", "state"} & set(body)


def test_state_goes_out_and_comes_back_in(predict, device):
    state = {"h": np.arange(4, dtype=np.float32).reshape(1, 4), "n": np.array([7], np.int64)}
    device.answer = prediction(state=state)
    told = predict({"x": [1]}).json()["state"]
    predict({"x": [1], "state": told})
    given = device.asked[1][2]
    assert given.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(given[name], value)


def test_a_ragged_state_is_a_shape_error(predict):
    assert refused(predict({"x": [1], "state": {"h": [[1], [2, 3]]}})) == (422, "ShapeError")


def test_a_slice_goes_in_and_a_holdout_comes_out(predict, ask, device):
    device.answer = prediction(holdout=True)
    assert predict({"x": [1], "slice": "north"}).json()["holdout"] is True
    predict({"rows": [[1]], "slice": "south"})
    binary = {"content": bytes(4), "headers": {"content-type": "application/octet-stream"}}
    for batch in ("false", "true"):
        assert ask("POST", f"/predict?shape=1&slice=east&batch={batch}", **binary).status_code == 200
    assert device.slices == ["north", "south", "east", "east"]
    device.answer = prediction()
    assert "holdout" not in predict({"x": [1]}).json()


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int32", "int64"])
def test_a_binary_body_is_the_array_itself(ask, device, dtype):
    x = np.arange(6).reshape(1, 2, 3).astype(dtype)
    headers = {"content-type": "application/octet-stream"}
    response = ask("POST", f"/predict?shape=1,2,3&dtype={dtype}&id=mine", content=x.tobytes(), headers=headers)
    assert response.status_code == 200
    given, name, _ = device.asked[0]
    np.testing.assert_array_equal(given, x)
    assert (given.dtype, name) == (x.dtype, "mine")
    response = ask("POST", f"/predict?shape=2,3&dtype={dtype}&batch=true", content=x.tobytes(), headers=headers)
    assert len(response.json()["predictions"]) == 2
    np.testing.assert_array_equal(device.asked[1], x[0])


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "give sizes with commas"),
        ("shape=2,x", "give sizes with commas"),
        ("shape=-1,2", "give sizes with commas"),
        ("shape=" + "1," * 20 + "2", "give sizes with commas"),
        ("shape=3", "takes 12 bytes, the body has 8"),
        ("shape=99999999999,99999999999", "the body has 8"),
        ("shape=2&dtype=object", "known are float32"),
        ("shape=2&batch=1", "true or false"),
        ("shape=2&batch=true&id=a", "id goes with one sample"),
        ("shape=2&id=", "1 to 128 characters"),
        ("shape=2&slice=" + "s" * 65, "at most 64 characters"),
        ("shape=2&shpe=2", "unknown parameter 'shpe'"),
    ],
)
def test_a_binary_body_that_is_not_what_its_query_says_is_refused(ask, device, query, message):
    response = ask("POST", f"/predict?{query}", content=bytes(8), headers={"content-type": "application/octet-stream"})
    assert refused(response) == (400, "MalformedError")
    assert message in response.json()["error"]["message"]
    assert device.asked == []


# ---- observing, status, health


@pytest.mark.parametrize(
    ("body", "truth"),
    [
        ({"label": "dog"}, "dog"),
        ({"truth": "dog"}, "dog"),
        ({"truth": ["cat", "dog"]}, ["cat", "dog"]),
        ({"truth": []}, []),
        ({"truth": 1.5}, 1.5),
        ({"truth": 2}, 2.0),
        ({"truth": [1, 2.5]}, [1.0, 2.5]),
    ],
)
def test_truth_of_every_task_reaches_the_device(ask, device, body, truth):
    response = ask("POST", "/observe", json={"id": "p-1", **body})
    assert (response.status_code, response.content) == (202, b"")
    assert (device.observed, device.durable) == ([("p-1", truth)], [False])


def test_a_durable_label_is_answered_once_it_is_on_disk(ask, device):
    response = ask("POST", "/observe", json={"id": "p-1", "label": "dog", "durable": True})
    assert (response.status_code, response.content) == (204, b"")
    assert device.durable == [True]


def test_a_truth_may_name_its_source(ask, device):
    for durable in (False, True):
        ask("POST", "/observe", json={"id": "p-1", "label": "dog", "source": "operator", "durable": durable})
    assert device.sources == ["operator", "operator"]


def test_status_is_the_devices_own(ask, device):
    assert msgspec.json.decode(ask("GET", "/status").content, type=Status) == device.status()


def test_health_follows_the_device(ask, device):
    assert msgspec.json.decode(ask("GET", "/healthz").content, type=Health) == Health(ready=True)
    device.ready = False
    for method, path in (("GET", "/healthz"), *(("POST", path) for path in POSTED)):
        response = ask(method, path)
        assert refused(response) == (503, "NotReadyError")
        assert response.headers["retry-after"] == "1"
    assert ask("GET", "/status").status_code == 200


# ---- learning


@pytest.mark.parametrize(
    ("path", "body", "status", "call"),
    [
        ("/reward", {"id": "p-1", "value": 0.25}, 202, ("reward", "p-1", 0.25, "")),
        ("/reward", {"id": "p-1", "value": 1, "source": "clicks"}, 202, ("reward", "p-1", 1.0, "clicks")),
        ("/labels", {"label": "8", "accept": True}, 204, ("accept_label", "8")),
        ("/labels", {"label": "8", "accept": False}, 204, ("refuse_label", "8")),
        ("/learn-now", {}, 202, ("learn_now",)),
        ("/forget", {"all": True}, 204, ("forget_all",)),
    ],
)
def test_what_is_told_reaches_the_device(ask, device, path, body, status, call):
    response = ask("POST", path, json=body)
    assert (response.status_code, response.content) == (status, b"")
    assert device.calls == [call]


def test_what_is_asked_is_answered(ask, device):
    asked = ask("POST", "/label-requests", json={"count": 3})
    assert asked.json() == {
        "requests": [{"id": "p-7", "predicted": "cat", "uncertainty": 0.75, "expires": 1_767_312_000.0}]
    }
    assert ask("POST", "/forget", json={"ids": ["p-1", "p-2"]}).json() == {"rows": 2}
    assert ask("GET", "/lineage?limit=500").json() == {
        "lineage": [
            {"time": 5.0, "release": 3, "parent": 1, "head": 2, "outcome": "promoted",
             "detail": {"seed": 7, "config": {"learner": "hybrid"}}}
        ]
    }  # fmt: skip
    ask("GET", "/lineage")
    assert device.calls == [("label_requests", 3), ("forget", ["p-1", "p-2"]), ("lineage", 500), ("lineage", 100)]


def test_skew_is_told_in_numbers_and_in_words(ask):
    told = ask("GET", "/skew").json()
    assert [(row["name"], row["score"], row["rows"]) for row in told["scores"]] == [
        ("training", 1.0, 100),
        ("judge", 0.6, 100),
    ]
    assert all(row["low"] < row["score"] < row["high"] or row["score"] == 1 for row in told["scores"])
    assert [line.partition(":")[0] for line in told["findings"]] == ["overfits"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/reward", {"id": "p-1"}),
        ("/reward", {"id": "p-1", "value": 1.5}),
        ("/reward", {"id": "p-1", "value": -0.1}),
        ("/reward", {"id": "", "value": 1}),
        ("/label-requests", {"count": 0}),
        ("/label-requests", {}),
        ("/labels", {"label": "8"}),
        ("/labels", {"label": "", "accept": True}),
        ("/learn-now", {"now": True}),
        ("/learn-now", []),
        ("/forget", {}),
        ("/forget", {"ids": []}),
        ("/forget", {"ids": ["a"], "all": True}),
        ("/forget", {"ids": "a"}),
        ("/forget", {"all": False}),
    ],
)
def test_a_malformed_request_is_refused_before_the_device(ask, device, path, body):
    assert refused(ask("POST", path, json=body)) == (400, "MalformedError")
    assert device.calls == []


@pytest.mark.parametrize("limit", ["0", "501", "x", "1.5", "-1", "9" * 5_000, "\u00b2", ""])
def test_a_limit_that_is_none_is_refused(ask, device, limit):
    assert refused(ask("GET", "/lineage", params={"limit": limit})) == (400, "MalformedError")
    assert device.calls == []


@pytest.mark.torch
def test_a_device_learns_asks_and_forgets_over_http(make_device, digits):
    """The whole way, on a real device: feedback in, a head learned, its making told, and all of it erased."""
    device = make_device()
    device.learn(digits.life.x[:300], [str(label) for label in digits.life.y[:300]])
    x = digits.life.x[300:316].tolist()

    async def run():
        async with client_of(http.create_app(device)) as client:
            post, get = client.post, client.get
            rows = {"rows": x, "slice": "north"}
            first, second, third, *_ = (await post("/predict", json=rows)).json()["predictions"]
            await post("/observe", json={"id": first["id"], "label": "3", "source": "operator", "durable": True})
            assert (await post("/reward", json={"id": second["id"], "value": 0.0})).status_code == 202
            assert (await post("/learn-now", json={})).status_code == 202
            await asyncio.to_thread(device.step)
            asked = (await post("/label-requests", json={"count": 2})).json()["requests"]
            assert len({request["id"] for request in asked} - {first["id"], second["id"]}) == 2
            (made,) = (await get("/lineage")).json()["lineage"]
            assert (made["outcome"], made["head"]) == ("promoted", 1)
            assert made["detail"]["config"]["learner"] == "hybrid"
            assert (await get("/skew")).json()["scores"][0]["name"] == "training"
            assert refused(await post("/labels", json={"label": "3", "accept": True})) == (422, "LabelError")
            assert (await post("/forget", json={"ids": [third["id"], "unknown"]})).json() == {"rows": 1}
            assert (await post("/forget", json={"all": True})).status_code == 204
            assert (await get("/status")).json()["head"] == 0

    asyncio.run(run())
    assert device.status().replay_rows == device.status().fresh_rows == 0


# ---- errors


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ShapeError("expected shape (2,), got (3,)"), 422),
        (DtypeError("expected numbers"), 422),
        (NonFiniteError("nan at (0,)"), 422),
        (RangeError("is the unit right?"), 422),
        (DuplicateIdError("waits for its label"), 409),
        (UnknownLabelError("unknown label"), 422),
        (LabelError("not a label"), 422),
        (ModelError("put out NaN"), 500),
        (StoreError("not on disk yet"), 503),
        (DiskFullError("no room"), 503),
    ],
)
def test_an_error_of_the_device_keeps_its_type_and_message(ask, device, error, status):
    device.error = error
    for path, body in (
        ("/predict", {"x": [1]}),
        ("/predict", {"rows": [[1]]}),
        ("/observe", {"id": "p-1", "label": "dog"}),
        ("/observe", {"id": "p-1", "label": "dog", "durable": True}),
        ("/reward", {"id": "p-1", "value": 1}),
        ("/label-requests", {"count": 1}),
        ("/labels", {"label": "8", "accept": True}),
        ("/learn-now", {}),
        ("/forget", {"ids": ["a"]}),
        ("/forget", {"all": True}),
    ):
        response = ask("POST", path, json=body)
        assert refused(response) == (status, type(error).__name__)
        assert response.json()["error"]["message"] == str(error)


def test_a_bug_is_told_without_its_details(predict, device):
    device.error = KeyError("secret")
    response = predict({"x": [1]})
    assert refused(response) == (500, "InternalError")
    assert "secret" not in response.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"{}",
        b'{"x": [NaN]}',
        b'{"x": [1e999]}',
        b'{"x": "text"}',
        b'{"x": [1], "id": 7}',
        b'{"x": [1], "id": ""}',
        b'{"x": [1], "id": "%s"}' % (b"i" * 129),
        b'{"x": [1], "idd": "a"}',
        b'{"x": [1], "slice": "%s"}' % (b"s" * 65),
        b'{"x": [1], "rows": [[1]]}',
        b'{"rows": [[1]], "id": "a"}',
        b'{"rows": [[1]], "state": {}}',
        b'{"x": ["\xff"]}',
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_a_malformed_prediction_is_refused_before_the_device(ask, device, body):
    response = ask("POST", "/predict", content=body, headers={"content-type": "application/json"})
    assert refused(response) == (400, "MalformedError")
    assert device.asked == []


@pytest.mark.parametrize(
    "body",
    [
        {"id": "a"},
        {"label": "dog"},
        {"id": "a", "label": ""},
        {"id": "a", "label": "l" * 257},
        {"id": "a", "label": 3},
        {"id": "a", "label": "dog", "truth": "dog"},
        {"id": "a", "truth": None},
        {"id": "a", "truth": {"x": 1}},
        {"id": "a", "label": "dog", "durable": 1},
        {"id": "a", "label": "dog", "source": "s" * 65},
    ],
)
def test_a_malformed_label_is_refused_before_the_device(ask, device, body):
    assert refused(ask("POST", "/observe", json=body)) == (400, "MalformedError")
    assert device.observed == []


def test_other_paths_methods_and_content_types_are_refused(ask):
    assert refused(ask("GET", "/nothing")) == (404, "NotFoundError")
    response = ask("GET", "/predict")
    assert refused(response) == (405, "MethodNotAllowedError")
    assert response.headers["allow"] == "POST"
    for path in POSTED:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            assert refused(ask("POST", path, content=b"{}", headers={"content-type": kind})) == (
                415,
                "ContentTypeError",
            )


def test_pages_of_other_sites_are_refused_on_loopback_alone(ask, predict, device):
    assert refused(predict({"x": [1]}, base="http://rebound.example:8000")) == (400, "MalformedError")
    assert refused(predict({"x": [1]}, headers={"origin": "http://evil.example"})) == (403, "ForeignSiteError")
    assert refused(predict({"x": [1]}, headers={"origin": "null"})) == (403, "ForeignSiteError")
    assert device.asked == []
    for base in ("http://127.0.0.1:8000", "http://localhost", "http://[::1]:8000"):
        assert predict({"x": [1]}, base=base).status_code == 200
    assert predict({"x": [1]}, headers={"origin": "http://127.0.0.1:8000"}).status_code == 200

    async def on_a_unix_socket():
        async with client_of(http.create_app(device, hosts=None), "http://device") as client:
            return await client.get("/healthz")

    assert asyncio.run(on_a_unix_socket()).status_code == 200


# ---- bounds


async def chunks(*parts):
    for part in parts:
        yield part


def test_a_body_that_is_too_large_is_refused_with_and_without_its_length(ask, device):
    limits = http.Limits(max_body_bytes=20)
    headers = {"content-type": "application/json"}
    fits, large = b'{"x": [1, 2, 3, 44]}', b'{"x": [1, 2, 3, 444]}'
    assert ask("POST", "/predict", limits=limits, content=fits, headers=headers).status_code == 200
    for content in (large, chunks(large[:10], large[10:])):
        response = ask("POST", "/predict", limits=limits, content=content, headers=headers)
        assert refused(response) == (413, "TooLargeError")
    assert len(device.asked) == 1


def test_a_body_without_end_is_refused_while_it_is_read(device):
    """It is answered at once, and the connection is not kept for what may still come."""
    sent = asyncio.run(drive(device, http.Limits(max_body_bytes=100), [b"x" * 60, b"x" * 60, b"x" * 60]))
    assert sent[0]["status"] == 413
    assert (b"connection", b"close") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"]["type"] == "TooLargeError"
    assert [message["more_body"] for message in sent[1:]] == [True, False]


def test_a_body_that_does_not_come_is_given_up(device):
    sent = asyncio.run(drive(device, http.Limits(body_timeout_s=0.01), [b'{"x": '], stays=True))
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["type"] == "SlowBodyError"


def test_a_client_that_hangs_up_in_its_body_is_no_error(device, caplog):
    sent = asyncio.run(drive(device, http.Limits(), [b'{"x": ']))
    assert sent[0]["status"] == 499
    assert caplog.records == []


async def drive(device, limits, parts, *, stays=False):
    """What the app sends to a client whose body has these parts and no end; then it hangs up, or stays in silence."""
    sent = []
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]

    async def receive():
        if messages:
            return messages.pop(0)
        if stays and not sent:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await http.create_app(device, limits)(scope("/predict"), receive, send)
    return sent


def scope(path):
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers,
    }  # fmt: skip


def test_a_batch_of_too_many_rows_is_refused(ask, device):
    limits = http.Limits(max_rows=2)
    assert refused(ask("POST", "/predict", limits=limits, json={"rows": [[1]] * 3})) == (413, "TooLargeError")
    binary = {"content": bytes(12), "headers": {"content-type": "application/octet-stream"}}
    assert refused(ask("POST", "/predict?shape=3&batch=true", limits=limits, **binary)) == (413, "TooLargeError")
    assert device.asked == []


def test_beyond_the_queue_requests_are_refused_at_once(gate):
    device = FakeDevice(gate=gate)

    async def flood():
        async with client_of(http.create_app(device, http.Limits(workers=2, queue=3))) as client:
            tasks = [asyncio.create_task(client.post("/predict", json={"x": [i]})) for i in range(12)]
            answers = []
            for first in asyncio.as_completed(tasks):
                answers.append(await first)
                if len(answers) == 7:  # all that there is no room for, while nothing has been predicted
                    assert [refused(answer) for answer in answers] == [(429, "BusyError")] * 7
                    assert {answer.headers["retry-after"] for answer in answers} == {"1"}
                    assert (await client.get("/healthz")).status_code == 200
                    assert (await client.get("/status")).status_code == 200
                    gate.set()
            assert [answer.status_code for answer in answers[7:]] == [200] * 5
            return await client.post("/predict", json={"x": [0]})

    assert asyncio.run(flood()).status_code == 200
    assert len(device.asked) == 6


def test_labels_and_predictions_do_not_wait_for_each_other(gate):
    """A durable label waits for the disk; a plain one and a prediction pass it."""
    device = FakeDevice()
    waits = device.observe

    def observe(name, truth, /, *, source, durable=False):
        if durable:
            assert gate.wait(DEADLINE_S)
        waits(name, truth, source=source, durable=durable)

    device.observe = observe

    async def run():
        async with client_of(http.create_app(device)) as client:
            durable = asyncio.create_task(client.post("/observe", json={"id": "slow", "label": "cat", "durable": True}))
            assert (await client.post("/observe", json={"id": "fast", "label": "cat"})).status_code == 202
            assert (await client.post("/predict", json={"x": [1]})).status_code == 200
            assert not durable.done()
            gate.set()
            assert (await durable).status_code == 204

    asyncio.run(run())
    assert [name for name, _ in device.observed] == ["fast", "slow"]


def test_a_client_that_hangs_up_frees_its_place(gate):
    """One predicts, one waits, the next is refused; the one that waits leaves, and the next is taken."""
    device = FakeDevice(gate=gate)

    async def run():
        app = http.create_app(device, http.Limits(workers=1, queue=1))
        waits, hangs_up, told = asyncio.Event(), asyncio.Event(), []

        async def receive(parts=[{"type": "http.request", "body": b'{"x": [2]}'}]):  # noqa: B006 - one client
            if parts:
                return parts.pop()
            waits.set()
            await hangs_up.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            told.append(message)

        async with client_of(app) as client:
            first = asyncio.create_task(client.post("/predict", json={"x": [1]}))
            assert await asyncio.to_thread(device.entered.acquire, timeout=DEADLINE_S)
            second = asyncio.create_task(app(scope("/predict"), receive, send))
            await waits.wait()
            assert (await client.post("/predict", json={"x": [0]})).status_code == 429
            hangs_up.set()
            await second
            assert told[0]["status"] == 499
            third = asyncio.create_task(client.post("/predict", json={"x": [3]}))
            fourth = asyncio.create_task(client.post("/predict", json={"x": [4]}))
            done, _ = await asyncio.wait([third, fourth], return_when=asyncio.FIRST_COMPLETED)
            assert [task.result().status_code for task in done] == [429]
            gate.set()
            return [task.result().status_code for task in (await asyncio.wait([first, third, fourth]))[0]]

    assert sorted(asyncio.run(run())) == [200, 200, 429]
    assert [x for x, _, _ in device.asked] in ([[1], [3]], [[1], [4]])  # what was given up is never predicted


def test_a_client_that_hangs_up_while_it_is_predicted_keeps_the_worker_until_the_end(gate):
    device = FakeDevice(gate=gate, error=ModelError("nobody hears this"))

    async def run():
        app = http.create_app(device, http.Limits(workers=1, queue=0))
        async with client_of(app) as client:
            first = asyncio.create_task(client.post("/predict", json={"x": [1]}))
            assert await asyncio.to_thread(device.entered.acquire, timeout=DEADLINE_S)
            first.cancel()
            await asyncio.wait([first])
            assert (await client.post("/predict", json={"x": [2]})).status_code == 429
            gate.set()
            device.error = None
            while (answer := await client.post("/predict", json={"x": [3]})).status_code == 429:
                await asyncio.to_thread(gate.wait)  # the loop turns, until the worker is back
            return answer.status_code

    assert asyncio.run(run()) == 200


def test_waiting_bodies_hold_no_more_memory_than_set_aside(gate):
    """Four bodies of the largest size wait; a fifth has no room although the queue has."""
    device = FakeDevice(gate=gate)
    body = b'{"x": [%s1]}' % (b" " * 991)
    limits = http.Limits(max_body_bytes=len(body))

    async def run():
        async with client_of(http.create_app(device, limits)) as client:
            send = [
                asyncio.create_task(client.post("/predict", content=body, headers={"content-type": "application/json"}))
                for _ in range(5)
            ]
            done, waiting = await asyncio.wait(send, return_when=asyncio.FIRST_COMPLETED)
            assert [refused(task.result()) for task in done] == [(429, "BusyError")]
            gate.set()
            return [(await task).status_code for task in waiting]

    assert asyncio.run(run()) == [200] * 4


# ---- the document


def test_the_document_describes_every_route_and_error(ask, device):
    told = ask("GET", "/openapi.json").json()
    assert told["openapi"] == "3.1.0"
    assert told == json.loads(msgspec.json.encode(document()))
    routes = {route.path: route.methods - {"HEAD"} for route in http.create_app(device).routes}
    assert {path: {method.upper() for method in item} for path, item in told["paths"].items()} == routes
    refs = set(find_refs(told))
    assert {ref.removeprefix("#/components/schemas/") for ref in refs} == set(told["components"]["schemas"])
    described = {int(code) for item in told["paths"].values() for one in item.values() for code in one["responses"]}
    raised = {kind.status for kind in http.RequestError.__subclasses__()} | {code for _, code in http._STATUS}
    assert raised | {500} == {code for code in described if code >= 400}


def find_refs(value):
    if isinstance(value, dict):
        yield from ([value["$ref"]] if "$ref" in value else [])
        for one in value.values():
            yield from find_refs(one)
    elif isinstance(value, list):
        for one in value:
            yield from find_refs(one)


def test_replies_decode_as_the_structs_of_the_document(predict):
    reply = msgspec.json.decode(predict({"x": [1]}).content, type=PredictReply)
    assert reply == PredictReply.of(prediction())


# ---- sockets


def test_a_unix_socket_is_its_owners_alone_and_goes_away(tmp_path):
    path = tmp_path / "edge.sock"
    with http.listen_unix(path) as listener:
        assert path.stat().st_mode & 0o777 == 0o600
        assert http.address_of(listener) == f"unix:{path}"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path):
    path = tmp_path / "edge.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with http.listen_unix(path):
        with pytest.raises(TransportError, match="another process listens"), http.listen_unix(path):
            pass
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_only_its_own_socket_is_removed(tmp_path):
    path = tmp_path / "edge.sock"
    with http.listen_unix(path):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(path))
    assert path.exists()


def test_what_is_no_socket_stays(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="is not a socket"), http.listen_unix(path):
        pass
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["missing/edge.sock", "x" * 200])
def test_a_place_where_no_socket_can_be_is_a_configuration_error(tmp_path, name):
    with pytest.raises(ConfigError, match="choose another --socket"), http.listen_unix(tmp_path / name):
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "localhost", "example.org"])
def test_only_loopback_is_served(host):
    with pytest.raises(ConfigError, match=r"only 127\.0\.0\.1 and ::1"), http.listen_loopback(host, 0):
        pass


def test_a_port_that_is_taken_is_a_network_error():
    with http.listen_loopback("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert http.address_of(listener) == f"http://127.0.0.1:{port}"
        with pytest.raises(TransportError, match="set --port"), http.listen_loopback("127.0.0.1", port):
            pass


# ---- the command


@pytest.fixture
def home(tmp_path):
    (tmp_path / "device.toml").touch()
    return tmp_path


def edge_serve(home, *arguments):
    result = CliRunner().invoke(main, ["serve", "--home", str(home), *arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("arguments", [(), ("--socket", "edge.sock", "--port", "0")])
def test_the_command_wants_one_place_to_answer(home, arguments):
    code, output = edge_serve(home, *arguments)
    assert code == 2
    assert "either --socket PATH or --port NUMBER" in output


def test_the_command_refuses_other_hosts_before_it_starts_the_device(home):
    code, output = edge_serve(home, "--port", "0", "--host", "0.0.0.0")
    assert code == 2
    assert "only 127.0.0.1 and ::1" in output
    assert not (home / "edge.db").exists()


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_the_command_names_the_extra_that_is_missing(home, monkeypatch, package):
    for name in [name for name in sys.modules if name == "edge_sdk.http" or name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("edge_sdk.http", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    code, output = edge_serve(home, "--port", "0")
    assert code == 1
    assert "edge serve needs more packages: pip install 'edge-sdk[serve]'" in output
