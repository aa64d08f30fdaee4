"""What it costs to bring a release to a fleet: our block transfer beside a plain fan-out of the same bytes.

In the same run and through the same mosquitto on loopback, once the plain way, once ours:

- plain: a publisher sends the file in chunks of 64 kB, at most 20 unacknowledged, and every subscriber writes them to
  a file of its own. Nobody checks, asks or resumes anything.
- ours: a coordinator with a pushed release, and as many `UpdateClient`s, each with a connection of its own (a `Swarm`),
  which ask for blocks, write them, check them and hand over the release.

Then what it costs one device to check what it receives, beside SHA-256 and writing of the same bytes. Run from the
root, with nothing else busy:

    make bench-releases

Writes releases.json and releases.md beside this file. What was expected before measuring stands in EXPECTED.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from transport import cpu_name

from edge_sdk import MqttTransport, __version__
from edge_sdk.clock import SystemClock
from edge_sdk.config import UpdateConfig
from edge_sdk.download import Download
from edge_sdk.files import replace_file, without_flushing
from edge_sdk.index import hash_blocks
from edge_sdk.manifest import (
    MANIFEST_NAME,
    REQUIRED,
    FileEntry,
    HeadSpec,
    LatentSpec,
    Manifest,
    digest_of,
    manifest_bytes,
)
from edge_sdk.messages import BLOCK_BYTES, Desired, Topics, block_count, decode
from edge_sdk.schema import InputSpec
from edge_sdk.swarm import Swarm, SwarmTransport
from edge_sdk.trust import Trust
from edge_sdk.update import UpdateClient
from edge_server.broker import EmbeddedBroker
from edge_server.coordinator import Coordinator
from edge_server.settings import Settings

RESULT = Path(__file__).with_suffix(".json")
EXPECTED = {
    "plain": "5 s: 2 GB through one broker and one process that reads them, at 400 MB/s",
    "ours": "1.6 times that before the transfer is made for fleets: every device asks for its own windows, and what two"
    " ask for a moment apart goes out twice; 1.2 times afterwards, for requests, hashes and writing",
    "mosquitto's memory": "30 MB: it holds a block once for all, and at most as many as are on their way",
    "checking": "1.5 times SHA-256 plus write as long as every byte is hashed twice, once in its block and once in its"
    " file; 1.05 if once is enough",
}
MOST_RATIO, MOST_RSS_MB, MOST_VERIFY = 1.3, 50.0, 1.3
PLAIN = "bench/plain"
"""Where the plain way publishes."""
_WINDOW = 20


# ---- the broker, watched


class Broker:
    """A mosquitto with the settings of docs/brokers.md that touch a transfer, and how much memory it has had."""

    def __init__(self, port: int, process: psutil.Popen) -> None:
        self.host, self.port, self._process = "127.0.0.1", port, process
        self.most_mb = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.most_mb = max(self.most_mb, self._process.memory_info().rss / 1e6)

    def core_s(self) -> float:
        """Processor time so far."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        self._process.terminate()
        self._process.wait()


@contextmanager
def mosquitto() -> Iterator[Broker]:
    """A fresh one, which has held nothing yet."""
    with tempfile.TemporaryDirectory() as folder:
        spare = EmbeddedBroker()  # knows a free port
        config = Path(folder) / "mosquitto.conf"
        config.write_text(
            f"listener {spare.port} {spare.host}\nallow_anonymous true\nlog_dest none\n"
            "max_queued_messages 20000\nmax_inflight_messages 100\nmessage_size_limit 131072\n"
        )
        process = psutil.Popen(["mosquitto", "-c", config], stderr=subprocess.DEVNULL)
        try:
            probe = MqttTransport(spare.host, spare.port, client_id="probe")
            probe.connect()
            while not probe.connected:
                probe.wait(0.1)
            probe.close()
        except BaseException:
            process.kill()
            raise
        broker = Broker(spare.port, process)
        try:
            yield broker
        finally:
            broker.stop()


