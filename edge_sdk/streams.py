"""Data whose drift is known: what simulations and tests feed to devices.

A `World` holds samples and their truths. A `Drift` says what changes in them, its effect, and when, its course. A
`ScriptedStream` draws samples as they look at some time; `DriftingStream` is the short form for one sudden drift.
All chance comes from the generator that is given: the same seed gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from edge_sdk.schema import InputSpec
from edge_sdk.types import AnyArray, DoubleArray, FloatArray, IndexArray, Truth

HOUR_S = 3600.0

Transform = Callable[[FloatArray, np.random.Generator], FloatArray]
"""float32 [N, ...] to float32 [N, ...]; the input is left as it is."""


# ---- images [N, C, H, W]. The corruptions follow Hendrycks & Dietterich 2019, arXiv:1903.12261


def unchanged(x: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG001
    """No drift."""
    return x


def rotation(degrees: float) -> Transform:
    """Rotate images [N, C, H, W] about their centre, bilinear, zero outside."""
    angle = np.deg2rad(degrees)

    @cache
    def corners(height: int, width: int) -> list[tuple[IndexArray, IndexArray, DoubleArray]]:
        """The four pixels that each pixel is made of, and what each counts."""
        rows, columns = np.meshgrid(np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2,
                                    indexing="ij")  # fmt: skip
        source_r = np.cos(angle) * rows + np.sin(angle) * columns + (height - 1) / 2
        source_c = -np.sin(angle) * rows + np.cos(angle) * columns + (width - 1) / 2
        top, left = np.floor(source_r).astype(int), np.floor(source_c).astype(int)
        found = []
        for r, c in ((0, 0), (0, 1), (1, 0), (1, 1)):
            weight = (1 - np.abs(source_r - top - r)) * (1 - np.abs(source_c - left - c))
            inside = (top + r >= 0) & (top + r < height) & (left + c >= 0) & (left + c < width)
            place = (np.clip(top + r, 0, height - 1), np.clip(left + c, 0, width - 1))
            found.append((*place, np.where(inside, weight, 0)))
        return found

    def rotate(x: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG001
        result = np.zeros(x.shape)  # in double precision, so that no pixel leaves the range of its neighbours
        for r, c, weight in corners(*x.shape[-2:]):
            result += x[..., r, c] * weight
        return result.astype(np.float32)

    return rotate


def darkening(factor: float) -> Transform:
    """Multiply by `factor` (0 to 1), as a lens that gets dirty or a light that fails."""

    def darken(x: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG001
        return (x * np.float32(factor)).astype(np.float32)

    return darken


def brightness(amount: float, *, low: float = 0.0, high: float = 1.0) -> Transform:
    """Add `amount` to every pixel, clipped to [low, high]: bright ones are lost."""

    def brighten(x: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG001
        return np.clip(x + amount, low, high).astype(np.float32)

    return brighten


def contrast(factor: float, *, low: float = 0.0, high: float = 1.0) -> Transform:
    """Multiply each image's distance from its own mean by `factor`, clipped to [low, high]."""

    def stretch(x: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG001
        mean = x.mean(axis=(-2, -1), keepdims=True)
        result: FloatArray = np.clip(mean + factor * (x - mean), low, high).astype(np.float32)
        return result

    return stretch


def blur(sigma: float) -> Transform:
    """Gaussian blur with a standard deviation of `sigma` pixels; pixels beyond the edge are those at the edge."""
    if sigma <= 0:
        return unchanged
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()

    def soften(x: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG001
        result: AnyArray = x
        for axis in (-2, -1):
            size = x.shape[axis]
            places = np.clip(np.arange(size)[:, None] + np.arange(-reach, reach + 1), 0, size - 1)
            weights = np.zeros((size, size))
            np.add.at(weights, (np.arange(size)[:, None], places), kernel)
            result = np.moveaxis(np.moveaxis(result, axis, -1) @ weights.T, -1, axis)
        return result.astype(np.float32)

    return soften


def occlusion(share: float, *, fill: float = 0.0) -> Transform:
    """Cover a rectangle of `share` of each image's area with `fill`, somewhere else in each image."""
    side = math.sqrt(share)

    def cover(x: FloatArray, rng: np.random.Generator) -> FloatArray:
        height, width = x.shape[-2:]
        tall, wide = round(side * height), round(side * width)
        top = rng.integers(height - tall + 1, size=len(x))[:, None, None]
        left = rng.integers(width - wide + 1, size=len(x))[:, None, None]
        r, c = np.arange(height)[:, None], np.arange(width)
        hidden = (r >= top) & (r < top + tall) & (c >= left) & (c < left + wide)
        return np.where(hidden[:, None], np.float32(fill), x)

    return cover


def pixelate(block: float) -> Transform:
    """Replace blocks of `block` x `block` pixels (rounded) by their mean, as a camera of lower resolution would."""
    step = round(block)
    if step <= 1:
        return unchanged

    def coarsen(x: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG001
        result: AnyArray = x.astype(np.float64)
        for axis in (-2, -1):
            starts = np.arange(0, x.shape[axis], step)
            sizes = np.diff(starts, append=x.shape[axis])
            sums = np.moveaxis(np.add.reduceat(result, starts, axis=axis), axis, -1)
            result = np.moveaxis(np.repeat(sums / sizes, sizes, axis=-1), -1, axis)
        return result.astype(np.float32)

    return coarsen


# ---- sensors: samples of any shape


def noise(sigma: float, *, low: float = 0.0, high: float = 1.0) -> Transform:
    """Add Gaussian noise of standard deviation `sigma`, clipped to [low, high]."""

    def disturb(x: FloatArray, rng: np.random.Generator) -> FloatArray:
        return np.clip(x + rng.normal(0, sigma, x.shape), low, high).astype(np.float32)

    return disturb


def offset(amount: float) -> Transform:
    """Add `amount`, as a sensor that has lost its calibration."""

    def shift(x: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG001
        return (x + np.float32(amount)).astype(np.float32)

    return shift


def unit_change(factor: float, amount: float = 0.0) -> Transform:
    """Multiply by `factor`, then add `amount`: 1.8 and 32 for a thermometer that now speaks Fahrenheit."""

    def convert(x: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG001
        return (x * np.float32(factor) + np.float32(amount)).astype(np.float32)

    return convert


def spikes(size: float, share: float) -> Transform:
    """Add or subtract `size` at random places, `share` of all values."""

    def spike(x: FloatArray, rng: np.random.Generator) -> FloatArray:
        hit = rng.random(x.shape)  # one draw says whether and which way
        return (x + size * ((hit < share / 2).astype(np.float32) - (hit > 1 - share / 2))).astype(np.float32)

    return spike


def missing(share: float) -> Transform:
    """NaN at random places, `share` of all values. Only a model that imputes takes such a sample."""

    def drop(x: FloatArray, rng: np.random.Generator) -> FloatArray:
        return np.where(rng.random(x.shape) < share, np.float32(np.nan), x)

    return drop


def stuck(value: float | FloatArray) -> Transform:
    """Always the same: one number, or one sample [...]; 0 is a sensor that is dead."""

    def freeze(x: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG001
        return np.broadcast_to(np.asarray(value, np.float32), x.shape).copy()

    return freeze


def on_sensors(transform: Transform, places: Sequence[int], *, axis: int = -1) -> Transform:
    """A transform of some sensors alone.

    Args:
        transform: What happens to them.
        places: Their positions along `axis`.
        axis: Of one sample: -1 for the columns of a row, 0 for the channels of a window [C, T] or an image [C, H, W].
    """
    chosen = list(places)

    def some(x: FloatArray, rng: np.random.Generator) -> FloatArray:
        result = x.copy()
        moved = np.moveaxis(result, axis if axis < 0 else axis + 1, 0)  # a view
        part = np.moveaxis(moved[chosen], 0, axis if axis < 0 else axis + 1)
        moved[chosen] = np.moveaxis(transform(part, rng), axis if axis < 0 else axis + 1, 0)
        return result

    return some


# ---- where samples come from


@dataclass(frozen=True)
class Pool:
    """Samples and their truths to draw from: x float32 [N, ...]; y int64 [N], numbers of labels, or float64 [N, T].

    `others` holds, for generated data, the truths that the same samples would have under other relations between x
    and y, by the number of the relation.
    """

    x: FloatArray
    y: AnyArray
    others: tuple[AnyArray, ...] = ()

    def only(self, labels: Collection[int]) -> Pool:
        """The samples of some labels."""
        return self.rows(np.flatnonzero(np.isin(self.y, sorted(labels))))

    def rows(self, rows: IndexArray) -> Pool:
        """The samples at some positions."""
        return Pool(self.x[rows], self.y[rows], tuple(other[rows] for other in self.others))


@dataclass(frozen=True)
class World:
    """Samples in three parts that share none, and what is known about them.

    Attributes:
        name: Of the source.
        factory: For who makes the model; devices never see them.
        pool: What devices draw from.
        score: For judging; neither trained on nor drawn.
        labels: Name of each label number; none where truths are numbers.
        spec: What one sample looks like; a model may ask for more.
        sensors: Names of the places along `axis` of a sample; empty: they have none.
        axis: Of one sample: where its sensors or columns lie.
        targets: Names of the numbers that are the truth of a sample; none where truths are labels.
    """

    name: str
    factory: Pool
    pool: Pool
    score: Pool
    labels: tuple[str, ...]
    spec: InputSpec
    sensors: tuple[str, ...] = ()
    axis: int = -1
    targets: tuple[str, ...] = ()

    @cached_property
    def spreads(self) -> DoubleArray:
        """Standard deviation of each target over what devices draw from, float64 [T]; 1 for one that never changes."""
        found = self.pool.y.std(axis=0, dtype=np.float64)
        return np.where(found > 0, found, 1.0)

    def truths(self, y: AnyArray) -> list[Truth]:
        """Rows of a pool's `y` as devices are told them."""
        return y.tolist() if self.targets else [self.labels[i] for i in y]

    def numbers(self, labels: Collection[str]) -> list[int]:
        """The numbers of labels, in the given order.

        Raises:
            ValueError: There is no such label.
        """
        return [_place(label, self.labels, "label", "the data have") for label in labels]


def _place(name: str, names: tuple[str, ...], what: str, told: str) -> int:
    if name not in names:
        raise ValueError(f"no {what} {name!r}; {told} {_some(names) or 'none with a name'}")
    return names.index(name)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


# ---- drifts: what changes, and when

Kind = Literal["covariate", "prior", "concept"]
Course = Literal["sudden", "gradual", "incremental", "recurring", "seasonal"]
EffectName = Literal[
    "rotation", "darkening", "brightness", "contrast", "blur", "occlusion", "pixelate",
    "noise", "offset", "unit", "spikes", "missing", "stuck", "dead",
    "labels", "swap", "shift", "relation",
]  # fmt: skip


class Effect(NamedTuple):
    """What a drift can do.

    Attributes:
        kind: covariate: inputs; prior: how often each label comes; concept: which truth an input has.
        meaning: What it does, and in what unit its size is.
        make: The transform of a size; None for a prior or concept drift.
        size: Where the drift names none; None: there is no such number.
        neutral: The size that changes nothing; None: a sample is changed wholly or not at all, and an incremental
            course changes more and more of the samples.
        low: Smallest size.
        high: Largest size.
        keys: What else a drift with this effect may say.
        images: Whether samples must be images.
        truths: What truths must be; "": no matter.
    """

    kind: Kind
    meaning: str
    make: Callable[[float, Drift, float, float], Transform] | None = None
    size: float | None = None
    neutral: float | None = None
    low: float = -math.inf
    high: float = math.inf
    keys: tuple[str, ...] = ()
    images: bool = False
    truths: Literal["", "labels", "numbers"] = ""


EFFECTS: dict[str, Effect] = {
    "rotation": Effect("covariate", "images turn about their centre; degrees",
                       lambda size, *_: rotation(size), 25, 0, images=True),
    "darkening": Effect("covariate", "pixels are multiplied; factor",
                        lambda size, *_: darkening(size), 0.4, 1, 0, 1, images=True),
    "brightness": Effect("covariate", "the same is added to every pixel; in the data's units",
                         lambda size, _, low, high: brightness(size, low=low, high=high), 0.3, 0, images=True),
    "contrast": Effect("covariate", "distances from an image's mean are multiplied; factor",
                       lambda size, _, low, high: contrast(size, low=low, high=high), 0.4, 1, 0, images=True),
    "blur": Effect("covariate", "Gaussian blur; standard deviation in pixels",
                   lambda size, *_: blur(size), 1, 0, 0, 100, images=True),
    "occlusion": Effect("covariate", "a rectangle, elsewhere in each image, is covered; share of the area",
                        lambda size, _, low, __: occlusion(size, fill=max(low, 0.0)), 0.2, 0, 0, 1, images=True),
    "pixelate": Effect("covariate", "the resolution falls; block in pixels",
                       lambda size, *_: pixelate(size), 2, 1, 1, images=True),
    "noise": Effect("covariate", "Gaussian noise; standard deviation in the data's units",
                    lambda size, _, low, high: noise(size, low=low, high=high), 0.3, 0, 0, keys=("columns",)),
    "offset": Effect("covariate", "a sensor reads more or less; in the data's units",
                     lambda size, *_: offset(size), 1, 0, keys=("columns",)),
    "unit": Effect("covariate", "values come in another unit: times `size` plus `plus`; factor",
                   lambda size, drift, *_: unit_change(size, drift.plus), 1000, keys=("columns", "plus")),
    "spikes": Effect("covariate", "`share` of the values jump up or down; height in the data's units",
                     lambda size, drift, *_: spikes(size, drift.share), 5, 0, keys=("columns", "share")),
    "missing": Effect("covariate", "values are missing (NaN; only a model that imputes takes them); share",
                      lambda size, *_: missing(size), 0.1, 0, 0, 1, keys=("columns",)),
    "stuck": Effect("covariate", "a sensor always reads `size`, in the data's units; without one, what it read in some "
                    "sample of the data", lambda size, *_: stuck(size), keys=("columns",)),
    "dead": Effect("covariate", "a sensor reads 0", lambda *_: stuck(0.0), keys=("columns",)),
    "labels": Effect("prior", "labels come as often as `labels` says", keys=("labels",), truths="labels"),
    "swap": Effect("concept", "each label of `cycle` becomes the next one, the last the first", keys=("cycle",),
                   truths="labels"),
    "shift": Effect("concept", "truths are larger; in standard deviations of each target", None, 1, 0,
                    truths="numbers"),
    "relation": Effect("concept", "truths follow the relation number `variant` (generated data)", keys=("variant",)),
}  # fmt: skip
"""By name."""

Hours = Annotated[float, Meta(ge=0)]
SomeHours = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


class Drift(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One change of the data. Several act in the order in which they are given.

    Source:
        The courses are those of Gama et al. 2014, "A survey on concept drift adaptation", doi:10.1145/2523813.
    """

    effect: EffectName
    """What changes: see the table of effects."""
    course: Course = "sudden"
    """sudden: all at once; gradual: a growing share of the samples is changed; incremental: all are, more and more;
    recurring: changed for a part of each period; seasonal: to and fro, half a cosine wave each way."""
    at_h: Hours = 0.0
    """When it begins, in hours since the start."""
    spread_h: Hours = 0.0
    """Each device's drift begins up to so many hours later, drawn for each."""
    until_h: SomeHours | None = None
    """When it is over, in hours since the start; without it: never."""
    over_h: SomeHours = 24.0
    """How many hours a gradual or incremental change takes."""
    period_h: Annotated[float, Meta(ge=0.01)] = 24.0
    """Hours from one return to the next (recurring, seasonal)."""
    active: Annotated[float, Meta(gt=0, le=1)] = 0.5
    """Part of each period in which a recurring drift is there."""
    size: float | None = None
    """How much, in the effect's unit; without it the effect's default."""
    columns: tuple[str, ...] = ()
    """Sensors or columns that are hit; empty: all."""
    share: Share = 0.01
    """Part of all values that jump (spikes)."""
    plus: float = 0.0
    """What is added after the multiplication (unit)."""
    labels: dict[str, Share] = {}
    """Share of each named label (labels); the others keep their proportions in what is left."""
    cycle: tuple[str, ...] = ()
    """Labels that change places (swap)."""
    variant: Annotated[int, Meta(ge=0)] = 1
    """Number of the relation (relation)."""

    def __post_init__(self) -> None:
        """Check what the types leave open.

        Raises:
            ValueError: The details do not fit the effect or the course.
        """
        effect = EFFECTS[self.effect]
        fields = msgspec.structs.fields(type(self))
        own = {"size": effect.size is not None or self.effect == "stuck"}
        own |= {name: name in effect.keys for name in ("columns", "share", "plus", "labels", "cycle", "variant")}
        for name, default in ((field.name, field.default) for field in fields if field.name in own):
            empty = {} if name == "labels" else default
            if getattr(self, name) != empty and not own[name]:
                raise ValueError(f"effect {self.effect!r} has no `{name}`; leave it out")
        if self.size is not None and not effect.low <= self.size <= effect.high:
            raise ValueError(f"effect {self.effect!r}: size {self.size} lies outside [{effect.low:g}, {effect.high:g}]")
        if self.effect == "labels" and not (self.labels and sum(self.labels.values()) <= 1 + 1e-9):
            raise ValueError(
                'effect "labels" needs `labels` = {name = share, ...} with shares that add up to at most 1'
            )
        if self.effect == "swap" and (len(self.cycle) < 2 or len(set(self.cycle)) != len(self.cycle)):
            raise ValueError('effect "swap" needs `cycle` = [two or more different labels]')
        if self.until_h is not None and self.until_h <= self.at_h + self.spread_h:
            raise ValueError(f"until_h {self.until_h:g} is not after the beginning (at_h + spread_h)")

    @property
    def kind(self) -> Kind:
        """covariate, prior or concept."""
        return EFFECTS[self.effect].kind

    def extent(self, time_s: float) -> tuple[float, float]:
        """How far the change has come at a time, in seconds since the start.

        Returns:
            Share of the samples that are changed, and strength of the change, both 0 to 1; both 0: nothing is.
        """
        hours = time_s / HOUR_S
        since = hours - self.at_h
        if since < 0 or (self.until_h is not None and hours >= self.until_h):
            return 0.0, 0.0
        share = strength = 1.0
        match self.course:
            case "sudden":
                pass
            case "gradual":
                share = min(1.0, since / self.over_h)
            case "incremental":
                strength = min(1.0, since / self.over_h)
            case "recurring":
                share = float(since % self.period_h < self.active * self.period_h)
            case "seasonal":
                strength = (1 - math.cos(2 * math.pi * since / self.period_h)) / 2
        return (share, strength) if share * strength > 0 else (0.0, 0.0)

    def acts(self, time_s: float) -> bool:
        """Whether anything is changed at a time, in seconds since the start."""
        return self.extent(time_s)[0] > 0

    def onsets(self, duration_s: float) -> list[float]:
        """When the change begins, and each time it comes back, in seconds since the start; all before `duration_s`."""
        end = min(duration_s, math.inf if self.until_h is None else self.until_h * HOUR_S)
        step = self.period_h * HOUR_S if self.course == "recurring" and self.active < 1 else math.inf
        found, time = [], self.at_h * HOUR_S
        while time < end:
            found.append(time)
            time += step
        return found


# ---- streams


class ScriptedStream:
    """Draws samples from a world as they look at some time, by a script of drifts.

    Which samples are picked depends on the generator alone, not on drifts of inputs or of concepts: two streams with
    one seed show the same world, with and without them.

    Args:
        world: Where samples come from, with replacement.
        rng: Source of chance; must be able to spawn others, as `numpy.random.default_rng` makes them.
        drifts: What happens, in this order.
        labels: Those that occur until a drift of kind "prior" brings others; None: all.

    Raises:
        ValueError: A drift does not fit the world; its message begins with the drift's number, as "drift[0]".

    Example:
        >>> tilt = Drift(effect="rotation", size=30, course="incremental", at_h=24, over_h=48)
        >>> stream = ScriptedStream(world, rng=numpy.random.default_rng(0), drifts=[tilt])
        >>> x, y = stream.draw(10, 36 * 3600)
    """

    def __init__(
        self,
        world: World,
        *,
        rng: np.random.Generator,
        drifts: Sequence[Drift] = (),
        labels: Collection[str] | None = None,
    ) -> None:
        self.world, self.drifts = world, tuple(drifts)
        self._rng, self._chances = rng, rng.spawn(len(self.drifts))
        labelled = np.zeros(len(world.pool.y), np.int64) if world.targets else world.pool.y  # numbers are all alike
        self._by_label = np.argsort(labelled, kind="stable")
        self._counts = np.bincount(labelled, minlength=len(world.labels))
        self._starts = np.cumsum(self._counts) - self._counts
        base = self._counts.astype(np.float64)
        if labels is not None:
            base[np.setdiff1d(np.arange(len(base)), world.numbers(labels))] = 0
        if not base.any():
            raise ValueError("the data hold no sample of the labels that should occur")
        self._base = base / base.sum()
        self._changes: list[_Change] = []
        for number, (drift, chance) in enumerate(zip(self.drifts, self._chances, strict=True)):
            try:
                self._changes.append(_Change(drift, world, self._counts, chance))
            except ValueError as error:
                raise ValueError(f"drift[{number}]: {error}") from error

    def draw(self, count: int, time_s: float) -> tuple[FloatArray, AnyArray]:
        """`count` samples as they look at a time, in seconds since the start: x and y as in `Pool`.

        Values stay inside the range that the world declares; a drift may have made some NaN.
        """
        cumulated = np.cumsum(self.shares(time_s))
        last = int(np.searchsorted(cumulated, cumulated[-1]))  # rounding must not pick a label that does not occur
        label, place = self._rng.random((2, count))
        labels = np.minimum(np.searchsorted(cumulated, label * cumulated[-1], side="right"), last)
        within = np.minimum((place * self._counts[labels]).astype(np.int64), self._counts[labels] - 1)
        return self._look(self.world.pool.rows(self._by_label[self._starts[labels] + within]), time_s, self._chances)

    def view(self, pool: Pool, time_s: float) -> tuple[FloatArray, AnyArray]:
        """All samples of `pool`, such as `world.score`, whose labels occur at a time, as they look then.

        Draws nothing from the stream's generator; the same arguments give the same bytes.
        """
        occurring = pool.rows(np.arange(len(pool.y)))
        if not self.world.targets:
            occurring = pool.only({int(i) for i in np.flatnonzero(self.shares(time_s) > 0)})
        return self._look(occurring, time_s, [np.random.default_rng([7, i]) for i in range(len(self.drifts))])

    def shares(self, time_s: float) -> DoubleArray:
        """Share of each label at a time, float64 [labels]; sums to 1. Concept drifts come on top."""
        shares: DoubleArray = self._base
        for change in self._changes:
            if change.drift.kind == "prior":
                share, strength = change.drift.extent(time_s)
                shares = change.shares(shares, share * strength)
        return shares

    def acts(self, time_s: float) -> bool:
        """Whether any drift acts at a time."""
        return any(drift.acts(time_s) for drift in self.drifts)

    def _look(self, pool: Pool, time_s: float, chances: Sequence[np.random.Generator]) -> tuple[FloatArray, AnyArray]:
        for change, chance in zip(self._changes, chances, strict=True):
            share, strength = change.drift.extent(time_s)
            if share and change.drift.kind != "prior" and len(pool.y):
                pool = change.apply(pool, share, strength, chance)
        spec = self.world.spec
        if self.drifts and (spec.low is not None or spec.high is not None):
            return np.clip(pool.x, spec.low, spec.high), pool.y
        return pool.x, pool.y


class _Change:
    """A drift, bound to a world."""

    def __init__(self, drift: Drift, world: World, counts: IndexArray, rng: np.random.Generator) -> None:
        self.drift, self._effect = drift, EFFECTS[drift.effect]
        shape, spec = world.spec.shape, world.spec
        self._low = -math.inf if spec.low is None else spec.low
        self._high = math.inf if spec.high is None else spec.high
        if self._effect.images and len(shape) != 3:
            raise ValueError(f"effect {drift.effect!r} is for images [C, H, W]; the data have shape {shape}")
        given = "numbers" if world.targets else "labels"
        if self._effect.truths not in ("", given):
            raise ValueError(f"effect {drift.effect!r} is for {self._effect.truths}; the truths of {world.name} are "
                             f"{given} ({_some(world.targets or world.labels)})")  # fmt: skip
        self._places = [_place(name, world.sensors, "column", "the data have") for name in drift.columns]
        self._axis = world.axis
        self._spreads = world.spreads if world.targets else np.ones(0)
        self._hold: FloatArray | None = None
        if drift.effect == "stuck" and drift.size is None:
            held = world.pool.x[rng.integers(len(world.pool.x))]
            self._hold = held.take(self._places, axis=world.axis) if self._places else held
        if drift.effect == "relation" and drift.variant >= len(world.pool.others):
            raise ValueError(
                f"there is no relation {drift.variant}; {world.name} has {len(world.pool.others) or 'none'}"
                f"{', numbered from 0' if world.pool.others else ''}"
            )
        self._size = next((size for size in (drift.size, self._effect.size) if size is not None), 0.0)
        self._cycle = world.numbers(drift.cycle)
        self._named = dict(zip(world.numbers(drift.labels), drift.labels.values(), strict=True))
        for number, share in self._named.items():
            if share and not counts[number]:
                raise ValueError(f"the data that devices draw from hold no sample of label {world.labels[number]!r}")
        self._made: tuple[float, Transform] = (math.nan, unchanged)

    def shares(self, before: DoubleArray, extent: float) -> DoubleArray:
        """Label shares between what they were and what this drift makes of them."""
        if not extent:
            return before
        target = before.copy()
        target[list(self._named)] = 0
        rest = target.sum()
        if rest:
            target *= (1 - sum(self._named.values())) / rest
        for number, share in self._named.items():
            target[number] = share
        total = target.sum()
        result: DoubleArray = (1 - extent) * before + extent * (target / total) if total else before
        return result

    def apply(self, pool: Pool, share: float, strength: float, rng: np.random.Generator) -> Pool:
        """The samples with a share of them changed."""
        if self._effect.neutral is None:
            share, strength = share * strength, 1.0
        if share >= 1:
            return self._change(pool, strength, rng)
        hit = np.flatnonzero(rng.random(len(pool.y)) < share)
        changed = self._change(pool.rows(hit), strength, rng)
        x, y = pool.x.copy(), pool.y.copy()
        x[hit], y[hit] = changed.x, changed.y
        return Pool(x, y, pool.others)

    def _change(self, pool: Pool, strength: float, rng: np.random.Generator) -> Pool:
        if self._effect.make is not None:
            return Pool(self._transform(strength)(pool.x, rng), pool.y, pool.others)
        if self.drift.effect == "relation":
            return Pool(pool.x, pool.others[self.drift.variant], pool.others)
        if self.drift.effect == "shift":
            return Pool(pool.x, pool.y + strength * self._size * self._spreads, pool.others)
        y = pool.y.copy()
        for label, following in zip(self._cycle, [*self._cycle[1:], self._cycle[0]], strict=True):
            y[pool.y == label] = following
        return Pool(pool.x, y, pool.others)

    def _transform(self, strength: float) -> Transform:
        if self._made[0] == strength:  # most courses keep one strength for long
            return self._made[1]
        size, neutral = self._size, self._effect.neutral
        if neutral is not None:
            size = neutral + strength * (size - neutral)
        assert self._effect.make is not None
        made = stuck(self._hold) if self._hold is not None else self._effect.make(
            size, self.drift, self._low, self._high
        )  # fmt: skip
        if self._places:
            made = on_sensors(made, self._places, axis=self._axis)
        self._made = (strength, made)
        return made


class DriftingStream:
    """Draws samples from a pool; from `drift_at` on they are transformed, and new labels may appear.

    The short form for one sudden drift of samples that nothing else is known about; `ScriptedStream` does the rest.

    Args:
        pool: Where samples come from, with replacement.
        rng: Source of chance.
        base_labels: Those drawn before the drift.
        drift_at: Time of the drift, in the unit of `draw`'s `time`.
        transform: What the drift does to inputs.
        new_labels: Labels that appear with the drift.
        new_share: Their share of the samples then.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        rng: np.random.Generator,
        base_labels: set[int],
        drift_at: float,
        transform: Transform = unchanged,
        new_labels: frozenset[int] = frozenset(),
        new_share: float = 0.2,
    ) -> None:
        self._rng = rng
        self._base, self._new = pool.only(base_labels), pool.only(set(new_labels))
        self._new_share = new_share if new_labels else 0.0
        self.drift_at = drift_at
        self.transform = transform
        self.new_labels = new_labels

    @property
    def drifts(self) -> bool:
        """Whether anything changes at `drift_at`."""
        return self.transform is not unchanged or bool(self.new_labels)

    def draw(self, count: int, time: float) -> tuple[FloatArray, IndexArray]:
        """`count` samples as they look at `time`: x float32 [count, ...], y int64 [count]."""
        drifted = time >= self.drift_at
        fresh = self._rng.random(count) < (self._new_share if drifted else 0.0)
        old = self._rng.integers(len(self._base.y), size=count)
        new = self._rng.integers(max(1, len(self._new.y)), size=count)
        x, y = self._base.x[old].copy(), self._base.y[old].copy()
        if fresh.any():
            x[fresh], y[fresh] = self._new.x[new[fresh]], self._new.y[new[fresh]]
        return (self.transform(x, self._rng) if drifted else x), y
