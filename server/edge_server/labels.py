"""Which devices: a small language over their labels and over what they say of themselves. No input or output.

    site=berlin and hw!=pi3
    site in (berlin, hamburg) and not (line=3 or spare)
    group=plant-a release!=4          # "and" may be left out
    @pilot and not spare              # in a segment, a query that has a name

A comparison is `key=value`, `key!=value`, `key in (value, ...)`, or `key` alone: the device has such a label. `and`
binds closer than `or`, `not` closest. Values with other characters than letters, digits and `_.:/+-` stand in quotes.
What a device has no label for is unequal to every value. `name`, `group`, `hw`, `sdk`, `release`, `mode` are
what is known of a device itself; all other keys are labels, which people set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from edge_sdk.errors import ConfigError

FIELDS = {
    "name": "d.name",
    "group": "d.group_name",
    "hw": "d.hardware",
    "sdk": "d.sdk",
    "release": "CAST(coalesce(d.row_release, d.state_release) AS TEXT)",
    "mode": "d.mode",
}
"""Keys that are no labels, and where the database has them: of the table of devices as `d`."""
MAX_LABELS = 32
_MAX_VALUE = 128
_MAX_QUERY = 1024
_MAX_DEPTH = 32
_SEGMENT = re.compile(r'"[^"]*"|@(?P<name>[A-Za-z0-9_.-]*)')
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,62}")
_WORDS = {"and", "or", "not", "in"}
_TOKEN = re.compile(r'\s*(?:(?P<sign>!=|=|\(|\)|,)|(?P<quoted>"[^"]*")|(?P<word>[A-Za-z0-9_.:/+-]+))')


class Sql(NamedTuple):
    """A condition on the table of devices as `d`, and its values."""

    text: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Has:
    """The device has this label."""

    key: str

    def matches(self, facts: Mapping[str, str]) -> bool:
        """Whether it holds for a device with these labels and fields."""
        return bool(facts.get(self.key)) if self.key in FIELDS else self.key in facts

    def to_sql(self) -> Sql:
        """The same for the database."""
        if column := FIELDS.get(self.key):
            return Sql(f"coalesce({column}, '') <> ''", ())
        return Sql("EXISTS (SELECT 1 FROM labels l WHERE l.device = d.name AND l.key = ?)", (self.key,))


@dataclass(frozen=True, slots=True)
class Is:
    """Its value is one of these."""

    key: str
    values: tuple[str, ...]

    def matches(self, facts: Mapping[str, str]) -> bool:
        """Whether it holds for a device with these labels and fields."""
        return facts.get(self.key) in self.values

    def to_sql(self) -> Sql:
        """The same for the database."""
        marks = ", ".join("?" * len(self.values))
        if column := FIELDS.get(self.key):
            return Sql(f"coalesce({column} IN ({marks}), 0)", self.values)
        return Sql(
            f"d.name IN (SELECT l.device FROM labels l WHERE l.key = ? AND l.value IN ({marks}))",  # noqa: S608
            (self.key, *self.values),
        )


@dataclass(frozen=True, slots=True)
class Not:
    """The opposite."""

    query: Query

    def matches(self, facts: Mapping[str, str]) -> bool:
        """Whether it holds for a device with these labels and fields."""
        return not self.query.matches(facts)

    def to_sql(self) -> Sql:
        """The same for the database."""
        inner = self.query.to_sql()
        return Sql(f"NOT ({inner.text})", inner.values)


@dataclass(frozen=True, slots=True)
class Several:
    """All of them, or any of them."""

    queries: tuple[Query, ...]
    all_of: bool

    def matches(self, facts: Mapping[str, str]) -> bool:
        """Whether it holds for a device with these labels and fields."""
        return (all if self.all_of else any)(query.matches(facts) for query in self.queries)

    def to_sql(self) -> Sql:
        """The same for the database."""
        parts = [query.to_sql() for query in self.queries]
        text = (" AND " if self.all_of else " OR ").join(f"({part.text})" for part in parts)
        return Sql(text, tuple(value for part in parts for value in part.values))


Query = Has | Is | Not | Several


def parse(text: str) -> Query:
    """The query that a text says.

    Raises:
        ConfigError: It is none; says where it ends to be one.
    """
    if len(text) > _MAX_QUERY:
        raise ConfigError(f"a label query of {len(text)} characters; at most {_MAX_QUERY} are read")
    return _Parser(text).whole()


def spell_out(text: str, segments: Mapping[str, str]) -> str:
    """A text with each `@name` replaced by the query of that name.

    Args:
        text: Of a query, not parsed yet.
        segments: Queries by their names.

    Raises:
        ConfigError: There is none of a name.

    Example:
        >>> spell_out('@pilot hw="@home"', {"pilot": "site=a or site=b"})
        '(site=a or site=b) hw="@home"'
    """

    def query(found: re.Match[str]) -> str:
        name = found["name"]
        if name is None:  # what stands in quotes is a value
            return found[0]
        if name not in segments:
            raise ConfigError(f"there is no segment {name[:64]!r}; there are: {', '.join(sorted(segments)) or 'none'}")
        return f"({segments[name]})"

    return _SEGMENT.sub(query, text)


def segments_of(text: str) -> tuple[str, ...]:
    """The names of the segments in the text of a query, each once."""
    return tuple(dict.fromkeys(found["name"] for found in _SEGMENT.finditer(text) if found["name"] is not None))


def is_segment_name(name: str) -> bool:
    """Whether a segment can be called so."""
    return bool(_KEY.fullmatch(name))


def keys_of(query: Query) -> set[str]:
    """The labels and fields that a query asks about."""
    match query:
        case Several(queries):
            return set().union(*map(keys_of, queries))
        case Not(inner):
            return keys_of(inner)
        case _:
            return {query.key}


def parse_label(text: str) -> tuple[str, str | None]:
    """(key, value) of `key=value`; the value is None for `key-`, which takes a label away.

    Raises:
        ConfigError: It is neither, or the key is one of a device's own fields.
    """
    key, equals, value = text.partition("=")
    if not equals and text.endswith("-"):
        key = text[:-1]
    elif not equals:
        raise ConfigError(f"{text!r} is neither key=value nor key- (which takes the label away)")
    if not _KEY.fullmatch(key) or key in _WORDS or key in FIELDS:
        raise ConfigError(
            f"{key!r} cannot be a label: use letters, digits, '_', '.' and '-', a letter first, and none of "
            f"{', '.join((*FIELDS, *sorted(_WORDS)))}"
        )
    if len(value) > _MAX_VALUE or '"' in value or not value.isprintable():
        raise ConfigError(
            f"the value of {key!r} has at most {_MAX_VALUE} characters that can be printed, without quotes"
        )
    return key, value if equals else None


class _Parser:
    """By recursive descent over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = self._depth = 0
        self._kind, self._token = "", ""
        self._next()

    def whole(self) -> Query:
        query = self._any_of()
        if self._kind != "end":
            raise self._error("'and', 'or' or the end")
        return query

    def _any_of(self) -> Query:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ConfigError(f"label query {self._text!r} is nested deeper than {_MAX_DEPTH}")
        queries = [self._all_of()]
        while self._take("word", "or"):
            queries.append(self._all_of())
        self._depth -= 1
        return queries[0] if len(queries) == 1 else Several(tuple(queries), all_of=False)

    def _all_of(self) -> Query:
        queries = [self._one()]
        while self._take("word", "and") or self._begins():
            queries.append(self._one())
        return queries[0] if len(queries) == 1 else Several(tuple(queries), all_of=True)

    def _begins(self) -> bool:
        """Whether a further comparison follows without a word between."""
        return (self._kind == "word" and self._token != "or") or (self._kind, self._token) == ("sign", "(")  # noqa: S105

    def _one(self) -> Query:
        negated = False
        while self._take("word", "not"):
            negated = not negated
        query = self._inner()
        return Not(query) if negated else query

    def _inner(self) -> Query:
        if self._take("sign", "("):
            query = self._any_of()
            self._need(")")
            return query
        key = self._token
        if self._kind != "word" or key in _WORDS or not _KEY.fullmatch(key):
            raise self._error("a key")
        self._next()
        if self._take("sign", "="):
            return Is(key, (self._value(),))
        if self._take("sign", "!="):
            return Not(Is(key, (self._value(),)))
        if not self._take("word", "in"):
            return Has(key)
        self._need("(")
        values = [self._value()]
        while self._take("sign", ","):
            values.append(self._value())
        self._need(")")
        return Is(key, tuple(values))

    def _value(self) -> str:
        if self._kind not in ("word", "quoted"):
            raise self._error("a value")
        value = self._token
        self._next()
        return value

    def _need(self, sign: str) -> None:
        if not self._take("sign", sign):
            raise self._error(repr(sign))

    def _take(self, kind: str, token: str) -> bool:
        if (self._kind, self._token) != (kind, token):
            return False
        self._next()
        return True

    def _next(self) -> None:
        self._began = self._at
        if not self._text[self._at :].strip():
            self._kind, self._token = "end", ""
            return
        found = _TOKEN.match(self._text, self._at)
        if found is None:
            self._kind, self._token = "wrong", ""
            return
        self._at = found.end()
        self._kind = found.lastgroup or ""
        self._token = found[self._kind].strip('"')

    def _error(self, wanted: str) -> ConfigError:
        rest = self._text[self._began :].strip()
        where = f"at {rest[:40]!r}" if rest else "at the end"
        return ConfigError(f"label query {self._text!r}: expected {wanted} {where}; such as: site=berlin and hw!=pi3")
