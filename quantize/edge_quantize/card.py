"""The model card: what was measured, and marked gaps for what only a person can say."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from edge_quantize.compare import Accuracy
from edge_sdk.manifest import Manifest

FILL_IN = "**[to be filled in by a person]**"


class CardText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What cannot be measured. Empty fields stay marked in the card."""

    data: str = ""
    """Where the data come from, who collected them, what they leave out."""
    intended_use: str = ""
    limits: str = ""
    """Where the model must not be relied on."""
    contact: str = ""


class CardFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was counted and measured while packing."""

    train_rows: int
    memory_rows: int
    int8: Accuracy
    fp32: Accuracy
    agreement: float
    by_label: Mapping[str, Accuracy]


def render_card(manifest: Manifest, facts: CardFacts, text: CardText) -> str:
    """The card in Markdown. The same facts give the same text: no times, no machine."""
    hidden = "".join(f", {width}" for width in manifest.head.hidden)
    low, high = manifest.input.low, manifest.input.high
    allowed = "any finite" if low is None and high is None else f"{_bound(low)} to {_bound(high)}"
    return "\n".join(
        [
            f"# {manifest.name}, release {manifest.release}",
            "",
            f"Created {manifest.created}. Task: {manifest.task}. Learns on the device: {manifest.adapt}.",
            "",
            "## Intended use",
            "",
            text.intended_use or FILL_IN,
            "",
            "## Data",
            "",
            text.data or FILL_IN,
            "",
            (
                f"{facts.train_rows} training rows; {facts.int8.rows} held-out rows, used for the figures "
                f"below and as the monitors' reference; {facts.memory_rows} training rows ship as latents "
                "(factory memory), up to 32 held-out rows as they are, for the self-test on the device."
            ),
            "",
            "## Accuracy on held-out rows",
            "",
            "| | accuracy | 95 % interval | rows |",
            "|---|---|---|---|",
            _row("INT8", facts.int8),
            _row("FP32", facts.fp32),
            *[_row(f"INT8, label {_escaped(label)}", accuracy) for label, accuracy in facts.by_label.items()],
            "",
            f"INT8 and FP32 predict the same label on {facts.agreement:.1%} of these rows.",
            "",
            "## Limits",
            "",
            text.limits or FILL_IN,
            "",
            (
                "The trunk is frozen: learning on the device changes only how its latent is read, and cannot "
                "mend what the trunk no longer sees."
            ),
            "",
            "## How it is made",
            "",
            f"- input {manifest.input.name!r}: float32 {manifest.input.shape}, values {allowed}",
            (
                f"- latent: {manifest.latent.dim} x uint8, scale {manifest.latent.scale:g}, "
                f"zero point {manifest.latent.zero_point}"
            ),
            f"- head: dense layers {manifest.latent.dim}{hidden}, {len(manifest.labels)}",
            f"- labels: {', '.join(_escaped(label) for label in manifest.labels)}",
            "- made with " + ", ".join(f"{tool} {version}" for tool, version in sorted(manifest.toolchain.items())),
            f"- made from checkpoint {manifest.parent}" if manifest.parent else "- first of its line",
            "",
            "## Contact",
            "",
            text.contact or FILL_IN,
            "",
        ]
    )


def _row(name: str, accuracy: Accuracy) -> str:
    if not accuracy.rows:
        return f"| {name} | no rows | | 0 |"
    return f"| {name} | {accuracy.value:.3f} | {accuracy.low:.3f} to {accuracy.high:.3f} | {accuracy.rows} |"


def _bound(value: float | None) -> str:
    return "any" if value is None else f"{value:g}"


def _escaped(label: str) -> str:
    return label.replace("|", r"\|").replace("\n", " ")
