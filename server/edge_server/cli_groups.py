"""`edge-coordinator group`: what groups run, and how far their devices are trusted."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from edge_server.cli_common import home_option, json_option, open_registry, print_records, tell

_ACTOR = "cli"


@click.group()
def group() -> None:
    """See what groups run, and set the mode of their devices. `command --group` tells them to do something."""


@group.command("list")
@home_option
@json_option
def group_list(home: Path, as_json: bool) -> None:
    """List the groups that were ever told something."""
    with open_registry(home) as registry:
        records = registry.store.groups.all()
    rows = [(r.name, r.base or "-", r.mode or "-", ", ".join(map(str, r.revoked)) or "-") for r in records]
    print_records(
        [msgspec.structs.replace(r, desired=b"") for r in records],
        ("group", "base", "mode", "revoked"),
        rows,
        as_json=as_json,
    )


@group.command("mode")
@click.argument("name")
@click.argument("mode", type=click.Choice(["monitor", "shadow", "adapt", "own"]))
@home_option
@json_option
def group_mode(name: str, mode: str, home: Path, as_json: bool) -> None:
    """Trust the devices of group NAME so far, those of today and those that join later.

    MODE: monitor watches only, shadow also learns and judges, adapt also promotes what it learned; own: no longer say.
    """
    with open_registry(home) as registry:
        told = registry.modes.set(name, "" if mode == "own" else mode, actor=_ACTOR)
    text = f"group {name} is in mode {mode}; {told} devices are told now"
    tell(text, as_json=as_json, group=name, mode=mode, told=told)
