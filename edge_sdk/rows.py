"""Files of samples, read a few rows at a time: CSV, Parquet, .npy, .npz, and folders of .npy files or images.

A source never holds more than one batch in memory, and can begin anywhere. A row that cannot be read is a row with an
error; only what makes the whole file useless is raised.
"""

from __future__ import annotations

import csv
import hashlib
import math
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.errors import ConfigError, DtypeError, InputError, MissingExtraError, NonFiniteError, ShapeError
from edge_sdk.schema import ANY, InputSpec
from edge_sdk.types import AnyArray

IMAGES = (".png", ".jpg", ".jpeg")
_READ_CELLS = 200_000
"""About as many values of a Parquet file are read at once."""
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True, slots=True)
class Row:
    """One sample: what the app would give to `predict`, or why it cannot be read."""

    name: int | str
    """Number of the row in its file, from 0; or what names it: the id column, the file."""
    value: Any = None
    error: InputError | None = None


Batch = tuple[list[Row], int]
"""Rows, and how much of `Source.total` is read after them."""


class Source(ABC):
    """Samples in a file or folder.

    Attributes:
        path: Where they are.
        named: Whether rows have names of their own; else numbers.
        total: How much there is to read: rows, files, or bytes.
        left_out: Columns that are not used.
    """

    named = False
    total = 0
    left_out: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path

    def identity(self) -> str:
        """Equal as long as the source is unchanged: names, sizes and modification times of its files."""
        seen = hashlib.sha256()
        for file in self._files():
            stat = file.stat()
            seen.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return seen.hexdigest()

    def _files(self) -> Sequence[Path]:
        return [self.path]

    @abstractmethod
    def batches(self, start: int, size: int) -> Iterator[Batch]:
        """All rows from number `start` on, `size` at a time.

        Raises:
            InputError: The rest of the file cannot be read.
        """


def open_source(path: Path, spec: InputSpec, *, id_column: str | None = None) -> Source:
    """The source for what is at `path`.

    Args:
        path: A file ending in .csv, .parquet, .npy or .npz, or a folder of .npy files or images.
        spec: What one sample must look like.
        id_column: Column of a table that names the rows.

    Raises:
        ConfigError: The ending is none of these, or a file of this kind has no column to name its rows.
        InputError: The file is not readable, or holds something else than the model takes.
        MissingExtraError: A package that reads it is not installed.
    """
    tables = {".csv": CsvSource, ".parquet": ParquetSource}
    arrays = {".npy": NpySource, ".npz": NpzSource}
    ending = path.suffix.lower()
    try:
        if not path.is_dir() and ending in tables:
            return tables[ending](path, spec, id_column)
        if not path.is_dir() and ending not in arrays:
            raise ConfigError(f"{path.name}: expected .csv, .parquet, .npy, .npz or a folder of .npy files or images")
        if id_column is not None:
            raise ConfigError(f"{path.name} has no columns, so none named {id_column!r}; leave the id column out")
        return FolderSource(path, spec) if path.is_dir() else arrays[ending](path, spec)
    except OSError as error:
        raise InputError(f"{path.name} cannot be read: {error.strerror or error}") from error


# ---- tables


class _Columns:
    """Which columns of a table make a sample: those the contract names, or else the first ones in order."""

    def __init__(self, header: Sequence[str], spec: InputSpec, id_column: str | None, file: str) -> None:
        self._spec, self._dtype = spec, np.dtype(spec.dtype)
        if id_column is not None and id_column not in header:
            raise ConfigError(f"{file} has no column {id_column!r} to take ids from; it has {_listed(header)}")
        self.id_at = None if id_column is None else header.index(id_column)
        if spec.columns:
            self.names = [column.name for column in spec.columns]
            if missing := [name for name in self.names if name not in header]:
                raise ShapeError(f"{file} lacks column {_listed(missing)}; the model takes {_listed(self.names)}")
            if twice := [name for name in self.names if header.count(name) > 1]:
                raise ShapeError(f"{file} has column {_listed(twice)} more than once")
            self.at = [header.index(name) for name in self.names]
        else:
            if ANY in spec.shape:
                raise ShapeError(f"{file}: a table cannot hold samples of any size {spec.shape}; use .npy files")
            count = math.prod(spec.shape)
            self.at = [i for i in range(len(header)) if i != self.id_at][:count]
            if len(self.at) < count:
                raise ShapeError(
                    f"{file} has {len(self.at)} columns of values; the model takes {count}, for shape {spec.shape}"
                )
            self.names = [header[i] for i in self.at]
        used = {self.id_at, *self.at}
        self.left_out = tuple(name for i, name in enumerate(header) if i not in used)

    def value(self, cells: Sequence[Any]) -> Any:
        """A sample, of the cells of its columns."""
        if self._spec.columns:
            for name, cell in zip(self.names, cells, strict=True):
                if isinstance(cell, str) and not cell.isascii():
                    _check_text(name, cell)
            return dict(zip(self.names, cells, strict=True))
        numbers = [self._number(name, cell) for name, cell in zip(self.names, cells, strict=True)]
        try:
            return np.array(numbers, dtype=np.float32 if self._dtype.kind == "f" else None).reshape(self._spec.shape)
        except (ValueError, OverflowError) as error:
            raise DtypeError(f"the row does not make an array: {error}") from error

    def _number(self, name: str, cell: Any) -> float | int:
        whole = self._dtype.kind != "f"
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            if whole:
                raise NonFiniteError(f"column {name!r} is empty; impute or drop the sample")
            return math.nan
        try:
            # whole numbers beyond 2**53 would lose digits as float
            return int(cell) if whole and isinstance(cell, str | int) else float(cell)
        except (TypeError, ValueError, OverflowError) as error:
            raise DtypeError(f"column {name!r}: expected a number, got {cell!r}") from error


