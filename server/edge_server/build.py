"""A new base from a dataset that the owner has: trained, quantized, packed, and held against the release in use.

Needs the extra `quantize`. One TOML file describes a candidate, so that it can be made again.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from edge_quantize.build import build_checkpoint
from edge_quantize.card import CardText
from edge_quantize.compare import Comparison, compare_variants, encode
from edge_quantize.data import DataFormat, Dataset
from edge_quantize.learning import Memory
from edge_quantize.pack import repack_checkpoint
from edge_quantize.quantize import QuantRecipe
from edge_quantize.recipe import DataRecipe
from edge_sdk.config import LearnConfig
from edge_sdk.errors import ConfigError
from edge_sdk.experience import FactoryMemory
from edge_sdk.files import replace_file, sha256_file, storage_error
from edge_sdk.head import Head, dequantize
from edge_sdk.learn.base import LearnJob, Rows, load_learner
from edge_sdk.learn.moments import Moments
from edge_sdk.manifest import CARD, HEAD_NPZ, MANIFEST_NAME, MOMENTS_NPZ, Manifest, digest_of, parse_manifest
from edge_sdk.schema import InputSpec
from edge_sdk.tasks import standardise
from edge_sdk.types import AnyArray, Task
from edge_server.errors import TrainerError
from edge_server.evaluate import Evaluation, evaluate
from edge_server.records import CandidateRecord, ReleaseRecord
from edge_server.registry import Registry
from edge_server.releases import BlobStore

HEAD_TRAINER = "head"


class BuildRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A candidate, written down. File names are relative to the recipe's folder.

    Attributes:
        start: base: from the group's release in use; scratch: from nothing, which takes a trainer, `labels`, `input`.
        trainer: head: train the head of the release in use anew, on its own trunk; or "module:function", a file beside
            the recipe or an installed module, which is given a `TrainJob`.
        data: Files of rows, as in a quantization recipe.
        name: What the model is called; None: as the release in use.
        release: Its number; None: the one after the newest.
        labels: None: those of the release in use. More than these may follow them.
        task: Of a candidate from scratch.
        input: The input contract; None: that of the release in use.
        thresholds: Of a multi-label network.
        created: ISO 8601; None takes the time of the run, which then differs in every run.
        seed: Of all chance.
        learner: How the head is trained: one of the devices' learners, see `learn.learner`.
        quantization: Of a network that the trainer made.
        memory: How much ships of what the head was trained on.
        card: What only a person can say about the model.
    """

    start: Literal["base", "scratch"] = "base"
    trainer: str = HEAD_TRAINER
    data: DataRecipe
    name: str | None = None
    release: Annotated[int, msgspec.Meta(ge=1)] | None = None
    labels: list[str] | None = None
    task: Task = "classification"
    input: InputSpec | None = None
    thresholds: list[float] = []
    created: str | None = None
    seed: int = 0
    learner: str = "hybrid"
    quantization: QuantRecipe = QuantRecipe()
    memory: Memory = Memory()
    card: CardText = CardText()

    def __post_init__(self) -> None:
        if self.start == "scratch":
            if self.trainer == HEAD_TRAINER:
                raise ValueError('start = "scratch" needs a trainer of your own: trainer = "module:function"')
            missing = [name for name in ("name", "labels", "input") if getattr(self, name) is None]
            if missing:
                raise ValueError(f'start = "scratch" needs {", ".join(missing)}')
        if self.data.train is None:
            raise ValueError("data.train must name the rows to train on")


@dataclass(frozen=True)
class TrainJob:
    """What a trainer is given. It returns a `Head` on the trunk of `start`, or a network: torch, an ONNX graph or file.

    Attributes:
        start: Folder of the release in use, a checkpoint; None: from scratch.
        manifest: Of that release.
        data: Checked rows in the app's units; truths are positions in `labels`.
        labels: What the network has to tell apart.
        task: What the truth means.
        input: The input contract; `input.apply(x)` is what a network takes.
        seed: Of all chance.
    """

    start: Path | None
    manifest: Manifest | None
    data: Dataset
    labels: tuple[str, ...]
    task: Task
    input: InputSpec
    seed: int


