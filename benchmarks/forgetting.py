"""What learning on the device forgets: class by class, under drift, stateful and from scratch, and against Avalanche.

    python benchmarks/forgetting.py                                   our own figures
    python benchmarks/forgetting.py --only peers --peers PYTHON       Avalanche's, with the interpreter that has it
    python benchmarks/forgetting.py --only cost                       on a machine with nothing else to do

Writes forgetting.json and forgetting.md beside this file, from all that is in the cache: each run is a line there, and
what is there is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fashion
import numpy as np
import torch
from fashion import CLASSES, LATENT, Factory, Source
from forgetting_tables import markdown

from edge_quantize import widen
from edge_quantize.widen import widened
from edge_sdk import __version__
from edge_sdk.config import LearnConfig
from edge_sdk.errors import DivergedError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.head import Head, Weights, dequantize
from edge_sdk.learn import ewc, hybrid, loss, moments, sgd, slda
from edge_sdk.learn.base import RESULT_JSON, LearnJob, Rows, load_learner
from edge_sdk.learn.ewc import Importance, consolidate, fisher_diagonal, grown_like
from edge_sdk.learn.moments import Moments, fresh_mass
from edge_sdk.manifest import FISHER_NPZ, HEAD_NPZ, MEMORY_NPZ, LatentSpec, verify_checkpoint
from edge_sdk.replay import BalancedBuffer, balanced
from edge_sdk.runtime import OnnxRuntime
from edge_sdk.types import FloatArray, IndexArray, LatentArray

BASE = 6
PEER = Path(__file__).parent / "peers" / "avalanche_peer.py"
SIZES = (50, 200, 500, 1500)
IMAGE_BYTES = 784
WIDTHS = (168, 320, 632)
"""Random features that take, with their moments, somewhat less than Avalanche's 200, 500 and 1500 images."""
BUDGETS = (71_000, 401_000, 1_200_000)
TUNING_SEEDS = (0, 1)
LAMBDAS = (0.0, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6)
STREAMS: dict[str, tuple[str, ...]] = {
    "class-incremental": (),
    "rot30": ("rot30",),
    "darker": ("darker",),
    "noise": ("noise",),
    "rotations": ("rot10", "rot20", "rot30", "rot40", "rot50"),
}
"""What comes after the factory's data: classes 6, 7, 8, 9 one at a time, or drifts of all classes."""
PEER_RUNS = Path("peers") / "runs.jsonl"
PARTS = ("incremental", "drift", "sweep", "cost", "peers")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
Params = dict[str, Any]
Line = dict[str, Any]


# ---- methods


@dataclass(frozen=True)
class Method:
    """A way to learn.

    Attributes:
        learner: One of `edge_sdk.learn`, or "joint": a linear head fitted to all rows at once.
        grid: What is tuned, one knob after the other; ties go to the value that stands first.
        fixed: What makes the method what it is.
        stateless: At every experience it starts from nothing, on all rows so far.
        on_device: The whole grid is searched at every experience, with what a device has.
        features: Width of the layer of random features before the head; 0: there is none.
    """

    learner: str
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    stateless: bool = False
    on_device: bool = False
    features: int = 0

    def config(self, params: Params) -> LearnConfig:
        """The SDK's defaults, but for what the method is and what was tuned."""
        return LearnConfig(learner=self.learner, **{**self.fixed, **params})

    def state_bytes(self, rows: int, params: Params) -> int:
        """What a device keeps beside the head: latents with a byte of label, moments, Fisher information and anchor.

        Numbers of moments, Fisher information and anchor have 4 bytes. The moments of the factory and of the device are
        one sum, unless the device's fade. A layer of random features counts, although it never changes.
        """
        size = rows * (LATENT + 1)
        if self.learner == "joint":
            return 0
        config = self.config(params)
        if config.learner in ("slda", "hybrid") and not self.stateless:
            size += moment_bytes(self.features or LATENT) * (1 if config.decay == 1 else 2)
            size += 4 * (LATENT + 1) * self.features
        if config.learner == "sgd" and config.ewc_lambda:
            size += 8 * (LATENT + 1) * CLASSES
        return size

    def rows_for(self, budget: int) -> int:
        """How many latents fit."""
        return (budget - self.state_bytes(0, {})) // (LATENT + 1)


