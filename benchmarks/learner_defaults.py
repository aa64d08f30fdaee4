"""How the learner's defaults were chosen: accuracy on drifted and on original data over a small grid.

Digits 0 to 7 and the demo's network. Half of the devices' pool gives the fresh samples, the other half scores; the
demo's score set is not touched. Mean over seven drifts. Run from the root:

    PYTHONPATH=examples python benchmarks/learner_defaults.py
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path

import numpy as np

from demo import factory
from edge_sdk import Head, __version__, streams, verify_checkpoint
from edge_sdk.adapt import FactoryMemory
from edge_sdk.config import LearnConfig
from edge_sdk.files import load_npz
from edge_sdk.head import dequantize
from edge_sdk.learn.base import LearnJob
from edge_sdk.learn.ewc import grown_like
from edge_sdk.learn.numpy_learner import train_head
from edge_sdk.manifest import FISHER_NPZ, HEAD_NPZ
from edge_sdk.runtime import OnnxRuntime
from edge_sdk.streams import DriftingStream, Pool

DRIFTS = [
    (streams.rotation(40), frozenset()),
    (streams.rotation(25), frozenset()),
    (streams.darkening(0.35), frozenset()),
    (streams.noise(0.4), frozenset()),
    (streams.noise(0.25), frozenset()),
    (streams.unchanged, frozenset({8})),
    (streams.unchanged, frozenset({9})),
]
GRID = [
    (rate, passes, strength) for rate in (1.0, 2.0, 4.0) for passes in (12, 24, 40) for strength in (0.0, 10.0, 30.0)
]
RESULT = Path(__file__).with_suffix(".json")


class Bench:
    """A checkpoint and the two halves of the pool."""

    def __init__(self, folder: Path) -> None:
        digits = factory.load(seed=0)
        factory.release_1(digits, folder, seed=0)
        self.manifest = verify_checkpoint(folder)
        self.trunk = OnnxRuntime(folder)
        self.head = Head.load(folder / HEAD_NPZ)
        self.fisher = load_npz(folder / FISHER_NPZ)
        self.memory = FactoryMemory(folder, self.manifest)
        half = len(digits.life.y) // 2
        self.fresh = Pool(digits.life.x[:half], digits.life.y[:half])
        self.validation = Pool(digits.life.x[half:], digits.life.y[half:])

    def score(self, head: Head, x: np.ndarray, y: np.ndarray) -> float:
        """Accuracy of a head."""
        predicted = head.predict(dequantize(self.trunk.latents(x), self.manifest.latent))
        return float(np.mean([head.labels[p] == str(label) for p, label in zip(predicted, y, strict=True)]))

    def run(self, rows: int, config: LearnConfig) -> tuple[float, float]:
        """Mean accuracy over the drifts, on drifted and on original validation data."""
        drifted, original = [], []
        for transform, new_labels in DRIFTS:
            rng = np.random.default_rng(5)
            stream = DriftingStream(
                self.fresh, rng=rng, base_labels=factory.BASE, drift_at=0, transform=transform, new_labels=new_labels
            )
            x, y = stream.draw(rows, 1)
            labels = [*self.head.labels, *map(str, new_labels)]
            champion = self.head.grown(labels)
            challenger, _ = train_head(
                LearnJob(
                    champion=champion,
                    anchor=grown_like(self.head.weights, champion.weights),
                    fisher=grown_like(self.fisher, champion.weights),
                    fresh_latents=self.trunk.latents(x),
                    fresh_labels=np.array([labels.index(str(label)) for label in y]),
                    replay_latents=self.memory.replay_latents,
                    replay_labels=np.array([labels.index(label) for label in self.memory.replay_labels]),
                    latent=self.manifest.latent,
                    config=config,
                    seed=0,
                )
            )
            seen = self.validation.only(factory.BASE | new_labels)
            base = self.validation.only(factory.BASE)
            drifted.append(self.score(challenger, transform(seen.x, np.random.default_rng(0)), seen.y))
            original.append(self.score(challenger, base.x, base.y))
        return float(np.mean(drifted)), float(np.mean(original))


def main() -> None:
    """Print the table and write it as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "checkpoint")
        table = []
        print("rows  rate  passes  lambda  drifted  original")
        for rows in (60, 150):
            for rate, passes, strength in GRID:
                config = LearnConfig(learning_rate=rate, passes=passes, ewc_lambda=strength)
                drifted, original = bench.run(rows, config)
                print(f"{rows:4}  {rate:4g}  {passes:6}  {strength:6g}  {drifted:7.3f}  {original:8.3f}")
                table.append([rows, rate, passes, strength, round(drifted, 4), round(original, 4)])
    facts = {"version": __version__, "machine": platform.machine(), "python": platform.python_version(), "seed": 0}
    columns = ["rows", "rate", "passes", "lambda", "drifted", "original"]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in table)
    RESULT.write_text(
        f'{{"facts": {json.dumps(facts)},\n "columns": {json.dumps(columns)},\n "table": [\n{lines}\n]}}\n'
    )


if __name__ == "__main__":
    main()
