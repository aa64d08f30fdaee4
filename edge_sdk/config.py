"""Settings of a device: frozen structs, read from TOML. Units stand in the names; a typo is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_sdk.errors import ConfigError, ProtocolError
from edge_sdk.messages import DEFAULT_PREFIX, check_name
from edge_sdk.types import Mode

_KEY = re.compile("[0-9a-f]{64}")
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
    tls: bool = False
    """Encrypt, and check who the broker is."""
    ca_file: str = ""
    """Certificates of the authorities trusted with `tls`, relative to the device's folder; empty: the system's."""
    cert_file: str = ""
    """The device's own certificate, for brokers that ask for one; as `ca_file`."""
    key_file: str = ""
    """Its private key."""
    session_expiry_s: Annotated[int, Meta(ge=0, lt=2**32 - 1)] = 0
    """So long the broker keeps what is sent to the device while it is away; 0: nothing, and all of it comes again."""
    receive_maximum: Annotated[int, Meta(ge=1, le=65535)] = 100
    """Messages that the broker may send before it waits for the device."""
    version: Literal["5", "3.1.1"] = "5"
    """Of MQTT; 3.1.1 has no sessions that expire."""


class JoinConfig(_Section, frozen=True):
    """How long a prediction waits for its label."""

    max_bytes: Count = 8_000_000
    """For the latents that wait."""
    window_s: Positive = 7 * 86_400.0
    """A label that comes later is counted as unmatched."""
    max_pending: Count = 100_000
    """Rows and labels kept in memory between two flushes; beyond it the oldest are dropped and counted."""
    max_pending_bytes: Count = 64_000_000
    """Of memory for these rows, about; a disk that stays full must not take it all. Beyond it as `max_pending`."""
    log_fraction: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Share of predictions that wait for a label; each counts for as many as it stands for when it is learned from."""


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
    clear_rows: Count = 2_000
    """An alarm is taken down after so many rows without new evidence."""
    cooldown_s: NonNegative = 3_600.0
    """An alarm of the same monitor within this time after the last one is shown, and tells no new event."""


class ReplayConfig(_Section, frozen=True):
    """What is remembered of labelled samples."""

    kind: Literal["balanced", "reservoir", "herding", "recent"] = "balanced"
    """Keep labels balanced, a uniform sample, the rows nearest to each label's mean, or the newest."""
    max_bytes: Annotated[int, Meta(ge=0)] = 100_000
    """For the replay buffer; the judge rows have half as much again. 0: no row is replayed but the factory's."""
    factory_rows: Annotated[int, Meta(ge=0)] = 1_000_000
    """Most rows of the checkpoint's own memory that are replayed."""
    judge_share: Share = 0.3
    """Share of labelled samples kept to judge challengers, never to train them."""
    retain_days: NonNegative = 0.0
    """Labelled samples older than this are erased; 0: kept as long as there is room."""