Trainer = Callable[[TrainJob], Any]


@dataclass(frozen=True)
class Candidate:
    """What was built."""

    record: CandidateRecord
    evaluation: Evaluation
    comparison: Comparison
    folder: Path


def load_build(path: Path) -> BuildRecipe:
    """Read a recipe.

    Raises:
        ConfigError: The file is missing or no TOML, or a key is unknown, missing or out of range.
    """
    try:
        return msgspec.toml.decode(path.read_bytes(), type=BuildRecipe)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def build(
    registry: Registry, path: Path, *, out: Path, group: str = "default", actor: str = "library",
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Candidate:  # fmt: skip
    """Make the candidate that a recipe describes, compare it with the group's release in use, and keep how it did.

    Args:
        registry: Of the coordinator.
        path: The recipe.
        out: The checkpoint folder to make; must not exist.
        group: Whose release in use it starts from and is compared with.
        actor: Who asks, for the audit.
        progress: Told each step: its number, how many there are, and what it is.

    Raises:
        ConfigError: A setting does not fit, or the trainer cannot be imported.
        TrainerError: The trainer failed.
        EdgeError: As in `build_checkpoint` and `evaluate`.
    """
    recipe = load_build(path)
    if out.exists():
        raise ConfigError(f"{out} exists already: choose another folder")
    base = _base(registry, group)
    if recipe.start == "base" and base is None:
        raise ConfigError(f'group {group!r} has no release to start from: start = "scratch", or push one first')
    with tempfile.TemporaryDirectory(prefix="edge-build-") as scratch:
        champion = None if base is None else write_release(registry.blobs, base, Path(scratch) / "base")
        progress(1, 5, "reading and checking rows")
        job = _job(recipe, path.resolve().parent, champion)
        progress(2, 5, f"training: {recipe.trainer}")
        trained = _trained(recipe, path.resolve().parent, job)
        progress(3, 5, "quantizing and packing")
        lineage = _lineage(recipe, path, base)
        manifest = _pack(recipe, job, trained, champion, out, release=_number(registry, recipe), lineage=lineage,
                         created=recipe.created or _now(registry))  # fmt: skip
        progress(4, 5, "comparing INT8 with float")
        rows = job.data
        comparison = compare_variants(out, rows.holdout_x, rows.holdout_y, slices=rows.slices, memory=False)
        progress(5, 5, "comparing with the release in use")
        found = evaluate(champion, out, rows.holdout_x, rows.holdout_y, job.labels, rows.slices)
    report: dict[str, Any] = {
        "lineage": lineage,
        "evaluation": msgspec.to_builtins(found),
        "metrics": manifest.metrics,
        "agreement": None if np.isnan(comparison.agreement) else comparison.agreement,
    }
    now = registry.clock.now()
    record = CandidateRecord(
        digest=digest_of((out / MANIFEST_NAME).read_bytes()), name=manifest.name, release=manifest.release,
        champion=None if base is None else base.release, verdict=found.verdict, reason=found.reason, built=now,
        report=report,
    )  # fmt: skip
    with registry.store.transaction():
        registry.store.candidates.save(record, card=(out / CARD).read_text("utf-8"))
        detail = {"release": record.release, "digest": record.digest, "verdict": record.verdict}
        registry.store.audit.add(now, actor, "candidate built", detail)
    return Candidate(record, found, comparison, out)


# ---- from the release in use


def write_release(blobs: BlobStore, release: ReleaseRecord, folder: Path) -> Path:
    """The checkpoint folder of a release, from the coordinator's own files.

    Raises:
        StoreError: A file is not here, or cannot be written.
    """
    data = blobs.read(release.digest)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise storage_error(error, f"cannot make {folder}") from error
    for name, entry in parse_manifest(data).files.items():
        replace_file(folder / name, blobs.read(entry.sha256))
    replace_file(folder / MANIFEST_NAME, data)
    return folder


def _base(registry: Registry, group: str) -> ReleaseRecord | None:
    number = registry.store.groups.get(group).base
    return None if number is None else registry.store.releases.find(number=number)[0]


def _number(registry: Registry, recipe: BuildRecipe) -> int:
    newest = registry.store.releases.find()
    return recipe.release or (newest[0].release + 1 if newest else 1)


def _now(registry: Registry) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(registry.clock.now()))


