"""What the commands of `edge-coordinator` share: their common options, the records they work on, how they print."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

if TYPE_CHECKING:
    import msgspec

    from edge_server.registry import Registry

P = ParamSpec("P")
T = TypeVar("T")


def home_option(function: Callable[P, T]) -> Callable[P, T]:
    """The option that says which coordinator."""
    return click.option(
        "--home",
        type=click.Path(file_okay=False, path_type=Path),
        default=Path(),
        envvar="EDGE_COORDINATOR_HOME",
        show_envvar=True,
        help="The coordinator's folder; by default the current one.",
    )(function)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@contextmanager
def open_registry(home: Path, *, new: bool = False) -> Iterator[Registry]:
    """The records of the coordinator in that folder.

    Args:
        home: The folder.
        new: The database may be missing, and is made.

    Raises:
        ConfigError: The database is missing; else as `load_settings`.
        StoreError: As `Registry`.
    """
    from edge_sdk.errors import ConfigError
    from edge_server.registry import Registry
    from edge_server.settings import SETTINGS_NAME, load_settings

    settings = load_settings(home / SETTINGS_NAME)
    if not new and not (home / settings.database).exists():  # an empty fleet would look like a loss of every device
        raise ConfigError(
            f"{home / settings.database} is missing; is its disk there? Put back a backup: edge-coordinator restore; "
            f"or begin with an empty one: edge-coordinator init --home {home}"
        )
    registry = Registry(home, settings=settings)
    try:
        yield registry
    finally:
        registry.close()


def print_records(
    records: msgspec.Struct | Sequence[msgspec.Struct],
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    as_json: bool,
) -> None:
    """Print records as JSON, or as a table with a width for each column."""
    if as_json:
        import msgspec

        from edge_server import records as forms

        plain = forms.as_json(records) if isinstance(records, msgspec.Struct) else [forms.as_json(r) for r in records]
        click.echo(msgspec.json.format(msgspec.json.encode(plain), indent=2))
        return
    table = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for row in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def tell(text: str, *, as_json: bool, **facts: Any) -> None:
    """Print what was done: in words, or the same facts as JSON."""
    if not as_json:
        click.echo(text)
        return
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(facts, enc_hook=str), indent=2))


def dash(value: object) -> str:
    """A cell for what may be None."""
    return "-" if value is None else str(value)


def when(seconds: float | None) -> str:
    """A cell for seconds since the epoch."""
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
