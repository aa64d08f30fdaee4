"""`edge-coordinator push` and `rollout`: ship a release in stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edge_server.cli_common import home_option, json_option, open_registry, print_records, when


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@home_option
@click.option("--group", default="default", show_default=True, help="Who gets the release.")
@click.option("--stages", help="Percent of the group in each stage, such as 10,100.")
@click.option("--soak", type=float, metavar="SECONDS", help="Time a stage runs before the next.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Time after which a stage is halted.")
@click.option("--min-labelled", type=int, help="Labelled predictions a stage must gather; 0: health alone.")
@click.option("--max-drop", type=float, help="Loss of accuracy that is tolerated, 0 to 1.")
@click.option("--max-failures", type=int, help="Devices that may fail to install or keep it.")
def push(checkpoint: Path, home: Path, group: str, stages: str | None, **options: float | None) -> None:
    """Take in a CHECKPOINT folder and start its rollout. What is not given comes from the settings."""
    import msgspec

    names = {"soak": "soak_s", "timeout": "timeout_s", "max_drop": "max_accuracy_drop"}
    given: dict[str, Any] = {names.get(name, name): value for name, value in options.items() if value is not None}
    if stages is not None:
        try:
            given["stages"] = tuple(int(part) for part in stages.split(","))
        except ValueError:
            raise click.BadParameter(f"{stages!r} is no list of percentages such as 10,100") from None
    with open_registry(home) as registry:
        try:
            rules = msgspec.structs.replace(registry.settings.rollout, **given)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        number = registry.push(checkpoint, group=group, plan=rules, actor="cli")
        record, signed = registry.rollout(number), registry.repository.exists
    if not signed:
        click.echo("NOT signed: there are no keys; make them with: edge-coordinator keys init", err=True)
    click.echo(f"rollout {number}: release {record.plan.release} to group {group}, {record.state.reason}")


@click.group()
def rollout() -> None:
    """Look at rollouts, or stop one."""


@rollout.command("list")
@home_option
@json_option
def rollout_list(home: Path, as_json: bool) -> None:
    """List all rollouts, newest first."""
    with open_registry(home) as registry:
        records = registry.rollouts()
    columns = ("id", "release", "group", "status", "stage", "reason")
    rows = [
        (r.id, r.plan.release, r.plan.group, r.state.status, r.plan.stages[r.state.stage], r.state.reason)
        for r in records
    ]
    print_records(records, columns, rows, as_json=as_json)


@rollout.command("show")
@click.argument("number", type=int)
@home_option
@json_option
def rollout_show(number: int, home: Path, as_json: bool) -> None:
    """Show one rollout with its history."""
    with open_registry(home) as registry:
        record = registry.rollout(number)
    rows = [(when(step.time), step.status, step.stage + 1, step.reason) for step in record.state.history]
    print_records(record, ("time (UTC)", "status", "stage", "what"), rows, as_json=as_json)


@rollout.command("abort")
@click.argument("number", type=int)
@home_option
@click.option("--reason", default="", help="Kept with the rollout.")
def rollout_abort(number: int, home: Path, reason: str) -> None:
    """Withdraw a release; devices that run it go back to what they had."""
    with open_registry(home) as registry:
        registry.abort(number, reason=reason, actor="cli")
    click.echo(f"rollout {number} is being rolled back")