class LearnConfig(_Section, frozen=True):
    """How a challenger is trained."""

    executor: Literal["process", "inline"] = "process"
    """A child process at low priority, or in place (simulations)."""
    learner: str = "hybrid"
    """slda: streaming discriminant analysis, in closed form; hybrid: that, refined on fresh and replayed rows; sgd:
    gradient steps on all layers with replay and EWC; torch: the same in torch (extra `train`); module:function: your
    own, see `edge_sdk.learn.base.Learner`."""
    learning_rate: Positive = 1.0
    """Relative to the mean square of the features."""
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    """Of stochastic gradient descent."""
    anchor_rows: NonNegative = 200.0
    """How many rows the closed form counts for when it is refined (hybrid)."""
    ewc_lambda: NonNegative = 10.0
    """Strength of elastic weight consolidation (sgd, torch); any value is stable."""
    consolidation: Literal["checkpoint", "offline", "online"] = "checkpoint"
    """What EWC holds on to: the checkpoint's weights; those and each promoted head's (offline); or the latest promoted
    head's, with Fisher information that fades (online)."""
    decay: Share = 0.9
    """What is left, at each consolidation, of older statistics learned here (slda, hybrid) and of older Fisher
    information (online EWC); 1: nothing fades."""
    new_per_batch: Count = 8
    """Fresh samples in a batch (sgd, torch)."""
    replayed_per_batch: Annotated[int, Meta(ge=0)] = 56
    """Replayed samples in a batch (sgd, torch)."""
    passes: Count = 24
    """Times that every fresh sample is seen; of hybrid, times that each label's rows are seen."""
    balanced_passes: Annotated[int, Meta(ge=0)] = 0
    """Further passes at the end over as many rows, fresh and replayed, drawn so that every label comes as often (sgd,
    torch)."""
    loss: Literal["squared", "huber"] = "squared"
    """Of a regression (sgd, torch, and what hybrid adds to the closed form, which is least squares)."""
    huber_delta: Positive = 1.0
    """Where the Huber loss becomes linear, in standard deviations of the target."""
    label_smoothing: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of a label's weight that is spread over all labels."""
    filter_share: Annotated[float, Meta(ge=0, le=0.5)] = 0.0
    """Most of the fresh samples that may be left out because their label contradicts what the others say; 0: none."""
    window: Literal["all", "fixed", "dynamic"] = "all"
    """Which fresh samples are learned from: all, the newest `window_rows`, or as many of the newest as score best."""
    window_rows: Count = 2_000
    """Length of a fixed window; the longest that a dynamic one may have."""
    max_rows: Count = 5_000
    """Of more fresh samples a representative part is taken."""
    scratch_every: Annotated[int, Meta(ge=0)] = 0
    """Every so many learning jobs start from the checkpoint's head instead of the one in use; 0: none does."""
    max_labels: Annotated[int, Meta(ge=2)] = 64
    """Most labels the head may grow to."""
    new_labels: Literal["allow", "ask", "refuse"] = "allow"
    """Whether a label that the model does not know may become one: yes, once `accept_label` says so, or no."""
    max_seconds: Positive = 120.0
    """A learner that works longer is stopped; the champion stays. Pauses do not count."""


class FeedbackConfig(_Section, frozen=True):
    """What a label is worth, by where it comes from, and which labels are asked for."""

    sources: dict[str, Share] = {}
    """Weight of the labels of each source; 0: they are counted and never learned from."""
    default_weight: Share = 1.0
    """Of a source that is not named, and of labels without one."""
    max_per_source_hour: Annotated[int, Meta(ge=0)] = 0
    """Labels of one source that are learned from in an hour; 0: no limit."""
    requests_per_day: Annotated[int, Meta(ge=0)] = 20
    """Most labels that `label_requests` asks for in 24 hours."""
    request_ttl_s: Positive = 86_400.0
    """A request that is not answered within this time has expired."""


Trigger = Literal["drift", "accuracy", "calibration", "metric", "new_label", "volume", "schedule"]


class PolicyConfig(_Section, frozen=True):
    """When to learn."""

    triggers: tuple[tuple[Trigger, ...], ...] = (
        ("drift",),
        ("accuracy",),
        ("calibration",),
        ("metric",),
        ("volume",),
        ("schedule",),
    )
    """Learn when all triggers of one of these lists call for it; `learn_now` needs none. new_label is not among them by
    default: a label that the model does not know is learned with the next reason."""
    min_fresh_rows: Count = 60
    """Fewer new labelled samples than this are never learned from, whatever the reason."""
    volume_rows: Count = 2_000
    """So many new labelled samples are reason enough."""
    accuracy_target: Share = 0.0
    """Below this recent accuracy the device learns; 0: no target."""
    calibration_target: Share = 0.0
    """Above this recent calibration error (expected, 10 bins) the device learns; 0: no target."""
    schedule_s: NonNegative = 0.0
    """Learn at least this often if there is anything new; 0: no schedule."""
    cooldown_s: NonNegative = 3_600.0
    """Between the end of one learning transaction and the start of the next."""


