"""The labelled rows of one trunk: which are learned from, which are replayed, which judge, and what they add up to.

The database holds every row; here is the order in which they are used. Roles are given once: a judge row never trains.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from edge_sdk.config import DeviceConfig
from edge_sdk.errors import IntegrityError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.head import Head, dequantize
from edge_sdk.learn.base import LearnJob, Rows, needs_moments
from edge_sdk.learn.ewc import Importance, grown_like
from edge_sdk.learn.moments import Moments, fresh_mass
from edge_sdk.manifest import FISHER_NPZ, HEAD_NPZ, MEMORY_NPZ, MOMENTS_NPZ, Manifest
from edge_sdk.replay import BUFFERS, ReplayBuffer, capacity_for
from edge_sdk.store import Sample, Store, stack
from edge_sdk.tasks import as_scores, as_targets, rows_right, standardise
from edge_sdk.types import AnyArray, BoolArray, DoubleArray, LatentArray

logger = logging.getLogger(__name__)

MIN_LABEL_ROWS = 10
"""A label that the model does not know needs so many samples before the head grows by it: one typing error is none."""
_JUDGE_EVERY = 3
"""Every third row of the factory memory judges; the others are replayed."""
_MIN_JUDGES = 200
_MIN_EXACT = 20
"""With fewer judge rows that the trunk itself encoded, those that were translated to it judge."""
_MAX_STRATA = 64
_FORM_BYTES = 16


def meaning_of_outputs(manifest: Manifest) -> tuple[Any, ...]:
    """Equal for two releases on one trunk whose heads, and sums over rows, can stand for each other's.

    The labels of a classification go by their names; other outputs go by their place, and values by their unit.
    """
    if manifest.task == "classification":
        return (manifest.task,)
    return (manifest.task, *manifest.labels, *((target.mean, target.std) for target in manifest.targets))


class FactoryMemory:
    """The base's latents that come with a checkpoint, split once into replay rows and judge rows.

    Attributes:
        latents: uint8 [N, D].
        truths: As `memory.npz` has them: int64 [N], 0/1 [N, C], or values in the targets' units [N, T].
        judging: bool [N].
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        arrays = load_npz(folder / MEMORY_NPZ)
        self._manifest = manifest
        self.latents, self.truths = arrays["latents"], arrays["labels"]
        count = len(self.latents)
        self.judging: BoolArray = np.zeros(count, dtype=np.bool_)
        groups = self.truths if manifest.task == "classification" else np.zeros(count, np.int64)
        for label in np.unique(groups):
            self.judging[np.flatnonzero(groups == label)[_JUDGE_EVERY - 1 :: _JUDGE_EVERY]] = True

    @property
    def targets(self) -> AnyArray:
        """As a learner reads them."""
        match self._manifest.task:
            case "multilabel":
                return self.truths.astype(np.float32)
            case "regression":
                return standardise(self.truths.reshape(len(self.truths), -1), self._manifest)
            case _:
                return self.truths.astype(np.int64)

    def replayed(self, most: int) -> Rows:
        """The rows to replay: at most so many, at even distances within each label."""
        rows = np.flatnonzero(~self.judging)
        if len(rows) > most:
            if self._manifest.task == "classification":  # one row of each label after the other
                order = np.argsort(self.truths[rows], kind="stable")
                place = np.concatenate([np.arange(n) for n in np.bincount(self.truths[rows]) if n])
                rows = np.sort(rows[order][np.argsort(place, kind="stable")][:most])
            else:
                rows = rows[np.arange(most) * len(rows) // max(1, most)]
        return Rows(self.latents[rows], self.targets[rows], np.ones(len(rows), np.float32))

    def right(self, head: Head) -> BoolArray:
        """Whether a head is right on each judge row; bool [M]."""
        latents, truths = self.latents[self.judging], self.truths[self.judging]
        if not len(latents):
            return np.zeros(0, dtype=np.bool_)
        manifest = self._manifest
        return rows_right(as_scores(head.logits(dequantize(latents, manifest.latent)), manifest), truths, manifest)


@dataclass(frozen=True)
class JudgeRows:
    """Rows that no challenger was or will be trained on, oldest first.

    Attributes:
        latents: uint8 [N, D].
        truths: In stored form.
        slices: The app's name for the part of the world each comes from.
        weights: float64 [N] in (0, 1], how many rows each stands for, by the most that one may stand for.
    """

    latents: LatentArray
    truths: list[str]
    slices: list[str]
    weights: DoubleArray


def fair_judges(samples: list[Sample]) -> list[Sample]:
    """The rows that judge: those whose latent was translated only until there are enough others, and never both."""
    exact = [sample for sample in samples if not sample.translated]
    if len(exact) >= min(_MIN_EXACT, len(samples) - len(exact)):
        return exact
    return [sample for sample in samples if sample.translated]


class Chosen(msgspec.Struct):
    """What a learning job was made of; persisted while its challenger is on trial."""

    fresh: list[int] = []
    """Keys of the fresh samples, in the job's order."""
    older: list[int] = []
    """Keys of samples from before the change: replayed, and waiting to move into the buffer."""
    mass: list[float] = []
    """What each fresh sample adds to the moments."""
    wrong: list[int] = []
    """Positions of fresh samples that the learner found to be wrong."""

    @property
    def learned(self) -> set[int]:
        """Keys of the fresh samples without the wrong ones."""
        return {*self.fresh} - {self.fresh[position] for position in self.wrong}


class Learnable(NamedTuple):
    """What a job would learn from."""

    rows: int
    """Fresh samples."""
    new_labels: int
    """Labels that the head would grow by."""


class Experience:
    """Owns the rows of the release in use: buffer, judge rows, moments.

    Args:
        store: The device's database.
        config: Of the device.
        manifest: Of the release.
        folder: Its checkpoint.
        seed: Of the buffer's chance.
    """

    def __init__(
        self, store: Store, config: DeviceConfig, manifest: Manifest, folder: Path, *, seed: Sequence[int]
    ) -> None:
        self._store, self._config, self._manifest, self._folder = store, config, manifest, folder
        self._seed = list(seed)
        self.trunk = manifest.trunk_id
        self._sums_up = needs_moments(config.learn.learner)
        self.factory = FactoryMemory(folder, manifest)
        self.base = Head.load(folder / HEAD_NPZ)
        fisher = {key: value.astype(np.float32) for key, value in load_npz(folder / FISHER_NPZ).items()}
        self.importance = Importance(self.base.weights, fisher)
        """The checkpoint's own."""
        try:
            self._capacity = capacity_for(config.replay.max_bytes, manifest.latent.dim)
        except ValueError as error:  # a release with wider latents must not stop the device
            logger.warning("nothing is replayed but the factory's rows: %s; raise replay.max_bytes", error)
            self._capacity = 0
        self.judge_capacity = max(_MIN_JUDGES, self._capacity // 2)
        hidden = [self.base.weights[f"{kind}{i}"] for i in range(self.base.depth - 1) for kind in "Wb"]
        form = [part.tobytes() for part in hidden] + [repr(meaning_of_outputs(manifest)).encode()]
        self._form = hashlib.sha256(b"".join(form)).digest()[:_FORM_BYTES]
        """Of the moments: with other hidden layers or units, other numbers are summed up."""
        self.reload()

    # ---- the buffer

    def reload(self) -> None:
        """Read the buffer as it is on disk; what a smaller budget leaves no room for is forgotten."""
        kind, dim, capacity = self._config.replay.kind, self._manifest.latent.dim, self._capacity
        self.buffer: ReplayBuffer = BUFFERS[kind](capacity, dim, rng=lambda: np.random.default_rng(self._seed))
        self._strata: list[str] = json.loads(self._store.get(self._key("strata")) or b"[]")
        samples = self._store.samples("replay", self.trunk)
        kept, excess = samples[:capacity], samples[capacity:]
        for slot, sample in enumerate(kept):
            self.buffer.put(slot, np.frombuffer(sample.latent, dtype=np.uint8), self._stratum(sample.label))
        moved = [(slot, sample.slot) for slot, sample in enumerate(kept) if slot != sample.slot]
        if excess or moved:  # rows of another trunk may have been forgotten while it did not serve
            with self._store.transaction():
                self._store.delete_samples([sample.key for sample in excess])
                for slot, old in moved:
                    self._store.move_slot(self.trunk, old or 0, slot)
        if (state := self._store.get(self._key("buffer"))) is not None:
            try:
                self.buffer.restore(state)
            except IntegrityError as error:
                logger.warning("the buffer's counts are lost and begun anew: %s", error)

    def save(self) -> None:
        """Persist what the buffer knows beside its rows; inside a transaction."""
        self._store.put(self._key("buffer"), self.buffer.state())
        self._store.put(self._key("strata"), json.dumps(self._strata).encode())

    def _stratum(self, truth: str) -> int:
        """Number of the group that the buffer keeps in balance: a label, a set of labels, a range of the first target.

        Groups beyond a bound are one.
        """
        if self._manifest.task == "regression":
            target = self._manifest.targets[0]
            truth = str(int(np.clip(np.floor((json.loads(truth)[0] - target.mean) / target.std * 2), -4, 3)))
        if truth not in self._strata:
            if len(self._strata) >= _MAX_STRATA and self._manifest.task == "multilabel":
                return _MAX_STRATA - 1
            self._strata.append(truth)
        return self._strata.index(truth)

    # ---- what there is

    def fresh_rows(self, since: float = 0.0) -> int:
        """Labelled samples not learned from yet, whose inputs came at `since` or later."""
        return self._store.count_samples("fresh", self.trunk, since=since)

    def fresh(self) -> list[Sample]:
        """Labelled samples not learned from yet."""
        return self._store.samples("fresh", self.trunk)

    @property
    def judge_rows(self) -> JudgeRows:
        """All of them."""
        samples, feedback = fair_judges(self._store.samples("judge", self.trunk)), self._config.feedback
        # the most that a row may count is known before any has come, as the gate's evidence asks for
        most = max(feedback.default_weight, *feedback.sources.values(), 1e-3) / self._config.join.log_fraction
        return JudgeRows(
            stack([s.latent for s in samples], self._manifest.latent.dim),
            [s.label for s in samples],
            [s.slice for s in samples],
            np.clip([s.weight / most for s in samples], 1e-3, 1.0),
        )

    def known_latents(self, most: int) -> LatentArray:
        """Latents whose label is known, the newest of them; uint8 [N, D]."""
        samples = [*self.fresh(), *self._store.samples("judge", self.trunk)]
        newest = sorted(samples, key=lambda sample: sample.key)[-most:]
        own = stack([s.latent for s in newest], self._manifest.latent.dim)
        return np.concatenate([self.factory.latents, self.buffer.latents, own])

    def new_labels(self, known: Sequence[str]) -> dict[str, int]:
        """Labels that the head does not know, with so many samples each that it could."""
        if self._manifest.task != "classification":
            return {}
        counts = self._store.count_labels("fresh", self.trunk)
        return {name: n for name, n in sorted(counts.items()) if name not in known and n >= MIN_LABEL_ROWS}

    def learnable(self, known: Sequence[str], *, may_grow: Callable[[str], bool], since: float) -> Learnable:
        """What a job would learn from: not the samples of labels that the head may not grow by."""
        if self._manifest.task != "classification":
            return Learnable(self.fresh_rows(since), 0)
        counts = self._store.count_labels("fresh", self.trunk, since=since)
        new = [] if counts.keys() <= {*known} else self._wanted(known, may_grow)
        labels = {*known, *new}
        return Learnable(sum(count for label, count in counts.items() if label in labels), len(new))

    def _wanted(self, known: Sequence[str], may_grow: Callable[[str], bool]) -> list[str]:
        """New labels that the head would grow by, as far as it has room for them."""
        new = [name for name in self.new_labels(known) if may_grow(name)]
        return new[: max(0, self._config.learn.max_labels - len(known))]

    # ---- a job

    def job(
        self, champion: Head, importance: Importance, *, may_grow: Callable[[str], bool], since: float, attempt: int
    ) -> tuple[LearnJob, Chosen]:
        """A learning job from what waits.

        Args:
            champion: The head in use.
            importance: What EWC holds on to.
            may_grow: Whether a new label may be learned.
            since: When the inputs that raised the first warning came: what is older is replayed, not fresh.
            attempt: Number of the job.
        """
        manifest, config = self._manifest, self._config.learn
        known = self._factory_moments() if self._sums_up else None
        device = self._device_moments() if self._sums_up else None
        labels = self._labels(champion, device, may_grow)
        waiting = self.fresh()
        if manifest.task == "classification":
            waiting = [sample for sample in waiting if sample.label in labels]
        fresh = [sample for sample in waiting if sample.time >= since]
        older = [sample for sample in waiting if sample.time < since and sample.weight > 0]
        replayed = [
            s
            for s in self._store.samples("replay", self.trunk)
            if s.label in labels or manifest.task != "classification"
        ]
        factory = self.factory.replayed(self._config.replay.factory_rows)
        base = self.base.grown(labels)
        scratch = bool(config.scratch_every) and attempt % config.scratch_every == 0
        fresh_part, own = self._rows(fresh, labels), self._rows([*replayed, *older], labels)
        if known is None or device is None:
            moments, mass = Moments.none(labels, 0), np.zeros(len(fresh_part), np.float32)
        else:
            moments = known.aligned(labels)
            mass = fresh_mass(moments, fresh_part.targets, fresh_part.weights, manifest.task)
            moments = moments if scratch else moments.absorb(device.aligned(labels))
        champion = champion.grown(labels)
        job = LearnJob(
            champion=base if scratch else champion,
            base=base,
            anchor=grown_like(importance.anchor, base.weights),
            fisher=grown_like(importance.fisher, base.weights),
            fresh=fresh_part,
            replay=own + factory,
            moments=moments,
            fresh_mass=mass,
            latent=manifest.latent,
            task=manifest.task,
            config=config,
            seed=self._config.seed * 1_000_003 + attempt,
        )
        return job, Chosen([s.key for s in fresh], [s.key for s in older], mass.tolist())

    def _labels(self, champion: Head, device: Moments | None, may_grow: Callable[[str], bool]) -> list[str]:
        """The champion's labels, those summed up before, and those that enough new samples ask for."""
        summed = [name for name, known in zip(device.labels, device.known, strict=True) if known] if device else []
        labels = list(dict.fromkeys([*champion.labels, *summed]))
        return [*labels, *self._wanted(labels, may_grow)]

    def _rows(self, samples: list[Sample], labels: Sequence[str]) -> Rows:
        return Rows(
            stack([sample.latent for sample in samples], self._manifest.latent.dim),
            as_targets([sample.label for sample in samples], labels, self._manifest),
            np.array([sample.weight for sample in samples], dtype=np.float32),
        )

    # ---- moments, read when they are needed: of a wide latent they are large

    def _factory_moments(self) -> Moments:
        labels = self._manifest.labels
        if MOMENTS_NPZ in self._manifest.files:
            known = Moments.load(self._folder / MOMENTS_NPZ).aligned(labels)
            judged = self._moments_of_factory(self.factory.judging)
            enough = self._manifest.task == "regression" or (known.y > judged.y).all()
            return known.absorb(judged, sign=-1) if enough and known.rows > judged.rows else known
        return self._moments_of_factory(~self.factory.judging)

    def _moments_of_factory(self, rows: BoolArray) -> Moments:
        features = self.base.hidden(dequantize(self.factory.latents[rows], self._manifest.latent))
        return Moments.of(features, self.factory.targets[rows], np.ones(int(rows.sum())), self._manifest.labels)

    def _device_moments(self) -> Moments:
        data = self._store.get(self._key("moments"))
        if data is None:
            return Moments.none(self._manifest.labels, len(self.base.weights[f"W{self.base.depth - 1}"]))
        if data[:_FORM_BYTES] == self._form:
            try:
                return Moments.load(data[_FORM_BYTES:])
            except IntegrityError as error:
                logger.warning("what was summed up is lost but for the rows in the replay buffer: %s", error)
        kept = [sample for sample in self._store.samples("replay", self.trunk) if sample.mass > 0]
        return self._moments_of(kept, [sample.mass for sample in kept], self._labels_of(kept))

    def _save_moments(self, moments: Moments) -> None:
        self._store.put(self._key("moments"), self._form + moments.to_bytes())

    def _labels_of(self, samples: list[Sample]) -> list[str]:
        """The release's labels, and those that only samples have."""
        labels = list(self._manifest.labels)
        if self._manifest.task == "classification":
            labels += sorted({sample.label for sample in samples} - set(labels))
        return labels

    def _moments_of(self, samples: list[Sample], mass: Sequence[float], labels: Sequence[str]) -> Moments:
        rows = self._rows(samples, labels)
        features = self.base.hidden(dequantize(rows.latents, self._manifest.latent))
        return Moments.of(features, rows.targets, np.array(mass), labels)

    # ---- afterwards

    def consolidate(self, chosen: Chosen, *, fold: bool) -> None:
        """What was learned from moves into the replay buffer; inside a transaction.

        Args:
            chosen: What the job was made of.
            fold: Also add it to the device's moments, if the learner reads them. Not if the challenger did harm: the
                labels may be to blame.
        """
        fold = fold and self._sums_up
        waiting = {sample.key: sample for sample in self.fresh()}
        mass, learned = dict(zip(chosen.fresh, chosen.mass, strict=True)), chosen.learned.union(chosen.older)
        used = [waiting[key] for key in (*chosen.older, *chosen.fresh) if key in waiting and key in learned]
        used = [sample for sample in used if sample.weight > 0]
        masses = [mass.get(sample.key, sample.weight) if fold else 0.0 for sample in used]
        if fold and used:
            decay, device = self._config.learn.decay, self._device_moments()
            labels = list(dict.fromkeys([*device.labels, *self._labels_of(used)]))
            self._keep_undo()
            self._store.fade_mass(self.trunk, decay)
            device = device.faded(decay).aligned(labels)
            self._save_moments(device.absorb(self._moments_of(used, masses, labels)))
        else:
            self._store.delete(self._key("undo"))
        gone = (set(chosen.fresh) | set(chosen.older)) - {sample.key for sample in used}
        for sample, added in zip(used, masses, strict=True):
            slot = self.buffer.add(np.frombuffer(sample.latent, dtype=np.uint8), self._stratum(sample.label))
            if slot is None:
                gone.add(sample.key)
            else:
                self._store.move_to_replay(sample.key, slot, self.trunk, mass=added)
        self._store.delete_samples(sorted(gone))
        self.save()

    def unfold(self) -> None:
        """Take the last consolidation out of the moments again: its head proved harmful; inside a transaction."""
        if (data := self._store.get(self._key("undo"))) is None:
            return
        before = load_npz(data)
        self._store.delete(self._key("undo"))
        if moments := before["moments"].tobytes():
            self._store.put(self._key("moments"), moments)
        else:
            self._store.delete(self._key("moments"))
        self._store.set_mass(self.trunk, zip(before["keys"].tolist(), before["mass"].tolist(), strict=True))

    def _keep_undo(self) -> None:
        """What `unfold` needs: the moments as they are, and what each replayed row has added to them."""
        counted = [sample for sample in self._store.samples("replay", self.trunk) if sample.mass > 0]
        moments = np.frombuffer(self._store.get(self._key("moments")) or b"", dtype=np.uint8)
        keys, mass = np.array([s.key for s in counted], np.int64), np.array([s.mass for s in counted], np.float64)
        self._store.put(self._key("undo"), npz_bytes({"moments": moments, "keys": keys, "mass": mass}))

    def erase(self, found: list[tuple[Sample, str]], *, unlearn: bool) -> None:
        """Forget samples; inside a transaction.

        Args:
            found: Samples, each with the trunk of its latent.
            unlearn: Also take what they added to the device's moments out of them. What another trunk's rows added
                cannot be read any more: all that was summed up on that trunk goes.
        """
        own = [sample for sample, trunk in found if trunk == self.trunk]
        replayed = sorted((s for s in own if s.role == "replay"), key=lambda s: -(s.slot or 0))
        if unlearn:
            self._store.delete(self._key("undo"))
        if unlearn and (counted := [sample for sample in replayed if sample.mass > 0]):
            device = self._device_moments()
            mass = [sample.mass for sample in counted]
            self._save_moments(device.absorb(self._moments_of(counted, mass, device.labels), sign=-1))
        for sample in replayed:  # from the last slot on, so that none of them is moved before its turn
            slot = sample.slot or 0
            moved = self.buffer.remove(slot)
            self._store.delete_samples([sample.key])
            if moved is not None:
                self._store.move_slot(self.trunk, moved, slot)
        self._store.delete_samples([s.key for s, trunk in found if trunk != self.trunk or s.role != "replay"])
        if unlearn:
            for trunk in {trunk for s, trunk in found if trunk != self.trunk and s.mass > 0}:
                self._forget_sums(trunk)
        if replayed:
            self.save()

    def forget_label(self, label: str) -> None:
        """Drop what was summed up on this trunk, if the label is part of it; inside a transaction.

        To be called once its samples are erased.
        """
        if self._store.get(self._key("moments")) is None:
            return
        device = self._device_moments()
        if label in device.labels and device.known[device.labels.index(label)]:
            self._forget_sums(self.trunk)

    def _forget_sums(self, trunk: str) -> None:
        for kind in ("moments", "undo"):
            self._store.delete(f"{kind}:{trunk[:16]}")
        self._store.set_mass(trunk, [])

    def trim_judges(self, *, on_trial: bool) -> None:
        """Keep the newest judge rows; inside a transaction.

        While a challenger is on trial none goes: its evidence is that of all rows since the first.
        """
        if not on_trial:
            self._store.trim_samples("judge", self.trunk, self.judge_capacity)

    @property
    def judges_full(self) -> bool:
        """Whether no more rows may judge the challenger that is on trial."""
        return self._store.count_samples("judge", self.trunk) >= 2 * self.judge_capacity

    def _key(self, name: str) -> str:
        return f"{name}:{self.trunk[:16]}"
