"""The learning transaction: decide, train, judge, promote or reject, watch, confirm or roll back.

One of these runs at a time. Its state is one record in the database, so that a restart continues where it was, and
every step leaves the champion serving until the pointer has been flipped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from edge_sdk.config import DeviceConfig
from edge_sdk.errors import EdgeError, IntegrityError
from edge_sdk.experience import Chosen, Experience
from edge_sdk.files import remove_tree
from edge_sdk.gate import Verdict, is_healthy, judge, watch
from edge_sdk.head import Head, dequantize
from edge_sdk.join import Judged
from edge_sdk.learn.base import CHALLENGER, LearnJob, LearnResult
from edge_sdk.learn.ewc import Importance, consolidate, fisher_diagonal
from edge_sdk.learn.executor import LearnExecutor
from edge_sdk.manifest import Manifest
from edge_sdk.outcomes import Outcomes, group_names, members, outcomes
from edge_sdk.policy import Decision, ResourceState, Signals, Spent, decide, obstacle, spend
from edge_sdk.skew import Skew
from edge_sdk.slots import Slots, Version
from edge_sdk.stats import calibration_error
from edge_sdk.store import Lineage, Sample, Store, stack
from edge_sdk.tasks import as_scores
from edge_sdk.types import LatentArray, Mode

logger = logging.getLogger(__name__)

Emit = Callable[[str, dict[str, Any]], None]
_STATE = "adaptation"
_CHOSEN = "chosen"
_RECENT = 200
_MIN_RECENT = 30
_DAY_S = 86_400.0
_LATENCY_RUNS = 31


class Recent(msgspec.Struct, frozen=True, array_like=True):
    """A live labelled row: whether it was right, and if that is known, how sure the model was and how right."""

    right: bool
    confidence: float | None = None
    success: float = 0.0
    """1 less its loss: what the confidence foretells. Of a multi-label model a part of the labels may be right."""


class AdaptState(msgspec.Struct):
    """Where the transaction stands; persisted."""

    phase: Literal["idle", "training", "judging", "probation"] = "idle"
    reason: str = ""
    since: float = 0.0
    """When the phase began."""
    attempts: int = 0
    """Learning jobs ever started; makes the seed of each."""
    superseded: int = 0
    """Challengers that gave way to the present one: they share the error level."""
    last_ended: float | None = None
    parent: Version | None = None
    rows: int = 0
    """Fresh samples that the challenger knows."""
    replayed: int = 0
    result: LearnResult = LearnResult()
    """Of the learner."""
    before: list[float] = []
    """On probation: losses of the version before."""
    after: list[float] = []
    predictions: int = 0
    errors: int = 0
    """Both on probation."""
    recent: list[Recent] = []
    """Of the latest live predictions."""
    skew: Skew = Skew()
    """Of the head in use."""
    trained: Skew = Skew()
    """Of the challenger."""
    promoted_at: float | None = None
    demand: str = ""
    """Why learning should start whatever the cool-down says."""
    waits: str = ""
    """Why learning that is wanted does not start, or has stopped."""
    decision: str = ""
    """The last decision that was noted."""
    obstacle: str = ""
    """What stood against learning at the last look."""
    spent: Spent = Spent()
    asked: list[str] = []
    """New labels that were told of."""
    accepted: list[str] = []
    refused: list[str] = []
    """What a person said about them."""
    retained_at: float = 0.0


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
        self._folder, self._store, self._slots, self._executor = folder, store, slots, executor
        self._config, self._emit = config, emit
        chosen = store.get(_CHOSEN)
        self.state = _saved_state(store)
        self._chosen = msgspec.json.decode(chosen, type=Chosen) if chosen else Chosen()
        self.experience: Experience | None = None
        """The rows of the release in use; None if it is served and not learned on."""
        self._head: Head | None = None
        self._before: Head | None = None
        self._judged_up_to = -1
        self._since = 0.0
        self._result: LearnResult | None = None
        """What came of the job, until that is recorded."""
        if self.state.phase == "training":  # the child died with us
            self._begin("idle", now=self.state.since)
            self._discard_job()

    # ---- the release in use

    def attach(self, version: Version, manifest: Manifest) -> None:
        """Work on a version: its labelled rows, its head, and what it must not forget.

        Of one that is not learned on, only the live accuracy is kept.
        """
        folder = self._slots.folder(version)
        self._version, self._manifest = version, manifest
        self._head = self._before = self.experience = None
        self._judged_up_to = -1
        if not manifest.learns:
            self._begin("idle", now=self.state.since)
            self.state.waits = f"adapt={manifest.adapt}, task={manifest.task}: this release is served, not learned on"
            return
        seed = (self._config.seed, self.state.attempts, version.release)
        experience = Experience(self._store, self._config, manifest, folder, seed=seed)
        self._head = self._slots.head(version)
        self._recover(version, experience)
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
        self._executor.cancel()
        self._discard_job()
        self._begin("idle", now=now)
        self.state.last_ended, self.state.superseded = None, 0

    @property
    def fresh_rows(self) -> int:
        """Labelled samples not learned from yet."""
        return self.experience.fresh_rows() if self.experience else 0

    @property
    def accuracy(self) -> float | None:
        """Live accuracy over the latest labels, or None below 30 of them."""
        recent = self.state.recent
        return float(np.mean([row.right for row in recent])) if len(recent) >= _MIN_RECENT else None

    @property
    def calibration(self) -> float | None:
        """Expected calibration error over the latest labels, or None below 30 of them."""
        sure = [(row.confidence, row.success) for row in self.state.recent if row.confidence is not None]
        if len(sure) < _MIN_RECENT:
            return None
        confidence, success = np.array(sure).T
        return calibration_error(confidence, success)

    def see(self, rows: list[Judged], now: float, *, predictions: int, errors: int) -> None:
        """Take note of what the version in use did: live labelled rows, and counts."""
        state = self.state
        if state.phase == "probation":
            state.predictions += predictions
            state.errors += errors
        if not rows:
            return
        again = self._again(rows)
        if again is None:
            state.recent = [*state.recent, *(Recent(row.correct) for row in rows)][-_RECENT:]
            return
        found = zip(again.confidence.round(3).tolist(), (1 - again.losses).round(3).tolist(), strict=True)
        seen = [
            Recent(row.correct, sure, success) if math.isfinite(sure) else Recent(row.correct)
            for row, (sure, success) in zip(rows, found, strict=True)
        ]
        state.recent = [*state.recent, *seen][-_RECENT:]
        if state.promoted_at is not None and now - state.promoted_at <= _DAY_S:
            state.skew = state.skew.add_live(np.array([row.correct for row in rows]), again.right)
        if held := [row.correct for row in rows if row.holdout]:
            state.skew = state.skew.add("holdout", np.array(held))
        if state.phase == "probation" and self._before is not None:
            latents, truths = np.stack([row.latent for row in rows]), [row.label for row in rows]
            state.before += self._outcomes(self._before, latents, truths).losses.tolist()
            state.after += again.losses.tolist()

    def _again(self, rows: list[Judged]) -> Outcomes | None:
        """The rows scored anew by the head in use; None if it is not known here."""
        if self._head is None:
            return None
        return self._outcomes(self._head, np.stack([row.latent for row in rows]), [row.label for row in rows])

    def _outcomes(self, head: Head, latents: LatentArray, truths: list[str], groups: Sequence[str] = ()) -> Outcomes:
        scores = as_scores(head.logits(dequantize(latents, self._manifest.latent)), self._manifest)
        return outcomes(
            scores, head.labels, truths, groups or group_names(truths, head.labels, self._manifest), self._manifest
        )

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
        on_trial = self.state.phase in ("training", "judging")
        return on_trial and self.experience is not None and self.experience.judges_full

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
        self._store.put(_STATE, msgspec.json.encode(self.state))

    def trim(self) -> None:
        """Keep what is stored within its bounds; inside a transaction."""
        if self.experience is not None:
            self.experience.trim_judges(on_trial=self.state.phase in ("training", "judging"))
            self._store.trim_samples("fresh", self.experience.trunk, self._config.join.max_pending)

    def charge(self, now: float, *, flash_bytes: int) -> None:
        """Take note of what was written to the disk."""
        self.state.spent = spend(self.state.spent, now, watts=self._config.resources.watts, flash_bytes=flash_bytes)

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

    # ---- what a person says

    def erase(self, found: list[tuple[Sample, str]], now: float, *, unlearn: bool) -> None:
        """Forget samples. A job or a challenger that knows one of them is given up."""
        self._give_up(found, now, unlearn=unlearn)
        with self._transition():
            self._erase(found, unlearn=unlearn)

    def _give_up(self, found: list[tuple[Sample, str]], now: float, *, unlearn: bool) -> None:
        """Stop a job, or drop a challenger, that knows one of these samples."""
        fresh, replayed = {*self._chosen.fresh, *self._chosen.older}, unlearn
        known = any(sample.key in fresh or (replayed and sample.role == "replay") for sample, _ in found)
        if known and self.state.phase in ("training", "judging"):
            self._executor.cancel()
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

    def _may_grow(self, label: str) -> bool:
        """Whether a new label may become one of the model's."""
        state, policy = self.state, self._config.learn.new_labels
        return label not in state.refused and (policy != "ask" or label in state.accepted)

    def _learnable(self) -> int:
        """Fresh samples that a job made now would learn from."""
        assert self.experience is not None
        assert self._head is not None
        return self.experience.learnable(self._head.labels, may_grow=self._may_grow, since=self._since)

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
        if self.experience is None:
            return
        self._since = changed_at or 0.0
        self._retain(now)
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
            self._watch(now)
        elif self.state.phase == "idle" and mode != "monitor":
            self._ask_about_labels()
            self._consider(now, alarms)
        if self.state.phase == "judging":
            self._judge(now, mode)

    def _retain(self, now: float) -> None:
        """Erase what is older than it may become; once an hour."""
        days = self._config.replay.retain_days
        if not days or 0 <= now - self.state.retained_at < 3_600:
            return
        self.state.retained_at = now
        if found := self._store.old_samples(before=now - days * _DAY_S):
            self.erase(found, now, unlearn=False)

    def _ask_about_labels(self) -> None:
        """Tell of new labels that wait for a person's word, once each."""
        if self._config.learn.new_labels != "ask":
            return
        new = self.new_labels
        if unheard := [label for label in new if label not in self.state.asked]:
            with self._transition():
                self.state.asked = [*self.state.asked, *unheard]
                for label in unheard:
                    self._emit("label_asked", {"label": label, "rows": new[label]})

    def _consider(self, now: float, alarms: tuple[str, ...]) -> None:
        signals = Signals(
            alarms=alarms,
            fresh_rows=self._learnable(),
            accuracy=self.accuracy,
            calibration=self.calibration,
            since_last_s=self._since_last(now),
            demand=self.state.demand,
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

    def _since_last(self, now: float) -> float | None:
        ended = self.state.last_ended
        return None if ended is None or now < ended else now - ended  # a clock that was set back ends the cool-down

    def _train(self, now: float, reason: str) -> None:
        assert self.experience is not None
        job, chosen = self._job()
        with self._transition():
            self._begin("training", now=now)
            self.state.reason, self.state.parent, self.state.demand = reason, self._version, ""
            self.state.attempts += 1
            self._chosen = chosen
            self.state.rows, self.state.replayed = len(job.fresh), len(job.replay)
            self._emit("learn_started", {"reason": reason, "rows": len(job.fresh), "replayed": len(job.replay)})
        self._result = None
        try:
            self._discard_job()
            self._job_folder.mkdir(parents=True)
            job.save(self._job_folder)
            self.charge(now, flash_bytes=sum(file.stat().st_size for file in self._job_folder.iterdir()))
            self._executor.start(self._job_folder)
        except (EdgeError, OSError) as error:
            self._result = LearnResult(error=f"{type(error).__name__}: {error}")
        self._collect(now)

    def _job(self) -> tuple[LearnJob, Chosen]:
        assert self.experience is not None
        return self.experience.job(
            self._slots.head(self._version),
            self._importance(),
            may_grow=self._may_grow,
            since=self._since,
            attempt=self.state.attempts,
        )

    def _importance(self) -> Importance:
        assert self.experience is not None
        try:
            return self._slots.importance(self._version) or self.experience.importance
        except IntegrityError as error:
            logger.warning("EWC holds on to what the release came with: %s", error)
            return self.experience.importance

    def _collect(self, now: float) -> None:
        if self.state.obstacle:
            self._executor.pause()
        else:
            self._executor.resume()
        self.state.waits = f"paused: {self.state.obstacle}" if self.state.obstacle else ""
        result = self._ended(now)
        if result is None:
            return
        if result.error:
            self._fail(now, result.error)
            return
        with self._transition():
            self._begin("judging", now=now)
            self.state.result = msgspec.structs.replace(result, wrong=[])
            self._chosen.wrong = result.wrong

    def _ended(self, now: float) -> LearnResult | None:
        """What came of the job, once it has ended: the executor says so only once, and it may not be recorded then."""
        if self._result is None:
            self._result = self._executor.poll()
            limit, worked = self._config.learn.max_seconds, self._executor.worked_s
            if self._result is None and worked > limit:
                self._executor.cancel()
                self._result = LearnResult(error=f"stopped after {limit:g} s", seconds=worked)
            if self._result is not None:
                seconds, watts = self._result.seconds, self._config.resources.watts
                self.state.spent = spend(self.state.spent, now, watts=watts, seconds=seconds)
        return self._result

    def _judge(self, now: float, mode: Mode) -> None:
        assert self.experience is not None
        newest = self._store.newest_sample("judge", self.experience.trunk)
        if newest == self._judged_up_to and now - self.state.since < self._config.gate.max_wait_s:
            self._supersede(now)  # nothing new to judge by
            return
        try:
            challenger = Head.load(self._job_folder / CHALLENGER)
        except (EdgeError, OSError) as error:
            self._fail(now, f"the challenger is lost: {error}")
            return
        full = self._verdict(challenger, now)
        verdict = self._without_small_scores(full)
        detail = {**msgspec.structs.asdict(verdict), "trigger": self.state.reason, "steps": self.state.result.steps}
        if verdict.outcome == "need_more":
            self.state.waits, self._judged_up_to = verdict.reason, newest
            self._supersede(now)
            return
        promotes = verdict.outcome == "promote"
        # labels that led to a worse head may be to blame: they are not summed up for good
        fold = promotes or verdict.reason.startswith("not proven")
        if promotes and mode == "adapt":
            number = self._slots.write_head(self._version.slot, challenger, self._consolidated(challenger))
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
        self._discard_job()

    def _promoted(self, number: int, verdict: dict[str, Any], experience: Experience, *, now: float) -> None:
        """The challenger serves as head `number`; inside a transaction."""
        self._begin("probation", now=now)
        self.state.superseded = 0
        self.state.skew, self.state.promoted_at = self.state.trained, now
        self._record("promoted", verdict, head=number)
        self._consolidate(experience, fold=True)

    def _consolidated(self, challenger: Head) -> Importance | None:
        """What EWC will hold on to once the challenger serves; None: what the checkpoint came with."""
        learn, known = self._config.learn, self._importance()
        if learn.consolidation == "checkpoint":
            return None
        learned = self._learned()
        if not learned:
            return known
        latents = stack([sample.latent for sample in learned], self._manifest.latent.dim)
        fisher = fisher_diagonal(challenger, dequantize(latents, self._manifest.latent), task=self._manifest.task)
        return consolidate(known, challenger.weights, fisher, mode=learn.consolidation, decay=learn.decay)

    def _learned(self) -> list[Sample]:
        """The fresh samples that the challenger was trained on, without those that say what a label is not."""
        assert self.experience is not None
        keys = self._chosen.learned
        samples = self._store.samples("fresh", self.experience.trunk)
        return [sample for sample in samples if sample.key in keys and sample.weight > 0]

    def _record(self, outcome: str, verdict: dict[str, Any], head: int | None = None) -> None:
        """Note how the challenger came to be; inside a transaction."""
        state, result = self.state, self.state.result
        parent = state.parent or self._version
        detail = {
            **verdict,
            "trigger": state.reason,
            "fresh": state.rows,
            "used": result.rows,
            "wrong": len(self._chosen.wrong),
            "replayed": state.replayed,
            "seed": self._config.seed * 1_000_003 + state.attempts - 1,
            "steps": result.steps,
            "first_loss": result.first_loss,
            "last_loss": result.last_loss,
            "cpu_s": result.seconds,
            "note": result.note,
            "config": msgspec.to_builtins(self._config.learn),
        }
        self._store.record_lineage(Lineage(state.since, parent.release, parent.head, head, outcome, detail))

    def _supersede(self, now: float) -> None:
        """Let a challenger that proves nothing give way to one that knows twice as many samples.

        Its own stay fresh.
        """
        waiting, reason = self._learnable() - self.state.rows, self.state.waits
        if waiting < max(self.state.rows, self._config.policy.min_fresh_rows):
            return
        with self._transition():
            self._begin("idle", now=now)
            self._emit("superseded", {"reason": reason, "rows": self.state.rows, "new": waiting})
            self._record("superseded", {"reason": reason})
            self._chosen = Chosen()
            self.state.superseded += 1
            self.state.demand = "more samples than the challenger before knew"
        self._discard_job()

    def _without_small_scores(self, verdict: Verdict) -> Verdict:
        """Scores over so few rows that they say too much about single samples do not leave the device."""
        few = self._config.report.min_count
        if verdict.rows < few:
            verdict = msgspec.structs.replace(
                verdict, champion=0.0, challenger=0.0, champion_calibration=0.0, challenger_calibration=0.0
            )
        if min(verdict.rows, self._config.gate.min_class_rows) < few:
            verdict = msgspec.structs.replace(verdict, worst_group=0.0, worst_slice=0.0)
        if verdict.factory_rows < few:
            verdict = msgspec.structs.replace(verdict, champion_factory=0.0, challenger_factory=0.0)
        return verdict

    def _verdict(self, challenger: Head, now: float) -> Verdict:
        assert self.experience is not None
        champion, rows = self._slots.head(self._version), self.experience.judge_rows
        names = (*champion.labels, *(label for label in challenger.labels if label not in champion.labels))
        groups = group_names(rows.truths, names, self._manifest)
        before, after = (self._outcomes(head, rows.latents, rows.truths, groups) for head in (champion, challenger))
        self._measure(challenger, after)
        return judge(
            before,
            after,
            groups=groups,
            members=members(rows.truths, groups, self._manifest),
            factory_champion=self.experience.factory.right(champion),
            factory_challenger=self.experience.factory.right(challenger),
            waited_s=now - self.state.since,
            config=self._config.gate,
            slices=rows.slices,
            weights=rows.weights,
            challengers_before=self.state.superseded,
            latency_ms=self._latency(champion, challenger),
        )

    def _measure(self, challenger: Head, judged: Outcomes) -> None:
        """The challenger's scores on what it was trained on and on what it is judged by."""
        trained = self.state.trained
        if not trained.training.rows:
            samples = self._learned()
            latents = stack([sample.latent for sample in samples], self._manifest.latent.dim)
            right = self._outcomes(challenger, latents, [sample.label for sample in samples]).right
            trained = Skew().add("training", right)
        self.state.trained = msgspec.structs.replace(Skew(), training=trained.training).add("judge", judged.right)

    def _latency(self, champion: Head, challenger: Head) -> tuple[float, float] | None:
        """Median time of one row in each head, in milliseconds, taken in turns; None in simulations."""
        if self._config.learn.executor == "inline":
            return None
        row = np.zeros((1, champion.latent_dim), dtype=np.float32)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(_LATENCY_RUNS):
            for head, found in zip((champion, challenger), times, strict=True):
                started = time.perf_counter()
                head.logits(row)
                found.append(time.perf_counter() - started)
        return float(np.median(times[0]) * 1e3), float(np.median(times[1]) * 1e3)

    def _watch(self, now: float) -> None:
        gate = self._config.gate
        verdict = watch(
            np.array(self.state.before),
            np.array(self.state.after),
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
                if self.experience is not None:
                    self.experience.unfold()
                self._emit("head_rolled_back", {"reason": verdict.reason, "to": back.head})
            else:
                self._emit("confirmed", {"reason": verdict.reason})

    def _consolidate(self, experience: Experience, *, fold: bool) -> None:
        """What was learned from moves into the replay buffer; inside a transaction."""
        experience.consolidate(self._chosen, fold=fold)
        self._chosen = Chosen()
        if fold:
            self.charge(self.state.since, flash_bytes=experience.nbytes)

    def _fail(self, now: float, reason: str) -> None:
        self._discard_job()
        with self._transition():
            self._begin("idle", now=now)
            self.state.last_ended = now
            self.state.superseded = 0
            if self._result is not None:
                self.state.result = msgspec.structs.replace(self._result, wrong=[])
            self._emit("learn_failed", {"reason": reason})
            self._record("learn_failed", {"reason": reason})
            self._chosen = Chosen()

    def _begin(self, phase: Literal["idle", "training", "judging", "probation"], *, now: float) -> None:
        self._judged_up_to = -1
        self.state.phase, self.state.since = phase, now
        self.state.before, self.state.after, self.state.waits = [], [], ""
        self.state.predictions = self.state.errors = 0
        if phase == "training":
            self.state.trained, self.state.result = Skew(), LearnResult()

    @property
    def _job_folder(self) -> Path:
        return self._folder / "job"

    def _discard_job(self) -> None:
        remove_tree(self._job_folder)


def is_on_probation(store: Store) -> bool:
    """Whether the state says that a promoted head is being watched: known before any model is loaded."""
    return _saved_state(store).phase == "probation"


def _saved_state(store: Store) -> AdaptState:
    data = store.get(_STATE)
    try:
        return msgspec.json.decode(data, type=AdaptState) if data else AdaptState()
    except msgspec.MsgspecError as error:  # of an earlier version
        logger.warning("how far learning had come is lost; it begins anew: %s", error)
        return AdaptState()
