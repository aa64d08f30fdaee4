"""What a device keeps of what it learned when its base gets another trunk.

    python benchmarks/rebase.py

A device on Fashion-MNIST learns what the world looks like turned by 30 degrees, as any device would: through `predict`,
`observe` and `step`. Then a release with a retrained trunk arrives. Writes rebase.json and rebase.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fashion
import numpy as np
import torch
from fashion import Factory, Images, Source

from edge_quantize import Dataset, build_checkpoint
from edge_sdk import __version__
from edge_sdk.clock import ManualClock
from edge_sdk.config import DeviceConfig, DriftConfig, GateConfig, LearnConfig, PolicyConfig, ReplayConfig, UpdateConfig
from edge_sdk.device import EdgeDevice
from edge_sdk.resources import FixedReader

HERE = Path(__file__).parent
DRIFT = "rot30"
LABELLED, UNLABELLED, TESTED = 2_400, 2_000, 3_000
STEP = 50
WAYS: dict[str, dict[str, Any]] = {
    "keep old": {},
    "plain new base": {"shadow_rows": 0},
    "translated, 100 inputs": {"shadow_rows": 100},
    "translated, 200 inputs": {"shadow_rows": 200},
    "translated, 1000 inputs": {"shadow_rows": 1_000},
    "re-encoded": {"shadow_rows": 200, "keep_inputs": 5_000},
}


@dataclass(frozen=True)
class World:
    """Images as the device meets them, and as the factory knew them."""

    labelled: Images
    unlabelled: Images
    own: Images
    original: Images


def world(source: Source, *, seed: int) -> World:
    """Rows that no factory was trained on: those of validation for life, those of test for the table."""
    rng = np.random.default_rng([seed, 30])
    rows = rng.permutation(np.concatenate([source.rows(label)[1] for label in range(fashion.CLASSES)]))
    tested = source.test.of(rng.permutation(len(source.test.y))[:TESTED])
    life = source.train.of(rows)
    turned = Images(fashion.drifted(life.x, DRIFT, seed=seed), life.y)
    count = min(LABELLED, len(rows) // 2)
    parts = np.split(np.arange(len(rows)), [count, min(count + UNLABELLED, len(rows))])
    own = Images(fashion.drifted(tested.x, DRIFT, seed=seed), tested.y)
    return World(turned.of(parts[0]), turned.of(parts[1]), own, tested)


def settings(**update: Any) -> DeviceConfig:
    """The SDK's defaults, but for what a single run needs: learning in place and soon."""
    return DeviceConfig(
        mode="adapt", durability="normal", variant="int8",
        learn=LearnConfig(executor="inline"), replay=ReplayConfig(max_bytes=100_000),
        policy=PolicyConfig(volume_rows=400, cooldown_s=60), drift=DriftConfig(), gate=GateConfig(max_wait_s=3_600),
        update=UpdateConfig(trust="none", **update),
    )  # fmt: skip


def opened(home: Path, checkpoint: Path, clock: ManualClock, config: DeviceConfig) -> EdgeDevice:
    """A device that is not connected."""
    return EdgeDevice(home, checkpoint=checkpoint, config=config, clock=clock, resources=FixedReader(),
                      rng=np.random.default_rng(0))  # fmt: skip


def live(device: EdgeDevice, clock: ManualClock, images: Images, *, labelled: bool) -> None:
    """Predict, and label if asked for, a step every few rows."""
    x = fashion.scaled(images.x)
    for start in range(0, len(x), STEP):
        for i in range(start, min(start + STEP, len(x))):
            prediction = device.predict(x[i])
            if labelled:
                device.observe(prediction.id, str(images.y[i]))
        clock.advance(30)
        device.step()


def accuracy(device: EdgeDevice, images: Images) -> float:
    """Share of images that are right."""
    return device.evaluate(fashion.scaled(images.x), [str(y) for y in images.y])


def packed(source: Source, factory: Factory, number: int, folder: Path) -> Path:
    """A factory's network as a release of this version: those in the cache may be of an earlier one."""
    net = fashion.Net(factory.classes)
    net.load_state_dict(torch.load(factory.folder / "net.pt", weights_only=True))
    images = source.train.of(factory.train_rows)
    held = source.train.of(np.concatenate([source.rows(label)[2] for label in range(factory.classes)]))
    data = Dataset(fashion.scaled(images.x), images.y, fashion.scaled(held.x), held.y)
    target = folder / f"release-{number}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch's exporter has to say
        build_checkpoint(net.eval(), data, labels=[str(label) for label in range(factory.classes)], name="fashion",
                         release=number, target=target, created=fashion.CREATED, input_spec=fashion.SPEC,
                         measure_memory=False)  # fmt: skip
    return target


