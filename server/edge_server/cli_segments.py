"""`edge-coordinator segments`: label queries that have a name."""

from __future__ import annotations

from pathlib import Path

import click

from edge_server.cli_common import home_option, json_option, open_registry, print_records, tell, when

_ACTOR = "cli"


@click.group()
def segments() -> None:
    """Give label queries names; wherever a query is taken, @NAME then stands for it."""


@segments.command("create")
@click.argument("name")
@click.argument("query")
@home_option
@json_option
def segments_create(name: str, query: str, home: Path, as_json: bool) -> None:
    """Call the devices that QUERY is true of by NAME, such as: segments create pilot 'site=berlin and hw!=pi3'."""
    with open_registry(home) as registry:
        record = registry.segments.create(name, query, actor=_ACTOR)
    if as_json:
        print_records(record, (), (), as_json=True)
        return
    click.echo(f"segment {name} has {record.devices} devices; queries call it @{name}")


@segments.command("list")
@home_option
@json_option
def segments_list(home: Path, as_json: bool) -> None:
    """List all segments."""
    with open_registry(home) as registry:
        records = registry.segments.all()
    rows = [(r.name, r.devices, r.actor, when(r.created), r.query) for r in records]
    print_records(records, ("segment", "devices", "made by", "made (UTC)", "query"), rows, as_json=as_json)


@segments.command("show")
@click.argument("name")
@home_option
@json_option
def segments_show(name: str, home: Path, as_json: bool) -> None:
    """Show a segment and the rollouts for it that are not over. Its devices: devices list --where @NAME."""
    with open_registry(home) as registry:
        record = registry.segments.show(name)
    rollouts = ", ".join(map(str, record.rollouts)) or "-"
    row = (record.name, record.devices, rollouts, record.query)
    print_records(record, ("segment", "devices", "rollouts", "query"), [row], as_json=as_json)


@segments.command("delete")
@click.argument("name")
@home_option
@json_option
def segments_delete(name: str, home: Path, as_json: bool) -> None:
    """Forget a segment. Refused while a rollout for it is not over."""
    with open_registry(home) as registry:
        registry.segments.delete(name, actor=_ACTOR)
    tell(f"segment {name} is deleted", as_json=as_json, segment=name, deleted=True)
