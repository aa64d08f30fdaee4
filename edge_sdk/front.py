"""What an app's threads reach: predictions go out, truths come in. Memory only, and thread-safe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_sdk.clock import Clock
from edge_sdk.config import DeviceConfig
from edge_sdk.errors import IncompatibleError, InputError, LabelError, ModelError, UnknownLabelError
from edge_sdk.feedback import check_source, from_reward
from edge_sdk.model import Arrays
from edge_sdk.pending import Label, LoggedPrediction, Pending, Taught
from edge_sdk.serving import Served
from edge_sdk.stats import share_of
from edge_sdk.tasks import is_right, store_truth, stored_answer
from edge_sdk.types import NO_VALUES, NOTHING, AnyArray, DoubleArray, FloatArray, Prediction, Truth

MAX_ID_CHARS = 128
MAX_LABEL_CHARS = 128
"""Of a label that the model does not know: names of labels are told in every report."""


class Front:
    """Predicts with the version it is given, and leaves in memory what the next step writes.

    Args:
        pending: Where that is left.
        clock: Source of time.
        config: Of the device.
    """

    def __init__(self, pending: Pending, clock: Clock, config: DeviceConfig) -> None:
        self._pending, self._clock, self._config = pending, clock, config
        self._holdout_share = config.holdout_share

    @property
    def refused(self) -> frozenset[str]:
        """Labels that a person said are none."""
        return self._pending.refused

    @refused.setter
    def refused(self, labels: frozenset[str]) -> None:
        self._pending.refused = labels

    def predict(self, served: Served, x: Any, name: str | None, state: Arrays | None, slice_: str) -> Prediction:
        """One sample; see `EdgeDevice.predict`."""
        started = self._clock.timer()
        if slice_ != "":
            _checked_slice(slice_)
        if name is not None:
            checked_id(name)
        manifest = served.manifest
        try:
            main, more = served.take(x) if manifest.more_inputs else (x, NOTHING)
            checked = manifest.input.check(main)[None]
            if state is not None or manifest.state:
                more = {**more, **served.carry(state)}
        except InputError:
            self._pending.reject()
            raise
        return self._answer(served, checked, more, [self._pending.new_id(name)], started, slice_)[0]

    def predict_batch(self, served: Served, x: Any, slice_: str) -> list[Prediction]:
        """Several samples; see `EdgeDevice.predict_batch`."""
        started = self._clock.timer()
        if slice_ != "":
            _checked_slice(slice_)
        try:
            checked = served.check_batch(x)
        except InputError:
            self._pending.reject()
            raise
        names = [self._pending.new_id(None) for _ in checked]
        return self._answer(served, checked, NOTHING, names, started, slice_)

    def observe(self, served: Served, name: str, truth: Truth, source: str) -> None:
        """Keep a truth; see `EdgeDevice.observe`."""
        stored = self._stored(served, truth)
        self._pending.label(Label(checked_id(name), stored, self._clock.now(), check_source(source)))

    def reward(self, served: Served, name: str, value: float, source: str) -> None:
        """Keep implicit feedback; see `EdgeDevice.reward`."""
        if served.manifest.task != "classification":
            raise LabelError(f"{served.manifest.name} has task={served.manifest.task}: a reward says which label was "
                             "right, and needs a classification")  # fmt: skip
        from_reward("", value)
        now = self._clock.now()
        self._pending.label(Label(checked_id(name), "", now, check_source(source), trusted=False, reward=float(value)))

    def guess(self, served: Served, name: str, truth: Truth, weight: float, source: str) -> None:
        """Keep a label that rules voted for; see `EdgeDevice.apply_rules`."""
        stored = self._stored(served, truth)
        now = self._clock.now()
        self._pending.label(Label(checked_id(name), stored, now, check_source(source), weight, trusted=False))

    def learn(self, served: Served, x: Any, y: Sequence[Truth], source: str, slice_: str) -> None:
        """Keep labelled samples; see `EdgeDevice.learn`."""
        manifest = served.manifest
        if not manifest.learns:
            what = f"adapt={manifest.adapt}, task={manifest.task}"
            raise IncompatibleError(f"release {served.version.release} ({what}) is served, not learned on")
        checked = _as_many(served.check_batch(x), y)
        labels = [self._stored(served, truth) for truth in y]
        latents = served.run(checked).latents
        now, trunk = self._clock.now(), manifest.trunk_id
        origin = (now, trunk, check_source(source), _checked_slice(slice_))
        self._pending.teach([Taught(latent, label, *origin) for latent, label in zip(latents, labels, strict=True)])

    def evaluate(self, served: Served, x: Any, y: Sequence[Truth]) -> float:
        """Share of samples that are right; see `EdgeDevice.evaluate`."""
        scores, truths = self._judged(served, x, y)
        manifest = served.manifest
        said = [
            stored_answer(row, *answer, manifest.task) for row, answer in zip(scores, served.read(scores), strict=True)
        ]
        return float(np.mean([is_right(a, b, manifest) for a, b in zip(said, truths, strict=True)]))

    def mean_error(self, served: Served, x: Any, y: Sequence[Truth]) -> DoubleArray:
        """Mean absolute error of each target; see `EdgeDevice.mean_error`."""
        if served.manifest.task != "regression":
            raise LabelError(f"{served.manifest.name} has task={served.manifest.task}: only numbers can be off by some")
        scores, truths = self._judged(served, x, y)
        result: DoubleArray = np.abs(scores - np.array([json.loads(truth) for truth in truths])).mean(axis=0)
        return result

    def _judged(self, served: Served, x: Any, y: Sequence[Truth]) -> tuple[FloatArray, list[str]]:
        """What the model makes of samples, and their truths in stored form."""
        checked = _as_many(served.check_batch(x), y)
        truths = [store_truth(truth, served.manifest) for truth in y]
        return served.run(checked).scores, truths

    def _answer(
        self, served: Served, checked: AnyArray, more: Arrays, names: list[str], started: float, slice_: str
    ) -> list[Prediction]:
        """Run the model, and keep what was said until the next step."""
        seen = served.thumbnail(checked)  # before the model runs and takes the caches for itself
        try:
            ran = served.run(checked, more)
        except ModelError:
            self._pending.release(names)
            self._pending.fail()
            raise
        scores, manifest, version, labels = ran.scores, served.manifest, served.version, served.labels
        scores.setflags(write=False)
        answers = served.read(scores)
        task, outputs, state = manifest.task, ran.outputs, ran.state
        now, elapsed = self._clock.now(), (self._clock.timer() - started) * 1e3 / len(names)
        logged, predictions = [], []
        share = self._holdout_share
        for i, name in enumerate(names):
            row, (label, present) = scores[i], answers[i]
            holdout = bool(share) and share_of(name, "holdout") < share
            logged.append(
                LoggedPrediction(
                    name,
                    now,
                    seen[i],
                    ran.latents[i],
                    row,
                    label,
                    present,
                    version,
                    manifest,
                    elapsed,
                    slice_,
                    holdout,
                )
            )
            probabilities = row if task in ("classification", "multilabel") else NO_VALUES
            values = row if task == "regression" else NO_VALUES
            found = outputs[i] if outputs else NOTHING
            predictions.append(
                Prediction(
                    name,
                    label,
                    probabilities,
                    labels,
                    version.release,
                    version.head,
                    elapsed,
                    present,
                    values,
                    found,
                    state,
                    holdout,
                )
            )
        if self._pending.most_inputs:  # before the row they belong to: the next flush looks for them
            self._pending.hold(names, checked)
        self._pending.log(logged)
        return predictions

    def _stored(self, served: Served, truth: Truth) -> str:
        """The stored form of a truth, if the model knows its label or may learn it."""
        stored, known, config = store_truth(truth, served.manifest), served.labels, self._config.learn
        if served.manifest.task != "classification" or stored in known:
            return stored
        unknown = f"unknown label {stored!r}; known: {', '.join(known)}"
        if not served.manifest.learns:
            raise UnknownLabelError(f"{unknown} (this release does not learn)")
        if stored in self.refused:
            raise UnknownLabelError(f"{unknown} (`refuse_label` was called for it)")
        if config.new_labels == "refuse":
            raise UnknownLabelError(f"{unknown} (learn.new_labels = refuse)")
        _checked_new_label(stored)
        if len(known) >= config.max_labels:
            raise UnknownLabelError(f"label {stored!r} would be one more than learn.max_labels = {config.max_labels}")
        return stored


def checked_id(name: str) -> str:
    """The id of a prediction itself, if it can be one: a string of a length and content that the store can keep.

    Raises:
        LabelError: It cannot.
    """
    if not isinstance(name, str) or not 0 < len(name) <= MAX_ID_CHARS:
        raise LabelError(f"a prediction id is a string of 1 to {MAX_ID_CHARS} characters, got {name!r:.80}")
    try:
        name.encode()
    except UnicodeEncodeError as error:  # at the next flush it would keep everything else from the disk, too
        raise LabelError(f"a prediction id is UTF-8, got {name!r:.80}") from error
    return name


def _checked_new_label(label: str) -> None:
    if len(label) > MAX_LABEL_CHARS or not label.isprintable():
        raise UnknownLabelError(f"a new label has at most {MAX_LABEL_CHARS} printable characters, got {label!r:.80}")


def _checked_slice(name: str) -> str:
    """The slice itself, if it can be one: at most 64 printable characters; empty: none is named.

    Raises:
        LabelError: It cannot.
    """
    try:
        return check_source(name)
    except LabelError as error:
        raise LabelError(str(error).replace("a source", "a slice")) from error


def _as_many(checked: AnyArray, y: Sequence[Truth]) -> AnyArray:
    if len(y) != len(checked):
        raise LabelError(f"{len(checked)} samples need as many labels, got {len(y)}")
    return checked