class ResourceConfig(_Section, frozen=True):
    """What learning may take. What a platform does not tell never forbids."""

    min_battery: Share = 0.3
    """On battery below this share, learning waits."""
    require_mains: bool = False
    """Learn only while plugged in."""
    max_temperature_c: Positive = 85.0
    """On a hotter machine, learning waits."""
    min_free_mb: NonNegative = 64.0
    """With less free memory, learning waits."""
    max_cpu_load: NonNegative = 0.0
    """Load over the last minute, by number of cores, above which learning waits; 0: no limit. The learner runs at the
    lowest priority, so that a busy device can learn."""
    quiet_hours: tuple[str, ...] = ()
    """Local times at which nothing is learned, as "22:00-06:30"."""
    seconds_per_day: NonNegative = 0.0
    """CPU time of learning in a day; 0: no limit."""
    joules_per_day: NonNegative = 0.0
    """Energy of learning in a day, estimated as CPU time times `watts`; 0: no limit."""
    watts: Positive = 3.0
    """What a busy core takes."""
    flash_bytes_per_day: Annotated[int, Meta(ge=0)] = 0
    """Bytes written to the disk in a day, by everything here, beyond which learning waits; 0: no limit."""


class GateConfig(_Section, frozen=True):
    """What a challenger must prove."""

    alpha: Annotated[float, Meta(gt=0, lt=1)] = 0.05
    """Chance that challengers no better than the champion lead to a promotion, however often the gate looks and
    however many of them follow each other in one learning transaction."""
    class_margin: Share = 0.1
    """Harm to one label: its rows missed and others' taken for it, more than the champion did, by its rows."""
    slice_margin: Share = 0.1
    """Harm to one slice: loss of accuracy on its rows."""
    factory_margin: Share = 0.05
    """Loss of accuracy on the factory's own data that counts as harm: forgetting."""
    calibration_margin: Share = 0.1
    """Rise of the expected calibration error on judge rows that counts as harm."""
    max_latency_ratio: Annotated[float, Meta(ge=1)] = 1.5
    """A challenger's head that takes longer than so many times the champion's, and 0.1 ms more, is rejected."""
    min_class_rows: Count = 20
    """Classes and slices with fewer judge rows are pooled."""
    max_wait_s: Positive = 86_400.0
    """A challenger that has not proved itself by then is rejected."""
    probation_rows: Count = 60
    """Labelled live rows after which a promotion is confirmed."""
    probation_s: Positive = 86_400.0
    """Without enough labels, a healthy version is kept after this time, as unproven."""
    max_boots: Count = 3
    """Starts without a healthy step in between, after which a head on probation is rolled back."""


class ReportConfig(_Section, frozen=True):
    """What is told, and how much is kept when nobody listens."""

    interval_s: Positive = 300.0
    """Time between two reports."""
    summary_interval_s: NonNegative = 3_600.0
    """Time between two summaries of the data: counts by feature, quantiles, the app's own metrics; 0: none is sent."""
    min_count: Annotated[int, Meta(ge=1)] = 10
    """Cells below this are merged or held back; counts of a summary are rounded to multiples of it."""
    outbox_rows: Count = 5_000
    """Messages kept; the oldest summaries go first, then reports, events last, as explicit gaps."""
    outbox_bytes: Count = 4_000_000
    """The same in bytes."""
    resend_s: Positive = 30.0
    """When nothing has been acknowledged for this time, all that waits is sent again."""
    max_per_s: NonNegative = 0.0
    """Messages sent in a second, after a first 50; 0: as fast as they are acknowledged, at most 50 at a time."""
    monthly_bytes: Annotated[int, Meta(ge=0)] = 0
    """Once so much was sent in a calendar month (UTC; topics and payloads, what is sent again included, releases not),
    reports and summaries stop until the next, and events go on; 0: no limit."""
    metered: bool = False
    """The link is paid for by volume."""
    metered_interval_s: NonNegative = 3_600.0
    """Least time between two reports on a metered link."""
    battery_interval_s: NonNegative = 0.0
    """Least time between two reports while on battery; 0: as otherwise."""


class MetricConfig(_Section, frozen=True):
    """One of the app's own metrics, recorded by its name; those without a section of their own are only reported."""

    better: Literal["higher", "lower"] = "higher"
    """Which way is better."""
    floor: float | None = None
    """A recent mean below this is reason to learn."""
    ceiling: float | None = None
    """A recent mean above this is reason to learn."""
    margin: NonNegative | None = None
    """A promoted head or release with a mean that is worse than before by more than this is rolled back."""
    low: float | None = None
    """Values below this are refused."""
    high: float | None = None
    """Values above this are refused."""

    def __post_init__(self) -> None:
        """Refuse bounds that no value can meet."""
        for lower, upper in (("low", "high"), ("floor", "ceiling")):
            below, above = getattr(self, lower), getattr(self, upper)
            if below is not None and above is not None and not below < above:
                raise ConfigError(f"{lower} must be below {upper}, got {below:g} and {above:g}")


