"""Settings of a device: frozen structs, read from TOML. Units stand in the names; a typo is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_sdk.errors import ConfigError
from edge_sdk.messages import DEFAULT_PREFIX
from edge_sdk.types import Mode

Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1)]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class BrokerConfig(_Section, frozen=True):
    """Where the coordinator's broker is. An empty host: no network, the device works alone."""

    host: str = ""
    """Name or address; empty: none."""
    port: Annotated[int, Meta(ge=1, le=65535)] = 1883
    """TCP port."""
    username: str = ""
    """Empty: anonymous."""
    password: str = ""
    """With `username`."""
    keepalive_s: Count = 30
    """After about this silence either side takes the line for broken."""


class JoinConfig(_Section, frozen=True):
    """How long a prediction waits for its label."""

    max_bytes: Count = 8_000_000
    """For the latents that wait."""
    window_s: Positive = 7 * 86_400.0
    """A label that comes later is counted as unmatched."""
    max_pending: Count = 100_000
    """Rows and labels kept in memory between two flushes; beyond it the oldest are dropped and counted."""


class DriftConfig(_Section, frozen=True):
    """How often a healthy device may cry wolf."""

    alarms_per_day: Positive = 0.1
    """False alarms, over all monitors together."""
    rows_per_day: Positive = 10_000.0
    """How many predictions the device makes a day: turns the budget into a run length."""
    block_rows: Count = 32
    """Rows folded at once."""
    rereference_rows: Annotated[int, Meta(ge=200)] = 300
    """Live rows that make the new reference after a promotion or a new base."""


class ReplayConfig(_Section, frozen=True):
    """What is remembered of labelled samples."""

    kind: Literal["balanced", "reservoir"] = "balanced"
    """Keep labels balanced, or a uniform sample."""
    max_bytes: Count = 100_000
    """For the replay buffer; the judge rows have half as much again."""
    judge_share: Share = 0.3
    """Share of labelled samples kept to judge challengers, never to train them."""


class LearnConfig(_Section, frozen=True):
    """How a challenger is trained."""

    executor: Literal["process", "inline"] = "process"
    """A child process at low priority, or in place (simulations)."""
    learning_rate: Positive = 2.0
    """Relative to the mean square of the latents."""
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    """Of stochastic gradient descent."""
    ewc_lambda: NonNegative = 10.0
    """Strength of elastic weight consolidation; any value is stable."""
    new_per_batch: Count = 8
    """Fresh samples in a batch."""
    replayed_per_batch: Annotated[int, Meta(ge=0)] = 56
    """Replayed samples in a batch."""
    passes: Count = 24
    """Times that every fresh sample is seen."""
    max_labels: Annotated[int, Meta(ge=2)] = 64
    """Most labels the head may grow to."""
    new_labels: Literal["allow", "refuse"] = "allow"
    """Whether a label that the model does not know may become one."""
    max_seconds: Positive = 120.0
    """A learner that takes longer is stopped; the champion stays."""


class PolicyConfig(_Section, frozen=True):
    """When to learn."""

    min_fresh_rows: Count = 60
    """Fewer new labelled samples than this are never learned from, whatever the reason."""
    volume_rows: Count = 2_000
    """So many new labelled samples are reason enough."""
    accuracy_target: Share = 0.0
    """Below this recent accuracy the device learns; 0: no target."""
    schedule_s: NonNegative = 0.0
    """Learn at least this often if there is anything new; 0: no schedule."""
    cooldown_s: NonNegative = 3_600.0
    """Between the end of one learning transaction and the start of the next."""
    min_battery: Share = 0.3
    """On battery below this share, learning waits."""
    max_temperature_c: Positive = 85.0
    """On a hotter machine, learning waits."""
    min_free_mb: NonNegative = 64.0
    """With less free memory, learning waits."""


