"""From a torch network and its data to a checkpoint, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_quantize.calibrate import Calibration, calibration_rows
from edge_quantize.card import CardText
from edge_quantize.compare import Comparison, compare_variants
from edge_quantize.data import Dataset
from edge_quantize.export import check_parity, export_onnx
from edge_quantize.graph import split
from edge_quantize.pack import Memory, pack_checkpoint, refuse_existing
from edge_quantize.quantize import quantize_trunk
from edge_sdk.errors import ConfigError
from edge_sdk.head import Head
from edge_sdk.manifest import Manifest
from edge_sdk.schema import InputSpec

if TYPE_CHECKING:
    from edge_quantize.export import Module

_PARITY_ROWS = 64


@dataclass(frozen=True)
class BuildResult:
    """The checkpoint's manifest, and INT8 against FP32 on this machine."""

    manifest: Manifest
    comparison: Comparison


def build_checkpoint(
    model: Module,
    data: Dataset,
    *,
    labels: Sequence[str],
    name: str,
    release: int,
    target: Path,
    created: str,
    input_spec: InputSpec,
    parent: Path | None = None,
    cut: str | None = None,
    seed: int = 0,
    calibration: Calibration | None = None,
    memory: Memory | None = None,
    card: CardText | None = None,
) -> BuildResult:
    """Export, split, calibrate, quantize, pack and compare.

    Args:
        model: A trained network: preprocessed float32 [N, ...] to logits [N, C].
        data: Rows in the app's units; without calibration rows, some training rows serve.
        labels: One for each logit, in order.
        name: What the model is called.
        release: Number of the release, above the parent's.
        target: The folder to make; must not exist.
        created: When, as ISO 8601 text.
        input_spec: The input contract with its preprocessing.
        parent: Folder of the checkpoint this one replaces.
        cut: Where to split, by tensor name; None chooses.
        seed: For the samples drawn.
        calibration: How activation ranges are found.
        memory: How much factory memory ships.
        card: What only a person can say about the model.

    Raises:
        ConfigError: A setting does not fit.
        DataError: The rows cannot be used.
        ExportError: The network cannot be exported, split or quantized.
        ParityError: A step changed what it computes.
        SelfTestError: The packed model does not reproduce its own outputs.

    Warns:
        CalibrationWarning: Few calibration rows.
    """
    refuse_existing(target)  # before minutes of work, and again while packing
    calibration = calibration or Calibration()
    checked = data.checked(input_spec, labels)
    source = checked.train_x if checked.calibration_x is None else checked.calibration_x
    rows = calibration_rows(source, max_rows=calibration.max_rows, rng=np.random.default_rng(seed))

    example = input_spec.apply(checked.holdout_x[:_PARITY_ROWS])
    parts = split(export_onnx(model, example, input_name=input_spec.name), cut=cut)
    if parts.outputs != len(labels):
        raise ConfigError(f"the network has {parts.outputs} outputs, there are {len(labels)} labels")
    check_parity(model, parts, example)
    trunks = quantize_trunk(parts.trunk, input_spec.apply(rows), calibration)
    manifest = pack_checkpoint(
        target,
        trunks=trunks,
        head=Head(parts.weights, tuple(labels)),
        data=checked,
        input_spec=input_spec,
        name=name,
        release=release,
        created=created,
        parent=parent,
        seed=seed,
        memory=memory,
        card=card,
    )
    return BuildResult(manifest, compare_variants(target, checked.holdout_x, checked.holdout_y))
