"""The main job, end to end, on real handwriting over a real broker: `make demo`.

quantize -> coordinator -> fleet that drifts and learns -> two releases shipped in stages, one of them bad -> report.
What happens to the fleet stands in fleet.toml.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import msgspec
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from demo import factory
from edge_quantize import CalibrationWarning
from edge_sdk import Fleet, FleetReport
from edge_sdk.fleet_page import page
from edge_sdk.fleet_report import summary_lines
from edge_sdk.plan import prepare
from edge_sdk.simulate import Progress
from edge_server.broker import EmbeddedBroker
from edge_server.simulation import open_coordinator

SCENARIO = Path(__file__).with_name("fleet.toml")
console = Console()


def main() -> int:
    """Run the story; 0 if it ended as it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the report (replaced)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="edge-demo-") as folder:
        build(Path(folder), options.seed)
        report = live(Path(folder), options.seed)
    json = msgspec.json.format
    (options.out / "report.json").write_bytes(json(msgspec.json.encode(report.lasting()), indent=1))
    (options.out / "rollouts.json").write_bytes(json(msgspec.json.encode(report.releases), indent=1))
    (options.out / "report.html").write_text(page(report), encoding="utf-8")
    console.rule("4 result")
    console.print(summary_table(report))
    for line in summary_lines(report):
        console.print(line, highlight=False)
    took = [e.detail for e in report.events if e.name == "release_activated" and e.detail["release"] == 2]
    learned = [detail for detail in took if not detail["head"].startswith("there was no")]
    kept = sum(detail["carried"] for detail in learned)
    console.print(f"release 2 has the same trunk: {kept} of {len(learned)} learned heads were kept on it")
    problems = check(report)
    for problem in problems:
        console.print(f"[red]not as it should be:[/] {problem}")
    console.print(f"done in {time.monotonic() - started:.0f} s; report: {options.out / 'report.html'}")
    return 1 if problems else 0


def build(folder: Path, seed: int) -> None:
    """Three releases beside the scenario."""
    console.rule("1 quantize")
    shutil.copy(SCENARIO, folder)
    digits = factory.load(seed=0)  # the scenario's own split
    net, result = factory.release_1(digits, folder / "release-1", seed)
    factory.release_2(digits, folder / "release-1", folder / "release-2", seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CalibrationWarning)
        bad = factory.release_3(net, digits, folder / "release-2", folder / "release-3")
    console.print(result.comparison.table(parts=False), highlight=False)
    wrong = bad.comparison.int8.accuracy.value
    console.print(f"release 3 is calibrated on the wrong images on purpose: {wrong:.1%} of its answers are right")
    for warning in caught:
        console.print(f"what the toolchain said about it: {warning.message}", highlight=False)


def live(folder: Path, seed: int) -> FleetReport:
    """The fleet, each device with a connection of its own."""
    console.rule("2 broker and coordinator")
    with EmbeddedBroker() as broker:
        console.print(f"MQTT v5 on {broker.host}:{broker.port}, SQLite")
        prepared = prepare(folder / SCENARIO.name, seed=seed)
        url = f"mqtt://{broker.host}:{broker.port}"
        with (
            Fleet(prepared, broker=url, coordinator=open_coordinator) as fleet,
            Live(console=console, refresh_per_second=4, transient=True) as screen,
        ):
            console.rule(f"3 fleet of {len(prepared.devices)}, two releases")
            return fleet.run(on_tick=lambda progress: screen.update(live_table(fleet, progress)))


def live_table(fleet: Fleet, progress: Progress) -> Table:
    """How the fleet is now."""
    table = Table(
        "device", "right now", "release", "head", "learning", "alarms", title=f"{progress.time_s / 3600:.1f} h"
    )
    for simulated, lived in zip(fleet.devices, progress.devices, strict=True):
        assert simulated.device is not None
        status = simulated.device.status()
        share = lived.right / lived.made if lived.made else 0.0
        colour = "green" if share > 0.9 else "yellow" if share > 0.7 else "red"
        table.add_row(
            status.device, f"[{colour}]{share:.0%}[/]", str(status.release), str(status.head), status.phase,
            ", ".join(status.alarms),
        )  # fmt: skip
    return table


def summary_table(report: FleetReport) -> Table:
    """One line a device; accuracies on images that no model has seen."""
    headers = ("device", "before", "drift", "after", "orig", "alm", "prm", "rej", "bck", "rel", "hd", "bytes")
    caption = (
        "accuracy before the drift; drifted, with the model that met it; drifted, after learning; on the original data "
        "at the end. Then alarms, promotions, rejections, rollbacks, release and head in use, bytes sent."
    )
    title = "Accuracy on held-out handwriting"
    table = Table(*headers, title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    for d in report.devices:
        colour = "green" if (d.after or 0) > (d.under or 1) + 0.02 else "white"
        table.add_row(
            d.device, share(d.before), share(d.under), f"[{colour}]{share(d.after)}[/]", share(d.original),
            str(d.alarms), str(d.promotions), str(d.rejections), str(d.rollbacks), str(d.release), str(d.head),
            str(d.bytes_sent),
        )  # fmt: skip
    return table


def check(report: FleetReport) -> list[str]:
    """What of the story did not come true."""
    problems = list(report.unmet)
    if left := [d.device for d in report.devices if d.release != 2]:
        problems.append(f"not on release 2: {', '.join(left)}")
    drifted = [d for d in report.devices if d.drifts and d.after is not None and d.under is not None]
    if worse := [d.device for d in drifted if d.after < d.under]:
        problems.append(f"worse after learning: {', '.join(worse)}")
    if same := [d.device for d in drifted if d.after == d.under < 0.95]:
        problems.append(f"no better after learning: {', '.join(same)}")
    if forgot := [d.device for d in report.devices if (d.forgotten or 0) > 0.05]:
        problems.append(f"more than five points forgotten: {', '.join(forgot)}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