# ---- what is sent


def make_release(folder: Path, size: int) -> Manifest:
    """A checkpoint of which one file has `size` random bytes, as a quantized network nearly is."""
    rng = np.random.default_rng(7)
    folder.mkdir()
    files = {}
    for number, name in enumerate(REQUIRED):
        data = rng.bytes(size if number == 0 else 100 + number)
        (folder / name).write_bytes(data)
        files[name] = FileEntry(len(data), digest_of(data))
    manifest = Manifest(
        name="bench", release=1, created="2026-01-01T00:00:00Z", labels=["0", "1"], input=InputSpec(shape=[1]),
        latent=LatentSpec(2, 1.0, 0), head=HeadSpec(), files=files,
    )  # fmt: skip
    (folder / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
    return manifest


# ---- the processes


def connect(swarm: Swarm, count: int, topic: str) -> list[SwarmTransport]:
    """So many connections that have subscribed."""
    members = [swarm.transport(f"device-{number}") for number in range(count)]
    for member in members:
        member.subscribe(topic)
        member.connect()
    if not swarm.until(lambda: swarm.connected == count, 60):
        raise SystemExit(f"{swarm.connected} of {count} connected: {swarm.last_error}")
    return members


def subscribe(args: argparse.Namespace) -> None:
    """The receivers of the plain way."""
    swarm = Swarm(args.host, args.port)
    members = connect(swarm, args.devices, f"{PLAIN}/+")
    files = [(args.folder / member.client_id).open("wb") for member in members]
    left = [args.size] * len(members)
    say("ready")
    waiting = set(range(len(members)))
    while waiting:
        swarm.turn(1.0)
        for number in list(waiting):
            for message in members[number].receive():
                index = int(message.topic.rpartition("/")[2])
                os.pwrite(files[number].fileno(), message.payload, index * BLOCK_BYTES)
                left[number] -= len(message.payload)
            if not left[number]:
                files[number].close()
                waiting.discard(number)
    say("done", core_s=time.process_time())
    swarm.close()


def publish(args: argparse.Namespace) -> None:
    """The sender of the plain way."""
    data = args.file.read_bytes()
    swarm = Swarm(args.host, args.port)
    member = swarm.transport("publisher")
    member.connect()
    swarm.until(lambda: member.connected, 30)
    say("ready")
    sys.stdin.readline()
    for index in range(block_count(len(data), BLOCK_BYTES)):
        swarm.until(lambda: member.unacknowledged < _WINDOW, 30)
        member.publish(f"{PLAIN}/{index}", data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES])
    swarm.until(lambda: not member.unacknowledged, 30)
    sys.stdin.readline()
    count, large = block_count(len(data), BLOCK_BYTES), len(data) // BLOCK_BYTES
    say("done", core_s=time.process_time(), blocks=count, large_blocks=large)
    swarm.close()


def receive(args: argparse.Namespace) -> None:
    """The receivers of our way: whatever an `UpdateClient` does, for each of them."""
    swarm, topics, clock = Swarm(args.host, args.port), Topics(), SystemClock()
    members = connect(swarm, args.devices, topics.desired("default"))
    config = UpdateConfig(min_free_bytes=0)
    trust = Trust(args.folder / "trust", (args.folder / "root.json").read_bytes())
    members[0].subscribe(topics.metadata("+"))
    clients = [
        UpdateClient(
            args.folder / member.client_id,
            device=member.client_id,
            topics=topics,
            transport=member,
            config=config,
            trust=trust,
        )
        for member in members
    ]
    say("ready")
    waiting, all_at, began = dict(enumerate(clients)), 0.0, time.monotonic()
    while waiting:
        if time.monotonic() - began > args.patience:
            raise SystemExit(f"{len(waiting)} of {args.devices} still wait")
        swarm.turn(0.05)
        now, due = clock.now(), time.monotonic() - all_at > 0.25
        all_at = time.monotonic() if due else all_at
        for number, client in list(waiting.items()):
            messages = members[number].receive()
            for message in messages:
                if (block := topics.parse_block(message.topic)) is not None:
                    client.take_block(*block, message.payload)
                elif (name := topics.parse_metadata(message.topic)) is not None:
                    trust.take(name, message.payload)
                else:
                    client.follow(decode(message.payload, Desired))
            if not (messages or due) or (offer := client.offered(None, {})) is None or not client.authorise(offer, now):
                continue
            client.begin(offer)
            if client.turn(now, {}) is not None:
                del waiting[number]
    say("done", core_s=time.process_time())
    swarm.close()


