"""CSV tables as the monitors see them: columns that were normal say what each column is."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import numpy as np

from edge_sdk.drift.features import MAX_FEATURES
from edge_sdk.errors import ConfigError, DtypeError, InputError, NonFiniteError, ShapeError
from edge_sdk.schema import Column
from edge_sdk.types import AnyArray, DoubleArray, FloatArray, Task

MAX_CATEGORIES = 64
_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none"})
_MILLISECONDS = 1e11
"""Seconds since the epoch reach this in the year 5138; what is larger counts milliseconds."""
_CLASSES = 20
"""Numbers of more than so many kinds are values, not classes."""


@dataclass(frozen=True, slots=True)
class Roles:
    """Columns that are no features, by name; empty: there is none.

    Attributes:
        time: Seconds or milliseconds since the epoch, or ISO 8601; UTC if it does not say.
        prediction: What the model said.
        confidence: How sure it was, in [0, 1].
        label: What was true; empty where nobody knows.
        ignore: Not looked at.
    """

    time: str = ""
    prediction: str = ""
    confidence: str = ""
    label: str = ""
    ignore: tuple[str, ...] = ()

    @property
    def named(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(name for name in (self.time, self.prediction, self.confidence, self.label, *self.ignore) if name)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a table.

    Attributes:
        features: float32 [N, F]; NaN: missing.
        times: float64 [N], seconds since the epoch; None: the table has no times.
        scores: float32 [N, C], one for each class or the predicted value; None: it has no predictions.
        right: float64 [N]: 1 or 0, for values the absolute error; NaN: no label; None: it has no labels.
    """

    features: FloatArray
    times: DoubleArray | None
    scores: FloatArray | None
    right: DoubleArray | None

    def __len__(self) -> int:
        return len(self.features)


