"""What simulated fleets cost, beside Flower's simulation of as many clients.

Three parts: a hundred devices with three learning jobs each, and Flower's simulation of a hundred clients over three
rounds in the same run; a week of a hundred devices at one prediction a minute; a thousand whole devices in one process.
Run from the root, with nothing else busy:

    make bench-fleet

Writes fleet.json and fleet.md beside this file. What was expected before measuring stands in EXPECTED.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from demo import factory
from edge_sdk import Head, __version__, verify_checkpoint
from edge_sdk.manifest import HEAD_NPZ
from edge_sdk.plan import prepare

RESULT = Path(__file__).with_suffix(".json")
CLIENTS, ROUNDS, ROWS, TICK_S = 100, 3, 300, 1800
EXPECTED = {
    "against Flower": "5 times less wall time and half the memory: a job of the device is 20 ms in place, while Flower"
    " starts Ray with a process for each core and carries the head to and fro for each client",
    "a week": "3 minutes on two free cores with ticks of half an hour: 34,000 turns of 10 ms",
    "a thousand": "1.6 GB: 1.2 MB a device at the start (from a probe of a hundred), most of it the head's session and"
    " SQLite, and less than a MB more",
}
FOUND = [
    (
        "Both sides meet the same 300 samples a client, and learn three times. A device of ours besides opens a "
        "database, installs and verifies a release, predicts and logs each sample, joins its label, folds its "
        "monitors, judges each challenger on rows that neither head has seen, watches it on probation and reports; a "
        "client of Flower takes gradient steps and sends the head. So the comparison favours Flower in what is done, "
        "and us in how it is started: most of Flower's time is Ray's."
    ),
    (
        "Of a device's processor time an eighth is learning; the rest of its job, with files and rows, a twelfth; "
        "gate and promotion an eighth; monitors and diagnosis a fifth; opening it a seventh; taking up each new head a "
        "tenth; logging and joining a sixteenth. No single part is left that would give the factor of five. In runs on "
        "the same machine with much other work, wall times were three to four times as long on both sides, and the "
        "ratio 0.8 to 1.1."
    ),
    (
        "What devices grew by was SQLite: a statement of its own for each size of flush, 128 of them kept for each "
        "connection, took up to 5.6 MB a device. They now have three sizes. Pages in memory are bounded at 32 MB a "
        "process, so that 20 devices grew by 33 MB in 54 hours, most of it those pages."
    ),
]
TARGETS = {
    "against Flower": "5 times less wall time, 2 times less memory",
    "a week": "≤ 300 s on 2 cores",
    "a thousand": "≤ 2,000 MB",
}
DATA = 'data = { source = "digits", labels = ["0", "1", "2", "3", "4", "5", "6", "7"] }\n'
ADAPTING = """
fleet = {{ checkpoint = "{checkpoint}", devices = {devices}, duration_h = 3, tick_s = 1800, predictions_per_h = 100 }}
{data}
drift = [{{ effect = "rotation", size = 30 }}]
[config]
mode = "adapt"
policy = {{ cooldown_s = 60, min_fresh_rows = 25, volume_rows = 25 }}
gate = {{ max_wait_s = 1200, probation_rows = 30 }}
[[cohort]]
name = "device"
label = {{ share = 1.0 }}
"""
WEEK = """
fleet = {{ checkpoint = "{checkpoint}", devices = {devices}, duration_h = {hours}, tick_s = 1800 }}
{data}
config = {{ mode = "adapt", report.interval_s = 3600 }}
[[cohort]]
name = "steady"
label = {{ share = 0.3, delay_h = 2, noise = 0.02 }}
network = {{ online_share = 0.9 }}
[[cohort]]
name = "tilted"
share = 0.2
drift = [{{ effect = "rotation", size = 25, at_h = {drift_h}, course = "incremental", over_h = 24 }}]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", default=".venv-flower/bin/python", help="Python of Flower's environment")
    parser.add_argument("--only", nargs="*", default=["flower", "week", "thousand"])
    parser.add_argument("--week-devices", type=int, default=100)
    parser.add_argument("--thousand-hours", type=float, default=12)
    options = parser.parse_args()
    new: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        factory.release_1(factory.load(seed=0), home / "checkpoint", 0)
        if "flower" in options.only:
            new["ours"] = ours(home)
            new["flower"] = flower(home, options.peer)
        if "week" in options.only:
            new["week"] = simulate(home, WEEK, devices=options.week_devices, hours=168, drift_h=48)
        if "thousand" in options.only:
            hours = options.thousand_hours
            new["thousand"] = {
                **simulate(home, WEEK, "--workers", "1", devices=1_000, hours=hours, drift_h=hours / 3),
                "hours": hours,
            }
    found = (json.loads(RESULT.read_text()) if RESULT.exists() else {}) | new
    found["machine"] = {
        "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
        "edge_sdk": __version__, "load": [round(load, 1) for load in os.getloadavg()],
    }  # fmt: skip
    found["expected"] = EXPECTED
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(table(found))
    print(table(found))


def ours(home: Path) -> dict[str, Any]:
    return simulate(home, ADAPTING, devices=CLIENTS)


