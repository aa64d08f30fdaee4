"""`edge-coordinator users`: who may use the API and the dashboard."""

from __future__ import annotations

from pathlib import Path

import click

from edge_server.cli_common import home_option, json_option, open_registry, print_records, tell, when


@click.group()
def users() -> None:
    """Give tokens for the API and the dashboard, list who has one, take them away."""


@users.command("add")
@click.argument("name")
@home_option
@click.option("--role", type=click.Choice(["viewer", "operator", "releaser"]), required=True,
              help="viewer looks; operator also gives commands, sees to alerts, pauses and aborts; releaser also "
                   "starts, approves and resumes rollouts, and adds users.")  # fmt: skip
@json_option
def users_add(name: str, home: Path, role: str, as_json: bool) -> None:
    """Add user NAME and print the token: it is shown this once. From the first user on nobody gets in without one."""
    with open_registry(home) as registry:
        token = registry.users.add(name, role, actor="cli")  # type: ignore[arg-type]  # click has checked it
    tell(f"token of {name} ({role}), kept nowhere else: {token}", as_json=as_json, name=name, role=role, token=token)


@users.command("list")
@home_option
@json_option
def users_list(home: Path, as_json: bool) -> None:
    """List everybody who has or had a token."""
    with open_registry(home) as registry:
        records = registry.users.all()
    rows = [(r.name, r.role, when(r.created), "-" if r.revoked is None else when(r.revoked)) for r in records]
    print_records(records, ("user", "role", "added (UTC)", "revoked (UTC)"), rows, as_json=as_json)


@users.command("revoke")
@click.argument("name")
@home_option
@json_option
def users_revoke(name: str, home: Path, as_json: bool) -> None:
    """Make the token of user NAME void, and end its sessions."""
    with open_registry(home) as registry:
        registry.users.revoke(name, actor="cli")
    tell(f"{name} is revoked", as_json=as_json, name=name, revoked=True)
