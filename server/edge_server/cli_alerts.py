"""`edge-coordinator alerts`: what people are told of, and when not."""

from __future__ import annotations

from pathlib import Path

import click

from edge_server.cli_common import home_option, json_option, open_registry, print_records, when


@click.group()
def alerts() -> None:
    """Look at alerts, silence or resolve them, and read what to do about each kind."""


@alerts.command("list")
@home_option
@click.option("--all", "everything", is_flag=True, help="Resolved ones too.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="The newest so many.")
@json_option
def alerts_list(home: Path, everything: bool, limit: int, as_json: bool) -> None:
    """List alerts, newest first, and the silences that last."""
    with open_registry(home) as registry:
        records = registry.alerts.find(status=None if everything else "firing", limit=limit)
        silences = registry.alerts.silences()
    rows = [
        (a.id, a.severity, _state(a.status, a.silence, a.closed_by), a.kind, a.cause, a.count, when(a.raised), a.words)
        for a in records
    ]
    columns = ("id", "severity", "status", "kind", "cause", "devices", "since (UTC)", "what")
    print_records(records, columns, rows, as_json=as_json)
    if silences and not as_json:
        click.echo("")
        quiet = [(s.id, s.kind, s.cause, s.device, when(s.until), s.actor, s.reason) for s in silences]
        print_records([], ("silence", "kind", "cause", "device", "until (UTC)", "by", "why"), quiet, as_json=False)


@alerts.command("show")
@click.argument("number", type=int)
@home_option
@json_option
def alerts_show(number: int, home: Path, as_json: bool) -> None:
    """Show one alert: whom it concerns, what to do, and whether its notices were delivered."""
    with open_registry(home) as registry:
        record = registry.alerts.show(number)
    if as_json:
        print_records(record, (), (), as_json=True)
        return
    alert = record.alert
    state = _state(alert.status, alert.silence, alert.closed_by)
    click.echo(f"alert {alert.id}, {alert.severity}, {state}: {record.title}\n{alert.words}\n{record.meaning}")
    click.echo(f"raised {when(alert.raised)} UTC" + (f", resolved {when(alert.resolved)}" if alert.resolved else ""))
    if alert.members:
        more = f" and {alert.count - len(alert.members)} more" if alert.count > len(alert.members) else ""
        click.echo(f"devices: {', '.join(alert.members)}{more}")
    click.echo("what to do:\n" + "\n".join(f"  - {line}" for line in record.todo))
    rows = [(d.sink, when(d.created), d.attempts, "-" if d.done is None else when(d.done), d.error)
            for d in record.deliveries]  # fmt: skip
    if rows:
        print_records([], ("sink", "notice (UTC)", "failures", "delivered (UTC)", "problem"), rows, as_json=False)


@alerts.command("silence")
@home_option
@click.option("--kind", default="*", show_default=True, help="Of alerts; * and ? as in file names, also below.")
@click.option("--cause", default="*", show_default=True, help="As `alerts list` shows it.")
@click.option("--device", default="*", show_default=True, help="Leave only these devices out of alerts.")
@click.option("--hours", type=click.FloatRange(0, 8784, min_open=True), help="For so long from now.")
@click.option("--reason", default="", help="Why; kept.")
@click.option("--end", type=int, metavar="SILENCE", help="End this silence instead.")
@json_option
def alerts_silence(
    home: Path, kind: str, cause: str, device: str, hours: float | None, reason: str, end: int | None, as_json: bool
) -> None:
    """Keep people from being told of what matches, for some time; alerts stay in the list."""
    with open_registry(home) as registry:
        if end is not None:
            registry.alerts.end_silence(end, actor="cli")
        elif hours is None or not reason:
            raise click.UsageError("give --hours and --reason, or --end")
        else:
            registry.alerts.silence(
                kind=kind, cause=cause, device=device, for_s=hours * 3600, reason=reason, actor="cli"
            )
        records = registry.alerts.silences()
    rows = [(s.id, s.kind, s.cause, s.device, when(s.until), s.actor, s.reason) for s in records]
    print_records(records, ("silence", "kind", "cause", "device", "until (UTC)", "by", "why"), rows, as_json=as_json)


@alerts.command("resolve")
@click.argument("number", type=int)
@home_option
@click.option("--reason", default="", help="Kept in the audit log.")
@json_option
def alerts_resolve(number: int, home: Path, reason: str, as_json: bool) -> None:
    """Be done with an alert: nobody is told again until its condition has gone and comes anew."""
    with open_registry(home) as registry:
        registry.alerts.resolve(number, reason=reason, actor="cli")
        record = registry.alerts.show(number).alert
    if as_json:
        print_records(record, (), (), as_json=True)
    else:
        click.echo(f"alert {number} ({record.kind}, {record.cause}) stays quiet until it comes anew")


@alerts.command("runbook")
@click.argument("kind", required=False)
@json_option
def alerts_runbook(kind: str | None, as_json: bool) -> None:
    """Say what a KIND of alert means and what to do, or all of them."""
    from edge_server.runbook import RUNBOOK

    if kind is not None and kind not in RUNBOOK:
        raise click.BadParameter(f"{kind!r} is none of {', '.join(RUNBOOK)}", param_hint="KIND")
    chosen = {name: entry for name, entry in RUNBOOK.items() if kind in (None, name)}
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(chosen), indent=2))
        return
    for name, entry in chosen.items():
        click.echo(f"{name}: {entry.title}\n{entry.meaning}\n" + "\n".join(f"  - {line}" for line in entry.todo) + "\n")


def _state(status: str, silence: int | None, closed_by: str) -> str:
    if status == "firing" and closed_by:
        return f"closed by {closed_by}"
    return f"silenced ({silence})" if status == "firing" and silence is not None else status
