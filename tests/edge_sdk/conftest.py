"""What the command line changes in a process is put back after each test; and learning without a trunk."""

import json
import logging
from contextlib import contextmanager
from itertools import pairwise

import msgspec
import numpy as np
import pytest

from edge_sdk.adapt import Adaptation
from edge_sdk.config import DeviceConfig, GateConfig, LearnConfig, PolicyConfig
from edge_sdk.errors import DiskFullError
from edge_sdk.files import npz_bytes
from edge_sdk.head import Head, dequantize
from edge_sdk.join import Judged
from edge_sdk.learn.base import CHALLENGER, LearnJob
from edge_sdk.learn.executor import InlineExecutor
from edge_sdk.learn.moments import Moments
from edge_sdk.learn.slda import closed_form
from edge_sdk.manifest import (
    FISHER_NPZ,
    HEAD_NPZ,
    MANIFEST_NAME,
    MEMORY_NPZ,
    MOMENTS_NPZ,
    FileEntry,
    HeadSpec,
    LatentSpec,
    Manifest,
    TargetSpec,
    digest_of,
    parse_manifest,
)
from edge_sdk.messages import Desired, Need, Offer, Topics, block_count, decode, encode, from_bitmap
from edge_sdk.policy import ResourceState
from edge_sdk.schema import InputSpec
from edge_sdk.slots import Pointer, Slots, Version
from edge_sdk.store import NewSample, Store
from edge_sdk.transport import MemoryBroker, MemoryTransport
from edge_sdk.trial import head_outcomes


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv("EDGE_HOME", raising=False)
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


BLOCK = 16 * 1024


class Publisher:
    """Says what the group should run, and answers requests for blocks."""

    def __init__(self, broker):
        self.topics = Topics()
        self.transport = MemoryTransport(broker)
        self.transport.subscribe(self.topics.up("+", "need"))
        self.transport.connect()
        self.blobs = {}
        self.needs = []
        self._revision = 0

    def add(self, folder):
        """Publish the blobs of a checkpoint folder; returns its offer."""
        for file in folder.iterdir():
            data = file.read_bytes()
            self.blobs[digest_of(data)] = data
        data = (folder / MANIFEST_NAME).read_bytes()
        return Offer(parse_manifest(data).release, digest_of(data), len(data))

    def desire(self, base, *, revoked=()):
        self._revision += 1
        desired = Desired(
            revision=self._revision, base=base, candidate=None, salt="", threshold=0, revoked=list(revoked),
            block_bytes=BLOCK,
        )  # fmt: skip
        self.transport.publish(self.topics.desired("default"), encode(desired), retain=True)

    def pump(self):
        for message in self.transport.receive():
            need = decode(message.payload, Need)
            self.needs.append(need.digest)
            data = self.blobs[need.digest]
            for i in sorted(from_bitmap(need.blocks, block_count(need.size, BLOCK))):
                self.transport.publish(self.topics.block(need.digest, i), data[i * BLOCK : (i + 1) * BLOCK])


@pytest.fixture
def publisher():
    return Publisher(MemoryBroker())


SPEC = LatentSpec(dim=8, scale=0.02, zero_point=128)
LEARNS_SOON = DeviceConfig(
    mode="adapt",
    learn=LearnConfig(executor="inline"),
    policy=PolicyConfig(min_fresh_rows=20, cooldown_s=60, volume_rows=40),
    gate=GateConfig(max_wait_s=3_600, probation_rows=20, probation_s=3_600),
)


