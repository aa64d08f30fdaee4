"""How soon the dashboard of 10,000 devices is painted, in a real Chromium that has seen nothing of it before.

The database is filled with devices in ten groups, their reports and events, and a rollout under way. The server runs in
this process, the browser beside it on the same cores. Run from the root, with nothing else busy:

    make bench-dashboard

Writes dashboard.json and dashboard.md beside this file. What was expected before measuring stands in EXPECTED.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright
from transport import cpu_name

from edge_sdk import __version__
from edge_sdk.messages import MonitorState, Report, raw
from edge_server.app import create_app
from edge_server.ingest import ReportRow
from edge_server.registry import Registry
from edge_server.settings import Settings
from edge_server.store import Store

RESULT = Path(__file__).with_suffix(".json")
PAGES = ("/", "/devices", "/devices?health=drift", "/devices/d00000", "/drift", "/rollouts", "/alerts", "/audit")
TARGET_MS = 1000.0
EXPECTED = {
    "/": "600 ms: 150 ms to read and render, 300 kB of names; the map is drawn within 100 ms after the first paint",
    "/devices": "400 ms: 10,000 short rows are filtered, 200 are shown",
    "others": "300 ms, most of it Chromium's own; plotly's 4.8 MB come after the first paint",
}
_PAINTED = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
_WATCH_MAP = """(() => {
  const look = () => {
    const map = document.getElementById("map");
    if (map && map.style.height) window.mapAt = performance.now(); else requestAnimationFrame(look);
  };
  look();
})()"""


def fill(home: Path, devices: int) -> Registry:
    """A coordinator's folder with a fleet of that size; every 20th device in drift, every 50th offline."""
    registry = Registry(home, settings=Settings(durable=False))
    store, now = registry.store, registry.clock.now()
    with store.transaction():
        store.execute_many(
            "INSERT INTO devices (name, group_name, registered, online, mode, sdk, row_release, row_head, row_time,"
            " last_seen, predictions, labelled, correct, alarms)"
            " VALUES (?, ?, ?, ?, 'adapt', ?, 1, 0, ?, ?, 100, 50, 45, ?)",
            [(f"d{i:05}", f"group-{i % 10}", now, i % 50 != 0, __version__, now, now, i % 20 == 0)
             for i in range(devices)],
        )  # fmt: skip
        _write_reports(store, devices, now)
        store.execute_many(
            "INSERT INTO events (device, store_id, seq, time, received, name, release, head, detail)"
            " VALUES (?, 's', ?, ?, ?, 'drift_alarm', 1, 0, '{\"monitor\": \"inputs\"}')",
            [(f"d{i:05}", 100, now, now) for i in range(0, devices, 20)],
        )
        for i in range(200):
            store.audit.add(now, "library", "command given", {"device": f"d{i:05}", "command": "status"})
    registry.alerts.look()
    registry.alerts.look()
    return registry


def _write_reports(store: Store, devices: int, now: float, *, each: int = 5) -> None:
    body = raw(
        Report(
            start=now - 60, end=now, release=1, head=0, mode="adapt", predictions=100, labelled=50, correct=45,
            unmatched=0, rejected_inputs=0, errors=0, mean_confidence=0.9, p50_ms=1.0, p95_ms=2.0, predicted={"a": 100},
            monitors=[MonitorState(f"feature_{k}", 1.0, 18.4, False, False) for k in range(20)], replay_rows=0,
            fresh_rows=0, promotions=0, rejections=0, rollbacks=0, labels_lost=0, outbox_dropped=0, rss_mb=80.0,
            written_bytes=0,
        )
    )  # fmt: skip
    store.ingest.write_reports(
        [
            ReportRow(
                *(f"d{i:05}", "s", n, now, now, now - 60, 1, 0, "adapt", 100, 0, 50, 45, 0, 0, 1.0, 2.0), bytes(body)
            )
            for i in range(devices)
            for n in range(each)
        ]
    )