class _Counting(MqttTransport):
    """Counts the blocks that go out, and those of full size."""

    blocks = large_blocks = 0

    def publish(self, topic: str, payload: bytes, **options: Any) -> None:
        self.blocks += Topics().parse_block(topic) is not None
        self.large_blocks += len(payload) == BLOCK_BYTES
        super().publish(topic, payload, **options)


def coordinate(args: argparse.Namespace) -> None:
    """The sender of our way."""
    transport = _Counting(args.host, args.port, client_id="coordinator")
    coordinator = Coordinator(args.folder / "coordinator", transport=transport, settings=Settings(accept_unknown=True))
    repository = coordinator.registry.repository
    repository.init(args.folder / "root-keys", count=2, threshold=2, passphrase=None)
    replace_file(args.folder / "root.json", repository.root())
    coordinator.start()
    while not transport.connected:
        transport.wait(0.1)
    coordinator.registry.push(args.file)  # signed, and not yet told
    say("ready")
    sys.stdin.readline()
    told = threading.Event()

    def wait_for_line() -> None:
        sys.stdin.readline()
        told.set()

    threading.Thread(target=wait_for_line, daemon=True).start()
    while not told.is_set():
        if not coordinator.step():
            transport.wait(0.02)
    say("done", core_s=time.process_time(), blocks=transport.blocks, large_blocks=transport.large_blocks)
    coordinator.close()


def say(what: str, **values: float) -> None:
    """A line to the parent."""
    print(json.dumps({"what": what, **values}), flush=True)


# ---- the runs


