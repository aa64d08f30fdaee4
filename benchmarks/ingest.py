"""How fast the coordinator takes in reports: from the broker to a committed row, beside what the same client can count.

A report has 20 monitored features and 1.0 kB. mosquitto and a publisher that only writes packets made before run
beside it, on the same cores; the publisher also receives every acknowledgement, as the devices would. Run from the
root, with nothing else busy:

    make bench-ingest

Writes ingest.json and ingest.md beside this file. What was expected before measuring stands in EXPECTED.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import selectors
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
from transport import cpu_name, mosquitto

from edge_sdk import MqttTransport, __version__
from edge_sdk.messages import Envelope, MonitorState, Report, Topics, encode, raw, to_cells
from edge_sdk.transport import Message
from edge_server.coordinator import BATCH_ROWS, RECEIVE_MAXIMUM, Coordinator
from edge_server.ingest import ReportRow, Turn
from edge_server.service import COMMIT_S, turn_by_turn
from edge_server.settings import Settings
from edge_server.store import Store
from edge_server.store_ingest import INSERT_REPORT

RESULT = Path(__file__).with_suffix(".json")
TOPICS = Topics()
STORE_ID = "0123456789abcdef"
CONNECTIONS = 4
WINDOW = 200
"""Publications of a connection that the broker has not acknowledged."""
STALLED_S = 300.0
"""A run that takes longer has failed: it says how many rows there are."""
SHAPES = {"catching up": (1_000, 20), "steady": (10_000, 1)}
"""Devices, and how many reports of one come in a row: after an outage each sends what piled up."""
EXPECTED = {
    "count-only": "12,000 reports a second: a trial with paho alone took 55 us each, most of it paho's own",
    "committed, catching up": "10,000 a second, 0.8 of count-only: reading a report takes 12 us, writing it 20, and the"
    " database works beside the network thread",
    "committed, steady": "6,000 a second and about half of count-only: each report calls for an acknowledgement of its"
    " own, which costs about as much as a report",
    "storage": "0.93 of raw executemany when catching up, 0.75 when steady: then a device's own row is written with"
    " each report",
    "memory": "90 MB: 55 MB of libraries, a few for 10,000 devices, the rest for batches",
}
FOUND = """\
Beyond counting it, a report costs some 50 us: to take it over and read it 25, to write it 16, and the rest is what two
threads of one interpreter take from each other. The database works beside the network thread, the reading cannot: with
that alone the ratio would be about 0.7. One statement for some sixty rows instead of `executemany`, between whose rows
the other thread gets its turn, brought a quarter more.
"""
TARGETS = {"rate": 5_000, "ratio": 0.8, "storage": 0.85, "rss_mb": 150}


def report(number: int) -> Report:
    """A report of a device with 20 features and ten labels."""
    labels = [f"label-{k}" for k in range(10)]
    cells = {f"{a}\t{b}": 10 + number % 100 for i, a in enumerate(labels) for b in (a, labels[(i + 1) % 10])}
    return Report(
        start=1.7e9 + number, end=1.7e9 + number + 60, release=3, head=2, mode="adapt", predictions=1200, labelled=300,
        correct=280, unmatched=1, rejected_inputs=0, errors=0, mean_confidence=0.93, p50_ms=1.2, p95_ms=2.4,
        predicted=dict.fromkeys(labels, 100),
        monitors=[MonitorState(f"feature_{k:02d}", 0.123 * k + number * 1e-3, 18.42, False, False) for k in range(20)],
        replay_rows=1000, fresh_rows=100, promotions=2, rejections=1, rollbacks=0, labels_lost=0, outbox_dropped=0,
        rss_mb=81.5, written_bytes=123_456, labels=labels, confusion=to_cells(cells)[1], scores={"accuracy": 0.93},
    )  # fmt: skip


def names(devices: int) -> list[str]:
    """Of the fleet."""
    return [f"device-{number:05d}" for number in range(devices)]


def order(devices: int, burst: int, total: int) -> Iterable[tuple[int, int]]:
    """(device, sequence number) of each report: bursts of one device, the devices in no order that an index likes."""
    for number in range(total):
        turn, within = divmod(number, burst)
        yield turn * 7919 % devices, turn // devices * burst + within + 1


def messages(devices: int, burst: int, total: int) -> list[Message]:
    """What arrives."""
    fleet = names(devices)
    return [
        Message(
            TOPICS.up(fleet[device], "report"),
            encode(
                Envelope(store_id=STORE_ID, seq=seq, oldest=1, time=1.7e9 + seq, kind="report", body=raw(report(seq)))
            ),
        )
        for device, seq in order(devices, burst, total)
    ]


# ---- the publisher


def packet(kind: int, body: bytes) -> bytes:
    """An MQTT control packet."""
    length, rest = bytearray(), len(body)
    while True:
        rest, low = divmod(rest, 128)
        length.append(low | (128 if rest else 0))
        if not rest:
            return bytes([kind]) + bytes(length) + body


def text(value: str) -> bytes:
    """A string as MQTT has it."""
    return struct.pack(">H", len(value)) + value.encode()


def connection(host: str, port: int, name: str) -> socket.socket:
    """A clean MQTT v5 session."""
    line = socket.create_connection((host, port))
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    line.sendall(packet(0x10, text("MQTT") + b"\x05\x02\x00\x00\x00" + text(name)))
    line.recv(256)
    return line


def publish(args: argparse.Namespace) -> None:
    """Write the packets as fast as the broker acknowledges them, until told to stop. It reads every `ack`, too."""
    parts: list[list[bytes]] = [[] for _ in range(CONNECTIONS)]
    for message, (device, _) in zip(
        messages(args.devices, args.burst, args.total), order(args.devices, args.burst, args.total), strict=True
    ):
        part = parts[device % CONNECTIONS]
        number = struct.pack(">H", len(part) % 60_000 + 1)
        part.append(packet(0x32, text(message.topic) + number + b"\x00" + message.payload))
    lines = [connection(args.host, args.port, f"publisher-{number}") for number in range(CONNECTIONS)]
    acks = MqttTransport(args.host, args.port, client_id="devices", receive_maximum=65_535, max_inbox=10**7)
    acks.subscribe(f"{TOPICS.prefix}/d/+/dn/ack")
    acks.connect()
    while not acks.connected:
        acks.wait(0.1)
    print("ready", flush=True)
    sys.stdin.readline()
    spent = time.process_time()
    selector = selectors.DefaultSelector()
    sent, done, rest = [0] * CONNECTIONS, [0] * CONNECTIONS, [b""] * CONNECTIONS

    def push(number: int) -> None:
        last = min(done[number] + WINDOW, len(parts[number]))
        lines[number].sendall(b"".join(parts[number][sent[number] : last]))
        sent[number] = last

    for number, line in enumerate(lines):
        selector.register(line, selectors.EVENT_READ, number)
        push(number)
    while sum(done) < args.total:
        for key, _ in selector.select():
            number: int = key.data
            data = rest[number] + lines[number].recv(65_536)
            at = 0
            while at + 2 <= len(data) and at + 2 + data[at + 1] <= len(data):
                done[number] += data[at] == 0x40
                at += 2 + data[at + 1]
            rest[number] = data[at:]
            if done[number] + WINDOW - sent[number] >= WINDOW // 4:
                push(number)
    print(time.process_time() - spent, flush=True)
    sys.stdin.readline()
    print(len(acks.receive()), flush=True)
    os._exit(0)


# ---- the process under test


def take_in(args: argparse.Namespace) -> None:
    """Count what comes, or commit it; prints what it found as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        transport = MqttTransport(
            args.host,
            args.port,
            client_id="coordinator-edge",
            receive_maximum=RECEIVE_MAXIMUM,
            max_inbox=2 * RECEIVE_MAXIMUM,
        )
        found = count(transport, args) if args.count else commit(transport, args, Path(folder))
    found["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found), flush=True)
    os._exit(0)


def count(transport: MqttTransport, args: argparse.Namespace) -> dict[str, Any]:
    """The same client, without anything behind it."""
    transport.subscribe(f"{TOPICS.prefix}/d/+/up/#")
    transport.connect()
    while not transport.connected:
        transport.wait(0.1)
    print("ready", flush=True)
    transport.wait(60)
    begin, spent, got, stop = time.monotonic(), time.process_time(), 0, threading.Event()
    while got < args.total and time.monotonic() - begin < STALLED_S:
        got += len(transport.receive())
        stop.wait(COMMIT_S)  # as the coordinator does
    took = time.monotonic() - begin
    return {"rate": got / took, "rows": got, "us_a_report": (time.process_time() - spent) / got * 1e6}


def commit(transport: MqttTransport, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The coordinator as `edge-coordinator serve` runs it."""
    coordinator = Coordinator(folder, transport=transport, settings=Settings())
    store = coordinator.registry.store
    with store.transaction():
        for name in names(args.devices):
            store.devices.add(name, group="default", credential="x", now=0.0)
    coordinator.start()
    while not transport.connected:
        transport.wait(0.1)
    stop, largest, batches = threading.Event(), 0, 0
    write, at = store.ingest.committed, 0

    def note(turn: Turn) -> None:
        nonlocal at, largest, batches
        write(turn)
        at += turn.counters["accepted"]
        batches += 1
        largest = max(largest, len(turn.reports))
        if args.total and at >= args.total:
            stop.set()

    def hear_total() -> None:
        args.total = int(sys.stdin.readline())
        if at >= args.total:
            stop.set()

    if not args.total:  # it is told once all were sent
        threading.Thread(target=hear_total, daemon=True).start()
    store.ingest.committed = note  # type: ignore[method-assign]
    print("ready", flush=True)
    transport.wait(60)
    begin, spent = time.monotonic(), time.process_time()
    limit = threading.Timer(STALLED_S, stop.set)
    limit.start()
    turn_by_turn(coordinator, stop)
    limit.cancel()
    took = time.monotonic() - begin
    spent = time.process_time() - spent
    rows = store.read("SELECT count(*) FROM reports")[0][0]
    coordinator.close()
    return {
        "rate": rows / took, "us_a_report": spent / rows * 1e6, "rows": rows, "batches": batches, "largest": largest,
        "dropped": transport.dropped,
    }  # fmt: skip


# ---- the storage stage alone


def storage(args: argparse.Namespace) -> None:
    """Rows that were read before, written as a turn is, and by `executemany` into the same table."""
    batches = []
    came = messages(args.devices, args.burst, args.total)
    positions: dict[tuple[str, str], int] = {}
    for first in range(0, args.total, BATCH_ROWS):
        turn = Turn(
            topics=TOPICS, positions=dict(positions), known=set(names(args.devices)), accept_unknown=False, now=1.7e9
        )
        for message in came[first : first + BATCH_ROWS]:
            turn.read(message)
        positions |= turn.positions
        batches.append(turn)
    took: dict[str, list[float]] = {"stage": [], "raw": []}
    for _ in range(args.repeats):
        width = len(ReportRow._fields)
        for way, seconds in took.items():
            with tempfile.TemporaryDirectory() as folder:
                store = Store(Path(folder) / "coordinator.db")
                with store.transaction():
                    for name in names(args.devices):
                        store.devices.add(name, group="default", credential="x", now=0.0)
                begin = time.monotonic()
                for turn in batches:
                    with store.transaction():
                        if way == "stage":
                            store.ingest.write(turn)
                        else:
                            store.execute_many(f"{INSERT_REPORT} VALUES ({', '.join('?' * width)})", turn.reports)
                seconds.append(time.monotonic() - begin)
                store.close()
    rates = {way: args.total / statistics.median(seconds) for way, seconds in took.items()}
    print(json.dumps(rates | {"ratio": rates["stage"] / rates["raw"]}))


# ---- the runs


def measure(way: str, shape: str, total: int) -> dict[str, Any]:
    """One run beside mosquitto and the publisher."""
    devices, burst = SHAPES[shape]
    load = ["--devices", str(devices), "--burst", str(burst), "--total", str(total)]
    with mosquitto() as (host, port):
        broker = next(p for p in psutil.Process().children() if p.name() == "mosquitto")
        base = [sys.executable, __file__, "--host", host, "--port", str(port), *load]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with (
            subprocess.Popen([*base, "--publish"], **pipes) as publisher,
            subprocess.Popen([*base, f"--{way}"], **pipes) as reader,
        ):
            assert publisher.stdin is not None and publisher.stdout is not None and reader.stdout is not None  # noqa: PT018
            assert publisher.stdout.readline() == reader.stdout.readline() == "ready\n"
            before = broker.cpu_times()
            publisher.stdin.write("go\n")
            publisher.stdin.flush()
            found: dict[str, Any] = {"way": way, "shape": shape, "load": os.getloadavg()[0]}
            found |= json.loads(reader.stdout.readline())
            after = broker.cpu_times()
            found["publisher_us"] = float(publisher.stdout.readline()) / total * 1e6
            time.sleep(0.5)  # the last acknowledgements are on their way
            found["acks"] = int(publisher.communicate("stop\n")[0])
    found["broker_us"] = (after.user + after.system - before.user - before.system) / total * 1e6
    return found


def run(args: argparse.Namespace) -> None:
    """All runs: count-only and committed take turns, so that both see the same machine."""
    total, repeats = (2_000, 1) if args.quick else (args.reports, args.repeats)
    results: dict[str, Any] = {
        "expected": EXPECTED,
        "reports": total,
        "bytes": len(messages(1, 1, 1)[0].payload),
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "edge_sdk": __version__,
        },
        "runs": [],
        "storage": {},
    }
    for shape, (devices, burst) in SHAPES.items():
        for _ in range(repeats):
            for way in ("count", "commit"):
                found = measure(way, shape, total)
                results["runs"].append(found)
                print(json.dumps(found), flush=True)
        load = ["--devices", str(devices), "--burst", str(burst), "--total", str(total), "--repeats", str(repeats)]
        alone = subprocess.run([sys.executable, __file__, "--storage", *load], stdout=subprocess.PIPE, check=True)
        results["storage"][shape] = json.loads(alone.stdout)
        print(alone.stdout.decode(), flush=True)
    import overload  # noqa: PLC0415 - it takes its parts from here

    results["overload"] = overload.measure(*((1.0, 4_000) if args.quick else (overload.SECONDS, overload.RATE)))
    print(json.dumps(results["overload"]), flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(results))


def markdown(results: dict[str, Any]) -> str:
    """The committed tables."""
    machine, runs = results["machine"], results["runs"]
    loads = [found["load"] for found in runs]
    expected = "\n".join(f"- {what}: {why}" for what, why in results["expected"].items())
    rows = "".join(line(results, shape) for shape in SHAPES)
    stages = "".join(
        f"| {shape} | {found['raw']:,.0f} | {found['stage']:,.0f} | {found['ratio']:.2f} |\n"
        for shape, found in results["storage"].items()
    )
    from overload import markdown as told_overload  # noqa: PLC0415 - it takes its parts from here

    beyond = told_overload(results["overload"]) if "overload" in results else ""
    return f"""\
Reports of {results["bytes"]} bytes (20 features, ten labels) through mosquitto into the coordinator's database, flushed
to the disk at every commit. A publisher beside it writes packets made before and receives the acknowledgements: one for
each device and commit. Catching up: {SHAPES["catching up"][0]:,} devices, each with {SHAPES["catching up"][1]} reports
that piled up. Steady: {SHAPES["steady"][0]:,} devices, one report each in turn, so that nearly each calls for an
acknowledgement of its own. Count-only: the same client, which only counts. Medians of {len(runs) // 4} pairs of runs of
{results["reports"]:,} reports; us: processor time of the process for a report.

| load | count-only | committed | ratio | us count-only | us committed | us broker | rows a commit | memory | met |
|---|---|---|---|---|---|---|---|---|---|
{rows}
The storage stage alone, rows a second: raw is `executemany` into the same table with its indexes, stage is all that a
turn writes: rows, positions, and each device's own row.

| load | raw | stage | ratio |
|---|---|---|---|
{stages}
Targets: at least {TARGETS["rate"]:,} committed a second, {TARGETS["ratio"]} of count-only, and {TARGETS["storage"]} of
raw; at most {TARGETS["rss_mb"]} MB with 10,000 devices.
{beyond}
Expected before measuring:

{expected}

{machine["cpu"]}, {machine["cores"]} cores, Python {machine["python"]}, edge-sdk {machine["edge_sdk"]}. Load of the
machine before each run: {min(loads):.1f} to {max(loads):.1f}; the runs themselves make 2.

{FOUND}"""


def line(results: dict[str, Any], shape: str) -> str:
    """The medians of one shape."""
    counted, committed = (
        [found for found in results["runs"] if (found["way"], found["shape"]) == (way, shape)]
        for way in ("count", "commit")
    )

    def middle(runs: list[dict[str, Any]], what: str) -> float:
        return statistics.median(found[what] for found in runs)

    ratio = statistics.median(b["rate"] / a["rate"] for a, b in zip(counted, committed, strict=True))
    rate, memory = middle(committed, "rate"), max(found["rss_mb"] for found in committed)
    whole = all(found["rows"] == results["reports"] for found in committed) and not any(
        found["dropped"] for found in committed
    )
    missed = [
        what
        for what, met in (
            ("lost rows", whole),
            ("rate", rate >= TARGETS["rate"]),
            ("ratio", ratio >= TARGETS["ratio"]),
            ("memory", memory <= TARGETS["rss_mb"]),
        )
        if not met
    ]
    verdict = f"**not: {', '.join(missed)}**" if missed else "yes"
    rows = statistics.median(found["rows"] / found["batches"] for found in committed)
    return (
        f"| {shape} | {middle(counted, 'rate'):,.0f} /s | {rate:,.0f} /s | {ratio:.2f}"
        f" | {middle(counted, 'us_a_report'):.0f} | {middle(committed, 'us_a_report'):.0f}"
        f" | {middle(committed, 'broker_us'):.0f} | {rows:.0f} | {memory:.0f} MB | {verdict} |\n"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--reports", type=int, default=60_000, help="of each run")
    parser.add_argument("--repeats", type=int, default=5, help="of each pair of runs; the median counts")
    parser.add_argument("--quick", action="store_true", help="2,000 reports, once, and 1 s of overload")
    parser.add_argument("--tables", action="store_true", help="write the tables of a result that is there")
    for name in ("--publish", "--count", "--commit", "--storage"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    for name, kind in (("--host", str), ("--port", int), ("--devices", int), ("--burst", int), ("--total", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.publish:
        publish(args)
    elif args.count or args.commit:
        take_in(args)
    elif args.storage:
        storage(args)
    elif args.tables:
        args.out.with_suffix(".md").write_text(markdown(json.loads(args.out.read_text())))
    else:
        run(args)


if __name__ == "__main__":
    main()