# ---- data and training


def _job(recipe: BuildRecipe, folder: Path, champion: Path | None) -> TrainJob:
    start = champion if recipe.start == "base" else None
    manifest = None if start is None else parse_manifest((start / MANIFEST_NAME).read_bytes())
    task = recipe.task if manifest is None else manifest.task
    labels = tuple(recipe.labels if recipe.labels is not None else manifest.labels if manifest is not None else ())
    spec = recipe.input or (manifest.input if manifest is not None else None)
    assert spec is not None  # a recipe from scratch has one
    if manifest is not None and tuple(labels[: len(manifest.labels)]) != tuple(manifest.labels):
        raise ConfigError(f"labels must begin with those of the release in use: {', '.join(manifest.labels)}")
    data = recipe.data
    rows = Dataset.load(
        _inside(folder, data.train), folder / data.holdout, _inside(folder, data.calibration),
        validation=_inside(folder, data.validation), spec=spec, labels=labels, task=task,
        form=DataFormat(target=data.target, slices=data.slices),
    )  # fmt: skip
    return TrainJob(start, manifest, rows.checked(spec, labels, task=task), labels, task, spec, recipe.seed)


def train_head(job: TrainJob, learner: str = "hybrid") -> Head:
    """Train the head of the release in use anew on all rows, its trunk unchanged: devices keep what they learned.

    Args:
        job: With a release that learns.
        learner: One of the devices' learners, see `learn.learner`. The release's own memory is replayed, and what it
            knows of its data by its moments counts on.

    Raises:
        ConfigError: The release is served whole and has no head, or there is no such learner.
        LearnError: Nothing came of it.
    """
    manifest, start = job.manifest, job.start
    if manifest is None or start is None or not manifest.learns:
        raise ConfigError('the release in use has no head to train: trainer = "module:function"')
    base = Head.load(start / HEAD_NPZ).grown(job.labels)
    latents = encode(start, job.data.train_x, spec=manifest.input)
    targets = _targets(job.data.train_y, manifest)
    rows = Rows(latents, targets, np.ones(len(latents), np.float32))
    memory = FactoryMemory(start, manifest)
    replay = memory.replayed(len(memory.latents))
    if manifest.task == "multilabel" and len(job.labels) > len(manifest.labels):
        more = np.zeros((len(replay), len(job.labels) - len(manifest.labels)), np.float32)
        replay = Rows(replay.latents, np.concatenate([replay.targets, more], axis=1), replay.weights)
    width = len(base.weights[f"W{base.depth - 1}"])
    known = Moments.load(start / MOMENTS_NPZ) if MOMENTS_NPZ in manifest.files else Moments.none(manifest.labels, width)
    features = base.hidden(dequantize(latents, manifest.latent))
    moments = known.aligned(job.labels) + Moments.of(features, targets, rows.weights, job.labels)
    trained, _ = load_learner(learner)(
        LearnJob(
            champion=base, base=base, anchor=base.weights,
            fisher={key: np.zeros_like(value) for key, value in base.weights.items()},
            fresh=rows, replay=replay, moments=moments,
            fresh_mass=np.zeros(len(rows), np.float32),  # they are in the moments already
            latent=manifest.latent, task=manifest.task, config=LearnConfig(learner=learner), seed=job.seed,
        )
    )  # fmt: skip
    return trained


def _targets(y: AnyArray, manifest: Manifest) -> AnyArray:
    if manifest.task == "regression":
        return standardise(y, manifest)
    return y.astype(np.int64) if manifest.task == "classification" else y.astype(np.float32)


