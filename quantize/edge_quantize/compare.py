"""INT8 against float: is it as right, and is it faster?"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np

from edge_quantize.graph import chunks
from edge_sdk.head import Head
from edge_sdk.manifest import HEAD_NPZ, HEAD_ONNX, MANIFEST_NAME, TRUNK_FP32, TRUNK_INT8, parse_manifest
from edge_sdk.runtime import HeadSession, OnnxRuntime, Variant
from edge_sdk.schema import InputSpec
from edge_sdk.stats import wilson_interval
from edge_sdk.types import AnyArray, FloatArray, IndexArray, LatentArray

VARIANTS: tuple[Variant, Variant] = ("int8", "fp32")


class Accuracy(msgspec.Struct, frozen=True):
    """Share of right predictions with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    rows: int

    @classmethod
    def of(cls, correct: AnyArray) -> Accuracy:
        """From bool [N]: whether each prediction was right."""
        hits, rows = int(correct.sum()), len(correct)
        low, high = wilson_interval(hits, rows)
        return cls(hits / rows if rows else float("nan"), low, high, rows)


class VariantResult(msgspec.Struct, frozen=True):
    """One trunk with the shipped head."""

    accuracy: Accuracy
    p50_ms: float
    p95_ms: float
    size_bytes: int


class Comparison(msgspec.Struct, frozen=True):
    """Both trunks with the shipped head, on the same rows and the same machine, one thread, batch 1.

    Attributes:
        agreement: Share of rows on which both predict the same label.
    """

    rows: int
    agreement: float
    int8: VariantResult
    fp32: VariantResult

    def table(self) -> str:
        """Plain text for a terminal."""
        lines = [f"{'':6}{'accuracy':>10}{'95 % interval':>18}{'p50 ms':>9}{'p95 ms':>9}{'size kB':>10}"]
        for name, result in (("INT8", self.int8), ("FP32", self.fp32)):
            accuracy = result.accuracy
            interval = f"{accuracy.low:.3f} to {accuracy.high:.3f}"
            lines.append(
                f"{name:6}{accuracy.value:>10.3f}{interval:>18}{result.p50_ms:>9.3f}{result.p95_ms:>9.3f}"
                f"{result.size_bytes / 1000:>10.1f}"
            )
        speed, size = self.fp32.p50_ms / self.int8.p50_ms, self.int8.size_bytes / self.fp32.size_bytes
        lines.append(f"{self.rows} rows; agreement {self.agreement:.3f}; INT8: {speed:.2f}x speed, {size:.2f}x size")
        return "\n".join(lines)

    def to_json(self) -> bytes:
        """Indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


def encode(folder: Path, x: AnyArray, *, spec: InputSpec, variant: Variant = "int8") -> LatentArray:
    """What a device would log for these inputs: uint8 latents [N, D].

    Args:
        folder: A checkpoint folder.
        x: Inputs [N, ...] in the app's units.
        spec: The checkpoint's input contract.
        variant: Which trunk.
    """
    runtime = OnnxRuntime(folder, variant=variant)
    ready = spec.apply(spec.check_batch(x))
    return np.concatenate([runtime.latents(part) for part in chunks(ready)])


def predict(folder: Path, latents: LatentArray) -> FloatArray:
    """Probabilities [N, C] of the shipped head for latents [N, D]."""
    return HeadSession(folder / HEAD_ONNX, Head.load(folder / HEAD_NPZ)).run(latents)


def compare_variants(folder: Path, x: AnyArray, y: IndexArray, *, repeats: int = 200) -> Comparison:
    """Measure both variants of a checkpoint on labelled rows.

    Args:
        folder: A checkpoint folder that has been verified.
        x: Inputs [N, ...] in the app's units.
        y: int64 [N], positions in the label list.
        repeats: How many single predictions are timed for each variant.
    """
    spec = parse_manifest((folder / MANIFEST_NAME).read_bytes()).input
    guesses = {
        variant: predict(folder, encode(folder, x, spec=spec, variant=variant)).argmax(1) for variant in VARIANTS
    }
    times = _time_both(folder, spec.apply(spec.check_batch(x[:1])), repeats)
    results = {}
    for variant, trunk in zip(VARIANTS, (TRUNK_INT8, TRUNK_FP32), strict=True):
        results[variant] = VariantResult(
            accuracy=Accuracy.of(guesses[variant] == y),
            p50_ms=float(np.quantile(times[variant], 0.5)),
            p95_ms=float(np.quantile(times[variant], 0.95)),
            size_bytes=(folder / trunk).stat().st_size + (folder / HEAD_ONNX).stat().st_size,
        )
    agreement = float((guesses["int8"] == guesses["fp32"]).mean())
    return Comparison(rows=len(y), agreement=agreement, **results)


def _time_both(folder: Path, x: FloatArray, repeats: int) -> dict[Variant, list[float]]:
    """Milliseconds of single predictions. The variants take turns, so that a busy moment strikes both."""
    runtimes = {variant: OnnxRuntime(folder, variant=variant) for variant in VARIANTS}
    head = HeadSession(folder / HEAD_ONNX, Head.load(folder / HEAD_NPZ))
    times: dict[Variant, list[float]] = {variant: [] for variant in VARIANTS}
    warm_up = repeats // 10
    for i in range(warm_up + repeats):
        for variant in VARIANTS:
            start = time.perf_counter()
            head.run(runtimes[variant].latents(x))
            if i >= warm_up:
                times[variant].append((time.perf_counter() - start) * 1000)
    return times