def _check_text(name: str, cell: str) -> None:
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"column {name!r}: the text is not UTF-8") from error


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


class CsvSource(Source):
    """A CSV file in UTF-8 with a header; empty lines are no rows."""

    def __init__(self, path: Path, spec: InputSpec, id_column: str | None = None) -> None:
        super().__init__(path)
        self.named = id_column is not None
        self.total = path.stat().st_size
        with path.open("rb") as file:
            try:
                header = next(csv.reader(_lines(file)), [])
            except csv.Error as error:
                raise InputError(f"{path.name} is not CSV: {error}") from error
        if not header:
            raise ShapeError(f"{path.name} is empty; expected a header with the names of the columns")
        self._width = len(header)
        self._columns = _Columns(header, spec, id_column, path.name)
        self.left_out = self._columns.left_out

    def batches(self, start: int, size: int) -> Iterator[Batch]:
        """All rows from number `start` on, `size` at a time."""
        with self.path.open("rb") as file:
            table = csv.reader(_lines(file))
            next(table)
            rows = islice(self._rows(table), start, None)
            while batch := list(islice(rows, size)):
                yield batch, file.tell()

    def _rows(self, table: Iterator[list[str]]) -> Iterator[Row]:
        number = 0
        while True:
            cells: list[str] = []
            problem = None
            try:
                cells = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                problem = InputError(f"the line is not CSV: {error}")
            if cells or problem:
                yield self._row(number, cells, problem)
                number += 1

    def _row(self, number: int, cells: list[str], problem: InputError | None) -> Row:
        columns = self._columns
        name: int | str = "" if self.named else number
        if columns.id_at is not None and columns.id_at < len(cells):
            name = _printable(cells[columns.id_at])
        if problem is None and len(cells) != self._width:
            problem = ShapeError(f"{len(cells)} fields where the header has {self._width}")
        if problem is not None:
            return Row(name, error=problem)
        try:
            return Row(name, columns.value([cells[i] for i in columns.at]))
        except InputError as error:
            return Row(name, error=error)


def _lines(file: Any) -> Iterator[str]:
    """Lines as text. Bytes that are not UTF-8 come through as surrogates, so that they spoil their row alone."""
    for number, line in enumerate(file):
        yield line.decode("utf-8" if number else "utf-8-sig", errors="surrogateescape")


