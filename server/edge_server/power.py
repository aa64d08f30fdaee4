"""How much an A/B test can see: computed before it begins, with the very test that will judge it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import msgspec

from edge_sdk.stats import sequence_radius
from edge_server.gates import LEAST_JUDGED, DeviceMetrics
from edge_server.plan import RolloutPlan

_DAY_S = 86_400.0
_UNKNOWN_ACCURACY = 0.5
"""Of which a share varies most."""


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """What a group's devices have told lately.

    Attributes:
        labelled: Labelled predictions.
        correct: Those that were right.
        device_days: Time that the reports cover, devices together.
    """

    labelled: int
    correct: int
    device_days: float


class Power(msgspec.Struct, frozen=True, kw_only=True):
    """What a test needs and what it will get.

    Attributes:
        effect: Gain in accuracy to be seen.
        rows: Labelled predictions on the release that show it, with the chance that the plan asks for.
        expected: So many will come until the time-out, as far as the last week tells.
        days: Until the wanted ones have come; None: at no pace that is known.
        detectable: Gain in accuracy that the expected ones show, with the same chance; None: none at all.
        devices: So many would have to run the release, at the pace of the last week; 0: unknown.
        treated: So many will.
        control: So many are held out.
        enough: Whether what comes is enough.
        words: All of it.
    """

    effect: float
    rows: int
    expected: int
    days: float | None
    detectable: float | None
    devices: int
    treated: int
    control: int
    enough: bool
    words: str


def power_of(plan: RolloutPlan, metrics: Sequence[DeviceMetrics], pace: Pace) -> Power:
    """Whether a group is large enough for an A/B test.

    Counts labelled predictions as if devices did not differ in how they take the release; where they do, it takes more,
    which is why each device is compared with its own past.

    Args:
        plan: Of the test.
        metrics: One entry for every device of the group.
        pace: Of the group.

    Source:
        The gate's own radius (`gates.read`), plus the normal quantile of the power.
    """
    eligible = [entry.device for entry in metrics if entry.eligible]
    control = sum(plan.in_control(name) for name in eligible)
    treated = len(eligible) - control
    accuracy = pace.correct / pace.labelled if pace.labelled else _UNKNOWN_ACCURACY
    test = {"level": plan.level, "power": plan.power, "control_share": plan.held_out / 100}
    rows = required_rows(accuracy, effect=plan.effect, **test)
    each = pace.labelled / pace.device_days if pace.device_days else 0.0
    days = plan.timeout_s / _DAY_S
    expected = int(treated * each * days)
    detectable = detectable_effect(accuracy, rows=expected, **test) if expected >= LEAST_JUDGED else 1.0
    devices = -int(-rows // (each * days)) if each else 0
    enough = expected >= rows and control > 0 and treated > 0
    words = (
        f"to see a gain of {plan.effect:.1%} over {accuracy:.1%} with a chance of {plan.power:.0%}, {rows} labelled "
        f"predictions are wanted on release {plan.release}; {treated} devices with {_amount(each)} a day each "
        f"give about {expected:,} in {_amount(days)} days"
        + (f", {devices} devices would do" if devices and not enough else "")
        + f"; {control} devices are held out"
    )
    return Power(
        effect=plan.effect, rows=rows, expected=expected, days=rows / (treated * each) if treated * each else None,
        detectable=detectable if detectable < 1.0 else None, devices=devices, treated=treated, control=control,
        enough=enough, words=words,
    )  # fmt: skip


def _amount(number: float) -> str:
    """As people write it: three figures of what is small, and no powers of ten."""
    return (
        f"{number:,.0f}" if number >= 100 or not number else f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f}"
    )


def required_rows(rate: float, *, effect: float, level: float, power: float, control_share: float) -> int:
    """Labelled predictions on the release that show a gain of `effect`, by the gate's own test.

    Args:
        rate: Accuracy now, 0 to 1.
        effect: Gain in accuracy, above 0.
        level: Error level of the gate.
        power: Chance of seeing it once so many are there, in (0, 1).
        control_share: Of all labelled predictions, those of the control group, in (0, 1).

    Returns:
        The count on the release; the control group has control_share / (1 - control_share) as many.
    """
    low, high = float(LEAST_JUDGED), 1e12
    for _ in range(200):
        middle = math.sqrt(low * high)
        if detectable_effect(rate, rows=middle, level=level, power=power, control_share=control_share) <= effect:
            high = middle
        else:
            low = middle
    return math.ceil(high)


def detectable_effect(rate: float, *, rows: float, level: float, power: float, control_share: float) -> float:
    """The gain in accuracy that so many labelled predictions on the release show; arguments as `required_rows`."""
    # noise enters twice, as each device is held against its own past; at best that is known well
    variance = max(rate * (1 - rate), 0.01) * (1 + (1 - control_share) / control_share)
    size = rows * min(1.0, control_share / (1 - control_share))
    return math.sqrt(variance / rows) * (math.sqrt(size) * sequence_radius(size, level) + NormalDist().inv_cdf(power))
