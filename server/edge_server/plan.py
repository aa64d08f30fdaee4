"""What a rollout is told: to whom, in which stages, at which hours, judged by what. Frozen structs, read from TOML."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Literal

import msgspec

from edge_sdk.errors import ConfigError
from edge_sdk.messages import THRESHOLD_ALL, cohort

Strategy = Literal["canary", "shadow", "ab"]
Approval = Literal["none", "each", "last"]
Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
Proof = Literal["no_harm", "not_worse", "better"]

WEEKDAYS: tuple[Weekday, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
METRICS = ("accuracy", "errors", "p50_ms", "p99_ms", "crashes", "rollbacks", "drift", "disagreement")
"""What can be judged beside the app's own metrics, which are called `metric:NAME`."""
LATENCIES = ("p50_ms", "p99_ms")
"""Of these, those that every report tells of its own window."""
APP_METRIC = "metric:"
_AB_CONTROL_PERCENT = 50
_STAGE = re.compile(r"([0-9]{1,9}) ?(%|devices?)")
_HOURS = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])")
_DAY_S = 86_400


def _is_no_less_than_0(value: float) -> bool:
    return value >= 0


def _is_above_0(value: float) -> bool:
    return value > 0


def _is_share(value: float) -> bool:
    return 0 <= value <= 1


def _is_between(value: float) -> bool:
    return 0 < value < 1


