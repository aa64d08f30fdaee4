"""The update transaction: fetch, stage, self-test, keep what was learned, activate, watch, confirm or roll back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import numpy as np

from edge_sdk.adapt import Adaptation
from edge_sdk.beside import Beside, check_can_run, to_tell
from edge_sdk.config import DeviceConfig
from edge_sdk.drift.features import Thumbnail
from edge_sdk.drift.monitors import DriftMonitors
from edge_sdk.drift.reference import Reference, output_names
from edge_sdk.errors import (
    ArtifactError,
    ClockUntrustedError,
    IntegrityError,
    MetadataExpiredError,
    ModelError,
    RollbackRefusedError,
    StoreError,
    UntrustedError,
)
from edge_sdk.experience import FactoryMemory, meaning_of_outputs
from edge_sdk.files import crashpoint, load_npz, remove_tree
from edge_sdk.gate import is_healthy, watch_release
from edge_sdk.head import Head, dequantize
from edge_sdk.join import Judged
from edge_sdk.learn.ewc import Importance
from edge_sdk.learn.executor import LearnExecutor
from edge_sdk.learn.moments import Moments
from edge_sdk.manifest import (
    FISHER_NPZ,
    HEAD_NPZ,
    MANIFEST_NAME,
    MOMENTS_NPZ,
    REFERENCE_NPZ,
    SELFTEST_NPZ,
    Manifest,
    digest_of,
    verify_checkpoint,
)
from edge_sdk.messages import Desired, ShadowTally
from edge_sdk.model import Trunks, trunk_key
from edge_sdk.outcomes import group_names, outcomes
from edge_sdk.pending import LoggedPrediction
from edge_sdk.rebase import Rebase, Settled, choose_head, with_importance_of
from edge_sdk.selftest import Choice, choose_variant, read_choice, write_choice
from edge_sdk.serving import load_served
from edge_sdk.shadow import Candidate, Carried, Shadow
from edge_sdk.slots import Slot, Slots, Version
from edge_sdk.status import ShadowStatus
from edge_sdk.store import Store
from edge_sdk.tasks import as_scores
from edge_sdk.types import AnyArray, BoolArray
from edge_sdk.update import FetchedRelease, UpdateClient

Emit = Callable[[str, dict[str, Any]], None]
_STATE = "upgrade"
_tried: WeakKeyDictionary[Any, dict[tuple[str, str], Choice]] = WeakKeyDictionary()
"""By a loaded trunk: releases by digest and wanted variant that were tried with it in this process, and the choice."""
logger = logging.getLogger(__name__)


class UpgradeState(msgspec.Struct):
    """What must survive a restart."""

    recorded: Version | None = None
    """The version whose coming into use has been reported."""
    refused: dict[str, str] = {}
    """Releases that failed here, by digest, with the reason: not tried again."""
    watching: bool = False
    since: float = 0.0
    accuracy_before: float | None = None
    correct: list[bool] = []
    predictions: int = 0
    errors: int = 0
    carried: str = ""
    """What became of the personal head."""
    shadow: Candidate | None = None
    """A release that waits in the idle slot until what was learned can be carried over to it."""


class Upgrade:
    """Owns the change of base releases. The serving version is untouched until the pointer flips.

    Args:
        store: The device's database.
        slots: The versions on disk.
        client: Fetches releases.
        config: Of the device.
        emit: Records an event inside the current transaction of the store.
        executor: Trains the head of a release with another trunk; None: such a release takes over without one.
        trunks: Loaded trunks that are shared with other devices of this process.
    """

    def __init__(
        self,
        *,
        store: Store,
        slots: Slots,
        client: UpdateClient,
        config: DeviceConfig,
        emit: Emit,
        executor: LearnExecutor | None = None,
        trunks: Trunks | None = None,
    ) -> None:
        self._trunks: Trunks = {} if trunks is None else trunks
        self._store, self._slots, self.client, self._config, self._emit = store, slots, client, config, emit
        self._executor = executor
        self._shadow: Shadow | None = None
        self._beside: Beside | None = None
        self._job = slots.root.parent / "rebase"
        remove_tree(self._job)  # the child died with us, and labelled rows must not lie about
        data = store.get(_STATE)
        self.state = msgspec.json.decode(data, type=UpgradeState) if data else UpgradeState()
        self._complaints: set[str] = set()
        self._choices: dict[str, Choice] = {}
        self.tested: Trunks = {}
        """The trunk of a release that was just installed: loaded for its self-test, and not to be loaded again."""
        self.why = ""
        """Why the release was last left, until that is recorded."""

    def save(self) -> None:
        """Persist the state; inside a transaction."""
        self._store.put(_STATE, msgspec.json.encode(self.state))

    def variant(self, version: Version) -> Choice:
        """Which variant of its release a version serves; chosen anew if the choice was lost in a crash."""
        if version.digest not in self._choices:
            folder, manifest = self._slots.folder(version), self._slots.manifest(version)
            choice = read_choice(folder, manifest)
            if choice is None:
                choice = choose_variant(folder, manifest, self._config.variant)
                write_choice(folder, choice)
            self._choices[version.digest] = choice
        return self._choices[version.digest]

    def install_folder(
        self, folder: Path, adaptation: Adaptation | None, current: Version | None, refused: Mapping[str, str]
    ) -> None:
        """Install a checkpoint that came with the app, if it is newer than what serves. The folder's files are copied.

        Args:
            folder: The checkpoint.
            adaptation: Of the release in use.
            current: What serves; None: nothing does.
            refused: Releases not to install beside one that serves, by digest, with the reason.

        Raises:
            ArtifactError: It is damaged, does not fit, or fails its self-test here.
            StoreError: It cannot be written.
        """
        manifest = verify_checkpoint(folder)
        data = (folder / MANIFEST_NAME).read_bytes()
        if current is not None and (manifest.release <= current.release or digest_of(data) in refused):
            if digest_of(data) != current.digest:
                logger.warning(
                    "checkpoint %s release %d stays unused: release %d serves, only a higher one replaces it",
                    manifest.name,
                    manifest.release,
                    current.release,
                )
            return
        shadow = self.state.shadow
        if current is not None and shadow is not None and manifest.release <= shadow.version.release:
            return
        sources = {entry.sha256: folder / name for name, entry in manifest.files.items()}
        self._install(data, sources, adaptation, link=False, offered=False)

    def note_refusal(self, error: Exception) -> None:
        """Record that the checkpoint which came with the app cannot be used, while another release serves."""
        self._complain("release_refused", 0, f"the checkpoint that came with the app: {error}")

    def turn(self, now: float, adaptation: Adaptation | None) -> None:
        """Leave a revoked release, fetch an offered one, install it when it is complete."""
        self._tell_refusals(now)
        current = self._slots.pointer.current
        desired = self.client.desired
        revoked = current is not None and desired is not None and current.release in desired.revoked
        if revoked and self.leave("revoked by the coordinator"):
            return
        if self._shadow_turn(now, adaptation, hurry=revoked):
            return
        try:
            offer = self.client.offered(current.release if current else None, self.state.refused)
        except RollbackRefusedError as error:
            self._complain("release_refused", desired.base.release if desired and desired.base else 0, str(error))
            return
        if offer is None:
            self.client.abandon()
            self._note_dates(now, current)
            return
        try:
            if not self.client.authorise(offer, now):
                return
            self.client.begin(offer)
            fetched = self.client.turn(now, self._slots.held_files())
            if fetched is not None:
                self._install_fetched(fetched, adaptation, shadow_s=self.client.shadow_s(offer))
        except StoreError as error:  # the disk may have room again later
            self._complain("release_delayed", offer.release, str(error))
        except UntrustedError as error:  # better metadata, or a clock that is set, may come
            self.client.abandon()
            clock, expired = isinstance(error, ClockUntrustedError), isinstance(error, MetadataExpiredError)
            name = "clock_untrusted" if clock else "metadata_expired" if expired else "release_untrusted"
            self._complain(name, offer.release, str(error))
        except (ArtifactError, ModelError) as error:
            with self._store.transaction():
                self.state.refused[offer.digest] = str(error)
                self._emit("release_failed", {"release": offer.release, "reason": str(error)})
                self.save()
            self.client.clean()

    def _tell_refusals(self, now: float) -> None:
        """Tell that somebody said what the group should run who may not, or who repeats what is no longer so."""
        reader = self.client.reader
        refusals = None if reader is None else reader.refusals(now)
        if reader is None or refusals is None:
            return
        with self._store.transaction():
            self._emit("desired_refused", {"count": refusals.count, "reason": refusals.reason})
        reader.told(now)

    def _note_dates(self, now: float, current: Version | None) -> None:
        """Tell that the signed metadata has expired, or the clock is wrong, also while there is nothing to install."""
        if (trust := self.client.trust) is None:
            return
        trust.refresh(now)
        state = trust.state(now)
        if state in ("expired", "clock_untrusted"):
            name = "clock_untrusted" if state == "clock_untrusted" else "metadata_expired"
            self._complain(
                name, current.release if current else 0, "no release can be installed until this is put right"
            )

    def see(self, correct: list[bool], *, predictions: int, errors: int) -> None:
        """Take note of live rows of the version in use."""
        if self.state.watching:
            self.state.correct += correct
            self.state.predictions += predictions
            self.state.errors += errors

    def watch(self, now: float, worse: str = "") -> None:
        """Confirm a release on probation, or leave it.

        Args:
            now: Seconds since the epoch.
            worse: Which of the app's own metrics it has made worse, and by how much.
        """
        current = self._slots.pointer.current
        if not self.state.watching or current is None:
            return
        update = self._config.update
        before = self.state.accuracy_before
        verdict = watch_release(
            np.array(self.state.correct, dtype=bool),
            accuracy_before=float("nan") if before is None else before,
            waited_s=now - self.state.since,
            healthy=is_healthy(self.state.errors, self.state.predictions),
            alpha=self._config.gate.alpha,
            max_drop=update.max_accuracy_drop,
            rows=update.probation_rows,
            seconds=update.probation_s,
        )
        if worse or verdict.outcome == "rollback":
            self.leave(worse or verdict.reason)
        elif verdict.outcome == "confirm":
            with self._store.transaction():
                self.state.watching = False
                self._emit("release_confirmed", {"release": current.release, "reason": verdict.reason})
                self.save()

    def count_boot(self) -> None:
        """Note a start; a release on probation that keeps crashing the app is left."""
        current = self._slots.pointer.current
        if self.state.watching and current is not None and self._slots.count_boot() > self._config.update.max_boots:
            self.leave(f"{self._config.update.max_boots} starts without a healthy step")

    def note_version(self, now: float, adaptation: Adaptation) -> bool:
        """Record that another release serves than the last one recorded; True if so.

        Called once the version has been taken up, after a flip as well as after a start, so that a kill between a flip
        and its record loses nothing.
        """
        current, recorded = self._slots.pointer.current, self.state.recorded
        if current is None or (recorded is not None and recorded.digest == current.digest):
            return False
        before = adaptation.accuracy if recorded is not None else None
        reason = self.why or "recovered after a restart"
        forward = recorded is None or current.release > recorded.release
        adaptation.abandon(now)
        adaptation.forget_recent()
        state = msgspec.structs.replace(
            self.state,
            recorded=current,
            shadow=None,
            watching=forward and recorded is not None,
            since=now,
            accuracy_before=before,
            correct=[],
            predictions=0,
            errors=0,
        )
        with self._store.transaction():
            if forward:
                detail = {
                    "release": current.release,
                    "previous": recorded.release if recorded else 0,
                    "carried": current.head != 0,
                    "head": state.carried,
                    "variant": self.variant(current).variant,
                    "variant_reason": self.variant(current).reason,
                }
                self._emit("release_activated", detail)
            elif recorded is not None:
                state.refused = {**state.refused, recorded.digest: reason}
                detail = {"release": recorded.release, "to": current.release, "reason": reason}
                self._emit("release_rolled_back", detail)
            self._store.delete_pairs()
            adaptation.save()
            self._store.put(_STATE, msgspec.json.encode(state))
        self.state, self.why = state, ""
        self._close_shadow()
        self._complaints.clear()
        return True

    def _install_fetched(
        self, fetched: FetchedRelease, adaptation: Adaptation | None, *, shadow_s: float = 0.0
    ) -> None:
        # nothing runs beside nothing: a device without a release takes what it is given
        beside_s = shadow_s if self._slots.pointer.current is not None else 0.0
        self._install(fetched.manifest, fetched.files, adaptation, link=True, offered=True, beside_s=beside_s)
        self.client.clean()

    def _install(
        self,
        data: bytes,
        sources: Mapping[str, Path],
        adaptation: Adaptation | None,
        *,
        link: bool,
        offered: bool,
        beside_s: float = 0.0,
    ) -> None:
        self._drop_shadow()
        slot, manifest = self._slots.stage(data, sources, link=link)
        digest = digest_of(data)
        self._choices[digest] = self._try(self._slots.root / slot, manifest, digest)
        version = Version(slot, manifest.release, digest)
        if beside_s:
            check_can_run(manifest)
            with self._store.transaction():
                tally = ShadowTally.new(manifest.release)
                self.state.shadow = Candidate(version, offered, beside_s=beside_s, tally=tally, told=tally)
                self._emit("shadow_started", {"release": manifest.release, "seconds": beside_s})
                self.save()
            return
        self._take_up(version, manifest, adaptation, offered=offered)

    def _take_up(self, version: Version, manifest: Manifest, adaptation: Adaptation | None, *, offered: bool) -> None:
        """Let a staged release serve, or wait until what was learned can be carried over to it."""
        if self._can_shadow(manifest, adaptation):
            with self._store.transaction():
                self._store.delete_pairs()
                self._store.delete_trunk(manifest.trunk_id)
                self.state.shadow = Candidate(version, offered)
                rows = self._config.update.shadow_rows
                self._emit("release_shadowed", {"release": manifest.release, "rows": rows})
                self.save()
            return
        rebase = self._rebase(version.slot, manifest, adaptation)
        self.state.carried = rebase.reason
        head = self._slots.write_head(version.slot, rebase.head, rebase.importance) if rebase.head is not None else 0
        self._slots.activate(msgspec.structs.replace(version, head=head))

    def _try(self, folder: Path, manifest: Manifest, digest: str) -> Choice:
        """Choose the variant and rehearse; what a device that shares its trunks has tried here need not be again."""
        key = digest, self._config.variant
        shared = [self._trunks.get(trunk_key(manifest, variant)) for variant in manifest.model_files]
        known = [_tried[trunk][key] for trunk in shared if trunk is not None and key in _tried.get(trunk, {})]
        choice = known[0] if known else choose_variant(folder, manifest, self._config.variant, self.tested)
        write_choice(folder, choice)
        if not known:
            rehearse(folder, manifest)
            name = trunk_key(manifest, choice.variant)
            trunk = self._trunks.get(name) or self.tested[name]
            _tried.setdefault(trunk, {})[key] = choice
        return choice

    def _rebase(self, slot: Slot, manifest: Manifest, adaptation: Adaptation | None) -> Rebase:
        """The personal head for the staged release, if there is one and it fits."""
        current = self._slots.pointer.current
        if current is None or current.head == 0 or adaptation is None:
            return Rebase(None, "there was no personal head")
        before, folder = self._slots.manifest(current), self._slots.root / slot
        other_head = Rebase(None, "dropped: the new release's head has other outputs or hidden layers")
        if manifest.adapt != "none" and meaning_of_outputs(before) != meaning_of_outputs(manifest):
            return other_head
        if manifest.adapt == "none" or before.trunk_id != manifest.trunk_id:
            return Rebase(None, "dropped: the new release has another trunk")
        shipped, personal = Head.load(folder / HEAD_NPZ), self._slots.head(current)
        if _widths(shipped) != _widths(personal):
            return other_head
        memory = FactoryMemory(folder, manifest)
        rows = None if adaptation.experience is None else adaptation.experience.judge_rows

        def right(head: Head) -> BoolArray:
            factory = memory.right(head)
            if rows is None or not len(rows.latents):
                return factory
            scores = as_scores(head.logits(dequantize(rows.latents, manifest.latent)), manifest)
            groups = group_names(rows.truths, head.labels, manifest)
            return np.concatenate([outcomes(scores, head.labels, rows.truths, groups, manifest).right, factory])

        rebase = choose_head(shipped, personal, right)
        known = self._slots.importance(current) if rebase.head is not None else None
        if rebase.head is None or known is None:
            return rebase
        fisher = {key: value.astype(np.float32) for key, value in load_npz(folder / FISHER_NPZ).items()}
        merged = with_importance_of(known, personal, Importance(shipped.weights, fisher), rebase.head)
        return replace(rebase, importance=merged)

    # ---- a release with another trunk

    def _can_shadow(self, manifest: Manifest, adaptation: Adaptation | None) -> bool:
        """Whether there is a learned head that can only be carried over once inputs have passed both trunks."""
        current = self._slots.pointer.current
        if current is None or current.head == 0 or adaptation is None or adaptation.experience is None:
            return False
        if self._executor is None or not self._config.update.shadow_rows or not manifest.learns:
            return False
        before = self._slots.manifest(current)
        same = meaning_of_outputs(before) == meaning_of_outputs(manifest)
        return same and before.task == manifest.task and before.trunk_id != manifest.trunk_id

    @property
    def wants_inputs(self) -> bool:
        """Whether inputs of predictions are to pass the trunk in shadow."""
        candidate = self.state.shadow
        if candidate is not None and candidate.beside_s:
            return candidate.waited_s < candidate.beside_s
        return candidate is not None and not (self._shadow is not None and self._shadow.enough)

    @property
    def training(self) -> bool:
        """Whether a head is being trained for the release in shadow: nothing else may be learned meanwhile."""
        return self._shadow is not None and self._shadow.training

    def see_inputs(self, rows: list[LoggedPrediction], inputs: Mapping[str, AnyArray], trunk: str) -> None:
        """Let inputs that were just predicted pass the trunk in shadow; off the request path.

        Args:
            rows: Predictions of a flush.
            inputs: Of the latest of them, by id.
            trunk: In use.
        """
        if not inputs:
            return
        if (beside := self._opened_beside()) is not None and self.state.shadow is not None:
            beside.see(rows, inputs)
            self.state.shadow.tally = beside.tally
            return
        if (shadow := self._opened()) is None:
            return
        try:
            shadow.see(rows, inputs, trunk)
        except ModelError as error:
            self._refuse_shadow(f"it fails in shadow: {error}")

    def see_labels(self, rows: list[Judged]) -> None:
        """Take note of labels that came, each beside what the release in use had said."""
        if self._beside is not None and self.state.shadow is not None:
            self._beside.judge(rows)
            self.state.shadow.tally = self._beside.tally

    def told_of_shadow(self) -> list[ShadowTally]:
        """What a report says of a release that runs beside the one in use."""
        candidate = self.state.shadow
        if candidate is None or not candidate.beside_s:
            return []
        candidate.told = to_tell(candidate.tally, candidate.told, min_count=self._config.report.min_count)
        return [candidate.told]

    def take_shadow(self) -> Version:
        """Serve the release in shadow at once: the one in use is lost.

        Raises:
            RollbackRefusedError: There is none.
        """
        if self.state.shadow is None:
            raise RollbackRefusedError("no release is in shadow")
        version = self.state.shadow.version
        self.state.carried = "dropped: the release that it was learned on is lost"
        self._slots.activate(version)
        return version

    def _opened(self) -> Shadow | None:
        """The release in shadow, loaded; one that is damaged is given up, and will be fetched again."""
        candidate = self.state.shadow
        if candidate is None or candidate.beside_s or self._executor is None:
            return None
        if self._shadow is None:
            version = candidate.version
            try:
                manifest, variant = self._slots.manifest(version), self.variant(version).variant
                verify_checkpoint(self._slots.folder(version), serves=variant)
                self._shadow = Shadow(
                    version, manifest, variant, self.tested, self._job,
                    executor=self._executor, store=self._store, slots=self._slots, config=self._config,
                )  # fmt: skip
            except (ArtifactError, ModelError) as error:
                logger.warning("the release in shadow is given up: %s", error)
                self._drop_shadow()
        return self._shadow

    def _opened_beside(self) -> Beside | None:
        """The release that runs beside the one in use, loaded; one that is damaged is given up, and fetched again."""
        candidate = self.state.shadow
        if candidate is None or not candidate.beside_s:
            return None
        if self._beside is None:
            version = candidate.version
            try:
                variant = self.variant(version).variant
                verify_checkpoint(self._slots.folder(version), serves=variant)
                self._beside = Beside(
                    load_served(self._slots, version, variant, {**self._trunks, **self.tested}), candidate.tally
                )
            except (ArtifactError, ModelError) as error:
                logger.warning("the release in shadow is given up: %s", error)
                self._drop_shadow()
        return self._beside

    def _beside_turn(self, now: float, candidate: Candidate, adaptation: Adaptation | None) -> bool:
        """Go on with a release that runs beside the one in use until the coordinator says what becomes of it."""
        version, current = candidate.version, self._slots.pointer.current
        desired = self.client.desired
        if desired is None or current is None:
            return desired is None  # until the coordinator is heard again, it stays in shadow
        if not self._still_wanted(candidate, desired, current.release):
            self._drop_shadow()
            return False
        offer = self.client.offered(current.release, self.state.refused)
        if offer is None or self.client.shadow_s(offer):
            candidate.wait(now)
            return True
        if not self._is_vouched_for(now):
            return False  # the ordinary turn says why
        try:
            manifest = self._slots.manifest(version)
            verify_checkpoint(self._slots.folder(version), serves=self.variant(version).variant)
        except ArtifactError as error:
            logger.warning("the release in shadow is fetched again: %s", error)
            self._drop_shadow()
            return False
        self._close_shadow()
        self.state.shadow = None
        self._take_up(version, manifest, adaptation, offered=True)
        return True

    def _shadow_turn(self, now: float, adaptation: Adaptation | None, *, hurry: bool) -> bool:
        """Go on with the release in shadow; True if there is nothing else to do in this turn."""
        candidate, desired = self.state.shadow, self.client.desired
        if candidate is None:
            return False
        if candidate.beside_s:
            return self._beside_turn(now, candidate, adaptation)
        current = self._slots.pointer.current
        if desired is None and candidate.offered:
            return True  # until the coordinator is heard again, what it offered waits
        if desired is not None and not self._still_wanted(candidate, desired, current.release if current else None):
            self._drop_shadow()
        shadow = None if candidate.offered and not self._is_vouched_for(now) else self._opened()
        if shadow is None or current is None:
            return False
        candidate.wait(now)
        if adaptation is None or adaptation.experience is None or current.head == 0:
            self._take_over(shadow, Carried(Settled("shipped", "there was no personal head")))
            return True
        hurry = hurry or candidate.waited_s >= self._config.update.shadow_s
        if shadow.training or hurry or (shadow.enough and not adaptation.state.obstacle):
            self._carry_over(shadow, current, adaptation, now)
        return True

    def _carry_over(self, shadow: Shadow, current: Version, adaptation: Adaptation, now: float) -> None:
        """Train a head for the release in shadow; once it is there, take over with it, or without, or stay."""
        before = self._slots.manifest(current)
        if not shadow.training:
            if adaptation.state.on_trial:
                adaptation.abandon(now)
            logger.info("release %d: what was learned is carried over to its trunk", shadow.version.release)
            if why := shadow.begin(before.trunk_id, before, may_grow=adaptation.may_grow):
                self._take_over(shadow, Carried(Settled("shipped", f"dropped: {why}")))
                return
        if (result := shadow.poll()) is None:
            return
        if (carried := shadow.judge(current, before, result)) is None:
            return
        adaptation.charge(now, seconds=result.seconds)
        if carried.settled.outcome == "stay":
            self._refuse_shadow(carried.settled.reason)
        else:
            self._take_over(shadow, carried)

    def _still_wanted(self, candidate: Candidate, desired: Desired, installed: int | None) -> bool:
        """Whether the release in shadow is still the one to have."""
        version = candidate.version
        if version.release in desired.revoked:
            return False
        try:
            offer = self.client.offered(installed, self.state.refused)
        except RollbackRefusedError:
            offer = None
        if candidate.offered:
            return offer is not None and offer.digest == version.digest
        return offer is None or offer.release <= version.release

    def _is_vouched_for(self, now: float) -> bool:
        """Whether the offer may still be taken; if not, the ordinary turn says why, and the shadow waits."""
        current = self._slots.pointer.current
        try:
            offer = self.client.offered(current.release if current else None, self.state.refused)
            return offer is not None and self.client.authorise(offer, now)
        except (RollbackRefusedError, UntrustedError):
            return False

    def _take_over(self, shadow: Shadow, carried: Carried) -> None:
        """Let the release in shadow serve."""
        version, personal = shadow.version, carried.settled.outcome == "personal"
        current = self._slots.pointer.current
        assert current is not None
        head = carried.head if personal else None
        number = self._slots.write_head(version.slot, head) if head is not None else 0
        try:
            with self._store.transaction():
                shadow.settle(self._slots.manifest(current).trunk_id, personal=personal)
                self.state.carried = carried.settled.reason
                self.save()
        except BaseException:
            shadow.cancel()  # what it holds in memory may be ahead of the disk
            raise
        crashpoint("shadow:settled")
        self._slots.activate(msgspec.structs.replace(version, head=number))
        self.tested[shadow.key] = shadow.trunk
        self.client.clean()

    def _refuse_shadow(self, reason: str) -> None:
        """Stay on the release in use, and tell why."""
        candidate = self.state.shadow
        assert candidate is not None
        version = candidate.version
        trunk = self._slots.manifest(version).trunk_id
        with self._store.transaction():
            self.state.refused[version.digest] = reason
            self.state.shadow = None
            self._emit("release_failed", {"release": version.release, "reason": reason})
            self._store.delete_pairs()
            self._store.delete_trunk(trunk)
            self.save()
        self._close_shadow()
        self.client.clean()

    def _drop_shadow(self) -> None:
        """Give up the release in shadow: another takes its place, or it is not wanted any more."""
        if self.state.shadow is None:
            return
        logger.info("release %d leaves the shadow", self.state.shadow.version.release)
        with self._store.transaction():
            self.state.shadow = None
            self._store.delete_pairs()
            self.save()
        self._close_shadow()

    def _close_shadow(self) -> None:
        self._beside = None
        if self._shadow is not None:
            self._shadow.cancel()
            self._shadow = None

    @property
    def shadow_status(self) -> ShadowStatus | None:
        """How it stands with the release in shadow; None: there is none."""
        candidate, update = self.state.shadow, self._config.update
        if candidate is None:
            return None
        if candidate.beside_s:
            return ShadowStatus(
                release=candidate.version.release,
                since=candidate.since,
                pairs=candidate.tally.rows,
                pairs_wanted=0,
                left_s=max(0.0, candidate.beside_s - candidate.waited_s),
                training=False,
            )
        return ShadowStatus(
            release=candidate.version.release,
            since=candidate.since,
            pairs=self._store.count_pairs(),
            pairs_wanted=update.shadow_rows,
            left_s=max(0.0, update.shadow_s - candidate.waited_s),
            training=self.training,
        )

    # ---- going back

    def leave(self, reason: str) -> bool:
        """Go back to the release before, if there is one; False if this one must go on serving."""
        current = self._slots.pointer.current
        try:
            self._slots.rollback_release()
        except RollbackRefusedError as error:
            self._complain("rollback_refused", current.release if current else 0, f"{reason}, but {error}")
            if self.state.watching:
                with self._store.transaction():
                    self.state.watching = False
                    self.save()
            return False
        self.why = reason
        self.client.abandon()
        return True

    def _complain(self, name: str, release: int, reason: str) -> None:
        """Record a state that lasts once for each release, not at every turn."""
        key = f"{name} {release}"
        if key not in self._complaints:
            with self._store.transaction():
                self._emit(name, {"release": release, "reason": reason})
            self._complaints.add(key)


def _widths(head: Head) -> list[int]:
    """What each layer takes: the latent's width, then those of the hidden layers."""
    return [len(head.weights[f"W{i}"]) for i in range(head.depth)]


