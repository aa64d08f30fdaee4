"""What the drift benchmark shows the monitors: streams without and with drift, all drawn from a seed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import fashion
import numpy as np
import torch

from edge_sdk import streams
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.types import AnyArray, FloatArray

DAY = 86_400.0
CLASSES = 10
LATENT = 128
BEGIN = 1_700_006_400.0
"""Midnight, in seconds since the epoch."""


@dataclass(frozen=True)
class Stream:
    """Predictions as a device logs them, oldest first.

    Attributes:
        x: float32 [N, ...].
        scores: float32 [N, C].
        latents: uint8 [N, 128].
        times: float64 [N], seconds since the epoch.
    """

    x: FloatArray
    scores: FloatArray
    latents: AnyArray
    times: AnyArray

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | AnyArray) -> Stream:
        return Stream(self.x[rows], self.scores[rows], self.latents[rows], self.times[rows])


def even_times(rows: int, rows_per_day: float) -> AnyArray:
    """Rows at a steady pace."""
    return BEGIN + np.arange(rows) * DAY / rows_per_day


# ---- healthy devices


def healthy(kind: str, rng: np.random.Generator, times: AnyArray, *, features: int, outputs: bool = True) -> Stream:
    """Rows in which nothing drifts.

    A quarter each of the columns is normal, lognormal, counts with many ties, and one in ten; columns hang together by
    a common factor. Scores are of 10 classes, latents rectified mixtures of 16 factors.

    Args:
        kind: "iid"; "ar": each row remembers half of the one before; "season": all moves by ±0.5 of a standard
            deviation over the day, each column with its own phase.
        rng: Source of chance.
        times: float64 [N].
        features: Columns of x.
        outputs: Whether scores and latents are wanted; else they are empty.
    """
    count = len(times)
    width = features + 1 + ((CLASSES + 16) if outputs else 0)
    z = rng.standard_normal((count, width), dtype=np.float32)
    if kind == "ar":
        from scipy.signal import lfilter  # noqa: PLC0415 - with scikit-learn

        z = lfilter([np.sqrt(0.75)], [1, -0.5], z, axis=0).astype(np.float32)
    if kind == "season":
        phases = np.arange(width) * 2.4
        z += (0.5 * np.sin(2 * np.pi * times[:, None] / DAY + phases)).astype(np.float32)
    common = z[:, :1]
    x = z[:, 1 : features + 1].copy()
    x[:, ::2] = 0.6 * common + 0.8 * x[:, ::2]
    x[:, 1::4] = np.exp(x[:, 1::4])
    x[:, 2::4] = np.floor(np.exp(x[:, 2::4]))
    x[:, 3::4] = x[:, 3::4] > 1.2816
    if not outputs:
        return Stream(x, np.zeros((count, 0), np.float32), np.zeros((count, 0), np.uint8), times)
    logits = 2 * z[:, features + 1 : features + 1 + CLASSES]
    logits[:, :1] += common
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    mixing = np.random.default_rng(5).normal(0, 0.25, (16, LATENT)).astype(np.float32)
    latents = np.clip(z[:, -16:] @ mixing * 60, 0, 255).astype(np.uint8)
    return Stream(x, e / e.sum(axis=1, keepdims=True), latents, times)


def warmed(kind: str, rng: np.random.Generator, rows: int, *, features: int, rows_per_day: float) -> Stream:
    """What a reference is taken from: rows of the two weeks before, one after the other if they hang together."""
    if kind == "season":
        times = np.sort(BEGIN - rng.random(rows) * 14 * DAY)
    else:
        times = even_times(rows, rows_per_day) - 14 * DAY
    return healthy(kind, rng, times, features=features)


# ---- images


def contrast(factor: float) -> streams.Transform:
    """Towards the mean of each image."""

    def change(x: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG001
        mean = x.mean(axis=(1, 2, 3), keepdims=True)
        return (mean + factor * (x - mean)).astype(np.float32)

    return change


def occlusion(size: int) -> streams.Transform:
    """A black square in the middle of the right edge."""

    def change(x: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG001
        x = x.copy()
        top = (x.shape[2] - size) // 2
        x[:, :, top : top + size, -size:] = 0
        return x

    return change


SHIFTS: dict[str, tuple[str, streams.Transform]] = {
    "noise .05": ("noise", streams.noise(0.05)),
    "noise .1": ("noise", streams.noise(0.1)),
    "noise .3": ("noise", streams.noise(0.3)),
    "rotation 5": ("rotation", streams.rotation(5)),
    "rotation 15": ("rotation", streams.rotation(15)),
    "brightness -20 %": ("brightness", streams.darkening(0.8)),
    "contrast -30 %": ("contrast", contrast(0.7)),
    "occlusion 8 x 8": ("occlusion", occlusion(8)),
    "class prior": ("prior", streams.unchanged),
}
"""Name: kind and transform. The issue's are the first seven; "class prior" doubles half of the classes."""