class Rig:
    """The learning transaction on latents that tests make up: things, each around a centre of its own.

    A thing that has `moved` looks as the release never saw it. Of a multi-label model the labels say which of the first
    values are large; of a regression each target is the first value.
    """

    def __init__(self, folder, config=LEARNS_SOON, *, task="classification", labels=("a", "b", "c"), hidden=(),
                 moments=False, executor=None):  # fmt: skip
        self.folder, self.config, self.rng, self.now = folder, config, np.random.default_rng(0), 1_000_000.0
        self.executor, self.resources = executor or InlineExecutor(), ResourceState()
        self.full = 0
        """So many transactions find no room at their end."""
        self.fails_on = ""
        """Events of this name find no room."""
        self.slots = Slots(folder / "slots")
        self.manifest = self.write(self.slots.root / "a", task, labels, hidden, moments)
        self.slots._flip(Pointer(current=Version("a", 1, "digest")))
        self.open()

    def write(self, folder, task, labels, hidden=(), moments=False):
        """A checkpoint as far as learning reads it."""
        folder.mkdir(exist_ok=True)
        manifest = Manifest(
            name="rig", release=1, created="", task=task, labels=list(labels), input=InputSpec(shape=[1]),
            latent=SPEC, head=HeadSpec(list(hidden)), thresholds=[0.5] * len(labels) if task == "multilabel" else [],
            targets=[TargetSpec(0.0, 1.0, 0.5)] * (len(labels) if task == "regression" else 0),
            files={MOMENTS_NPZ: FileEntry(0, "")} if moments else {},
        )  # fmt: skip
        rng = np.random.default_rng(7)
        rows = [self.latent(thing, rng=rng) for thing in range(len(labels)) for _ in range(30)]
        latents, truths = np.stack(rows), np.repeat(np.arange(len(labels)), 30)
        if task != "classification":
            truths = np.array([json.loads(self.truth(row, 0, manifest, numbers=True)) for row in latents])
            truths = truths.astype(np.int64 if task == "multilabel" else np.float32)
        widths = (SPEC.dim, *hidden)
        layers = {}
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            layers[f"W{i}"] = rng.normal(size=(inputs, outputs)).astype(np.float32)
            layers[f"b{i}"] = np.zeros(outputs, np.float32)
        last = len(hidden)
        empty = {
            f"W{last}": np.zeros((widths[-1], len(labels)), np.float32),
            f"b{last}": np.zeros(len(labels), np.float32),
        }
        head = Head({**layers, **empty}, tuple(labels))
        known = Moments.of(head.hidden(dequantize(latents, SPEC)), truths, np.ones(len(latents)), labels)
        found = closed_form(known, task)
        head = head.with_last(found.w.astype(np.float32), found.b.astype(np.float32))
        (folder / HEAD_NPZ).write_bytes(head.to_bytes())
        (folder / FISHER_NPZ).write_bytes(npz_bytes({key: np.ones_like(value) for key, value in head.weights.items()}))
        (folder / MEMORY_NPZ).write_bytes(npz_bytes({"latents": latents, "labels": truths}))
        if moments:
            (folder / MOMENTS_NPZ).write_bytes(known.to_bytes())
        return manifest

    def latent(self, thing, *, moved=False, rng=None):
        """uint8 [8], somewhere around the thing's centre."""
        values = (rng or self.rng).normal(0, 0.2, SPEC.dim)
        values[(thing + 4 * moved) % SPEC.dim] += 1.5
        return np.clip(np.round(values / SPEC.scale + SPEC.zero_point), 0, 255).astype(np.uint8)

    def truth(self, latent, thing, manifest=None, *, numbers=False):
        """In stored form; `numbers`: as the factory memory has it."""
        manifest = manifest or self.manifest
        values = dequantize(latent[None], SPEC)[0]
        match manifest.task:
            case "classification":
                return [*manifest.labels, "new", "other"][thing]
            case "multilabel":
                present = [bool(values[i] > 0.5) for i in range(len(manifest.labels))]
                if numbers:
                    return json.dumps([int(is_so) for is_so in present])
                return json.dumps([label for label, is_so in zip(manifest.labels, present, strict=True) if is_so])
            case _:
                return json.dumps([float(values[0])] * len(manifest.labels))

    # ---- the device's part

    def open(self, **changes):
        """Start, or start again as after a power cut."""
        if changes:
            self.config = msgspec.structs.replace(self.config, **changes)
        if hasattr(self, "store"):
            self.store.close()
        self.store = Store(self.folder / "edge.db", durability="normal")
        self.slots = Slots(self.slots.root)
        self.slots.collect_garbage()
        commit = self.store.transaction

        @contextmanager
        def transaction():
            with commit():
                yield
                if self.full:
                    self.full -= 1
                    raise DiskFullError("no room")

        self.store.transaction = transaction
        self.adaptation = Adaptation(
            self.folder / "learn", store=self.store, slots=self.slots, executor=self.executor, config=self.config,
            emit=self.emit,
        )  # fmt: skip
        self.attach()

    def emit(self, name, detail):
        if name == self.fails_on:
            raise DiskFullError("no room")
        self.store.record(self.now, name, detail)

    def attach(self):
        self.attached = None
        self.adaptation.attach(self.slots.pointer.current, self.manifest)
        self.attached = self.slots.pointer.current

    def turn(self, *, mode="adapt", alarms=(), changed_at=None, seconds=1.0):
        """A step of the device's, as far as it concerns learning."""
        self.now += seconds
        if self.attached != self.slots.pointer.current:
            self.attach()
        with self.store.transaction():
            self.adaptation.trim()
            self.adaptation.save()
        self.adaptation.turn(self.now, mode=mode, alarms=alarms, changed_at=changed_at, resources=self.resources)
        if self.attached != self.slots.pointer.current:
            self.attach()

    def add(self, count, role="fresh", *, moved=True, things=None, label=None, time=None, **rest):
        """Labelled rows of all things in turn; returns their keys."""
        things = range(len(self.manifest.labels)) if things is None else things
        new = []
        for i in range(count):
            thing = list(things)[i % len(things)]
            latent = self.latent(thing, moved=moved)
            truth = label or self.truth(latent, thing)
            new.append(
                NewSample(
                    self.now if time is None else time, latent.tobytes(), truth, role, self.manifest.trunk_id, **rest
                )
            )
        with self.store.transaction():
            self.store.add_samples(new)
        (newest,) = self.store.execute("SELECT max(key) FROM samples").fetchone()
        return list(range(newest - count + 1, newest + 1))

    def live(self, count, *, moved=True, label=None):
        """Labelled predictions of the version in use."""
        rows = []
        for i in range(count):
            latent = self.latent(i % 3, moved=moved)
            truth = label or self.truth(latent, i % 3)
            outcome = head_outcomes(self.head, latent[None], [truth], self.manifest)
            rows.append(Judged(latent, truth, bool(outcome.right[0])))
        self.adaptation.see(rows, self.now, predictions=count, errors=0)

    # ---- the way of a challenger

    def change(self, **sections):
        """Other settings from now on, after a restart."""
        self.open(
            **{key: msgspec.structs.replace(getattr(self.config, key), **values) for key, values in sections.items()}
        )

    def run_with(self, executor):
        """Another executor from now on, after a restart."""
        self.executor = executor
        self.open()

    def learn(self, *, turns=1, **rows):
        """Rows that the release gets wrong, to learn from and to judge by, and the turns that take them."""
        self.add(40, **rows)
        self.add(30, "judge")
        for _ in range(turns):
            self.turn()

    def promote(self, **rows):
        self.learn(**rows)
        assert self.state.phase == "probation"

    def confirm(self):
        """End a probation well, and the cool-down after it."""
        self.live(20)
        self.turn()
        assert self.state.phase == "idle"
        assert self.events()[-1] == "confirmed"
        self.now += 60

    def tries(self, turns):
        """Turns of which some find no room on the disk; returns how many."""
        failed = 0
        for _ in range(turns):
            try:
                self.turn()
            except DiskFullError:
                failed += 1
        return failed

    # ---- looking

    @property
    def challenger(self):
        """On trial now; None if there is none."""
        job = self.folder / "learn" / "job" / CHALLENGER
        return Head.load(job) if job.exists() else None

    @property
    def state(self):
        return self.adaptation.state

    @property
    def experience(self):
        return self.adaptation.experience

    def samples(self, role):
        return self.store.samples(role, self.manifest.trunk_id)

    def events(self, name=None):
        entries = self.store.history(limit=2_000)
        return [entry.name for entry in entries] if name is None else [e.detail for e in entries if e.name == name]

    @property
    def moments(self):
        """Of the device; None: nothing was summed up."""
        data = self.store.get(f"moments:{self.manifest.trunk_id[:16]}")
        return Moments.load(data[16:]) if data else None

    @property
    def head(self):
        return self.slots.head(self.slots.pointer.current)


