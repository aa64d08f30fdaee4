"""Serve one variant in a process of its own and print how much memory that takes. Started by `measure.footprint`.

Loads what a device loads to predict: the SDK's runtime, numpy and ONNX Runtime.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime  # noqa: F401 - counted among the imports

from edge_sdk.head import Head
from edge_sdk.manifest import HEAD_NPZ, HEAD_ONNX, MANIFEST_NAME, parse_manifest
from edge_sdk.runtime import HeadSession, OnnxRuntime, WholeModel
from edge_sdk.types import AnyArray, Variant

CALLS = 20


def main(place: str, variant: str, inputs: str) -> None:
    """Load, predict, report.

    Args:
        place: A checkpoint folder, or an ONNX file.
        variant: Which of the folder's two.
        inputs: .npz with one row for each input of the network, named "feed_" and the input's name.
    """
    imports = _status_mb("VmRSS")
    folder = Path(place)
    with np.load(inputs, allow_pickle=False) as file:
        feeds = {name.removeprefix("feed_"): file[name] for name in file.files}
    serve = _opened(folder, cast("Variant", variant))
    serve(feeds)
    loaded = _status_mb("VmRSS")
    for _ in range(CALLS):
        serve(feeds)
    # the kernel's own mark: getrusage would give that of the process this one was forked from
    figures = {"imports_mb": imports, "loaded_mb": loaded, "peak_mb": _status_mb("VmHWM")}
    sys.stdout.write(json.dumps(figures))


def _opened(place: Path, variant: Variant) -> Callable[[dict[str, AnyArray]], object]:
    """What a device runs for each sample."""
    if place.is_file():
        return WholeModel(place).run
    manifest = parse_manifest((place / MANIFEST_NAME).read_bytes())
    if manifest.adapt == "none":
        return WholeModel(place / manifest.model_files[variant]).run
    trunk = OnnxRuntime(place, variant=variant)
    head = HeadSession(place / HEAD_ONNX, Head.load(place / HEAD_NPZ))
    return lambda feeds: head.run(trunk.latents(feeds[manifest.input.name]))


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main(*sys.argv[1:])
