"""`edge-coordinator export`, `audit`, `backup`, `restore` and `upgrade`: the data as such."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import click

from edge_server.cli_common import home_option, json_option, open_registry, print_records, tell, when

_KINDS = ("reports", "events", "devices", "rollouts", "rollups", "audit")


class _Time(click.ParamType[float]):
    """Seconds since the epoch, or a date and time of ISO 8601; UTC unless it says otherwise."""

    name = "TIME"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return float(value)
        except ValueError:
            pass
        try:
            moment = datetime.fromisoformat(str(value))
        except ValueError:
            self.fail(f"{value!r} is neither seconds since the epoch nor a time such as 2026-05-01T12:00", param, ctx)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


@click.command()
@click.argument("what", type=click.Choice([*_KINDS, "metadata"]))
@home_option
@click.option("--format", "form", type=click.Choice(["csv", "jsonl"]), default="csv", show_default=True,
              help="jsonl: one JSON object a line, with everything that a report says.")  # fmt: skip
@click.option("--json", "form", flag_value="jsonl", help="The same as --format jsonl.")
@click.option("--since", type=_Time(), help="From this time on: seconds since the epoch, or 2026-05-01T12:00 (UTC).")
@click.option("--until", type=_Time(), help="Before this time.")
@click.option("--out", type=click.File("w", encoding="utf-8", lazy=True), default="-", help="File; by default stdout.")
def export(what: str, home: Path, form: str, since: float | None, until: float | None, out: TextIO) -> None:
    """Write rows as CSV or JSON lines, also while the coordinator runs.

    WHAT: reports, events, devices, rollouts, rollups (sums over minutes, hours and days), audit; or metadata: what
    Datasette is told about the database (titles, descriptions, units).
    """
    from edge_server.export import datasette_metadata, write

    if what == "metadata":
        out.write(datasette_metadata())
        return
    with open_registry(home) as registry:
        rows = write(registry.store, what, out, form=form, since=since, until=until)
    click.echo(f"{rows} rows", err=True)


@click.command()
@home_option
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="The newest so many.")
@json_option
def audit(home: Path, limit: int, as_json: bool) -> None:
    """Show who changed what, newest first."""
    import msgspec

    with open_registry(home) as registry:
        records = registry.store.audit.find(limit=limit)
    rows = [(when(r.time), r.actor, r.action, msgspec.json.encode(r.detail).decode()) for r in records]
    print_records(records, ("time (UTC)", "who", "what", "detail"), rows, as_json=as_json)


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@home_option
@click.option(
    "--keys",
    is_flag=True,
    help="Also signing keys, the authority's key, the secret of commands, and files that the settings name.",
)
@json_option
def backup(folder: Path, home: Path, keys: bool, as_json: bool) -> None:
    """Copy database, releases and settings into the new FOLDER, also while the coordinator runs, and check the copy."""
    import time

    from edge_server.backup import make
    from edge_server.settings import SETTINGS_NAME, load_settings

    found = make(home, folder, settings=load_settings(home / SETTINGS_NAME), now=time.time(), keys=keys)
    size = sum(entry.size for entry in found.files.values())
    text = f"{len(found.files)} files, {size / 1e6:.1f} MB, in {folder}: complete and checked"
    tell(text, as_json=as_json, folder=folder, files=len(found.files), bytes=size, keys=keys)
    click.echo(
        "it holds KEYS: keep it as safe as them" if keys else "it holds no keys: --keys takes them along", err=True
    )


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@home_option
@click.option("--force", is_flag=True, help="Also over a newer or damaged database; it is kept as *.replaced.")
@json_option
def restore(folder: Path, home: Path, force: bool, as_json: bool) -> None:
    """Put back the backup in FOLDER. The coordinator must not run; settings, metadata and keys that are there stay."""
    from edge_server.backup import restore as put_back

    found = put_back(folder, home, force=force)
    with open_registry(home) as registry:
        registry.note("cli", "backup restored", {"created": found.created, "forced": force})
    text = f"restored: what the coordinator knew at {when(found.changed)} UTC; start it with: edge-coordinator serve"
    tell(text, as_json=as_json, restored=folder, known=found.changed)


@click.command()
@home_option
@json_option
def upgrade(home: Path, as_json: bool) -> None:
    """Bring the database to the form of this version; a copy of it is kept. The coordinator must not run."""
    from edge_sdk.files import lock_folder
    from edge_server.schema import STEPS

    with lock_folder(home), open_registry(home) as registry:
        kept = registry.store.kept
    if kept is None:
        text = f"the database has form {len(STEPS)}: there is nothing to do"
    else:
        text = f"the database has form {len(STEPS)} now; as it was before, it is in {kept}"
    tell(text, as_json=as_json, form=len(STEPS), kept=kept)