@pytest.fixture
def rig(tmp_path):
    """Makes rigs: `rig(learn={"decay": 1.0}, task="regression")`; keywords of the configuration change it."""
    made = []

    def make(name="rig", **options):
        config, changed = options.pop("config", LEARNS_SOON), {}
        for key in options.keys() & {*DeviceConfig.__struct_fields__}:
            value = options.pop(key)
            changed[key] = msgspec.structs.replace(getattr(config, key), **value) if isinstance(value, dict) else value
        (tmp_path / name).mkdir()
        made.append(Rig(tmp_path / name, msgspec.structs.replace(config, **changed), **options))
        return made[-1]

    yield make
    for each in made:
        each.store.close()


@pytest.fixture
def never_sure():
    """Settings for rigs: no challenger is ever proven better, or worse."""
    return {"gate": {"alpha": 1e-300, "class_margin": 1.0, "factory_margin": 1.0}}


class Working:
    """A learner that works until it is told what came of it."""

    def __init__(self):
        self.paused, self.worked_s, self.result, self.calls = False, 0.0, None, []

    def start(self, folder):
        self.calls.append("start")

    def poll(self):
        result, self.result = self.result, None
        return result

    def pause(self):
        self.paused = True
        self.calls.append("pause")

    def resume(self):
        self.paused = False
        self.calls.append("resume")

    def cancel(self):
        self.calls.append("cancel")


@pytest.fixture
def working():
    return Working()


class Recording(InlineExecutor):
    """Keeps the jobs that it runs."""

    def __init__(self):
        super().__init__()
        self.jobs = []

    def start(self, folder):
        self.jobs.append(LearnJob.load(folder))
        super().start(folder)


@pytest.fixture
def recording():
    return Recording()
