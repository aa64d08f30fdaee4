"""Batch inference: a file of samples in, a file of predictions out, in bounded memory.

A run that was killed goes on where it stopped, and its output equals that of a run that was not, byte for byte:

out.csv.part       grows by whole chunks
out.csv.progress   how long it was after the last chunk, replaced whole; and what the run was begun with
out.csv            the .part, renamed, when all rows are in it

These predictions are neither logged nor watched by the monitors: a file scored at once would look like drift. Nothing
of a device is written, and it may run meanwhile.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec
import numpy as np

from edge_sdk.errors import ConfigError, IncompatibleError, InputError, ModelError, StoreError
from edge_sdk.files import crashpoint, fsync_folder, replace_file, storage_error
from edge_sdk.manifest import Manifest, manifest_bytes
from edge_sdk.model import Ran, SplitModel
from edge_sdk.rows import Row, Source, open_source
from edge_sdk.serving import Served
from edge_sdk.tables import Field, Record, Table, open_table
from edge_sdk.types import AnyArray, FloatArray, Variant

CHUNK_BATCHES = 32
"""Batches between two entries of the progress record: what a kill costs at most."""
_ERROR_CHARACTERS = 300


class Scorer(Protocol):
    """What `score` needs of a version: `edge_sdk.serving.Served` has it."""

    @property
    def manifest(self) -> Manifest:
        """What the model takes and says."""
        ...

    def run(self, x: AnyArray) -> Ran:
        """What the model says about checked inputs [N, ...]."""
        ...


class Summary(msgspec.Struct, frozen=True):
    """What a run did."""

    rows: int
    """In the output."""
    refused: dict[str, int]
    """Rows with an error instead of a prediction, counted by its type."""
    resumed: int
    """Rows that an earlier run had done."""
    left_out: tuple[str, ...]
    """Columns of the input that were not used."""


class _Progress(msgspec.Struct):
    """The record beside a growing output."""

    begun_with: dict[str, str]
    """Input, model and settings: another value of any of them would give another output."""
    rows: int = 0
    offset: int = 0
    """Bytes of the .part that count."""
    refused: dict[str, int] = {}
    complete: bool = False
    """All rows are done; what is left is to give the file its name."""


def score(
    served: Scorer,
    source: Path | str | Source,
    output: Path | str,
    *,
    batch: int = 32,
    id_column: str | None = None,
    restart: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Predict every sample of a file or folder and write a table of the predictions.

    The columns: `row` (number from 0) or `id` (of the id column, or the file's name; not checked to be unique);
    `label` and its `probability`, `present` for multilabel, `p_<label>` for each label; for regression
    `values_<target>`; for a raw model `outputs`, in JSON lines alone; `error` (type and message) of a row that the
    model cannot take, which has no prediction; `release` and `head`.

    Args:
        served: The version to score with.
        source: A .csv, .parquet, .npy or .npz file, a folder of .npy files or images, or a source of your own.
        output: Ends in .csv, .jsonl or .parquet. Replaced when the run is complete.
        batch: Samples given to the model at once.
        id_column: Column of a table that names the rows.
        restart: Begin anew, whatever an earlier run has left.
        progress: Called with how much of how much is read: rows, files, or bytes.

    Raises:
        ConfigError: Names or settings do not fit, or an earlier run was begun with other ones.
        InputError: The input as a whole cannot be read, does not fit the model, or changed meanwhile.
        IncompatibleError: The model has several inputs or a state.
        MissingExtraError: A package for the format is not installed.
        StoreError: The output cannot be written, or another process writes it.
    """
    manifest, output = served.manifest, Path(output)
    if batch < 1:
        raise ConfigError(f"a batch has at least one sample, not {batch}")
    if manifest.more_inputs or manifest.state:
        raise IncompatibleError(
            f"{manifest.name} has several inputs or a state; batch inference gives one array a sample"
        )
    if not output.parent.is_dir():
        raise ConfigError(f"there is no folder {output.parent} to write {output.name} to")
    rows = source if isinstance(source, Source) else open_source(Path(source), manifest.input, id_column=id_column)
    if output.exists() and rows.path.exists() and output.samefile(rows.path):
        raise ConfigError(f"{output.name} is both input and output; name another output")
    columns = _Columns(served, named=rows.named)
    table = open_table(output, columns.fields)
    begun_with = {
        "input": f"{rows.path.name} ({rows.identity()[:12]})",
        "model": _identity(served),
        "settings": f"batch {batch}, id column {id_column}, {_engine()}",
    }
    return _Run(rows, columns, table, output, begun_with, restart=restart).go(batch, progress or (lambda *_: None))


