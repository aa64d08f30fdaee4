"""One version, ready to serve: an immutable object that is swapped whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from edge_sdk.drift.features import Thumbnail
from edge_sdk.errors import InputError, ModelError, ShapeError
from edge_sdk.manifest import Manifest
from edge_sdk.model import Arrays, Ran, ServedModel, Trunks, checked_state, load_model
from edge_sdk.slots import Slots, Version
from edge_sdk.tasks import present_labels
from edge_sdk.types import NOTHING, AnyArray, FloatArray, Variant


@dataclass(frozen=True)
class Served:
    """What `predict` runs. Immutable, so a call that began on it ends on it."""

    version: Version
    manifest: Manifest
    variant: Variant
    model: ServedModel
    labels: tuple[str, ...]
    """What it can say."""

    def run(self, x: AnyArray, more: Arrays = NOTHING) -> Ran:
        """What the model says about checked inputs [N, ...], in the app's units.

        Raises:
            ModelError: The engine failed or put out NaN.
        """
        ran = self.model.run(self.manifest.input.apply(x), more)
        # the sum of finite scores is finite, but for absurd ones
        if not math.isfinite(_total(ran.scores)) and not np.isfinite(ran.scores).all():
            raise ModelError(f"release {self.version.release}, head {self.version.head} put out NaN or infinity")
        return ran

    def check_batch(self, x: Any) -> AnyArray:
        """Checked samples [N, ...] of a model that takes nothing else.

        Raises:
            InputError: They are not as the manifest says, or the model takes more than one input or a state.
        """
        if self.manifest.more_inputs or self.manifest.state:
            raise InputError(f"{self.manifest.name} has several inputs or a state: predict one sample at a time")
        return self.manifest.input.check_batch(x)

    def read(self, scores: FloatArray) -> list[tuple[str, tuple[str, ...]]]:
        """What the scores [N, C] of each sample say: the most probable label, and all that are present."""
        task, labels = self.manifest.task, self.labels
        if task == "classification" and len(scores) == 1:
            row = scores[0].tolist()
            return [self._single[row.index(max(row))]]
        if task == "classification":
            return [self._single[i] for i in scores.argmax(axis=1).tolist()]
        if task == "multilabel":
            thresholds = self.manifest.thresholds
            best = scores.argmax(axis=1).tolist()
            return [(labels[i], present_labels(row, labels, thresholds)) for i, row in zip(best, scores, strict=True)]
        return [("", ())] * len(scores)

    @cached_property
    def _single(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(label, (label,)) for label in self.labels]

    @cached_property
    def thumbnail(self) -> Thumbnail:
        """What the monitors keep of an input."""
        return Thumbnail(self.manifest.input.shape)

    def take(self, x: Any) -> tuple[Any, Arrays]:
        """The main input of one sample, and the others: a model with several takes a mapping by their names.

        Raises:
            InputError: An input is missing, unknown, or not as the manifest says.
        """
        specs = self.manifest.more_inputs
        if not specs:
            return x, NOTHING
        names = [self.manifest.input.name, *(spec.name for spec in specs)]
        if not isinstance(x, Mapping) or set(x) != set(names):
            raise ShapeError(f"this model takes the inputs {', '.join(names)}, by name")
        return x[names[0]], {spec.name: spec.apply(spec.check(x[spec.name])[None]) for spec in specs}

    def carry(self, state: Arrays | None) -> Arrays:
        """The state to start from: the one given, or zeros.

        Raises:
            InputError: It is not a state of this model.
        """
        return checked_state(self.manifest.state, state)


def _total(scores: FloatArray) -> float:
    """The sum. After a large model has run, numpy's reductions are out of the caches: 20 microseconds the first one."""
    return sum(scores[0].tolist()) if len(scores) == 1 else float(np.add.reduce(scores, axis=None))


def load_served(slots: Slots, version: Version, variant: Variant, trunks: Trunks) -> Served:
    """Load a version off the request path.

    Raises:
        IntegrityError: A file is damaged.
        RuntimeUnavailableError: The engine refuses the model.
    """
    manifest = slots.manifest(version)
    head = None if manifest.adapt == "none" else slots.head(version)
    model = load_model(slots.folder(version), manifest, variant, head, trunks)
    return Served(version, manifest, variant, model, head.labels if head else tuple(manifest.labels))
