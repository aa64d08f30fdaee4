"""What the drift monitors cost, how often they cry wolf, and how soon they see a drift, beside other libraries.

Every number of ours goes through `DriftMonitors`, in blocks of 32 rows as on a device, latents and times included. The
others run in environments of their own (`peers/drift_*.py`), in the same run, on the same rows. Beside every score
stand two dummies: one that never raises an alarm, and one that always does. Run from the root, with nothing else busy:

    make bench-drift

Writes drift.json and drift.md beside this file. Seeds begin at 1000; those below were for tuning the monitors.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import drift_data as data
import numpy as np
from drift_tables import markdown

from edge_sdk import __version__
from edge_sdk.config import DriftConfig
from edge_sdk.drift.features import input_features
from edge_sdk.drift.monitors import DriftMonitors
from edge_sdk.drift.performance import PerformanceMonitor
from edge_sdk.drift.ranks import ranked
from edge_sdk.drift.reference import Reference, output_channels
from edge_sdk.schema import Column, InputSpec

FIRST_SEED = 1000
BLOCK = 32
RUN_LENGTH = 10_000.0
"""Rows in which one false alarm is allowed, to us and to every peer."""
REFERENCE_ROWS = 1000
CLEAR_ROWS = DriftConfig().clear_rows
LABELS = tuple(str(i) for i in range(data.CLASSES))
WINDOWS = (32, 64, 128, 256)
PEERS = ("river", "alibi", "evidently", "whylogs")
RIVER = {
    "ADWIN": [{}, *({"delta": delta} for delta in (2e-4, 2e-5, 2e-6))],
    "PageHinkley": [{}, *({"threshold": threshold} for threshold in (10, 25, 100))],
    "HDDM-W": [{}, *({"drift_confidence": level} for level in (1e-4, 1e-5, 1e-6, 1e-7))],
    "HDDM-A": [{}, *({"drift_confidence": level} for level in (1e-4, 1e-5, 1e-6))],
    "DDM": [{}, {"drift_threshold": 3.5}, {"drift_threshold": 4.0}],
    "EDDM": [{}, {"beta": 0.8}, {"beta": 0.7}],
    "FHDDM": [{}, {"confidence_level": 1e-8}],
    "KSWIN": [{}, {"alpha": 1e-4}],
}
"""Defaults, and settings that ask for stronger evidence."""
Line = dict[str, Any]


class Peer:
    """Another library's worker in its own environment."""

    def __init__(self, name: str, python: str) -> None:
        script = Path(__file__).parent / "peers" / f"drift_{name}.py"
        # they are not to tell their makers that they are used
        quiet = {"WHYLOGS_NO_ANALYTICS": "True", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
        self._name = name
        self._process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, **quiet},
        )  # fmt: skip

    def __call__(self, call: str, **arguments: Any) -> Any:
        """What the worker answers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "it ended"}')
        if "error" in answer:
            raise RuntimeError(f"{self._name}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


class Bench:
    """What all parts need.

    Args:
        peers: Their workers, by name.
        folder: For the files that workers read.
        quick: A smoke test.
    """

    def __init__(self, peers: dict[str, Peer], folder: Path, cache: Path, *, quick: bool) -> None:
        self.peers, self.folder, self.cache, self.quick = peers, folder, cache, quick

    def seeds(self, count: int) -> range:
        """Fresh ones, few of a smoke test."""
        return range(FIRST_SEED, FIRST_SEED + (2 if self.quick else count))

    def file(self, name: str, array: Any) -> str:
        """A file for a worker."""
        path = self.folder / f"{name}.npy"
        np.save(path, array)
        return str(path)


# ---- our monitors


def reference_of(stream: data.Stream, correct: Any = ()) -> Reference:
    """Taken from a stream, latents included."""
    latents = stream.latents if stream.latents.shape[1] else None
    return Reference.build(stream.x, stream.scores, np.asarray(correct, bool), latents=latents)


def monitors_of(reference: Reference, run_length: float = RUN_LENGTH) -> DriftMonitors:
    """With one false alarm allowed in `run_length` rows, all monitors together."""
    return DriftMonitors(reference, LABELS, run_length=run_length, rereference_rows=300)


def fold(monitors: DriftMonitors, block: data.Stream) -> None:
    """One block."""
    latents = block.latents if block.latents.shape[1] else None
    monitors.fold(block.x, block.scores, latents=latents, times=block.times)


def alarms_of(
    monitors: DriftMonitors, stream: data.Stream, start: int | None = None, *, latched: bool = False
) -> list[tuple[int, str]]:
    """Last row of the block and monitor of each alarm.

    Args:
        monitors: Fresh.
        stream: Rows.
        start: The first alarm in a block that ends after this row ends the stream.
        latched: An alarm stays up until the monitors clear it, as on a device, and counts once; else it is taken down
            at once and may come again with the next block.
    """
    found = []
    before: set[str] = set()
    for begin in range(0, len(stream) - BLOCK + 1, BLOCK):
        fold(monitors, stream[begin : begin + BLOCK])
        last = begin + BLOCK - 1
        up = {name for name, detector in monitors.detectors.items() if detector.drift_detected}
        found += [(last, name) for name in sorted(up - before)]
        if up and start is not None and last >= start:
            break
        if latched:
            before = up - set(monitors.clear(CLEAR_ROWS))
        else:
            for name in up:
                monitors.detectors[name].reset()
    return found


def channels_of(monitors: DriftMonitors, stream: data.Stream, *, outputs: bool = True) -> np.ndarray:
    """What our monitors look at, float32 [N, K], for the peers: ranks of features, outputs, latent channels."""
    reference = monitors.reference
    parts = [ranked(input_features(stream.x), reference.edges)[0]]
    if outputs:
        parts.append(output_channels(stream.scores, reference.output_edges, reference.task))
        if reference.latent is not None:
            parts.append(reference.latent.channels(stream.latents))
    return np.concatenate(parts, axis=1).astype(np.float32)


# ---- cost and state


def in_turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each; they take turns, so that a busy moment strikes all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            taken = run()
            if number >= 2:  # the first ones warm up
                times[name].append(taken)
    return {name: float(np.median(taken)) for name, taken in times.items()}


def timed(run: Callable[[], object], repeat: int) -> Callable[[], float]:
    """Seconds of one call, the mean of a few."""

    def measure() -> float:
        begun = time.perf_counter()
        for _ in range(repeat):
            run()
        return (time.perf_counter() - begun) / repeat

    return measure


def cost(bench: Bench) -> Line:
    """Microseconds a row, ours and theirs in turns; and of a whole fold."""
    rng = np.random.default_rng(FIRST_SEED)
    times = data.even_times(4000, 10_000)
    seen = data.healthy("iid", rng, times, features=64)
    plain = reference_of(seen[:2000], np.ones(0))
    monitors = monitors_of(plain)
    blocks = [seen[begin : begin + BLOCK] for begin in range(2000, 4000 - BLOCK, BLOCK)]
    watched, at = monitors.watched, 0
    spec = InputSpec(shape=[64], columns=[Column(f"f{i}") for i in range(64)])
    rows = data.dict_rows(BLOCK, 64)
    checked = np.stack([spec.check(row) for row in rows])

    def block() -> data.Stream:
        nonlocal at
        at = (at + 1) % len(blocks)
        return blocks[at]

    def fold_input(given: data.Stream) -> None:
        features = input_features(given.x)
        ranks, _ = plain.ranker(features)
        watched["input"].fold(ranks, given.times)
        monitors.quality.update(features)

    def fold_outputs(given: data.Stream) -> None:
        watched["output"].fold(output_channels(given.scores, plain.output_edges, plain.task), given.times)

    def fold_latents(given: data.Stream) -> None:
        assert plain.latent is not None
        watched["latent"].fold(plain.latent.channels(given.latents), given.times)

    repeat = 5 if bench.quick else 30
    large = seen[2000 : 2000 + 8 * BLOCK]
    runs = {
        "input": timed(lambda: fold_input(block()), repeat),
        "input 256": timed(lambda: fold_input(large), repeat // 3),
        "output": timed(lambda: fold_outputs(block()), repeat),
        "latent": timed(lambda: fold_latents(block()), repeat),
        "all": timed(lambda: fold(monitors, block()), repeat),
        "check": timed(lambda: [spec.check(row) for row in rows], repeat),
    }
    runs |= peer_costs(bench, seen, plain, checked)
    found = in_turns({name: run for name, run in runs.items() if name != "evidently"}, 3 if bench.quick else 15)
    if "evidently" in runs:
        found |= in_turns({"evidently": runs["evidently"]}, 1)
    whole = ("input", "output", "latent", "all", "check")
    result: Line = {name: 1e6 * s / (BLOCK if name in whole else 1) for name, s in found.items()}
    result["input 256"] /= 8 * BLOCK
    result["fold"] = {name: 1e6 * found[name] for name in ("input", "output", "latent", "all") if name in found}
    return result


def peer_costs(
    bench: Bench, seen: data.Stream, reference: Reference, checked: np.ndarray
) -> dict[str, Callable[[], float]]:
    """Theirs, by name: each gives the seconds that a row took."""
    runs: dict[str, Callable[[], float]] = {}
    if river := bench.peers.get("river"):
        ranks = ranked(input_features(seen.x[2000:2500]), reference.edges)[0]
        for width in (64, 12, 128):
            part = ranks[:, :width] if width <= 64 else np.concatenate([ranks, ranks], axis=1)
            path = bench.file(f"cost-{width}", part)
            runs[f"river {width}"] = lambda path=path: river("cost", rows=path)
    if whylogs := bench.peers.get("whylogs"):
        path = bench.folder / "rows.json"
        path.write_text(json.dumps(data.dict_rows(200, 64)))
        runs["whylogs"] = lambda: whylogs("cost", rows=str(path))
    window, before = bench.file("cost-window", checked), bench.file("cost-before", seen.x[:1000])
    for name in ("alibi", "evidently"):
        if name in bench.peers:
            runs[name] = lambda name=name: bench.peers[name]("cost", rows=window, reference=before)
    return runs


def state(bench: Bench) -> list[Line]:
    """Bytes kept and memory of the process, after more and more rows of 64 features, 12 outputs and a latent."""
    rng = np.random.default_rng(FIRST_SEED)
    seen = data.healthy("iid", rng, data.even_times(REFERENCE_ROWS, 10_000), features=64)
    monitors = monitors_of(reference_of(seen, rng.random(REFERENCE_ROWS) < 0.9), run_length=1e9)
    names = [f"f{i}" for i in range(64)]
    inputs = DriftMonitors(Reference.from_rows(seen.x, names), (), run_length=1e9, rereference_rows=300)
    pool = data.healthy("iid", rng, data.even_times(8192, 10_000), features=64)
    found, done = [], 0
    for rows in (1000, 10_000, 100_000, 1_000_000 // (20 if bench.quick else 1)):
        while done < rows:
            at = done % 8192
            part = pool[at : at + BLOCK]
            later = data.even_times(BLOCK, 10_000) + done * data.DAY / 10_000
            fold(monitors, data.Stream(part.x, part.scores, part.latents, later))
            inputs.fold(part.x, part.scores[:, :0], times=later)
            if done % (BLOCK * 10) == 0:
                fold_labels(monitors, rng.random(BLOCK) < 0.9)
            done += BLOCK
        gc.collect()
        found.append({
            "rows": done, "bytes": len(monitors.to_bytes()), "inputs": len(inputs.to_bytes()),
            "reference": len(monitors.reference.to_bytes()),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        })  # fmt: skip
    if "river" in bench.peers:
        found[-1]["river ADWIN x 64"] = bench.peers["river"]("state", channels=64)
    if "whylogs" in bench.peers:
        found[-1]["whylogs profile"] = bench.peers["whylogs"]("state")
    return found


def fold_labels(monitors: DriftMonitors, right: Any) -> None:
    """Labels that came."""
    monitors.fold_labels(np.asarray(right))


# ---- false alarms


NULLS: dict[str, tuple[str, int, int, float]] = {
    "iid, 12 features": ("iid", 12, 50_000, 10_000),
    "iid, 64 features": ("iid", 64, 50_000, 10_000),
    "AR(1) 0.5, 12 features": ("ar", 12, 50_000, 10_000),
    "AR(1) 0.5, 64 features": ("ar", 64, 50_000, 10_000),
    "seasonal ±0.5 sigma, 12 features": ("season", 12, 100_000, 2_000),
}
"""Kind, features, rows, rows a day."""


def nulls(bench: Bench) -> list[Line]:
    """False alarms in a run length, where nothing drifts."""
    found = []
    for name, (kind, features, most, pace) in NULLS.items():
        rows = most // 5 if bench.quick else most
        seeds = bench.seeds({"iid": 40, "ar": 30, "season": 12}[kind])
        lengths = rows * len(seeds) / RUN_LENGTH
        lines = []
        for latched in (False, True) if kind == "season" else (False,):
            who = "ours, as a device tells them" if latched else "ours, each taken down at once"
            raised = [
                alarm for seed in seeds for alarm in null_alarms(kind, features, rows, pace, seed, latched=latched)
            ]
            by_monitor = {which: sum(monitor == which for _, monitor in raised) for _, which in raised}
            later = sum(row >= 2 * RUN_LENGTH for row, _ in raised)
            lines.append({"null": name, "who": who, "alarms": len(raised), "run_lengths": lengths,
                          "by_monitor": by_monitor, "after two run lengths": later})  # fmt: skip
        lines += [
            {"null": name, "who": "dummy: never", "alarms": 0, "run_lengths": lengths},
            {"null": name, "who": "dummy: always", "alarms": int(lengths * RUN_LENGTH / BLOCK), "run_lengths": lengths},
        ]
        lines += peer_nulls(bench, name, kind, features, min(rows, 10_000), pace)
        print("\n".join(f"{x['null']:34} {x['who']:40} {x['alarms'] / x['run_lengths']:.2f}" for x in lines))
        found += lines
    return found


def null_alarms(kind: str, features: int, rows: int, pace: float, seed: int, *, latched: bool) -> list[tuple[int, str]]:
    """Of one stream with its own reference."""
    rng = np.random.default_rng([seed, features])
    held = data.warmed(kind, rng, REFERENCE_ROWS, features=features, rows_per_day=pace)
    right = rng.random(rows + REFERENCE_ROWS) < 0.9
    monitors = monitors_of(reference_of(held, right[:REFERENCE_ROWS]))
    stream = data.healthy(kind, rng, data.even_times(rows, pace), features=features)
    return alarms_of(monitors, stream, latched=latched) + [
        (row, "accuracy") for row in accuracy_alarms(monitors, right[REFERENCE_ROWS:])
    ]


def accuracy_alarms(monitors: DriftMonitors, right: Any) -> list[int]:
    """Rows of the accuracy monitor's false alarms."""
    detector, found = monitors.detectors["accuracy"], []
    for begin in range(0, len(right), BLOCK):
        fold_labels(monitors, right[begin : begin + BLOCK])
        if detector.drift_detected:
            found.append(begin)
            detector.reset()
    return found


