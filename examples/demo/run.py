"""The main job, end to end, on real handwriting over a real broker: `make demo`.

quantize -> coordinator -> fleet that drifts and learns -> two releases shipped in stages, one of them bad -> report.
"""

from __future__ import annotations

import argparse
import json
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
from demo import fleet as demo_fleet
from demo.report import write_html
from edge_quantize import CalibrationWarning
from edge_sdk import Fleet, FleetReport, ManualClock, MqttTransport
from edge_sdk.simulate import SimulatedDevice, TickResult
from edge_server import Coordinator, RolloutRules, Settings
from edge_server.broker import EmbeddedBroker

TICKS = 50
PUSH_2_AT, PUSH_3_AT = 30, 41
RULES = RolloutRules(
    stages=(20, 100),
    soak_s=demo_fleet.TICK_S,
    min_labelled=30,
    max_accuracy_drop=0.05,
    reachable_s=4 * demo_fleet.TICK_S,
)
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
        story = Story(Path(folder), options.seed)
        report = story.run()
    (options.out / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    (options.out / "rollouts.json").write_text(json.dumps(story.rollouts, indent=1))
    write_html(options.out / "report.html", report, story.rollouts, story.comparison)
    console.print(summary_table(report))
    for rollout in story.rollouts:
        console.print(f"release {rollout['release']}: [bold]{rollout['status']}[/] - {rollout['reason']}")
    took = [detail for _, _, name, detail in report.events if name == "release_activated" and detail["release"] == 2]
    learned = [detail for detail in took if not detail["head"].startswith("there was no")]
    kept = sum(detail["carried"] for detail in learned)
    console.print(f"release 2 has the same trunk: {kept} of {len(learned)} learned heads were kept on it")
    problems = check(report, story.rollouts)
    for problem in problems:
        console.print(f"[red]not as it should be:[/] {problem}")
    console.print(f"done in {time.monotonic() - started:.0f} s; report: {options.out / 'report.html'}")
    return 1 if problems else 0


class Story:
    """One run, in a folder that is thrown away afterwards."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self.rollouts: list[dict[str, object]] = []
        self.comparison = ""

    def run(self) -> FleetReport:
        """From training to the report."""
        digits = factory.load(self._seed)
        console.rule("1 quantize")
        net, result = factory.release_1(digits, self._folder / "release-1", self._seed)
        factory.release_2(digits, self._folder / "release-1", self._folder / "release-2", self._seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CalibrationWarning)
            bad = factory.release_3(net, digits, self._folder / "release-2", self._folder / "release-3")
        self.comparison = result.comparison.table(parts=False)
        console.print(self.comparison, highlight=False)
        wrong = bad.comparison.int8.accuracy.value
        console.print(f"release 3 is calibrated on the wrong images on purpose: {wrong:.1%} of its answers are right")
        for warning in caught:
            console.print(f"what the toolchain said about it: {warning.message}", highlight=False)

        console.rule("2 coordinator")
        clock = ManualClock()
        with EmbeddedBroker() as broker:
            coordinator = Coordinator(
                self._folder / "coordinator",
                transport=MqttTransport(broker.host, broker.port, client_id="coordinator"),
                clock=clock,
                settings=Settings(accept_unknown=True, durable=False, rollout=RULES),
            )
            coordinator.start()
            coordinator.push(self._folder / "release-1")
            console.print(f"MQTT v5 on {broker.host}:{broker.port}, SQLite; release 1 pushed")
            devices = demo_fleet.build(self._folder / "devices", digits, clock, broker.port, self._seed)
            fleet = Fleet(devices, clock=clock, coordinator=coordinator, tick_s=demo_fleet.TICK_S)
            try:
                return self._live(fleet, coordinator, digits)
            finally:
                fleet.close()
                coordinator.close()

    def _live(self, fleet: Fleet, coordinator: Coordinator, digits: factory.Digits) -> FleetReport:
        console.rule(f"3 fleet of {len(fleet.devices)}, 4 push")
        fleet.connect()
        scores = {simulated.device.name: digits.score.only(factory.BASE | simulated.stream.new_labels)
                  for simulated in fleet.devices}  # fmt: skip
        early: dict[str, tuple[float, float]] = {}
        with Live(console=console, refresh_per_second=4, transient=True) as live:
            for tick in range(1, TICKS + 1):
                if tick == demo_fleet.DRIFT_AT:
                    early = {s.device.name: (s.accuracy(scores[s.device.name], drifted=False),
                                             s.accuracy(scores[s.device.name], drifted=True))
                             for s in fleet.devices}  # fmt: skip
                if tick in (PUSH_2_AT, PUSH_3_AT):
                    coordinator.push(self._folder / f"release-{2 if tick == PUSH_2_AT else 3}")
                    fleet.settle()
                live.update(live_table(fleet.devices, fleet.tick(), tick, coordinator))
        console.rule("5 result")
        self.rollouts = [
            {
                "release": rollout.plan.release,
                "status": rollout.state.status,
                "reason": rollout.state.reason,
                "history": [[round((step.time - fleet.started) / demo_fleet.TICK_S), step.status, step.reason]
                            for step in rollout.state.history],
            }
            for rollout in reversed(coordinator.rollouts())
        ]  # fmt: skip
        summaries = [
            fleet.summary(s, scores[s.device.name], before=early[s.device.name][0], under=early[s.device.name][1])
            for s in fleet.devices
        ]
        return FleetReport(self._seed, TICKS, summaries, fleet.timeline(), fleet.events)


def live_table(devices: list[SimulatedDevice], results: list[TickResult], tick: int, coordinator: Coordinator) -> Table:
    """The fleet as it is now."""
    running = [r for r in coordinator.rollouts() if r.state.is_active]
    title = f"tick {tick} of {TICKS}"
    if running:
        title += f" - release {running[0].plan.release}, stage {running[0].state.stage + 1}: {running[0].state.status}"
    table = Table("device", "right now", "release", "head", "learning", "alarms", title=title)
    for simulated, result in zip(devices, results, strict=True):
        status = simulated.device.status()
        share = result.right / result.predictions if result.predictions else 0.0
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
        "at the end. Then alarms, promotions, rejections, rollbacks, release and head in use, bytes reported."
    )
    title = "Accuracy on held-out handwriting"
    table = Table(*headers, title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for d in report.devices:
        colour = "green" if d.after > d.under + 0.02 else "white"
        table.add_row(
            d.device, f"{d.before:.3f}", f"{d.under:.3f}", f"[{colour}]{d.after:.3f}[/]", f"{d.original:.3f}",
            str(d.alarms), str(d.promotions), str(d.rejections), str(d.rollbacks), str(d.release), str(d.head),
            str(d.bytes_sent),
        )  # fmt: skip
    return table


def check(report: FleetReport, rollouts: list[dict[str, object]]) -> list[str]:
    """What of the story did not come true."""
    problems = []
    status = {rollout["release"]: rollout["status"] for rollout in rollouts}
    if status != {1: "completed", 2: "completed", 3: "rolled_back"}:
        problems.append(f"rollouts ended as {status}")
    if left := [d.device for d in report.devices if d.release != 2]:
        problems.append(f"not on release 2: {', '.join(left)}")
    drifted = [d for d in report.devices if d.drifts]
    if worse := [d.device for d in drifted if d.after < d.under]:
        problems.append(f"worse after learning: {', '.join(worse)}")
    if same := [d.device for d in drifted if d.after == d.under < 0.95]:
        problems.append(f"no better after learning: {', '.join(same)}")
    if forgot := [d.device for d in report.devices if d.original < d.before - 0.05]:
        problems.append(f"more than five points forgotten: {', '.join(forgot)}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
