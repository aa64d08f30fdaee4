"""Tables that are written a chunk at a time and never in memory whole: CSV, JSON lines, Parquet.

While a table grows, its bytes only ever get longer, so that a writer which was killed can cut them back to the last
chunk it knows of and go on. CSV and JSON lines stand as they will be; Parquet, which ends in an index, is made from
an Arrow stream at the end.
"""

from __future__ import annotations

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from edge_sdk.errors import ConfigError
from edge_sdk.rows import need_parquet

_GROUP_CELLS = 2_000_000
"""About as many cells are put into one row group of a Parquet file."""


class Field(NamedTuple):
    """A column of the output."""

    name: str
    kind: Literal["whole", "number", "text", "texts", "object"]


Record = Sequence[Any]
"""One row: a cell for each field. None: there is none."""


class Table(ABC):
    """How records become bytes."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = list(fields)

    @abstractmethod
    def head(self) -> bytes:
        """What stands before the first record."""

    @abstractmethod
    def chunk(self, records: Sequence[Record]) -> bytes:
        """Records as bytes; what came before does not matter."""

    def finish(self, grown: Path, target: Path) -> bool:
        """Make the final file of the grown one, if that is another. Returns whether it is."""
        del grown, target
        return False


def open_table(path: Path, fields: Sequence[Field]) -> Table:
    """The table for a file name.

    Raises:
        ConfigError: Its ending is none of .csv, .jsonl, .parquet, or the fields do not fit it.
        MissingExtraError: pyarrow is not installed.
    """
    tables: dict[str, type[Table]] = {".csv": CsvTable, ".jsonl": JsonTable, ".parquet": ParquetTable}
    ending = path.suffix.lower()
    if ending not in tables:
        raise ConfigError(f"{path.name}: the output ends in .csv, .jsonl or .parquet, not {ending or 'nothing'!r}")
    if ending != ".jsonl" and any(field.kind == "object" for field in fields):
        raise ConfigError(f"{path.name}: what a raw model puts out fits no columns; name the output .jsonl")
    return tables[ending](fields)


class CsvTable(Table):
    """CSV in UTF-8 with a header. Lists stand as JSON."""

    def head(self) -> bytes:
        """The names of the columns."""
        return self.chunk([[field.name for field in self.fields]])

    def chunk(self, records: Sequence[Record]) -> bytes:
        """A line for each record."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        for record in records:
            lines.writerow([msgspec.json.encode(c).decode() if isinstance(c, list | tuple) else c for c in record])
        return text.getvalue().encode()


class JsonTable(Table):
    """An object for each line."""

    def head(self) -> bytes:
        """Nothing."""
        return b""

    def chunk(self, records: Sequence[Record]) -> bytes:
        """A line for each record."""
        names = [field.name for field in self.fields]
        return b"".join(msgspec.json.encode(dict(zip(names, r, strict=True))) + b"\n" for r in records)


class ParquetTable(Table):
    """Parquet; an Arrow stream while it grows."""

    def __init__(self, fields: Sequence[Field]) -> None:
        super().__init__(fields)
        self._parquet, arrow = need_parquet("writing Parquet")
        self._arrow = arrow
        types = {"whole": arrow.int64(), "number": arrow.float32(), "text": arrow.string(),
                 "texts": arrow.list_(arrow.string())}  # fmt: skip
        self._schema = arrow.schema([(field.name, types[field.kind]) for field in fields])

    def head(self) -> bytes:
        """The schema."""
        return bytes(self._schema.serialize())

    def chunk(self, records: Sequence[Record]) -> bytes:
        """One batch of the stream."""
        if not records:
            return b""
        columns = [
            self._arrow.array(column, field.type)
            for column, field in zip(zip(*records, strict=True), self._schema, strict=True)
        ]
        return bytes(self._arrow.record_batch(columns, schema=self._schema).serialize())

    def finish(self, grown: Path, target: Path) -> bool:
        """Copy the stream into a Parquet file, with row groups that do not depend on how it was chunked."""
        rows = max(1, _GROUP_CELLS // len(self.fields))
        waiting: list[Any] = []
        with (
            self._arrow.OSFile(str(grown)) as source,
            self._arrow.ipc.open_stream(source) as stream,
            self._parquet.ParquetWriter(target, self._schema) as writer,
        ):
            held = 0
            for batch in stream:
                waiting.append(batch)
                held += batch.num_rows
                while held >= rows:
                    table = self._arrow.Table.from_batches(waiting)
                    writer.write_table(table.slice(0, rows), row_group_size=rows)
                    waiting = table.slice(rows).to_batches()
                    held -= rows
            if held:
                writer.write_table(self._arrow.Table.from_batches(waiting), row_group_size=rows)
        return True
