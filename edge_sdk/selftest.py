"""At install: is the model right on this CPU, and which of its variants is faster?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from edge_sdk.errors import InputError, ModelError, SelfTestError
from edge_sdk.files import load_npz, replace_file
from edge_sdk.head import Head
from edge_sdk.manifest import HEAD_NPZ, SELFTEST_NPZ, Manifest
from edge_sdk.model import Arrays, Ran, ServedModel, Trunks, checked_state, load_model, trunk_key
from edge_sdk.types import AnyArray, LatentArray, Variant

CHOICE_NAME = "variant.json"
FASTER = 0.9
"""INT8 serves if it takes at most this share of the time of FP32, for it is never more exact."""
_TIMED_RUNS = 30
_TIMED_S = 0.5
_LATENT_STEPS = 2
_LEAST_AGREEMENT = 0.98
_LEAST_SQNR_DB: dict[Variant, float] = {"int8": 20.0, "fp32": 50.0}
"""How near a whole model must come to its stored output: rounding differs between CPUs, more so in INT8."""


class Choice(msgspec.Struct, frozen=True):
    """Which variant of a release serves, fixed for the release, and why."""

    variant: Variant
    reason: str
    int8_ms: float | None = None
    """Median time of one prediction at install; None: not timed."""
    fp32_ms: float | None = None


_READ = msgspec.json.Decoder(Choice)  # as in `manifest.py`: built before threads may read their first one


def self_test(folder: Path, manifest: Manifest, *, variant: Variant, trunks: Trunks | None = None) -> ServedModel:
    """Replay the stored inputs with one variant and the shipped head, and compare with the stored outputs.

    Args:
        folder: A checkpoint folder that has been verified.
        manifest: Its manifest.
        variant: Each has stored outputs of its own.
        trunks: What is loaded already, and where the trunk goes that is loaded here.

    Returns:
        The model that was tested, loaded.

    Raises:
        SelfTestError: The outputs differ beyond tolerance: of latents 99 % may be 2 steps (of 255) off, and 98 % of the
            answers must be the stored ones; the first output of a whole model must come near the stored one.
        RuntimeUnavailableError: The engine refuses the model.
    """
    stored = _stored(folder)
    expected = stored.get(f"out.{variant}")
    if expected is None:
        raise SelfTestError(f"{SELFTEST_NPZ} lacks the outputs of {variant}")
    head = None if manifest.adapt == "none" else Head.load(folder / HEAD_NPZ)
    model = load_model(folder, manifest, variant, head, {} if trunks is None else trunks)
    try:
        ran = _replay(model, manifest, stored, len(stored["x"]))
    except InputError as error:
        raise SelfTestError(f"the stored inputs do not fit the manifest: {error}") from error
    if head is not None:
        _compare_latents(ran.latents, expected, variant)
    elif manifest.task != "raw":
        _compare_outputs([ran.scores], [expected], variant)
    else:
        firsts = [next(iter(row.values())) for row in ran.outputs]
        _compare_outputs(firsts, list(expected), variant)
    if not np.isfinite(ran.scores).all():
        raise SelfTestError("the model puts out NaN or infinity")
    if manifest.task == "classification":
        agreement = float((ran.scores.argmax(1) == stored["scores"].argmax(1)).mean())
        if agreement < _LEAST_AGREEMENT:
            raise SelfTestError(f"only {agreement:.1%} of the stored predictions are reproduced here")
    return model


def choose_variant(
    folder: Path, manifest: Manifest, wanted: Literal["auto", "int8", "fp32"], trunks: Trunks | None = None
) -> Choice:
    """The variant to serve: INT8 where it reproduces its stored outputs on this CPU and is faster, else FP32.

    Args:
        folder: A checkpoint folder that has been verified.
        manifest: Its manifest.
        wanted: One of the variants, or "auto".
        trunks: Where the trunk that was chosen goes, loaded as it is.

    Raises:
        SelfTestError: None, or not the one asked for, reproduces its stored outputs here.
    """
    candidates = [name for name in manifest.model_files if wanted in ("auto", name)]
    if wanted == "auto" and manifest.serve == "fp32":
        candidates = ["fp32"]
    fit: dict[Variant, ServedModel] = {}
    loaded: Trunks = {}
    problems: list[str] = []
    for variant in candidates:
        try:
            fit[variant] = self_test(folder, manifest, variant=variant, trunks=loaded)
        except (SelfTestError, ModelError) as error:
            problems.append(f"{variant}: {error}")
    if not fit:
        raise SelfTestError(f"release {manifest.release} fails its self-test here: "
                            f"{'; '.join(problems) or f'it has no {wanted}'}")  # fmt: skip
    if wanted != "auto":
        choice = Choice(candidates[0], "as configured")
    elif len(fit) == 1:
        alone = "INT8 was found to lose too much" if manifest.serve == "fp32" else "the only variant there is"
        choice = Choice(next(iter(fit)), "; ".join(problems) or alone)
    else:
        stored = _stored(folder)
        times = time_in_turns({name: partial(_replay, model, manifest, stored, 1) for name, model in fit.items()})
        choice = prefer(times["int8"], times["fp32"])
    if trunks is not None:
        key = trunk_key(manifest, choice.variant)
        trunks[key] = loaded[key]
    return choice


def write_choice(folder: Path, choice: Choice) -> None:
    """Keep the choice beside the release's files: it is fixed for the release, and other processes may ask.

    Raises:
        StoreError: It cannot be written.
    """
    replace_file(folder / CHOICE_NAME, msgspec.json.encode(choice))


def read_choice(folder: Path, manifest: Manifest) -> Choice | None:
    """The choice kept beside a release's files; None if it was lost in a crash."""
    try:
        choice = _READ.decode((folder / CHOICE_NAME).read_bytes())
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return choice if choice.variant in manifest.model_files else None


