"""One version, ready to serve: its trunk and its head, as one immutable object that is swapped whole."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edge_sdk.errors import IncompatibleError, ModelError, SelfTestError
from edge_sdk.manifest import HEAD_ONNX, Manifest
from edge_sdk.runtime import HeadSession, ModelRuntime, OnnxRuntime, Variant, self_test
from edge_sdk.slots import Slots, Version
from edge_sdk.types import FloatArray, LatentArray

Trunks = MutableMapping[str, ModelRuntime]
"""Loaded trunks by content: several devices in one process can share them."""


@dataclass(frozen=True)
class Served:
    """What `predict` runs. Immutable, so a call that began on it ends on it."""

    version: Version
    manifest: Manifest
    variant: Variant
    trunk: ModelRuntime
    head: HeadSession

    @property
    def labels(self) -> tuple[str, ...]:
        """What the head can say."""
        return self.head.head.labels

    def run(self, x: FloatArray) -> tuple[LatentArray, FloatArray]:
        """Latents uint8 [N, D] and probabilities float32 [N, C] of checked inputs float32 [N, ...].

        Raises:
            ModelError: The engine failed or put out NaN.
        """
        latents = self.trunk.latents(self.manifest.input.apply(x))
        probabilities = self.head.run(latents)
        if not np.isfinite(probabilities).all():
            raise ModelError(f"release {self.version.release}, head {self.version.head} put out NaN or infinity")
        return latents, probabilities


def load_served(slots: Slots, version: Version, variant: Variant, trunks: Trunks) -> Served:
    """Load a version off the request path, sharing trunks that are loaded already.

    Raises:
        IntegrityError: A file is damaged.
        RuntimeUnavailableError: The engine refuses the model.
    """
    manifest = slots.manifest(version)
    folder = slots.folder(version)
    trunk = trunks.setdefault(f"{manifest.trunk_id}:{variant}", OnnxRuntime(folder, variant=variant))
    return Served(version, manifest, variant, trunk, HeadSession(folder / HEAD_ONNX, slots.head(version)))


def choose_variant(folder: Path, manifest: Manifest, wanted: Literal["auto", "int8", "fp32"]) -> Variant:
    """The trunk to serve: INT8 where it reproduces its stored outputs on this CPU, else FP32.

    Raises:
        IncompatibleError: This SDK does not run such a checkpoint.
        SelfTestError: Neither trunk, or not the one asked for, reproduces its stored outputs here.
    """
    if manifest.adapt != "head" or manifest.task != "classification":
        raise IncompatibleError(f"adapt={manifest.adapt}, task={manifest.task}: this version serves adapt=head, "
                                "task=classification")  # fmt: skip
    candidates: tuple[Variant, ...] = ("int8", "fp32") if wanted == "auto" else (wanted,)
    problems = []
    for variant in candidates:
        try:
            self_test(folder, manifest, OnnxRuntime(folder, variant=variant), variant=variant)
        except (SelfTestError, ModelError) as error:
            problems.append(f"{variant}: {error}")
        else:
            return variant
    raise SelfTestError(f"release {manifest.release} fails its self-test here: {'; '.join(problems)}")
