"""Data for simulations, by name: real and generated samples, and a table of the user's own.

Every source is split once, by `split_seed` and not by the simulation's seed, so that a model made of a world's
`factory` part has seen nothing that devices draw or that they are judged by.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from edge_sdk.errors import ConfigError, InputError, MissingExtraError
from edge_sdk.rows import Row, need_parquet, open_source
from edge_sdk.schema import Column, InputSpec
from edge_sdk.streams import Pool, World
from edge_sdk.types import AnyArray, DoubleArray, FloatArray, IndexArray

Source = Literal[
    "digits", "fashion-mnist", "basic-motions",
    "sea", "stagger", "sine", "mixed", "agrawal", "led", "random-rbf", "waveform", "friedman",
    "table",
]  # fmt: skip
SOURCES: dict[str, str] = {
    "digits": "scikit-learn's handwriting: 1,797 images [1, 8, 8] in [0, 1], ten labels (extra `simulate`)",
    "fashion-mnist": "clothes: images [1, 28, 28] in [0, 1], ten labels; `path` is the folder with its four files",
    "basic-motions": "aeon's smart watch: windows [6, 50] of accelerometer and gyroscope, four activities; `path` is "
    "the folder with its two .ts files, where aeon is not installed",
    "sea": "river's SEA: 3 numbers, relations 0 to 3 (extra `simulate`, as all that follow)",
    "stagger": "river's STAGGER: 3 codes, relations 0 to 2",
    "sine": "river's Sine: 2 numbers, relations 0 to 3",
    "mixed": "river's Mixed: 4 numbers, relations 0 and 1",
    "agrawal": "river's Agrawal: 9 facts about a person who asks for a loan, relations 0 to 9",
    "led": "river's LED: 7 bits, ten labels, a tenth of the bits wrong",
    "random-rbf": "river's RandomRBF: 10 numbers, four labels",
    "waveform": "river's Waveform: 21 numbers, three labels",
    "friedman": "river's Friedman: 10 numbers, of which one is to be predicted (y), relations 0 to 3: as published, "
    "two with other columns in it, and one that differs in a corner",
    "table": "a CSV or Parquet file of one's own with a row for each sample and a column for its label, or columns of "
    "the numbers that are to be predicted",
}
"""What each source gives."""

CLOTHES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
MOTIONS = ("Standing", "Running", "Walking", "Badminton")
MOTION_SENSORS = ("accel_x", "accel_y", "accel_z", "gyro_x", "gyro_y", "gyro_z")
_MOTION_STEPS = 50
_DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
_MOST_LABELS = 1_000

Share = Annotated[float, Meta(ge=0, lt=1)]


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where samples come from."""

    source: Source
    """Name of the source: see the table of sources."""
    path: str = ""
    """File or folder, relative to the scenario file (table, fashion-mnist, basic-motions)."""
    labels: tuple[str, ...] = ()
    """Labels that occur until a drift brings others; empty: all."""
    factory_share: Share = 0.45
    """Part of the samples that is left to whoever makes the model; devices never see it."""
    score_share: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    """Part of the samples that judges; neither trained on nor seen by devices."""
    split_seed: int = 0
    """Of the split into parts, and of generated data. The model must be made with the same."""
    rows: Annotated[int, Meta(ge=20)] = 8_000
    """Most samples that are kept of a source; so many are generated."""
    variant: Annotated[int, Meta(ge=0)] = 0
    """Number of the relation that holds until a drift changes it (generated data)."""
    label_column: str = "label"
    """Column with the label (table)."""
    target_columns: tuple[str, ...] = ()
    """Columns with numbers to predict, in the order of the model's targets, in place of `label_column` (table)."""
    columns: tuple[str, ...] = ()
    """Columns that make a sample (table); empty: those that the model takes, or else all others."""