@contextmanager
def serving(registry: Registry) -> Iterator[str]:
    """The web application in a thread, on a port of its own."""
    records, stop = registry.reopen(), threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(records, stopping=stop.is_set)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=3))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        server.should_exit = True
        thread.join()
        records.close()
        listener.close()


def look(browser: Browser, address: str, token: str, path: str) -> dict[str, float]:
    """One page in a context of its own: milliseconds from asking for it, and the size of the document."""
    context = browser.new_context(base_url=address)
    try:
        page = context.new_page()
        page.goto("/login")
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url("**/")
        context.clear_cookies(name="edge_visitor")
        page.goto("about:blank")
        page.add_init_script(_WATCH_MAP)
        page.goto(path, wait_until="load")
        _until(page, "performance.getEntriesByName('first-contentful-paint').length")
        if path == "/":
            _until(page, "window.mapAt")
        timing = page.evaluate("performance.getEntriesByType('navigation')[0].toJSON()")
        found = {
            "server_ms": timing["responseStart"] - timing["requestStart"],
            "painted_ms": page.evaluate(_PAINTED),
            "bytes": timing["decodedBodySize"],
        }
        if path == "/":
            found["map_ms"] = page.evaluate("window.mapAt")
        return found
    finally:
        context.close()


def _until(page: Page, condition: str) -> None:
    """Wait for it; Playwright's own way to do so evaluates text, which the pages' policy forbids."""
    deadline = time.monotonic() + 30
    while not page.evaluate(condition):
        if time.monotonic() > deadline:
            raise TimeoutError(condition)
        page.wait_for_timeout(50)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All pages, in turn, as often as asked."""
    runs: dict[str, list[dict[str, float]]] = {path: [] for path in PAGES}
    loads = []
    with tempfile.TemporaryDirectory() as folder:
        registry = fill(Path(folder), args.devices)
        token = registry.users.add("bench", "viewer", actor="library")
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        with serving(registry) as address, sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
            look(chromium, address, token, "/")  # what is read for the first time comes from the disk
            for _ in range(args.repeats):
                for path in PAGES:
                    loads.append(os.getloadavg()[0])
                    runs[path].append(look(chromium, address, token, path))
            version = chromium.version
            chromium.close()
        registry.close()
    return {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version(),
                    "chromium": version, "edge_sdk": __version__, "load": [min(loads), max(loads)]},
        "devices": args.devices,
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "runs": runs,
    }  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """The result as a page."""
    machine = results["machine"]
    rows = []
    for path, runs in results["runs"].items():
        painted = [entry["painted_ms"] for entry in runs]
        server = statistics.median(entry["server_ms"] for entry in runs)
        met = "yes" if statistics.median(painted) <= TARGET_MS else "**no**"
        rows.append(f"| `{path}` | {runs[0]['bytes'] / 1000:,.0f} kB | {server:,.0f} ms | "
                    f"{statistics.median(painted):,.0f} ms | {max(painted):,.0f} ms | {met} |")  # fmt: skip
    drawn = statistics.median(entry["map_ms"] for entry in results["runs"]["/"])
    expected = "\n".join(f"- `{path}`: {text}" for path, text in EXPECTED.items())
    table = "\n".join(rows)
    return f"""The dashboard of {results["devices"]:,} devices in headless Chromium with nothing in its cache.
Server: until the first byte of the page. Painted: first contentful paint, from asking for the page; median and worst
of {len(results["runs"]["/"])}. The target is {TARGET_MS:,.0f} ms.

| page | size | server | painted | worst | met |
|---|---|---|---|---|---|
{table}

The map of health is drawn after {drawn:,.0f} ms (median).

Expected before measuring:

{expected}

{machine["cpu"]}, {machine["cores"]} cores, Chromium {machine["chromium"]},
Python {machine["python"]}, edge-sdk {machine["edge_sdk"]};
load of the machine during the runs {machine["load"][0]:.1f} to {machine["load"][1]:.1f}.
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(arguments)
    results = run(args)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    text = markdown(results)
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
