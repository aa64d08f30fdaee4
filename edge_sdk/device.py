"""The device as an app sees it: predictions out, truths in, and whatever a person wants of it.

`predict` and `observe` touch memory only. `step` alone touches the database, files and the network: one turn of
`Maintenance`, which owns the order of things. `with device:` runs a thread that only calls `step`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args
from weakref import WeakValueDictionary

import msgspec
import numpy as np

from edge_sdk.adapt import Adaptation
from edge_sdk.ask import LabelRequest
from edge_sdk.clock import Clock, SystemClock
from edge_sdk.commands import Desk, Handlers
from edge_sdk.config import DeviceConfig, check_config
from edge_sdk.errors import ConfigError, LabelError, ModelError, StoppedError, StoreError
from edge_sdk.files import lock_folder, storage_error
from edge_sdk.front import checked_id
from edge_sdk.identity import renew
from edge_sdk.labelling import LabellingFunctions
from edge_sdk.learn.base import check_learner_name
from edge_sdk.learn.executor import LearnExecutor, new_executor
from edge_sdk.maintenance import Maintenance
from edge_sdk.model import Arrays, Trunks
from edge_sdk.policy import check_policy
from edge_sdk.reporter import Counters
from edge_sdk.resources import PsutilReader, ResourceReader, SafeReader
from edge_sdk.seal import Seal
from edge_sdk.serving import Served
from edge_sdk.skew import Skew
from edge_sdk.slots import Slots, Version
from edge_sdk.status import Status, StepReport, diagnostics, told_status, told_version
from edge_sdk.store import HistoryEntry, Lineage, Store
from edge_sdk.transport import NoTransport, Transport
from edge_sdk.types import DoubleArray, Mode, Prediction, Truth

logger = logging.getLogger(__name__)
_BUSY_S = 0.02


class EdgeDevice:
    """One device.

    Args:
        home: Folder of its own for database, releases and learned heads; made if it is missing.
        checkpoint: A base checkpoint to start with, and to go to whenever it is newer than the one in use. Without
            one the first release comes from the coordinator.
        config: Settings.
        transport: Connection to the broker; None: as configured, and where no broker is, the device works alone.
        clock: Source of time.
        executor: Where learning runs; None: as configured.
        resources: What the machine can spare.
        trunks: Loaded trunks to share with other devices of this process.
        labelling: Rules that label samples, for `apply_rules`.
        rng: Source of chance for names; None: the system's.

    Raises:
        ConfigError: A setting is impossible.
        ArtifactError: The checkpoint is damaged or does not fit, and nothing else can be served.
        StoreError: The database cannot be opened, or the version in use not read for now: a full disk, too many open
            files. A retry helps.

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
        self.config = check_config(config or DeviceConfig())
        check_policy(self.config)
        check_learner_name(self.config.learn.learner)
        self.name = self.config.device
        self._home = Path(home)
        self._clock = clock or SystemClock()
        self._labelling = labelling
        self._step_lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._stop, self._wake = threading.Event(), threading.Event()
        self._stopped = False
        self._owner = os.getpid()

        try:
            self._home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"{self._home} cannot be made") from error
        with ExitStack() as opened:
            opened.enter_context(lock_folder(self._home))
            key_file = self.config.update.inputs_key_file
            seal = Seal(self._home / key_file) if key_file else None
            self._store = Store(self._home / "edge.db", durability=self.config.durability, seal=seal)
            opened.callback(self._store.close)
            self._slots = Slots(self._home / "slots")
            self._slots.collect_garbage()
            self._maintenance = Maintenance(
                self._home,
                store=self._store,
                slots=self._slots,
                config=self.config,
                transport=transport or _configured_transport(self.config, self._home),
                clock=self._clock,
                executor=executor or new_executor(self.config.learn.executor),
                resources=SafeReader(resources or PsutilReader(), self._clock),
                trunks=WeakValueDictionary() if trunks is None else trunks,  # what no version serves is freed
                rng=rng,
            )
            self._front, self._reporter = self._maintenance.front, self._maintenance.reporter
            self._desk = Desk(self._store, device=self.name, key=self.config.command_key, emit=self._reporter.emit)
            self.store_id, self.boot = self._maintenance.store_id, self._maintenance.boot
            try:
                self._maintenance.start(None if checkpoint is None else Path(checkpoint), self._clock.now())
            except OSError as error:
                raise storage_error(error, f"{error.filename or self._home} cannot be used") from error
            self._files = opened.pop_all()
            """The database and the folder's lock, open until `stop`."""

    @property
    def _served(self) -> Served | None:
        return self._maintenance.served

    @property
    def _adaptation(self) -> Adaptation | None:
        return self._maintenance.adaptation

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
        if mode not in get_args(Mode):
            raise ConfigError(f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r:.80}")
        self._reporter.mode = mode

    @property
    def version(self) -> Version | None:
        """The release in use and the head on it; None while there is none."""
        return self._served.version if self._served else None

    @property
    def counters(self) -> Counters:
        """Totals since the database was made, as in `status`."""
        with self._step_lock:
            return msgspec.structs.replace(self._reporter.counters)

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
            StoppedError: The device was stopped.
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
            StoppedError: The device was stopped.
            StoreError: `durable`, and it could not be written in time; it is kept and tried again.
        """
        self._front.observe(self._model(), id, truth, source)
        if durable:
            self._wait_for_flush(timeout_s)

    def record(self, name: str, value: float) -> None:
        """Record a value of one of the app's own metrics: a click, a basket, a minute of down-time. Thread-safe.

        Metrics are reported as summaries, may call for learning and may roll back what made them worse, as
        `[metrics.NAME]` says.

        Args:
            name: At most 64 characters; at most 32 names.
            value: Any finite number within the metric's `low` and `high`.

        Raises:
            InputError: The name is none, or one too many; the value is not finite or out of range.
        """
        self._maintenance.metrics.record(name, value)

    def scores(self) -> dict[str, Any]:
        """Running scores of labelled predictions, by class and slice, see `drift.performance.Prequential.scores`."""
        with self._step_lock:
            return self._maintenance.monitoring.scores

    def reward(self, id: str, value: float, *, source: str = "") -> None:  # noqa: A002
        """Say how right a prediction proved, without knowing the truth: clicked, accepted, ignored. Thread-safe.

        It is learned from, in proportion to how clear it is, and never judges. A truth that is observed later takes its
        place; if it was learned from by then, the truth is counted under `late_truths`, and learned from as well if it
        says something else. A second reward is a `duplicate`.

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

        Their label is learned from, weighted by the share of the votes that it got, and never judges. A
        truth takes its place, as that of a reward.

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

    def mean_error(self, x: Any, y: Sequence[Truth]) -> DoubleArray:
        """By how much the version in use is off: mean absolute error of each target of a regression, in its units.

        Args:
            x: As for `evaluate`; neither logged nor learned from.
            y: A number for each sample, or one for each target.

        Returns:
            float64 [T].

        Raises:
            InputError, LabelError, ModelError: As `evaluate`, and LabelError if the model predicts no numbers.
        """
        return self._front.mean_error(self._model(), x, y)

    def _model(self) -> Served:
        if self._served is None:
            raise ModelError("no release is installed yet: give a checkpoint, or wait for the coordinator's first one")
        return self._served

    def _wait_for_flush(self, timeout_s: float) -> None:
        if self._thread is None or self._thread is threading.current_thread():
            self.step()
            done = not self._maintenance.joiner.unsaved
        else:
            done = self._maintenance.wait_for_flush(timeout_s, self._wake.set)
        if not done:
            problem = self._maintenance.problem or f"no flush within {timeout_s:g} s"
            raise StoreError(f"the label is not on disk yet: {problem}; it is kept and tried again")

    # ---- the turn

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Alone with the database, which is open.

        Raises:
            StoppedError: It is closed.
        """
        if os.getpid() != self._owner:
            raise StoppedError(f"this process was forked from the one that owns {self.name}; make the device here")
        with self._step_lock:
            if self._stopped:
                raise StoppedError(f"{self.name} was stopped; make another EdgeDevice on {self._home}")
            yield

    def step(self) -> StepReport:
        """Take one maintenance turn: flush, listen, update, learn, report, send.

        What fails is recorded in the report and in the status, and the other parts go on.
        """
        with self._open():
            report = self._maintenance.turn(self._clock.now())
            self._obey()
            return report

    def _obey(self) -> None:
        """Carry out what the coordinator has ordered."""
        reporter, now = self._reporter, self._clock.now()
        orders = reporter.take_orders()
        if not orders and not self._desk.unfinished:
            return
        try:
            reporter.counters.bad_messages += self._desk.turn(orders, now, self._handlers(now))
        except StoreError as error:
            logger.warning("%s: a command could not be kept; it will come again: %s", self.name, error)

    def _handlers(self, now: float) -> Handlers:
        stand, least = self._reporter.stand, self.config.report.min_count
        return {
            "adapt-now": lambda _: self.learn_now(),
            "roll-back": lambda _: told_version(self.rollback()),
            "reset-to-base": lambda _: told_version(self.reset_to_base()),
            "pause-learning": lambda args: stand(paused=True, paused_at=now, paused_s=args.seconds),
            "resume-learning": lambda _: stand(paused=False),
            "report-interval": lambda args: stand(interval_s=args.seconds),
            "mode": lambda args: stand(mode=args.mode),
            "status": lambda _: told_status(self.status(), min_count=least),
            "diagnostics": lambda _: diagnostics(self._home, self._maintenance.read_resources(), boot=self.boot),
            "renew-certificate": lambda args: renew(self._home, self.config.broker, args.certificate),
        }

    # ---- people

    def rollback(self) -> Version:
        """Go back to the version that served before the last change.

        Raises:
            RollbackRefusedError: There is none.
        """
        with self._open():
            current = self._model().version
            return self._maintenance.leave(current, self._slots.rollback(), "asked for", self._clock.now())

    def reset_to_base(self) -> Version:
        """Drop the personal head: serve the one that came with the release."""
        with self._open():
            current = self._model().version
            if current.head == 0:
                return current
            reason, now = "reset to the release's own head", self._clock.now()
            return self._maintenance.leave(current, self._slots.promote(0), reason, now)

    def learn_now(self) -> None:
        """Learn at the next step for which there are enough new labelled rows, cool-down or not."""
        with self._open():
            if self._adaptation is None:
                raise ModelError("no release is installed yet: there is nothing to learn on")
            self._adaptation.demand()

    def label_requests(self, count: int) -> list[LabelRequest]:
        """Ask which predictions' labels would be worth most; answer with `observe`.

        Rows that were predicted since the last step are not among them.

        Args:
            count: Most of them; the day's budget (`feedback.requests_per_day`) may leave fewer.
        """
        with self._open():
            adaptation, served = self._adaptation, self._model()
            if adaptation is None or adaptation.experience is None:
                return []
            return self._maintenance.asking.ask(
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
        with self._open():
            return self._maintenance.erase(names, self._clock.now())

    def forget_all(self) -> Version:
        """Erase every labelled sample, what was summed up of them, and the personal head: as new on its release.

        Raises:
            ModelError: No release is installed yet: there is nothing to forget.
            StoreError: They could not all be erased; call it again.
        """
        with self._open():
            self._model()
            self._maintenance.write(self._clock.now())
            self.reset_to_base()
            version = self._slots.forget_heads()
            self._maintenance.erase_all(self._clock.now())
            return version

    def accept_label(self, label: str) -> None:
        """A new label that samples ask for (`status().new_labels`) may be learned (`learn.new_labels = "ask"`)."""
        self._decide_label(label, accept=True)

    def refuse_label(self, label: str) -> None:
        """A new label is none: its samples are erased, and further ones refused."""
        self._decide_label(label, accept=False)

    def _decide_label(self, label: str, *, accept: bool) -> None:
        if not isinstance(label, str) or not label:
            raise LabelError(f"a label is a string that is not empty, got {label!r:.80}")
        with self._open():
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
        with self._open():
            return self._store.lineage(limit=limit)

    def status(self) -> Status:
        """How the device is."""
        with self._open():
            return self._maintenance.status()

    def history(self, *, limit: int = 100, after: int = 0) -> list[HistoryEntry]:
        """What happened, oldest first."""
        with self._open():
            return self._store.history(limit=limit, after=after)

    def waits_for(self, revision: int) -> str:
        """What of the network this device still waits for, or "": for simulations and tests, which must know.

        Args:
            revision: Of the desired state that it should have heard of.
        """
        with self._step_lock:
            pending, client = self._reporter.outbox.pending, self._maintenance.upgrade.client
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
        """Connect, and run `step` in a thread of its own until `stop`.

        Raises:
            StoppedError: It was stopped before.
        """
        with self._open():
            if self._thread is not None:
                return
            self.connect()
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name=f"edge-{self.name}", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Flush, say goodbye and close. Whatever was observed before is on disk afterwards. Twice is once.

        Raises:
            StoreError: It is closed, but the disk did not take what was predicted and observed since the last flush.
        """
        if os.getpid() != self._owner:
            return  # the process that this one was forked from has it
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._step_lock:
            if self._stopped:
                return
            try:
                with self._files:
                    self._maintenance.pending.close()
                    self.step()
                    self._maintenance.close(self._clock.now())
            finally:
                self._stopped = True
            if lost := self._maintenance.joiner.lost_now():
                raise StoreError(f"{self.name} is stopped, and {lost} are lost: {self._maintenance.problem}")

    def _run(self) -> None:
        while True:
            self._wake.clear()  # first: what asks for a turn from now on gets another, and a stop is seen
            if self._stop.is_set():
                return
            pause = self.config.flush_interval_s
            try:
                self.step()
                if self._maintenance.upgrade.client.fetching is not None and self.connected:
                    pause = min(pause, _BUSY_S)  # blocks are coming: ask for the next ones soon
            except Exception:  # a thread that dies silently would be worse
                logger.exception("%s: a step failed; serving goes on", self.name)
                self._maintenance.problem = "a step failed; see the log"
            self._wake.wait(pause)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except StoreError as problem:
            if error is None:
                raise
            logger.error("%s", problem)  # noqa: TRY400 - the app's own error goes on


def _configured_transport(config: DeviceConfig, home: Path) -> Transport:
    if not config.broker.host:
        return NoTransport()
    from edge_sdk.mqtt import new_transport  # noqa: PLC0415 - a device that works alone loads no network library

    return new_transport(config, home)