def open_world(data: DataConfig, *, spec: InputSpec | None = None) -> World:
    """The world that a scenario's `[data]` names.

    Args:
        data: What to open; `path` relative to the working directory.
        spec: What the model takes: says how a table's columns become numbers. None: all its columns are numbers.

    Raises:
        ConfigError: The data are not there or not usable; the message begins with the key.
        MissingExtraError: A package that has them is not installed.

    Example:
        >>> world = open_world(DataConfig(source="digits", labels=("0", "1")))
        >>> world.factory.x.shape
        (808, 1, 8, 8)
    """
    if data.factory_share + data.score_share >= 1:
        raise ConfigError("data.score_share: with factory_share it leaves devices nothing; both must stay below 1")
    if data.path and data.source not in ("table", "fashion-mnist", "basic-motions"):
        raise ConfigError(f"data.path: the source {data.source!r} reads no file; leave it out")
    if data.target_columns and data.source != "table":
        raise ConfigError(f"data.target_columns: the source {data.source!r} has no columns to choose; leave it out")
    openers: dict[str, Callable[[], World]] = {
        "digits": lambda: _digits(data),
        "fashion-mnist": lambda: _fashion(data),
        "basic-motions": lambda: _motions(data),
        "table": lambda: _table(data, spec),
    }
    world = openers.get(data.source, lambda: _generated(data))()
    for key, pool in (("factory_share", world.factory), ("score_share", world.score)):
        if not len(pool.y) and getattr(data, key):
            raise ConfigError(f"data.{key}: {getattr(data, key):g} of the samples is none; there are too few")
    if not len(world.pool.y):
        raise ConfigError("data.source: there are too few samples for devices to draw from")
    if data.labels and world.targets:
        raise ConfigError(
            f"data.labels: {data.source} gives numbers ({_listed(world.targets)}), not labels; leave it out"
        )
    if unknown := [label for label in data.labels if label not in world.labels]:
        raise ConfigError(f"data.labels: no label {unknown[0]!r}; {data.source} has {_listed(world.labels)}")
    return world


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _split(data: DataConfig, pool: Pool) -> tuple[Pool, Pool, Pool]:
    """Factory, life and score."""
    order = np.random.default_rng(data.split_seed).permutation(len(pool.y))[: data.rows]
    cuts = [int(data.factory_share * len(order)), int((1 - data.score_share) * len(order))]
    factory, life, score = (pool.rows(part) for part in np.split(order, cuts))
    return factory, life, score


# ---- real data


def _digits(data: DataConfig) -> World:
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise MissingExtraError("the source 'digits'", "simulate")
    # its file, not its function: the package takes more than a second to import, in each process of a simulation
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        rows = np.loadtxt(path, delimiter=",")
    except OSError:  # a release that keeps it elsewhere
        from sklearn.datasets import load_digits  # noqa: PLC0415 - behind an extra

        rows = np.column_stack(load_digits(return_X_y=True))
    x = (rows[:, :64].reshape(-1, 8, 8) / 16.0).astype(np.float32)
    pool = Pool(x[:, None], rows[:, 64].astype(np.int64))
    spec = InputSpec(shape=[1, 8, 8], name="image", low=0.0, high=1.0)
    return World("digits", *_split(data, pool), tuple("0123456789"), spec, axis=0)


