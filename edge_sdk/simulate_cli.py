"""`edge simulate`: a scenario as it would go, before it does."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from edge_sdk.errors import ConfigError

if TYPE_CHECKING:
    from edge_sdk.mqtt import Tls
    from edge_sdk.simulate import Fleet, Progress

EXIT_UNMET, EXIT_STOPPED = 1, 130
_file = click.Path(dir_okay=False, path_type=Path)
_report = click.Path(exists=True, dir_okay=False, path_type=Path)


class _RunByDefault(click.Group):
    """`edge simulate scenario.toml` means `edge simulate run scenario.toml`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the command in where none is named."""
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_RunByDefault)
def simulate() -> None:
    """Simulate a fleet: `edge simulate scenario.toml` runs it, `compare` tells two runs apart."""


@simulate.command()
@click.argument("scenario", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--html", "page_file", type=_file, help="Draw what came out.")
@click.option("--json", "json_file", type=_file, help="Write the report, for `compare` and for programs.")
@click.option("--events", "events_file", type=_file, help="Write all events as JSON lines, the same for the same seed.")
@click.option("--ci", is_flag=True, help="Exit with 1 if an expectation of the scenario is not met.")
@click.option("--devices", type=click.IntRange(1), help="In place of `fleet.devices`.")
@click.option("--seed", type=click.IntRange(0), help="In place of `fleet.seed`.")
@click.option(
    "--workers", type=click.IntRange(1), help="Processes, this one among them; the result is the same.  [by size]"
)
@click.option("--broker", default="", metavar="URL", help="mqtt(s)://host:port: each device a connection of its own.")
@click.option("--ca", type=_file, help="With mqtts://: authorities that are trusted, PEM.  [the system's]")
@click.option("--cert", type=_file, help="With mqtts://: the certificate that all connections show, PEM.")
@click.option("--key", type=_file, help="Its private key.  [in --cert]")
@click.option("--quiet", is_flag=True, help="No progress and no summary; expectations that are not met are told.")
def run(
    scenario: Path,
    page_file: Path | None,
    json_file: Path | None,
    events_file: Path | None,
    ci: bool,
    devices: int | None,
    seed: int | None,
    workers: int | None,
    broker: str,
    quiet: bool,
    **tls_files: Path | None,
) -> None:
    """Run the SCENARIO, and say what came out.

    Ctrl-C ends it after the tick under way, with a report of what there is and exit code 130; a second one ends it at
    once.
    """
    from edge_sdk.files import replace_file
    from edge_sdk.fleet_page import page
    from edge_sdk.fleet_report import summary_lines
    from edge_sdk.plan import prepare
    from edge_sdk.simulate import Fleet

    tls = _tls(**tls_files)
    for target in (page_file, json_file, events_file):
        if target is not None and not target.parent.is_dir():
            raise ConfigError(f"{target}: there is no folder {target.parent}")
    prepared = prepare(scenario, devices=devices, seed=seed)
    with _few_words(), Fleet(prepared, broker=broker, tls=tls, workers=workers) as fleet, _stopping(fleet):
        report = fleet.run(on_tick=None if quiet else _Teller())
    written = {json_file: msgspec.json.format(msgspec.json.encode(report), indent=1), events_file: report.event_log()}
    if page_file is not None:
        written[page_file] = page(report).encode()
    for target, data in written.items():
        if target is not None:
            replace_file(target, data)
    for line in [] if quiet else summary_lines(report):
        click.echo(line)
    for line in report.unmet:
        click.echo(f"not met: {line}", err=True)
    if report.partial:
        sys.exit(EXIT_STOPPED)
    if ci and report.unmet:
        sys.exit(EXIT_UNMET)


def _tls(ca: Path | None, cert: Path | None, key: Path | None) -> Tls | None:
    """What the three files say of the encryption; None: nothing."""
    if ca is None and cert is None and key is None:
        return None
    if cert is None and key is not None:
        raise ConfigError(f"--key {key}: there is no certificate to it; give --cert as well")
    from edge_sdk.mqtt import Tls

    return Tls(ca, cert, key)


@simulate.command()
@click.argument("first", type=_report)
@click.argument("second", type=_report)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def compare(first: Path, second: Path, as_json: bool) -> None:
    """Compare two reports that `--json` wrote.

    With the same seed and devices, runs differ in nothing but what was changed, and devices are compared one by one.
    """
    from edge_sdk.fleet_compare import compare as differences
    from edge_sdk.fleet_compare import comparison_lines
    from edge_sdk.fleet_report import load_report

    found = differences(load_report(first), load_report(second))
    if as_json:
        rows = [{**msgspec.to_builtins(row), "clear": row.clear} for row in found]
        click.echo(msgspec.json.format(msgspec.json.encode(rows), indent=1).decode())
        return
    for line in comparison_lines(found, (first.stem, second.stem)):
        click.echo(line)


@contextmanager
def _few_words() -> Iterator[None]:
    """What devices and coordinator tell of themselves is in the report; here only what goes wrong, but with --debug."""
    log = logging.getLogger()
    before = log.level
    if before > logging.DEBUG:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def _stopping(fleet: Fleet) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM end the run after its tick; the next one ends it at once."""

    def stop(_number: int, _frame: Any) -> None:
        if fleet.stop_requested:
            raise KeyboardInterrupt
        fleet.stop_requested = True
        click.echo("\nstopping after this tick; once more to stop at once", err=True)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Teller:
    """Progress on standard error: one line that changes on a terminal, else a line for each tenth."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._began, self._told, self._tenth = time.monotonic(), 0.0, 0
        self._made, self._good = 0, 0.0

    def __call__(self, progress: Progress) -> None:
        self._made += progress.made
        self._good += progress.right if progress.off is None else progress.off
        share, now = progress.time_s / progress.duration_s, time.monotonic()
        done = share >= 1 - 1e-9
        if self._live and (now - self._told >= 0.2 or done):
            self._told = now
            click.echo(f"\r{self._line(progress, share, now)}\x1b[K", nl=done, err=True)
            self._made, self._good = 0, 0.0
        elif not self._live and (int(share * 10) > self._tenth or done):
            self._tenth = int(share * 10)
            click.echo(self._line(progress, share, now), err=True)
            self._made, self._good = 0, 0.0

    def _line(self, progress: Progress, share: float, now: float) -> str:
        took = now - self._began
        lately = "no predictions"
        if self._made:
            mean = self._good / self._made
            lately = f"{mean:.1%} right" if progress.off is None else f"off by {mean:.3g}"
        return (
            f"{progress.time_s / 3600:.1f} of {progress.duration_s / 3600:g} h, {progress.predictions:,} predictions,"
            f" {lately} lately, {progress.alarms} alarms, {progress.promotions} promotions, {progress.rollbacks}"
            f" rollbacks; {took:.0f} s, {took / share - took:.0f} to go"
        )
