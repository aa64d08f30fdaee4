"""More reports than the coordinator can take in, for a stated time: a part of `ingest.py`, which runs it.

A publisher sends reports at a stated rate whatever becomes of them; mosquitto holds what the coordinator has not
fetched. It must push back, not grow, and have everything in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import statistics
import struct
import subprocess
import sys
import threading
import time
from typing import Any

import ingest
import psutil
from ingest import CONNECTIONS, STORE_ID, TOPICS, WINDOW, connection, names, packet, report, text
from transport import mosquitto

from edge_sdk.messages import Envelope, encode, raw

DEVICES = 10_000
RATE = 15_000
"""Reports a second that are offered."""
SECONDS = 30.0
EXPECTED = (
    "the broker takes what the coordinator does not, 1 kB and more for each report; the coordinator stays within 10 MB"
    " of what it has once its batches are full, and has every report in the end"
)
MAX_GROWN_MB = 20
_SAMPLE_S = 0.25
_SETTLED = 1 / 3
"""Of the time: by then batches, caches and the database's log have their size; what comes on top is growth."""


class _Line:
    """One connection of the publisher."""

    def __init__(self, args: argparse.Namespace, number: int) -> None:
        self.socket = connection(args.host, args.port, f"flood-{number}")
        self._number, self._fleet, self._body = number, names(DEVICES), raw(report(1))
        self.sent = self.acknowledged = 0
        self._rest = b""

    def send(self, due: int) -> None:
        """Send up to the number `due`, as far as the broker keeps up."""
        count = min(due - self.sent, WINDOW - self.sent + self.acknowledged)
        self.socket.sendall(b"".join(self._next() for _ in range(count)))

    def _next(self) -> bytes:
        turn, device = divmod(self.sent * CONNECTIONS + self._number, DEVICES)
        envelope = Envelope(
            store_id=STORE_ID, seq=turn + 1, oldest=1, time=1.7e9 + turn, kind="report", body=self._body
        )
        number = struct.pack(">H", self.sent % 60_000 + 1)
        self.sent += 1
        topic = text(TOPICS.up(self._fleet[device], "report"))
        return packet(0x32, topic + number + b"\x00" + encode(envelope))

    def receive(self) -> None:
        """Read acknowledgements."""
        data, at = self._rest + self.socket.recv(65_536), 0
        while at + 2 <= len(data) and at + 2 + data[at + 1] <= len(data):
            self.acknowledged += data[at] == 0x40
            at += 2 + data[at + 1]
        self._rest = data[at:]


def flood(args: argparse.Namespace) -> None:
    """Send reports at the rate for the time, then tell how many there were."""
    lines = [_Line(args, number) for number in range(CONNECTIONS)]
    selector = selectors.DefaultSelector()
    for line in lines:
        selector.register(line.socket, selectors.EVENT_READ, line)
    print("ready", flush=True)
    sys.stdin.readline()
    begin = time.monotonic()
    while (elapsed := time.monotonic() - begin) < args.seconds or any(line.acknowledged < line.sent for line in lines):
        for line in lines if elapsed < args.seconds else ():
            line.send(int(args.rate * elapsed / CONNECTIONS))
        for key, _ in selector.select(0.005):
            key.data.receive()
    print(sum(line.sent for line in lines), flush=True)
    os._exit(0)


class _Memory(threading.Thread):
    """Watches the memory of a process, in MB."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._process, self.samples, self._done = process, list[float](), threading.Event()

    def run(self) -> None:
        while not self._done.is_set():
            self.samples.append(self._process.memory_info().rss / 1e6)
            self._done.wait(_SAMPLE_S)

    def stop(self) -> list[float]:
        """What it saw."""
        self._done.set()
        self.join()
        return self.samples


def measure(seconds: float, rate: int) -> dict[str, Any]:
    """One run: the load for its time, and then until everything is in the database."""
    with mosquitto() as (host, port):
        broker = next(p for p in psutil.Process().children() if p.name() == "mosquitto")
        where = ["--host", host, "--port", str(port)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        load = ["--seconds", str(seconds), "--rate", str(rate)]
        reading = [sys.executable, ingest.__file__, "--commit", *where, "--devices", str(DEVICES), "--total", "0"]
        with (
            subprocess.Popen([sys.executable, __file__, *where, *load], **pipes) as publisher,
            subprocess.Popen(reading, **pipes) as reader,
        ):
            assert publisher.stdin and publisher.stdout and reader.stdin and reader.stdout  # noqa: PT018
            assert publisher.stdout.readline() == reader.stdout.readline() == "ready\n"
            own, held = _Memory(psutil.Process(reader.pid)), _Memory(broker)
            before = psutil.Process(reader.pid).memory_info().rss / 1e6
            own.start()
            held.start()
            begin = time.monotonic()
            publisher.stdin.write("go\n")
            publisher.stdin.flush()
            sent = int(publisher.stdout.readline())
            took, loaded = time.monotonic() - begin, len(own.samples)
            reader.stdin.write(f"{sent}\n")
            reader.stdin.flush()
            found = json.loads(reader.stdout.readline())
            drained = time.monotonic() - begin - took
            memory, broker_mb = own.stop(), max(held.stop())
    settled = memory[: max(1, int(loaded * _SETTLED))]
    return {
        "seconds": seconds, "offered": rate, "sent": sent, "rate": sent / took, "committed": found["rate"],
        "drained_s": drained, "lost": sent - found["rows"], "dropped": found["dropped"], "before_mb": before,
        "settled_mb": statistics.median(settled[len(settled) // 2 :]), "most_mb": max(memory), "after_mb": memory[-1],
        "broker_mb": broker_mb,
    }  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    """What is told of it among the tables of `ingest.py`."""
    grown = found["most_mb"] - found["settled_mb"]
    missed = [
        what
        for what, met in (
            ("rows lost", not found["lost"] and not found["dropped"]),
            ("not above capacity", found["rate"] > found["committed"]),
            ("grown", grown <= MAX_GROWN_MB),
        )
        if not met
    ]
    verdict = f"**not: {', '.join(missed)}**" if missed else "yes"
    return f"""\

Overload: {DEVICES:,} devices offer {found["offered"]:,} reports a second for {found["seconds"]:.0f} s, one each in
turn, whatever becomes of them. The coordinator fetches what it can commit (receive maximum), and mosquitto holds the
rest. Memory of the coordinator before, after a third of that time, at most, and once all is committed:

| sent | committed | until all was in | rows lost | before | settled | at most | after | broker at most | met |
|---|---|---|---|---|---|---|---|---|---|
| {found["rate"]:,.0f} /s | {found["committed"]:,.0f} /s | {found["drained_s"]:.0f} s | {found["lost"]} \
| {found["before_mb"]:.0f} MB | {found["settled_mb"]:.0f} MB | {found["most_mb"]:.0f} MB | {found["after_mb"]:.0f} MB \
| {found["broker_mb"]:.0f} MB | {verdict} |

Targets: no row lost, and at most {MAX_GROWN_MB} MB more than when settled. Expected before measuring: {EXPECTED}.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in (("--host", str), ("--port", int), ("--seconds", float), ("--rate", int)):
        parser.add_argument(name, type=kind, required=True)
    flood(parser.parse_args())
