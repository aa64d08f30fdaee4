"""`edge drift`: try the monitors on files before anything is shipped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import msgspec

from edge_sdk.errors import ConfigError

if TYPE_CHECKING:
    from edge_sdk.drift.limits import Limits
    from edge_sdk.drift.replay import Replay

_EMPTY: tuple[object, ...] = (None, [], 0)
_csv = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
def drift() -> None:
    """Try the drift monitors on CSV files: choose settings before you ship."""


@drift.command()
@click.option("--data", required=True, type=_csv, help="The stream, .csv, oldest row first.")
@click.option("--reference", required=True, type=_csv, help="Normal rows, .csv with the same columns; 200 or more.")
@click.option("--html", "target", type=click.Path(dir_okay=False, path_type=Path), help="Draw what was seen.")
@click.option(
    "--alarms-per-day", default=0.1, show_default=True, type=click.FloatRange(min=0, min_open=True),
    help="False alarms that you tolerate, over all monitors.",
)  # fmt: skip
@click.option(
    "--rows-per-day", default=0.0, type=click.FloatRange(min=0),
    help="Pace of a device.  [by --time, else 10000]",
)  # fmt: skip
@click.option("--block-rows", default=32, show_default=True, type=click.IntRange(1), help="Rows folded at once.")
@click.option("--time", default="", metavar="COLUMN", help="Seconds or milliseconds since the epoch, or ISO 8601.")
@click.option("--prediction", default="", metavar="COLUMN", help="What the model said.")
@click.option("--confidence", default="", metavar="COLUMN", help="How sure it was, 0 to 1.")
@click.option("--label", default="", metavar="COLUMN", help="What was true; empty where nobody knows.")
@click.option("--ignore", multiple=True, metavar="COLUMN", help="Not looked at; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def replay(
    data: Path,
    reference: Path,
    target: Path | None,
    alarms_per_day: float,
    rows_per_day: float,
    block_rows: int,
    time: str,
    prediction: str,
    confidence: str,
    label: str,
    ignore: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run the monitors over a file, and say what they saw.

    Columns of numbers, and of at most 64 categories, are watched as inputs; predictions as outputs; labels as accuracy.
    """
    from edge_sdk.drift import page
    from edge_sdk.drift.replay import Settings
    from edge_sdk.drift.replay import replay as run
    from edge_sdk.drift.table import Roles
    from edge_sdk.files import replace_file

    if target is not None and not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.parent}")
    found = run(
        data,
        reference,
        roles=Roles(time, prediction, confidence, label, ignore),
        settings=Settings(alarms_per_day, rows_per_day, block_rows),
    )
    if target is not None:
        replace_file(target, page.page(found).encode())
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
        return
    for line in _told(found):
        click.echo(line)
    if target is not None:
        click.echo(f"drawn in {target}", err=True)


def _told(found: Replay) -> list[str]:
    settings = found.settings
    pace = f"{settings.alarms_per_day:g} false alarms a day at {settings.rows_per_day:.6g} rows a day"
    lines = [
        f"{found.rows} rows of {found.data} against {found.reference_rows} of {found.reference}",
        f"{pace}: one in {found.run_length:.6g} rows",
    ]
    if found.left_out:
        lines.append(f"not watched: {', '.join(found.left_out)}")
    if found.caveat:
        lines.append(found.caveat)
    lines += [
        f"row {alarm.row}: {alarm.monitor} alarm, {alarm.kind}: {alarm.words} ({alarm.carried})"
        for alarm in found.alarms
    ]
    if not found.alarms:
        most = {name: max(trace.evidence, default=0.0) for name, trace in found.traces.items()}
        lines.append("no alarm; most evidence: " + ", ".join(f"{name} {100 * e:.2g} %" for name, e in most.items()))
    return lines


