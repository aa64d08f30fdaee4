"""Between rows of the database and structs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

R = TypeVar("R", bound=msgspec.Struct)
_PLAIN = (
    inspect.IntType,
    inspect.FloatType,
    inspect.StrType,
    inspect.BoolType,
    inspect.BytesType,
    inspect.NoneType,
    inspect.LiteralType,
)


def from_row(kind: type[R], row: Sequence[Any]) -> R:
    """A row whose columns come in the order of the struct's fields; lists, dicts and structs are kept as JSON text."""
    fields = dict(zip(kind.__struct_fields__, row, strict=True))
    for name in _nested(kind):
        if fields[name] is not None:
            fields[name] = msgspec.json.decode(fields[name])
    # SQLite has no booleans
    return msgspec.convert(fields, kind, strict=False)


def to_json(value: Any) -> str:
    """Text of plain data and structs; sets become lists."""
    return msgspec.json.encode(value).decode()


@cache
def _nested(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    """Fields that are not one number, text or bytes."""
    found = inspect.type_info(kind)
    assert isinstance(found, inspect.StructType)
    return tuple(field.name for field in found.fields if not _is_plain(field.type))


def _is_plain(kind: inspect.Type) -> bool:
    return isinstance(kind, _PLAIN) or (isinstance(kind, inspect.UnionType) and all(map(_is_plain, kind.types)))