def _are_truths(truths: AnyArray, manifest: Manifest) -> bool:
    count = len(manifest.labels)
    if manifest.task == "classification":
        return truths.ndim == 1 and bool(((truths >= 0) & (truths < count)).all())
    return truths.reshape(len(truths), -1).shape == (len(truths), count) and bool(np.isfinite(truths).all())


def _are_moments(folder: Path, manifest: Manifest, head: Head) -> bool:
    if MOMENTS_NPZ not in manifest.files:
        return True
    moments = Moments.load(folder / MOMENTS_NPZ)
    last = head.weights[f"W{head.depth - 1}"]
    return set(moments.labels) == set(manifest.labels) and len(moments.x) == len(last)


def rehearse(folder: Path, manifest: Manifest) -> None:
    """Use everything once that monitors and learning will need: once it serves, a release cannot be refused any more.

    Args:
        folder: A checkpoint that has been verified.
        manifest: Its manifest.

    Raises:
        IntegrityError: Something is missing, or does not fit the rest.
    """
    try:
        stored, reference = load_npz(folder / SELFTEST_NPZ), Reference.load(folder / REFERENCE_NPZ)
        if reference.task != manifest.task:
            raise IntegrityError(f"the monitor reference is of task={reference.task}, the manifest of {manifest.task}")
        monitors = DriftMonitors(reference, tuple(manifest.labels), run_length=1e9, rereference_rows=200)
        thumbnail = Thumbnail(manifest.input.shape)
        monitors.fold(thumbnail(manifest.input.check_batch(stored["x"])), stored["scores"])
        if len(reference.output_mean) != len(output_names(tuple(manifest.labels), manifest.task)):
            raise IntegrityError("the monitor reference has not one channel for each output")
        if not manifest.learns:
            return
        head, memory = Head.load(folder / HEAD_NPZ), FactoryMemory(folder, manifest)
        fisher = load_npz(folder / FISHER_NPZ)
        problems = {
            "the head's labels are not the manifest's": list(head.labels) != manifest.labels,
            "the head is not of the latent's width": head.latent_dim != manifest.latent.dim,
            "the factory memory does not hold latents": memory.latents.dtype != np.uint8
            or memory.latents.shape != (len(memory.truths), manifest.latent.dim),
            "the factory memory's truths are not the head's": not _are_truths(memory.truths, manifest),
            "the moments are not the head's": not _are_moments(folder, manifest, head),
            "the Fisher information is not the head's": {key: value.shape for key, value in fisher.items()}
            != {key: value.shape for key, value in head.weights.items()},
            "the Fisher information is not finite": not all(np.isfinite(value).all() for value in fisher.values()),
        }
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise IntegrityError(f"release {manifest.release} cannot be used: {type(error).__name__}: {error}") from error
    if found := [problem for problem, is_so in problems.items() if is_so]:
        raise IntegrityError(f"release {manifest.release} cannot be used: {'; '.join(found)}")
