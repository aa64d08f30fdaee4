"""`edge-coordinator push` and `rollout`: ship a release in stages, and have a say in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import click

from edge_server.cli_common import home_option, json_option, open_registry, print_records, when

if TYPE_CHECKING:
    from edge_server.plan import RolloutRules
    from edge_server.records import RolloutRecord
    from edge_server.registry import Registry

P = ParamSpec("P")

_ACTOR = "cli"
_BAR = 24
_RULES = {"soak": "soak_s", "timeout": "timeout_s", "max_drop": "max_accuracy_drop"}
_reason = click.option("--reason", default="", help="Kept with the rollout and in the audit log.")


_RULE_OPTIONS = (
    click.option("--group", default="default", show_default=True, help="Who gets the release."),
    click.option("--plan", type=click.Path(path_type=Path), help="TOML file with the plan; see docs/rollouts.md."),
    click.option("--where", help="Labels that the devices must have, such as site=north, or a segment: @pilot."),
    click.option("--strategy", type=click.Choice(["canary", "shadow", "ab"]), help="How the release goes out."),
    click.option("--stages", help='Percent of the group or devices in each stage, such as "5 devices,10,100".'),
    click.option("--soak", type=float, metavar="SECONDS", help="Time a stage runs before the next."),
    click.option("--timeout", type=float, metavar="SECONDS", help="Time after which a stage is halted."),
    click.option("--min-labelled", type=int, help="Labelled predictions a stage must gather; 0: health alone."),
    click.option("--max-drop", type=float, help="Loss of accuracy that is tolerated, 0 to 1."),
    click.option("--max-failures", type=int, help="Devices that may fail to install or keep it."),
    click.option("--max-parallel", type=int, help="Devices that install at the same time; 0: no limit."),
    click.option("--control-percent", type=int, help="Share of the devices that are held out to compare with."),
    click.option("--approval", type=click.Choice(["none", "each", "last"]), help="Which stages a person lets begin."),
    click.option("--force", metavar="REASON", default="", help="Ship it although it lost against the release in use."),
)


def _rule_options(function: Callable[P, None]) -> Callable[P, None]:
    """To whom and how a release goes out."""
    for option in reversed(_RULE_OPTIONS):
        function = option(function)
    return function


def _rules(registry: Registry, plan: Path | None, options: dict[str, Any]) -> RolloutRules:
    import msgspec

    from edge_server.plan import load_rules

    given = {_RULES.get(name, name): value for name, value in options.items() if value is not None}
    if "stages" in given:
        parts = [part.strip() for part in given["stages"].split(",")]
        given["stages"] = tuple(int(part) if part.isdigit() else part for part in parts)
    rules = registry.settings.rollout if plan is None else load_rules(plan, registry.settings.rollout)
    try:
        return msgspec.structs.replace(rules, **given)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _started(registry: Registry, number: int, *, as_json: bool) -> None:
    record = registry.rollout(number)
    plan = record.plan
    if not registry.reach(plan):
        where = f" where {plan.where}" if plan.where else ""
        click.echo(f"NO device is in group {plan.group}{where}: nobody gets it as things are; is that meant?", err=True)
    if not registry.repository.exists:
        click.echo("NOT signed: there are no keys; make them with: edge-coordinator keys init", err=True)
    if as_json:
        print_records(record, (), (), as_json=True)
        return
    click.echo(f"rollout {number}: release {plan.release} to group {plan.group}, {record.state.reason}")


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@home_option
@_rule_options
@json_option
def push(
    checkpoint: Path, home: Path, group: str, plan: Path | None, force: str, as_json: bool, **options: Any
) -> None:
    """Take in a CHECKPOINT folder and start its rollout. What is not given comes from the plan, then the settings."""
    with open_registry(home) as registry:
        rules = _rules(registry, plan, options)
        number = registry.push(checkpoint, group=group, plan=rules, actor=_ACTOR, force=force)
        _started(registry, number, as_json=as_json)


@click.group()
def rollout() -> None:
    """Look at rollouts; start, approve, pause, resume or abort one."""


@rollout.command("start")
@click.argument("release", type=int)
@home_option
@_rule_options
@click.option(
    "--calculate", is_flag=True, help="Start nothing: say what an A/B test would need, and what it would get."
)
@json_option
def rollout_start(
    release: int, home: Path, group: str, plan: Path | None, force: str, calculate: bool, as_json: bool, **options: Any
) -> None:
    """Start the rollout of a RELEASE that is here. What is not given comes from the plan, then the settings."""
    with open_registry(home) as registry:
        rules = _rules(registry, plan, options)
        if not calculate:
            number = registry.ship(release, group=group, plan=rules, actor=_ACTOR, force=force)
            _started(registry, number, as_json=as_json)
            return
        power = registry.power(release, group=group, plan=rules)
    if power is None:
        raise click.UsageError(f"only an A/B test is calculated beforehand: --strategy ab, not {rules.strategy}")
    days = "?" if power.days is None else f"{power.days:.3g}"
    seen = "-" if power.detectable is None else f"{power.detectable:.1%}"
    row = (power.rows, power.expected, days, seen, power.treated, power.control, "yes" if power.enough else "no")
    columns = ("wanted", "expected", "days", "gain seen", "devices", "held out", "enough")
    print_records(power, columns, [row], as_json=as_json)


@rollout.command("list")
@home_option
@json_option
def rollout_list(home: Path, as_json: bool) -> None:
    """List all rollouts, newest first."""
    with open_registry(home) as registry:
        records = registry.rollouts()
    columns = ("id", "release", "group", "strategy", "status", "stage", "what")
    rows = [
        (r.id, r.plan.release, r.plan.group, r.plan.strategy, _status(r), _stage(r), r.state.waits or r.state.reason)
        for r in records
    ]
    print_records(records, columns, rows, as_json=as_json)


@rollout.command("show")
@click.argument("number", type=int)
@home_option
@json_option
def rollout_show(number: int, home: Path, as_json: bool) -> None:
    """Show one rollout: its history, how its gates stand, and what it waits for."""
    with open_registry(home) as registry:
        record = registry.rollout(number)
    plan = record.plan
    if not as_json:
        where = f" where {plan.where}" if plan.where else ""
        click.echo(
            f"rollout {number}: release {plan.release} to {plan.group}{where}, {plan.strategy}, {_status(record)}\n"
        )
    rows = [(when(step.time), step.status, step.stage + 1, step.reason) for step in record.state.history]
    print_records(record, ("time (UTC)", "status", "stage", "what"), rows, as_json=as_json)
    if as_json:
        return
    if record.state.gates:
        click.echo()
        gates = [(g.metric, g.verdict, f"{g.sample:.0f} of {g.wanted}", g.reason) for g in record.state.gates]
        print_records((), ("gate", "verdict", "sample", "what"), gates, as_json=False)
    if record.state.waits:
        click.echo(f"\n{record.state.waits}")


@rollout.command("watch")
@click.argument("number", type=int)
@home_option
@click.option("--interval", type=click.FloatRange(0.1), default=2.0, show_default=True, metavar="SECONDS",
              help="Time between two looks.")  # fmt: skip
@json_option
def rollout_watch(number: int, home: Path, interval: float, as_json: bool) -> None:
    """Follow one rollout until it ends; a line whenever something has changed. Exit code 1: it was rolled back."""
    with open_registry(home) as registry:
        record = follow(registry, number, interval, as_json=as_json)
    if record.state.status == "rolled_back":
        raise SystemExit(1)


def follow(registry: Registry, number: int, interval: float, *, as_json: bool) -> RolloutRecord:
    """Print a rollout as it changes; returns it once it has ended."""
    import msgspec

    from edge_server.records import as_json as plain

    told = ""
    while True:
        record = registry.rollout(number)
        line = msgspec.json.encode(plain(record)).decode() if as_json else progress(record)
        if line != told:
            click.echo(line)
            told = line
        if not record.state.is_active:
            return record
        time.sleep(interval)


def progress(record: RolloutRecord) -> str:
    """One line: how far the stage is, and what it waits for.

    Example:
        stage 2/3 [##########--------------] 12 of 30 devices  soaks until 2026-01-01 04:00 UTC
    """
    state = record.state
    if state.status != "running":
        return f"{_status(record)}: {state.waits or state.reason}"
    filled = round(_BAR * min(1.0, state.running / state.size)) if state.size else 0
    bar = "#" * filled + "-" * (_BAR - filled)
    where = "in shadow" if state.shadowing else f"stage {state.stage + 1}/{len(record.plan.stages)}"
    return f"{where} [{bar}] {state.running} of {state.size} devices  {state.waits}"


@rollout.command("approve")
@click.argument("number", type=int)
@home_option
@_reason
@json_option
def rollout_approve(number: int, home: Path, reason: str, as_json: bool) -> None:
    """Let the stage begin that waits for a person."""
    with open_registry(home) as registry:
        registry.approve(number, reason=reason, actor=_ACTOR)
        _tell(registry, number, "approved", as_json=as_json)


@rollout.command("pause")
@click.argument("number", type=int)
@home_option
@_reason
@json_option
def rollout_pause(number: int, home: Path, reason: str, as_json: bool) -> None:
    """Tell no further device and begin no stage. Who runs the release keeps it, and gates still halt it."""
    with open_registry(home) as registry:
        registry.pause(number, reason=reason, actor=_ACTOR)
        _tell(registry, number, "paused", as_json=as_json)


@rollout.command("resume")
@click.argument("number", type=int)
@home_option
@json_option
def rollout_resume(number: int, home: Path, as_json: bool) -> None:
    """Go on with a rollout that was paused."""
    with open_registry(home) as registry:
        registry.resume(number, actor=_ACTOR)
        _tell(registry, number, "resumed", as_json=as_json)


@rollout.command("abort")
@click.argument("number", type=int)
@home_option
@_reason
@json_option
def rollout_abort(number: int, home: Path, reason: str, as_json: bool) -> None:
    """Withdraw a release; devices that run it go back to what they had."""
    with open_registry(home) as registry:
        registry.abort(number, reason=reason, actor=_ACTOR)
        _tell(registry, number, "being rolled back", as_json=as_json)


def _tell(registry: Registry, number: int, what: str, *, as_json: bool) -> None:
    record = registry.rollout(number)
    if as_json:
        print_records(record, (), (), as_json=True)
        return
    click.echo(f"rollout {number} is {what}" + (f"; {record.state.waits}" if record.state.waits else ""))


def _status(record: RolloutRecord) -> str:
    return "paused" if record.state.paused else record.state.status.replace("_", " ")


def _stage(record: RolloutRecord) -> str:
    return "shadow" if record.state.shadowing else str(record.plan.stages[record.state.stage])
