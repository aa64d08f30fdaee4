"""A release with another trunk in shadow: inputs pass both trunks, and what was learned is carried over to the new one.

Latents of one trunk mean nothing to another. While the old release serves, some inputs of each flush pass the new
trunk, too; a map fitted to these pairs translates the labelled rows, and the device's own learner trains a head from
the new base's on them. Rows whose input was seen by the new trunk, or kept on disk, are not translated but exact.

All of it is in the database, so that a restart goes on, but for the training, which begins again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from edge_sdk.config import DeviceConfig
from edge_sdk.errors import EdgeError, InputError, IntegrityError
from edge_sdk.experience import Chosen, Experience, fair_judges
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.head import Head
from edge_sdk.learn.base import LearnResult
from edge_sdk.learn.executor import LearnExecutor
from edge_sdk.manifest import HEAD_NPZ, Manifest
from edge_sdk.messages import ShadowTally
from edge_sdk.model import SplitModel, Trunks, load_model, trunk_key
from edge_sdk.pending import LoggedPrediction
from edge_sdk.rebase import Right, Settled, choose_version
from edge_sdk.runtime import ModelRuntime
from edge_sdk.slots import Slots, Version
from edge_sdk.store import NewSample, Store, stack
from edge_sdk.training import Training
from edge_sdk.translate import LatentMap, fit_map
from edge_sdk.trial import head_outcomes
from edge_sdk.types import AnyArray, BoolArray, LatentArray, Variant

logger = logging.getLogger(__name__)

A_FLUSH = 16
"""Inputs of one flush that also pass the new trunk: bounds what the step takes, and the inputs held in memory."""
_MIN_PAIRS = 20
_AT_ONCE = 32
_LONGEST_STEP_S = 3_600.0
_NOTHING = ShadowTally.new(0)


class Candidate(msgspec.Struct):
    """A release in shadow; persisted."""

    version: Version
    offered: bool
    """By the coordinator, which may think better of it; else it came with the app."""
    waited_s: float = 0.0
    """By small steps: a clock that is set right while it waits makes it neither short nor long."""
    looked_at: float | None = None
    since: float = 0.0
    """When it came into the shadow, by the clock of then; 0: it has had no turn yet."""
    beside_s: float = 0.0
    """Above 0: the coordinator asked to run it beside the one in use for so long, and decides what becomes of it."""
    tally: ShadowTally = _NOTHING
    """How it does there."""
    told: ShadowTally = _NOTHING
    """What was told of that last."""

    def wait(self, now: float) -> None:
        """Note that it waits still."""
        if self.looked_at is not None:
            self.waited_s += min(max(now - self.looked_at, 0.0), _LONGEST_STEP_S)
        self.looked_at = now
        self.since = self.since or now


class Carried(NamedTuple):
    """What became of the learned head."""

    settled: Settled
    head: Head | None = None
    """To serve on the new base."""


class Shadow:
    """Owns one release in shadow.

    Args:
        version: The release; it is in the idle slot.
        manifest: Its manifest.
        variant: Which of its trunks.
        trunks: What is loaded already.
        folder: Of the learning job.
        executor: Runs it.
        store: The device's database.
        slots: The versions on disk.
        config: Of the device.

    Raises:
        IntegrityError, RuntimeUnavailableError: The new release cannot be loaded.
    """

    def __init__(
        self,
        version: Version,
        manifest: Manifest,
        variant: Variant,
        trunks: Trunks,
        folder: Path,
        *,
        executor: LearnExecutor,
        store: Store,
        slots: Slots,
        config: DeviceConfig,
    ) -> None:
        self.version, self.manifest = version, manifest
        self._store, self._slots, self._config = store, slots, config
        self._folder = slots.folder(version)
        self._shipped = Head.load(self._folder / HEAD_NPZ)
        model = load_model(self._folder, manifest, variant, self._shipped, trunks)
        assert isinstance(model, SplitModel)  # only such a release is shadowed
        self.trunk: ModelRuntime = model.trunk
        self.key = trunk_key(manifest, variant)
        self._training = Training(folder, executor, config.learn)
        self._experience: Experience | None = None
        self._chosen = Chosen()
        self._map: LatentMap | None = None
        self._newest = 0
        self.rows = store.count_pairs()

    @property
    def enough(self) -> bool:
        """Whether no further inputs are wanted."""
        return self.rows >= self._config.update.shadow_rows

    @property
    def training(self) -> bool:
        """Whether a head is being trained: nothing else may be learned meanwhile."""
        return self._experience is not None

    # ---- pairs

    def see(self, rows: Sequence[LoggedPrediction], inputs: Mapping[str, AnyArray], trunk: str) -> None:
        """Let inputs that the trunk in use has just seen pass the new one.

        Args:
            rows: Predictions of this flush.
            inputs: Of the latest of them, by id.
            trunk: In use.

        Raises:
            ModelError: The new trunk fails.
        """
        if self.enough:
            return
        known = [row for row in rows if row.id in inputs and row.manifest.trunk_id == trunk and len(row.latent)]
        known = known[-A_FLUSH:]
        latents = self._encode([inputs[row.id] for row in known])
        pairs = [
            (row.id, row.latent.tobytes(), latent.tobytes())
            for row, latent in zip(known, latents, strict=True)
            if latent is not None
        ]
        if pairs:
            with self._store.transaction():
                self._store.add_pairs(pairs)
            self.rows = self._store.count_pairs()

    def _encode(self, inputs: Sequence[AnyArray]) -> list[LatentArray | None]:
        """What the new trunk makes of inputs; None for one that it does not take."""
        spec, found = self.manifest.input, list[LatentArray | None]([None] * len(inputs))
        checked: list[tuple[int, AnyArray]] = []
        for place, x in enumerate(inputs):
            try:
                checked.append((place, spec.check(x)))
            except InputError as error:
                logger.debug("an input that the release in shadow does not take: %s", error)
        for start in range(0, len(checked), _AT_ONCE):
            part = checked[start : start + _AT_ONCE]
            latents = self.trunk.latents(spec.apply(np.stack([x for _, x in part])))
            for (place, _), latent in zip(part, latents, strict=True):
                found[place] = latent
        return found

    # ---- rows of the new trunk

    def begin(self, trunk: str, old: Manifest, *, may_grow: Callable[[str], bool]) -> str:
        """Carry the labelled rows over and train a head on them.

        Args:
            trunk: In use.
            old: Manifest of the release in use.
            may_grow: Whether a new label may be learned.

        Returns:
            Why nothing could be carried over; "": a head is being trained.
        """
        pairs = self._store.pairs()
        width = old.latent.dim
        pairs = [pair for pair in pairs if len(pair[1]) == width]
        exact = {name: new for name, _, new in pairs}
        self._map = None
        if len(pairs) >= _MIN_PAIRS:
            before = stack([pair[1] for pair in pairs], width)
            after = stack([pair[2] for pair in pairs], self.manifest.latent.dim)
            self._map = fit_map(before, after, old_spec=old.latent, new_spec=self.manifest.latent)
        samples = self._store.labelled(trunk)
        newest = self._store.newest_key(trunk)
        carried = self._carry(samples, exact)
        with self._store.transaction():
            self._store.delete_trunk(self.manifest.trunk_id)
            self._store.add_samples(carried)
        self._newest = newest
        if not any(sample.role == "fresh" for sample in carried):
            return f"{len(pairs)} inputs passed both trunks, and {len(samples)} labelled rows are kept"
        seed = (self._config.seed, self.version.release)
        experience = Experience(self._store, self._config, self.manifest, self._folder, seed=seed)
        job, self._chosen = experience.job(
            self._shipped, experience.importance, may_grow=may_grow, since=0.0, attempt=self.version.release
        )
        if not len(job.fresh):
            return "no labelled row may be learned from"
        self._experience = experience
        self._training.start(job)
        return ""

    def _carry(self, samples: Sequence[NewSample], exact: Mapping[str, bytes]) -> list[NewSample]:
        """Labelled rows as the new trunk sees them; those of which nothing is known are left out."""
        found: dict[int, bytes] = {i: exact[s.id] for i, s in enumerate(samples) if s.id in exact}
        self._encode_kept(samples, found)
        rest = [i for i in range(len(samples)) if i not in found]
        translated = frozenset(rest if self._map is not None else ())
        if translated and self._map is not None:
            latents = self._map(stack([samples[i].latent for i in rest], len(samples[rest[0]].latent)))
            found.update({i: latent.tobytes() for i, latent in zip(rest, latents, strict=True)})
        return [
            samples[i]._replace(
                latent=found[i],
                trunk=self.manifest.trunk_id,
                role="judge" if samples[i].role == "judge" else "fresh",
                translated=i in translated,
            )
            for i in sorted(found)
        ]

    def _encode_kept(self, samples: Sequence[NewSample], found: dict[int, bytes]) -> None:
        """Add the rows whose input was kept on disk; a few at a time, as inputs may be large."""
        if not self._config.update.keep_inputs:
            return
        wanted = [i for i, sample in enumerate(samples) if sample.id and i not in found]
        for start in range(0, len(wanted), _AT_ONCE):
            part: list[tuple[int, AnyArray]] = []
            for i in wanted[start : start + _AT_ONCE]:
                try:
                    if (data := self._store.input_of(samples[i].id)) is not None:
                        part.append((i, load_npz(data)["x"]))
                except (IntegrityError, KeyError) as error:
                    logger.warning("an input that was kept is of no use: %s", error)
            for (i, _), latent in zip(part, self._encode([x for _, x in part]), strict=True):
                if latent is not None:
                    found[i] = latent.tobytes()

    # ---- the head

    def poll(self) -> LearnResult | None:
        """What came of the training, once it has ended."""
        return self._training.poll()

    def judge(self, current: Version, old: Manifest, result: LearnResult) -> Carried | None:
        """Which head is to serve, or whether the old release stays.

        Returns:
            None if samples that the head was trained on have been forgotten meanwhile: it has to be trained again.
        """
        assert self._experience is not None
        waiting = {sample.key for sample in self._experience.fresh()}
        if not waiting.issuperset((*self._chosen.fresh, *self._chosen.older)):
            self.cancel()
            return None
        if result.error:
            return Carried(Settled("shipped", f"dropped: no head could be trained: {result.error}"))
        try:
            head = self._training.challenger()
        except (EdgeError, OSError) as error:
            return Carried(Settled("shipped", f"dropped: the head trained here is lost: {error}"))
        settled = choose_version(self._right(head, current, old), self._config)
        told = self._told()
        return Carried(settled._replace(reason=f"{settled.reason}; {told}"), head)

    def _right(self, head: Head, current: Version, old: Manifest) -> Right:
        """How the three ways do."""
        assert self._experience is not None
        new, trunk = self.manifest, self.manifest.trunk_id
        judges = fair_judges(self._store.samples("judge", trunk))
        latents, truths = stack([s.latent for s in judges], new.latent.dim), [s.label for s in judges]
        shipped, personal = (
            head_outcomes(one, latents, truths, new).right if judges else np.zeros(0, np.bool_)
            for one in (self._shipped, head)
        )
        exact: BoolArray = np.zeros(len(judges), np.bool_)
        before = np.zeros(0, np.bool_)
        if judges and not judges[0].translated:
            known = {s.id: s.latent for s in self._store.labelled(old.trunk_id) if s.role == "judge" and s.id}
            names = self._store.ids_of([s.key for s in judges])
            exact = np.array([names[s.key] in known for s in judges], dtype=np.bool_)
            seen = [(known[names[s.key]], s.label) for s in judges if names[s.key] in known]
            if seen:
                rows = stack([latent for latent, _ in seen], old.latent.dim)
                labels = [label for _, label in seen]
                before = head_outcomes(self._slots.head(current), rows, labels, old).right
        factory = self._experience.factory
        return Right(before, exact, shipped, personal, factory.right(self._shipped), factory.right(head))

    def _told(self) -> str:
        rows = self._store.labelled(self.manifest.trunk_id)
        translated = sum(sample.translated for sample in rows)
        error = f", {self._map.error:.3f} of the variance lost" if self._map is not None else ""
        return f"{translated} rows translated by {self.rows} inputs{error}, {len(rows) - translated} encoded anew"

    def settle(self, trunk: str, *, personal: bool) -> None:
        """Leave the rows as the new release finds them; inside a transaction.

        Args:
            trunk: In use until now.
            personal: Whether the head trained here serves. If not, what was translated may be to blame, and goes.
        """
        late = self._store.labelled(trunk, after=self._newest)
        exact = {name: new for name, _, new in self._store.pairs()}
        if self._experience is not None and personal:
            self._experience.consolidate(self._chosen, fold=True)
        if late:
            self._store.add_samples(self._carry(late, exact))
        self._carry_waiting(trunk, exact, self._map if personal else None)
        if not personal:
            self._store.delete_trunk(self.manifest.trunk_id, translated=True)

    def _carry_waiting(self, trunk: str, exact: Mapping[str, bytes], latent_map: LatentMap | None) -> None:
        """Let predictions that wait for their label be learned from by the new trunk, too."""
        new = self.manifest.trunk_id
        for part in self._store.waiting_latents(trunk):
            self._store.move_rows([(name, exact[name]) for name, _ in part if name in exact], new, translated=False)
            rest = [(name, latent) for name, latent in part if name not in exact and latent]
            if latent_map is not None and rest:
                latents = latent_map(stack([latent for _, latent in rest], len(rest[0][1])))
                moved = [(name, latent.tobytes()) for (name, _), latent in zip(rest, latents, strict=True)]
                self._store.move_rows(moved, new, translated=True)

    def cancel(self) -> None:
        """Stop the training; it can begin again."""
        if self._experience is not None:
            self._training.cancel()
            self._training.discard()
            self._experience = None


def as_stored(x: AnyArray) -> bytes:
    """An input as it is kept on disk."""
    return npz_bytes({"x": x})
