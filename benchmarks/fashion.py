"""Fashion-MNIST, the factory models of the forgetting benchmark, and the latents that a device would log.

The images come from Debian's `dataset-fashion-mnist` (MIT), or from the folder that FASHION_MNIST_DIR names. Without it
scikit-learn's digits, enlarged to 28 x 28, stand in.
"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edge_quantize import Dataset, build_checkpoint, encode
from edge_sdk import streams
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.schema import InputSpec
from edge_sdk.types import AnyArray, FloatArray, IndexArray

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SPEC = InputSpec(shape=[1, 28, 28], name="image", low=0.0, high=1.0)
CREATED = "2026-01-01T00:00:00Z"
LATENT = 128
EPOCHS = 6
CLASSES = 10
DRIFTS = {
    "original": streams.unchanged,
    "darker": streams.darkening(0.35),
    "noise": streams.noise(0.3),
    **{f"rot{degrees}": streams.rotation(degrees) for degrees in (10, 20, 30, 40, 50)},
}


@dataclass(frozen=True)
class Images:
    """Grey images: x uint8 [N, 28, 28]; y int64 [N]."""

    x: AnyArray
    y: IndexArray

    def of(self, rows: IndexArray) -> Images:
        """Some rows."""
        return Images(self.x[rows], self.y[rows])


@dataclass(frozen=True, eq=False)
class Source:
    """Where the images come from, and how many rows of each class serve for what.

    Attributes:
        name: For the tables.
        train: What models are trained, tuned and packed with.
        test: What the tables are about; nothing is chosen by it.
        pool: Training rows of each class that factory and stream draw from.
        validation: The next ones choose hyperparameters.
        factory: Rows of each class that a factory model is trained on.
        stream: Rows of an experience of one class.
    """

    name: str
    train: Images
    test: Images
    pool: int
    validation: int
    factory: int
    stream: int

    def rows(self, label: int) -> tuple[IndexArray, IndexArray, IndexArray]:
        """Training rows of a class: pool, validation, and the others, which the checkpoint's own figures rest on."""
        rows = np.flatnonzero(self.train.y == label)
        pool, validation, rest = np.split(rows, [self.pool, self.pool + self.validation])
        return pool, validation, rest


def load(*, digits: bool = False) -> Source:
    """Fashion-MNIST if it is there, else the digits."""
    folder = Path(os.environ.get("FASHION_MNIST_DIR", DEBIAN))
    if not digits and (folder / "train-images-idx3-ubyte.gz").exists():
        parts = [Images(_idx(folder / f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28),
                        _idx(folder / f"{part}-labels-idx1-ubyte.gz", 8).astype(np.int64))
                 for part in ("train", "t10k")]  # fmt: skip
        return Source("Fashion-MNIST", *parts, pool=5000, validation=500, factory=3000, stream=1000)
    from sklearn.datasets import load_digits  # noqa: PLC0415 - only where it stands in

    bunch = load_digits()
    x = np.pad(np.kron(bunch.images / 16 * 255, np.ones((3, 3))), ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(x))
    y = bunch.target.astype(np.int64)
    train, test = (Images(x[rows], y[rows]) for rows in np.split(order, [1400]))
    return Source("digits (stand-in)", train, test, pool=70, validation=20, factory=40, stream=30)


def _idx(path: Path, header: int) -> AnyArray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