def _trained(recipe: BuildRecipe, folder: Path, job: TrainJob) -> Any:
    """What the recipe's trainer made.

    Raises:
        ConfigError: It cannot be imported, or does not fit the release.
        LearnError: Nothing came of it.
        TrainerError: It is the owner's, and failed.
    """
    if recipe.trainer == HEAD_TRAINER:
        return train_head(job, recipe.learner)
    train = _trainer(recipe, folder)
    try:
        trained = train(job)
    except (Exception, SystemExit) as error:  # somebody else's code may raise anything
        raise TrainerError(f"trainer {recipe.trainer} failed: {_words(error)}{_place(error)}") from error
    if trained is None:
        raise TrainerError(f"trainer {recipe.trainer} returned None: it must return a head or a network")
    return trained


def _trainer(recipe: BuildRecipe, folder: Path) -> Trainer:
    """The owner's function.

    Raises:
        ConfigError: It cannot be imported, or is none.
    """
    module, _, name = recipe.trainer.partition(":")
    sys.path.insert(0, str(folder))
    try:
        found: Trainer = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # a module may do anything when it is imported
        raise ConfigError(f"trainer {recipe.trainer!r} cannot be imported: {_words(error)}{_place(error)}") from error
    finally:
        sys.path.remove(str(folder))
    if not callable(found):
        raise ConfigError(f"trainer {recipe.trainer!r} is no function but {type(found).__name__}")
    return found


def _words(error: BaseException) -> str:
    """An error in one line, as it stands at the end of a traceback."""
    return " ".join("".join(traceback.format_exception_only(error)).split())


def _place(error: BaseException) -> str:
    """Where it was raised in the owner's code; nothing if it was not there."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if "importlib" not in frame.filename and "site-packages" not in frame.filename]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


# ---- packing


def _pack(
    recipe: BuildRecipe, job: TrainJob, trained: Any, champion: Path | None, out: Path, *, release: int,
    lineage: dict[str, str], created: str,
) -> Manifest:  # fmt: skip
    told = "; ".join(f"{what.replace('_', ' ')}: {value}" for what, value in lineage.items())
    card = msgspec.structs.replace(recipe.card, data="\n\n".join(filter(None, [recipe.card.data, f"Lineage. {told}."])))
    parent = champion if recipe.start == "base" else None
    if isinstance(trained, Head):
        if parent is None:
            raise ConfigError("a trainer that starts from scratch returns a network, not a head")
        return repack_checkpoint(
            parent, out, head=trained, data=job.data, release=release, created=created, seed=recipe.seed,
            memory=recipe.memory, card=card,
        )  # fmt: skip
    name = recipe.name or (job.manifest.name if job.manifest is not None else "model")
    return build_checkpoint(
        trained, job.data, labels=job.labels, name=name, release=release, target=out, created=created,
        input_spec=job.input, task=job.task, thresholds=recipe.thresholds, parent=parent, seed=recipe.seed,
        quantization=recipe.quantization, memory=recipe.memory, card=card, measure_memory=False,
    ).manifest  # fmt: skip


def _lineage(recipe: BuildRecipe, path: Path, base: ReleaseRecord | None) -> dict[str, str]:
    folder, data = path.resolve().parent, recipe.data
    parent = "none" if recipe.start == "scratch" or base is None else f"release {base.release}, SHA-256 {base.digest}"
    return {
        "made_from": parent,
        "trainer": f"{recipe.trainer} ({recipe.learner})" if recipe.trainer == HEAD_TRAINER else recipe.trainer,
        "training_rows_SHA-256": hash_rows(folder / str(data.train)),
        "held_out_rows_SHA-256": hash_rows(folder / data.holdout),
        "recipe_SHA-256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def hash_rows(path: Path) -> str:
    """SHA-256 of a file of rows; of NAME_x.npy of it and of NAME_y.npy beside it, one after the other, hashed again."""
    if path.suffix != ".npy":
        return sha256_file(path)
    truth = path.with_name(f"{path.stem.removesuffix('_x')}_y.npy")
    both = [sha256_file(file) for file in (path, truth) if file.exists()]  # raw outputs have no truth
    return hashlib.sha256("".join(both).encode()).hexdigest()


def _inside(folder: Path, name: str | None) -> Path | None:
    return None if name is None else folder / name
