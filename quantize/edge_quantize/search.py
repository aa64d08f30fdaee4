"""The fastest INT8 recipe that is right enough, found by trying."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from onnx import ModelProto

from edge_quantize.calibrate import Calibration, Feeds, calls, stratified
from edge_quantize.errors import CalibrationWarning, DataError, ExportError
from edge_quantize.graph import LATENT, canonical_bytes, run
from edge_quantize.quantize import Quantizer, QuantRecipe
from edge_quantize.sensitivity import Sensitivity, measure
from edge_sdk.errors import EdgeError
from edge_sdk.head import dequantize
from edge_sdk.runtime import new_session
from edge_sdk.stats import wilson_interval
from edge_sdk.types import AnyArray, IndexArray

Score = Callable[[Any], AnyArray]
"""For each validation row, whether the answer is right (bool), or how wrong it is (float, 0 is perfect). Given are, of
a trunk, its latents as numbers: float32 [N, D], dequantized; of a network served whole, its outputs by name."""
Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and what comes next."""

FP32 = "fp32"
_Z = 1.645
_SAME_SPEED = 1.03
_METHODS: tuple[Literal["minmax", "percentile", "entropy"], ...] = ("minmax", "percentile", "entropy")
_ROWS = 8
"""A call: every session keeps what its largest call took."""
_LEAST_ROUNDS = 5


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When to stop searching. One recipe is tried and timed in any case."""

    max_seconds: float = 600.0
    """No recipe is begun after three quarters of it; the rest is for timing."""
    max_trials: int = 32
    """Recipes tried, without FP32."""
    repeats: int = 100
    """Predictions timed for each candidate, if there is time."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: A number is not above zero.
        """
        for name in self.__struct_fields__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One recipe, or FP32, and what was measured.

    Attributes:
        name: The recipe in words; "fp32".
        recipe: None for FP32.
        score: Share of right answers on the validation rows, or mean error.
        loss: How much worse than FP32 on the same rows: difference of the shares of right answers, or rise of the
            mean error as a share of FP32's.
        loss_low, loss_high: One-sided 95 % confidence bounds of it.
        p50_ms: Median time at batch 1 on one thread, all candidates taking turns; of a trunk, without the head.
        size_bytes: Of the model file.
        error: Why the recipe failed; then there are no numbers.
    """

    name: str
    recipe: QuantRecipe | None = None
    score: float = math.nan
    loss: float = math.nan
    loss_low: float = math.nan
    loss_high: float = math.nan
    p50_ms: float = math.nan
    size_bytes: int = 0
    error: str = ""


class Choice(msgspec.Struct, frozen=True):
    """Which trial won, and why.

    Attributes:
        trial: An INT8 recipe, or FP32.
        proven: The confidence bound is within the loss allowed; else the point estimate alone is. True for FP32.
        reason: In words.
    """

    trial: Trial
    proven: bool
    reason: str