def peer_nulls(bench: Bench, name: str, kind: str, features: int, rows: int, pace: float) -> list[Line]:
    """The same of the peers, on ranks of the features alone: fewer channels than ours have."""
    streams, references = [], []
    for seed in bench.seeds(4):
        rng = np.random.default_rng([seed, features])
        held = data.warmed(kind, rng, REFERENCE_ROWS, features=features, rows_per_day=pace)
        monitors = monitors_of(reference_of(held))
        stream = data.healthy(kind, rng, data.even_times(rows, pace), features=features, outputs=False)
        streams.append(channels_of(monitors, stream, outputs=False))
        references.append(channels_of(monitors, held, outputs=False))
    at, before = bench.file("streams", np.stack(streams)), bench.file("references", np.stack(references))
    lengths = rows * len(streams) / RUN_LENGTH
    found = []
    if "river" in bench.peers:
        for kind_, settings in (("ADWIN", {}), ("ADWIN", {"delta": 2e-6}), ("PageHinkley", {})):
            raised = bench.peers["river"]("alarms", streams=at, kind=kind_, settings=settings)
            found.append((f"river {told(kind_, settings)} x {features}", sum(map(len, raised)), lengths))
    if "alibi" in bench.peers:
        raised = bench.peers["alibi"]("alarms", streams=at, references=before, size=128,
                                      run_length=RUN_LENGTH)  # fmt: skip
        found.append(("KS + Bonferroni, windows of 128", sum(map(len, raised)), lengths))
    if "evidently" in bench.peers:
        few = bench.file("few", np.stack(streams)[:, :2560])
        raised = bench.peers["evidently"]("alarms", streams=few, references=before, size=256, least=0.5)
        part = min(2560, rows) * len(streams) / RUN_LENGTH
        found.append(("evidently, half of the columns", sum(map(len, raised)), part))
        raised = bench.peers["evidently"]("alarms", streams=few, references=before, size=256, least=0)
        found.append(("evidently, any column", sum(map(len, raised)), part))
    return [{"null": name, "who": who, "alarms": count, "run_lengths": over} for who, count, over in found]