@dataclass(frozen=True)
class Images:
    """The test images of Fashion-MNIST as a device sees them, under each shift.

    Attributes:
        name: Of the data.
        y: int64 [N].
        accuracy: Of the model on them.
        seen: Rows as logged, by shift; "" for none.
        scale: Of the latents.
    """

    name: str
    y: AnyArray
    accuracy: float
    seen: dict[str, Stream]
    scale: float


def images(cache: Path, *, quick: bool) -> Images:
    """A model trained on some of the training images, and what it says of the test images; kept in `cache`."""
    source = fashion.load(digits=quick)
    rows, epochs = (1000, 2) if quick else (12_000, 4)
    shifts = list(SHIFTS)
    made_from = [
        source.name,
        rows,
        epochs,
        shifts,
        inspect.getsource(fashion.train),
        inspect.getsource(inspect.getmodule(contrast) or contrast),
    ]
    digest = hashlib.sha256(repr(made_from).encode()).hexdigest()[:12]
    path = cache / f"images-{digest}.npz"
    if not path.exists():
        net = fashion.train(source.train.of(np.arange(min(rows, len(source.train.y)))), CLASSES, seed=0, epochs=epochs)
        cache.mkdir(parents=True, exist_ok=True)
        path.write_bytes(npz_bytes(_seen(net, source)))
    arrays = load_npz(path)
    seen = {
        name: Stream(
            arrays[f"x.{name}"], arrays[f"scores.{name}"], arrays[f"latents.{name}"], np.zeros(len(arrays["y"]))
        )
        for name in ("", *shifts)
    }
    right = seen[""].scores.argmax(axis=1) == arrays["y"]
    return Images(source.name, arrays["y"], float(right.mean()), seen, float(arrays["scale"]))


def _seen(net: torch.nn.Module, source: fashion.Source) -> dict[str, AnyArray]:
    with torch.no_grad():
        some = net.trunk(torch.from_numpy(fashion.scaled(source.train.x[:1000]))).numpy()
    scale = float(np.quantile(some, 0.9999)) / 255
    found: dict[str, AnyArray] = {"y": source.test.y, "scale": np.array(scale)}
    for name, transform in {"": streams.unchanged, **{name: pair[1] for name, pair in SHIFTS.items()}}.items():
        x = transform(fashion.scaled(source.test.x), np.random.default_rng(7))
        x = (np.round(x * 255) / 255).astype(np.float32)
        parts = []
        with torch.no_grad():
            for part in torch.from_numpy(x).split(1000):
                latents = np.clip(np.round(net.trunk(part).numpy() / scale), 0, 255).astype(np.uint8)
                scores = torch.softmax(
                    net.head(torch.from_numpy(latents.astype(np.float32) * np.float32(scale))), dim=1
                )
                parts.append((latents, scores.numpy()))
        found[f"x.{name}"] = x[:, 0]
        found[f"latents.{name}"], found[f"scores.{name}"] = (np.concatenate(p) for p in zip(*parts, strict=True))
    return found


