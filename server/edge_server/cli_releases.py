"""`edge-coordinator releases`: what devices can get, and whether they would believe it."""

from __future__ import annotations

from pathlib import Path

import click

from edge_server.cli_common import home_option, json_option, open_registry, print_records, tell, when


@click.group()
def releases() -> None:
    """Look at releases as a device would, or copy them for a web server."""


@releases.command("list")
@home_option
@json_option
def releases_list(home: Path, as_json: bool) -> None:
    """List all releases, newest first, and whether they are signed."""
    from edge_server.verify import list_releases

    with open_registry(home) as registry:
        records = list_releases(registry)
    rows = [(r.release, r.name, r.digest[:12], "yes" if r.signed else "no", when(r.pushed)) for r in records]
    print_records(records, ("release", "name", "digest", "signed", "pushed (UTC)"), rows, as_json=as_json)


@releases.command("add")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@home_option
@json_option
def releases_add(checkpoint: Path, home: Path, as_json: bool) -> None:
    """Take in a CHECKPOINT folder without a rollout. The same content again changes nothing."""
    with open_registry(home) as registry:
        record = registry.add_release(checkpoint, actor="cli")
    if as_json:
        print_records(record, (), (), as_json=True)
        return
    click.echo(f"release {record.release} is here; nobody is told to run it yet")


@releases.command("show")
@click.argument("number", type=int)
@home_option
@json_option
def releases_show(number: int, home: Path, as_json: bool) -> None:
    """Show what a release was made from, and its model card."""
    with open_registry(home) as registry:
        found = registry.release(number)
    rows = [(str(r.release), r.name, r.digest[:12], when(r.pushed)) for r in (found.release, *found.lineage)]
    if found.origin is not None:
        rows.append(("-", "not taken in here", found.origin[:12], "-"))
    print_records(found, ("release", "name", "digest", "pushed (UTC)"), rows, as_json=as_json)
    if not as_json:
        click.echo(f"\n{found.card}", nl=False)


@releases.command("verify")
@home_option
@json_option
def releases_verify(home: Path, as_json: bool) -> None:
    """Check signatures, dates and every file of the signed releases, from the first root on, as a device does."""
    from edge_sdk.errors import IntegrityError
    from edge_server.verify import verify_releases

    with open_registry(home) as registry:
        records = verify_releases(registry)
    rows = [(r.release, r.digest[:12], r.problem or "good") for r in records]
    print_records(records, ("release", "digest", "a device would find it"), rows, as_json=as_json)
    if bad := [r.release for r in records if r.signed and r.problem]:
        raise IntegrityError(f"{len(bad)} signed releases would be refused: {', '.join(map(str, bad))}")


@releases.command("export")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@home_option
@json_option
def releases_export(folder: Path, home: Path, as_json: bool) -> None:
    """Copy signed metadata and files to FOLDER, for a web server (update.url of devices)."""
    from edge_server.verify import export

    with open_registry(home) as registry:
        copied = export(registry, folder)
    tell(f"{copied} files copied to {folder}", as_json=as_json, folder=folder, copied=copied)