class ParquetSource(Source):
    """A Parquet file: a column for each value, or one column of lists that are samples."""

    def __init__(self, path: Path, spec: InputSpec, id_column: str | None = None) -> None:
        super().__init__(path)
        parquet, arrow = need_parquet("reading Parquet")
        self.named, self._spec = id_column is not None, spec
        try:
            # columns are read piece by piece, not a row group at once
            self._file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16)
        except arrow.ArrowException as error:
            raise InputError(f"{path.name} is not a readable Parquet file: {error}") from error
        self._errors = arrow.ArrowException
        self.total = self._file.metadata.num_rows
        schema = self._file.schema_arrow
        lists = [name for name in schema.names if arrow.types.is_nested(schema.field(name).type) and name != id_column]
        self._samples = None
        if not spec.columns and len(lists) == 1:
            self._samples = lists[0]
            self._columns = _Columns([*lists, *([id_column] if id_column else [])],
                                     InputSpec(shape=[1]), id_column, path.name)  # fmt: skip
            self.left_out = tuple(name for name in schema.names if name not in (lists[0], id_column))
        else:
            self._columns = _Columns(schema.names, spec, id_column, path.name)
            self.left_out = self._columns.left_out
        self._id = id_column

    def batches(self, start: int, size: int) -> Iterator[Batch]:
        """All rows from number `start` on, `size` at a time."""
        group = skipped = 0
        while group < self._file.num_row_groups:
            rows = self._file.metadata.row_group(group).num_rows
            if skipped + rows > start:
                break
            skipped += rows
            group += 1
        groups = range(group, self._file.num_row_groups)
        found = islice(self._rows(list(groups), skipped, size), start - skipped, None) if groups else iter(())
        done = start
        while batch := list(islice(found, size)):
            done += len(batch)
            yield batch, done

    def _rows(self, groups: list[int], number: int, size: int) -> Iterator[Row]:
        names = [self._samples] if self._samples else self._columns.names
        size = max(size, min(1024, _READ_CELLS // math.prod(abs(d) for d in self._spec.shape)))  # small ones are slow
        wanted = [*names, *([self._id] if self._id else [])]
        try:
            for batch in self._file.iter_batches(size, row_groups=groups, columns=wanted, use_threads=False):
                cells = [batch.column(name).to_pylist() for name in names]
                ids = batch.column(self._id).to_pylist() if self._id else range(number, number + batch.num_rows)
                for name, *values in zip(ids, *cells, strict=True):
                    yield self._row(_printable("" if name is None else str(name)) if self._id else name, values)
                number += batch.num_rows
        except (self._errors, OSError) as error:
            raise InputError(f"{self.path.name} is damaged near row {number}: {error}") from error

    def _row(self, name: int | str, values: list[Any]) -> Row:
        try:
            if self._samples is None:
                return Row(name, self._columns.value(values))
            sample = np.array(values[0])
            flat = ANY not in self._spec.shape and sample.size == math.prod(self._spec.shape)
            return Row(name, sample.reshape(self._spec.shape) if flat else sample)
        except InputError as error:
            return Row(name, error=error)
        except (ValueError, TypeError) as error:
            return Row(name, error=InputError(f"the sample is not an array: {error}"))


def need_parquet(feature: str) -> tuple[Any, Any]:
    """`pyarrow.parquet` and `pyarrow`.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 - behind an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError(feature, "parquet") from error
    return parquet, pa


# ---- arrays


class NpySource(Source):
    """Samples stacked in one .npy file, mapped into memory."""

    def __init__(self, path: Path, spec: InputSpec) -> None:
        super().__init__(path)
        try:
            self._array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise InputError(f"{path.name} is not a readable .npy file of numbers: {error}") from error
        if not isinstance(self._array, np.ndarray):
            raise InputError(f"{path.name} holds several arrays; name it .npz")
        _check_stack(self._array.shape, self._array.dtype, spec, path.name)
        self.total = len(self._array)

    def batches(self, start: int, size: int) -> Iterator[Batch]:
        """All rows from number `start` on, `size` at a time."""
        for first in range(start, self.total, size):
            block = np.array(self._array[first : first + size])
            yield _numbered(block, first), first + len(block)


class NpzSource(Source):
    """Samples stacked in one array of an .npz file: the one named as the model's input, `x`, or the only one."""

    def __init__(self, path: Path, spec: InputSpec) -> None:
        super().__init__(path)
        try:
            with zipfile.ZipFile(path) as file:
                held = [name.removesuffix(".npy") for name in file.namelist()]
                self._name = next((name for name in (spec.name, "x") if name in held), held[0] if held else "")
                if not held or (self._name not in (spec.name, "x") and len(held) > 1):
                    raise ShapeError(f"{path.name} holds {_listed(held)}; expected an array named {spec.name!r} or 'x'")
                with file.open(self._name + ".npy") as member:
                    self._shape, fortran, self._dtype = _npy_header(member)
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError, NotImplementedError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path.name} is not a readable .npz file of numbers: {error}") from error
        if fortran and len(self._shape) > 1:
            raise InputError(f"{path.name} holds {self._name!r} column by column; save np.ascontiguousarray of it")
        _check_stack(self._shape, self._dtype, spec, path.name)
        self.total = self._shape[0]

    def batches(self, start: int, size: int) -> Iterator[Batch]:
        """All rows from number `start` on, `size` at a time."""
        row_bytes = math.prod(self._shape[1:]) * self._dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as file, file.open(self._name + ".npy") as member:
                _npy_header(member)
                member.seek(member.tell() + start * row_bytes)
                for first in range(start, self.total, size):
                    rows = min(size, self.total - first)
                    data = member.read(rows * row_bytes)
                    block = np.frombuffer(data, self._dtype).reshape(rows, *self._shape[1:])
                    yield _numbered(block, first), first + rows
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
            raise InputError(f"{self.path.name} is damaged: {error}") from error


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and dtype; leaves the file at the first value."""
    form: Any = np.lib.format
    read = form.read_array_header_1_0 if form.read_magic(file) == (1, 0) else form.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype


def _check_stack(shape: tuple[int, ...], dtype: np.dtype[Any], spec: InputSpec, file: str) -> None:
    """Refuse an array none of whose rows could be right."""
    if dtype.kind not in "fiub":
        raise DtypeError(f"{file} holds {dtype}; expected numbers")
    wanted = tuple(spec.shape)
    if len(shape) != len(wanted) + 1 or any(w not in (ANY, s) for w, s in zip(wanted, shape[1:], strict=False)):
        expected = ", ".join("any" if size == ANY else str(size) for size in wanted)
        hint = f"; give one sample as shape (1, {expected})" if len(shape) == len(wanted) else ""
        raise ShapeError(f"{file} has shape {shape}; expected (N, {expected}), the samples stacked{hint}")


def _numbered(block: AnyArray, first: int) -> list[Row]:
    return [Row(first + i, sample) for i, sample in enumerate(block)]


# ---- folders


class FolderSource(Source):
    """One sample a file, .npy or PNG or JPEG, sorted by name. Other files and subfolders are not looked at.

    Images are decoded to uint8 in the channels and layout of the contract's shape, as they are stored: not turned as
    their EXIF data say. Where the contract allows 0 to 1 at most, they are divided by 255.
    """

    named = True

    def __init__(self, path: Path, spec: InputSpec) -> None:
        super().__init__(path)
        self._spec = spec
        self._found = sorted(
            file for file in path.iterdir() if file.suffix.lower() in (".npy", *IMAGES) and file.is_file()
        )
        if not self._found:
            raise InputError(f"the folder {path.name} holds no file ending in .npy, {', '.join(IMAGES)}")
        if any(file.suffix.lower() != ".npy" for file in self._found):
            need_pillow("reading images")
        self.total = len(self._found)

    def _files(self) -> Sequence[Path]:
        return self._found

    def batches(self, start: int, size: int) -> Iterator[Batch]:
        """All files from number `start` on, `size` at a time."""
        for first in range(start, self.total, size):
            files = self._found[first : first + size]
            yield [self._row(file) for file in files], first + len(files)

    def _row(self, file: Path) -> Row:
        name = _printable(file.name)
        try:
            if file.suffix.lower() == ".npy":
                return Row(name, _one_array(file))
            return Row(name, decode_image(file, self._spec))
        except InputError as error:
            return Row(name, error=error)
        except Exception as error:  # noqa: BLE001 - decoders raise whatever a damaged file makes them raise
            said = str(error).replace(str(file), name)
            return Row(name, error=InputError(f"the file cannot be read: {said or type(error).__name__}"))


def _one_array(file: Path) -> AnyArray:
    """Mapped, so that a wrong one is refused before it is read."""
    found = np.load(file, mmap_mode="r", allow_pickle=False)
    if not isinstance(found, np.ndarray):
        found.close()
        raise InputError("the file holds several arrays, not one sample")
    return found


def decode_image(file: Path, spec: InputSpec) -> AnyArray:
    """A PNG or JPEG file as the array that the contract expects: uint8, or float32 where it allows 0 to 1 at most.

    Raises:
        InputError: The model takes no images, or the file has more than 8 bits a channel.
    """
    layout, channels = image_layout(spec)
    image_module = need_pillow("reading images")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a picture too large to be one is refused
        with image_module.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise DtypeError(f"the image has mode {image.mode}; expected 8 bits a channel")
            pixels: AnyArray = np.asarray(image.convert(_MODES[channels]))
    if spec.low == 0 and spec.high == 1 and spec.dtype == "float32":
        pixels = pixels.astype(np.float32) / 255
    if layout == "hw":
        return pixels
    pixels = pixels.reshape(*pixels.shape[:2], channels)
    return pixels.transpose(2, 0, 1) if layout == "chw" else pixels


def image_layout(spec: InputSpec) -> tuple[str, int]:
    """Layout (chw, hwc or hw) and number of channels of images in the contract's shape.

    Raises:
        InputError: It is no shape of an image.
    """
    shape = spec.shape
    if len(shape) == 2:
        return "hw", 1
    if len(shape) == 3 and shape[0] in (1, 3):
        return "chw", shape[0]
    if len(shape) == 3 and shape[2] in _MODES:
        return "hwc", shape[2]
    if len(shape) == 3 and shape[0] in _MODES:
        return "chw", shape[0]
    raise InputError(f"the model takes shape {shape}, which is no image of 1, 3 or 4 channels")


def need_pillow(feature: str) -> Any:
    """`PIL.Image`.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    try:
        from PIL import Image  # noqa: PLC0415 - behind an extra
    except ImportError as error:
        raise MissingExtraError(feature, "images") from error
    return Image
