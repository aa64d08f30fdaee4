"""The factory: real handwriting, a small network, and the three releases of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from edge_quantize import BuildResult, CardText, Dataset, build_checkpoint, encode, repack_checkpoint
from edge_sdk import Head, Manifest, verify_checkpoint
from edge_sdk.head import dequantize
from edge_sdk.manifest import HEAD_NPZ
from edge_sdk.schema import InputSpec
from edge_sdk.streams import Pool, darkening, rotation

LABELS = [str(digit) for digit in range(10)]
BASE = set(range(8))
"""What the factory knows; 8 and 9 only turn up on devices."""
SPEC = InputSpec(shape=[1, 8, 8], name="image", low=0.0, high=1.0)
CREATED = "2026-01-01T00:00:00Z"


@dataclass(frozen=True)
class Digits:
    """Handwriting in three parts that share no image: for the factory, for life on devices, and for the final score."""

    factory: Pool
    life: Pool
    score: Pool


def load(seed: int) -> Digits:
    """scikit-learn's 1797 digits, 8 x 8, scaled to [0, 1]."""
    bunch = load_digits()
    x = (bunch.images / 16.0).astype(np.float32)[:, None]
    y = bunch.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(y))
    parts = np.split(order, [int(0.45 * len(order)), int(0.8 * len(order))])
    return Digits(*(Pool(x[part], y[part]) for part in parts))


class Net(nn.Module):
    """Three convolutions with batch normalisation, a latent of 64, and a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x))


def train(pool: Pool, *, epochs: int, seed: int) -> Net:
    """Plain supervised training on one thread, so that the same seed gives the same weights."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    net = Net(len(BASE))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    x, y = torch.from_numpy(pool.x), torch.from_numpy(pool.y)
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(64):
            loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def split(pool: Pool) -> Dataset:
    """What the factory trains on, and what it holds out."""
    known = pool.only(BASE)
    cut = int(0.65 * len(known.y))
    return Dataset(known.x[:cut], known.y[:cut], known.x[cut:], known.y[cut:])


def release_1(digits: Digits, target: Path, seed: int) -> tuple[nn.Module, BuildResult]:
    """The first base: digits 0 to 7."""
    data = split(digits.factory)
    net = train(Pool(data.train_x, data.train_y), epochs=15, seed=seed)
    return net, build(net, data, target, release=1)


def release_2(digits: Digits, parent: Path, target: Path, seed: int) -> Manifest:
    """A better head on the same trunk: trained on rotated, dark and noisy copies as well."""
    data = split(digits.factory)
    rng = np.random.default_rng(seed)
    views = [data.train_x, rotation(15)(data.train_x, rng), darkening(0.6)(data.train_x, rng)]
    latents = np.concatenate([encode(parent, view, spec=SPEC) for view in views])
    base = Head.load(parent / HEAD_NPZ)
    latent = verify_checkpoint(parent).latent
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    x = torch.from_numpy(dequantize(latents, latent))
    y = torch.from_numpy(np.tile(data.train_y, len(views)))
    w = torch.from_numpy(base.weights["W0"].copy()).requires_grad_()
    b = torch.from_numpy(base.weights["b0"].copy()).requires_grad_()
    optimizer = torch.optim.Adam([w, b], lr=1e-2, weight_decay=1e-4)
    for _ in range(150):
        loss = nn.functional.cross_entropy(x @ w + b, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head = Head({"W0": w.detach().numpy(), "b0": b.detach().numpy()}, base.labels)
    return repack_checkpoint(parent, target, head=head, data=data, release=2, created=CREATED, seed=seed)


def release_3(net: nn.Module, digits: Digits, parent: Path, target: Path) -> BuildResult:
    """A mistake that really happens: calibrated on images nobody had scaled, so that activations lose their range."""
    data = split(digits.factory)
    wrong = Dataset(data.train_x, data.train_y, data.holdout_x, data.holdout_y, calibration_x=data.train_x * 0.02)
    return build(net, wrong, target, release=3, parent=parent)


def build(net: nn.Module, data: Dataset, target: Path, *, release: int, parent: Path | None = None) -> BuildResult:
    """Export, split, calibrate, quantize, compare, pack."""
    return build_checkpoint(
        net,
        data,
        labels=LABELS[: len(BASE)],
        name="digits",
        release=release,
        target=target,
        created=CREATED,
        input_spec=SPEC,
        parent=parent,
        card=CardText(data="scikit-learn's digits: 8 x 8 grey images of handwriting, 0 to 7"),
    )