def moment_bytes(width: int) -> int:
    """What moments of so many features take."""
    return 4 * (width * (width + 1) // 2 + width * (CLASSES + 1) + CLASSES + 2)


_SLOW = {"learning_rate": (0.1, 0.01, 0.3, 1.0), "passes": (6, 1, 24)}
_RATES = {"learning_rate": (1.0, 0.3, 3.0), "passes": (24, 6)}
_EWC = {"ewc_lambda": (10.0, 1.0, 100.0, 1000.0), "consolidation": ("checkpoint", "offline", "online")}
_HYBRID = {"learning_rate": (1.0, 0.3, 3.0, 10.0), "anchor_rows": (50.0, 300.0, 1000.0), "passes": (24, 96)}
METHODS = {
    "joint": Method("joint", {"l2": (1e-4, 1e-5, 1e-3)}),
    "naive": Method("sgd", _SLOW, {"ewc_lambda": 0.0}),
    "ewc": Method("sgd", {**_SLOW, **_EWC}),
    "slda": Method("slda", {}, {"decay": 1.0}),
    "replay": Method("sgd", {**_RATES, "balanced_passes": (0, 6)}, {"ewc_lambda": 0.0}),
    "ewc+replay": Method("sgd", {**_RATES, **_EWC}),
    "hybrid": Method("hybrid", _HYBRID, {"decay": 1.0}),
    "hybrid, defaults": Method("hybrid"),
    **{f"hybrid, {count} random features": Method("hybrid", {}, {"decay": 1.0}, features=count) for count in WIDTHS},
    "ewc, chosen on the device": Method(
        "sgd", {**_RATES, "ewc_lambda": (0.0, 1.0, 10.0, 100.0)}, on_device=True
    ),
    "hybrid, chosen on the device": Method(
        "hybrid", {"learning_rate": (1.0, 0.3, 3.0), "anchor_rows": (50.0, 300.0, 1000.0)}, on_device=True
    ),
    "sgd, from scratch": Method(
        "sgd", {"learning_rate": (1.0, 3.0, 10.0), "passes": (10, 30)}, {"new_per_batch": 64, "ewc_lambda": 0.0},
        stateless=True,
    ),
    "hybrid, from scratch": Method("hybrid", {"learning_rate": (1.0, 3.0), "passes": (24, 6)}, stateless=True),
}  # fmt: skip


def cells(stream: str, *, quick: bool) -> Iterator[tuple[str, int]]:
    """Method and rows in the buffer of all that is measured on a stream."""
    sizes = (50,) if quick else SIZES if stream == "class-incremental" else (50, 500)
    yield from ((name, 0) for name in ("joint", "naive", "ewc", "slda", "hybrid", "hybrid, defaults"))
    yield from itertools.product(("replay", "ewc+replay", "hybrid", "hybrid, defaults"), sizes)
    if stream != "class-incremental":
        yield from ((name, 0) for name in ("ewc, chosen on the device", "hybrid, chosen on the device"))
        return
    for budget, name in itertools.product(() if quick else BUDGETS, ("replay", "hybrid", "hybrid, defaults")):
        if METHODS[name].rows_for(budget) > 0:
            yield name, METHODS[name].rows_for(budget)
    wide = [f"hybrid, {count} random features" for count in WIDTHS[: 1 if quick else None]]
    yield from itertools.product(wide[-1:], (0, *sizes))
    for images, name in () if quick else zip(SIZES[1:], wide, strict=True):  # in as many bytes as Avalanche's images
        yield "hybrid", METHODS["hybrid"].rows_for(images * IMAGE_BYTES)
        yield name, METHODS[name].rows_for(images * IMAGE_BYTES)
    yield from ((name, 0) for name in ("sgd, from scratch", "hybrid, from scratch"))


# ---- streams


@dataclass(frozen=True)
class Labelled:
    """Latents uint8 [N, D], and labels int64 [N]."""

    latents: LatentArray
    y: IndexArray

    def rows(self, weights: FloatArray | None = None) -> Rows:
        """As a learner takes them."""
        return Rows(self.latents, self.y, np.ones(len(self.y), np.float32) if weights is None else weights)


@dataclass(frozen=True)
class Stream:
    """What a device lives through.

    Attributes:
        head: The factory's; `fisher` and `moments` came with it.
        experiences: The factory's own data first.
        columns: What is scored: for each experience its labels, or its drift.
        scored: Rows of each column, of "validation" and of "test".
        grows: Whether experiences bring new labels; a column counts once they have been seen.
    """

    name: str
    seed: int
    factory: Factory
    latent: LatentSpec
    head: Head
    fisher: Weights
    moments: Moments
    experiences: tuple[Labelled, ...]
    columns: tuple[str, ...]
    scored: dict[str, tuple[Labelled, ...]]
    grows: bool

    def labels(self, experience: int) -> list[str]:
        """All that are known once an experience has been seen."""
        return [str(label) for label in range(len(self.head.labels) + self.grows * experience)]

    def row(self, head: Head, experience: int, part: str) -> list[float | None]:
        """A row of the accuracy matrix."""
        counts = experience + 1 if self.grows else len(self.columns)
        right = [float(np.mean(head.predict(dequantize(rows.latents, self.latent)) == rows.y))
                 for rows in self.scored[part][:counts]]  # fmt: skip
        return [*right, *[None] * (len(self.columns) - counts)]

    def accuracy(self, row: Sequence[float | None], part: str) -> float:
        """Over all rows of the columns that count."""
        known = [(value, len(rows.y)) for value, rows in zip(row, self.scored[part], strict=True) if value is not None]
        return sum(value * count for value, count in known) / sum(count for _, count in known)


def picked(name: str, source: Source) -> list[tuple[str, IndexArray, IndexArray]]:
    """Of each experience after the factory's: how its images look, their classes, their places in the stream's pool."""
    if not STREAMS[name]:
        places = np.arange(source.stream)
        return [("original", np.full(len(places), label), places) for label in range(BASE, CLASSES)]
    each, classes = source.stream // CLASSES, np.arange(CLASSES)
    return [(drift, np.repeat(classes, each), np.tile(np.arange(number * each, (number + 1) * each), CLASSES))
            for number, drift in enumerate(STREAMS[name])]  # fmt: skip


def order(seed: int, experience: int, count: int) -> IndexArray:
    """In which the rows of an experience come."""
    return np.random.default_rng([seed, experience]).permutation(count)


@lru_cache(maxsize=6)
def open_stream(name: str, seed: int, source: Source, cache: Path) -> Stream:
    """A stream with its factory model, which is trained if need be."""
    drifts = STREAMS[name]
    classes, made = (CLASSES, tuple(fashion.DRIFTS)) if drifts else (BASE, ("original",))
    factory = fashion.factory(source, cache, classes=classes, seed=seed, drifts=made)
    experiences = [Labelled(factory.latents["factory"], np.repeat(np.arange(classes), source.factory))]
    for number, (drift, labels, places) in enumerate(picked(name, source), 1):
        rows = order(seed, number, len(labels))
        pool = factory.latents[f"stream.{drift}"].reshape(CLASSES, -1, LATENT)
        experiences.append(Labelled(pool[labels, places][rows], labels[rows]))
    scored = {}
    for part, y in (("validation", np.repeat(np.arange(CLASSES), source.validation)), ("test", source.test.y)):
        if drifts:
            groups = [(drift, y >= 0) for drift in ("original", *drifts)]
        else:
            groups = [("original", group) for group in (y < BASE, *(y == label for label in range(BASE, CLASSES)))]
        scored[part] = tuple(Labelled(factory.latents[f"{part}.{drift}"][rows], y[rows]) for drift, rows in groups)
    latent, head = verify_checkpoint(factory.checkpoint).latent, Head.load(factory.checkpoint / HEAD_NPZ)
    known, features = experiences[0], dequantize(experiences[0].latents, latent)
    shipped = Moments.of(features, known.y, np.ones(len(known.y)), head.labels).arrays()
    return Stream(
        name=name, seed=seed, factory=factory, latent=latent, head=head,
        fisher={key: value.astype(np.float32) for key, value in load_npz(factory.checkpoint / FISHER_NPZ).items()},
        moments=Moments.of_arrays(shipped, head.labels), experiences=tuple(experiences),
        columns=("original", *drifts) if drifts else ("0-5", "6", "7", "8", "9"), scored=scored, grows=not drifts,
    )  # fmt: skip


@lru_cache(maxsize=6)
def open_wide(name: str, seed: int, source: Source, cache: Path, features: int) -> Stream:
    """The same stream with a head that was packed with random features."""
    stream = open_stream(name, seed, source, cache)
    features = min(features, len(stream.experiences[0].y) // 4)  # the stand-in has few rows
    known, labels = stream.experiences[0], stream.head.labels
    head = widened(stream.head, known.latents, known.y, latent=stream.latent, task="classification", features=features,
                   seed=seed)  # fmt: skip
    moments = Moments.none(labels, features)
    for part in np.array_split(np.arange(len(known.y)), 16):
        hidden = head.hidden(dequantize(known.latents[part], stream.latent))
        moments += Moments.of(hidden, known.y[part], np.ones(len(part)), labels)
    zeros = {key: np.zeros_like(value) for key, value in head.weights.items()}
    moments = Moments.of_arrays(moments.arrays(), labels)
    return replace(stream, head=head, fisher=zeros, moments=moments)


def opened(method: Method, *where: Any) -> Stream:
    """The stream for a method: with the head that it takes."""
    return open_wide(*where, method.features) if method.features else open_stream(*where)


@lru_cache(maxsize=64)
def replayed(name: str, seed: int, source: Source, cache: Path, rows: int) -> list[Labelled]:
    """What the buffer holds before each experience after the factory's, whose rows fill it at first."""
    first, *others = open_stream(name, seed, source, cache).experiences
    buffer = BalancedBuffer(rows, LATENT, rng=np.random.default_rng(seed))
    known = int(first.y.max()) + 1
    for label, share in enumerate(np.array_split(np.arange(rows), known)):
        for latent in first.latents[first.y == label][: len(share)]:
            buffer.add(latent, label)
    buffer.seen = {label: int(count) for label, count in enumerate(np.bincount(first.y))}
    found = []
    for experience in others:
        found.append(Labelled(buffer.latents, buffer.labels))
        for latent, label in zip(experience.latents, experience.y.tolist(), strict=True):
            buffer.add(latent, label)
    return found


# ---- learning


def first_job(stream: Stream, config: LearnConfig) -> LearnJob:
    """A job without rows, for the factory's labels; what has been learned goes from one job to the next."""
    none = Labelled(np.zeros((0, LATENT), np.uint8), np.zeros(0, np.int64)).rows()
    return LearnJob(
        champion=stream.head, base=stream.head, anchor=stream.head.weights, fisher=stream.fisher, fresh=none,
        replay=none, moments=stream.moments, fresh_mass=none.weights, latent=stream.latent, task="classification",
        config=config, seed=stream.seed,
    )  # fmt: skip


def next_job(job: LearnJob, stream: Stream, experience: int, device: Moments, replay: Labelled) -> LearnJob:
    """The job of an experience, as a device makes it: from the champion, with what the buffer holds."""
    labels, fresh = stream.labels(experience), stream.experiences[experience].rows()
    champion, base, factory = job.champion.grown(labels), stream.head.grown(labels), stream.moments.aligned(labels)
    return replace(
        job, champion=champion, base=base, anchor=grown_like(job.anchor, base.weights),
        fisher=grown_like(job.fisher, base.weights), fresh=fresh, replay=replay.rows(),
        moments=factory + device.aligned(labels),
        fresh_mass=fresh_mass(factory, fresh.targets, fresh.weights, job.task),
    )  # fmt: skip


def scratch_job(job: LearnJob, stream: Stream, experience: int) -> LearnJob:
    """The same from nothing, with all rows that ever came; they weigh so that every label counts alike.

    sgd learns from all of them; hybrid sums up all but the newest anew, and refines on all.
    """
    labels, parts = stream.labels(experience), stream.experiences[: experience + 1]
    nothing = Head({"W0": np.zeros((LATENT, len(labels)), np.float32), "b0": np.zeros(len(labels), np.float32)},
                   tuple(labels))  # fmt: skip
    empty = first_job(stream, job.config)
    job = replace(empty, champion=nothing, base=nothing, anchor=nothing.weights, fisher=nothing.weights)
    old = Labelled(
        np.concatenate([part.latents for part in parts[:-1]]), np.concatenate([part.y for part in parts[:-1]])
    )
    if job.config.learner == "sgd":
        y = np.concatenate([old.y, parts[-1].y])
        weights = (len(y) / len(labels) / np.bincount(y))[y].astype(np.float32)
        fresh = Rows(np.concatenate([old.latents, parts[-1].latents]), y, weights)
        return replace(job, fresh=fresh, moments=Moments.none(labels, LATENT), fresh_mass=weights)
    known = Moments.of(dequantize(old.latents, stream.latent), old.y, np.ones(len(old.y)), labels)
    fresh = parts[-1].rows()
    mass = fresh_mass(known, fresh.targets, fresh.weights, job.task)
    return replace(job, base=stream.head.grown(labels), fresh=fresh, replay=old.rows(), moments=known, fresh_mass=mass)


def chosen_on_device(job: LearnJob, stream: Stream, method: Method) -> Params:
    """Settings by what a device has: it learns from four fifths of the fresh rows, and judges by the others and by the
    labelled latents that came with the checkpoint; the mean of both accuracies decides."""
    memory = load_npz(stream.factory.checkpoint / MEMORY_NPZ)
    held = np.arange(len(job.fresh)) % 5 == 4
    part = replace(job, fresh=job.fresh.take(~held), fresh_mass=job.fresh_mass[~held])
    judges = ((job.fresh.latents[held], job.fresh.targets[held]), (memory["latents"], memory["labels"]))

    def score(params: Params) -> float:
        head, _ = load_learner(method.learner)(replace(part, config=method.config(params)))
        return float(np.mean([np.mean(head.predict(dequantize(x, job.latent)) == y) for x, y in judges]))

    options = [dict(zip(method.grid, values, strict=True)) for values in itertools.product(*method.grid.values())]
    return max(options, key=score)


def joint(stream: Stream, l2: float) -> Head:
    """The ceiling: logistic regression on all rows at once, every label of every experience counting alike."""
    torch.manual_seed(0)
    y = np.concatenate([part.y for part in stream.experiences])
    group = np.concatenate([CLASSES * number + part.y for number, part in enumerate(stream.experiences)])
    features = dequantize(np.concatenate([part.latents for part in stream.experiences]), stream.latent)
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-3
    x, targets = torch.from_numpy((features - mean) / std), torch.from_numpy(y)
    weights = torch.from_numpy((1 / np.bincount(group)[group] / len(np.unique(group))).astype(np.float32))
    w, b = torch.zeros(LATENT, CLASSES, requires_grad=True), torch.zeros(CLASSES, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=100, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = torch.nn.functional.cross_entropy(x @ w + b, targets, reduction="none")
        total = losses @ weights + l2 * (w**2).sum()
        total.backward()
        return total

    optimizer.step(closure)
    found = w.detach().numpy() / std[:, None]
    return Head({"W0": found, "b0": b.detach().numpy() - mean @ found}, tuple(map(str, range(CLASSES))))


def run(stream: Stream, buffers: Sequence[Labelled], method: Method, params: Params, part: str) -> Line:
    """Learn all experiences one after the other; a line of the results."""
    matrix = [stream.row(stream.head, 0, part)]
    line: Line = {"diverged": False, "steps": 0, "samples": 0}
    config = LearnConfig() if method.learner == "joint" else method.config(params)
    device, cpu_s = Moments.none(stream.head.labels, len(stream.moments.x)), 0.0
    job = first_job(stream, config)
    for experience, replay in enumerate(buffers, 1):
        fresh = stream.experiences[experience]
        line["samples"] += len(fresh.y)
        if method.learner == "joint":
            continue
        began = time.process_time()
        job = (scratch_job(job, stream, experience) if method.stateless
               else next_job(job, stream, experience, device, replay))  # fmt: skip
        if method.on_device:
            params = chosen_on_device(job, stream, method)
            line.setdefault("chosen", []).append(params)
            job = replace(job, config=method.config(params))
        try:
            head, result = load_learner(method.learner)(job)
        except DivergedError:
            line["diverged"] = True
            break
        if not method.stateless:
            x = dequantize(fresh.latents, stream.latent)
            if job.config.consolidation != "checkpoint":
                held = consolidate(Importance(job.anchor, job.fisher), head.weights, fisher_diagonal(head, x),
                                   mode=job.config.consolidation, decay=job.config.decay)  # fmt: skip
                job = replace(job, anchor=held.anchor, fisher=held.fisher)
            device = device.aligned(head.labels).faded(job.config.decay)
            device += Moments.of(head.hidden(x), fresh.y, job.fresh_mass, head.labels)
        cpu_s += time.process_time() - began
        line["steps"] += result.steps
        job = replace(job, champion=head)
        matrix.append(stream.row(head, experience, part))
    if method.learner == "joint":
        matrix.append(stream.row(joint(stream, params["l2"]), len(buffers), part))
    return {**line, **scores(matrix, stream, part), "cpu_s": round(cpu_s, 4)}


def scores(matrix: list[list[float | None]], stream: Stream, part: str) -> Line:
    """What the accuracy matrix says, with a row for each experience and the factory's first.

    Source:
        Chaudhry et al. 2018, arXiv:1801.10112 (forgetting); Lopez-Paz & Ranzato 2017, arXiv:1706.08840 (backward
        transfer).
    """
    line: Line = {"matrix": [[None if v is None else round(v, 4) for v in row] for row in matrix],
                  "accuracy": round(stream.accuracy(matrix[-1], part), 4)}  # fmt: skip
    table = np.array(matrix, dtype=float)
    if len(table) == len(stream.columns):
        old = range(len(table) - 1)  # column j is learned in row j; of the last nothing can have been forgotten yet
        line["forgetting"] = round(float(np.mean([table[j:-1, j].max() - table[-1, j] for j in old])), 4)
        line["backward_transfer"] = round(float(np.mean([table[-1, j] - table[j, j] for j in old])), 4)
    return line


# ---- all runs


class Record:
    """Lines of JSON in a file: what stands there is known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        self._lines = {_key(line): line for line in map(json.loads, text.splitlines())}

    def line(self, key: Line, make: Callable[[], Line]) -> Line:
        """The line of this key, made if it is not there."""
        if (name := _key(key)) not in self._lines:
            self._lines[name] = {**key, **make()}
            with self._path.open("a") as file:
                file.write(json.dumps(self._lines[name]) + "\n")
        return self._lines[name]


def _key(line: Line) -> str:
    return json.dumps([line.get(name) for name in KEY])


KEY = ("kind", "stream", "method", "rows", "seed", "params", "code")


def _digest(*parts: Any) -> str:
    text = "".join([*map(inspect.getsource, parts), repr(LearnConfig())])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


_COMMON = (Stream, picked, open_stream)
_DEVICE = (*_COMMON, balanced, moments, ewc, loss, replayed, first_job, next_job, scratch_job, chosen_on_device, run)
CODE = {
    "joint": _digest(*_COMMON, joint),
    "slda": _digest(*_DEVICE, slda),
    "sgd": _digest(*_DEVICE, sgd),
    "hybrid": _digest(*_DEVICE, slda, sgd, hybrid),
    "wide": _digest(*_DEVICE, slda, sgd, hybrid, widen, open_wide),
}
"""Of what the figures of a learner depend on: another version's lines are not taken."""


@dataclass(frozen=True)
class Bench:
    """What is measured with what."""

    source: Source
    cache: Path
    record: Record
    seeds: Sequence[int]
    quick: bool = False

    def line(self, kind: str, stream: str, name: str, rows: int, seed: int, params: Params) -> Line:
        """A run: kind "run" on the test rows, "trial" on the validation rows, "sweep" a run with a strength of EWC."""

        def make() -> Line:
            where = (stream, seed, self.source, self.cache)
            part = "validation" if kind == "trial" else "test"
            return run(opened(METHODS[name], *where), replayed(*where, rows), METHODS[name], params, part)

        code = CODE["wide" if METHODS[name].features else METHODS[name].learner]
        key = (kind, stream, name, rows, seed, params, code)
        return self.record.line(dict(zip(KEY, key, strict=True)), make)

    def tuned(self, stream: str, name: str, rows: int) -> Params:
        """The best settings on the validation rows, one knob after the other."""
        method = METHODS[name]
        seeds = [seed for seed in TUNING_SEEDS if seed in self.seeds] or self.seeds[:1]

        def score(params: Params) -> float:
            lines = [self.line("trial", stream, name, rows, seed, params) for seed in seeds]
            return float(np.mean([0.0 if line["diverged"] else line["accuracy"] for line in lines]))

        if method.on_device or not method.grid:
            return {}
        best = {knob: values[0] for knob, values in method.grid.items()}
        if self.quick:
            return best
        for knob, values in method.grid.items():
            best = max(({**best, knob: value} for value in values), key=score)
        return best

    def stream(self, stream: str) -> list[Line]:
        """All runs on a stream."""
        lines = []
        for name, rows in dict.fromkeys(cells(stream, quick=self.quick)):
            params = self.tuned(stream, name, rows)
            where = (stream, self.seeds[0], self.source, self.cache)
            kept = rows + sum(len(part.y) for part in open_stream(*where).experiences) * METHODS[name].stateless
            size = {"bytes": METHODS[name].state_bytes(kept, params)}
            lines += [self.line("run", stream, name, rows, seed, params) | size for seed in self.seeds]
            accuracy = np.mean([line["accuracy"] for line in lines[-len(self.seeds) :]])
            print(f"{stream:18} {name:28} {rows:6} {accuracy:.4f}  {params}", flush=True)
        return lines

    def sweep(self) -> list[Line]:
        """EWC with strengths that make others diverge."""
        lambdas = LAMBDAS[:: 4 if self.quick else 1]
        cases = itertools.product(("class-incremental", "rot30"), ("ewc", "ewc+replay"), lambdas, self.seeds)
        return [self.line("sweep", stream, name, 500 * (name != "ewc"), seed, {"ewc_lambda": strength})
                for stream, name, strength, seed in cases]  # fmt: skip


# ---- Avalanche


def peer_job(name: str, seed: int, source: Source, cache: Path) -> Path:
    """The same factory weights, rows and order as images, in the format that the peer documents."""
    stream = open_stream(name, seed, source, cache)
    drifts, factory = STREAMS[name], stream.factory
    state = {f"state/{key}": value.numpy() for key, value in torch.load(factory.folder / "net.pt").items()}
    missing = CLASSES - len(state["state/head.bias"])
    state["state/head.weight"] = np.pad(state["state/head.weight"], [(0, missing), (0, 0)])
    state["state/head.bias"] = np.pad(state["state/head.bias"], [(0, missing)], constant_values=-5.0)
    validation = source.train.of(np.concatenate([source.rows(label)[1] for label in range(CLASSES)]))
    arrays = {
        "scenario": np.array("domain-drift" if drifts else "class-incremental"),
        "base_x": source.train.x[factory.train_rows], "base_y": source.train.y[factory.train_rows],
        "val_x": validation.x, "val_y": validation.y, "test_x": source.test.x, "test_y": source.test.y,
    }  # fmt: skip
    for number, (drift, labels, places) in enumerate(picked(name, source), 1):
        pool = fashion.drifted(source.train.x[factory.stream_rows.ravel()], drift, seed=seed)
        rows = order(seed, number, len(labels))
        arrays[f"exp{number}_x"] = pool.reshape(CLASSES, -1, 28, 28)[labels, places][rows]
        arrays[f"exp{number}_y"] = labels[rows]
    for part in ("val", "test") if drifts else ():
        arrays[f"drifted_{part}_x"] = fashion.drifted(arrays[f"{part}_x"], drifts[0], seed=seed)
        arrays[f"drifted_{part}_y"] = arrays[f"{part}_y"]
    path = cache / "peers" / f"{name}-{seed}.npz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(npz_bytes({**arrays, **state}))
    return path


def run_peers(bench: Bench, interpreter: str) -> None:
    """Avalanche on the class-incremental stream and on one drift; it tunes on the first seed's validation rows."""
    options = ["--strategies", "naive", "replay", "--sizes", "0", "50"] if bench.quick else []
    for seed, name in itertools.product(bench.seeds, ("class-incremental", "rot30")):
        job = peer_job(name, seed, bench.source, bench.cache)
        command = [
            interpreter,
            str(PEER),
            "--job",
            str(job),
            "--out",
            str(bench.cache / PEER_RUNS),
            "--seeds",
            str(seed),
        ]
        subprocess.run([*command, *options], check=True, env={**os.environ, **ONE_THREAD})


def peer_lines(bench: Bench) -> list[Line]:
    """Avalanche's runs that are known; some may be missing while another process measures them."""
    path = bench.cache / PEER_RUNS
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
    return [line for line in lines if line["kind"] == "run" and line["seed"] in bench.seeds]


def peer_cost(bench: Bench, interpreter: str) -> Line:
    """Avalanche's replay once more, beside our own costs, with what it was tuned to before."""
    folder, seed = bench.cache / "peers", bench.seeds[0]
    tuned = [line for line in (bench.cache / PEER_RUNS).read_text().splitlines() if json.loads(line)["kind"] == "trial"]
    out = folder / "cost.jsonl"
    out.write_text("\n".join([*tuned, ""]))
    job = peer_job("class-incremental", seed, bench.source, bench.cache)
    size = 50 if bench.quick else 500
    command = [interpreter, str(PEER), "--job", str(job), "--out", str(out), "--seeds", str(seed),
               "--strategies", "replay", "--sizes", str(size)]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, **ONE_THREAD})
    line = json.loads(out.read_text().splitlines()[-1])
    kept = ("strategy", "mem_size", "params", "ms_per_step", "peak_rss_mb")
    return {"ms_per_sample": 1e3 * line["cpu_s_per_sample"], **{name: line[name] for name in kept}}


# ---- costs


def cost(bench: Bench, interpreter: str) -> Line:
    """CPU time and memory, of the class-incremental stream of the first seed."""
    where = ("class-incremental", bench.seeds[0], bench.source, bench.cache)
    load = os.getloadavg()[0]
    repeats = 3 if bench.quick else 5
    learners: list[Line] = []
    for name, rows in cells("class-incremental", quick=bench.quick):
        if METHODS[name].learner == "joint" or METHODS[name].stateless:
            continue
        params, buffers = bench.tuned("class-incremental", name, rows), replayed(*where, rows)
        stream = opened(METHODS[name], *where)
        learned = [run(stream, buffers, METHODS[name], params, "test") for _ in range(repeats)]
        upkeep = [cpu_s(lambda rows=rows: replayed.__wrapped__(*where, rows)) for _ in range(3)] if rows else [0.0]
        samples, steps = learned[0]["samples"], learned[0]["steps"]
        learn_s = float(np.median([line["cpu_s"] for line in learned]))
        learners.append({
            "method": name, "rows": rows, "ms_per_sample": 1e3 * (learn_s + min(upkeep)) / samples,
            "ms_per_step": 1e3 * learn_s / steps if steps else None,
            **worker(stream, buffers, METHODS[name], params, bench.cache),
        })  # fmt: skip
        print("cost", learners[-1], flush=True)
    trunk = OnnxRuntime(open_stream(*where).factory.checkpoint)
    images = fashion.scaled(bench.source.test.x[:500])
    trunk.latents(images[:1])
    encode = [cpu_s(lambda: [trunk.latents(images[i : i + 1]) for i in range(len(images))]) for _ in range(repeats)]
    return {
        **({"avalanche": peer_cost(bench, interpreter)} if interpreter else {}),
        "learners": learners,
        "encode_ms": 1e3 * float(np.median(encode)) / len(images),
        "head_step_ms": head_step(),
        "load": round(load, 1),
        "cores": os.cpu_count(),
    }


def cpu_s(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def head_step() -> float:
    """Milliseconds of one step of the head, batch 64 of 8 fresh and 56 replayed rows, with EWC; median of many."""
    rng = np.random.default_rng(0)
    head = Head({"W0": rng.normal(0, 0.1, (LATENT, CLASSES)).astype(np.float32), "b0": np.zeros(CLASSES, np.float32)},
                tuple(map(str, range(CLASSES))))  # fmt: skip
    latents, y = rng.integers(0, 256, (1000, LATENT), dtype=np.uint8), rng.integers(0, CLASSES, 1000)
    rows, config = Labelled(latents, y).rows(), LearnConfig(learner="sgd", passes=4)
    zeros = {key: np.zeros_like(value) for key, value in head.weights.items()}
    job = LearnJob(champion=head, base=head, anchor=head.weights, fisher=zeros, fresh=rows, replay=rows,
                   moments=Moments.none(head.labels, LATENT), fresh_mass=rows.weights,
                   latent=LatentSpec(dim=LATENT, scale=0.01, zero_point=0), task="classification", config=config,
                   seed=0)  # fmt: skip
    results = [load_learner("sgd")(job)[1] for _ in range(9)]
    return float(np.median([1e3 * result.seconds / result.steps for result in results]))


LAUNCHER = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)"""
"""A child's peak RSS starts at that of the process that started it, so that one must be small."""


def worker(stream: Stream, buffers: Sequence[Labelled], method: Method, params: Params, cache: Path) -> Line:
    """The last experience's job in the learner's own process: all its CPU time, from start to end, and its peak RSS."""
    folder, last = cache / "job", len(buffers)
    folder.mkdir(exist_ok=True)
    device = Moments.none(stream.labels(last), len(stream.moments.x))
    job = next_job(first_job(stream, method.config(params)), stream, last, device, buffers[-1])
    job.save(folder)
    command = [sys.executable, "-c", LAUNCHER, sys.executable, "-m", "edge_sdk.learn.worker", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
    result, (process_s, peak_kb) = json.loads((folder / RESULT_JSON).read_text()), map(float, done.stdout.split())
    if result["error"]:
        raise RuntimeError(f"the learner failed: {result['error']}")
    return {"worker_rss_mb": peak_kb / 1024, "worker_ms_per_sample": 1e3 * process_s / len(job.fresh)}


# ---- the whole


def part(bench: Bench, name: str, interpreter: str) -> Any:
    """One part of the results."""
    match name:
        case "incremental":
            return bench.stream("class-incremental")
        case "drift":
            streams = [stream for stream, drifts in STREAMS.items() if drifts]
            return [line for stream in streams[: 1 if bench.quick else None] for line in bench.stream(stream)]
        case "sweep":
            return bench.sweep()
        case _:
            return cost(bench, interpreter)


def facts(bench: Bench) -> Line:
    """What the figures were measured with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = {name: version(name) for name in ("numpy", "onnxruntime", "torch")}
    return {"source": bench.source.name, "seeds": list(bench.seeds), "edge_sdk": __version__, "cpu": cpu,
            "python": platform.python_version(), **packages}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write what is known."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=PARTS, help="these parts; without it all but Avalanche's")
    options.add_argument("--peers", metavar="PYTHON", default="", help="interpreter that has Avalanche: also its part")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    options.add_argument("--cache", type=Path, default=Path("build/forgetting"), help="what has been computed")
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="and .md beside it")
    options.add_argument("--quick", action="store_true", help="few sizes and strengths, two streams, for a smoke test")
    options.add_argument("--digits", action="store_true", help="the stand-in, even if Fashion-MNIST is there")
    given = options.parse_args(arguments)
    source = fashion.load(digits=given.digits)
    cache = given.cache / ("digits" if "digits" in source.name else "fashion")
    bench = Bench(source, cache, Record(cache / "runs.jsonl"), given.seeds, given.quick)
    wanted = given.only or [name for name in PARTS if name != "peers" or given.peers]
    if "peers" in wanted and not given.peers:
        options.error("--only peers needs --peers PYTHON")
    if "peers" in wanted:
        run_peers(bench, given.peers)
    for name in wanted:
        if name == "peers":
            continue
        (cache / f"{name}.json").write_text(json.dumps(part(bench, name, given.peers)))
    known = {name: json.loads(path.read_text()) for name in PARTS if (path := cache / f"{name}.json").exists()}
    if found := peer_lines(bench):
        known["peers"] = found
    results = {"facts": facts(bench), **known}
    given.out.write_text(lines_of(results))
    given.out.with_suffix(".md").write_text(markdown(results))


def lines_of(results: Line) -> str:
    """As JSON, with a line for each run."""
    parts = []
    for name, value in results.items():
        rows = ",\n".join(f"  {json.dumps(row)}" for row in value) if isinstance(value, list) else ""
        parts.append(f"{json.dumps(name)}: " + (f"[\n{rows}\n ]" if rows else json.dumps(value)))
    return "{" + ",\n ".join(parts) + "}\n"


if __name__ == "__main__":
    main()
