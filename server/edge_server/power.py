"""How much an A/B test can see: computed before it begins, with the very test that will judge it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from edge_server.gates import DeviceMetrics, required_rows
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
        devices: So many would have to run the release, at the pace of the last week; 0: unknown.
        treated: So many will.
        control: So many are held out.
        enough: Whether what comes is enough.
        words: All of it.
    """

    effect: float
    rows: int
    expected: int
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
    rows = int(
        required_rows(
            accuracy, effect=plan.effect, level=plan.level, power=plan.power, control_share=plan.held_out / 100
        )
    )
    each = pace.labelled / pace.device_days if pace.device_days else 0.0
    days = plan.timeout_s / _DAY_S
    expected = int(treated * each * days)
    devices = -int(-rows // (each * days)) if each else 0
    enough = expected >= rows and control > 0 and treated > 0
    words = (
        f"to see a gain of {plan.effect:.1%} over {accuracy:.1%} with a chance of {plan.power:.0%}, {rows} labelled "
        f"predictions are wanted on release {plan.release}; {treated} devices with {each:.3g} a day each give about "
        f"{expected} in {days:.3g} days"
        + (f", {devices} devices would do" if devices and not enough else "")
        + f"; {control} devices are held out"
    )
    return Power(
        effect=plan.effect, rows=rows, expected=expected, devices=devices, treated=treated, control=control,
        enough=enough, words=words,
    )  # fmt: skip
