"""The factory: real handwriting, a small network, and the three releases of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from edge_quantize import Dataset, build_checkpoint
from sklearn.datasets import load_digits
from torch import nn

from edge_sdk.schema import InputSpec
from edge_sdk.streams import Pool

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
