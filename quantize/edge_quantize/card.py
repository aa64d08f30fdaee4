"""The model card: what was measured, and marked gaps for what only a person can say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from edge_quantize.calibrate import Calibration
from edge_quantize.metrics import Accuracy, Estimate, Score
from edge_sdk.manifest import Manifest
from edge_sdk.schema import InputSpec

FILL_IN = "**[TO BE FILLED IN BY A PERSON]**"
FEW_ROWS = 40
"""Of a label or a slice: below this its figures say little."""
WIDE = 0.10
"""An accuracy interval wider than this is said to be wide."""
_OUTPUTS_KNOWN = 30
"""Names of that many columns or categories are listed."""


class CardText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What cannot be measured. Empty fields stay marked in the card."""

    data: str = ""
    """Where the data come from, who collected them, what they leave out."""
    intended_use: str = ""
    limits: str = ""
    """Where the model must not be relied on."""
    contact: str = ""


class CardFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was counted and measured while packing. Nothing that differs from run to run: no times, no memory.

    Attributes:
        train_rows: Rows the head was trained on; 0 where none were given.
        memory_rows: Of these, how many ship as latents.
        moments_rows: Of these, how many the moments are sums over; 0: no moments ship.
        no_moments: Why not.
        learning_bytes: Size of each file that learning starts from, beside the head.
        int8: On the held-out rows. A bare `Accuracy` will do for classification. None: raw, or no INT8 variant.
        fp32: Likewise.
        agreement: Share of held-out rows on which the two say the same, best with its interval; None: not compared.
        by_label: INT8 (or float, if that is all there is) for each label or target.
        by_slice: Likewise for each slice.
        label_rows: Training rows of each label.
        holdout_rows: Where no score tells.
        sqnr_db: INT8 against float, for each output that was compared; None: equal.
        calibration: How activation ranges were found.
        calibration_rows: On how many rows.
        recipe: How the network was quantized, in a few words.
        adapt_reason: Why the model has its adapt level.
        selftest_rows: Held-out rows that ship as they are.
        leaked_rows: Held-out rows that are in other splits too.
    """

    train_rows: int
    memory_rows: int
    int8: Accuracy | Score | None
    fp32: Accuracy | Score | None
    agreement: float | Accuracy | None
    by_label: Mapping[str, Accuracy | Score]
    by_slice: Mapping[str, Accuracy | Score] = {}
    moments_rows: int = 0
    no_moments: str = ""
    learning_bytes: Mapping[str, int] = {}
    label_rows: Mapping[str, int] = {}
    holdout_rows: int = 0
    sqnr_db: Mapping[str, float | None] = {}
    calibration: Calibration | None = None
    calibration_rows: int = 0
    recipe: str = ""
    adapt_reason: str = ""
    selftest_rows: int | None = None
    leaked_rows: int = 0


def render_card(manifest: Manifest, facts: CardFacts, text: CardText) -> str:
    """The card in Markdown. The same facts give the same text: no times, no machine."""
    blocks = [
        f"# {_escaped(manifest.name)}, release {manifest.release}",
        f"Created {manifest.created}. Task: {manifest.task}. Learns on the device: {manifest.adapt}.",
        "## Intended use",
        text.intended_use or f"{FILL_IN}: what the model is for, who uses it, and what happens with what it says.",
        "## Data",
        text.data or f"{FILL_IN}: where the data come from, who collected them, what they leave out.",
        _counts(manifest, facts),
        *_figures(manifest, facts),
        "## Limits",
        text.limits or f"{FILL_IN}: where the model must not be relied on, and whom its errors would harm.",
        "Found by counting:",
        "\n".join(f"- {limit}" for limit in _limits(manifest, facts)),
        "## How it is made",
        "\n".join(f"- {line}" for line in _making(manifest, facts)),
        "## Contact",
        text.contact or f"{FILL_IN}: who answers questions and receives reports of harm.",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


# ---- rows


def _counts(manifest: Manifest, facts: CardFacts) -> str:
    held_out = facts.holdout_rows or next((_rows(s) for s in (facts.int8, facts.fp32) if s is not None), 0)
    parts = [f"{facts.train_rows} training rows"] if facts.train_rows else []
    parts.append(f"{held_out} held-out rows, used for the figures below and as the monitors' reference")
    if manifest.adapt != "none":
        parts.append(f"{facts.memory_rows} training rows ship as latents (factory memory)")
        if facts.moments_rows:
            parts.append(f"{facts.moments_rows} training rows go into sums that ship (moments)")
    some = "up to 32" if facts.selftest_rows is None else str(facts.selftest_rows)
    parts.append(f"{some} held-out rows ship as they are, for the self-test on the device")
    counts = "; ".join(parts) + "."
    if facts.label_rows:
        of_labels = ", ".join(f"{_escaped(label)} {count}" for label, count in facts.label_rows.items())
        counts += f"\n\nTraining rows of each label: {of_labels}."
    return counts


# ---- figures


def _figures(manifest: Manifest, facts: CardFacts) -> Iterator[str]:
    """Tables of what was measured on held-out rows."""
    overall = [(name, score) for name, score in (("INT8", facts.int8), ("FP32", facts.fp32)) if score is not None]
    shown = "INT8" if facts.int8 is not None else "FP32"
    if overall:
        of = "target" if manifest.task == "regression" else "label"
        yield "## Accuracy on held-out rows"
        yield _table([*overall, *((f"{shown}, {of} {_escaped(name)}", s) for name, s in facts.by_label.items())])
        yield _meaning(manifest)
    if facts.by_slice:
        yield "### By slice"
        yield _table([(f"{shown}, {_escaped(name)}", score) for name, score in facts.by_slice.items()])
    if facts.agreement is not None or facts.sqnr_db:
        yield "### INT8 against FP32"
        yield _int8_against_fp32(manifest, facts)


def _table(scores: Sequence[tuple[str, Accuracy | Score]]) -> str:
    """One line for each name; columns of figures that none of them has are left out."""
    full = [(name, score if isinstance(score, Score) else Score(rows=score.rows, accuracy=score))
            for name, score in scores]  # fmt: skip
    kinds = ("accuracy", "precision", "recall", "hamming", "rmse", "mae", "r2")
    used = [kind for kind in kinds if any(getattr(score, kind) is not None for _, score in full)]
    titles = {"hamming": "Hamming loss", "rmse": "RMSE", "mae": "MAE", "r2": "R²"}
    headings = "".join(f" {titles.get(kind, kind)} | 95 % interval |" for kind in used)
    lines = [f"| |{headings} rows |", "|---|" + "---|---|" * len(used) + "---|"]
    for name, score in full:
        cells = [_cells(getattr(score, kind)) if score.rows else " | |" for kind in used]
        if not score.rows:
            cells[0] = " no rows | |"
        lines.append(f"| {name} |{''.join(cells)} {score.rows} |")
    return "\n".join(lines)


def _cells(found: Accuracy | Estimate | None) -> str:
    if found is None or (isinstance(found, Accuracy) and not found.rows):
        return " | |"
    return f" {_number(found.value)} | {_number(found.low)} to {_number(found.high)} |"


def _meaning(manifest: Manifest) -> str:
    match manifest.task:
        case "multilabel":
            thresholds = ", ".join(
                f"{_escaped(label)} {at:g}" for label, at in zip(manifest.labels, manifest.thresholds, strict=False)
            )
            return (
                "Accuracy is the share of rows with all labels right; of one label, of rows where it is rightly said "
                f"or left out. A label is said from this probability on: {thresholds}."
            )
        case "regression":
            tolerances = ", ".join(
                f"{_escaped(label)} {target.tolerance:g}"
                for label, target in zip(manifest.labels, manifest.targets, strict=False)
            )
            return (
                "Accuracy is the share of rows with every target within its tolerance "
                f"({tolerances}, in the target's units, as RMSE and MAE)."
            )
        case _:
            return "The accuracy of a label is taken over the rows that have it."


def _int8_against_fp32(manifest: Manifest, facts: CardFacts) -> str:
    same = {
        "classification": "predict the same label",
        "multilabel": "predict the same set of labels",
        "regression": "predict values within the tolerance of each other",
        "raw": "put out the same",
    }[manifest.task]
    sentences = []
    if isinstance(facts.agreement, Accuracy):
        low, high = facts.agreement.low, facts.agreement.high
        share = f"{facts.agreement.value:.1%} of these rows (95 % interval {low:.1%} to {high:.1%})"
        sentences.append(f"INT8 and FP32 {same} on {share}.")
    elif facts.agreement is not None:
        sentences.append(f"INT8 and FP32 {same} on {facts.agreement:.1%} of these rows.")
    if facts.sqnr_db:
        ratios = ", ".join(
            f"{_escaped(name)} {'equal' if ratio is None else f'{ratio:.1f} dB'}"
            for name, ratio in facts.sqnr_db.items()
        )
        sentences.append(f"Signal to quantization noise: {ratios}.")
    return " ".join(sentences)


# ---- limits


def _limits(manifest: Manifest, facts: CardFacts) -> Iterator[str]:
    """What the facts themselves say against relying on them."""
    if manifest.adapt == "none":
        yield "The model does not learn on the device: what it has not learned before, it will not."
    else:
        yield (
            "The trunk is frozen: learning on the device changes only how its latent is read, and cannot "
            "mend what the trunk no longer sees."
        )
    of = "target" if manifest.task == "regression" else "label"
    judged = [("", facts.int8 if facts.int8 is not None else facts.fp32)]
    judged += [(f"{of} {_escaped(name)}", score) for name, score in facts.by_label.items()]
    judged += [(f"slice {_escaped(name)}", score) for name, score in facts.by_slice.items()]
    few = [f"{name} ({_counted(score)})" for name, score in judged if name and score is not None
           and _counted(score) < FEW_ROWS]  # fmt: skip
    if few:
        yield f"Fewer than {FEW_ROWS} held-out rows, so that the figures say little: {', '.join(few)}."
    wide = [
        f"{name or 'all rows'} ({accuracy.low:.2f} to {accuracy.high:.2f})"
        for name, score in judged
        if (accuracy := _accuracy(score)) is not None and accuracy.rows and accuracy.high - accuracy.low > WIDE
    ]
    if wide:
        yield f"Accuracy is known to no better than {WIDE:.0%} for: {', '.join(wide)}."
    thin = [f"{_escaped(label)} ({count})" for label, count in facts.label_rows.items() if count < FEW_ROWS]
    if thin:
        yield f"Fewer than {FEW_ROWS} training rows: {', '.join(thin)}; the device can hardly keep or judge them."
    if facts.leaked_rows:
        yield f"{facts.leaked_rows} held-out rows are among the rows it was made from: the figures are too good."
    yield from _contrasts(facts)
    if manifest.task == "raw":
        yield "No truth was compared with the outputs: how right they are is not known from these rows."


def _contrasts(facts: CardFacts) -> Iterator[str]:
    """Where INT8 is certainly worse than float, and slices certainly worse than all."""
    int8, fp32 = _accuracy(facts.int8), _accuracy(facts.fp32)
    if int8 is not None and fp32 is not None and int8.high < fp32.low:
        yield f"INT8 is less accurate than FP32, {int8.value:.3f} against {fp32.value:.3f}, beyond chance."
    overall = int8 or fp32
    if overall is None:
        return
    for name, score in facts.by_slice.items():
        accuracy = _accuracy(score)
        if accuracy is not None and accuracy.rows and accuracy.high < overall.low:
            yield f"Slice {_escaped(name)} is worse than the whole, {accuracy.value:.3f} against {overall.value:.3f}."


def _accuracy(score: Accuracy | Score | None) -> Accuracy | None:
    return score.accuracy if isinstance(score, Score) else score


def _rows(score: Accuracy | Score) -> int:
    return score.rows


def _counted(score: Accuracy | Score) -> int:
    """Rows that tell of it: of a label, those that have it."""
    return score.recall.rows if isinstance(score, Score) and score.recall is not None else score.rows


# ---- making


def _making(manifest: Manifest, facts: CardFacts) -> Iterator[str]:
    for spec in (manifest.input, *manifest.more_inputs):
        yield from _input(spec)
    for state in manifest.state:
        yield f"state {state.input!r}: {state.dtype} {state.shape}, carried from call to call, zeros at first"
    if manifest.adapt != "none":
        yield from _head(manifest, facts)
    reason = f": {facts.adapt_reason}" if facts.adapt_reason else ""
    yield f"adapt level {manifest.adapt}{reason}"
    if manifest.labels:
        what = "targets" if manifest.task == "regression" else "labels"
        yield f"{what}: {', '.join(_escaped(label) for label in manifest.labels)}"
    if manifest.adapt == "none" and "int8" not in manifest.model_files and manifest.files:
        yield "quantization: none, the model ships in float"
    elif facts.recipe:
        yield f"quantization: {facts.recipe}"
    if facts.calibration is not None:
        method: str = facts.calibration.method
        method += f" {facts.calibration.percentile:g}" if method == "percentile" else ""
        yield f"calibration: {method}, on {facts.calibration_rows} rows"
    elif facts.calibration_rows:
        yield f"calibration: on {facts.calibration_rows} rows"
    yield "made with " + ", ".join(f"{tool} {version}" for tool, version in sorted(manifest.toolchain.items()))
    yield f"made from checkpoint {manifest.parent}" if manifest.parent else "first of its line"


def _head(manifest: Manifest, facts: CardFacts) -> Iterator[str]:
    hidden = "".join(f", {width}" for width in manifest.head.hidden)
    yield (
        f"latent: {manifest.latent.dim} x uint8, scale {manifest.latent.scale:g}, "
        f"zero point {manifest.latent.zero_point}"
    )
    yield f"head: dense layers {manifest.latent.dim}{hidden}, {len(manifest.labels)}"
    if facts.learning_bytes:
        sizes = (f"{name} {size / 1000:.1f} kB" for name, size in sorted(facts.learning_bytes.items()))
        yield f"learning starts from {', '.join(sizes)}"
    if facts.no_moments:
        yield f"no moments ship ({facts.no_moments}): devices take them from the factory memory"


def _input(spec: InputSpec) -> Iterator[str]:
    allowed = "any finite" if spec.low is None and spec.high is None else f"{_bound(spec.low)} to {_bound(spec.high)}"
    yield f"input {spec.name!r}: {spec.dtype} {spec.shape}, values {allowed}"
    if spec.columns:
        names = [f"{_escaped(column.name)} ({column.kind})" for column in spec.columns]
        more = f" and {len(names) - _OUTPUTS_KNOWN} more" if len(names) > _OUTPUTS_KNOWN else ""
        yield f"columns: {', '.join(names[:_OUTPUTS_KNOWN])}{more}"
    for op in spec.preprocess:
        fields = msgspec.to_builtins(op)
        name = fields.pop("op")
        details = ", ".join(f"{key} {_short(value)}" for key, value in fields.items())
        yield f"preprocessing of {spec.name!r}: {name}, {details}"


def _short(value: object) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"{', '.join(map(_short, value[:4]))}, … ({len(value)} values)"
    if isinstance(value, list):
        return f"({', '.join(map(_short, value))})"
    return f"{value:g}" if isinstance(value, float) else _escaped(str(value))


def _bound(value: float | None) -> str:
    return "any" if value is None else f"{value:g}"


def _number(value: float) -> str:
    return f"{value:.3f}" if value == 0 or 0.1 <= abs(value) < 1000 else f"{value:.3g}"


def _escaped(label: str) -> str:
    """A name within a line of Markdown: no markup of its own, no HTML, no line breaks."""
    flat = " ".join(label.split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\|`*_[]#" else c for c in flat)
