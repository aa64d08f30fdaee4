"""What a fleet's connections cost, without the devices: a `Swarm` against two brokers on loopback.

Every device has a connection of its own and publishes a report of 512 bytes at QoS 1 at its own moment of the
interval. A reader in another process counts what comes out of the broker, so that "kept" means delivered. Run from the
root, with nothing else busy:

    make bench-transport

Writes transport.json and transport.md beside this file. What was expected before measuring stands in EXPECTED.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from edge_sdk import MqttTransport, __version__
from edge_sdk.errors import NotConnectedError
from edge_sdk.faults import FaultProxy
from edge_sdk.swarm import Swarm
from edge_sdk.transport import Transport, allow_connections
from edge_server.broker import EmbeddedBroker

RESULT = Path(__file__).with_suffix(".json")
PAYLOAD_BYTES = 512
PREFIX = "bench"
INTERVALS = 2
"""Least length of a run."""
EXPECTED = {
    "1,000 devices at 1 s": "20 % of a core: a probe with bare paho clients took 26, and a packet now costs two system"
    " calls instead of five",
    "5,000 at 1 s": "85 % of a core, if the cost of a report stays the same; late by some milliseconds",
    "10,000 at 10 s": "25 % of a core: 1,000 reports a second, and four looks a minute at each connection",
    "kept": "1.0 with both brokers: QoS 1 on loopback, and nobody is slow for long",
    "memory": "25 kB a device: a paho client is some fifteen objects, a socket costs the process nothing",
    "10,000 at 1 s": "too much: late by seconds and less than 0.99 kept, for the broker and the reader need their share"
    " of two cores as well (written after a first trial on a busy machine)",
    "through a FaultProxy": "40 % of a core for the proxy: two reads and two writes a report and as many epoll calls;"
    " half a millisecond more",
    "a thread each": "three times the processor time of the swarm, at 300 devices, which is all that it can",
}
LOADS = [(1_000, 1.0), (5_000, 1.0), (10_000, 10.0)]
TARGETS = {(1_000, 1.0): 0.5, (5_000, 1.0): 1.0, (10_000, 10.0): 1.0}
"""Most of a core that the devices' process may take; it has one thread."""
BEYOND = (10_000, 1.0)
"""No target: where does it end?"""


# ---- brokers


@contextmanager
def mosquitto() -> Iterator[tuple[str, int]]:
    """A mosquitto that holds what a slow reader has not fetched yet."""
    with tempfile.TemporaryDirectory() as folder:
        spare = EmbeddedBroker()  # knows a free port
        config = Path(folder) / "mosquitto.conf"
        config.write_text(
            f"listener {spare.port} {spare.host}\nallow_anonymous true\nmax_queued_messages 0\nlog_dest none\n"
        )
        process = subprocess.Popen(["mosquitto", "-c", config], stderr=subprocess.DEVNULL)
        try:
            probe = MqttTransport(spare.host, spare.port, client_id="probe")
            probe.connect()
            while not probe.connected:
                probe.wait(0.1)
            probe.close()
            yield spare.host, spare.port
        finally:
            process.terminate()
            process.wait()


@contextmanager
def iotcore() -> Iterator[tuple[str, int]]:
    """The broker that demos and tests use."""
    with EmbeddedBroker() as broker:
        yield broker.host, broker.port


BROKERS = {"mosquitto": mosquitto, "iotcore": iotcore}


# ---- the process under test


def publish(args: argparse.Namespace) -> None:
    """The devices of one run; prints what it found as JSON."""
    allow_connections(args.devices)
    before = memory_kb()
    swarm = None if args.threads else Swarm(args.host, args.port)
    begin = time.monotonic()
    transports: list[Transport] = []
    for number in range(args.devices):
        name = f"device-{number}"
        transports.append(swarm.transport(name) if swarm else MqttTransport(args.host, args.port, client_id=name))
        transports[-1].connect()
    deadline = time.monotonic() + 120
    while not all(transport.connected for transport in transports):
        if time.monotonic() > deadline:
            print(json.dumps({"connected": sum(transport.connected for transport in transports)}))
            os._exit(0)  # threads of half-open connections would keep it
        turn(swarm, 0.05)
    connect_s = time.monotonic() - begin
    topics = [f"{PREFIX}/device-{number}/up" for number in range(args.devices)]
    filler = bytes(PAYLOAD_BYTES - 8)
    send(swarm, transports, topics, filler, every_s=args.interval, seconds=args.interval)  # what is made once, is made
    spent, began = time.process_time(), time.monotonic()
    asked, sent, lag_s = send(swarm, transports, topics, filler, every_s=args.interval, seconds=args.seconds)
    spent, took = time.process_time() - spent, time.monotonic() - began
    kb = (memory_kb() - before) / args.devices
    turn_for(swarm, 2.0)
    print(
        json.dumps(
            {
                "connected": sum(transport.connected for transport in transports),
                "connect_s": connect_s,
                "asked": asked,
                "sent": sent,
                "unacknowledged": swarm.unacknowledged if swarm else 0,
                "core": spent / took,
                "us_a_report": spent / max(1, sent) * 1e6,
                "kb_a_device": kb,
                "worst_lag_s": lag_s,
            }
        )
    )
    if swarm:
        swarm.close()
    else:
        os._exit(0)


