"""The learning transaction: decide, train, judge, promote or reject, watch, confirm or roll back.

One of these runs at a time. Its state is one record in the database, so that a restart continues where it was, and
every step leaves the champion serving until the pointer has been flipped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_sdk.config import DeviceConfig
from edge_sdk.errors import EdgeError
from edge_sdk.experience import Chosen, Experience, Learnable
from edge_sdk.gate import ProbationVerdict
from edge_sdk.head import Head
from edge_sdk.join import Judged
from edge_sdk.learn.executor import LearnExecutor
from edge_sdk.manifest import Manifest
from edge_sdk.memory import trim_memory
from edge_sdk.outcomes import Outcomes
from edge_sdk.policy import Decision, ResourceState, Signals, decide, obstacle, spend
from edge_sdk.progress import Phase, saved_state
from edge_sdk.skew import Skew
from edge_sdk.slots import Slots, Version
from edge_sdk.store import Sample, Store
from edge_sdk.training import Training
from edge_sdk.trial import Trial, head_outcomes, judge_probation, without_small_scores
from edge_sdk.types import Mode

logger = logging.getLogger(__name__)

Emit = Callable[[str, dict[str, Any]], None]
_CHOSEN = "chosen"
_DAY_S = 86_400.0
_RETAIN_S = 3_600.0


class Adaptation:
    """Owns the transaction.

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
        self._store, self._slots, self._config, self._emit = store, slots, config, emit
        self._training = Training(folder / "job", executor, config.learn)
        chosen = store.get(_CHOSEN)
        self.state = saved_state(store)
        self._chosen = msgspec.json.decode(chosen, type=Chosen) if chosen else Chosen()
        self.experience: Experience | None = None
        """The rows of the release in use; None if it is served and not learned on."""
        self._trial: Trial | None = None
        self._head: Head | None = None
        self._before: Head | None = None
        self._judged_up_to = -1
        self._since = 0.0
        self._traces = True
        """What was erased by age, perhaps before a restart, may still be in the database's log."""
        if self.state.phase == "training":  # the child died with us
            self._begin("idle", now=self.state.since)
            self._training.discard()

    # ---- the release in use

    def attach(self, version: Version, manifest: Manifest) -> None:
        """Work on a version: its labelled rows, its head, and what it must not forget.

        Of one that is not learned on, only the live accuracy is kept.
        """
        folder = self._slots.folder(version)
        self._version, self._manifest = version, manifest
        self._head = self._before = self._trial = self.experience = None
        self._judged_up_to = -1
        if not manifest.learns:
            self._begin("idle", now=self.state.since)
            self.state.waits = f"adapt={manifest.adapt}, task={manifest.task}: this release is served, not learned on"
            return
        seed = (self._config.seed, self.state.attempts, version.release)
        experience = Experience(self._store, self._config, manifest, folder, seed=seed)
        self._head = self._slots.head(version)
        self._recover(version, experience)
        self._trial = Trial(version, manifest, experience, slots=self._slots, config=self._config)
        self.experience = experience  # once all is recorded: before, no turn may be taken

    def _recover(self, version: Version, experience: Experience) -> None:
        """Record what the pointer says was done, if a kill or a full disk kept that from being recorded."""
        state, previous = self.state, self._slots.pointer.previous
        promoted = bool(version.head) and previous == state.parent  # no other change leaves it so
        if state.phase == "judging" and promoted:
            with self._transition():
                self._promoted(version.head, {"reason": state.reason, "recovered": True}, experience, now=state.since)
                self._emit("promoted", {"to": version.head, "trigger": state.reason, "recovered": True})
        elif (state.phase == "judging" and state.parent != version) or (state.phase == "probation" and not promoted):
            with self._transition():
                if state.phase == "probation" and not self._rollback_is_recorded():
                    experience.unfold()
                    self._emit("head_rolled_back", {"reason": "on probation", "to": version.head, "recovered": True})
                state.last_ended = state.since
                self._begin("idle", now=state.since)
        if self.state.phase == "probation" and previous is not None:
            self._before = self._slots.head(previous)

    def _rollback_is_recorded(self) -> bool:
        since = self.state.since
        return any(e.name == "head_rolled_back" and e.time >= since for e in self._store.history(limit=100))

    def abandon(self, now: float) -> None:
        """Stop whatever runs: another release takes over. Fresh rows stay for the next time."""
        self._training.cancel()
        self._training.discard()
        self._begin("idle", now=now)
        self.state.last_ended, self.state.superseded = None, 0

    @property
    def fresh_rows(self) -> int:
        """Labelled samples not learned from yet."""
        return self.experience.fresh_rows() if self.experience else 0

    @property
    def accuracy(self) -> float | None:
        """Live accuracy over the latest labels, or None below 30 of them."""
        return self.state.accuracy

    def see(self, rows: list[Judged], now: float, *, predictions: int, errors: int) -> None:
        """Take note of what the version in use did: live labelled rows, and counts."""
        state, probation = self.state, self.state.phase == "probation"
        if probation:
            state.predictions += predictions
            state.errors += errors
        if rows:
            scored = self._scored(self._head, rows)
            before = self._scored(self._before, rows) if probation else None
            state.note_live(rows, now, scored, before)

    def _scored(self, head: Head | None, rows: list[Judged]) -> Outcomes | None:
        """The rows scored anew by a head that is known here."""
        if head is None:
            return None
        return head_outcomes(head, np.stack([row.latent for row in rows]), [row.label for row in rows], self._manifest)

    @property
    def replay_rows(self) -> int:
        """Rows in the replay buffer."""
        return len(self.experience.buffer) if self.experience else 0

    @property
    def judge_rows(self) -> int:
        """Rows that judge."""
        return self._store.count_samples("judge", self.experience.trunk) if self.experience else 0

    @property
    def judges_full(self) -> bool:
        """Whether further rows must not judge: the challenger on trial has had as many as are kept."""
        return self.state.on_trial and self.experience is not None and self.experience.judges_full

    @property
    def known_to_challenger(self) -> frozenset[int]:
        """Keys of the fresh samples that a job or its challenger was made of."""
        return frozenset((*self._chosen.fresh, *self._chosen.older)) if self.state.on_trial else frozenset()

    @property
    def new_labels(self) -> dict[str, int]:
        """Labels that samples ask for, and how many samples."""
        if self.experience is None or self._head is None:
            return {}
        new, decided = self.experience.new_labels(self._head.labels), {*self.state.accepted, *self.state.refused}
        return {label: count for label, count in new.items() if label not in decided}

    def demand(self) -> None:
        """Learn as soon as there are enough rows, cool-down or not."""
        self.state.demand = "on demand"

    def forget_recent(self) -> None:
        """The recent live accuracy belongs to a version that no longer serves."""
        self.state.recent = []

    def forget_learned(self) -> None:
        """Another head serves than was learned: what was measured of that one says nothing of this."""
        self.state.skew, self.state.promoted_at = Skew(), None

    def save(self) -> None:
        """Persist the state; inside a transaction."""
        self.state.save(self._store)

    def trim(self) -> None:
        """Keep what is stored within its bounds; inside a transaction."""
        if self.experience is not None:
            self.experience.trim_judges(on_trial=self.state.on_trial)
            self._store.trim_samples("fresh", self.experience.trunk, self._config.join.max_pending)

    def charge(self, now: float, *, flash_bytes: int = 0, seconds: float = 0.0) -> None:
        """Take note of what was written to the disk, and of CPU time that another learning job took."""
        watts = self._config.resources.watts
        self.state.spent = spend(self.state.spent, now, watts=watts, flash_bytes=flash_bytes, seconds=seconds)

    @contextmanager
    def _transition(self) -> Iterator[None]:
        """A transaction of the store that also changes this state: both, or, if it cannot be written, neither."""
        before, chosen = msgspec.structs.replace(self.state), msgspec.structs.replace(self._chosen)
        try:
            with self._store.transaction():
                yield
                self._store.put(_CHOSEN, msgspec.json.encode(self._chosen))
                self.save()
        except Exception:
            self.state, self._chosen = before, chosen
            if self.experience is not None:
                self.experience.reload()
            raise

    # ---- what is to be forgotten, and what a person says

    def retain(self, now: float) -> None:
        """Erase what is older than it may become; once an hour, whether anything is learned or not.

        Raises:
            StoreError: It could not be erased, or is left in the database's log because another process reads; it is
                tried again in an hour.
        """
        days = self._config.replay.retain_days
        if not days or 0 <= now - self.state.retained_at < _RETAIN_S:
            return
        self.state.retained_at = now
        if found := self._store.old_samples(before=now - days * _DAY_S):
            self._traces = True
            self.erase(found, now, unlearn=False)
        if self._traces:
            self._store.clear_log()
            self._traces = False

    def erase(self, found: list[tuple[Sample, str]], now: float, *, unlearn: bool) -> None:
        """Forget samples. A job or a challenger that knows one of them is given up."""
        self._give_up(found, now, unlearn=unlearn)
        with self._transition():
            self._erase(found, unlearn=unlearn)

    def _give_up(self, found: list[tuple[Sample, str]], now: float, *, unlearn: bool) -> None:
        """Stop a job, or drop a challenger, that knows one of these samples."""
        fresh, replayed = {*self._chosen.fresh, *self._chosen.older}, unlearn
        known = any(sample.key in fresh or (replayed and sample.role == "replay") for sample, _ in found)
        if known and self.state.on_trial:
            self._training.cancel()
            self._fail(now, "samples that it knows were to be forgotten")

    def _erase(self, found: list[tuple[Sample, str]], *, unlearn: bool) -> None:
        if self.experience is None:
            self._store.delete_samples([sample.key for sample, _ in found])
        else:
            self.experience.erase(found, unlearn=unlearn)

    def erase_all(self, now: float) -> None:
        """Forget all samples and all that was summed up of them."""
        self.abandon(now)
        with self._transition():
            self._store.delete_learned()
            self._chosen = Chosen()
            self.state.recent = []
            self.forget_learned()
            self._store.record(now, "forgotten", {"all": True})
        if self.experience is not None:
            self.experience.reload()

    def decide_label(self, label: str, now: float, *, accept: bool) -> None:
        """A new label becomes one of the model's at the next learning, or its samples are forgotten for good."""
        found = [] if accept else self._store.samples_labelled(label)
        self._give_up(found, now, unlearn=True)
        with self._transition():
            state = self.state
            state.accepted = sorted({*state.accepted, label} if accept else {*state.accepted} - {label})
            state.refused = sorted({*state.refused} - {label} if accept else {*state.refused, label})
            if found:
                self._erase(found, unlearn=True)
            if self.experience is not None and not accept:
                self.experience.forget_label(label)
            self._store.record(now, "label_accepted" if accept else "label_refused", {"label": label})

    def may_grow(self, label: str) -> bool:
        """Whether a new label may become one of the model's."""
        state, policy = self.state, self._config.learn.new_labels
        return label not in state.refused and (policy != "ask" or label in state.accepted)

    def _learnable(self) -> Learnable:
        """What a job made now would learn from."""
        assert self.experience is not None
        assert self._head is not None
        return self.experience.learnable(self._head.labels, may_grow=self.may_grow, since=self._since)

    # ---- one turn

    def turn(
        self,
        now: float,
        *,
        mode: Mode,
        alarms: tuple[str, ...],
        changed_at: float | None,
        resources: ResourceState,
        metrics: tuple[str, ...] = (),
        worse: str = "",
    ) -> None:
        """Do what the phase calls for. The pointer may have been flipped afterwards.

        Args:
            now: Seconds since the epoch.
            mode: How far the device is trusted.
            alarms: Monitors whose alarm is up.
            changed_at: When the inputs that raised the first warning came. What is older is replayed, not fresh.
            resources: What the machine can spare.
            metrics: What the app's own metrics call for learning by.
            worse: Which of them the version on probation has made worse, and by how much.
        """
        if self.experience is None:
            return
        self._since = changed_at or 0.0
        learning = self.state.phase == "training"
        self.state.obstacle = obstacle(
            resources,
            self.state.spent,
            now,
            self._config.resources,
            learning=learning,
            waiting=bool(self.state.obstacle),
        )
        if learning:
            self._collect(now)
        elif self.state.phase == "probation":
            self._watch(now, worse)
        elif self.state.phase == "idle" and mode != "monitor":
            self._ask_about_labels()
            self._consider(now, alarms, metrics)
        if self.state.phase == "judging":
            self._judge(now, mode)

    def _ask_about_labels(self) -> None:
        """Tell of new labels that wait for a person's word, once each."""
        if self._config.learn.new_labels != "ask":
            return
        new, least = self.new_labels, self._config.report.min_count
        if unheard := [label for label, rows in new.items() if label not in self.state.asked and rows >= least]:
            with self._transition():
                self.state.asked = [*self.state.asked, *unheard]
                for label in unheard:
                    self._emit("label_asked", {"label": label, "rows": new[label]})

    def _consider(self, now: float, alarms: tuple[str, ...], metrics: tuple[str, ...]) -> None:
        learnable = self._learnable()
        signals = Signals(
            alarms=alarms,
            metrics=metrics,
            fresh_rows=learnable.rows,
            accuracy=self.state.accuracy,
            calibration=self.state.calibration,
            since_last_s=self.state.since_last(now),
            demand=self.state.demand,
            new_labels=learnable.new_labels,
        )
        decision: Decision = decide(signals, self.state.obstacle, self._config.policy)
        self.state.waits = decision.reason if decision.wanted and not decision.learn else ""
        self._note(now, decision)
        if decision.learn:
            self._train(now, decision.reason)

    def _note(self, now: float, decision: Decision) -> None:
        """Every decision is recorded here with its reason, when it changes: figures in it change with every row."""
        wanted = "learn" if decision.learn else "wait" if decision.wanted else ""
        if (said := " ".join([wanted, *decision.triggers])) != self.state.decision:
            with self._transition():
                self.state.decision = said
                self._store.record(now, "learn_decided", {"learn": decision.learn, "reason": decision.reason})

    def _train(self, now: float, reason: str) -> None:
        assert self._trial is not None
        job, chosen = self._trial.job(may_grow=self.may_grow, since=self._since, attempt=self.state.attempts)
        with self._transition():
            self._begin("training", now=now)
            self.state.reason, self.state.parent, self.state.demand = reason, self._version, ""
            self.state.attempts += 1
            self._chosen = chosen
            self.state.rows, self.state.replayed = len(job.fresh), len(job.replay)
            self._emit("learn_started", {"reason": reason, "rows": len(job.fresh), "replayed": len(job.replay)})
        self.charge(now, flash_bytes=self._training.start(job))
        del job  # of wide latents it takes megabytes, and nobody predicts the better for it
        trim_memory()
        self._collect(now)

    def _collect(self, now: float) -> None:
        self._training.hold(on=bool(self.state.obstacle))
        self.state.waits = f"paused: {self.state.obstacle}" if self.state.obstacle else ""
        known, result = self._training.result, self._training.poll()
        if known is None and result is not None:  # it ended now: what it cost counts once
            watts = self._config.resources.watts
            self.state.spent = spend(self.state.spent, now, watts=watts, seconds=result.seconds)
        if result is None:
            return
        if result.error:
            self._fail(now, result.error)
            return
        with self._transition():
            self._begin("judging", now=now)
            self.state.result = msgspec.structs.replace(result, wrong=[])
            self._chosen.wrong = result.wrong

    def _judge(self, now: float, mode: Mode) -> None:
        assert self.experience is not None
        assert self._trial is not None
        newest = self._store.newest_sample("judge", self.experience.trunk)
        if newest == self._judged_up_to and now - self.state.since < self._config.gate.max_wait_s:
            self._supersede(now)  # nothing new to judge by
            return
        try:
            challenger = self._training.challenger()
        except (EdgeError, OSError) as error:
            self._fail(now, f"the challenger is lost: {error}")
            return
        waited_s, superseded = now - self.state.since, self.state.superseded
        full, judged = self._trial.judge(challenger, waited_s=waited_s, challengers_before=superseded)
        self.state.trained = self._trial.skew(challenger, self._chosen, judged, self.state.trained)
        verdict = without_small_scores(full, self._config)
        detail = {**msgspec.structs.asdict(verdict), "trigger": self.state.reason, "steps": self.state.result.steps}
        if verdict.outcome == "need_more":
            self.state.waits, self._judged_up_to = verdict.reason, newest
            self._supersede(now)
            return
        promotes = verdict.outcome == "promote"
        # labels that led to a worse head may be to blame: they are not summed up for good
        fold = promotes or verdict.reason.startswith("not proven")
        if promotes and mode == "adapt":
            number = self._slots.write_head(
                self._version.slot, challenger, self._trial.consolidated(challenger, self._chosen)
            )
            self._slots.promote(number)
            with self._transition():
                self._promoted(number, msgspec.structs.asdict(full), self.experience, now=now)
                self._emit("promoted", {**detail, "to": number, "parent": self._version.head})
        else:
            # shadow: what would have been done is told, and not done
            outcome = "would_promote" if promotes else "rejected"
            with self._transition():
                self._begin("idle", now=now)
                self.state.superseded = 0
                self.state.last_ended = now
                self._emit(outcome, detail)
                self._record(outcome, msgspec.structs.asdict(full))
                self._consolidate(self.experience, fold=fold)
        self._training.discard()

    def _promoted(self, number: int, verdict: dict[str, Any], experience: Experience, *, now: float) -> None:
        """The challenger serves as head `number`; inside a transaction."""
        self._begin("probation", now=now)
        self.state.superseded = 0
        self.state.skew, self.state.promoted_at = self.state.trained, now
        self._record("promoted", verdict, head=number)
        self._consolidate(experience, fold=True)

    def _record(self, outcome: str, verdict: dict[str, Any], head: int | None = None) -> None:
        """Note how the challenger came to be; inside a transaction."""
        wrong, version = len(self._chosen.wrong), self._version
        entry = self.state.lineage(outcome, verdict, version=version, wrong=wrong, head=head, config=self._config)
        self._store.record_lineage(entry)

    def _supersede(self, now: float) -> None:
        """Let a challenger that proves nothing give way to one that knows twice as many samples.

        Its own stay fresh.
        """
        waiting, reason = self._learnable().rows - self.state.rows, self.state.waits
        if waiting < max(self.state.rows, self._config.policy.min_fresh_rows):
            return
        with self._transition():
            self._begin("idle", now=now)
            self._emit("superseded", {"reason": reason, "rows": self.state.rows, "new": waiting})
            self._record("superseded", {"reason": reason})
            self._chosen = Chosen()
            self.state.superseded += 1
            self.state.demand = "more samples than the challenger before knew"
        self._training.discard()

    def _watch(self, now: float, worse: str) -> None:
        verdict = judge_probation(self.state, now, self._config.gate)
        if worse:
            verdict = ProbationVerdict("rollback", worse)
        if verdict.outcome == "need_more":
            return
        if verdict.outcome == "rollback":
            back = self._slots.rollback()
        with self._transition():
            self._begin("idle", now=now)
            self.state.last_ended = now
            if verdict.outcome == "rollback":
                if self.experience is not None:
                    self.experience.unfold()
                self._emit("head_rolled_back", {"reason": verdict.reason, "to": back.head})
            else:
                self._emit("confirmed", {"reason": verdict.reason})

    def _consolidate(self, experience: Experience, *, fold: bool) -> None:
        """What was learned from moves into the replay buffer; inside a transaction."""
        experience.consolidate(self._chosen, fold=fold)
        self._chosen = Chosen()
        trim_memory()

    def _fail(self, now: float, reason: str) -> None:
        self._training.discard()
        with self._transition():
            self._begin("idle", now=now)
            self.state.last_ended = now
            self.state.superseded = 0
            if self._training.result is not None:
                self.state.result = msgspec.structs.replace(self._training.result, wrong=[])
            self._emit("learn_failed", {"reason": reason})
            self._record("learn_failed", {"reason": reason})
            self._chosen = Chosen()

    def _begin(self, phase: Phase, *, now: float) -> None:
        self._judged_up_to = -1
        self.state.begin(phase, now)