class Gate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One reported metric that the release is judged by, against the control group.

    Attributes:
        metric: accuracy, errors, p50_ms, p99_ms, crashes, rollbacks, drift, disagreement (in shadow), or `metric:NAME`
            for one of the app's own.
        margin: How much worse the release may be. accuracy: share of labelled predictions; errors: share of
            predictions; p50_ms, p99_ms: share of the device's own time before (0.2: a fifth slower); crashes,
            rollbacks, drift: events by device and day; disagreement: share of predictions that may differ; metric: in
            its own unit.
        better: Which way is better, of one of the app's own metrics.
        proof: no_harm: evidence of harm halts, and without any the stage passes; not_worse: it passes only with
            evidence that the release is worse by less than the margin; better: only with evidence that it is better.
        min_sample: So many values on the release before a stage passes: labelled predictions, predictions, reports
            (p50_ms, p99_ms, crashes, rollbacks, drift) or recorded values.
    """

    metric: str
    margin: float = 0.0
    better: Literal["higher", "lower"] = "higher"
    proof: Proof = "no_harm"
    min_sample: int = 50

    def __post_init__(self) -> None:
        own = self.metric.startswith(APP_METRIC) and self.metric != APP_METRIC
        if self.metric not in METRICS and not own:
            raise ValueError(f"gate {self.metric!r}: must be {', '.join(METRICS)} or {APP_METRIC}NAME")
        if not (self.margin >= 0 and self.min_sample >= 0):
            raise ValueError(f"gate {self.metric}: margin and min_sample must be 0 or more")

    @property
    def higher_is_better(self) -> bool:
        """Whether a rise is good."""
        return self.metric == "accuracy" or (self.metric.startswith(APP_METRIC) and self.better == "higher")


class RolloutRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How carefully a release goes out. Every default is usable.

    Attributes:
        strategy: canary: stages that run it; shadow: first beside the release in use, then in stages; ab: against a
            control group that is held out, and kept only if it is shown to be better.
        where: Labels that the devices must have (`site=north hw=pi4`, or `@pilot`: a segment); empty: the whole group.
        stages: Each the share that may run the release, in percent (10 or "10%"), or a number ("5 devices"); rising,
            ending in 100.
        control_percent: Share of the devices that are held out to compare with until the end; 0: none, and of an A/B
            test half.
        soak_s: Time that a stage goes on after all its reachable devices run the release.
        timeout_s: A stage that has not passed by then is halted; a rollback is closed by then. Pauses do not count.
        reachable_s: A device whose last row is older than this holds nobody up.
        min_labelled: Labelled predictions a stage must gather on the release; 0 judges health alone.
        max_accuracy_drop: Loss of accuracy that is tolerated, 0 to 1.
        max_failures: Devices that may fail to install the release or leave it by themselves.
        max_error_rate: Share of predictions, 0 to 1, that may end in an error more often than in the control group.
        baseline_reports: Reports that make up a device's figures before.
        gates: Further gates, or others in place of those that the fields above make for accuracy and errors.
        alpha: Chance that a release no worse than allowed is halted by any of its gates in any stage.
        approval: Whether a person must let each stage begin, or the last, or none.
        hours: Times (UTC) at which devices may be told to install, as "22:00-04:00"; none: at any.
        weekdays: Days (UTC) on which these hours begin; none: on all.
        max_parallel: Most devices that are told to install and have not finished; 0: no limit.
        shadow_s: How long devices run the release in shadow.
        shadow_percent: Share of the devices that do.
        max_disagreement: Share of predictions, 0 to 1, on which it may differ from the release in use.
        effect: Of an A/B test: the gain in accuracy that it must be able to see, 0 to 1.
        power: Chance of seeing it, 0 to 1.
        on_small: Whether an A/B test of too few devices or labels is refused or only warned of.
    """

    strategy: Strategy = "canary"
    where: str = ""
    stages: tuple[int | str, ...] = (10, 100)
    control_percent: int = 0
    soak_s: float = 3600.0
    timeout_s: float = 7 * 86400.0
    reachable_s: float = 7200.0
    min_labelled: int = 50
    max_accuracy_drop: float = 0.02
    max_failures: int = 0
    max_error_rate: float = 0.05
    baseline_reports: int = 10
    gates: tuple[Gate, ...] = ()
    alpha: float = 0.05
    approval: Approval = "none"
    hours: tuple[str, ...] = ()
    weekdays: tuple[Weekday, ...] = ()
    max_parallel: int = 0
    shadow_s: float = 86_400.0
    shadow_percent: int = 100
    max_disagreement: float = 1.0
    effect: float = 0.02
    power: float = 0.8
    on_small: Literal["refuse", "warn"] = "refuse"

    def __post_init__(self) -> None:
        _check_stages(self.stages)
        for names, fits, what in (
            (
                ("soak_s", "min_labelled", "max_failures", "max_parallel", "shadow_s"),
                _is_no_less_than_0,
                "be 0 or more",
            ),
            (("timeout_s", "reachable_s", "baseline_reports"), _is_above_0, "be above 0"),
            (("max_accuracy_drop", "max_error_rate", "max_disagreement"), _is_share, "lie in 0 to 1"),
            (("alpha", "power", "effect"), _is_between, "lie between 0 and 1"),
            (("control_percent",), range(91).__contains__, "lie in 0 to 90"),
            (("shadow_percent",), range(1, 101).__contains__, "lie in 1 to 100"),
        ):
            for name in names:
                if not fits(getattr(self, name)):
                    raise ValueError(f"{name} must {what}, got {getattr(self, name)}")
        metrics = [gate.metric for gate in self.gates]
        if repeated := {metric for metric in metrics if metrics.count(metric) > 1}:
            raise ValueError(f"gates must name each metric once, {min(repeated)!r} is there twice")
        for text in self.hours:
            minutes(text)

    @property
    def held_out(self) -> int:
        """Percent of the devices in the control group."""
        return self.control_percent or (_AB_CONTROL_PERCENT if self.strategy == "ab" else 0)

    def judged_by(self, *, shadowing: bool = False, last: bool = True) -> tuple[Gate, ...]:
        """The gates of a stage: the usual ones where no other takes their place, and the others.

        Args:
            shadowing: Of the time in shadow, where only accuracy and disagreement are known.
            last: Of the last stage. The few devices of those before cannot show that a release is better.
        """
        proof: Proof = "better" if self.strategy == "ab" and last else "no_harm"
        usual = [
            Gate(metric="accuracy", margin=self.max_accuracy_drop, min_sample=self.min_labelled, proof=proof),
            Gate(metric="errors", margin=self.max_error_rate, min_sample=0),
            Gate(metric="disagreement", margin=self.max_disagreement, min_sample=1),
        ]
        own = {gate.metric: gate for gate in self.gates}
        every = [*(gate for gate in usual if gate.metric not in own), *self.gates]
        if shadowing:
            # what is better in shadow shows when it serves: here it must only do no harm
            return tuple(
                gate if gate.metric == "disagreement" else msgspec.structs.replace(gate, proof="no_harm")
                for gate in every
                if gate.metric in ("accuracy", "disagreement")
            )
        return tuple(gate for gate in every if gate.metric != "disagreement")

    @property
    def level(self) -> float:
        """The error level of one gate in one stage: alpha in equal parts (Bonferroni)."""
        shadow = len(self.judged_by(shadowing=True)) if self.strategy == "shadow" else 0
        return self.alpha / (len(self.stages) * len(self.judged_by()) + shadow)

    def needs_approval(self, stage: int) -> bool:
        """Whether a person must let this stage begin."""
        return self.approval == "each" or (self.approval == "last" and stage == len(self.stages) - 1)


