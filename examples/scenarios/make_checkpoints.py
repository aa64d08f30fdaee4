"""Make the checkpoints that the scenarios name, in build/checkpoints: `python make_checkpoints.py [SOURCE ...]`.

The digits are those of the demo: release 1, a better release 2, and a release 3 that is broken on purpose. Any other
source of `edge_sdk.worlds` gets a small network of its own, trained on the part that no simulated device ever sees.
"""

import argparse
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from demo import factory
from edge_quantize import CalibrationWarning, CardText, Dataset, build_checkpoint
from edge_sdk.manifest import TargetSpec
from edge_sdk.schema import Impute, InputSpec, Scale
from edge_sdk.streams import World
from edge_sdk.worlds import DataConfig, open_world

BUILD = Path(__file__).parent.parent.parent / "build" / "checkpoints"


def digits(target: Path) -> None:
    """The demo's three releases."""
    data = factory.load(seed=0)  # the split of the source "digits" with its `split_seed` 0
    net, _ = factory.release_1(data, target / "release-1", 0)
    factory.release_2(data, target / "release-1", target / "release-2", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # it is right: release 3 is a mistake
        factory.release_3(net, data, target / "release-2", target / "release-3")


def small(world: World, target: Path) -> None:
    """Release 1 of any other source: missing values become 0, then all are scaled, then an MLP."""
    order = np.random.default_rng(0).permutation(len(world.factory.y))
    x, y = world.factory.x[order], world.factory.y[order]
    cut = len(y) - max(200, len(y) // 5)  # the others are held out
    numbers = bool(world.targets)
    middle, spread = (y[:cut].mean(0), y[:cut].std(0)) if numbers else (0.0, 1.0)
    sensors = tuple(i for i in range(x.ndim) if i != (1 if world.axis == 0 else x.ndim - 1))
    mean, std = x[:cut].mean(sensors), np.maximum(x[:cut].std(sensors), 1e-3)
    spec = world.spec
    spec = InputSpec(
        shape=spec.shape, name=spec.name, low=spec.low, high=spec.high, columns=spec.columns,
        preprocess=[Impute(values=[0.0]), Scale(mean=mean.tolist(), std=std.tolist(), axis=world.axis)],
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].size, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(),
                        nn.Linear(32, len(world.labels or world.targets)))  # fmt: skip
    ready = torch.from_numpy(spec.apply(x))
    truth = torch.from_numpy(((y - middle) / spread).astype(np.float32) if numbers else y)
    loss = nn.functional.mse_loss if numbers else nn.functional.cross_entropy
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(30):
        for rows in torch.randperm(cut).split(64):
            optimizer.zero_grad()
            loss(net(ready[rows]), truth[rows]).backward()
            optimizer.step()
    targets = []
    if numbers:  # a prediction is right within half a standard deviation
        targets = [TargetSpec(float(m), float(s), float(s) / 2) for m, s in zip(middle, spread, strict=True)]
    data = Dataset(x[:cut], y[:cut], x[cut:], y[cut:])
    build_checkpoint(
        net.eval(), data, labels=list(world.labels or world.targets), name=world.name, release=1,
        target=target / "release-1", created=factory.CREATED, input_spec=spec,
        task="regression" if numbers else "classification", targets=targets,
        card=CardText(data=f"the factory part of {world.name}"),
    )  # fmt: skip


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("sources", nargs="*", default=["digits", "basic-motions", "sine", "friedman"])
    options.add_argument("--out", type=Path, default=BUILD)
    chosen = options.parse_args()
    for source in chosen.sources:
        folder = chosen.out / source
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        digits(folder) if source == "digits" else small(open_world(DataConfig(source=source)), folder)
        print(f"{source}: {', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}")