class UpdateConfig(_Section, frozen=True):
    """How releases are fetched and installed."""

    trust: Literal["root", "none"] = "root"
    """Install only what metadata signed under this device's `root.json` names; or, where there is no root, whatever is
    offered. A root is always enforced."""
    url: str = ""
    """Second source of files and metadata: a web server, asked with range requests before the broker; empty: none."""
    window_blocks: Count = 8
    """Blocks asked for at once."""
    retry_s: Positive = 20.0
    """Blocks that did not come are asked for again after this time."""
    quiet_s: NonNegative = 1.0
    """What one device asks for reaches all. So nobody asks for a file larger than the window before no block of it has
    come for this time, and for up to as much again, which differs from device to device."""
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
    shadow_rows: Annotated[int, Meta(ge=0, le=20_000)] = 200
    """Inputs that pass both trunks before a release with another trunk takes over from a learned head, which is carried
    over by what they say; 0: none, and the learned head is dropped."""
    shadow_s: Positive = 86_400.0
    """A release waits at most so long for them, and goes on with those that came."""
    keep_inputs: Annotated[int, Meta(ge=0)] = 0
    """Most inputs of labelled predictions kept on disk, to be read again by another trunk instead of translated; as
    many of predictions that wait for their label are kept in memory. 0: no input is ever written."""
    inputs_key_file: str = ""
    """Encrypts the inputs that are kept, with the 32 bytes in this file (AES-256-GCM; extra `encrypt`); relative to the
    device's folder, and made if it is missing. Empty: they are not encrypted."""


class DeviceConfig(_Section, frozen=True):
    """Everything that can be set on a device."""

    device: str = "device"
    """Its name: letters, digits, "_", "." and "-"."""
    group: str = "default"
    """Which releases it gets."""
    hardware: Annotated[str, Meta(max_length=64)] = ""
    """What it runs on, for the coordinator to choose devices by (`hw=pi4`); empty: as the machine calls itself."""
    prefix: str = DEFAULT_PREFIX
    """First level of every topic."""
    command_key: str = ""
    """Proves that a command comes from the coordinator: 64 hexadecimal digits; empty: no command is taken."""
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
    holdout_share: Share = 0.0
    """Share of predictions flagged `holdout`: the app acts as if there were none, so that their labels are free of the
    model's own influence. They judge, and never train."""
    broker: BrokerConfig = BrokerConfig()
    join: JoinConfig = JoinConfig()
    drift: DriftConfig = DriftConfig()
    replay: ReplayConfig = ReplayConfig()
    learn: LearnConfig = LearnConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    policy: PolicyConfig = PolicyConfig()
    resources: ResourceConfig = ResourceConfig()
    gate: GateConfig = GateConfig()
    report: ReportConfig = ReportConfig()
    update: UpdateConfig = UpdateConfig()
    metrics: dict[str, MetricConfig] = {}
    """The app's own metrics, by name."""

    def __post_init__(self) -> None:
        """Refuse a key that is none, without repeating it, and names that no topic can hold."""
        if self.command_key and not _KEY.fullmatch(self.command_key):
            raise ConfigError("command_key must be 64 hexadecimal digits")
        try:
            for key in ("device", "group", "prefix"):
                check_name(getattr(self, key), key)
        except (ProtocolError, TypeError) as error:
            raise ConfigError(str(error)) from error


def check_config(config: DeviceConfig) -> DeviceConfig:
    """The settings themselves: a struct that was made in Python has checked none of its values yet.

    Raises:
        ConfigError: A value is impossible, or of another type; the message names its key.
    """
    if not isinstance(config, DeviceConfig):
        raise ConfigError(f"config: expected a DeviceConfig, got {type(config).__name__}; `load_config` reads a file")
    try:
        return msgspec.convert(msgspec.to_builtins(config), DeviceConfig)
    except (msgspec.MsgspecError, TypeError) as error:
        raise ConfigError(f"config: {error}") from error


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