class SearchResult(msgspec.Struct, frozen=True):
    """Everything that was tried.

    Attributes:
        choice: What to serve.
        trials: FP32 first, then in the order tried.
        max_loss: The loss allowed.
        rows: Validation rows.
        seconds: Time taken.
        stopped: Which budget ended the search; empty if everything was tried.
        sensitivity: By layer, of the recipe whose layers were tried in float.
    """

    choice: Choice
    trials: list[Trial]
    max_loss: float
    rows: int
    seconds: float
    stopped: str
    sensitivity: Sensitivity | None

    @property
    def recipe(self) -> QuantRecipe:
        """What to quantize with: the recipe chosen; where FP32 is, the one that loses least.

        A checkpoint has both variants, and each device times them for itself.
        """
        if self.choice.trial.recipe is not None:
            return self.choice.trial.recipe
        best = min(_worked(self.trials), key=lambda trial: (trial.loss, trial.p50_ms))
        assert best.recipe is not None
        return best.recipe

    def table(self) -> str:
        """Plain text for a terminal."""
        width = max(len(trial.name) for trial in self.trials)
        lines = [f"  {'recipe':{width}}{'score':>8}{'loss':>9}{'95 % bounds':>19}{'p50 ms':>9}{'size kB':>10}"]
        for trial in self.trials:
            mark = "*" if trial == self.choice.trial else " "
            if trial.error:
                lines.append(f"{mark} {trial.name:{width}}  {trial.error.splitlines()[0]}")
                continue
            bounds = f"{trial.loss_low:+.4f} to {trial.loss_high:+.4f}" if trial.recipe is not None else ""
            lines.append(
                f"{mark} {trial.name:{width}}{trial.score:>8.4f}{trial.loss:>+9.4f}{bounds:>19}"
                f"{trial.p50_ms:>9.3f}{trial.size_bytes / 1000:>10.1f}"
            )
        tail = [f"stopped: {self.stopped}"] if self.stopped else []
        return "\n".join([*lines, f"{self.rows} rows, {self.seconds:.0f} s; {self.choice.reason}", *tail])

    def to_json(self) -> bytes:
        """Indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


def search(
    model: ModelProto,
    calibration: Feeds,
    validation: Feeds,
    *,
    score: Score,
    whole: bool = False,
    max_loss: float = 0.01,
    min_speedup: float = 1.1,
    float_layers: tuple[int, ...] = (1, 2, 4),
    percentile: float = 99.99,
    budget: Budget | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> SearchResult:
    """Try recipes and choose the fastest that is right enough.

    Tried are uint8 and int8 activations, each by extremes, percentile and entropy; heavy layers alone; the best of
    these with its most sensitive layers in float; and one weight scale a layer. Accuracy is compared row by row with
    FP32.

    Args:
        model: A float trunk, or a network that is served whole.
        calibration: Rows as the network takes them; ranges come from these.
        validation: Rows that are neither calibrated on nor among those that the final comparison is made with.
        score: What is right.
        whole: The network is served whole.
        max_loss: How much accuracy may be lost against FP32, as a share of all rows (or of FP32's mean error).
        min_speedup: How much faster than FP32 INT8 must be to be worth it.
        float_layers: How many of the most sensitive layers are left in float.
        percentile: Of the percentile method.
        budget: When to stop.
        progress: Told before every step.
        clock: Seconds.

    Raises:
        DataError: The rows cannot be used, or most validation rows are calibration rows.
        ExportError: No recipe works.
        RuntimeUnavailableError: The engine refuses the float network.

    Warns:
        CalibrationWarning: There are too few validation rows to show that the recipe chosen is right enough.
    """
    _refuse_shared(calibration, validation)
    tried = _Tried(model, calibration, validation, score, whole=whole)
    budget, start = budget or Budget(), clock()
    stopped, found = "", None
    with tempfile.TemporaryDirectory() as folder:
        steps = _recipes(tried, float_layers, percentile)
        total = 4 * len(_METHODS) + len(float_layers) + 4
        _tell(progress, 0, total, FP32)
        tried.add_float(Path(folder))
        for done in itertools.count(1):
            if done > 1 and clock() - start > 0.75 * budget.max_seconds:
                stopped = f"{budget.max_seconds:g} s allowed"
                break
            recipe = next(steps, None)
            if recipe is None:
                break
            if done > budget.max_trials:
                stopped = f"{budget.max_trials} recipes allowed"
                break
            _tell(progress, done, total, recipe.name)
            tried.add(recipe, Path(folder))
        _tell(progress, total - 1, total, "timing")
        trials = tried.timed(budget.repeats, lambda: clock() - start > budget.max_seconds, clock)
        found = tried.sensitivity
    if not _worked(trials):
        raise ExportError(f"no INT8 recipe works; {trials[1].name}: {trials[1].error}")
    choice = choose(trials, max_loss=max_loss, min_speedup=min_speedup)
    if not choice.proven:
        warnings.warn(f"search on {tried.rows} rows: {choice.reason}", CalibrationWarning, stacklevel=2)
    _tell(progress, total, total, choice.trial.name)
    return SearchResult(choice, trials, max_loss, tried.rows, clock() - start, stopped, found)


def choose(trials: list[Trial], *, max_loss: float, min_speedup: float = 1.1) -> Choice:
    """Of those fast enough, the fastest that is surely right enough; else the fastest that seems so; else FP32.

    Of recipes as fast as the fastest within 3 %, which a repetition could order otherwise, the one that loses least.

    Args:
        trials: FP32 and any recipes.
        max_loss: Largest loss allowed.
        min_speedup: Least ratio of FP32's time to the recipe's.

    Raises:
        ValueError: FP32 is not among the trials.
    """
    base = next((trial for trial in trials if trial.recipe is None), None)
    if base is None:
        raise ValueError("there is nothing to compare with: no trial of FP32")
    worked = _worked(trials)
    if not worked:
        return Choice(base, proven=True, reason="FP32: no INT8 recipe works")
    fast = [trial for trial in worked if trial.p50_ms * min_speedup <= base.p50_ms]
    if not fast:
        best = min(worked, key=lambda trial: trial.p50_ms)
        return Choice(
            base,
            proven=True,
            reason=f"FP32: no INT8 recipe is {min_speedup:.2f} times as fast; {best.name} takes {best.p50_ms:.3f} ms "
            f"of {base.p50_ms:.3f}",
        )
    if sure := [trial for trial in fast if trial.loss_high <= max_loss]:
        best = _fastest(sure)
        bound = f"loses at most {best.loss_high:.4f} of {max_loss:g} allowed, with 95 % confidence"
        return Choice(best, proven=True, reason=f"{best.name}: {base.p50_ms / best.p50_ms:.2f} times as fast, {bound}")
    if likely := [trial for trial in fast if trial.loss <= max_loss]:
        best = _fastest(likely)
        bound = (
            f"seems to lose {best.loss:.4f}, but too few rows to say whether it is at most {max_loss:g} "
            f"(it may be {best.loss_high:.4f}); give more validation rows"
        )
        return Choice(best, proven=False, reason=f"{best.name}: {base.p50_ms / best.p50_ms:.2f} times as fast, {bound}")
    best = min(fast, key=lambda trial: trial.loss)
    return Choice(
        base,
        proven=True,
        reason=f"FP32: every faster INT8 recipe loses more than {max_loss:g}; {best.name} {best.loss:.4f}",
    )


def paired_loss(before: AnyArray, after: AnyArray) -> tuple[float, float, float]:
    """How much worse `after` is than `before` on the same rows, with one-sided 95 % bounds.

    Args:
        before: [N], whether each answer was right (bool) or its error (float, 0 is perfect).
        after: The same of another model.

    Returns:
        The loss and its lower and upper bound: of shares of right answers, or of the mean error as a share of
        that of `before`.

    Raises:
        DataError: The arrays do not belong together, are empty or not finite.

    Source:
        Newcombe 1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I (his method 10, applied
        to the two kinds of rows on which the answers differ), with their correlation as in Zou 2007,
        doi:10.1037/1082-989X.12.4.399.
    """
    if before.shape != after.shape or before.ndim != 1 or not len(before) or before.dtype.kind != after.dtype.kind:
        raise DataError(
            f"a score must be one value a row, bool or float; got {before.dtype} {before.shape} and "
            f"{after.dtype} {after.shape}"
        )
    n = len(before)
    if before.dtype.kind == "b":
        lost, won = int((before & ~after).sum()), int((~before & after).sum())
        loss = (lost - won) / n
        return loss, loss - _spread(won, lost, n), loss + _spread(lost, won, n)
    rise = after.astype(np.float64) - before.astype(np.float64)
    usual = max(float(np.abs(before).mean()), 1e-12)
    loss, spread = float(rise.mean()) / usual, math.inf
    if not math.isfinite(loss):
        raise DataError("a score must be finite; the network puts out NaN or infinity")
    if n > 1:
        spread = _Z * float(rise.std(ddof=1)) / math.sqrt(n) / usual
    return loss, loss - spread, loss + spread


def hold_back(
    count: int, *, max_rows: int, rng: np.random.Generator, y: AnyArray | None = None
) -> tuple[IndexArray, IndexArray]:
    """Positions of validation rows, at most `max_rows` and a third of all, and those of the rest: (rest, validation).

    Args:
        count: Number of rows.
        max_rows: Most rows held back.
        rng: Draws them.
        y: Labels, whose shares are kept.
    """
    size = min(max_rows, count // 3)
    taken = rng.choice(count, size, replace=False) if y is None else stratified(y, size, rng)
    rest = np.setdiff1d(np.arange(count), taken)
    return rest.astype(np.int64), np.sort(taken).astype(np.int64)


class _Tried:
    """The trials made so far, with a session for each."""

    def __init__(self, model: ModelProto, calibration: Feeds, validation: Feeds, score: Score, *, whole: bool) -> None:
        self._quantizer, self._validation = Quantizer(model, calibration), validation
        self._score, self._whole = score, whole
        self._before: AnyArray = np.zeros(0)
        self._sessions: dict[str, Any] = {}
        self._trials: dict[str, Trial] = {}
        self._sensitivity: Sensitivity | None = None

    @property
    def rows(self) -> int:
        """How many validation rows there are."""
        return len(self._before)

    @property
    def sensitivity(self) -> Sensitivity | None:
        """Measured when first asked for, of the best recipe then; None while there is none.

        The activation type tried first, unless another loses less beyond chance; of its recipes that with least loss.
        """
        worked = _worked(list(self._trials.values()))
        if self._sensitivity is None and worked:
            limit = min(trial.loss_high for trial in worked)
            first = next(trial.recipe for trial in worked if trial.loss <= limit)
            alike = [trial for trial in worked if trial.recipe and first and _alike(trial.recipe, first)]
            best = min(alike, key=lambda trial: trial.loss).recipe
            self._sensitivity = measure(self._quantizer, best) if best is not None else None
        return self._sensitivity

    def add_float(self, folder: Path) -> None:
        """What everything is compared with: the float network, its latent not rounded."""
        model = self._quantizer.model
        data = canonical_bytes(model) if self._whole else self._quantizer.trunks(QuantRecipe()).fp32
        session = self._sessions[FP32] = _session(data, folder / FP32)
        outputs: Any = self._outputs(session) if self._whole else run(model, np.asarray(self._validation))
        self._before = np.asarray(self._score(outputs))
        paired_loss(self._before, self._before)  # refuses what is no score
        score = float(self._before.mean())
        self._trials[FP32] = Trial(name=FP32, score=score, loss=0, loss_low=0, loss_high=0, size_bytes=len(data))

    def add(self, recipe: QuantRecipe, folder: Path) -> None:
        """Quantize by a recipe and see how right it is; a recipe that fails is kept with its error."""
        name = recipe.name
        while name in self._trials:
            name += "'"
        try:
            if self._whole:
                data = self._quantizer.whole(recipe)
                session = _session(data, folder / str(len(self._trials)))
                outputs: Any = self._outputs(session)
            else:
                trunks = self._quantizer.trunks(recipe)
                data, session = trunks.int8, _session(trunks.int8, folder / str(len(self._trials)))
                outputs = dequantize(self._outputs(session)[LATENT], trunks.latent)
            after = np.asarray(self._score(outputs))
            loss, low, high = paired_loss(self._before, after)
        except EdgeError as error:
            self._trials[name] = Trial(name=name, recipe=recipe, error=str(error))
            return
        self._sessions[name] = session
        self._trials[name] = Trial(
            name=name,
            recipe=recipe,
            score=float(after.mean()),
            loss=loss,
            loss_low=low,
            loss_high=high,
            size_bytes=len(data),
        )

    def _outputs(self, session: Any) -> dict[str, AnyArray]:
        names = [output.name for output in session.get_outputs()]
        feeds = calls(self._quantizer.model, self._validation, rows=_ROWS)
        parts = [session.run(names, feed) for feed in feeds]
        return {name: np.concatenate([np.atleast_1d(part[i]) for part in parts]) for i, name in enumerate(names)}

    def timed(self, repeats: int, late: Callable[[], bool], clock: Callable[[], float]) -> list[Trial]:
        """All trials with their times. They take turns, so that a busy moment strikes all."""
        feed = next(calls(self._quantizer.model, self._validation, rows=1))
        times: dict[str, list[float]] = {name: [] for name in self._sessions}
        names = list(self._sessions)
        warm_up = max(2, repeats // 10)
        for i in range(warm_up + repeats):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                start = clock()
                self._sessions[name].run(None, feed)
                if i >= warm_up:
                    times[name].append((clock() - start) * 1000)
            if i >= warm_up + _LEAST_ROUNDS and late():
                break
        return [
            msgspec.structs.replace(trial, p50_ms=float(np.median(times[name]))) if name in times else trial
            for name, trial in self._trials.items()
        ]


def _recipes(tried: _Tried, float_layers: tuple[int, ...], percentile: float) -> Iterator[QuantRecipe]:
    """The recipes to try, the likely ones first; what to leave in float depends on the trials so far."""
    methods = [Calibration(method=method, percentile=percentile) for method in _METHODS]
    activations: tuple[Literal["uint8", "int8"], ...] = ("uint8", "int8")
    for activation, method in itertools.product(activations, methods):
        yield QuantRecipe(activation=activation, calibration=method)
    for method in methods[:2]:
        yield QuantRecipe(calibration=method, layers="heavy")
    seen: set[frozenset[str]] = {frozenset()}
    if (found := tried.sensitivity) is not None:
        for count in float_layers:
            nodes = found.worst(count)
            if frozenset(nodes) not in seen and not {layer.name for layer in found.layers} <= set(nodes):
                seen.add(frozenset(nodes))
                yield msgspec.structs.replace(found.recipe, float_nodes=nodes)
    for activation, method in itertools.product(activations, methods):
        yield QuantRecipe(activation=activation, per_channel=False, calibration=method)


def _spread(more: int, less: int, n: int) -> float:
    """How far above (more - less) / n the difference of the two shares may be."""
    up = wilson_interval(more, n, z=_Z)[1] - more / n
    down = less / n - wilson_interval(less, n, z=_Z)[0]
    # the kinds exclude each other, so that their shares are negatively correlated
    together = math.sqrt(more * less / max((n - more) * (n - less), 1))
    return math.sqrt(up * up + down * down + 2 * min(together, 1.0) * up * down)


def _alike(one: QuantRecipe, other: QuantRecipe) -> bool:
    return (one.activation, one.per_channel) == (other.activation, other.per_channel)


def _worked(trials: list[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.recipe is not None and not trial.error]


def _fastest(trials: list[Trial]) -> Trial:
    limit = min(trial.p50_ms for trial in trials) * _SAME_SPEED
    return min((t for t in trials if t.p50_ms <= limit), key=lambda trial: (trial.loss, trial.p50_ms, trial.name))


def _session(data: bytes, path: Path) -> Any:
    path.write_bytes(data)
    return new_session(path)


def _refuse_shared(calibration: Feeds, validation: Feeds) -> None:
    if not (isinstance(calibration, np.ndarray) and isinstance(validation, np.ndarray)):
        return
    rows = {row.tobytes() for row in calibration}
    shared = sum(row.tobytes() in rows for row in validation.astype(calibration.dtype))
    if shared > len(validation) / 2:
        raise DataError(
            f"{shared} of {len(validation)} validation rows are calibration rows as well; hold other rows back"
        )


def _tell(progress: Progress | None, done: int, total: int, what: str) -> None:
    if progress is not None:
        progress(min(done, total), total, what)
