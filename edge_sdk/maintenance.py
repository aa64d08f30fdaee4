"""What keeps a device going: loads versions, swaps them, and takes one turn at a time, in this order of things.

The app's threads meanwhile reach `front` and the served version, which are memory only.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np

from edge_sdk.adapt import Adaptation
from edge_sdk.asking import Asking
from edge_sdk.clock import Clock, is_due
from edge_sdk.config import DeviceConfig
from edge_sdk.errors import ArtifactError, EdgeError, IntegrityError, ModelError, RollbackRefusedError, StoreError
from edge_sdk.files import is_damage
from edge_sdk.front import Front
from edge_sdk.join import Joined, Joiner
from edge_sdk.learn.executor import LearnExecutor
from edge_sdk.manifest import verify_checkpoint
from edge_sdk.memory import trim_memory
from edge_sdk.messages import Topics
from edge_sdk.metrics import Metrics
from edge_sdk.model import Trunks
from edge_sdk.monitoring import Monitoring
from edge_sdk.pending import Pending
from edge_sdk.policy import ResourceState
from edge_sdk.progress import saved_state
from edge_sdk.reporter import Identity, Reporter
from edge_sdk.resources import SafeReader
from edge_sdk.selftest import read_choice
from edge_sdk.serving import Served, load_served
from edge_sdk.shadow import A_FLUSH, as_stored
from edge_sdk.slots import Slots, Version
from edge_sdk.status import STATUS_KEY, Status, StepReport
from edge_sdk.store import Store
from edge_sdk.transport import NoTransport, Transport
from edge_sdk.trust import Listening, load_trust
from edge_sdk.types import AnyArray
from edge_sdk.update import UpdateClient
from edge_sdk.upgrade import Upgrade

logger = logging.getLogger(__name__)
_SAVE_S = 60.0
_DIAGNOSE_S = 3_600.0
"""How old the diagnosis in the saved status may be while the same alarms are up: it takes milliseconds to make."""


class Maintenance:
    """Owns the version in use and all that works on it. One caller at a time.

    Args:
        home: The device's folder.
        store: Its database.
        slots: The versions on disk.
        config: Settings.
        transport: Connection to the broker.
        clock: Source of time.
        executor: Where learning runs.
        resources: What the machine can spare.
        trunks: Loaded trunks to share with other devices of this process.
        rng: Source of chance for names; None: the system's.
    """

    def __init__(
        self,
        home: Path,
        *,
        store: Store,
        slots: Slots,
        config: DeviceConfig,
        transport: Transport,
        clock: Clock,
        executor: LearnExecutor,
        resources: SafeReader,
        trunks: Trunks,
        rng: np.random.Generator | None,
    ) -> None:
        self._name, self._home = config.device, home
        self._store, self._slots, self._config = store, slots, config
        self._executor, self._resources, self._trunks = executor, resources, trunks
        self._flushed = threading.Condition()
        self._begun = self._done = 0
        self._saved_at = 0.0
        self._told_at = 0.0
        self._told_of: Version | None = None
        """When `edge status` was last told, and of which version."""
        self._taken_up: Version | None = None
        self._diagnosed: tuple[list[str], float, str] = [], -math.inf, ""
        """Alarms, when they were last diagnosed, and what came of it."""
        self.problem = ""
        """What could not be done in the last turn."""
        self.served: Served | None = None
        """The version in use: one reference, which may be read at any time."""
        self.adaptation: Adaptation | None = None
        """Learning on it."""
        self._open(transport, clock, rng)

    def _open(self, transport: Transport, clock: Clock, rng: np.random.Generator | None) -> None:
        """Continue where the database says the device was."""
        with self._store.transaction():
            store_id = self._store.get("store_id") or (rng.bytes(8) if rng else os.urandom(8)).hex().encode()
            self.boot = int(self._store.get("boot") or b"0") + 1
            self._store.put("store_id", store_id)
            self._store.put("boot", str(self.boot).encode())
            died = self._store.get("open") == b"1"
            self._store.put("open", b"1")
        self.store_id = store_id.decode()
        prefix = f"{self.store_id[:8]}-"
        join = self._config.join
        self.pending = Pending(join.max_pending, f"{prefix}{self.boot}-", max_bytes=join.max_pending_bytes)
        self.pending.reserve(self._store.waiting_ids(not_like=prefix))
        self._clock, self._trust = clock, load_trust(self._home, self._config.update.trust)
        if self._trust is not None and not isinstance(transport, NoTransport):
            transport = Listening(transport, Topics(self._config.prefix), self._trust)
        self.front = Front(self.pending, clock, self._config)
        self.joiner = Joiner(self._store, self.pending, self._config)
        self.reporter = Reporter(
            self._store,
            store_id=self.store_id,
            boot=self.boot,
            transport=transport,
            clock=clock,
            config=self._config,
            hardware=self._resources.hardware(),
        )
        emit = self.reporter.emit
        if (current := self._slots.pointer.current) is not None:
            self.reporter.identity = Identity(current.release, current.head, current.digest)
        if died:
            with self._store.transaction():
                emit("crashed", {"boot": self.boot})
        if self._store.replaced:
            with self._store.transaction():
                emit("store_lost", {"reason": "the database was damaged; it was put aside and begun anew"})
        self.asking = Asking(self._store, self._config, emit)
        self.monitoring = Monitoring(self._store, self._config.drift, emit)
        self.metrics = Metrics(self._config.metrics)
        self._summed_up_at = clock.now()
        self._chance = Random(rng.bytes(8) if rng else os.urandom(8))  # noqa: S311 - rounds counts
        if (saved := self._store.get("metrics")) is not None:
            try:
                self.metrics.restore(saved)
            except IntegrityError as error:
                logger.warning("%s: what the app recorded before is lost: %s", self._name, error)
        client = UpdateClient(
            self._home / "incoming",
            device=self._name,
            topics=self.reporter.topics,
            transport=transport,
            config=self._config.update,
            trust=self._trust,
            group=self._config.group,
        )
        self.upgrade = Upgrade(
            store=self._store,
            slots=self._slots,
            client=client,
            config=self._config,
            emit=emit,
            executor=self._executor,
            trunks=self._trunks,
        )
        self._set_inputs()

    # ---- loading

    def start(self, checkpoint: Path | None, now: float) -> None:
        """Load what serves, or install the checkpoint that came with the app if it is newer or nothing else works."""
        self.upgrade.count_boot()
        self._count_boot()
        installed = self._slots.pointer.current
        try:
            self._load_or_go_back(now)
        except (EdgeError, OSError) as error:
            if checkpoint is None or not is_damage(error):
                raise
        if checkpoint is None:
            return
        current = self.served.version if self.served else None
        # a release that was left stays left, unless only its files here were damaged: the app brings them anew
        left = {} if current != installed else self.upgrade.state.refused
        try:
            self.upgrade.install_folder(checkpoint, self.adaptation, current, left)
            self._set_inputs()
            self._swap(now)
        except (ArtifactError, ModelError) as error:
            if self.served is None:
                raise
            self.upgrade.note_refusal(error)

    def _count_boot(self) -> None:
        """Note a start on a head on probation; one that keeps crashing the app is left, before it is loaded."""
        if saved_state(self._store).phase != "probation" or self.upgrade.state.watching:
            return
        if self._slots.count_boot() > self._config.gate.max_boots:
            logger.error("%s: the head in use is left: too many starts without a healthy step", self._name)
            with suppress(RollbackRefusedError):
                self._slots.rollback()

    def _load_or_go_back(self, now: float) -> None:
        """Serve the version in use; one that is damaged is left for the one before.

        Raises:
            EdgeError, OSError: It is damaged, and so is the one before, or there is none.
            StoreError: It cannot be read for now.
        """
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
            self.served = loaded
            self._swap(now)
        except (EdgeError, OSError) as error:
            if not is_damage(error):
                raise StoreError(f"the version in use cannot be read for now: {error}") from error
            logger.error("%s: the version in use cannot be loaded: %s", self._name, error)  # noqa: TRY400 - no traceback
            # the version before may be another head on the same damaged release; the release before is not
            for go_back in (self._slots.rollback, self._slots.rollback_release, self.upgrade.take_shadow):
                with suppress(EdgeError, OSError):
                    version = go_back()
                    self._verify(version)
                    self.leave(current, version, f"cannot be loaded: {error}", now)
                    return
            raise

    def _verify(self, version: Version) -> None:
        folder = self._slots.folder(version)
        choice = read_choice(folder, self._slots.manifest(version))
        verify_checkpoint(folder, serves=None if choice is None else choice.variant)

    # ---- the turn

    def turn(self, now: float) -> StepReport:
        """Flush, listen, update, learn, report, send. What fails is noted, and the other parts go on."""
        before = self.served
        problems: list[str] = []
        with _recorded(problems):
            self._swap(now)
        joined = None
        with _recorded(problems):
            joined = self._flush(now)
        received = sent = 0
        with _recorded(problems):
            self.asking.turn(now, joined.ids if joined else [])
        with _recorded(problems):
            received = self.reporter.listen(self.upgrade.client)
        with _recorded(problems):
            self.upgrade.turn(now, self.adaptation)
            self._swap(now)
        with _recorded(problems):
            if self.adaptation is not None:
                self.adaptation.retain(now)
        with _recorded(problems):
            self._learn_turn(now)
            self._swap(now)
        with _recorded(problems):
            if self.reporter.report_due(now, lambda: self._resources.read().on_mains):
                self._report(now)
        with _recorded(problems):
            sent = self.reporter.send(now)
        if not problems:
            self._slots.clear_boots()
        self._note_problem("; ".join(problems))
        return StepReport(
            predictions=len(joined.rows) if joined else 0,
            labelled=len(joined.ids) if joined else 0,
            unmatched=joined.unmatched if joined else 0,
            received=received,
            sent=sent,
            swapped=self.served is not before,
            problem=self.problem,
        )

    def _note_problem(self, problem: str) -> None:
        if problem and problem != self.problem:
            logger.error("%s: %s", self._name, problem)
        self.problem = problem

    def _flush(self, now: float) -> Joined | None:
        """Memory to disk, in one transaction. What cannot be written stays in memory and is tried again.

        Monitors and probation see rows only once they are on disk, so that a second try counts nothing twice.
        """
        joined = None
        with self._flushed:
            self._begun += 1
        adaptation = self.adaptation
        self.joiner.requested = self.asking.waiting_ids
        self.joiner.judges_full = adaptation is not None and adaptation.judges_full
        self.joiner.on_trial = adaptation.known_to_challenger if adaptation is not None else frozenset()
        if self.joiner.drain() or is_due(now, self._saved_at, _SAVE_S):
            inputs = self.pending.held() if self.pending.most_inputs else {}
            with self._store.transaction():
                joined = self.joiner.write(now, self.served, self.reporter.counters, self.reporter.window)
                self._keep_inputs(joined, inputs)
                self._save(now, joined)
            self._saved_at = now
            self.joiner.written(joined)
            self.reporter.counters, self.reporter.window = joined.counters, joined.window
            if self.adaptation is not None:
                self.adaptation.see(joined.live, now, predictions=len(joined.rows), errors=joined.errors)
            self.upgrade.see([row.correct for row in joined.live], predictions=len(joined.rows), errors=joined.errors)
            self.monitoring.see(joined)
            if inputs:
                self._show_inputs(joined, inputs)
            self.upgrade.see_labels(joined.live)  # a label may come with its prediction
        self._set_inputs()
        self.metrics.fold()
        with self._flushed:
            self._done = self._begun
            self._flushed.notify_all()
        return joined

    def _set_inputs(self) -> None:
        """How many inputs `predict` leaves in memory: none, unless they are kept or a release is in shadow."""
        self.pending.most_inputs = max(self._config.update.keep_inputs, A_FLUSH if self.upgrade.wants_inputs else 0)

    def _keep_inputs(self, joined: Joined, inputs: Mapping[str, AnyArray]) -> None:
        """Keep the inputs of what was just labelled, where that is wanted; inside a transaction."""
        if keep := self._config.update.keep_inputs:
            known = [sample.id for sample in joined.samples if sample.id in inputs]
            self._store.add_inputs(((name, as_stored(inputs[name])) for name in known), keep=keep)

    def _show_inputs(self, joined: Joined, inputs: Mapping[str, AnyArray]) -> None:
        """Let the trunk in shadow see what was just predicted, and hold on to what may still be labelled."""
        self.pending.let_go(joined.ids if self._config.update.keep_inputs else inputs)
        if self.served is not None and self.upgrade.wants_inputs:
            self.upgrade.see_inputs(joined.rows, inputs, self.served.manifest.trunk_id)

    def wait_for_flush(self, timeout_s: float, wake: Callable[[], None]) -> bool:
        """Wait until what came before is on disk, while another thread takes turns; False: not in time.

        Args:
            timeout_s: How long at most.
            wake: Lets that thread take its next turn at once.
        """
        with self._flushed:
            goal = self._begun + 1  # one that is under way may have drained before it came
            wake()
            return self._flushed.wait_for(lambda: self._done >= goal, timeout_s)

    def _save(self, now: float, joined: Joined) -> None:
        """Counters, window and evidence; inside a transaction."""
        self._store.put("counters", msgspec.json.encode(joined.counters))
        self._store.put("window", msgspec.json.encode(joined.window))
        if self.adaptation is not None:
            self.adaptation.trim()
            self.adaptation.charge(now, flash_bytes=joined.written_bytes)
            self.adaptation.save()
        self.upgrade.save()
        if self.monitoring.save_if_due(now):
            self._store.put("metrics", self.metrics.to_bytes())
        version = self.served.version if self.served is not None else None
        if version != self._told_of or is_due(now, self._told_at, _SAVE_S):
            self._told_at, self._told_of = now, version
            self._save_status(now)

    def _save_status(self, now: float) -> None:
        """For `edge status`, which may run beside the device; inside a transaction."""
        alarms = self.monitoring.alarms
        told, at, _ = self._diagnosed
        if alarms != told or is_due(now, at, _DIAGNOSE_S):
            self._diagnosed = alarms, now, self.monitoring.diagnosis
        self._store.put(STATUS_KEY, msgspec.json.encode(self.status(diagnosis=self._diagnosed[2])))

    def _learn_turn(self, now: float) -> None:
        adaptation = self.adaptation
        if adaptation is None:
            return
        worse = self._worse_metric()
        self.upgrade.watch(now, worse)
        if self.upgrade.state.watching:
            return  # one change at a time: a release proves itself before anything is learned on it
        if self.upgrade.training:
            return  # one job at a time
        adaptation.turn(
            now,
            mode="monitor" if self.reporter.learning_paused(now) else self.reporter.mode,
            alarms=tuple(self.monitoring.alarms),
            changed_at=self.monitoring.changed_at,
            resources=self._resources.read(),
            metrics=tuple(self.metrics.triggers()),
            worse=worse,
        )

    def _worse_metric(self) -> str:
        """Which of the app's own metrics the version on probation has made worse; "" if none, or nothing is."""
        adaptation = self.adaptation
        watching = self.upgrade.state.watching or (adaptation is not None and adaptation.state.phase == "probation")
        if watching and not self.metrics.on_probation:
            self.metrics.begin_probation()
        elif self.metrics.on_probation and not watching:
            self.metrics.end_probation()
        return self.metrics.verdict(alpha=self._config.gate.alpha) if watching else ""

    def _swap(self, now: float) -> None:
        """Serve what the pointer says: built here, off the request path, then one reference is replaced.

        Serving comes first; what has to be written about it is tried again if there is no room.
        """
        current = self._slots.pointer.current
        if current is None:
            return
        if self.served is None or self.served.version != current:
            for key, trunk in self.upgrade.tested.items():
                self._trunks.setdefault(key, trunk)  # one that other devices share stays theirs
            self.served = self._load(current)
            self.upgrade.tested.clear()
        if self._taken_up != current:
            self._take_up(self.served, now)

    def _load(self, version: Version) -> Served:
        return load_served(self._slots, version, self.upgrade.variant(version).variant, self._trunks)

    def _take_up(self, served: Served, now: float) -> None:
        """Everything that follows from another version serving."""
        current, before = served.version, self._taken_up
        logger.info("%s serves release %d, head %d", self._name, current.release, current.head)
        self.reporter.serve(Identity(current.release, current.head, current.digest), now, **self._facts())
        if self.adaptation is None:
            self.adaptation = self._new_adaptation()
        self.upgrade.note_version(now, self.adaptation)
        self.adaptation.attach(current, served.manifest)
        if before is not None and self._config.report.summary_interval_s and not self.reporter.capped(now):
            self._sum_up(now, before)
        self.monitoring.attach(served, self._slots.folder(current), now)
        if before is not None:
            self.adaptation.forget_recent()
            if self.adaptation.state.phase != "probation":  # on probation it is the head that was just promoted
                self.adaptation.forget_learned()
        self.front.refused = frozenset(self.adaptation.state.refused)
        with self._store.transaction():
            unreadable = self._store.keep_trunks(self._slots.trunk_ids())
        self.pending.release(unreadable)
        self._slots.collect_garbage()
        self._taken_up = current
        self.reporter.tell_state()
        trim_memory()  # what loading took and gave up

    def _new_adaptation(self) -> Adaptation:
        return Adaptation(
            self._home / "learn",
            store=self._store,
            slots=self._slots,
            executor=self._executor,
            config=self._config,
            emit=self.reporter.emit,
        )

    # ---- telling

    def _report(self, now: float) -> None:
        self.reporter.report(now, carry=True, **self._facts())
        if (every := self._config.report.summary_interval_s) and is_due(now, self._summed_up_at, every):
            self._sum_up(now, self._taken_up)
        trim_memory()

    def _sum_up(self, now: float, version: Version | None) -> None:
        """Queue how inputs, outputs and the app's own metrics looked since the last time, as seen by `version`."""
        least, chance = self._config.report.min_count, self._chance
        message = self.monitoring.take_summary(
            end=now, release=version.release if version else 0, head=version.head if version else 0, min_count=least,
            metrics=self.metrics.take_window(min_count=least, chance=chance), chance=chance,
        )  # fmt: skip
        self._summed_up_at = now
        if message is not None:
            with self._store.transaction():
                self.reporter.queue(message, now)

    def _facts(self) -> dict[str, Any]:
        """What a report says beside what the reporter counts."""
        adaptation, machine = self.adaptation, self._resources.read()
        return {
            "monitors": self.monitoring.states(),
            "replay_rows": adaptation.replay_rows if adaptation else 0,
            "fresh_rows": adaptation.fresh_rows if adaptation else 0,
            "rss_mb": self._resources.rss_mb(),
            "temperature_c": machine.temperature_c,
            "disk_free_mb": self._resources.disk_free_mb(self._home),
            "memory_free_mb": machine.free_mb,
            "memory_total_mb": machine.total_mb,
            "scores": self.monitoring.scores,
            "shadow": self.upgrade.told_of_shadow(),
        }

    def read_resources(self) -> ResourceState:
        """What the machine can spare."""
        return self._resources.read()

    def status(self, *, diagnosis: str | None = None) -> Status:
        """How the device is; `diagnosis` as it is known, None: made now."""
        served, adaptation = self.served, self.adaptation
        fetching = self.upgrade.client.fetching
        return Status(
            device=self._name,
            mode=self.reporter.mode,
            ready=served is not None,
            release=served.version.release if served else 0,
            head=served.version.head if served else 0,
            labels=list(served.labels) if served else [],
            variant=served.variant if served else "",
            variant_reason=self.upgrade.variant(served.version).reason if served else "",
            phase=adaptation.state.phase if adaptation else "idle",
            waits=adaptation.state.waits if adaptation else "",
            release_on_probation=self.upgrade.state.watching,
            alarms=self.monitoring.alarms,
            warnings=self.monitoring.warnings,
            diagnosis=self.monitoring.diagnosis if diagnosis is None else diagnosis,
            estimated_accuracy=self.monitoring.estimate[0],
            metrics=self.metrics.means(),
            accuracy=adaptation.accuracy if adaptation else None,
            fresh_rows=adaptation.fresh_rows if adaptation else 0,
            replay_rows=adaptation.replay_rows if adaptation else 0,
            judge_rows=adaptation.judge_rows if adaptation else 0,
            asked=self.asking.waiting,
            new_labels=adaptation.new_labels if adaptation else {},
            connected=self.reporter.connected,
            outbox_rows=self.reporter.outbox.pending,
            fetching=fetching.release if fetching else None,
            problem=self.problem,
            counters=msgspec.structs.replace(self.reporter.counters),
            updates=self._trust.state(self._clock.now()) if self._trust else "unsigned",
            shadow=self.upgrade.shadow_status,
        )

    # ---- going back and forgetting

    def leave(self, before: Version, version: Version, reason: str, now: float) -> Version:
        """Serve a version that the pointer was just set back to.

        Args:
            before: What served until now.
            version: The other.
            reason: Why.
            now: Seconds since the epoch.
        """
        if before.digest != version.digest:
            self.upgrade.why = reason
        else:
            if self.adaptation is not None:
                self.adaptation.abandon(now)
            with self._store.transaction():
                self.reporter.emit("head_rolled_back", {"reason": reason, "to": version.head})
        self._swap(now)
        return version

    def write(self, now: float) -> None:
        """What is in memory goes to the disk before any of it is erased there, or it would be written later.

        Not a whole turn: that would learn from what is to be forgotten.
        """
        joined = self._flush(now)
        self.asking.turn(now, joined.ids if joined else [])

    def erase(self, ids: set[str], now: float) -> int:
        """Erase everything kept of these predictions; returns how many rows were."""
        self.write(now)
        found = self._store.samples_of(sorted(ids))
        if self.adaptation is not None and found:
            self.adaptation.erase(found, now, unlearn=True)
        with self._store.transaction():
            waiting = self._store.take_rows(sorted(ids))
            self._store.delete_pairs(sorted(ids))
            self.asking.forget(ids)
            self._store.record(now, "forgotten", {"rows": len(found) + len(waiting)})
        self._store.compact()
        return len(found) + len(waiting) + self.pending.forget(ids)

    def erase_all(self, now: float) -> None:
        """Erase all labelled samples and rows that wait, and what was summed up of them."""
        with self._store.transaction():
            gone = self._store.trim_rows(older_than=math.inf, max_bytes=1)
            self.asking.forget({*gone})
        self.pending.release(gone)
        self.pending.let_go(self.pending.held())
        if self.adaptation is not None:
            self.adaptation.erase_all(now)
        self._store.compact()

    # ---- the end

    def close(self, now: float) -> None:
        """Stop learning, keep the last evidence, and say goodbye."""
        self._executor.cancel()
        try:
            with self._store.transaction():
                self.monitoring.save(now)
                self._store.put("metrics", self.metrics.to_bytes())
                self._store.put("open", b"")
                self.upgrade.save()
                if self.adaptation is not None:
                    self.adaptation.save()  # the last flush was seen after its own transaction
                self._save_status(now)
        except StoreError as error:
            logger.error("%s: the last evidence was not saved: %s", self._name, error)  # noqa: TRY400
        self.reporter.close()


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
