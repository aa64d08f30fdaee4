"""`edge serve` as a process of its own, asked by curl and by Node."""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.errors import TransportError
from edge_sdk.http import listen_unix

pytestmark = pytest.mark.torch
CLI = [sys.executable, "-c", "from edge_sdk.cli import main; main()"]
CLIENT = Path(__file__).parents[2] / "examples" / "clients" / "client.mjs"
DEADLINE_S = 60
SETTINGS = 'device = "pump-1"\nvariant = "int8"\nflush_interval_s = 0.05\n'


class Served:
    """A running `edge serve`."""

    def __init__(self, home, checkpoint, *arguments):
        self.home = home
        home.mkdir(exist_ok=True)
        (home / "device.toml").write_text(SETTINGS)
        command = [*CLI, "serve", "--home", home, "--checkpoint", checkpoint, *arguments]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if found := re.fullmatch(r"pump-1 answers on (\S+)\n", line):
                self.address = found[1]
                return
        pytest.fail("".join(lines))

    @property
    def path(self):
        return self.address.removeprefix("unix:")

    def curl(self, path, *arguments, stdin=None):
        """(status, body) as curl tells them."""
        where = ["--unix-socket", self.path, f"http://localhost{path}"]
        if self.address.startswith("http"):
            where = [self.address + path]
        done = subprocess.run(
            ["curl", "-sS", "--max-time", "30", "--write-out", "\n%{http_code}", *arguments, *where],
            input=stdin, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        body, _, status = done.stdout.rpartition(b"\n")
        return int(status), json.loads(body) if body else None

    def post(self, path, body):
        return self.curl(path, "--json", json.dumps(body))

    def stop(self):
        """What it wrote while it ended well."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self):
        _, errors = self.process.communicate(timeout=DEADLINE_S)
        assert self.process.returncode == 0, errors
        assert "Traceback" not in errors
        return errors

    def counters(self):
        """Of the stopped device."""
        done = subprocess.run(
            [*CLI, "status", "--home", str(self.home), "--json"], capture_output=True, check=True, text=True
        )
        return json.loads(done.stdout)["counters"]


@pytest.fixture
def serve(tmp_path, checkpoint):
    """Runs servers: `serve("--port", 0)`; without arguments on a Unix socket."""
    running = []

    def run(*arguments):
        served = Served(tmp_path / "home", checkpoint, *(arguments or ("--socket", tmp_path / "edge.sock")))
        running.append(served.process)
        return served

    yield run
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(params=["unix", "tcp"])
def served(request, serve):
    return serve() if request.param == "unix" else serve("--port", 0)


@pytest.fixture
def sample(digits):
    return digits.life.x[0].tolist()


def node(script, *arguments):
    """What a script that imports the client prints, as JSON."""
    script = f"import {{ EdgeClient }} from {json.dumps(CLIENT.as_uri())};\n{script}"
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", script, "--", *map(str, arguments)],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- curl


@pytest.mark.curl
def test_curl_predicts_observes_and_asks(served, sample, digits):
    status, one = served.post("/predict", {"x": sample, "id": "mine"})
    assert (status, one["id"], one["release"], one["head"]) == (200, "mine", 1, 0)
    assert one["probabilities"].keys() == set("01234567")
    assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert one["label"] == max(one["probabilities"], key=one["probabilities"].get)
    assert one["latency_ms"] > 0

    raw = digits.life.x[:3].tobytes()
    binary = ("--header", "content-type: application/octet-stream", "--data-binary", "@-")
    status, batch = served.curl("/predict?shape=3,1,8,8&batch=true", *binary, stdin=raw)
    assert status == 200
    assert batch["predictions"][0]["probabilities"] == one["probabilities"]
    assert served.post("/predict", {"rows": digits.life.x[:3].tolist()})[0] == 200

    assert served.post("/observe", {"id": "mine", "label": "3", "durable": True}) == (204, None)
    assert served.post("/observe", {"id": batch["predictions"][1]["id"], "truth": "3"}) == (202, None)
    status, told = served.curl("/status")
    assert (status, told["device"], told["ready"], told["variant"]) == (200, "pump-1", True, "int8")
    assert told["counters"]["labelled"] >= 1
    assert served.curl("/healthz") == (200, {"ready": True})
    assert served.curl("/openapi.json")[1]["paths"].keys() >= {"/predict", "/observe", "/status"}
    served.stop()
    assert (served.counters()["predictions"], served.counters()["labelled"]) == (7, 2)


@pytest.mark.curl
def test_curl_is_told_what_is_wrong(served, sample):
    def refused(answer):
        status, body = answer
        return status, body["error"]["type"]

    assert refused(served.post("/predict", {"x": [1, 2]})) == (422, "ShapeError")
    assert refused(served.post("/predict", {"x": [[["a"] * 8] * 8]})) == (422, "DtypeError")
    assert refused(served.post("/predict", {"x": [[[5.0] * 8] * 8]})) == (422, "RangeError")
    assert refused(served.curl("/predict", "--json", '{"x": ')) == (400, "MalformedError")
    assert refused(served.curl("/predict", "--data", "{}")) == (415, "ContentTypeError")
    assert refused(served.curl("/predict")) == (405, "MethodNotAllowedError")
    assert refused(served.curl("/other")) == (404, "NotFoundError")
    assert served.post("/predict", {"x": sample, "id": "mine"})[0] == 200
    assert refused(served.post("/predict", {"x": sample, "id": "mine"})) == (409, "DuplicateIdError")
    large = b"[" + b" " * 20_000_000
    for header in ("expect:", "transfer-encoding: chunked"):
        answer = served.curl("/predict", "--header", header, "--json", "@-", stdin=large)
        assert refused(answer) == (413, "TooLargeError")
    assert served.post("/predict", {"x": sample})[0] == 200
    served.stop()


# ---- Node


@pytest.mark.node
def test_node_predicts_observes_and_asks(served, sample, tmp_path):
    (tmp_path / "sample.json").write_text(json.dumps(sample))
    done = subprocess.run(
        ["node", CLIENT, served.address, tmp_path / "sample.json", "3"],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["prediction"]["probabilities"].keys() == set("01234567")
    assert (told["counters"]["predictions"], told["counters"]["labelled"]) == (1, 1)


@pytest.mark.node
def test_node_gets_the_same_numbers_from_json_bytes_and_rows(served, sample):
    script = """
        const edge = new EdgeClient(process.argv[1]);
        const sample = JSON.parse(process.argv[2]);
        const json = await edge.predict(sample, { id: "mine" });
        const bytes = await edge.predictBytes(Float32Array.from(sample.flat(3)), [1, 8, 8]);
        const [row] = await edge.predictBatch([sample]);
        const errors = [];
        for (const x of [[1, 2], sample]) {
            try { await edge.predict(x, { id: "mine" }); } catch ({ status, type }) { errors.push([status, type]); }
        }
        console.log(JSON.stringify({ found: [json, bytes, row], errors }));
        edge.close();
    """
    told = node(script, served.address, json.dumps(sample))
    first, *others = (one["probabilities"] for one in told["found"])
    assert others == [first, first]
    assert told["errors"] == [[422, "ShapeError"], [409, "DuplicateIdError"]]


@pytest.mark.node
def test_node_hears_why_a_large_body_was_refused(served):
    script = """
        const edge = new EdgeClient(process.argv[1]);
        try { await edge.predictBytes(new Float32Array(10_000_000), [10_000_000]); }
        catch ({ status, type }) { console.log(JSON.stringify([status, type])); }
        edge.close();
    """
    assert node(script, served.address) == [413, "TooLargeError"]


@pytest.mark.node
def test_node_gets_through_a_flood_by_trying_again(serve, tmp_path, sample):
    served = serve("--socket", tmp_path / "edge.sock", "--queue", 0)
    script = """
        const edge = new EdgeClient(process.argv[1], { retries: 50 });
        const x = JSON.parse(process.argv[2]);
        const found = await Promise.all(Array.from({ length: 8 }, () => edge.predict(x)));
        console.log(JSON.stringify(found.map(({ id }) => id)));
        edge.close();
    """
    assert len(set(node(script, served.address, json.dumps(sample)))) == 8


# ---- ending


def begin(path, body, target="/predict"):
    """A connection whose request has begun, and has half its body still to send: (socket, the other half)."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(DEADLINE_S)
    client.connect(path)
    data = json.dumps(body).encode()
    head = f"POST {target} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
    client.sendall(head.encode() + b"expect: 100-continue\r\n\r\n")
    assert client.recv(100).startswith(b"HTTP/1.1 100")  # the request is being read now
    client.sendall(data[:8])
    return client, data[8:]


def finish(client, rest):
    """(status, body) of the answer."""
    with client:
        client.sendall(rest)
        answer = b"".join(iter(lambda: client.recv(65_536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_requests_in_flight_are_answered_and_flushed_before_it_ends(serve, sample):
    served = serve()
    predicted = begin(served.path, {"x": sample})
    with_id = begin(served.path, {"x": sample, "id": "mine"})
    observed = begin(served.path, {"id": "mine", "label": "3", "durable": True}, "/observe")
    served.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + DEADLINE_S
    while not refuses(served.path):
        assert time.monotonic() < deadline
        assert served.process.poll() is None
    assert finish(*predicted)[0] == 200
    assert json.loads(finish(*with_id)[1])["id"] == "mine"
    assert finish(*observed) == (204, b"")
    assert "pump-1 stopped" in served.ended()
    assert not os.path.lexists(served.path)
    assert (served.counters()["predictions"], served.counters()["labelled"]) == (2, 1)


def refuses(path):
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(DEADLINE_S)
        return probe.connect_ex(path) != 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_with_an_idle_client_connected(serve, number):
    served = serve()
    with socket.socket(socket.AF_UNIX) as idle:
        idle.connect(served.path)
        served.process.send_signal(number)
        assert "pump-1 stopped" in served.ended()


@pytest.mark.curl
def test_labels_acknowledged_as_durable_survive_a_kill(serve, digits):
    served = serve()
    for i in range(5):
        x, label = digits.life.x[i].tolist(), str(digits.life.y[i])
        name = served.post("/predict", {"x": x})[1]["id"]
        assert served.post("/observe", {"id": name, "label": label, "durable": True}) == (204, None)
    served.process.kill()
    served.process.wait()
    with sqlite3.connect(served.home / "edge.db") as conn:
        kept = [label for (label,) in conn.execute("SELECT label FROM samples ORDER BY time")]
    conn.close()
    assert sorted(kept) == sorted(str(label) for label in digits.life.y[:5])

    again = serve()  # takes the place of the socket that was left behind
    assert again.curl("/status")[1]["counters"]["labelled"] == 5
    assert again.curl("/healthz") == (200, {"ready": True})
    again.stop()


def test_a_second_server_is_refused_while_the_first_lives(serve, tmp_path):
    served = serve()
    with pytest.raises(TransportError, match="another process listens"), listen_unix(Path(served.path)):
        pass
    command = [*CLI, "serve", "--home", str(served.home), "--port", "0"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (second.returncode, "is in use by another process" in second.stderr) == (1, True)
    assert not refuses(served.path)
    served.stop()


@pytest.mark.curl
def test_until_the_broker_brings_a_release_it_says_so(serve, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "device.toml").write_text(SETTINGS + '[broker]\nhost = "127.0.0.1"\nport = 1\n')
    path = tmp_path / "edge.sock"
    command = [*CLI, "serve", "--home", str(tmp_path / "home"), "--socket", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert any("answers on" in line for line in process.stderr)
        done = subprocess.run(
            ["curl", "--silent", "--unix-socket", path, "http://x/healthz"], capture_output=True, check=True
        )
        assert json.loads(done.stdout)["error"]["type"] == "NotReadyError"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_predictions_are_the_devices_own(serve, make_device, digits):
    """The same numbers as in Python, float32 for float32."""
    served = serve()
    client, rest = begin(served.path, {"x": digits.life.x[0].tolist()})
    told = json.loads(finish_kept(client, rest))
    expected = make_device().predict(digits.life.x[0])
    assert told["label"] == expected.label
    np.testing.assert_array_equal(
        np.array([told["probabilities"][label] for label in expected.labels], np.float32), expected.probabilities
    )


def finish_kept(client, rest):
    """The body of an answer on a connection that is kept."""
    with client:
        client.sendall(rest)
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += client.recv(65_536)
        head, _, body = answer.partition(b"\r\n\r\n")
        size = int(re.search(rb"content-length: (\d+)", head)[1])
        while len(body) < size:
            body += client.recv(65_536)
    return body