def _fashion(data: DataConfig) -> World:
    """Life and factory come of the training images, the score of the others."""
    folder = Path(data.path) if data.path else _DEBIAN_FASHION
    parts = []
    for name in ("train", "t10k"):
        images, labels = (_idx(folder, f"{name}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ConfigError(f"data.path: {folder}: images {images.shape} and labels {labels.shape} do not fit")
        parts.append((images, labels.astype(np.int64)))
    rng = np.random.default_rng(data.split_seed)
    wanted = (round((1 - data.score_share) * data.rows), round(data.score_share * data.rows))
    train, test = (
        Pool((x[rows][:, None] / np.float32(255)).astype(np.float32), y[rows])
        for (x, y), most in zip(parts, wanted, strict=True)
        for rows in [rng.permutation(len(y))[:most]]
    )
    cut = int(data.factory_share / (1 - data.score_share) * len(train.y))
    places = np.arange(len(train.y))
    spec = InputSpec(shape=[1, 28, 28], name="image", low=0.0, high=1.0)
    return World("fashion-mnist", train.rows(places[:cut]), train.rows(places[cut:]), test, CLOTHES, spec, axis=0)


def _idx(folder: Path, name: str) -> AnyArray:
    """A file in the IDX format, packed or not: magic number, sizes, bytes."""
    found = [path for path in (folder / f"{name}.gz", folder / name) if path.is_file()]
    if not found:
        raise ConfigError(
            f"data.path: {folder} holds no {name}.gz; name the folder of Fashion-MNIST's four files "
            "(on Debian: apt-get install dataset-fashion-mnist)"
        )
    try:
        held = found[0].read_bytes()
        held = gzip.decompress(held) if found[0].suffix == ".gz" else held
        start = 4 + 4 * held[3]
        return np.frombuffer(held, np.uint8, offset=start).reshape(np.frombuffer(held, ">i4", held[3], 4))
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise ConfigError(f"data.path: {found[0]} is damaged or not in the IDX format: {error}") from error


def _motions(data: DataConfig) -> World:
    """Windows of 5 s, a fifth of a second apart; windows of one recording are always in the same part."""
    folder = _motion_folder(data)
    x, y = (np.concatenate(part) for part in zip(*(_recordings(folder, name) for name in ("TRAIN", "TEST")),
                                                 strict=True))  # fmt: skip
    # the same share of every activity goes to each part: there are only 20 recordings of each
    rng = np.random.default_rng(data.split_seed)
    parts: list[list[int]] = [[], [], []]
    for label in range(len(MOTIONS)):
        rows = rng.permutation(np.flatnonzero(y == label))
        cuts = [round(data.factory_share * len(rows)), round((1 - data.score_share) * len(rows))]
        for part, chosen in zip(parts, np.split(rows, cuts), strict=True):
            part.extend(chosen.tolist())
    pools = []
    for recordings in parts:
        starts = range(0, x.shape[2] - _MOTION_STEPS + 1, 2)
        cut = [x[recordings, :, start : start + _MOTION_STEPS] for start in starts]
        pools.append(Pool(np.concatenate(cut), np.tile(y[recordings], len(cut))))
    spec = InputSpec(shape=[len(MOTION_SENSORS), _MOTION_STEPS], name="window")
    factory, life, score = pools
    return World("basic-motions", factory, life, score, MOTIONS, spec, MOTION_SENSORS, axis=0)


def _motion_folder(data: DataConfig) -> Path:
    if data.path:
        return Path(data.path)
    found = importlib.util.find_spec("aeon")  # its files are read, it is not imported
    if found is None or found.origin is None:
        raise ConfigError(
            "data.path: name the folder with BasicMotions_TRAIN.ts and BasicMotions_TEST.ts, or pip install --no-deps "
            "aeon, which has them"
        )
    return Path(found.origin).parent / "datasets" / "data" / "BasicMotions"


def _recordings(folder: Path, part: str) -> tuple[FloatArray, IndexArray]:
    """Float32 [40, 6, 100] and int64 [40]: dimensions part at ':', the label comes last."""
    file = folder / f"BasicMotions_{part}.ts"
    try:
        rows = [line.split(":") for line in file.read_text().split("@data")[1].split()]
        x = np.array([[dimension.split(",") for dimension in row[:-1]] for row in rows], dtype=np.float32)
        y = np.array([MOTIONS.index(row[-1]) for row in rows], dtype=np.int64)
    except OSError as error:
        raise ConfigError(f"data.path: {file} cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError) as error:
        raise ConfigError(f"data.path: {file} is damaged: {error}") from error
    if x.ndim != 3 or x.shape[1] != len(MOTION_SENSORS) or x.shape[2] < _MOTION_STEPS:
        raise ConfigError(f"data.path: {file} holds {x.shape}, not recordings of six dimensions")
    return x, y


# ---- generated data


class _Generator(NamedTuple):
    """A generator of river: its class, what its labels or targets are called, and the options of each relation."""

    name: str
    labels: tuple[str, ...]
    relations: Sequence[Mapping[str, Any]]
    targets: tuple[str, ...] = ()


def _numbered(argument: str, count: int) -> Sequence[Mapping[str, Any]]:
    return [{argument: number} for number in range(count)]


_AFTER, _YES_NO = 10**9, ("no", "yes")
_GENERATORS = {
    "sea": _Generator("SEA", _YES_NO, _numbered("variant", 4)),
    "stagger": _Generator("STAGGER", _YES_NO, _numbered("classification_function", 3)),
    "sine": _Generator("Sine", _YES_NO, _numbered("classification_function", 4)),
    "mixed": _Generator("Mixed", _YES_NO, _numbered("classification_function", 2)),
    "agrawal": _Generator("Agrawal", _YES_NO, _numbered("classification_function", 10)),
    "led": _Generator("LED", tuple("0123456789"), [{"noise_percentage": 0.1}]),
    "random-rbf": _Generator("RandomRBF", ("a", "b", "c", "d"), [{"n_classes": 4}]),
    "waveform": _Generator("Waveform", ("a", "b", "c"), [{}]),
    # the relations of one stream of river's, each held for ever: it changes them at the given numbers of samples
    "friedman": _Generator("FriedmanDrift", (), [
        {"drift_type": "gra", "position": (_AFTER, _AFTER + 1)},
        {"drift_type": "gra", "position": (0, _AFTER)},
        {"drift_type": "gsg", "position": (-1, 0), "transition_window": 0},
        {"drift_type": "lea", "position": (-2, -1, 0)},
    ], targets=("y",)),
}  # fmt: skip


def _generated(data: DataConfig) -> World:
    """The same samples under every relation: with one seed, river's generators draw the same x whatever it is."""
    try:
        from river.datasets import synth  # noqa: PLC0415 - behind an extra
    except ImportError as error:
        raise MissingExtraError(f"the source {data.source!r}", "simulate") from error
    generator = _GENERATORS[data.source]
    if data.variant >= len(generator.relations):
        raise ConfigError(f"data.variant: {data.source} has relations 0 to {len(generator.relations) - 1}")
    make = getattr(synth, generator.name)
    seeds = ("seed_model", "seed_sample") if data.source == "random-rbf" else ("seed",)
    drawn = [list(islice(make(**dict.fromkeys(seeds, data.split_seed), **options), data.rows))
             for options in generator.relations]  # fmt: skip
    first = drawn[data.variant]
    x = np.array([[float(value) for value in row.values()] for row, _ in first], dtype=np.float32)
    truths: tuple[AnyArray, ...]
    if generator.targets:
        truths = tuple(np.array([[float(value)] for _, value in rows]) for rows in drawn)
    else:
        truths = tuple(np.array([int(label) for _, label in rows], dtype=np.int64) for rows in drawn)
    names = tuple(name if isinstance(name, str) else f"x{name}" for name in first[0][0])
    pool = Pool(x, truths[data.variant], truths if len(truths) > 1 else ())
    spec = InputSpec(shape=[len(names)], name="row", columns=[Column(name=name) for name in names])
    return World(data.source, *_split(data, pool), generator.labels, spec, names, targets=generator.targets)


# ---- a table of one's own


def _table(data: DataConfig, spec: InputSpec | None) -> World:
    path = Path(data.path)
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise ConfigError(f'data.path: the source "table" needs a .csv or .parquet file, got {path.name!r}')
    if not path.is_file():
        raise ConfigError(f"data.path: there is no file {path}; paths are relative to the scenario file")
    try:
        spec = _table_spec(path, data, spec)
        truth_columns = data.target_columns or (data.label_column,)
        rows = _table_rows(path, truth_columns[0], spec)
        x = spec.check_batch([row.value for row in rows]).astype(np.float32)
        named = [rows, *(_table_rows(path, name, spec) for name in truth_columns[1:])]
        truths = [[row.name for row in column] for column in named]
    except InputError as error:
        raise ConfigError(f"data.path: {path.name}: {error}") from error
    sensors = tuple(column.name for column in spec.columns)
    if data.target_columns:
        columns = [_as_numbers(path, name, cells) for name, cells in zip(truth_columns, truths, strict=True)]
        parts = _split(data, Pool(x, np.column_stack(columns)))
        return World("table", *parts, (), spec, sensors, targets=data.target_columns)
    labels, y = np.unique([str(cell) for cell in truths[0]], return_inverse=True)
    if len(labels) > min(_MOST_LABELS, max(2, len(rows) // 2)):
        raise ConfigError(
            f"data.label_column: {data.label_column!r} has {len(labels)} different values in {len(rows)} rows; if it "
            f'holds numbers to predict, say target_columns = ["{data.label_column}"]'
        )
    parts = _split(data, Pool(x, y.astype(np.int64)))
    return World("table", *parts, tuple(str(label) for label in labels), spec, sensors)


def _table_spec(path: Path, data: DataConfig, spec: InputSpec | None) -> InputSpec:
    """What the file's columns make: what the model takes, the columns that are named, or all but the truth."""
    header = _header(path)
    truths = ("target_columns", data.target_columns) if data.target_columns else ("label_column", (data.label_column,))
    for key, names in (truths, ("columns", data.columns)):
        if missing := [name for name in names if name not in header]:
            raise ConfigError(f"data.{key}: {path.name} has no column {missing[0]!r}; it has {_listed(tuple(header))}")
    if twice := set(data.columns) & set(truths[1]):
        raise ConfigError(f"data.columns: {min(twice)!r} is what is to be predicted (data.{truths[0]}); leave it out")
    if spec is not None and not data.columns:
        return spec
    return _chosen(data.columns or tuple(name for name in header if name not in truths[1]), spec)


def _table_rows(path: Path, truth_column: str, spec: InputSpec) -> list[Row]:
    """All rows; each one's name is its truth."""
    rows = [row for batch, _ in open_source(path, spec, id_column=truth_column).batches(0, 1024) for row in batch]
    if not rows:
        raise ConfigError(f"data.path: {path.name} holds no rows")
    for number, row in enumerate(rows):
        problem = row.error or ("" if row.name else f"{truth_column!r} is empty")
        if problem:
            raise ConfigError(f"data.path: {path.name}, row {number}: {problem}; mend or delete the row")
    return rows


def _as_numbers(path: Path, name: str, cells: Sequence[int | str]) -> DoubleArray:
    """A column of truths, float64 [N]."""
    numbers = np.empty(len(cells))
    for row, cell in enumerate(cells):
        try:
            numbers[row] = float(cell)
        except ValueError:
            numbers[row] = math.nan
        if not math.isfinite(numbers[row]):
            raise ConfigError(f"data.target_columns: {path.name}, row {row}: {name!r} is {cell!r}, no finite number; "
                              "mend or delete the row")  # fmt: skip
    return numbers


def _chosen(names: tuple[str, ...], spec: InputSpec | None) -> InputSpec:
    """Named columns, of the kinds that the model knows them by, or else numbers."""
    known = {column.name: column for column in spec.columns} if spec else {}
    columns = [known.get(name, Column(name=name)) for name in names]
    return InputSpec(shape=[len(columns)], name="row", columns=columns)


def _header(path: Path) -> list[str]:
    if path.suffix.lower() == ".csv":
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            return next(csv.reader(file), [])
    parquet, arrow = need_parquet("reading Parquet")
    try:
        return list(parquet.read_schema(path).names)
    except arrow.ArrowException as error:
        raise InputError(f"not a readable Parquet file: {error}") from error