def send(
    swarm: Swarm | None,
    transports: list[Transport],
    topics: list[str],
    filler: bytes,
    *,
    every_s: float,
    seconds: float,
) -> tuple[int, int, float]:
    """Publish on schedule, spread over the interval; (how many were due, how many were sent, the worst lag)."""
    begin, step = time.monotonic(), every_s / len(transports)
    asked = round(seconds / step)
    sent, worst, number = 0, 0.0, 0
    while number < asked:
        now = time.monotonic()
        due = min(asked, int((now - begin) / step) + 1)
        worst = max(worst, now - begin - number * step)
        if now - begin > seconds + every_s:
            break  # what is later than the next report would be, is lost
        for turn_number in range(number, due):
            which = turn_number % len(transports)
            try:
                due_ns = round((begin + turn_number * step) * 1e9)  # not now: a publisher that is late shows
                transports[which].publish(topics[which], due_ns.to_bytes(8, "big") + filler)
            except NotConnectedError:
                continue
            sent += 1
        number = due
        turn(swarm, max(0.0, begin + number * step - time.monotonic()))
    return asked, sent, worst


def turn(swarm: Swarm | None, seconds: float) -> None:
    """Let the network work; threads do so by themselves."""
    if swarm is not None:
        swarm.turn(seconds)
    else:
        threading.Event().wait(seconds)


def turn_for(swarm: Swarm | None, seconds: float) -> None:
    """Let the network work so long."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        turn(swarm, left)


def memory_kb() -> float:
    """Resident memory of this process."""
    return float(psutil.Process().memory_info().rss) / 1024


# ---- the process that counts


def count(args: argparse.Namespace) -> None:
    """Everything that the broker delivers, until told to stop; prints it as JSON."""
    swarm = Swarm(args.host, args.port, max_inbox=1_000_000)
    reader = swarm.transport("reader")
    reader.subscribe(f"{PREFIX}/+/up")
    reader.connect()
    swarm.until(lambda: reader.connected, 30)
    print("ready", flush=True)
    told = threading.Event()

    def wait_for_line() -> None:
        sys.stdin.readline()
        told.set()

    threading.Thread(target=wait_for_line, daemon=True).start()
    took: list[float] = []
    quiet = 0
    while not told.is_set() or quiet < 10:
        swarm.turn(0.05)
        now, messages = time.monotonic_ns(), reader.receive()
        quiet = 0 if messages else quiet + 1
        took += [(now - int.from_bytes(message.payload[:8], "big")) / 1e6 for message in messages]
    p50, p99 = (float(np.percentile(took, q)) for q in (50, 99)) if took else (float("nan"), float("nan"))
    print(json.dumps({"delivered": len(took), "p50_ms": p50, "p99_ms": p99, "core": time.process_time()}))
    swarm.close()


# ---- the runs


def measure(
    broker: str, devices: int, interval_s: float, seconds: float, *, threads: bool = False, proxied: bool = False
) -> dict[str, Any]:
    """One load against one broker; the proxy, if there is one, runs in this process, which only waits."""
    load_before = os.getloadavg()[0]
    with BROKERS[broker]() as (host, port), FaultProxy((host, port)) as proxy:
        base = [sys.executable, __file__, "--host", host, "--port"]
        base, through = [*base, str(port)], [*base, str(proxy.port if proxied else port)]
        spent = time.process_time()
        with subprocess.Popen([*base, "--count"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "ready\n"
            load = ["--devices", str(devices), "--interval", str(interval_s), "--seconds", str(seconds)]
            publisher = subprocess.run(
                [*through, "--publish", *load, *(["--threads"] if threads else [])], stdout=subprocess.PIPE, check=True
            )
            counted = json.loads(reader.communicate("stop\n")[0])
    found: dict[str, Any] = {"broker": broker, "devices": devices, "interval_s": interval_s, "threads": threads}
    found |= {"load_before": load_before}
    found |= {"proxy_core": (time.process_time() - spent) / (seconds + interval_s)} if proxied else {}
    found |= json.loads(publisher.stdout)
    if "sent" in found:
        warm = devices  # one report each, before the measurement
        found |= {
            "kept": max(0, counted["delivered"] - warm) / found["asked"],
            "p50_ms": counted["p50_ms"],
            "p99_ms": counted["p99_ms"],
            "reader_core_s": counted["core"],
        }
    return found


def markdown(results: dict[str, Any]) -> str:
    """The committed tables."""
    machine = results["machine"]
    loads = [run["load_before"] for run in results["runs"]]
    expected = "\n".join(f"- {what}: {why}" for what, why in results["expected"].items())
    notes = "".join(f"\n{note}\n" for note in results.get("notes", []))
    return f"""\
