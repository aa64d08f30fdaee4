"""The learning transaction: decide, train, judge, promote or reject, watch, confirm or roll back.

One of these runs at a time. Its state is one record in the database, so that a restart continues where it was, and
every step leaves the champion serving until the pointer has been flipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from edge_sdk.config import DeviceConfig
from edge_sdk.errors import EdgeError
from edge_sdk.files import load_npz, remove_tree
from edge_sdk.gate import Verdict, is_healthy, judge, watch
from edge_sdk.head import Head, Weights, dequantize
from edge_sdk.join import Judged
from edge_sdk.learn.base import CHALLENGER, LearnJob, LearnResult
from edge_sdk.learn.ewc import grown_like
from edge_sdk.learn.executor import LearnExecutor
from edge_sdk.manifest import FISHER_NPZ, HEAD_NPZ, MEMORY_NPZ, Manifest
from edge_sdk.policy import Decision, ResourceState, Signals, decide
from edge_sdk.replay import BUFFERS, ReplayBuffer, capacity_for
from edge_sdk.slots import Slots, Version
from edge_sdk.store import Sample, Store, stack
from edge_sdk.types import FloatArray, IndexArray, LatentArray, Mode

Emit = Callable[[str, dict[str, Any]], None]
_STATE = "adaptation"
_RECENT = 200
_MIN_LABEL_ROWS = 10
"""A label that the model does not know needs so many samples before the head grows by it: one typing error is none."""
_JUDGE_EVERY = 3
"""Every third row of the factory memory judges; the others are replayed."""


class AdaptState(msgspec.Struct):
    """Where the transaction stands; persisted."""

    phase: Literal["idle", "training", "judging", "probation"] = "idle"
    reason: str = ""
    since: float = 0.0
    """When the phase began."""
    attempts: int = 0
    """Learning jobs ever started; makes the seed of each."""
    last_ended: float | None = None
    parent: Version | None = None
    fresh_keys: list[int] = []
    """Samples that the challenger knows; they move into the replay buffer with the verdict."""
    rows: int = 0
    """How many of them were fresh to it."""
    steps: int = 0
    before: list[bool] = []
    """On probation: whether the version before would have been right."""
    after: list[bool] = []
    predictions: int = 0
    errors: int = 0
    """Both on probation."""
    recent: list[bool] = []
    """Whether the latest live predictions were right."""
    demand: str = ""
    """Why learning should start whatever the cool-down says."""
    waits: str = ""
    """Why learning that is wanted does not start."""


class FactoryMemory:
    """The base classes' latents that come with a checkpoint, split once into replay rows and judge rows."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        arrays = load_npz(folder / MEMORY_NPZ)
        latents, labels = arrays["latents"], arrays["labels"]
        judging = np.zeros(len(labels), dtype=bool)
        for label in set(labels.tolist()):
            judging[np.flatnonzero(labels == label)[_JUDGE_EVERY - 1 :: _JUDGE_EVERY]] = True
        names = np.array(manifest.labels, dtype=object)
        self.replay_latents, self.replay_labels = latents[~judging], [str(v) for v in names[labels[~judging]]]
        self.judge_latents, self.judge_labels = latents[judging], [str(v) for v in names[labels[judging]]]