class Net(nn.Module):
    """Three convolutions with batch normalisation, a dense latent of 128, and a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
            nn.Linear(64 * 49, LATENT), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(LATENT, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x))


def scaled(x: AnyArray) -> FloatArray:
    """uint8 [N, 28, 28] to float32 [N, 1, 28, 28] in [0, 1]."""
    return (x[:, None] / np.float32(255)).astype(np.float32)


def drifted(x: AnyArray, drift: str, *, seed: int) -> AnyArray:
    """Images uint8 [N, 28, 28] as they look after one of DRIFTS; again uint8."""
    changed = DRIFTS[drift](scaled(x), np.random.default_rng(seed))[:, 0]
    return np.round(changed * 255).astype(np.uint8)


def train(images: Images, classes: int, *, seed: int, epochs: int = EPOCHS) -> Net:
    """Plain supervised training on one thread, half of the images mirrored: the same seed gives the same weights."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    net = Net(classes)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    x, y = torch.from_numpy(scaled(images.x)), torch.from_numpy(images.y)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - epoch / epochs)
        for rows in torch.randperm(len(y)).split(64):
            batch = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, x[rows].flip(3), x[rows])
            loss = nn.functional.cross_entropy(net(batch), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


# ---- factory models


@dataclass(frozen=True)
class Factory:
    """A trained network, its checkpoint, and the latents of all rows that the benchmark uses.

    Attributes:
        folder: Holds `checkpoint/`, and `net.pt`, the float network's state.
        classes: How many it was trained on.
        train_rows: int64 [classes * factory], rows of `Source.train` that it was trained on.
        stream_rows: int64 [CLASSES, pool - factory], other rows of each class.
        latents: uint8 [N, LATENT] by name: "factory"; "stream", "validation" and "test" with ".<drift>" appended.
    """

    folder: Path
    classes: int
    train_rows: IndexArray
    stream_rows: IndexArray
    latents: dict[str, AnyArray]

    @property
    def checkpoint(self) -> Path:
        """The folder that `build_checkpoint` made."""
        return self.folder / "checkpoint"


def factory(source: Source, cache: Path, *, classes: int, seed: int, drifts: Sequence[str]) -> Factory:
    """Train, pack and encode once; later calls read what is in the cache.

    Args:
        source: Images.
        cache: Folder of all factories; each is named by the content it was made from.
        classes: The first so many are trained on.
        seed: Chooses rows and weights.
        drifts: In which the stream, validation and test rows are encoded.
    """
    settings = (classes, seed, list(drifts), source.pool, source.validation, source.factory)
    code = [inspect.getsource(part) for part in (Net, train, drifted, _make)]
    made_from = [source.train.x.tobytes(), repr(settings), *code]
    digest = hashlib.sha256()
    for part in made_from:
        digest.update(part if isinstance(part, bytes) else part.encode())
    folder = cache / f"factory-{classes}-{seed}-{digest.hexdigest()[:12]}"
    rng = np.random.default_rng([seed, classes])
    picked = [rng.permutation(source.rows(label)[0]) for label in range(CLASSES)]
    train_rows = np.concatenate([rows[: source.factory] for rows in picked[:classes]])
    stream_rows = np.stack([rows[source.factory :] for rows in picked])
    if not (folder / "latents.npz").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _make(source, folder, train_rows, stream_rows, classes=classes, seed=seed, drifts=drifts)
    return Factory(folder, classes, train_rows, stream_rows, load_npz(folder / "latents.npz"))


def _make(
    source: Source,
    folder: Path,
    train_rows: IndexArray,
    stream_rows: IndexArray,
    *,
    classes: int,
    seed: int,
    drifts: Sequence[str],
) -> None:
    images = source.train.of(train_rows)
    net = train(images, classes, seed=seed)
    torch.save(net.state_dict(), folder / "net.pt")
    held = source.train.of(np.concatenate([source.rows(label)[2] for label in range(classes)]))
    data = Dataset(scaled(images.x), images.y, scaled(held.x), held.y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few calibration rows of the digits; what torch's exporter has to say
        build_checkpoint(net, data, labels=[str(label) for label in range(classes)], name="fashion", release=1,
                         target=folder / "checkpoint", created=CREATED, input_spec=SPEC, seed=seed,
                         measure_memory=False)  # fmt: skip
    validation = np.concatenate([source.rows(label)[1] for label in range(CLASSES)])
    parts = {"stream": source.train.x[stream_rows.ravel()], "validation": source.train.x[validation],
             "test": source.test.x}  # fmt: skip
    latents = {"factory": encode(folder / "checkpoint", scaled(images.x), spec=SPEC)}
    for drift in drifts:
        for part, x in parts.items():
            changed = scaled(drifted(x, drift, seed=seed))
            latents[f"{part}.{drift}"] = encode(folder / "checkpoint", changed, spec=SPEC)
    (folder / "latents.npz").write_bytes(npz_bytes(latents))
