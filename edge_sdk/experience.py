"""The labelled rows of one trunk: which are learned from, which are replayed, which judge, and what they add up to.

The database holds every row; here is the order in which they are used. Roles are given once: a judge row never trains.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from edge_sdk.config import DeviceConfig
from edge_sdk.errors import IntegrityError
from edge_sdk.files import load_npz
from edge_sdk.head import Head, dequantize
from edge_sdk.learn.base import LearnJob, Rows
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
_MAX_STRATA = 64


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
        self.factory = FactoryMemory(folder, manifest)
        self.base = Head.load(folder / HEAD_NPZ)
        fisher = {key: value.astype(np.float32) for key, value in load_npz(folder / FISHER_NPZ).items()}
        self.importance = Importance(self.base.weights, fisher)
        """The checkpoint's own."""
        capacity = capacity_for(config.replay.max_bytes, manifest.latent.dim)
        self.judge_capacity = max(_MIN_JUDGES, capacity // 2)
        self.reload()

    # ---- the buffer

    def reload(self) -> None:
        """Read the buffer as it is on disk; what a smaller budget leaves no room for is forgotten."""
        replay, dim = self._config.replay, self._manifest.latent.dim
        capacity = capacity_for(replay.max_bytes, dim)
        self.buffer: ReplayBuffer = BUFFERS[replay.kind](capacity, dim, rng=lambda: np.random.default_rng(self._seed))
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

    @property
    def judge_rows(self) -> JudgeRows:
        """All of them."""
        samples = self._store.samples("judge", self.trunk)
        most = 1 / self._config.join.log_fraction
        return JudgeRows(
            stack([s.latent for s in samples], self._manifest.latent.dim),
            [s.label for s in samples],
            [s.slice for s in samples],
            np.clip([s.weight / most for s in samples], 1e-3, 1.0),
        )

    def known_latents(self, most: int) -> LatentArray:
        """Latents whose label is known, the newest of them; uint8 [N, D]."""
        samples = [*self._store.samples("fresh", self.trunk), *self._store.samples("judge", self.trunk)][-most:]
        own = stack([s.latent for s in samples], self._manifest.latent.dim)
        return np.concatenate([self.factory.latents, self.buffer.latents, own])

    def new_labels(self, known: Sequence[str]) -> dict[str, int]:
        """Labels that the head does not know, with so many samples each that it could."""
        if self._manifest.task != "classification":
            return {}
        counts = self._store.count_labels("fresh", self.trunk)
        return {name: n for name, n in sorted(counts.items()) if name not in known and n >= MIN_LABEL_ROWS}

    # ---- a job

    def job(
        self, champion: Head, importance: Importance, *, accepted: frozenset[str] | None, since: float, attempt: int
    ) -> tuple[LearnJob, Chosen]:
        """A learning job from what waits.

        Args:
            champion: The head in use.
            importance: What EWC holds on to.
            accepted: New labels that may be learned; None: all.
            since: When the inputs that raised the first warning came: what is older is replayed, not fresh.
            attempt: Number of the job.
        """
        manifest, config = self._manifest, self._config.learn
        device = self._device_moments()
        labels = self._labels(champion, device, accepted)
        waiting = self._store.samples("fresh", self.trunk)
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
        factory_moments = self._factory_moments().aligned(labels)
        fresh_part, own = self._rows(fresh, labels), self._rows([*replayed, *older], labels)
        mass = fresh_mass(factory_moments, fresh_part.targets, fresh_part.weights, manifest.task)
        champion = champion.grown(labels)
        job = LearnJob(
            champion=base if scratch else champion,
            base=base,
            anchor=grown_like(importance.anchor, base.weights),
            fisher=grown_like(importance.fisher, base.weights),
            fresh=fresh_part,
            replay=Rows(
                *(
                    np.concatenate([getattr(own, part), getattr(factory, part)])
                    for part in ("latents", "targets", "weights")
                )
            ),
            moments=factory_moments if scratch else factory_moments + device.aligned(labels),
            fresh_mass=mass,
            latent=manifest.latent,
            task=manifest.task,
            config=config,
            seed=self._config.seed * 1_000_003 + attempt,
        )
        return job, Chosen([s.key for s in fresh], [s.key for s in older], mass.tolist())

    def _labels(self, champion: Head, device: Moments, accepted: frozenset[str] | None) -> list[str]:
        """The champion's labels, those summed up before, and those that enough new samples ask for."""
        labels = list(champion.labels)
        summed = [name for name, mass in zip(device.labels, device.y, strict=True) if mass > 0]
        wanted = [name for name in self.new_labels(labels) if accepted is None or name in accepted]
        for label in [*summed, *wanted]:
            if label not in labels and (label in summed or len(labels) < self._config.learn.max_labels):
                labels.append(label)
        return labels

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
            return known - judged if enough and known.rows > judged.rows else known
        return self._moments_of_factory(~self.factory.judging)

    def _moments_of_factory(self, rows: BoolArray) -> Moments:
        features = self.base.hidden(dequantize(self.factory.latents[rows], self._manifest.latent))
        return Moments.of(features, self.factory.targets[rows], np.ones(int(rows.sum())), self._manifest.labels)

    def _device_moments(self) -> Moments:
        data = self._store.get(self._key("moments"))
        last = self.base.weights[f"W{self.base.depth - 1}"]
        nothing = Moments.none(self._manifest.labels, len(last))
        if data is None:
            return nothing
        try:
            found = Moments.load(data)
        except IntegrityError as error:
            logger.warning("what was summed up is lost and begun anew: %s", error)
            return nothing
        return found if len(found.x) == len(last) else nothing

    def _moments_of(self, samples: list[Sample], mass: Sequence[float], labels: Sequence[str]) -> Moments:
        rows = self._rows(samples, labels)
        features = self.base.hidden(dequantize(rows.latents, self._manifest.latent))
        return Moments.of(features, rows.targets, np.array(mass), labels)

    # ---- afterwards

    def consolidate(self, chosen: Chosen, *, fold: bool) -> None:
        """What was learned from moves into the replay buffer; inside a transaction.

        Args:
            chosen: What the job was made of.
            fold: Also add it to the device's moments. Not if the challenger did harm: the labels may be to blame.
        """
        waiting = {sample.key: sample for sample in self._store.samples("fresh", self.trunk)}
        mass = dict(zip(chosen.fresh, chosen.mass, strict=True))
        wrong = {chosen.fresh[position] for position in chosen.wrong}
        used = [waiting[key] for key in (*chosen.older, *chosen.fresh) if key in waiting and key not in wrong]
        used = [sample for sample in used if sample.weight > 0]
        masses = [mass.get(sample.key, sample.weight) if fold else 0.0 for sample in used]
        if fold and used:
            decay = self._config.learn.decay
            device = self._device_moments()
            labels = list(device.labels)
            if self._manifest.task == "classification":
                labels += sorted({sample.label for sample in used} - set(labels))
            device = device.faded(decay).aligned(labels) + self._moments_of(used, masses, labels)
            self._store.fade_mass(self.trunk, decay)
            self._store.put(self._key("undo"), self._store.get(self._key("moments")) or b"")
            self._store.put(self._key("moments"), device.to_bytes())
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
        if (before := self._store.get(self._key("undo"))) is None:
            return
        self._store.delete(self._key("undo"))
        if before:
            self._store.put(self._key("moments"), before)
        else:
            self._store.delete(self._key("moments"))
        self._store.fade_mass(self.trunk, 0.0)

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
            self._store.put(self._key("moments"), (device - self._moments_of(counted, mass, device.labels)).to_bytes())
        for sample in replayed:  # from the last slot on, so that none of them is moved before its turn
            slot = sample.slot or 0
            moved = self.buffer.remove(slot)
            self._store.delete_samples([sample.key])
            if moved is not None:
                self._store.move_slot(self.trunk, moved, slot)
        self._store.delete_samples([s.key for s, trunk in found if trunk != self.trunk or s.role != "replay"])
        if unlearn:
            for trunk in {trunk for s, trunk in found if trunk != self.trunk and s.mass > 0}:
                self._store.delete(f"moments:{trunk[:16]}")
        if replayed:
            self.save()

    def forget_learned(self) -> None:
        """Drop what was summed up on this trunk; inside a transaction."""
        for name in ("moments", "undo"):
            self._store.delete(self._key(name))
        self._store.fade_mass(self.trunk, 0.0)

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