class Adaptation:
    """Owns the transaction and the replay buffer of the release in use.

    Args:
        folder: For learning jobs.
        store: The device's database.
        slots: The versions on disk.
        executor: Runs learning jobs.
        config: Of the device.
        emit: Records an event inside the current transaction of the store.
    """

    def __init__(
        self, folder: Path, *, store: Store, slots: Slots, executor: LearnExecutor, config: DeviceConfig, emit: Emit
    ) -> None:
        self._folder, self._store, self._slots, self._executor = folder, store, slots, executor
        self._config, self._emit = config, emit
        data = store.get(_STATE)
        self.state = msgspec.json.decode(data, type=AdaptState) if data else AdaptState()
        self._before: Head | None = None
        self._judged_up_to = -1
        self._since = 0.0
        if self.state.phase == "training":  # the child died with us
            self._begin("idle", now=self.state.since)
            self._discard_job()

    # ---- the release in use

    def attach(self, version: Version, manifest: Manifest) -> None:
        """Work on a version: load its factory memory, anchor, Fisher information and replay buffer.

        Of one that is not learned on, only the live accuracy is kept.
        """
        folder = self._slots.folder(version)
        self._version, self._manifest, self._trunk = version, manifest, manifest.trunk_id
        self._before = None
        if not manifest.learns:
            self._begin("idle", now=self.state.since)
            self.state.waits = f"adapt={manifest.adapt}, task={manifest.task}: this release is served, not learned on"
            self._load_buffer()
            return
        self.memory = FactoryMemory(folder, manifest)
        self._base = Head.load(folder / HEAD_NPZ)
        self._fisher: Weights = {key: value.astype(np.float32) for key, value in load_npz(folder / FISHER_NPZ).items()}
        self._load_buffer()
        pointer = self._slots.pointer
        self._before = None
        self._judged_up_to = -1
        if self.state.phase == "judging" and self.state.parent != pointer.current:
            with self._transition():  # killed between the flip and its record
                self._consolidate()
                self._begin("probation", now=self.state.since)
                self._emit("promoted", {"to": version.head, "trigger": self.state.reason, "recovered": True})
        if self.state.phase == "probation":
            if pointer.previous is not None and pointer.previous.slot == version.slot:
                self._before = self._slots.head(pointer.previous)
            else:
                with self._transition():
                    if not self._rollback_is_recorded():  # killed between the flip and its record
                        self._emit(
                            "head_rolled_back", {"reason": "on probation", "to": version.head, "recovered": True}
                        )
                    self.state.last_ended = self.state.since
                    self._begin("idle", now=self.state.since)

    def _load_buffer(self) -> None:
        """The replay buffer as it is on disk; what a smaller budget leaves no room for is forgotten."""
        replay, dim = self._config.replay, self._manifest.latent.dim
        seed = [self._config.seed, self.state.attempts, self._version.release]
        capacity = capacity_for(replay.max_bytes, dim)
        self.judge_capacity = max(1, capacity // 2)
        self.buffer: ReplayBuffer = BUFFERS[replay.kind](capacity, dim, rng=lambda: np.random.default_rng(seed))
        self._buffer_labels: list[str] = []
        excess = []
        for sample in self._store.samples("replay", self._trunk):
            slot = sample.slot or 0
            if slot >= capacity:
                excess.append(sample.key)
                continue
            self.buffer.put(slot, np.frombuffer(sample.latent, dtype=np.uint8), self._label_number(sample.label))
        if excess:
            with self._store.transaction():
                self._store.delete_samples(excess)
        if (seen := self._store.get(self._seen_key)) is not None:
            self.buffer.seen = {self._label_number(label): n for label, n in json.loads(seen).items()}

    def _rollback_is_recorded(self) -> bool:
        since = self.state.since
        return any(e.name == "head_rolled_back" and e.time >= since for e in self._store.history(limit=100))

    def abandon(self, now: float) -> None:
        """Stop whatever runs: another release takes over. Fresh rows stay for the next time."""
        self._executor.cancel()
        self._discard_job()
        self._begin("idle", now=now)
        self.state.last_ended = None

    @property
    def fresh_rows(self) -> int:
        """Labelled samples not learned from yet."""
        return self._store.count_samples("fresh", self._trunk)

    @property
    def accuracy(self) -> float | None:
        """Live accuracy over the latest labels, or None below 30 of them."""
        recent = self.state.recent
        return float(np.mean(recent)) if len(recent) >= 30 else None

    @property
    def judge_rows(self) -> tuple[LatentArray, list[str]]:
        """uint8 [N, D] and labels: rows that no challenger was or will be trained on, oldest first."""
        samples = self._store.samples("judge", self._trunk)
        return stack([s.latent for s in samples], self._manifest.latent.dim), [s.label for s in samples]

    def see(self, rows: list[Judged], *, predictions: int, errors: int) -> None:
        """Take note of what the version in use did: live labelled rows, and counts."""
        if self.state.phase == "probation":
            self.state.predictions += predictions
            self.state.errors += errors
        if not rows:
            return
        self.state.recent = [*self.state.recent, *(row.correct for row in rows)][-_RECENT:]
        if self.state.phase == "probation" and self._before is not None:
            features = dequantize(np.stack([row.latent for row in rows]), self._manifest.latent)
            self.state.before += _right(self._before, features, [row.label for row in rows]).tolist()
            self.state.after += [row.correct for row in rows]

    def demand(self) -> None:
        """Learn as soon as there are enough rows, cool-down or not."""
        self.state.demand = "on demand"

    def forget_recent(self) -> None:
        """The recent live accuracy belongs to a version that no longer serves."""
        self.state.recent = []

    def save(self) -> None:
        """Persist the state; inside a transaction."""
        self._store.put(_STATE, msgspec.json.encode(self.state))

    @contextmanager
    def _transition(self) -> Iterator[None]:
        """A transaction of the store that also changes this state: both, or, if it cannot be written, neither."""
        before = msgspec.structs.replace(self.state)
        try:
            with self._store.transaction():
                yield
                self.save()
        except Exception:
            self.state = before
            self._load_buffer()
            raise

    # ---- one turn

    def turn(
        self, now: float, *, mode: Mode, alarms: tuple[str, ...], changed_at: float | None, resources: ResourceState
    ) -> None:
        """Do what the phase calls for. The pointer may have been flipped afterwards.

        Args:
            now: Seconds since the epoch.
            mode: How far the device is trusted.
            alarms: Monitors whose alarm is up.
            changed_at: When the inputs that raised the first warning came. What is older is replayed, not fresh.
            resources: What the machine can spare.
        """
        if not self._manifest.learns:
            return
        self._since = changed_at or 0.0
        if self.state.phase == "training":
            self._collect(now)
        elif self.state.phase == "probation":
            self._watch(now)
        elif self.state.phase == "idle" and mode != "monitor":
            self._consider(now, alarms, resources)
        if self.state.phase == "judging":
            self._judge(now, mode)

    def _consider(self, now: float, alarms: tuple[str, ...], resources: ResourceState) -> None:
        signals = Signals(
            alarms=alarms,
            fresh_rows=self._store.count_samples("fresh", self._trunk, since=self._since),
            accuracy=self.accuracy,
            since_last_s=self._since_last(now),
            demand=self.state.demand,
        )
        decision: Decision = decide(signals, resources, self._config.policy)
        self.state.waits = decision.reason if decision.wanted and not decision.learn else ""
        if decision.learn:
            self._train(now, decision.reason)

    def _since_last(self, now: float) -> float | None:
        ended = self.state.last_ended
        return None if ended is None or now < ended else now - ended  # a clock that was set back ends the cool-down

    def _train(self, now: float, reason: str) -> None:
        job, keys = self._job()
        with self._transition():
            self._begin("training", now=now)
            self.state.reason, self.state.parent, self.state.demand = reason, self._version, ""
            self.state.attempts += 1
            self.state.fresh_keys = keys
            rows = {"rows": len(job.fresh_labels), "replayed": len(job.replay_labels)}
            self._emit("learn_started", {"reason": reason, **rows})
            self.state.rows = rows["rows"]
        try:
            self._discard_job()
            self._job_folder.mkdir(parents=True)
            job.save(self._job_folder)
            self._executor.start(self._job_folder)
        except (EdgeError, OSError) as error:
            self._fail(now, f"{type(error).__name__}: {error}")
        else:
            self._collect(now)

    def _job(self) -> tuple[LearnJob, list[int]]:
        champion = self._slots.head(self._version)
        waiting = self._store.samples("fresh", self._trunk)
        labels = self._labels_to_learn(champion, waiting)
        champion = champion.grown(labels)
        number = {label: i for i, label in enumerate(labels)}
        waiting = [sample for sample in waiting if sample.label in number]
        fresh = [sample for sample in waiting if sample.time >= self._since]
        older = [sample for sample in waiting if sample.time < self._since]
        remembered = [self._buffer_labels[i] for i in self.buffer.labels]
        kept = [i for i, label in enumerate(remembered) if label in number]
        dim = self._manifest.latent.dim
        replay = np.concatenate(
            [self.buffer.latents[kept], stack([s.latent for s in older], dim), self.memory.replay_latents]
        )
        replay_labels = [remembered[i] for i in kept] + [s.label for s in older] + self.memory.replay_labels
        return LearnJob(
            champion=champion,
            anchor=grown_like(self._base.weights, champion.weights),
            fisher=grown_like(self._fisher, champion.weights),
            fresh_latents=stack([sample.latent for sample in fresh], dim),
            fresh_labels=np.array([number[sample.label] for sample in fresh], dtype=np.int64),
            replay_latents=replay,
            replay_labels=np.array([number[label] for label in replay_labels], dtype=np.int64),
            latent=self._manifest.latent,
            config=self._config.learn,
            seed=self._config.seed * 1_000_003 + self.state.attempts,
        ), [sample.key for sample in waiting]

    def _labels_to_learn(self, champion: Head, fresh: list[Sample]) -> list[str]:
        """The champion's labels and those that enough new samples ask for."""
        labels = list(champion.labels)
        counts: dict[str, int] = {}
        for sample in fresh:
            counts[sample.label] = counts.get(sample.label, 0) + 1
        for label in sorted(counts):
            if label not in labels and counts[label] >= _MIN_LABEL_ROWS and len(labels) < self._config.learn.max_labels:
                labels.append(label)
        return labels

    def _collect(self, now: float) -> None:
        result: LearnResult | None = self._executor.poll()
        if result is None:
            if now - self.state.since > self._config.learn.max_seconds:
                self._executor.cancel()
                self._fail(now, f"stopped after {self._config.learn.max_seconds:g} s")
            return
        if result.error:
            self._fail(now, result.error)
            return
        with self._transition():
            self._begin("judging", now=now)
            self.state.steps = result.steps

    def _judge(self, now: float, mode: Mode) -> None:
        newest = self._store.newest_sample("judge", self._trunk)
        if newest == self._judged_up_to and now - self.state.since < self._config.gate.max_wait_s:
            return  # nothing new to judge by
        self._judged_up_to = newest
        try:
            challenger = Head.load(self._job_folder / CHALLENGER)
        except (EdgeError, OSError) as error:
            self._fail(now, f"the challenger is lost: {error}")
            return
        verdict = self._without_small_scores(self._verdict(challenger, now))
        detail = {**msgspec.structs.asdict(verdict), "trigger": self.state.reason, "steps": self.state.steps}
        if verdict.outcome == "need_more":
            self.state.waits = verdict.reason
            self._supersede(now)
            return
        if verdict.outcome == "promote" and mode == "adapt":
            number = self._slots.write_head(self._version.slot, challenger)
            self._slots.promote(number)
            with self._transition():
                self._consolidate()
                self._begin("probation", now=now)
                self._emit("promoted", {**detail, "to": number, "parent": self._version.head})
        else:
            with self._transition():
                self._consolidate()
                self._begin("idle", now=now)
                self.state.last_ended = now
                # shadow: what would have been done is told, and not done
                self._emit("would_promote" if verdict.outcome == "promote" else "rejected", detail)
        self._discard_job()

    def _supersede(self, now: float) -> None:
        """Let a challenger that proves nothing give way to one that knows twice as many samples.

        Its own stay fresh.
        """
        waiting = self._store.count_samples("fresh", self._trunk, since=self._since) - self.state.rows
        if waiting < max(self.state.rows, self._config.policy.min_fresh_rows):
            return
        with self._transition():
            self._emit("superseded", {"reason": self.state.waits, "rows": self.state.rows, "new": waiting})
            self._begin("idle", now=now)
            self.state.demand = "more samples than the challenger before knew"
        self._discard_job()

    def _without_small_scores(self, verdict: Verdict) -> Verdict:
        """Scores over so few rows that they say too much about single samples do not leave the device."""
        few = self._config.report.min_count
        if verdict.rows < few:
            verdict = msgspec.structs.replace(verdict, champion=0.0, challenger=0.0)
        if verdict.factory_rows < few:
            verdict = msgspec.structs.replace(verdict, champion_factory=0.0, challenger_factory=0.0)
        return verdict

    def _verdict(self, challenger: Head, now: float) -> Verdict:
        champion = self._slots.head(self._version)
        latents, labels = self.judge_rows
        number = {label: i for i, label in enumerate(sorted(set(labels)))}
        factory = dequantize(self.memory.judge_latents, self._manifest.latent)
        features = dequantize(latents, self._manifest.latent)
        return judge(
            _said(champion, features, number),
            _said(challenger, features, number),
            np.array([number[label] for label in labels], dtype=np.int64),
            _right(champion, factory, self.memory.judge_labels),
            _right(challenger, factory, self.memory.judge_labels),
            waited_s=now - self.state.since,
            config=self._config.gate,
        )

    def _watch(self, now: float) -> None:
        gate = self._config.gate
        verdict = watch(
            np.array(self.state.before, dtype=bool),
            np.array(self.state.after, dtype=bool),
            waited_s=now - self.state.since,
            healthy=is_healthy(self.state.errors, self.state.predictions),
            alpha=gate.alpha,
            rows=gate.probation_rows,
            seconds=gate.probation_s,
        )
        if verdict.outcome == "need_more":
            return
        if verdict.outcome == "rollback":
            back = self._slots.rollback()
        with self._transition():
            self._begin("idle", now=now)
            self.state.last_ended = now
            if verdict.outcome == "rollback":
                self._emit("head_rolled_back", {"reason": verdict.reason, "to": back.head})
            else:
                self._emit("confirmed", {"reason": verdict.reason})

    def _consolidate(self) -> None:
        """What was learned from moves into the replay buffer; inside a transaction."""
        chosen = set(self.state.fresh_keys)
        gone = []
        for sample in self._store.samples("fresh", self._trunk):
            if sample.key not in chosen:
                continue
            latent = np.frombuffer(sample.latent, dtype=np.uint8)
            slot = self.buffer.add(latent, self._label_number(sample.label))
            if slot is None:
                gone.append(sample.key)
            else:
                self._store.move_to_replay(sample.key, slot, self._trunk)
        self._store.delete_samples(gone)
        seen = {self._buffer_labels[number]: count for number, count in self.buffer.seen.items()}
        self._store.put(self._seen_key, json.dumps(seen).encode())

    def _fail(self, now: float, reason: str) -> None:
        self._discard_job()
        with self._transition():
            self._begin("idle", now=now)
            self.state.last_ended = now
            self._emit("learn_failed", {"reason": reason})

    def _begin(self, phase: Literal["idle", "training", "judging", "probation"], *, now: float) -> None:
        self._judged_up_to = -1
        self.state.phase, self.state.since = phase, now
        self.state.before, self.state.after, self.state.waits = [], [], ""
        self.state.predictions = self.state.errors = 0

    def _label_number(self, label: str) -> int:
        """Buffers know labels by number, which grow with the labels that come."""
        if label not in self._buffer_labels:
            self._buffer_labels.append(label)
        return self._buffer_labels.index(label)

    @property
    def _seen_key(self) -> str:
        return f"seen:{self._trunk[:16]}"

    @property
    def _job_folder(self) -> Path:
        return self._folder / "job"

    def _discard_job(self) -> None:
        remove_tree(self._job_folder)


def _said(head: Head, features: FloatArray, number: dict[str, int]) -> IndexArray:
    """The number of the label that the head gives each row; -1 for a label without one. int64 [N]."""
    if not len(features):
        return np.zeros(0, dtype=np.int64)
    numbers = np.array([number.get(label, -1) for label in head.labels], dtype=np.int64)
    result: IndexArray = numbers[head.predict(features)]
    return result


def _right(head: Head, features: FloatArray, labels: list[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether the head gives each row its label; a label it does not know is always wrong. bool [N]."""
    if not labels:
        return np.zeros(0, dtype=bool)
    known = {label: i for i, label in enumerate(head.labels)}
    wanted = np.array([known.get(label, -1) for label in labels])
    result: np.ndarray[Any, np.dtype[np.bool_]] = head.predict(features) == wanted
    return result