def image_stream(
    found: Images, seed: int, *, shift: str, before: int, after: int, reference: int
) -> tuple[Stream, Stream, int]:
    """Reference rows, a stream of other rows, drawn with replacement, and the row at which it shifts.

    The shift begins at any place within a block.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(found.y))
    held, pool = order[:reference], order[reference:]
    start = before + int(rng.integers(32)) if after else before
    first = found.seen[""][rng.choice(pool, start)]
    chosen = rng.choice(pool, after)
    if shift == "class prior" and after:
        favoured = rng.permutation(CLASSES)[: CLASSES // 2]
        weights = np.where(np.isin(found.y[pool], favoured), 2.0, 0.5)
        chosen = rng.choice(pool, after, p=weights / weights.sum())
    second = found.seen[shift if after else ""][chosen]
    joined = Stream(*(np.concatenate([getattr(first, name), getattr(second, name)])
                      for name in ("x", "scores", "latents", "times")))  # fmt: skip
    return found.seen[""][held], replace(joined, times=even_times(len(joined), 10_000)), start


# ---- concepts


def sea(theta: float) -> Callable[[FloatArray], AnyArray]:
    """x0 + x1 <= theta, of three numbers in 0..10 (Street & Kim 2001)."""
    return lambda x: 10 * (x[:, 0] + x[:, 1]) <= theta


STAGGER: list[Callable[[FloatArray], AnyArray]] = [
    lambda x: (np.floor(3 * x[:, 0]) == 0) & (np.floor(3 * x[:, 1]) == 0),
    lambda x: (np.floor(3 * x[:, 1]) == 1) | (np.floor(3 * x[:, 2]) == 1),
    lambda x: np.floor(3 * x[:, 0]) >= 1,
]
"""Size small and colour red; colour green or shape circular; size medium or large (Schlimmer & Granger 1986)."""
SINE: list[Callable[[FloatArray], AnyArray]] = [
    lambda x: x[:, 1] < np.sin(x[:, 0]),
    lambda x: x[:, 1] >= np.sin(x[:, 0]),
    lambda x: x[:, 1] < 0.5 + 0.3 * np.sin(3 * np.pi * x[:, 0]),
    lambda x: x[:, 1] >= 0.5 + 0.3 * np.sin(3 * np.pi * x[:, 0]),
]
"""Gama et al. 2004."""
CONCEPTS: dict[str, list[Callable[[FloatArray], AnyArray]]] = {
    "SEA": [sea(8), sea(9), sea(7), sea(9.5)],
    "STAGGER": STAGGER,
    "Sine": SINE,
}
NOISE = 0.1


def errors(name: str, seed: int, *, before: int, after: int, labelled: int) -> Iterator[tuple[float, AnyArray, int]]:
    """For each pair of concepts that follow each other: accuracy on `labelled` rows, errors bool [N], its row.

    A tree is trained on 1000 rows of the first concept; one label in ten is wrong. The change begins at any place
    within a block.
    """
    from sklearn.tree import DecisionTreeClassifier  # noqa: PLC0415

    concepts = CONCEPTS[name]
    for i, (old, new) in enumerate(pairwise(concepts)):
        rng = np.random.default_rng([seed, i])

        def rows(count: int, concept: Callable[[FloatArray], AnyArray]) -> tuple[AnyArray, AnyArray]:
            x = rng.random((count, 3))  # noqa: B023 - used at once
            return x, concept(x) ^ (rng.random(count) < NOISE)  # noqa: B023

        start = before + int(rng.integers(32)) if after else before
        tree = DecisionTreeClassifier(max_depth=6, min_samples_leaf=10, random_state=0).fit(*rows(1000, old))
        parts = [rows(count, concept) for count, concept in ((labelled, old), (start, old), (after, new)) if count]
        wrong = [tree.predict(x) != y for x, y in parts]
        yield float(1 - wrong[0].mean()), np.concatenate(wrong[1:]), start


def dict_rows(count: int, features: int) -> list[dict[str, Any]]:
    """Rows as an app that logs dictionaries has them."""
    x = np.random.default_rng(0).random((count, features))
    return [{f"f{i}": float(value) for i, value in enumerate(row)} for row in x]