class _Run:
    """One growing output."""

    def __init__(
        self,
        source: Source,
        columns: _Columns,
        table: Table,
        output: Path,
        begun_with: dict[str, str],
        *,
        restart: bool,
    ) -> None:
        self._source, self._columns, self._table, self._output = source, columns, table, output
        self._part = output.with_name(output.name + ".part")
        self._record_path = output.with_name(output.name + ".progress")
        self._begun_with, self._restart = begun_with, restart

    def go(self, batch: int, progress: Callable[[int, int], None]) -> Summary:
        """Score what is left and give the output its name."""
        was_there = self._part.exists()
        try:
            with self._locked() as file:  # on a full disk closing it fails, too: what was not flushed is tried again
                record = self._found(was_there=was_there)
                if record.complete and not was_there:  # killed after the renaming
                    self._part.unlink()
                    self._record_path.unlink()
                    return self._summary(record, record.rows)
                resumed = record.rows
                self._grow(file, record, batch, progress)
                self._finish()
        except OSError as error:
            raise storage_error(error, f"{self._output.name} cannot be written") from error
        return self._summary(record, resumed)

    def _summary(self, record: _Progress, resumed: int) -> Summary:
        return Summary(record.rows, dict(sorted(record.refused.items())), resumed, self._source.left_out)

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The growing file, owned by this process."""
        try:
            file = os.fdopen(os.open(self._part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except OSError as error:
            raise storage_error(error, f"{self._part.name} cannot be written") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ours = os.path.samestat(os.fstat(file.fileno()), self._part.stat())
            except OSError:
                ours = False
            if not ours:  # held, or finished and renamed a moment ago
                raise StoreError(f"{self._part.name} is being written by another process; wait for it")
            yield file

    def _found(self, *, was_there: bool) -> _Progress:
        """The record of an earlier run that can be continued, or a new one."""
        fresh = _Progress(self._begun_with)
        if self._restart:
            self._record_path.unlink(missing_ok=True)
            return fresh
        try:
            found = msgspec.json.decode(self._record_path.read_bytes(), type=_Progress)
        except FileNotFoundError:
            return fresh
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{self._record_path.name} is damaged; pass --restart to begin anew: {error}") from error
        changed = [key for key, value in self._begun_with.items() if found.begun_with.get(key) != value]
        if not was_there and (changed or not (found.complete and self._output.exists())):
            return fresh  # the earlier run was finished, or its file is gone
        if changed:
            what = "; ".join(f"{k} was {found.begun_with.get(k)}, is {self._begun_with[k]}" for k in changed)
            raise ConfigError(f"{self._part.name} was begun differently: {what}. Pass --restart to begin anew")
        if was_there and self._part.stat().st_size < found.offset:
            raise StoreError(f"{self._part.name} is shorter than its record says; pass --restart to begin anew")
        return found

    def _grow(self, file: BinaryIO, record: _Progress, batch: int, progress: Callable[[int, int], None]) -> None:
        file.truncate(record.offset)
        file.seek(record.offset)
        if record.complete:
            return
        if not record.offset:
            file.write(self._table.head())
        waiting: list[Record] = []
        for number, (rows, done) in enumerate(self._source.batches(record.rows, batch), 1):
            waiting += self._columns.records(rows, record.refused)
            record.rows += len(rows)
            if number % CHUNK_BATCHES == 0:
                self._commit(file, record, waiting)
                waiting = []
            progress(done, self._source.total)
        if f"({self._source.identity()[:12]})" not in self._begun_with["input"]:
            raise InputError(f"{self._source.path.name} was changed while it was read; pass --restart to begin anew")
        record.complete = True
        self._commit(file, record, waiting)

    def _commit(self, file: BinaryIO, record: _Progress, records: list[Record]) -> None:
        """Flush the chunk to the disk, then the record that counts it in."""
        file.write(self._table.chunk(records))
        file.flush()
        crashpoint("batch:written")
        os.fsync(file.fileno())
        record.offset = file.tell()
        replace_file(self._record_path, msgspec.json.encode(record))

    def _finish(self) -> None:
        made = self._output.with_name(self._output.name + ".tmp")
        if self._table.finish(self._part, made):
            with made.open("rb") as file:
                os.fsync(file.fileno())
            crashpoint("batch:made")
            made.replace(self._output)
            crashpoint("batch:replaced")
            self._part.unlink()
        else:
            self._part.replace(self._output)
        fsync_folder(self._output.parent)
        crashpoint("batch:named")
        self._record_path.unlink()


# ---- from rows to records


class _Columns:
    """Scores rows, and lays what the model says out in columns."""

    def __init__(self, served: Scorer, *, named: bool) -> None:
        self._served, self._spec = served, served.manifest.input
        self._task = served.manifest.task
        self._labels = served.labels if isinstance(served, Served) else tuple(served.manifest.labels)
        self._version = [served.manifest.release, served.version.head if isinstance(served, Served) else 0]
        self._thresholds = np.array(served.manifest.thresholds, dtype=np.float32)
        self.fields = [Field("id", "text") if named else Field("row", "whole"), *self._said(), Field("error", "text"),
                       Field("release", "whole"), Field("head", "whole")]  # fmt: skip

    def _said(self) -> list[Field]:
        if self._task == "raw":
            return [Field("outputs", "object")]
        if self._task == "regression":
            return [Field(f"values_{target}", "number") for target in self._labels]
        present = [Field("present", "texts")] if self._task == "multilabel" else []
        each = [Field(f"p_{label}", "number") for label in self._labels]
        return [Field("label", "text"), Field("probability", "number"), *present, *each]

    def records(self, rows: Sequence[Row], refused: dict[str, int]) -> list[Record]:
        """A record for each row; counts those without a prediction into `refused`."""
        said: list[list[Any] | InputError | ModelError] = [
            row.error or InputError("the row was not read") for row in rows
        ]
        for places in _alike(rows):
            for place, found in zip(places, self._predict([rows[place].value for place in places]), strict=True):
                said[place] = found
        records: list[Record] = []
        nothing = [None] * (len(self.fields) - 4)
        for row, found in zip(rows, said, strict=True):
            if isinstance(found, Exception):
                kind = type(found).__name__
                refused[kind] = refused.get(kind, 0) + 1
                records.append([row.name, *nothing, f"{kind}: {found}"[:_ERROR_CHARACTERS], *self._version])
            else:
                records.append([row.name, *found, None, *self._version])
        return records

    def _predict(self, values: list[Any]) -> Sequence[list[Any] | InputError | ModelError]:
        """Cells, or an error, for each value: together if nothing is wrong, else those that are right together."""
        try:
            return self._cells(self._served.run(self._check(values)))
        except (InputError, ModelError):
            pass
        found: list[list[Any] | InputError | ModelError] = []
        checked = []
        for value in values:
            try:
                checked.append(self._check([value]))
            except InputError as error:
                found.append(error)
            else:
                found.append([])
        if not checked:
            return found
        try:
            cells: Sequence[list[Any] | ModelError] = self._cells(self._served.run(np.concatenate(checked)))
        except ModelError:  # one of them makes the model fail
            cells = [self._alone(one) for one in checked]
        rest = iter(cells)
        return [one if isinstance(one, InputError) else next(rest) for one in found]

    def _alone(self, checked: AnyArray) -> list[Any] | ModelError:
        try:
            return self._cells(self._served.run(checked))[0]
        except ModelError as error:
            return error

    def _check(self, values: list[Any]) -> AnyArray:
        return self._spec.check_batch(np.stack(values) if isinstance(values[0], np.ndarray) else values)

    def _cells(self, ran: Ran) -> list[list[Any]]:
        if self._task == "raw":
            return [[{name: value.tolist() for name, value in row.items()}] for row in ran.outputs]
        numbers = _short(ran.scores)
        if self._task == "regression":
            return numbers
        best = ran.scores.argmax(axis=1).tolist()
        cells: list[list[Any]] = [[self._labels[i], row[i], *row] for i, row in zip(best, numbers, strict=True)]
        if self._task == "multilabel":
            for row, above in zip(cells, ran.scores >= self._thresholds, strict=True):
                row.insert(2, [self._labels[i] for i in np.flatnonzero(above)])
        return cells


def _alike(rows: Sequence[Row]) -> list[list[int]]:
    """Places of the rows that can be stacked: samples of any size come in several shapes."""
    groups: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        if row.error is None:
            kind = (row.value.shape, row.value.dtype) if isinstance(row.value, np.ndarray) else None
            groups.setdefault(kind, []).append(place)
    return list(groups.values())


def _short(numbers: FloatArray) -> list[list[float]]:
    """float32 [N, C] as the shortest decimals that give the same float32 again."""
    result: list[list[float]] = numbers.astype(str).astype(np.float64).tolist()
    return result


def _identity(served: Scorer) -> str:
    seen, named = hashlib.sha256(manifest_bytes(served.manifest)), f"release {served.manifest.release}"
    if isinstance(served, Served):
        named += f", head {served.version.head}, {served.variant}"
        if isinstance(served.model, SplitModel):
            seen.update(served.model.head.head.to_bytes())
    return f"{named} ({seen.hexdigest()[:12]})"


def _engine() -> str:
    import onnxruntime  # noqa: PLC0415 - importing the SDK stays light

    return f"ONNX Runtime {onnxruntime.__version__}"  # another version may round differently


def begun_variant(output: Path) -> Variant | None:
    """Which trunk an unfinished run has scored with, so that the rest is scored with the same."""
    try:
        record = msgspec.json.decode(output.with_name(output.name + ".progress").read_bytes(), type=_Progress)
    except (OSError, msgspec.MsgspecError):
        return None
    named = record.begun_with.get("model", "")
    return "int8" if ", int8 (" in named else "fp32" if ", fp32 (" in named else None