def told(kind: str, settings: Line) -> str:
    """A detector and its settings."""
    return f"{kind} {', '.join(f'{k} {v:g}' for k, v in settings.items()) or 'default'}"


# ---- shifts of images

BEFORE, AFTER = 1000, 3000


def shifts(bench: Bench) -> Line:
    """Rows from a shift to the alarm, and false alarms where nothing shifts."""
    found = data.images(bench.cache, quick=bench.quick)
    reference = 100 if bench.quick else REFERENCE_ROWS
    reference = max(200, reference)
    count = SHIFT_SEEDS
    lines: list[Line] = []
    quiet, quiet_alarms = [], 0
    null_rows = 10_000
    for seed in bench.seeds(count):
        held, stream, _ = data.image_stream(found, seed, shift="", before=null_rows, after=0, reference=reference)
        monitors = monitors_of(reference_of(held))
        quiet_alarms += len(alarms_of(monitors, stream))
        quiet.append((channels_of(monitors, held), channels_of(monitors, stream)))
    lengths = len(quiet) * null_rows / RUN_LENGTH
    rate: dict[str, float] = {"ours": quiet_alarms / lengths, "dummy: never": 0, "dummy: always": RUN_LENGTH / BLOCK}
    few = quiet[: 10 if not bench.quick else 2]
    at, before = (bench.file(f"quiet-{i}", np.stack([pair[1 - i] for pair in few])) for i in (0, 1))
    methods = peer_methods(bench)
    for name, ask in methods.items():
        rate[name] = sum(map(len, ask(at, before, None))) / (len(few) * null_rows / RUN_LENGTH)
    for shift, (kind, _) in data.SHIFTS.items():
        delays: dict[str, list[float]] = {"ours": []}
        by_monitor: dict[str, int] = {}
        held_channels, channels, starts = [], [], []
        for seed in bench.seeds(count):
            held, stream, start = data.image_stream(
                found, seed, shift=shift, before=BEFORE, after=AFTER, reference=reference
            )
            monitors = monitors_of(reference_of(held))
            raised = [(row, name) for row, name in alarms_of(monitors, stream, start) if row >= start]
            delays["ours"].append(raised[0][0] - start + 1 if raised else AFTER)
            for name in {name for _, name in raised}:
                by_monitor[name] = by_monitor.get(name, 0) + 1
            held_channels.append(channels_of(monitors, held))
            channels.append(channels_of(monitors, stream)[: BEFORE + AFTER])
            starts.append(start)
        at, before = bench.file("shifted", np.stack(channels)), bench.file("held", np.stack(held_channels))
        for name, ask in methods.items():
            raised_rows = ask(at, before, starts)
            delays[name] = [
                min((row - start + 1 for row in rows if row >= start), default=AFTER)
                for rows, start in zip(raised_rows, starts, strict=True)
            ]
        delays["dummy: never"], delays["dummy: always"] = [float(AFTER)], [BLOCK / 2]
        line = {"shift": shift, "kind": kind, "by_monitor": by_monitor,
                "delay": {name: [float(np.mean(d)), float(np.std(d) / np.sqrt(len(d)))] for name, d in delays.items()},
                "missed": {name: float(np.mean(np.array(d) >= AFTER)) for name, d in delays.items()}}  # fmt: skip
        lines.append(line)
        print(f"{shift:18}", {name: round(d[0]) for name, d in line["delay"].items()}, by_monitor)
    checks = {}
    if "alibi" in bench.peers:
        checks["alibi"] = bench.peers["alibi"]("check", streams=at, references=before, size=128, run_length=RUN_LENGTH)
    if "evidently" in bench.peers:
        checks["evidently"] = bench.peers["evidently"]("check", streams=at, references=before, size=256, count=2)
    return {"data": found.name, "accuracy": found.accuracy, "lines": lines, "rate": rate, "checks": checks,
            "channels": int(channels[0].shape[1]), "seeds": len(bench.seeds(count)),
            "peer_seeds": len(starts)}  # fmt: skip


