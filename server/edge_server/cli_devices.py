"""`edge-coordinator devices` and `broker-files`: who belongs to the fleet, and how the broker knows."""

from __future__ import annotations

from pathlib import Path

import click

from edge_server.cli_common import dash, home_option, json_option, open_registry, print_records, tell, when


@click.group()
def devices() -> None:
    """Add devices, list and show them, replace or revoke them."""


@devices.command("add")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@home_option
@click.option("--group", default="default", show_default=True, help="Which releases the devices get.")
@click.option("--out", type=click.Path(path_type=Path), help="The bundle; by default NAME.bundle.json. Or a folder.")
@json_option
def devices_add(names: tuple[str, ...], home: Path, group: str, out: Path | None, as_json: bool) -> None:
    """Register devices, and write the bundle of each that `edge enroll` reads. It holds the device's password.

    What was added stays if one NAME cannot be.
    """
    import msgspec

    folder = out if out is not None and (out.is_dir() or len(names) > 1) else None
    if folder is not None and not folder.is_dir():
        raise click.UsageError(f"--out {folder}: for several devices it must be a folder that is there")
    added = []
    with open_registry(home) as registry:
        for name in names:
            path = out if out is not None and folder is None else (folder or Path()) / f"{name}.bundle.json"
            registry.enrol(name, group=group, out=path, actor="cli")
            added.append({"device": name, "group": group, "bundle": str(path)})
            if not as_json:
                click.echo(f"{path} is ready: bring it to the device and run: edge enroll {path.name}")
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(added if len(added) > 1 else added[0]), indent=2))


@devices.command("list")
@home_option
@click.option("--where", help="Only those that a label query is true of, such as: site=berlin and hw!=pi3")
@json_option
def devices_list(home: Path, where: str | None, as_json: bool) -> None:
    """List all devices."""
    with open_registry(home) as registry:
        records = registry.devices()
        if where is not None:
            wanted = set(registry.matching(where))
            records = [record for record in records if record.name in wanted]
    columns = ("device", "group", "health", "release", "head", "accuracy", "alarms", "last seen (UTC)", "labels")
    rows = [
        (
            *(r.name, r.group, "revoked" if r.is_revoked else r.health, dash(r.release), dash(r.head)),
            *("-" if r.accuracy is None else f"{r.accuracy:.1%}", r.alarms, when(r.last_seen)),
            " ".join(f"{key}={value}" for key, value in r.labels.items()),
        )
        for r in records
    ]
    print_records(records, columns, rows, as_json=as_json)


@devices.command("show")
@click.argument("name")
@home_option
@json_option
def devices_show(name: str, home: Path, as_json: bool) -> None:
    """Show a device as it was last heard; with --json also its last report."""
    from edge_server import records

    with open_registry(home) as registry:
        device, last = registry.device(name), registry.last_report(name)
    facts = {
        "device": device.name, "group": device.group, "health": device.health, "release": dash(device.release),
        "head": dash(device.head), "mode": device.mode or "-", "hardware": device.hardware or "-",
        "sdk": device.sdk or "-", "accuracy": "-" if device.accuracy is None else f"{device.accuracy:.1%}",
        "alarms": device.alarms, "free disk": records.megabytes(device.disk_free_mb), "memory": records.memory(device),
        "last seen (UTC)": when(device.last_seen),
        "labels": " ".join(f"{key}={value}" for key, value in device.labels.items()) or "-",
    }  # fmt: skip
    text = "\n".join(f"{key:<16} {value}" for key, value in facts.items())
    tell(text, as_json=as_json, **records.as_json(device), last_report=last)


@devices.command("label")
@click.argument("name")
@click.argument("labels", nargs=-1, required=True, metavar="KEY=VALUE|KEY-...")
@home_option
@json_option
def devices_label(name: str, labels: tuple[str, ...], home: Path, as_json: bool) -> None:
    """Set labels of a device; KEY- takes one away. Queries choose devices by them: site=berlin and hw!=pi3."""
    from edge_server.labels import parse_label

    changes = dict(parse_label(label) for label in labels)
    with open_registry(home) as registry:
        has = registry.label(name, changes, actor="cli")
    text = f"{name}: {' '.join(f'{key}={value}' for key, value in has.items()) or 'no labels'}"
    tell(text, as_json=as_json, device=name, labels=has)


@devices.command("replace")
@click.argument("name")
@home_option
@click.option("--out", type=click.Path(path_type=Path), help="The bundle; by default NAME.bundle.json.")
@json_option
def devices_replace(name: str, home: Path, out: Path | None, as_json: bool) -> None:
    """Write a new bundle for a device; what the one before it holds is void. Then renew the broker's files."""
    path = out or Path(f"{name}.bundle.json")
    with open_registry(home) as registry:
        registry.replace(name, out=path, actor="cli")
    text = (
        f"{path} is ready: bring it to the device and run: edge enroll --force {path.name}\n"
        "now renew the broker's files (edge-coordinator broker-files) and let it reload them"
    )
    tell(text, as_json=as_json, device=name, bundle=path)


@devices.command("revoke")
@click.argument("name")
@home_option
@json_option
def devices_revoke(name: str, home: Path, as_json: bool) -> None:
    """Turn a device away. Its messages are dropped at once; the broker has to be given its new files."""
    with open_registry(home) as registry:
        registry.identities.revoke(name, actor="cli")
    text = f"{name} is revoked; now renew the broker's files (edge-coordinator broker-files) and let it reload them"
    tell(text, as_json=as_json, device=name, revoked=True)


@devices.command("passwd")
@home_option
@json_option
def devices_passwd(home: Path, as_json: bool) -> None:
    """Print a mosquitto password file with every enrolled device."""
    with open_registry(home) as registry:
        text = registry.password_file()
    if as_json:
        tell("", as_json=True, password_file=text)
    else:
        click.echo(text, nl=False)


@click.command("broker-files")
@home_option
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the files.")
@click.option("--host", "hosts", multiple=True, help="Name or address of the broker: gives it a new certificate.")
@click.option("--days", type=click.FloatRange(1, 3650), default=365.0, show_default=True, help="Of that certificate.")
@json_option
def broker_files(home: Path, out: Path, hosts: tuple[str, ...], days: float, as_json: bool) -> None:
    """Write what mosquitto reads: access rules, passwords, certificates and revocations. See docs/brokers.md."""
    with open_registry(home) as registry:
        names = registry.identities.broker_files(out, hosts=hosts, days=days)
    text = f"{', '.join(names)} written to {out}; let the broker reload them (SIGHUP)"
    tell(text, as_json=as_json, folder=out, files=names)