def simulate(home: Path, text: str, *options: str, **values: Any) -> dict[str, Any]:
    """One run of `edge simulate`, from its start to its end."""
    scenario, out = home / "scenario.toml", home / "out.json"
    scenario.write_text(text.format(checkpoint=home / "checkpoint", data=DATA, **values))
    command = [sys.executable, "-c", "from edge_sdk.cli import main; main()", "simulate", str(scenario), "--quiet",
               "--json", str(out), *options]  # fmt: skip
    measured = watched(command)
    report = json.loads(out.read_text())
    jobs = [device["learned"] for device in report["devices"]]
    return {
        **measured,
        "devices": len(jobs),
        "workers": report["workers"],
        "predictions": sum(device["predictions"] for device in report["devices"]),
        "fewest_jobs": min(jobs),
        "jobs": sum(jobs),
        "promotions": sum(device["promotions"] for device in report["devices"]),
        "under": mean(report, "under"),
        "after": mean(report, "after"),
    }


def mean(report: dict[str, Any], key: str) -> float | None:
    known = [device[key] for device in report["devices"] if device[key] is not None]
    return float(np.mean(known)) if known else None


def flower(home: Path, python: str) -> dict[str, Any]:
    """Flower over the samples that our devices meet, with the same trunk and head."""
    job = home / "flower"
    job.mkdir()
    scenario = home / "scenario.toml"
    scenario.write_text(ADAPTING.format(checkpoint=home / "checkpoint", data=DATA, devices=CLIENTS))
    prepared = prepare(scenario)
    for number, plan in enumerate(prepared.devices):
        x, y = plan.stream(prepared.world).draw(ROWS, float(TICK_S))
        np.savez(job / f"client-{number}.npz", x=x, y=y)
    manifest = verify_checkpoint(home / "checkpoint")
    shutil.copy(home / "checkpoint" / manifest.model_files["int8"], job / "trunk.onnx")
    head = Head.load(home / "checkpoint" / HEAD_NPZ)
    np.savez(job / "head.npz", w=head.weights["W0"], b=head.weights["b0"])
    (job / "job.json").write_text(
        json.dumps({"clients": CLIENTS, "rounds": ROUNDS, "passes": 24, "scale": float(manifest.latent.scale),
                    "zero_point": int(manifest.latent.zero_point)})
    )  # fmt: skip
    return {**watched([python, str(Path(__file__).parent / "peers" / "flower_peer.py"), str(job)]), "devices": CLIENTS}


def watched(command: list[str]) -> dict[str, Any]:
    """Wall and processor time of a command and all its children, and the most memory that they had together (PSS)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    began, cpu = time.monotonic(), _children_cpu()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak, seen, done = [0.0], dict[int, float](), threading.Event()
    sampler = threading.Thread(target=_sample, args=(process.pid, peak, seen, done.is_set), daemon=True)
    sampler.start()
    _, told = process.communicate()
    took = time.monotonic() - began
    done.set()
    sampler.join()
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}:\n{told[-3000:]}")
    spent = max(_children_cpu() - cpu, sum(seen.values()))  # Ray's processes are nobody's children in the end
    return {"wall_s": round(took, 1), "cpu_s": round(spent, 1), "peak_mb": round(peak[0])}


def _children_cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _sample(pid: int, peak: list[float], seen: dict[int, float], done: Callable[[], bool]) -> None:
    """Most memory of a process and its descendants, and the processor time that each was last seen to have taken."""
    while not done():
        total = 0
        try:
            for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                    seen[process.pid] = sum(process.cpu_times()[:2])
                except psutil.Error:
                    continue
        except psutil.Error:
            return
        peak[0] = max(peak[0], total / 1e6)
        threading.Event().wait(0.5)


def table(found: dict[str, Any]) -> str:
    lines = [
        "# Simulated fleets",
        "",
        (
            f"`make bench-fleet`, {found['machine']['cores']} cores, load {found['machine']['load'][0]} at the end. "
            "Memory: proportional set size of all processes together, at most."
        ),
        "",
        "| run | devices | jobs each, at least | wall, s | CPU, s | memory, MB | target |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = (
        ("three adaptations each", "ours", TARGETS["against Flower"]),
        ("Flower 1.42, three rounds", "flower", ""),
        ("a week, one prediction a minute", "week", TARGETS["a week"]),
        (
            f"a thousand whole devices, {found.get('thousand', {}).get('hours', 0):g} hours, one process",
            "thousand",
            TARGETS["a thousand"],
        ),
    )
    for name, key, target in rows:
        if (row := found.get(key)) is not None:
            jobs = row.get("fewest_jobs", ROUNDS)
            lines.append(f"| {name} | {row['devices']} | {jobs} | {row['wall_s']} | {row['cpu_s']} | {row['peak_mb']} |"
                         f" {target} |")  # fmt: skip
    if "flower" in found and "ours" in found:
        wall, memory = (found["flower"][key] / found["ours"][key] for key in ("wall_s", "peak_mb"))
        told = (
            f"Against Flower: {wall:.1f} times less wall time, {memory:.1f} times less memory. Ours also predicts,"
            " watches for drift, and judges every challenger; Flower's clients only train, and average."
        )
        lines += ["", told]
    for part in FOUND:
        lines += ["", part]
    lines += ["", "Expected before measuring:", ""]
    lines += [f"- {key}: {text}" for key, text in found["expected"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