def run(source: Source, cache: Path, seed: int, folder: Path) -> list[dict[str, Any]]:
    """One device's life, and every way in which it may take the new release."""
    drifts = tuple(fashion.DRIFTS)
    old, new = (fashion.factory(source, cache, classes=fashion.CLASSES, seed=seed + i, drifts=drifts) for i in (0, 1))
    first, checkpoint = packed(source, old, 1, folder), packed(source, new, 2, folder)
    seen, clock = world(source, seed=seed), ManualClock()
    home = folder / "home"
    device = opened(home, first, clock, settings(keep_inputs=5_000))
    lines = [{"seed": seed, "way": "old base, nothing learned", **scores(device, seen), "head": 0, "note": ""}]
    live(device, clock, seen.labelled, labelled=True)
    head = device.status().head
    device.stop()
    stopped = clock.now()
    if not head:
        raise SystemExit(f"seed {seed}: the device learned nothing")
    for way, update in WAYS.items():
        clock = ManualClock(stopped)
        copy = Path(shutil.copytree(home, folder / way.replace(" ", "-")))
        device = opened(copy, first if way == "keep old" else checkpoint, clock, settings(**update))
        if update.get("shadow_rows"):
            live(device, clock, seen.unlabelled, labelled=False)
            while device._maintenance.upgrade.state.shadow is not None:  # noqa: SLF001 - of more inputs than a life has
                live(device, clock, seen.unlabelled, labelled=False)
        status = device.status()
        notes = [entry.detail for entry in device.history(limit=2_000) if entry.name == "release_activated"]
        note = "" if way == "keep old" else notes[-1]["head"]
        lines.append({"seed": seed, "way": way, **scores(device, seen), "head": status.head, "note": note})
        assert status.release == (1 if way == "keep old" else 2), way
        device.stop()
        print(lines[-1], flush=True)
    return lines


def scores(device: EdgeDevice, seen: World) -> dict[str, float]:
    """Accuracy on the device's own data and on the factory's."""
    return {"own": accuracy(device, seen.own), "original": accuracy(device, seen.original)}


def table(lines: list[dict[str, Any]]) -> str:
    """Means over the seeds."""
    ways, seeds = list(dict.fromkeys(line["way"] for line in lines)), sorted({line["seed"] for line in lines})
    rows = [
        f"| {way} | " + " | ".join(
            f"{100 * np.mean([line[part] for line in lines if line['way'] == way]):.1f}" for part in ("own", "original")
        ) + " |"
        for way in ways
    ]  # fmt: skip
    return "\n".join([f"Accuracy in percent, mean of {len(seeds)} seeds.", "",
                      "| | turned by 30 degrees | as the factory knew it |", "|---|---|---|", *rows, ""])  # fmt: skip


def page(source: str, lines: list[dict[str, Any]]) -> str:
    """What rebase.md says."""
    return f"""# {source}: a base with another trunk

A device learns from {LABELLED} labelled images turned by 30 degrees, in place and soon, else with the SDK's defaults.
Then a release with a retrained trunk arrives, and as many inputs as each line says pass both trunks. Re-encoded: the
inputs of the labelled rows were kept on disk (`update.keep_inputs`). No model has seen an image of the table.

{table(lines)}
Targets: translated within 3 points of re-encoded, and above the plain new base, on the device's own data. The default
is 200 inputs.
Rerun: `python benchmarks/rebase.py`; `rebase.json` has each seed with the reason that the device gave.
"""


def main(given: list[str] | None = None) -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--cache", type=Path, default=Path("build/forgetting"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--digits", action="store_true", help="on the stand-in")
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args(given)
    logging.disable(logging.WARNING)
    source = fashion.load(digits=arguments.digits)
    cache = arguments.cache / ("digits" if arguments.digits else "fashion")
    lines: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            lines += run(source, cache, seed, Path(folder))
    facts = {"source": source.name, "version": __version__, "machine": platform.machine(), "lines": lines}
    (arguments.output / "rebase.json").write_text(json.dumps(facts, indent=1) + "\n")
    (arguments.output / "rebase.md").write_text(page(source.name, lines))
    print(table(lines))


if __name__ == "__main__":
    main()