SHIFT_SEEDS = 20
"""Streams of each shift; the same ones for all, so that none is later by chance."""


def peer_methods(bench: Bench) -> dict[str, Callable[[str, str, list[int] | None], list[list[int]]]]:
    """What is compared on the images, by name: a function of streams, references and where each shifts."""
    methods: dict[str, Callable[[str, str, list[int] | None], list[list[int]]]] = {}
    if alibi := bench.peers.get("alibi"):
        for size in WINDOWS:
            methods[f"KS + Bonferroni, {size}"] = lambda at, before, starts, size=size: alibi(
                "alarms", streams=at, references=before, size=size, run_length=RUN_LENGTH, starts=starts
            )
    if river := bench.peers.get("river"):
        for kind, settings in (("ADWIN", {}), ("ADWIN", {"delta": 2e-5}), ("ADWIN", {"delta": 2e-7}),
                               ("PageHinkley", {}), ("PageHinkley", {"threshold": 15})):  # fmt: skip
            methods[f"river {told(kind, settings)}"] = lambda at, _, starts, kind=kind, settings=settings: river(
                "alarms", streams=at, kind=kind, settings=settings, starts=starts
            )
    if evidently := bench.peers.get("evidently"):
        methods["evidently, half of the columns, 256"] = lambda at, before, starts: evidently(
            "alarms", streams=at, references=before, size=256, least=0.5, starts=starts
        )
    return methods