Transport only: every device a connection of its own in one process, a report of {PAYLOAD_BYTES} bytes at QoS 1 each
interval, the broker on loopback, another process that reads it all. Core: processor time of the devices' process, by
wall time. Kept: delivered to the reader; p50 / p99: how long after it was due. kB: growth of resident memory, without
the kernel's socket buffers.

| broker | devices | interval | connected | core | a report | kept | kB a device | joined in | p50 / p99 | met |
|---|---|---|---|---|---|---|---|---|---|---|
{"".join(map(line, results["runs"]))}
Targets: 1,000 devices at 1 s on at most 50 % of a core; 5,000 at 1 s and 10,000 at 10 s in one process; at least 0.99
kept; at most 100 kB a device.

Expected before measuring:

{expected}

{machine["cpu"]}, {machine["cores"]} cores, Python {machine["python"]}, edge-sdk {machine["edge_sdk"]}, \
{results["seconds"]:g} s a run ({results["intervals"]} intervals at least).
Load of the machine before each: {min(loads):.1f} to {max(loads):.1f}. Above the number of cores the processes wait for
each other: "kept" then says what they were given, "core" and "a report" what the devices took.
{notes}"""


def line(run: dict[str, Any]) -> str:
    """One run's row."""
    name = f"{run['devices']:,}" + (" (a thread each)" if run["threads"] else "")
    if "proxy_core" in run:
        name += f" (through a `FaultProxy`, {run['proxy_core']:.0%} of a core)"
    row = f"| {run['broker']} | {name} | {run['interval_s']:g} s | {run['connected']:,} |"
    if "sent" not in run:
        return f"{row} - | - | - | - | - | - | **no** |\n"
    return (
        f"{row} {run['core']:.0%} | {run['us_a_report']:.0f} us | {run['kept']:.4f}"
        f" | {run['kb_a_device']:.0f} | {run['connect_s']:.1f} s | {run['p50_ms']:.1f} / {run['p99_ms']:.1f} ms"
        f" | {verdict(run)} |\n"
    )


def verdict(run: dict[str, Any]) -> str:
    """Whether a run meets its targets; runs for comparison have none."""
    most = TARGETS.get((run["devices"], run["interval_s"]))
    if run["threads"] or "proxy_core" in run or most is None:
        return "-"
    met = run["kept"] >= 0.99 and run["kb_a_device"] <= 100 and run["connected"] == run["devices"]
    if met and run["core"] <= most:
        return "yes"
    busy = run["load_before"] > (os.cpu_count() or 1)  # then it says what the machine had left
    return f"**no**, at load {run['load_before']:.1f}" if busy else "**no**"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each run, and two intervals at least")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--brokers", nargs="+", choices=BROKERS, default=list(BROKERS))
    parser.add_argument("--quick", action="store_true", help="50 devices for two seconds")
    parser.add_argument("--tables", action="store_true", help="write the tables of a result that is there")
    for name in ("--publish", "--count", "--threads"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    for name, kind in (("--host", str), ("--port", int), ("--devices", int), ("--interval", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.publish:
        publish(args)
        return
    if args.count:
        count(args)
        return
    if args.tables:
        args.out.with_suffix(".md").write_text(markdown(json.loads(args.out.read_text())))
        return
    results: dict[str, Any] = {
        "expected": EXPECTED,
        "seconds": args.seconds,
        "intervals": INTERVALS,
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "edge_sdk": __version__,
            "load": os.getloadavg()[0],
        },
        "runs": [],
    }
    for broker in args.brokers:
        loads: list[tuple[int, float, dict[str, bool]]] = (
            [(50, 0.5, {}), (50, 0.5, {"proxied": True}), (20, 0.5, {"threads": True})]
            if args.quick
            else [
                *((*load, {}) for load in (*LOADS, *([BEYOND] if broker == args.brokers[0] else []))),
                (1_000, 1.0, {"proxied": True}),
                (300, 1.0, {"threads": True}),
            ]
        )
        for devices, every, way in loads:
            run = measure(broker, devices, every, 1.0 if args.quick else max(args.seconds, INTERVALS * every), **way)
            results["runs"].append(run)
            print(json.dumps(run), flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(results))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