def fan_out(way: str, devices: int, size: int, patience: float) -> dict[str, Any]:
    """Seconds until the last receiver has it all, from the sender's word to begin."""
    load = os.getloadavg()[0]
    senders, receivers = {"plain": ("publish", "subscribe"), "ours": ("coordinate", "receive")}[way]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        broker = stack.enter_context(mosquitto())
        manifest = make_release(folder / "release", size)
        largest = max(manifest.files, key=lambda name: manifest.files[name].size)
        source = folder / "release" / largest if way == "plain" else folder / "release"
        base = [sys.executable, __file__, "--host", broker.host, "--port", str(broker.port), "--folder", folder]
        base += [
            "--devices",
            str(devices),
            "--size",
            str(size),
            "--patience",
            str(patience),
            "--file",
            source,
            "--role",
        ]
        child: Callable[[str], subprocess.Popen[str]] = lambda role: stack.enter_context(  # noqa: E731
            subprocess.Popen([*base, role], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        heard(sender := child(senders), "ready")
        heard(receiver := child(receivers), "ready")
        before = broker.core_s()
        begun = time.monotonic()
        print(file=sender.stdin, flush=True)
        received = heard(receiver, "done")
        seconds = time.monotonic() - begun
        broker_s = broker.core_s() - before
        print(file=sender.stdin, flush=True)
        sent = heard(sender, "done")
        return {
            "way": way,
            "seconds": seconds,
            "load_before": load,
            "blocks": sent["blocks"],
            "large_blocks": sent["large_blocks"],
            "broker_mb": broker.most_mb,
            "broker_core_s": broker_s,
            "receivers_core_s": received["core_s"],
            "sender_core_s": sent["core_s"],
        }


def heard(process: subprocess.Popen[str], what: str) -> dict[str, Any]:
    """What a child says next."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line or (found := json.loads(line))["what"] != what:
        raise SystemExit(f"a child ended early, or said {line!r} instead of {what!r}")
    return dict(found)


def verify(size: int, rounds: int) -> dict[str, Any]:
    """Seconds to write and check a file, block by block as it comes, beside one write and one SHA-256 of it."""
    data = np.random.default_rng(7).bytes(size)
    blocks = [data[at : at + BLOCK_BYTES] for at in range(0, size, BLOCK_BYTES)]
    digest, signed = digest_of(data), hash_blocks(data, BLOCK_BYTES)
    hashes = [signed[at : at + 32] for at in range(0, len(signed), 32)]
    window = UpdateConfig().window_blocks

    def plain(folder: Path) -> None:
        with (folder / "plain").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        assert hashlib.sha256(data).hexdigest() == digest

    def ours(signed_blocks: list[bytes]) -> Callable[[Path], None]:
        def run(folder: Path) -> None:
            download = Download(folder, digest, size, BLOCK_BYTES, signed_blocks)
            for index, block in enumerate(blocks):
                assert download.write(index, block)
                if (index + 1) % window == 0:
                    download.flush()
            download.flush()
            download.finish()
            assert download.path.exists()

        return run

    ways = {"plain": plain, "signed": ours(hashes), "unsigned": ours([])}
    found: dict[str, dict[str, list[float]]] = {"flushed": {}, "not flushed": {}}
    for _ in range(rounds):
        for disk, times in found.items():
            with ExitStack() as stack:
                if disk == "not flushed":
                    stack.enter_context(without_flushing())
                    stack.enter_context(without_fsync())
                for name, way in ways.items():
                    with tempfile.TemporaryDirectory() as folder:
                        begun = time.perf_counter()
                        way(Path(folder))
                        times.setdefault(name, []).append(time.perf_counter() - begun)
    return {disk: {name: statistics.median(times) for name, times in each.items()} for disk, each in found.items()}


@contextmanager
def without_fsync() -> Iterator[None]:
    """The plain way does not wait for the disk either."""
    before, os.fsync = os.fsync, lambda _: None
    try:
        yield
    finally:
        os.fsync = before


def markdown(results: dict[str, Any]) -> str:
    """The committed tables."""
    machine, runs, checks = results["machine"], results["runs"], results["checks"]
    loads = [run["load_before"] for run in runs]
    expected = "\n".join(f"- {what}: {why}" for what, why in results["expected"].items())
    notes = "".join(f"\n{note}\n" for note in results.get("notes", []))
    ratio, most_mb = middle(runs, "ours", "seconds") / middle(runs, "plain", "seconds"), most(runs, "ours", "broker_mb")
    checking = max(each["signed"] / each["plain"] for each in checks.values())
    targets = [
        ("ours, against plain", f"{ratio:.2f}", f"{MOST_RATIO:g}", ratio <= MOST_RATIO),
        ("memory of mosquitto", f"{most_mb:.0f} MB", f"{MOST_RSS_MB:g} MB", most_mb <= MOST_RSS_MB),
        ("signed, against SHA-256 plus write", f"{checking:.2f}", f"{MOST_VERIFY:g}", checking <= MOST_VERIFY),
    ]
    told = "".join(f"| {what} | {it} | {limit} | {'yes' if met else '**no**'} |\n" for what, it, limit, met in targets)
    rows = "".join(line(runs, way, results["devices"]) for way in ("plain", "ours"))
    checked = "".join(
        f"| {disk} | {each['plain'] * 1e3:.1f} ms | {each['signed'] * 1e3:.1f} ms, {each['signed'] / each['plain']:.2f}"
        f" | {each['unsigned'] * 1e3:.1f} ms, {each['unsigned'] / each['plain']:.2f} |\n"
        for disk, each in checks.items()
    )
    return f"""\
A release whose largest file has {results["size"] / 1e6:g} MB, to {results["devices"]} receivers with a connection
each, through one mosquitto.
Plain: the file in chunks of 64 kB to everybody, who write it and check nothing. Ours: signed, asked for, checked,
resumable; all {results["devices"]} are real `UpdateClient`s. Median of {results["rounds"]} rounds, one after
the other; of memory the most.

| way | the last has it after | from, to | blocks sent | of 64 kB | mosquitto | its core | sender's | receiver's |
|---|---|---|---|---|---|---|---|---|
{rows}
| | is | target | met |
|---|---|---|---|
{told}
What it costs one device to write and check {results["size"] / 1e6:g} MB that come in blocks, and how much more that is
than to write them at once and hash them once. Signed: the release's index says what each block must be. Unsigned
(`trust = "none"`): it keeps a map of its blocks, and waits for the disk after every four of them.

| the disk | written and hashed at once | signed | unsigned |
|---|---|---|---|
{checked}
Expected before measuring:

{expected}

{machine["cpu"]}, {machine["cores"]} cores, Python {machine["python"]}, edge-sdk {machine["edge_sdk"]}.
Load of the machine before each run: {min(loads):.1f} to {max(loads):.1f}. All receivers share one process, and with
broker and sender {machine["cores"]} cores: what they would do on processors of their own is part of the time here.
They do not wait for the disk, of which there is one instead of {results["devices"]}.
{notes}"""


def line(runs: list[dict[str, Any]], way: str, devices: int) -> str:
    """One way's row."""
    return (
        f"| {way} | {middle(runs, way, 'seconds'):.1f} s | {least(runs, way):.1f} to {most(runs, way, 'seconds'):.1f} s"
        f" | {middle(runs, way, 'blocks'):.0f} | {middle(runs, way, 'large_blocks'):.0f}"
        f" | {most(runs, way, 'broker_mb'):.0f} MB | {middle(runs, way, 'broker_core_s'):.1f} s"
        f" | {middle(runs, way, 'sender_core_s'):.1f} s"
        f" | {middle(runs, way, 'receivers_core_s') / devices * 1e3:.0f} ms |\n"
    )


def middle(runs: list[dict[str, Any]], way: str, what: str) -> float:
    return statistics.median(run[what] for run in runs if run["way"] == way)


def most(runs: list[dict[str, Any]], way: str, what: str) -> float:
    return float(max(run[what] for run in runs if run["way"] == way))


def least(runs: list[dict[str, Any]], way: str) -> float:
    return float(min(run["seconds"] for run in runs if run["way"] == way))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--size", type=int, default=10_000_000, help="of the release's largest file, in bytes")
    parser.add_argument("--rounds", type=int, default=5, help="of each; the median counts")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds that a transfer may take")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--tables", action="store_true", help="write the tables of a result that is there")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    for name, kind in (("--host", str), ("--port", int), ("--folder", Path), ("--file", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.role:
        with without_flushing():  # one disk stands for as many as there are devices
            ROLES[args.role](args)
        return
    if args.tables:
        args.out.with_suffix(".md").write_text(markdown(json.loads(args.out.read_text())))
        return
    results: dict[str, Any] = {
        "expected": EXPECTED,
        "devices": args.devices,
        "size": args.size,
        "rounds": args.rounds,
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "edge_sdk": __version__,
        },
        "runs": [],
    }
    for _ in range(args.rounds):
        for way in ("plain", "ours"):
            results["runs"].append(fan_out(way, args.devices, args.size, args.patience))
            print(json.dumps(results["runs"][-1]), flush=True)
    results["checks"] = verify(args.size, 5 * args.rounds)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(results))


ROLES: dict[str, Callable[[argparse.Namespace], None]] = {
    "publish": publish,
    "subscribe": subscribe,
    "receive": receive,
    "coordinate": coordinate,
}

if __name__ == "__main__":
    main()