class Layout:
    """What the columns are, as learned from a table of normal rows.

    Attributes:
        columns: The features.
        classes: What was predicted, if that is classes.
        task: "classification" or "regression"; of a table without predictions "raw".
        left_out: Columns that are not used: those beyond 64, and texts of many kinds.
    """

    def __init__(self, path: Path, roles: Roles) -> None:
        """Read the table once.

        Raises:
            InputError: It cannot be read, is no CSV, or has no rows or no features.
            ConfigError: A column that is named is not there.
        """
        self.roles = roles
        header, cells = _read(path)
        _check_roles(roles, header, path.name)
        kinds, numeric = _survey(header, cells, path.name)
        self._header = header
        self.columns: list[Column] = []
        self.left_out: list[str] = []
        for name in header:
            if name in roles.named:
                continue
            if len(self.columns) == MAX_FEATURES or not (numeric[name] or len(kinds[name]) <= MAX_CATEGORIES):
                self.left_out.append(name)
            else:
                column = Column(name) if numeric[name] else Column(name, "category", sorted(kinds[name]))
                self.columns.append(column)
        if not self.columns:
            raise ShapeError(f"{path.name} has no column of numbers or of at most {MAX_CATEGORIES} categories to watch")
        self.task: Task = "raw"
        self.classes: tuple[str, ...] = ()
        if said := kinds.get(roles.prediction):
            self.task = "regression" if numeric[roles.prediction] and len(said) > _CLASSES else "classification"
            if self.task == "classification":
                self.classes = tuple(sorted(said, key=_in_order))
        if roles.prediction and self.task != "regression" and not 2 <= len(self.classes) <= MAX_CATEGORIES:
            raise InputError(
                f"{path.name}: column {roles.prediction!r} has {len(self.classes)} classes; "
                f"2 to {MAX_CATEGORIES} are watched, or numbers"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the features."""
        return tuple(column.name for column in self.columns)

    @property
    def categories(self) -> dict[str, list[float]]:
        """Codes of the columns that are categories."""
        return {c.name: [float(i) for i in range(len(c.values))] for c in self.columns if c.kind == "category"}

    def not_watched(self, path: Path) -> list[str]:
        """Columns of a table with these that are not used: those left out here, and those that are not here at all."""
        header, _ = _read(path)
        return [*self.left_out, *(name for name in header if name not in self._header)]

    def read(self, path: Path, size: int) -> Iterator[Rows]:
        """The rows of a table with these columns, `size` at a time; others are not looked at.

        Raises:
            InputError: It cannot be read, lacks a column, a value is none of its column, or its rows are not in the
                order of their times; says which row.
        """
        header, cells = _read(path)
        if missing := [name for name in (*self.names, *self._wanted) if name not in header]:
            raise ShapeError(f"{path.name} lacks column {_listed(missing)}; it has {_listed(header)}")
        at = {name: header.index(name) for name in (*self.names, *self._wanted)}
        places = [at[column.name] for column in self.columns]
        roles, number, latest = self.roles, 0, -math.inf
        while part := list(islice(cells, size)):
            try:
                features = [
                    [_encode(column, row[i]) for column, i in zip(self.columns, places, strict=True)] for row in part
                ]
                times = [_time(row[at[roles.time]]) for row in part] if roles.time else None
                scores = [self._scores(row, at) for row in part] if roles.prediction else None
                right = [self._right(row, at) for row in part] if roles.label else None
            except InputError as error:
                raise type(error)(f"{path.name}, {self._first_bad(part, at, number)}{error}") from error
            for i, time in enumerate(times or [], number + 1):
                if time < latest:
                    raise InputError(
                        f"{path.name}, row {i}: its time is before that of the row above; "
                        f"sort the rows by {roles.time!r}, oldest first"
                    )
                latest = time
            number += len(part)
            yield Rows(
                np.array(features, np.float32),
                None if times is None else np.array(times, np.float64),
                None if scores is None else np.array(scores, np.float32),
                None if right is None else np.array(right, np.float64),
            )

    def read_all(self, path: Path) -> Rows:
        """All rows at once."""
        parts = list(self.read(path, 4096))
        joined: list[AnyArray | None] = []
        for name in ("features", "times", "scores", "right"):
            arrays = [getattr(part, name) for part in parts]
            joined.append(None if any(array is None for array in arrays) else np.concatenate(arrays))
        features, times, scores, right = joined
        assert features is not None
        return Rows(features, times, scores, right)

    @property
    def _wanted(self) -> tuple[str, ...]:
        roles = self.roles
        return tuple(name for name in (roles.time, roles.prediction, roles.confidence, roles.label) if name)

    def _first_bad(self, part: Sequence[Sequence[str]], at: Mapping[str, int], number: int) -> str:
        """Which row it was; only asked for once something is wrong."""
        for i, row in enumerate(part):
            try:
                for column in self.columns:
                    _encode(column, row[at[column.name]])
                for check, role in ((_time, self.roles.time), (_share, self.roles.confidence)):
                    if role:
                        check(row[at[role]])
                if self.roles.prediction:
                    self._scores(row, at)
                if self.roles.label:
                    self._right(row, at)
            except InputError:
                return f"row {number + i + 1}: "
        return ""

    def _scores(self, row: Sequence[str], at: Mapping[str, int]) -> list[float]:
        said = row[at[self.roles.prediction]]
        if self.task == "regression":
            return [_number(self.roles.prediction, said)]
        count = len(self.classes)
        sure = _share(row[at[self.roles.confidence]]) if self.roles.confidence else 1.0
        if said not in self.classes:  # a class that never was: nothing that is known was said
            return [0.0] * count
        scores = [(1.0 - sure) / (count - 1)] * count
        scores[self.classes.index(said)] = sure
        return scores

    def _right(self, row: Sequence[str], at: Mapping[str, int]) -> float:
        said, true = row[at[self.roles.prediction]], row[at[self.roles.label]]
        if true.lower() in _MISSING:
            return math.nan
        if self.task == "regression":
            return abs(_number(self.roles.label, true) - _number(self.roles.prediction, said))
        return float(said == true)


def _read(path: Path) -> tuple[list[str], Iterator[list[str]]]:
    """Header and rows of a CSV file in UTF-8; empty lines are no rows."""
    try:
        with path.open("rb") as file:
            first = file.readline()
    except OSError as error:
        raise InputError(f"{path.name} cannot be read: {error.strerror or error}") from error
    if b"\0" in first:
        raise InputError(f"{path.name} is not a CSV file: it holds zero bytes")
    rows = _lines(path)
    header = [name.strip() for name in next(rows, [])]
    if not any(header):
        raise ShapeError(f"{path.name} is empty; expected a header with the names of the columns")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise ShapeError(f"{path.name} has column {_listed(twice)} more than once")

    def checked() -> Iterator[list[str]]:
        for number, row in enumerate(rows, 1):
            if len(row) != len(header):
                raise ShapeError(f"{path.name}, row {number}: {len(row)} fields where the header has {len(header)}")
            yield [cell.strip() for cell in row]

    return header, checked()


def _check_roles(roles: Roles, header: Sequence[str], file: str) -> None:
    if missing := [name for name in roles.named if name not in header]:
        raise ConfigError(f"{file} has no column {_listed(missing)}; it has {_listed(header)}")
    for name, what in ((roles.label, "labels say"), (roles.confidence, "a confidence says")):
        if name and not roles.prediction:
            raise ConfigError(f"{what} something only beside predictions: name their column as well")


def _survey(
    header: Sequence[str], cells: Iterator[list[str]], file: str
) -> tuple[dict[str, set[str]], dict[str, bool]]:
    """The different values of each column, 65 at most, and whether all are numbers."""
    kinds: dict[str, set[str]] = {name: set() for name in header}
    numeric = dict.fromkeys(header, True)
    row: list[str] = []
    for row in cells:
        for name, cell in zip(header, row, strict=True):
            if cell.lower() in _MISSING:
                continue
            numeric[name] = numeric[name] and _is_number(cell)
            if len(kinds[name]) <= MAX_CATEGORIES:
                kinds[name].add(cell)
    if not row:
        raise InputError(f"{file} has a header and no rows")
    return kinds, numeric


def _lines(path: Path) -> Iterator[list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.reader(file):
                if row:
                    yield row
    except OSError as error:
        raise InputError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path.name} is not a CSV file in UTF-8: {error}") from error


def _encode(column: Column, cell: str) -> float:
    if column.kind == "number":
        return _number(column.name, cell)
    return math.nan if cell.lower() in _MISSING else column.encode(cell)


def _number(name: str, cell: str) -> float:
    if cell.lower() in _MISSING:
        return math.nan
    try:
        value = float(cell)
    except ValueError as error:
        raise DtypeError(f"column {name!r}: expected a number, got {cell!r}") from error
    if not abs(value) < 3.4e38:
        raise NonFiniteError(f"column {name!r}: {cell} is too large to watch; leave it empty if it means missing")
    return value


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _share(cell: str) -> float:
    value = _number("confidence", cell)
    if not 0 <= value <= 1:
        raise InputError(f"a confidence lies in 0 to 1, got {cell!r}")
    return value


def _time(cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        try:
            when = datetime.fromisoformat(cell)
        except ValueError as error:
            raise InputError(f"expected a time as seconds since the epoch or ISO 8601, got {cell!r}") from error
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(value):
        raise InputError(f"expected a time, got {cell!r}")
    return value / 1000 if abs(value) > _MILLISECONDS else value


def _in_order(name: str) -> tuple[float, str]:
    return (float(name), name) if _is_number(name) else (math.inf, name)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
