"""What the monitors compare with: how inputs, outputs, latents and accuracy looked when all was well."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_sdk.drift.estimate import fit_confidence
from edge_sdk.drift.features import OUTPUT_SUMMARY, input_features, names_of
from edge_sdk.drift.latent import MAX_DIM, LatentChannels
from edge_sdk.drift.ranks import Ranker, rank_channels, ranker_of, with_spread
from edge_sdk.drift.steps import LEVELS, cuts_of, levels_of
from edge_sdk.errors import IntegrityError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.stats import entropy
from edge_sdk.types import AnyArray, DoubleArray, FloatArray, LatentArray, Task

BINS = 64
MIN_ROWS = 200
ENOUGH_ROWS = 1000
"""With fewer, a reference is used but not sharp: see `Reference.caveat`."""
MAX_CLASSES = 64
MAX_CATEGORIES = 64
_WITH_PROBABILITIES: tuple[Task, ...] = ("classification", "multilabel")
_LOSS_QUANTILE = 0.95


@dataclass(frozen=True)
class Reference:
    """Channels in [0, 1] and their means, and what the raw features were like.

    F features, K output channels, R latent channels, C classes. What is optional is empty if it is not there.

    Attributes:
        task: What the outputs mean.
        names: Of the features.
        edges: float32 [F, 63]: quantiles of each input feature, which turn a value into its rank; of values that were
            not missing.
        input_mean: float64 [F]: mean rank of each feature; near 0.5, less where values are missing or repeat.
        input_std: float64 [F].
        spread_mean: float64 [F]: mean distance of the ranks from the middle, see `ranks.with_spread`.
        spread_std: float64 [F].
        feature_mean: float32 [F], in the feature's own unit, as the next three.
        feature_std: float32 [F].
        low: float32 [F]: least value seen; NaN of a feature that was always missing.
        high: float32 [F].
        missing: float32 [F]: share of rows in which it was missing.
        repeats: float32 [F]: share of rows in which it was the same as in the row before; NaN: rows have no order.
        values: float32 [F, V]: all that a categorical feature may be, then NaN; NaN alone for any other.
        output_edges: float32 [K, 63]: the same of each output that is no probability; [0, 63] otherwise.
        output_mean: float64 [K]: of the channels that `output_names` names.
        output_std: float64 [K].
        accuracy: Share of right labels on rows held out.
        rows: How many rows inputs and outputs were taken from.
        labelled: How many rows the accuracy was taken from.
        latent: Turns latents into channels; None: they are not watched.
        latent_mean: float64 [R].
        latent_std: float64 [R].
        class_share: float32 [C]: how often each class was predicted.
        class_means: float32 [C, F + K + R]: mean of the input, output and latent channels where it was.
        confidence_table: float32 [2, T]: of `estimate.estimate`.
        input_levels: float16 [F, 31]: how the ranks are distributed, `steps.levels_of`.
        output_cuts: float32 [K, 31]: quantiles of the output channels, many of which crowd at 0 and 1; `steps.cuts_of`.
        output_levels: float16 [K, 31]: how the output channels are distributed over these.
        loss_scale: 0.95 quantile of a regression's loss; NaN otherwise.
        loss_mean: Mean of that loss, clipped at the scale and divided by it; NaN otherwise.
    """

    task: Task
    names: tuple[str, ...]
    edges: FloatArray
    input_mean: DoubleArray
    input_std: DoubleArray
    spread_mean: DoubleArray
    spread_std: DoubleArray
    feature_mean: FloatArray
    feature_std: FloatArray
    low: FloatArray
    high: FloatArray
    missing: FloatArray
    repeats: FloatArray
    values: FloatArray
    output_edges: FloatArray
    output_mean: DoubleArray
    output_std: DoubleArray
    accuracy: float
    rows: int
    labelled: int
    latent: LatentChannels | None = None
    latent_mean: DoubleArray = field(default_factory=lambda: np.zeros(0))
    latent_std: DoubleArray = field(default_factory=lambda: np.zeros(0))
    class_share: FloatArray = field(default_factory=lambda: np.zeros(0, np.float32))
    class_means: FloatArray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    confidence_table: FloatArray = field(default_factory=lambda: np.zeros((2, 0), np.float32))
    input_levels: AnyArray = field(default_factory=lambda: np.zeros((0, LEVELS), np.float16))
    output_cuts: FloatArray = field(default_factory=lambda: np.zeros((0, LEVELS), np.float32))
    output_levels: AnyArray = field(default_factory=lambda: np.zeros((0, LEVELS), np.float16))
    loss_scale: float = float("nan")
    loss_mean: float = float("nan")

    @classmethod
    def build(
        cls,
        x: FloatArray,
        scores: FloatArray,
        correct: AnyArray,
        *,
        task: Task = "classification",
        names: Sequence[str] | None = None,
        latents: LatentArray | None = None,
        losses: AnyArray | None = None,
        categories: Mapping[str, Sequence[float]] | None = None,
        ordered: bool = False,
    ) -> Reference:
        """Take the reference from rows that were not trained on.

        Args:
            x: float32 [N, ...], thumbnails of checked inputs before preprocessing.
            scores: float32 [N, C], what the served model says of them: probabilities, values, or output summaries.
            correct: bool [M], whether the answer was right, for the rows whose truth is known; M = N allows to
                estimate the accuracy from confidences.
            task: What the scores are.
            names: Of the features, from `feature_names`; numbered if None.
            latents: uint8 [N, D], what the trunk put out; None: the latent is not watched.
            losses: float [M], of a regression's answers, >= 0.
            categories: The codes that a feature may be, by its name; a longer list than 64 is not kept.
            ordered: Whether the rows are in the order of time.

        Raises:
            ValueError: Fewer than 200 rows, with which the monitors would take chance for drift; or names, latents or
                losses do not fit the rest.
        """
        features = input_features(x)
        inputs = _described(features, names or names_of(x.shape[1:]), categories or {}, ordered=ordered)
        output_edges = np.zeros((0, BINS - 1), np.float32) if task in _WITH_PROBABILITIES else _edges(scores)
        ranks, outputs = rank_channels(features, inputs["edges"]), output_channels(scores, output_edges, task)
        optional: dict[str, Any] = {}
        channels = [ranks, outputs]
        if latents is not None and latents.shape[1] <= MAX_DIM:
            latent = LatentChannels.build(latents)
            channels.append(seen := latent.channels(latents))
            optional |= {"latent": latent, "latent_mean": seen.mean(axis=0), "latent_std": seen.std(axis=0)}
        if task == "classification" and 2 <= scores.shape[1] <= MAX_CLASSES:
            optional |= _by_class(np.concatenate(channels, axis=1), scores)
        if task in _WITH_PROBABILITIES and len(correct) == len(scores):
            optional["confidence_table"] = fit_confidence(outputs[:, 0], correct)
        if losses is not None and len(losses):
            scale = optional["loss_scale"] = float(np.quantile(losses, _LOSS_QUANTILE))
            shares = np.minimum(losses, scale) / scale if scale > 0 else losses > 0
            optional["loss_mean"] = float(np.mean(shares))
        return cls(
            **inputs,
            task=task,
            output_edges=output_edges,
            output_mean=outputs.mean(axis=0),
            output_std=outputs.std(axis=0),
            output_cuts=(cuts := cuts_of(outputs)),
            output_levels=levels_of(outputs, cuts),
            accuracy=float(np.mean(correct)) if len(correct) else float("nan"),
            labelled=len(correct),
            **optional,
        )

    @classmethod
    def from_rows(
        cls,
        features: FloatArray,
        names: Sequence[str],
        *,
        categories: Mapping[str, Sequence[float]] | None = None,
        ordered: bool = True,
    ) -> Reference:
        """A reference of inputs alone, as from a table: there is no model, so outputs and accuracy are not watched.

        Args:
            features: float32 [N, F], F <= 64; NaN: missing.
            names: Of the columns.
            categories: As in `build`.
            ordered: As in `build`.

        Raises:
            ValueError: As in `build`.
        """
        return cls(
            **_described(np.asarray(features, np.float32), names, categories or {}, ordered=ordered),
            task="raw",
            output_edges=np.zeros((0, BINS - 1), np.float32),
            output_mean=np.zeros(0),
            output_std=np.zeros(0),
            accuracy=float("nan"),
            labelled=0,
        )

    @cached_property
    def digest(self) -> str:
        """Names the features and edges: only what was counted by the same ones can be added up."""
        what = hashlib.sha256("\n".join(self.names).encode())
        what.update(np.ascontiguousarray(self.edges, "<f4").tobytes())
        return what.hexdigest()[:16]

    @cached_property
    def ranker(self) -> Ranker:
        """Turns input features into ranks."""
        return ranker_of(self.edges)

    @property
    def caveat(self) -> str:
        """Why the monitors are less sharp than they could be; "" with rows enough."""
        if self.rows >= ENOUGH_ROWS:
            return ""
        times = (ENOUGH_ROWS / self.rows) ** 0.5
        return (
            f"the reference has {self.rows} rows: the monitors forgive {times:.1f} times the shift that they would "
            f"with {ENOUGH_ROWS}, or chance would pass for drift"
        )

    def to_bytes(self) -> bytes:
        """As .npz."""
        arrays = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "latent"}
        if self.latent is not None:
            arrays |= {f"latent.{name}": getattr(self.latent, name) for name in ("signs", "scale", "phase")}
        return npz_bytes({**arrays, "task": np.array(self.task), "names": np.array(self.names, dtype=np.str_)})

    @classmethod
    def load(cls, source: Path | bytes) -> Reference:
        """Read what `to_bytes` wrote; latent, classes, confidence table, levels and loss may be absent.

        Raises:
            IntegrityError: The file is damaged, lacks a field, or its fields do not fit each other.
        """
        if isinstance(source, bytes):
            return _read(source)
        try:
            return _read(source.read_bytes())
        except (OSError, IntegrityError) as error:
            raise IntegrityError(f"{source.name}: {error}") from error


_BY_FEATURE = (
    "names", "edges", "input_mean", "input_std", "spread_mean", "spread_std", "feature_mean", "feature_std", "low",
    "high", "missing", "repeats", "values",
)  # fmt: skip
_OUTPUTS = ("output_edges", "output_mean", "output_std")
_OPTIONAL = (
    "latent_mean", "latent_std", "class_share", "class_means", "confidence_table", "input_levels", "output_cuts",
    "output_levels",
)  # fmt: skip


@lru_cache(maxsize=4)
def _read(data: bytes) -> Reference:
    """Devices of a process that have a release in common share what is read; nobody changes it."""
    arrays = load_npz(data)
    try:
        _check_shapes(arrays)
        fields: dict[str, Any] = {name: arrays[name] for name in (*_BY_FEATURE, *_OUTPUTS)}
        fields |= {name: arrays[name] for name in _OPTIONAL if name in arrays}
        fields["names"] = tuple(str(name) for name in arrays["names"])
        fields["task"] = msgspec.convert(str(arrays["task"]), Task)
        fields["accuracy"] = float(arrays["accuracy"].item())
        fields |= {name: int(arrays[name].item()) for name in ("rows", "labelled")}
        fields |= {name: float(arrays[name].item()) for name in ("loss_scale", "loss_mean") if name in arrays}
        if "latent.signs" in arrays:
            fields["latent"] = LatentChannels(*(arrays[f"latent.{name}"] for name in ("signs", "scale", "phase")))
        return Reference(**fields)
    except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
        raise IntegrityError(f"the monitor reference is damaged: {error}") from error


def _check_shapes(arrays: Mapping[str, AnyArray]) -> None:
    """Raise ValueError or KeyError if arrays of a file do not fit each other."""
    alike = [_BY_FEATURE, ("output_mean", "output_std")]
    if "input_levels" in arrays:
        alike += [("input_mean", "input_levels"), ("output_mean", "output_cuts", "output_levels")]
    if "latent.signs" in arrays:
        alike.append(("latent_mean", "latent_std", "latent.scale", "latent.phase"))
    for names in alike:
        if len({arrays[name].shape[:1] for name in names}) > 1:
            raise ValueError(", ".join(f"{name} {arrays[name].shape}" for name in names) + " do not fit each other")


def _described(
    features: FloatArray, names: Sequence[str], categories: Mapping[str, Sequence[float]], *, ordered: bool
) -> dict[str, Any]:
    """All that a reference says of its inputs, by field."""
    rows, width = features.shape
    if rows < MIN_ROWS:
        raise ValueError(
            f"a reference needs at least {MIN_ROWS} rows, got {rows}: "
            "with fewer the monitors would take chance for drift"
        )
    if len(names) != width:
        raise ValueError(f"{len(names)} names for {width} features")
    if unknown := set(categories) - set(names):
        raise ValueError(f"no feature is called {', '.join(sorted(unknown))}")
    known = ~np.isnan(features)
    count = np.maximum(1, known.sum(axis=0))
    values = np.where(known, features, 0).astype(np.float64)
    mean = values.sum(axis=0) / count
    low, high = (pick(np.where(known, features, far), axis=0) for pick, far in ((np.min, np.inf), (np.max, -np.inf)))
    never = ~known.any(axis=0)
    edges = _edges(features)
    ranks = rank_channels(features, edges)
    return {
        "names": tuple(names),
        "edges": edges,
        "input_mean": ranks.mean(axis=0),
        "input_std": ranks.std(axis=0),
        "spread_mean": (spreads := with_spread(ranks)[:, width:]).mean(axis=0),
        "spread_std": spreads.std(axis=0),
        "input_levels": levels_of(ranks),
        "feature_mean": mean.astype(np.float32),
        "feature_std": np.sqrt((np.where(known, values - mean, 0) ** 2).sum(axis=0) / count).astype(np.float32),
        "low": np.where(never, np.nan, low).astype(np.float32),
        "high": np.where(never, np.nan, high).astype(np.float32),
        "missing": (1 - known.mean(axis=0)).astype(np.float32),
        "repeats": (features[1:] == features[:-1]).mean(axis=0).astype(np.float32)
        if ordered
        else np.full(width, np.nan, np.float32),
        "values": _categories(list(names), categories, features),
        "rows": rows,
    }


def _categories(names: Sequence[str], categories: Mapping[str, Sequence[float]], features: FloatArray) -> FloatArray:
    """float32 [F, V], V as large as needed: codes there may be, and those there were, as that of an unknown value."""
    every = {name: {*codes, *np.unique(features[:, names.index(name)]).tolist()} for name, codes in categories.items()}
    kept = {name: sorted(code for code in codes if code == code) for name, codes in every.items()}  # noqa: PLR0124 - NaN
    kept = {name: codes for name, codes in kept.items() if len(codes) <= MAX_CATEGORIES}
    values = np.full((len(names), max(map(len, kept.values()), default=1)), np.nan, np.float32)
    for i, name in enumerate(names):
        codes = kept.get(name, [])
        values[i, : len(codes)] = codes
    return values


def _by_class(channels: DoubleArray, scores: FloatArray) -> dict[str, FloatArray]:
    """Share and mean channels of each predicted class; a class that never was has the mean of all."""
    chosen = np.eye(scores.shape[1])[scores.argmax(axis=1)]
    count = chosen.sum(axis=0)[:, None]
    means = np.where(count > 0, chosen.T @ channels / np.maximum(1, count), channels.mean(axis=0))
    return {"class_share": chosen.mean(axis=0).astype(np.float32), "class_means": means.astype(np.float32)}


def _edges(values: FloatArray) -> FloatArray:
    """Quantiles of the known values of each column, float32 [columns, 63]; 0 for a column without any."""
    edges = np.zeros((values.shape[1], BINS - 1), np.float32)
    for i, column in enumerate(values.T):
        known = column[~np.isnan(column)]
        if len(known):
            edges[i] = np.quantile(known, np.arange(1, BINS) / BINS)
    return edges


def output_channels(scores: FloatArray, edges: FloatArray, task: Task) -> DoubleArray:
    """What the model said, float32 [N, C], as monitored channels, float64 [N, K] in [0, 1].

    Probabilities are channels themselves, with the confidence and the entropy of the answer (multi-label: means over
    the labels); values and summaries become ranks within the reference.
    """
    if task not in _WITH_PROBABILITIES:
        return rank_channels(scores, edges)
    p = np.asarray(scores, dtype=np.float64)
    if task == "classification":
        confidence, doubt = p.max(axis=1), entropy(p)
    else:
        pairs = np.stack([p, 1 - p], axis=2).reshape(-1, 2)
        confidence, doubt = (v.reshape(p.shape).mean(axis=1) for v in (pairs.max(axis=1), entropy(pairs)))
    result: DoubleArray = np.clip(np.concatenate([confidence[:, None], doubt[:, None], p], axis=1), 0.0, 1.0)
    return result


def output_names(labels: tuple[str, ...], task: Task) -> list[str]:
    """What `output_channels` gives, in order."""
    if task == "regression":
        return list(labels)
    if task == "raw":
        return [f"output {name}" for name in OUTPUT_SUMMARY]
    return ["confidence", "entropy", *(f"probability of {label!r}" for label in labels)]