# ---- concepts

LABEL_DELAY = 500
CONCEPT_AFTER = 4000


def concepts(bench: Bench) -> Line:
    """Rows from a change of concept to the alarm, by labels that come 500 rows late; false alarms without a change."""
    rate: dict[str, list[float]] = {}
    found: list[Line] = []
    ours_quiet = 0
    quiet, changed, starts, names = [], [], [], []
    ours: dict[str, list[float]] = {}
    null_rows = 10_000
    for name in data.CONCEPTS:
        for seed in bench.seeds(12):
            for accuracy, wrong, _ in data.errors(name, seed, before=null_rows, after=0, labelled=REFERENCE_ROWS):
                monitor = accuracy_monitor(accuracy)
                ours_quiet += len(error_alarms(monitor, wrong))
                quiet.append(wrong[:null_rows])
            for accuracy, wrong, start in data.errors(
                name, seed + 10_000, before=BEFORE, after=CONCEPT_AFTER, labelled=REFERENCE_ROWS
            ):
                raised = [row for row in error_alarms(accuracy_monitor(accuracy), wrong, start) if row >= start]
                ours.setdefault(name, []).append(raised[0] - start + 1 if raised else CONCEPT_AFTER)
                changed.append(wrong[: BEFORE + CONCEPT_AFTER])
                starts.append(start)
                names.append(name)
    rate["ours"] = [ours_quiet / len(quiet), len(quiet)]
    rate["dummy: never"], rate["dummy: always"] = [0, len(quiet)], [null_rows, len(quiet)]
    for name, delays in ours.items():
        found.append({"stream": name, "who": "ours", "delay": mean_of(delays, CONCEPT_AFTER)})
        found += [{"stream": name, "who": f"dummy: {which}", "delay": [value + LABEL_DELAY, 0, missed]}
                  for which, value, missed in (("never", CONCEPT_AFTER, 1), ("always", 1, 0))]  # fmt: skip
    if river := bench.peers.get("river"):
        still, moved = np.stack(quiet)[:, :, None], np.stack(changed)[:, :, None]
        for kind, grid in RIVER.items():
            step = 10 if kind == "KSWIN" else 1  # it takes half a millisecond a row
            slow = slice(None, None, step)
            at = bench.file("still", still[slow, : null_rows // step].astype(np.float32))
            then = bench.file("moved", moved[slow].astype(np.float32))
            for settings in grid:
                who = f"river {told(kind, settings)}"
                rows = len(quiet[slow]) * (null_rows // step)
                count = sum(map(len, river("alarms", streams=at, kind=kind, settings=settings)))
                rate[who] = [count * RUN_LENGTH / rows, rows / RUN_LENGTH]
                raised_rows = river("alarms", streams=then, kind=kind, settings=settings, starts=starts[slow])
                for name in data.CONCEPTS:
                    delays = [
                        min((row - start + 1 for row in rows if row >= start), default=CONCEPT_AFTER)
                        for rows, start, of in zip(raised_rows, starts[slow], names[slow], strict=True)
                        if of == name
                    ]
                    found.append({"stream": name, "who": who, "delay": mean_of(delays, CONCEPT_AFTER)})
    return {"lines": found, "rate": rate, "label_delay": LABEL_DELAY}


def mean_of(delays: list[float], most: int) -> list[float]:
    """Mean with the labels' own delay, its standard error, and the share that was missed."""
    d = np.asarray(delays, float)
    return [float(d.mean() + LABEL_DELAY), float(d.std() / np.sqrt(len(d))), float((d >= most).mean())]


def accuracy_monitor(accuracy: float) -> Any:
    """The accuracy monitor alone, with the whole budget."""
    return PerformanceMonitor(accuracy, REFERENCE_ROWS, run_length=RUN_LENGTH)


def error_alarms(detector: Any, wrong: Any, start: int | None = None) -> list[int]:
    """Rows of the alarms of a detector on errors, which a device folds as they come."""
    found, errors = [], wrong[:, None].astype(np.float64)
    for begin in range(0, len(wrong), BLOCK):
        before = detector.state()
        detector.update(errors[begin : begin + BLOCK])
        if not detector.drift_detected:
            continue
        detector.restore(before)
        for row in range(begin, min(begin + BLOCK, len(wrong))):
            detector.update(errors[row : row + 1])
            if detector.drift_detected:
                found.append(row)
                if start is not None and row >= start:
                    return found
                detector.reset()
    return found


# ---- all of it

PARTS: dict[str, Callable[[Bench], Any]] = {
    "cost": cost, "state": state, "shifts": shifts, "concepts": concepts, "nulls": nulls,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=PARTS, help="these parts; others are taken from the last run")
    options.add_argument("--peers", default="", help="interpreter of a peer, {} for its name; without it ours alone")
    options.add_argument("--cache", type=Path, default=Path("build/drift"), help="what has been trained")
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="and .md beside it")
    options.add_argument("--quick", action="store_true", help="a smoke test on digits, two seeds")
    given = options.parse_args(arguments)
    peers = {name: Peer(name, given.peers.format(name)) for name in PEERS if given.peers}
    results: Line = json.loads(given.out.read_text()) if given.only and given.out.exists() else {}
    results["facts"] = {
        "cpu": cpu_name(), "python": platform.python_version(), "numpy": np.__version__, "version": __version__,
        "seeds from": FIRST_SEED, "run length": RUN_LENGTH, "reference rows": REFERENCE_ROWS,
        "peers": peer_versions() if given.peers else {}, "quick": given.quick,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(peers, Path(name), given.cache, quick=given.quick)
        for part in given.only or PARTS:
            begun = time.monotonic()
            results[part] = PARTS[part](bench)
            results.setdefault("minutes", {})[part] = round((time.monotonic() - begun) / 60, 1)
            print(f"---- {part}: {time.monotonic() - begun:.0f} s", flush=True)
            given.out.write_text(json.dumps(results, indent=1) + "\n")
            given.out.with_suffix(".md").write_text(markdown(results))
    for peer in peers.values():
        peer.close()


def peer_versions() -> dict[str, str]:
    """As their requirements say."""
    found = {}
    for name in PEERS:
        lines = (Path(__file__).parent / "peers" / f"drift-{name}-requirements.txt").read_text().splitlines()
        package = {"alibi": "alibi-detect"}.get(name, name)
        found[package] = next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))
    return found


def cpu_name() -> str:
    """As the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
