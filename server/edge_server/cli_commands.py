"""`edge-coordinator command` and `commands`: orders to one device, and its answers."""

from __future__ import annotations

from pathlib import Path

import click

from edge_server.cli_common import home_option, json_option, open_registry, print_records, when


@click.command("command")
@click.argument("what", nargs=-1, required=True, metavar="[DEVICE] ORDER [KEY=VALUE]...")
@home_option
@click.option("--group", help="Every device of this group, in place of DEVICE.")
@click.option("--expires", type=click.FloatRange(1), default=86_400.0, show_default=True, metavar="SECONDS",
              help="After this time it is not carried out any more.")  # fmt: skip
@json_option
def command(what: tuple[str, ...], home: Path, group: str | None, expires: float, as_json: bool) -> None:
    """Tell DEVICE, or every device of a group, what to do.

    ORDER: adapt-now, roll-back, reset-to-base, pause-learning [seconds=S], resume-learning, report-interval seconds=S
    (0: as configured), mode mode=monitor|shadow|adapt, status, diagnostics. The answer comes with `commands`.
    """
    device, *what_to_do = what if group is None else ("", *what)
    if not what_to_do:
        raise click.UsageError("say what to do: DEVICE ORDER, or --group GROUP ORDER")
    order, *args = what_to_do
    pairs = [text.partition("=") for text in args]
    if wrong := [text for text, (_, equals, _) in zip(args, pairs, strict=True) if not equals]:
        raise click.BadParameter(f"{wrong[0]!r} is no KEY=VALUE")
    given = {key: value for key, _, value in pairs}
    with open_registry(home) as registry:
        if group is not None:
            records = registry.identities.order_group(group, order, given, expires_s=expires, actor="cli")
            text = f"{len(records)} devices of {group} are told; their answers: edge-coordinator commands"
        else:
            records = [registry.identities.order(device, order, given, expires_s=expires, actor="cli")]
            text = f"command {records[0].id} waits for {device}; its answer: edge-coordinator commands {device}"
    if as_json:
        print_records(records, (), (), as_json=True)
    else:
        click.echo(text)


@click.command("commands")
@click.argument("device", required=False)
@home_option
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="The newest so many.")
@json_option
def commands(device: str | None, home: Path, limit: int, as_json: bool) -> None:
    """List commands and their answers, newest first."""
    with open_registry(home) as registry:
        if device is not None:
            registry.device(device)
        records = registry.store.commands.find(device=device, limit=limit)
    columns = ("command", "device", "order", "given (UTC)", "outcome", "answer")
    rows = [(r.id, r.device, r.name, when(r.issued), r.outcome, r.reason or r.result) for r in records]
    print_records(records, columns, rows, as_json=as_json)
