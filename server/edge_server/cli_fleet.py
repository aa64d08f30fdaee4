"""`edge-coordinator fleet`: the fleet's data, its drift, and what freshness is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_server.cli_common import dash, home_option, json_option, open_registry, print_records, when

if TYPE_CHECKING:
    from edge_server.freshness import Estimate


@click.group()
def fleet() -> None:
    """Look at the fleet as a whole: its data, its drift, and what a new base would bring."""


@fleet.command("show")
@home_option
@click.option("--by", default="all", show_default=True, metavar="WHAT",
              help="all, hour, day, device, group, release, hw, or a label.")  # fmt: skip
@click.option(
    "--hours", type=click.FloatRange(0, min_open=True), default=24.0, show_default=True, help="Back from now."
)
@click.option("--where", default="", metavar="QUERY", help="Only devices with labels such as: site=berlin and hw!=pi3")
@click.option("--sample", type=click.IntRange(1), default=1000, show_default=True, help="At most so many devices.")
@json_option
def fleet_show(home: Path, by: str, hours: float, where: str, sample: int, as_json: bool) -> None:
    """Add up the devices' summaries and compare them with the reference, feature by feature."""
    with open_registry(home) as registry:
        views = registry.insight.view(
            by=by,
            since=registry.clock.now() - hours * 3600,
            where=where,
            sample=sample,
        )
    columns = ("group", "devices", "feature", "rows", "mean", "median", "psi", "ks", "shift", "up", "down", "t")
    rows = [
        (
            *(view.group, view.devices, f.name, f.rows, _number(f.mean), _number(f.quantiles.get("50"))),
            *(_number(f.psi), _number(f.ks), _number(f.shift), f.up, f.down, _number(f.t)),
        )
        for view in views
        for f in view.features
    ]
    print_records(views, columns, rows, as_json=as_json)


@fleet.command("drift")
@home_option
@json_option
def fleet_drift(home: Path, as_json: bool) -> None:
    """Tell drift of the fleet from drift of single devices, with the evidence and what to do."""
    from edge_server.fleet_words import LOCAL

    with open_registry(home) as registry:
        report = registry.insight.drift()
    if as_json:
        print_records(report, (), (), as_json=True)
        return
    if not report.end:
        click.echo("no window was looked at yet: edge-coordinator serve does it every hour")
        return
    click.echo(f"as of {when(report.end)} UTC; at most {report.false_alarms_per_day:g} false alarms of the fleet a day")
    for cause in report.causes:
        click.echo(
            f"\n{cause.scope} drift of {cause.cohort}, since {when(cause.raised)}: {cause.words}\n  {cause.advice}"
        )
        rows = [
            (f.cohort, f.monitor, f"{f.alarmed}/{f.at_risk}", f"{f.expected:.2g}", f"{f.evidence:.1f}",
             f"{f.threshold:.1f}", ", ".join(f.features), f"{f.p_direction:.2g}")
            for f in cause.findings
        ]  # fmt: skip
        columns = ("cohort", "monitor", "alarmed", "expected", "evidence", "threshold", "features", "p(direction)")
        print_records([], columns, rows, as_json=False)
    if not report.causes:
        click.echo("no drift of the fleet")
    local = report.local
    click.echo(
        f"\n{len(local.onsets)} alarms of single devices; their own budgets allow {local.expected:.1f} false ones"
    )
    if local.onsets:
        click.echo(f"  {LOCAL}")
        alarms = [
            (o.device, o.monitor, when(o.time), o.kind, o.words or ", ".join(o.suspects)) for o in local.onsets[:50]
        ]
        print_records([], ("device", "monitor", "when (UTC)", "kind", "what"), alarms, as_json=False)


@fleet.command("freshness")
@home_option
@json_option
def fleet_freshness(home: Path, as_json: bool) -> None:
    """Say what a new base would bring, from accuracy by age of the model, and what it would cost to ship."""
    with open_registry(home) as registry:
        report = registry.insight.freshness()
    if as_json:
        print_records(report, (), (), as_json=True)
        return
    click.echo(report.advice)
    rows = [
        (what, f"{entry.from_days:g}" + ("+" if entry.to_days is None else f" to {entry.to_days:g}"),
         *_cells(entry.accuracy))
        for what, bins in (("base", report.by_base_age), ("version", report.by_version_age))
        for entry in bins
    ]  # fmt: skip
    if rows:
        click.echo("")
        print_records([], ("age of", "days", "accuracy", "95 %", "devices", "labelled"), rows, as_json=False)
    told = (
        ("change a day of age", report.slope_per_day),
        ("lost since the release was fresh", report.lost_since_release),
        ("lost since the version was fresh", report.lost_since_adaptation),
        ("gained by releases so far", report.gained_by_releases),
        ("gained by learned heads so far", report.gained_by_adaptations),
    )
    click.echo("")
    print_records([], ("accuracy", "points", "95 %", "devices", "labelled"),
                  [(what, *_cells(estimate)) for what, estimate in told], as_json=False)  # fmt: skip
    click.echo(
        f"\nto ship: {report.ship_bytes / 1e6:.1f} MB to {report.devices} devices, {report.ship_joules:.0f} J; "
        f"{report.predictions_per_day:.0f} predictions a day"
    )
    if report.right_per_mb is not None:
        right = report.right_per_day
        click.echo(
            f"to gain: {right.value:.0f} right answers a day ({right.low:.0f} to {right.high:.0f}), "
            f"{report.right_per_mb:.1f} for each MB over 30 days"
        )


def _number(value: float | None) -> str:
    return dash(None if value is None else f"{value:.3g}")


def _cells(estimate: Estimate) -> tuple[str, str, int, int]:
    """Value and interval in percent, or why there is none."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "-", estimate.problem, estimate.devices, estimate.labelled
    interval = f"{100 * estimate.low:.2f} to {100 * estimate.high:.2f}"
    return f"{100 * estimate.value:.2f}", interval, estimate.devices, estimate.labelled
