"""`edge-coordinator keys`: what devices trust."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import click

from edge_server.cli_common import home_option, json_option, open_registry, print_records, tell

P = ParamSpec("P")
T = TypeVar("T")


def _root_keys_option(function: Callable[P, T]) -> Callable[P, T]:
    for option in (
        click.option("--no-passphrase", is_flag=True, help="The root keys are not encrypted."),
        click.option("--passphrase", envvar="EDGE_ROOT_PASSPHRASE", show_envvar=True, help="Asked for if not given."),
        click.option(
            "--root-keys",
            "away",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            multiple=True,
            required=True,
            help="Folder with root keys; once for each, until there are enough.",
        ),
    ):
        function = option(function)
    return function


_new_root_keys_option = click.option(
    "--new-root-keys", "new", type=click.Path(path_type=Path), help="Folder for new root keys, to be taken away."
)


def _passphrase(given: str | None, none: bool, *, new: bool) -> bytes | None:
    if none:
        return None
    text = given or click.prompt("Passphrase of the root keys", hide_input=True, confirmation_prompt=new, err=True)
    return str(text).encode()


@click.group()
def keys() -> None:
    """Make the keys that devices trust, change and revoke them. From then on every release is signed."""


@keys.command("init")
@home_option
@click.option("--root-keys", "away", type=click.Path(path_type=Path), required=True, help="New folder; take it away.")
@click.option("--count", default=3, show_default=True, help="Root keys.")
@click.option("--threshold", default=2, show_default=True, help="Root keys that must sign together.")
@click.option("--passphrase", envvar="EDGE_ROOT_PASSPHRASE", show_envvar=True, help="Asked for if not given.")
@click.option("--no-passphrase", is_flag=True, help="Do not encrypt the root keys.")
@json_option
def keys_init(
    home: Path, away: Path, count: int, threshold: int, passphrase: str | None, no_passphrase: bool, as_json: bool
) -> None:
    """Make root keys in a folder to be taken away, and the others here; sign the releases there are."""
    secret = _passphrase(passphrase, no_passphrase, new=True)
    with open_registry(home) as registry:
        registry.repository.init(away, count=count, threshold=threshold, passphrase=secret)
        signed = registry.sign_all()
        registry.note("cli", "keys made", {"count": count, "threshold": threshold})
    text = (
        f"{count} root keys are in {away}: take them away, to {count} places; any {threshold} of them sign together\n"
        f"{signed} releases signed. Devices that are added from now on get the root in their bundle"
    )
    tell(text, as_json=as_json, root_keys=away, count=count, threshold=threshold, signed=signed)


@keys.command("list")
@home_option
@json_option
def keys_list(home: Path, as_json: bool) -> None:
    """List the keys that the newest root names."""
    with open_registry(home) as registry:
        records = registry.repository.keys()
    rows = [(r.role, r.key[:16], r.threshold, r.expires, "here" if r.here else "away") for r in records]
    print_records(records, ("role", "key", "must sign", "good until (UTC)", "secret"), rows, as_json=as_json)


@keys.command("rotate")
@click.argument("role", type=click.Choice(["root", "targets", "snapshot", "timestamp"]))
@home_option
@_root_keys_option
@_new_root_keys_option
@json_option
def keys_rotate(
    role: Literal["root", "targets", "snapshot", "timestamp"],
    home: Path,
    away: tuple[Path, ...],
    passphrase: str | None,
    no_passphrase: bool,
    new: Path | None,
    as_json: bool,
) -> None:
    """Replace the keys of ROLE by new ones."""
    secret = _passphrase(passphrase, no_passphrase, new=new is not None)
    with open_registry(home) as registry:
        version = registry.repository.rotate(role, away, passphrase=secret, new=new)
        registry.note("cli", "keys rotated", {"role": role, "root": version})
    text = f"root {version}: role {role} has new keys" + (f", in {new}: take them away" if role == "root" else "")
    tell(text, as_json=as_json, root=version, role=role)


@keys.command("revoke")
@click.argument("key")
@home_option
@_root_keys_option
@_new_root_keys_option
@json_option
def keys_revoke(
    key: str, home: Path, away: tuple[Path, ...], passphrase: str | None, no_passphrase: bool, new: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Take KEY, lost or known to others, out of the root, and put a new one in its place. `keys list` shows it."""
    secret = _passphrase(passphrase, no_passphrase, new=new is not None)
    with open_registry(home) as registry:
        version = registry.repository.revoke(key, away, passphrase=secret, new=new)
        registry.note("cli", "key revoked", {"key": key, "root": version})
    text = f"root {version}: {key} is revoked; devices refuse what it signed once they have this root"
    tell(text, as_json=as_json, root=version, revoked=key)


@keys.command("start-over")
@click.argument("what", type=click.Choice(["authority", "commands"]))
@home_option
@json_option
def keys_start_over(what: Literal["authority", "commands"], home: Path, as_json: bool) -> None:
    """Make a new certificate authority (ca/), or secret of COMMANDS (commands.key), if it is lost or known to others.

    The coordinator must not run. Every device has to be replaced then: `devices replace`, `broker-files`.
    """
    from edge_sdk.files import lock_folder

    with lock_folder(home), open_registry(home) as registry:
        registry.identities.start_over(what, actor="cli")
    more = "; renew the broker's files (edge-coordinator broker-files --host NAME)" if what == "authority" else ""
    tell(f"{what}: a new one is here; replace every device{more}", as_json=as_json, made_anew=what)


@keys.command("renew")
@home_option
@_root_keys_option
@json_option
def keys_renew(home: Path, away: tuple[Path, ...], passphrase: str | None, no_passphrase: bool, as_json: bool) -> None:
    """Sign the root anew with the same keys, before it expires."""
    secret = _passphrase(passphrase, no_passphrase, new=False)
    with open_registry(home) as registry:
        version = registry.repository.renew_root(away, passphrase=secret)
        registry.note("cli", "root renewed", {"root": version})
    tell(f"root {version} is signed", as_json=as_json, root=version)