class GateConfig(_Section, frozen=True):
    """What a challenger must prove."""

    alpha: Annotated[float, Meta(gt=0, lt=1)] = 0.05
    """Chance that a challenger no better than the champion is promoted, however often the gate looks."""
    class_margin: Share = 0.1
    """Harm to one label: its rows missed and others' taken for it, more than the champion did, by its rows."""
    factory_margin: Share = 0.05
    """Loss of accuracy on the factory's own data that counts as harm: forgetting."""
    min_class_rows: Count = 20
    """Classes with fewer judge rows are pooled."""
    max_wait_s: Positive = 86_400.0
    """A challenger that has not proved itself by then is rejected."""
    probation_rows: Count = 60
    """Labelled live rows after which a promotion is confirmed."""
    probation_s: Positive = 86_400.0
    """Without enough labels, a healthy version is kept after this time, as unproven."""


class ReportConfig(_Section, frozen=True):
    """What is told, and how much is kept when nobody listens."""

    interval_s: Positive = 300.0
    """Time between two reports."""
    min_count: Annotated[int, Meta(ge=1)] = 10
    """Cells below this are merged or held back."""
    outbox_rows: Count = 5_000
    """Messages kept; the oldest reports go first, events last, as explicit gaps."""
    outbox_bytes: Count = 4_000_000
    """The same in bytes."""
    resend_s: Positive = 30.0
    """When nothing has been acknowledged for this time, all that waits is sent again."""


class UpdateConfig(_Section, frozen=True):
    """How releases are fetched and installed."""

    window_blocks: Count = 8
    """Blocks asked for at once."""
    retry_s: Positive = 20.0
    """Blocks that did not come are asked for again after this time."""
    max_bytes: Count = 500_000_000
    """Larger releases are refused before the first block."""
    min_free_bytes: Annotated[int, Meta(ge=0)] = 20_000_000
    """Must stay free on the disk after an install."""
    probation_rows: Count = 100
    """Labelled live rows after which a release is confirmed."""
    probation_s: Positive = 86_400.0
    """Without enough labels, a healthy release is kept after this time, as unproven."""
    max_accuracy_drop: Share = 0.1
    """A release that loses more than this against the one before, with evidence, is rolled back; 1: never."""
    max_boots: Count = 3
    """Starts without a healthy step in between, after which a release on probation is rolled back."""


class DeviceConfig(_Section, frozen=True):
    """Everything that can be set on a device."""

    device: str = "device"
    """Its name: letters, digits, "_", "." and "-"."""
    group: str = "default"
    """Which releases it gets."""
    prefix: str = DEFAULT_PREFIX
    """First level of every topic."""
    mode: Mode = "shadow"
    """Watch only, also learn and judge, or also promote."""
    variant: Literal["auto", "int8", "fp32"] = "auto"
    """Which trunk to serve; auto: INT8 if it reproduces its stored outputs on this CPU, else FP32."""
    flush_interval_s: Positive = 1.0
    """Time between two steps of `with device:`; a label that is not durable waits this long for the disk."""
    durability: Literal["full", "normal"] = "full"
    """full: an acknowledged label survives a power cut; normal: it survives a crash of the process."""
    seed: int = 0
    """Of all chance in learning and replay."""
    broker: BrokerConfig = BrokerConfig()
    join: JoinConfig = JoinConfig()
    drift: DriftConfig = DriftConfig()
    replay: ReplayConfig = ReplayConfig()
    learn: LearnConfig = LearnConfig()
    policy: PolicyConfig = PolicyConfig()
    gate: GateConfig = GateConfig()
    report: ReportConfig = ReportConfig()
    update: UpdateConfig = UpdateConfig()


def load_config(path: Path) -> DeviceConfig:
    """The settings in a TOML file; what it leaves out has its default.

    Raises:
        ConfigError: The file cannot be read, is not TOML, or has an unknown, misspelt or impossible value; the message
            names file and key.
    """
    try:
        return msgspec.toml.decode(path.read_bytes(), type=DeviceConfig)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