class RolloutPlan(RolloutRules, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One release on its way to one group, by these rules.

    Attributes:
        segments: Names of those that `where` was made from; it is spelled out itself once the rollout is started.
    """

    release: int
    group: str = "default"
    segments: tuple[str, ...] = ()

    @property
    def salt(self) -> str:
        """Shuffles the devices anew for every rollout, so that the same ones are not always first."""
        return f"{self.group}-{self.release}"

    def in_control(self, device: str) -> bool:
        """Whether a device is held out: by its own number alone, so that nobody changes sides when others join."""
        return self.held_out > 0 and cohort(self.salt, device) >= THRESHOLD_ALL * (100 - self.held_out) // 100

    def told_stage(self, stage: int) -> str:
        """A stage in words."""
        kind, number = parse_stage(self.stages[stage])
        of = f"the devices of {self.group} where {self.where}" if self.where else "the group"
        return count_devices(number) if kind == "devices" else f"{number} % of {of}"


def count_devices(number: int) -> str:
    """In words."""
    return "1 device" if number == 1 else f"{number} devices"


def parse_stage(stage: int | str) -> tuple[Literal["%", "devices"], int]:
    """What a stage counts, and how many: 10, "10%" or "5 devices".

    Raises:
        ValueError: It is none of these.
    """
    match = _STAGE.fullmatch(f"{stage} %" if isinstance(stage, int) else stage.strip())
    if match is None:
        raise ValueError(f'stages must be percentages (10, "10%") or numbers of devices ("5 devices"), got {stage!r}')
    return ("%" if match[2] == "%" else "devices"), int(match[1])


def _check_stages(stages: tuple[int | str, ...]) -> None:
    parsed = [parse_stage(stage) for stage in stages]
    for kind in ("%", "devices"):
        numbers = [number for found, number in parsed if found == kind]
        if any(a >= b for a, b in zip((0, *numbers), numbers, strict=False)):
            raise ValueError(f"stages must be rising percentages that end in 100, got {list(stages)}")
    if not parsed or parsed[-1] != ("%", 100):
        raise ValueError(f"stages must be rising percentages that end in 100, got {list(stages)}")


def stage_size(rules: RolloutRules, stage: int, devices: int) -> int:
    """How many of `devices` may run the release in a stage: at least one, and never fewer than in the one before."""
    sizes = [number if kind == "devices" else -(-devices * number // 100)
             for kind, number in map(parse_stage, rules.stages[: stage + 1])]  # fmt: skip
    return min(devices, max(1, *sizes) if len(sizes) > 1 else max(1, sizes[0]))


# ---- maintenance window


def minutes(text: str) -> tuple[int, int]:
    """Begin and end of hours such as "22:00-04:00", in minutes since midnight.

    Raises:
        ValueError: It is not of this form, or both are the same.
    """
    match = _HOURS.fullmatch(text)
    if match is None:
        raise ValueError(f'hours must be of the form "22:00-04:00", got {text!r}')
    begin, end = int(match[1]) * 60 + int(match[2]), int(match[3]) * 60 + int(match[4])
    if begin == end:
        raise ValueError(f"hours must begin and end at different times, got {text!r}")
    return begin, end


def opens_at(rules: RolloutRules, now: float) -> float:
    """When devices may next be told to install, seconds since the epoch; `now` if they may at once."""
    if not rules.hours and not rules.weekdays:
        return now
    midnight = now - now % _DAY_S
    begins: list[float] = []
    for day in range(-1, 8):
        start = midnight + day * _DAY_S
        if rules.weekdays and WEEKDAYS[time.gmtime(start).tm_wday] not in rules.weekdays:
            continue
        for begin, end in map(minutes, rules.hours) if rules.hours else [(0, 24 * 60)]:
            length = (end - begin) % (24 * 60) or 24 * 60
            opened = start + begin * 60
            if opened <= now < opened + length * 60:
                return now
            if opened > now:
                begins.append(opened)
    return min(begins)


# ---- from a file


def load_rules(path: Path, usual: RolloutRules) -> RolloutRules:
    """The rules in a TOML file; what it leaves out is as usual.

    Raises:
        ConfigError: The file is missing or no TOML, or a key is unknown or out of range; names both.
    """
    try:
        given = msgspec.toml.decode(path.read_bytes())
        fields = msgspec.to_builtins(usual)
        return msgspec.convert({**fields, **given}, RolloutRules)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