@drift.command()
@click.option("--data", required=True, type=_csv, help="Normal rows, .csv, in the order of time.")
@click.option(
    "--format",
    "form",
    default="toml",
    show_default=True,
    type=click.Choice(["toml", "json"]),
    help="Of what is written.",
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Instead of standard output.")
@click.option(
    "--alarms-per-day", default=0.1, show_default=True, type=click.FloatRange(min=0, min_open=True),
    help="Normal rows that may break a limit.",
)  # fmt: skip
@click.option(
    "--rows-per-day", default=10_000.0, show_default=True, type=click.FloatRange(min=0, min_open=True),
    help="Pace of a device.",
)  # fmt: skip
@click.option("--ignore", multiple=True, metavar="COLUMN", help="Not looked at; may be repeated.")
def suggest(
    data: Path,
    form: Literal["toml", "json"],
    output: Path | None,
    alarms_per_day: float,
    rows_per_day: float,
    ignore: tuple[str, ...],
) -> None:
    """Suggest limits for each feature: its range, how often it may be missing, how long it may stand still.

    What is written is an input spec, as a checkpoint's `InputSpec`. As TOML, missing rates and frozen lengths stand in
    comments; as JSON beside it, under "features".
    """
    from edge_sdk.drift.limits import suggest as limits_of
    from edge_sdk.drift.reference import MIN_ROWS
    from edge_sdk.drift.table import Layout, Roles
    from edge_sdk.files import replace_file

    layout = Layout(data, Roles(ignore=ignore))
    rows = layout.read_all(data)
    if len(rows) < MIN_ROWS:
        raise ConfigError(f"{data.name} has {len(rows)} rows; limits need at least {MIN_ROWS}")
    found = limits_of(rows.features, layout.columns, run_length=rows_per_day / alarms_per_day)
    text = _as_toml(found, data.name, len(rows)) if form == "toml" else _as_json(found)
    if output is None:
        click.echo(text, nl=False)
    else:
        replace_file(output, text.encode())
    if layout.left_out:
        click.echo(f"not looked at: {', '.join(layout.left_out)}", err=True)
    if output is None and sys.stdout.isatty():
        click.echo("a suggestion: look at each line before you use it", err=True)


def _spec(found: list[Limits]) -> dict[str, Any]:
    columns = [msgspec.to_builtins(limits.column) for limits in found]
    spec: dict[str, Any] = {
        "shape": [len(found)],
        "columns": [{key: value for key, value in column.items() if value not in _EMPTY} for column in columns],
    }
    for column, kept in zip(columns, spec["columns"], strict=True):
        kept |= {end: column[end] for end in ("low", "high") if column[end] is not None}
    if any(limits.missing for limits in found):
        spec["preprocess"] = [{"op": "impute", "values": [limits.middle for limits in found]}]
    return spec


def _as_json(found: list[Limits]) -> str:
    features = [
        {"name": x.column.name, "missing": round(x.missing, 6), "most_missing_of_256": x.most_missing,
         "repeats": round(x.repeats, 6), "longest_run": x.longest, "frozen_rows": x.frozen_rows or None}
        for x in found
    ]  # fmt: skip
    return json.dumps({"input": _spec(found), "features": features}, indent=2) + "\n"


def _as_toml(found: list[Limits], name: str, rows: int) -> str:
    quote = json.dumps  # a JSON string is a TOML string
    spec = _spec(found)
    lines = [
        f"# limits suggested from {rows} rows of {quote(name)}; look at each before you use it",
        f"shape = {spec['shape']}",
    ]
    for limits, column in zip(found, spec["columns"], strict=True):
        lines += ["", "[[columns]]"]
        lines += [f"{key} = {quote(value)}" for key, value in column.items()]
        if limits.column.kind == "number" and limits.seen[0] == limits.seen[0]:
            lines.append(f"# seen: {limits.seen[0]:g} to {limits.seen[1]:g}")
        lines.append(
            f"# missing: {limits.missing:.2%} of the rows; more than {limits.most_missing} of 256 are no chance"
        )
        still = (
            f"the same {limits.frozen_rows} rows in a row is no chance" if limits.frozen_rows else "it never changed"
        )
        lines.append(f"# frozen: {still}; the longest seen was {limits.longest}")
    for op in spec.get("preprocess", []):
        lines += ["", "[[preprocess]]", f"op = {quote(op['op'])}", f"values = {op['values']}"]
    return "\n".join(lines) + "\n"
