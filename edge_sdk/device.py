"""The device: serves predictions, joins labels, and takes one maintenance turn at a time.

`predict` and `observe` touch memory only. `step` alone touches the database, files and the network, and owns the order
of things; `with device:` runs a thread that only calls `step`.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from weakref import WeakValueDictionary

import msgspec
import numpy as np

from edge_sdk.adapt import Adaptation
from edge_sdk.ask import LabelRequest
from edge_sdk.asking import Asking
from edge_sdk.clock import Clock, SystemClock, is_due
from edge_sdk.config import DeviceConfig
from edge_sdk.errors import (
    ArtifactError,
    ConfigError,
    EdgeError,
    LabelError,
    ModelError,
    RollbackRefusedError,
    StoreError,
)
from edge_sdk.files import lock_folder
from edge_sdk.front import Front, checked_id
from edge_sdk.join import Joined, Joiner
from edge_sdk.labelling import LabellingFunctions
from edge_sdk.learn.executor import LearnExecutor, new_executor
from edge_sdk.manifest import verify_checkpoint
from edge_sdk.memory import trim_memory
from edge_sdk.messages import check_name
from edge_sdk.model import Arrays, Trunks
from edge_sdk.monitoring import Monitoring
from edge_sdk.pending import Pending
from edge_sdk.policy import check_policy
from edge_sdk.progress import saved_state
from edge_sdk.reporter import Identity, Reporter
from edge_sdk.resources import PsutilReader, ResourceReader, SafeReader
from edge_sdk.selftest import read_choice
from edge_sdk.serving import Served, load_served
from edge_sdk.skew import Skew
from edge_sdk.slots import Slots, Version
from edge_sdk.status import STATUS_KEY, Status, StepReport
from edge_sdk.store import HistoryEntry, Lineage, Store
from edge_sdk.transport import NoTransport, Transport
from edge_sdk.types import Mode, Prediction, Truth
from edge_sdk.update import UpdateClient
from edge_sdk.upgrade import Upgrade

logger = logging.getLogger(__name__)
_SAVE_S = 60.0
_BUSY_S = 0.02


class EdgeDevice:
    """One device.

    Args:
        home: Folder of its own for database, releases and learned heads; made if it is missing.
        checkpoint: A base checkpoint to start with, and to go to whenever it is newer than the one in use. Without
            one the first release comes from the coordinator.
        config: Settings.
        transport: Connection to the broker; None works alone.
        clock: Source of time.
        executor: Where learning runs; None: as configured.
        resources: What the machine can spare.
        trunks: Loaded trunks to share with other devices of this process.
        labelling: Rules that label samples, for `apply_rules`.
        rng: Source of chance for names; None: the system's.

    Raises:
        ConfigError: A setting is impossible.
        ArtifactError: The checkpoint is damaged or does not fit, and nothing else can be served.
        StoreError: The database cannot be opened.

    Example:
        >>> with EdgeDevice(home, checkpoint=folder) as device:  # doctest: +SKIP
        ...     prediction = device.predict(x)
        ...     device.observe(prediction.id, "7")
    """

    def __init__(
        self,
        home: Path | str,
        *,
        checkpoint: Path | str | None = None,
        config: DeviceConfig | None = None,
        transport: Transport | None = None,
        clock: Clock | None = None,
        executor: LearnExecutor | None = None,
        resources: ResourceReader | None = None,
        trunks: Trunks | None = None,
        labelling: LabellingFunctions | None = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        self.config = config or DeviceConfig()
        check_policy(self.config)
        self.name = check_name(self.config.device)
        self._home = Path(home)
        self._home.mkdir(parents=True, exist_ok=True)
        self._clock = clock or SystemClock()
        self._resources = SafeReader(resources or PsutilReader(), self._clock)
        self._labelling = labelling
        self._executor = executor or new_executor(self.config.learn.executor)
        self._trunks: Trunks = WeakValueDictionary() if trunks is None else trunks  # what no version serves is freed
        self._step_lock = threading.RLock()
        self._flushed = threading.Condition()
        self._flushes = 0
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._stopped = False
        self._problem = ""
        self._saved_at = 0.0
        self._taken_up: Version | None = None
        self._served: Served | None = None
        self._adaptation: Adaptation | None = None

        with ExitStack() as opened:
            opened.enter_context(lock_folder(self._home))
            self._store = Store(self._home / "edge.db", durability=self.config.durability)
            opened.callback(self._store.close)
            self._slots = Slots(self._home / "slots")
            self._slots.collect_garbage()
            self._open(transport or NoTransport(), rng)
            self._start(None if checkpoint is None else Path(checkpoint))
            self._files = opened.pop_all()
            """The database and the folder's lock, open until `stop`."""

    # ---- opening

    def _open(self, transport: Transport, rng: np.random.Generator | None) -> None:
        """Continue where the database says the device was."""
        with self._store.transaction():
            store_id = self._store.get("store_id") or (rng.bytes(8) if rng else os.urandom(8)).hex().encode()
            self.boot = int(self._store.get("boot") or b"0") + 1
            self._store.put("store_id", store_id)
            self._store.put("boot", str(self.boot).encode())
        self.store_id = store_id.decode()
        prefix = f"{self.store_id[:8]}-"
        self._pending = Pending(self.config.join.max_pending, f"{prefix}{self.boot}-")
        self._pending.reserve(self._store.waiting_ids(not_like=prefix))
        self._front = Front(self._pending, self._clock, self.config)
        self._joiner = Joiner(self._store, self._pending, self.config)
        self._reporter = Reporter(
            self._store,
            store_id=self.store_id,
            boot=self.boot,
            transport=transport,
            clock=self._clock,
            config=self.config,
        )
        emit = self._reporter.emit
        if (current := self._slots.pointer.current) is not None:
            self._reporter.identity = Identity(current.release, current.head, current.digest)
        if self._store.replaced:
            with self._store.transaction():
                emit("store_lost", {"reason": "the database was damaged; it was put aside and begun anew"})
        self._asking = Asking(self._store, self.config, emit)
        self._monitoring = Monitoring(self._store, self.config.drift, emit)
        client = UpdateClient(
            self._home / "incoming",
            device=self.name,
            topics=self._reporter.topics,
            transport=transport,
            config=self.config.update,
        )
        self._upgrade = Upgrade(store=self._store, slots=self._slots, client=client, config=self.config, emit=emit)

    def _start(self, checkpoint: Path | None) -> None:
        """Load what serves, or install the checkpoint that came with the app if it is newer or nothing else works."""
        now = self._clock.now()
        self._upgrade.count_boot()
        self._count_boot()
        installed = self._slots.pointer.current
        try:
            self._load_or_go_back(now)
        except (EdgeError, OSError):
            if checkpoint is None:
                raise
        if checkpoint is None:
            return
        current = self._served.version if self._served else None
        # a release that was left stays left, unless only its files here were damaged: the app brings them anew
        left = {} if current != installed else self._upgrade.state.refused
        try:
            self._upgrade.install_folder(checkpoint, self._adaptation, current, left)
            self._swap(now)
        except (ArtifactError, ModelError) as error:
            if self._served is None:
                raise
            self._upgrade.note_refusal(error)

    def _count_boot(self) -> None:
        """Note a start on a head on probation; one that keeps crashing the app is left, before it is loaded."""
        if saved_state(self._store).phase != "probation" or self._upgrade.state.watching:
            return
        if self._slots.count_boot() > self.config.gate.max_boots:
            logger.error("%s: the head in use is left: too many starts without a healthy step", self.name)
            with suppress(RollbackRefusedError):
                self._slots.rollback()

    def _load_or_go_back(self, now: float) -> None:
        """Serve the version in use; one that is damaged is left for the one before."""
        current = self._slots.pointer.current
        if current is None:
            return
        try:
            with ThreadPoolExecutor(1) as other:  # hashing and loading take as long, and leave each other free
                verified = other.submit(self._verify, current)  # flash memory ages
                try:
                    loaded = self._load(current)
                finally:
                    verified.result()  # a wrong hash says more than what the engine makes of it
            self._served = loaded
            self._swap(now)
        except (EdgeError, OSError) as error:
            logger.error("%s: the version in use cannot be loaded: %s", self.name, error)  # noqa: TRY400 - no traceback
            # the version before may be another head on the same damaged release; the release before is not
            for go_back in (self._slots.rollback, self._slots.rollback_release):
                with suppress(EdgeError, OSError):
                    version = go_back()
                    self._verify(version)
                    self._left(current, version, f"cannot be loaded: {error}", now)
                    return
            raise

    def _verify(self, version: Version) -> None:
        folder = self._slots.folder(version)
        choice = read_choice(folder, self._slots.manifest(version))
        verify_checkpoint(folder, serves=None if choice is None else choice.variant)

    # ---- serving

    @property
    def ready(self) -> bool:
        """Whether there is a model to predict with."""
        return self._served is not None

    @property
    def connected(self) -> bool:
        """Whether there is a connection to the broker now."""
        return self._reporter.connected

    @property
    def mode(self) -> Mode:
        """How far the device is trusted; can be changed while it runs."""
        return self._reporter.mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._reporter.mode = mode

    @property
    def labels(self) -> tuple[str, ...]:
        """What the model in use can say."""
        return self._model().labels

    def predict(
        self,
        x: Any,
        *,
        id: str | None = None,  # noqa: A002 - the word users know
        state: Arrays | None = None,
        slice: str = "",  # noqa: A002
    ) -> Prediction:
        """Predict one sample. Thread-safe.

        Args:
            x: One sample of the manifest's input shape, in the app's units; anything numpy casts to the input's dtype.
                A tabular model also takes a mapping of column names, a model with several inputs one of input names.
            id: The app's own name for the prediction; it must not be waiting for a label already.
            state: For a recurrent model: the `state` of the prediction before; None starts anew.
            slice: The app's own name for the part of the world that it comes from (a camera, a site), at most 64
                characters; no challenger may harm one. It never leaves the device.

        Raises:
            InputError: Wrong dtype, shape, NaN/Inf or out of range; the message says which.
            DuplicateIdError: The id is in use.
            LabelError: The id or the slice is none.
            ModelError: There is no model yet, or the engine failed.
        """
        return self._front.predict(self._model(), x, id, state, slice)

    def predict_batch(self, x: Any, *, slice: str = "") -> list[Prediction]:  # noqa: A002
        """Predict samples stacked in the first dimension, or a list of rows. Thread-safe. Errors as in `predict`."""
        return self._front.predict_batch(self._model(), x, slice)

    def observe(
        self,
        id: str,  # noqa: A002
        truth: Truth,
        *,
        source: str = "",
        durable: bool = False,
        timeout_s: float = 10.0,
    ) -> None:
        """Give the truth about a prediction, at any time after it. Thread-safe.

        It is acknowledged (it survives whatever happens next) at the next `step`, or when this returns if
        `durable`. A truth whose prediction is gone is counted as `unmatched`, a second one as `duplicate`.

        Args:
            id: The prediction's.
            truth: The true label; of a multi-label model the list of labels that applied; of a regression the number,
                or one for each target.
            source: Where it comes from, at most 64 characters: `feedback.sources` says what it is worth.
            durable: Wait until it is on disk.
            timeout_s: How long to wait at most.

        Raises:
            UnknownLabelError: It is not one of the model's labels and may not become one.
            LabelError: It is of another task, or not finite.
            StoreError: `durable`, and it could not be written in time; it is kept and tried again.
        """
        self._front.observe(self._model(), id, truth, source)
        if durable:
            self._wait_for_flush(timeout_s)

    def reward(self, id: str, value: float, *, source: str = "") -> None:  # noqa: A002
        """Say how right a prediction proved, without knowing the truth: clicked, accepted, ignored. Thread-safe.

        It is learned from, in proportion to how clear it is, and never judges. It stands for the truth: one that is
        observed after the next step is a `duplicate`.

        Args:
            id: The prediction's.
            value: 1: its label was right; 0: it was wrong; 0.5 says nothing.
            source: As in `observe`.

        Raises:
            LabelError: The value is not in [0, 1], or the model is no classification.
        """
        self._front.reward(self._model(), id, value, source)

    def apply_rules(self, id: str, x: Any, *, source: str = "rules") -> str | None:  # noqa: A002
        """Let the labelling functions vote on a sample. Thread-safe as far as they are.

        Their label is learned from, weighted by the share of the votes that it got, and never judges. It stands for the
        truth, as a reward does.

        Args:
            id: Of its prediction.
            x: The sample, as the functions want it.
            source: As in `observe`.

        Returns:
            The label, or None if they abstain or do not agree.

        Raises:
            ConfigError: The device was given no labelling functions.
            UnknownLabelError: They voted for a label that the model may not learn.
        """
        if self._labelling is None:
            raise ConfigError("this device has no labelling functions: give it some with `labelling=`")
        vote = self._labelling.vote(x)
        if vote is not None:
            self._front.guess(self._model(), id, vote.label, vote.confidence, source)
        return vote.label if vote else None

    def learn(self, x: Any, y: Sequence[Truth], *, source: str = "", slice: str = "") -> None:  # noqa: A002
        """Give labelled samples that were never predicted. Thread-safe.

        Args:
            x: Samples stacked in the first dimension, or a list of rows.
            y: The truth about each, as in `observe`.
            source: Where the truths come from, as in `observe`.
            slice: As in `predict`.

        Raises:
            InputError, UnknownLabelError, ModelError: As `predict` and `observe`.
            LabelError: Not as many labels as samples.
            IncompatibleError: The release in use is served, not learned on.
        """
        self._front.learn(self._model(), x, y, source, slice)

    def evaluate(self, x: Any, y: Sequence[Truth]) -> float:
        """Share of samples that the version in use gets right; they are neither logged nor learned from.

        Args:
            x: Samples stacked in the first dimension, or a list of rows.
            y: The truth about each, as in `observe`. What counts as right: `edge_sdk.tasks.is_right`.

        Raises:
            InputError, LabelError, ModelError: As `predict` and `observe`.
        """
        return self._front.evaluate(self._model(), x, y)

    def _model(self) -> Served:
        if self._served is None:
            raise ModelError("no release is installed yet: give a checkpoint, or wait for the coordinator's first one")
        return self._served

    def _wait_for_flush(self, timeout_s: float) -> None:
        if self._thread is None or self._thread is threading.current_thread():
            self.step()
            done = not self._joiner.unsaved
        else:
            with self._flushed:
                # the flush under way may have drained before this label came: the one after it is sure
                goal = self._flushes + 2
                done = self._flushed.wait_for(lambda: self._flushes >= goal, timeout_s)
        if not done:
            problem = self._problem or f"no flush within {timeout_s:g} s"
            raise StoreError(f"the label is not on disk yet: {problem}; it is kept and tried again")

    # ---- the turn

    def step(self) -> StepReport:
        """Take one maintenance turn: flush, listen, update, learn, report, send.

        What fails is recorded in the report and in the status, and the other parts go on.
        """
        with self._step_lock:
            now = self._clock.now()
            before = self._served
            problems: list[str] = []
            with _recorded(problems):
                self._swap(now)
            joined = None
            with _recorded(problems):
                joined = self._flush(now)
            received = sent = 0
            with _recorded(problems):
                self._asking.turn(now, joined.ids if joined else [])
            with _recorded(problems):
                received = self._reporter.listen(self._upgrade.client)
            with _recorded(problems):
                self._upgrade.turn(now, self._adaptation)
                self._swap(now)
            with _recorded(problems):
                self._learn_turn(now)
                self._swap(now)
            with _recorded(problems):
                if is_due(now, self._reporter.window.start, self.config.report.interval_s):
                    self._report(now)
            with _recorded(problems):
                sent = self._reporter.send(now)
            if not problems:
                self._slots.clear_boots()
            self._note_problem("; ".join(problems))
            return StepReport(
                predictions=len(joined.rows) if joined else 0,
                labelled=len(joined.ids) if joined else 0,
                unmatched=joined.unmatched if joined else 0,
                received=received,
                sent=sent,
                swapped=self._served is not before,
                problem=self._problem,
            )

    def _note_problem(self, problem: str) -> None:
        if problem and problem != self._problem:
            logger.error("%s: %s", self.name, problem)
        self._problem = problem

    def _flush(self, now: float) -> Joined | None:
        """Memory to disk, in one transaction. What cannot be written stays in memory and is tried again.

        Monitors and probation see rows only once they are on disk, so that a second try counts nothing twice.
        """
        joined = None
        adaptation = self._adaptation
        self._joiner.requested = self._asking.waiting_ids
        self._joiner.judges_full = adaptation is not None and adaptation.judges_full
        if self._joiner.drain() or is_due(now, self._saved_at, _SAVE_S):
            with self._store.transaction():
                joined = self._joiner.write(now, self._served, self._reporter.counters, self._reporter.window)
                self._save(now, joined)
            self._saved_at = now
            self._joiner.written(joined)
            self._reporter.counters, self._reporter.window = joined.counters, joined.window
            if self._adaptation is not None:
                self._adaptation.see(joined.live, now, predictions=len(joined.rows), errors=joined.errors)
            correct = [row.correct for row in joined.live]
            self._upgrade.see(correct, predictions=len(joined.rows), errors=joined.errors)
            self._monitoring.see(joined)
        with self._flushed:
            self._flushes += 1
            self._flushed.notify_all()
        return joined

    def _save(self, now: float, joined: Joined) -> None:
        """Counters, window and evidence; inside a transaction."""
        self._store.put("counters", msgspec.json.encode(joined.counters))
        self._store.put("window", msgspec.json.encode(joined.window))
        if self._adaptation is not None:
            self._adaptation.trim()
            self._adaptation.charge(now, flash_bytes=joined.written_bytes)
            self._adaptation.save()
        self._upgrade.save()
        if self._monitoring.save_if_due(now):
            self._store.put(STATUS_KEY, msgspec.json.encode(self.status()))

    def _learn_turn(self, now: float) -> None:
        adaptation = self._adaptation
        if adaptation is None:
            return
        self._upgrade.watch(now)
        if self._upgrade.state.watching:
            return  # one change at a time: a release proves itself before anything is learned on it
        adaptation.turn(
            now,
            mode=self.mode,
            alarms=tuple(self._monitoring.alarms),
            changed_at=self._monitoring.changed_at,
            resources=self._resources.read(),
        )

    def _swap(self, now: float) -> None:
        """Serve what the pointer says: built here, off the request path, then one reference is replaced.

        Serving comes first; what has to be written about it is tried again if there is no room.
        """
        current = self._slots.pointer.current
        if current is None:
            return
        if self._served is None or self._served.version != current:
            self._trunks.update(self._upgrade.tested)
            self._served = self._load(current)
            self._upgrade.tested.clear()
        if self._taken_up != current:
            self._take_up(self._served, now)

    def _load(self, version: Version) -> Served:
        return load_served(self._slots, version, self._upgrade.variant(version).variant, self._trunks)

    def _take_up(self, served: Served, now: float) -> None:
        """Everything that follows from another version serving."""
        current, before = served.version, self._taken_up
        logger.info("%s serves release %d, head %d", self.name, current.release, current.head)
        self._reporter.serve(Identity(current.release, current.head, current.digest), now, **self._facts())
        if self._adaptation is None:
            self._adaptation = self._new_adaptation()
        self._upgrade.note_version(now, self._adaptation)
        self._adaptation.attach(current, served.manifest)
        self._monitoring.attach(served, self._slots.folder(current), now)
        if before is not None:
            self._adaptation.forget_recent()
            if self._adaptation.state.phase != "probation":  # on probation it is the head that was just promoted
                self._adaptation.forget_learned()
        self._front.refused = frozenset(self._adaptation.state.refused)
        with self._store.transaction():
            unreadable = self._store.keep_trunks(self._slots.trunk_ids())
        self._pending.release(unreadable)
        self._slots.collect_garbage()
        self._taken_up = current
        self._reporter.tell_state()
        trim_memory()  # what loading took and gave up

    def _new_adaptation(self) -> Adaptation:
        return Adaptation(
            self._home / "learn",
            store=self._store,
            slots=self._slots,
            executor=self._executor,
            config=self.config,
            emit=self._reporter.emit,
        )

    # ---- telling

    def _report(self, now: float) -> None:
        self._reporter.report(now, carry=True, **self._facts())
        trim_memory()

    def _facts(self) -> dict[str, Any]:
        """What a report says beside what the reporter counts."""
        adaptation = self._adaptation
        return {
            "monitors": self._monitoring.states(),
            "replay_rows": adaptation.replay_rows if adaptation else 0,
            "fresh_rows": adaptation.fresh_rows if adaptation else 0,
            "rss_mb": self._resources.rss_mb(),
        }

    # ---- people

    def rollback(self) -> Version:
        """Go back to the version that served before the last change.

        Raises:
            RollbackRefusedError: There is none.
        """
        with self._step_lock:
            current = self._model().version
            return self._left(current, self._slots.rollback(), "asked for", self._clock.now())

    def reset_to_base(self) -> Version:
        """Drop the personal head: serve the one that came with the release."""
        with self._step_lock:
            current = self._model().version
            if current.head == 0:
                return current
            return self._left(current, self._slots.promote(0), "reset to the release's own head", self._clock.now())

    def _left(self, before: Version, version: Version, reason: str, now: float) -> Version:
        if before.digest != version.digest:
            self._upgrade.why = reason
        else:
            if self._adaptation is not None:
                self._adaptation.abandon(now)
            with self._store.transaction():
                self._reporter.emit("head_rolled_back", {"reason": reason, "to": version.head})
        self._swap(now)
        return version

    def learn_now(self) -> None:
        """Learn at the next step for which there are enough new labelled rows, cool-down or not."""
        with self._step_lock:
            if self._adaptation is None:
                raise ModelError("no release is installed yet: there is nothing to learn on")
            self._adaptation.demand()

    def label_requests(self, count: int) -> list[LabelRequest]:
        """Ask which predictions' labels would be worth most; answer with `observe`.

        Rows that were predicted since the last step are not among them.

        Args:
            count: Most of them; the day's budget (`feedback.requests_per_day`) may leave fewer.
        """
        with self._step_lock:
            adaptation, served = self._adaptation, self._model()
            if adaptation is None or adaptation.experience is None:
                return []
            return self._asking.ask(
                count,
                self._clock.now(),
                experience=adaptation.experience,
                head=self._slots.head(served.version),
                manifest=served.manifest,
            )

    def forget(self, ids: Sequence[str]) -> int:
        """Erase everything kept of these predictions: rows that wait, samples, and what they added to statistics.

        A challenger that knows one of them is given up. What a head in use has learned stays in its weights, and what
        the replay buffer had already dropped stays in sums over many rows: `forget_all` gives up both. Samples given to
        `learn` have no id, and only `forget_all` erases them.

        Args:
            ids: Of predictions.

        Returns:
            How many rows were erased.

        Raises:
            LabelError: They are not a list of ids.
            StoreError: They could not all be erased; call it again.
        """
        if isinstance(ids, str):
            raise LabelError(f"give a list of ids, got the string {ids!r:.80}")
        names = {checked_id(name) for name in ids}
        with self._step_lock:
            self._write(self._clock.now())
            found = self._store.samples_of(sorted(names))
            if self._adaptation is not None and found:
                self._adaptation.erase(found, self._clock.now(), unlearn=True)
            with self._store.transaction():
                waiting = self._store.take_rows(sorted(names))
                self._asking.forget(names)
                self._store.record(self._clock.now(), "forgotten", {"rows": len(found) + len(waiting)})
            self._store.compact()
            return len(found) + len(waiting) + self._pending.forget(names)

    def forget_all(self) -> Version:
        """Erase every labelled sample, what was summed up of them, and the personal head: as new on its release.

        Raises:
            ModelError: No release is installed yet: there is nothing to forget.
            StoreError: They could not all be erased; call it again.
        """
        with self._step_lock:
            self._model()
            self._write(self._clock.now())
            self.reset_to_base()
            version = self._slots.forget_heads()
            with self._store.transaction():
                gone = self._store.trim_rows(older_than=math.inf, max_bytes=1)
                self._asking.forget({*gone})
            self._pending.release(gone)
            if self._adaptation is not None:
                self._adaptation.erase_all(self._clock.now())
            self._store.compact()
            return version

    def _write(self, now: float) -> None:
        """What is in memory goes to the disk before any of it is erased there, or it would be written later.

        Not a whole `step`: that would learn from what is to be forgotten.
        """
        joined = self._flush(now)
        self._asking.turn(now, joined.ids if joined else [])

    def accept_label(self, label: str) -> None:
        """A new label that samples ask for (`status().new_labels`) may be learned (`learn.new_labels = "ask"`)."""
        self._decide_label(label, accept=True)

    def refuse_label(self, label: str) -> None:
        """A new label is none: its samples are erased, and further ones refused."""
        self._decide_label(label, accept=False)

    def _decide_label(self, label: str, *, accept: bool) -> None:
        with self._step_lock:
            if self._adaptation is None:
                raise ModelError("no release is installed yet: there is nothing to learn on")
            if label in self._model().labels:
                raise LabelError(f"{label!r} is one of the model's labels already")
            self.step()
            self._adaptation.decide_label(label, self._clock.now(), accept=accept)
            self._front.refused = frozenset(self._adaptation.state.refused)

    def skew(self) -> Skew:
        """Scores of the personal head on the rows it was trained on, on judge rows, and in use; see `edge_sdk.skew`."""
        with self._step_lock:
            return self._adaptation.state.skew if self._adaptation else Skew()

    def lineage(self, *, limit: int = 100) -> list[Lineage]:
        """How each head came to be, or why it did not, oldest first."""
        with self._step_lock:
            return self._store.lineage(limit=limit)

    def status(self) -> Status:
        """How the device is."""
        with self._step_lock:
            served, adaptation = self._served, self._adaptation
            fetching = self._upgrade.client.fetching
            return Status(
                device=self.name,
                mode=self.mode,
                ready=self.ready,
                release=served.version.release if served else 0,
                head=served.version.head if served else 0,
                labels=list(served.labels) if served else [],
                variant=served.variant if served else "",
                variant_reason=self._upgrade.variant(served.version).reason if served else "",
                phase=adaptation.state.phase if adaptation else "idle",
                waits=adaptation.state.waits if adaptation else "",
                release_on_probation=self._upgrade.state.watching,
                alarms=self._monitoring.alarms,
                warnings=self._monitoring.warnings,
                accuracy=adaptation.accuracy if adaptation else None,
                fresh_rows=adaptation.fresh_rows if adaptation else 0,
                replay_rows=adaptation.replay_rows if adaptation else 0,
                judge_rows=adaptation.judge_rows if adaptation else 0,
                asked=self._asking.waiting,
                new_labels=adaptation.new_labels if adaptation else {},
                connected=self.connected,
                outbox_rows=self._reporter.outbox.pending,
                fetching=fetching.release if fetching else None,
                problem=self._problem,
                counters=msgspec.structs.replace(self._reporter.counters),
            )

    def history(self, *, limit: int = 100, after: int = 0) -> list[HistoryEntry]:
        """What happened, oldest first."""
        with self._step_lock:
            return self._store.history(limit=limit, after=after)

    def waits_for(self, revision: int) -> str:
        """What of the network this device still waits for, or "": for simulations and tests, which must know.

        Args:
            revision: Of the desired state that it should have heard of.
        """
        with self._step_lock:
            pending, client = self._reporter.outbox.pending, self._upgrade.client
            if pending:
                return f"{pending} acknowledgements"
            if not self._reporter.connected:
                return ""
            if client.fetching is not None:
                return f"release {client.fetching.release}"
            heard = client.desired.revision if client.desired else 0
            return "" if heard >= revision else f"desired state {revision}, has {heard}"

    # ---- running

    def connect(self) -> None:
        """Connect to the broker and listen. `start` does it too; simulations call it alone."""
        self._reporter.connect()

    def start(self) -> None:
        """Connect, and run `step` in a thread of its own until `stop`."""
        if self._thread is None:
            self.connect()
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name=f"edge-{self.name}", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Flush, say goodbye and close. Whatever was observed before is on disk afterwards. Twice is once."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._step_lock:
            if self._stopped:
                return
            self._stopped = True
            with self._files:
                self.step()
                self._executor.cancel()
                try:
                    with self._store.transaction():
                        self._monitoring.save(self._clock.now())
                        self._upgrade.save()
                        if self._adaptation is not None:
                            self._adaptation.save()  # the last flush was seen after its own transaction
                        self._store.put(STATUS_KEY, msgspec.json.encode(self.status()))
                except StoreError as error:
                    logger.error("%s: the last evidence was not saved: %s", self.name, error)  # noqa: TRY400
                self._reporter.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            pause = self.config.flush_interval_s
            try:
                self.step()
                if self._upgrade.client.fetching is not None and self.connected:
                    pause = min(pause, _BUSY_S)  # blocks are coming: ask for the next ones soon
            except Exception:  # a thread that dies silently would be worse
                logger.exception("%s: a step failed; serving goes on", self.name)
                self._problem = "a step failed; see the log"
            self._stop.wait(pause)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


@contextmanager
def _recorded(problems: list[str]) -> Iterator[None]:
    """What fails inside is noted; it is tried again at the next turn."""
    try:
        yield
    except (EdgeError, OSError) as error:
        problems.append(str(error))
    except Exception as error:  # a bug in one part must not keep the others from their turn
        logger.exception("an error that nobody foresaw")
        problems.append(f"{type(error).__name__}: {error}")