def prefer(int8_ms: float, fp32_ms: float) -> Choice:
    """INT8 if it is at least 10 % faster; FP32 is more exact."""
    variant: Variant = "int8" if int8_ms <= FASTER * fp32_ms else "fp32"
    reason = f"INT8 takes {int8_ms / fp32_ms:.2f} of the time of FP32 here (it serves at {FASTER:g} or less)"
    return Choice(variant, reason, round(int8_ms, 4), round(fp32_ms, 4))


def time_in_turns(
    runs: Mapping[Any, Callable[[], object]], *, repeats: int = _TIMED_RUNS, seconds: float = _TIMED_S
) -> dict[Any, float]:
    """Median time of each run, in milliseconds. They take turns, so that a busy moment strikes all.

    Args:
        runs: What is timed, by name.
        repeats: Most rounds.
        seconds: After so long there are no further rounds; there are at least three.
    """
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # the first run allocates
        run()
    began = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - began > seconds:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: float(np.median(values)) for name, values in times.items()}


def _stored(folder: Path) -> dict[str, AnyArray]:
    stored = load_npz(folder / SELFTEST_NPZ)
    if not {"x", "scores"} <= stored.keys() or not stored["x"].size:
        raise SelfTestError(f"{SELFTEST_NPZ} lacks x or scores")
    if counts := {name: array.shape[:1] for name, array in stored.items() if array.shape[:1] != stored["x"].shape[:1]}:
        raise SelfTestError(f"{SELFTEST_NPZ}: not as many rows as x has {stored['x'].shape[:1]}: {counts}")
    return stored


def _replay(model: ServedModel, manifest: Manifest, stored: Arrays, rows: int) -> Ran:
    spec = manifest.input
    if missing := [s.name for s in manifest.more_inputs if f"x.{s.name}" not in stored]:
        raise SelfTestError(f"{SELFTEST_NPZ} lacks the input {', '.join(missing)}")
    x = spec.apply(spec.check_batch(stored["x"][:rows]))
    more = {s.name: s.apply(s.check_batch(stored[f"x.{s.name}"][:rows])) for s in manifest.more_inputs}
    start = checked_state(manifest.state, None)
    # row by row: a session keeps for good the memory that its largest call took, and this one may go on to serve
    ran = [model.run(x[i : i + 1], {**{k: v[i : i + 1] for k, v in more.items()}, **start}) for i in range(len(x))]
    latents, scores = (np.concatenate([r[i] for r in ran]) for i in (0, 1))
    return Ran(latents, scores, [row for r in ran for row in r.outputs])


def _compare_latents(latents: LatentArray, expected: AnyArray, variant: Variant) -> None:
    if latents.shape != expected.shape or latents.dtype != np.uint8:
        raise SelfTestError(f"latents are {latents.dtype} {latents.shape}, stored are {expected.shape}")
    off = np.abs(latents.astype(np.int16) - expected.astype(np.int16))
    if np.quantile(off, 0.99) > _LATENT_STEPS:
        raise SelfTestError(
            f"{variant} latents differ by up to {off.max()} of 255 steps here; allowed are {_LATENT_STEPS}"
        )


def _compare_outputs(outputs: Iterable[AnyArray], expected: Sequence[AnyArray], variant: Variant) -> None:
    for got, wanted in zip(outputs, expected, strict=True):
        if got.shape != wanted.shape:
            raise SelfTestError(f"{variant} puts out shape {got.shape}, stored is {wanted.shape}")
        if got.dtype.kind not in "fiub":  # text
            signal, noise = float(got.size), float((got != wanted).sum())
        else:
            exact = wanted.astype(np.float64)  # whole numbers would wrap, truth values cannot be subtracted
            with np.errstate(over="ignore", invalid="ignore"):
                signal, noise = float(np.square(exact).sum()), float(np.square(got - exact).sum())
        # neither NaN nor infinity is near anything
        if not (noise < np.inf and noise <= signal * 10 ** (-_LEAST_SQNR_DB[variant] / 10)):
            raise SelfTestError(
                f"{variant} does not come within {_LEAST_SQNR_DB[variant]:g} dB of its stored output here"
            )
