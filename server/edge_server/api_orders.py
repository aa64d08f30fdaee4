"""The endpoints of the JSON API that change something. The dashboard's forms give the same orders."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from edge_sdk.commands import COMMANDS
from edge_sdk.errors import ConfigError
from edge_server.alerting import AlertDetail
from edge_server.alerts import Silence
from edge_server.api import DeviceDetail, GroupView, ReleaseView, device_detail, group_view, release_view
from edge_server.endpoint import BadRequestError, Call, Endpoint, Reason
from edge_server.labels import parse_label
from edge_server.plan import RolloutRules
from edge_server.power import Power
from edge_server.records import CommandRecord, Role, RolloutRecord, SegmentDetail
from edge_server.registry import Registry

ORDERS = tuple(name for name in COMMANDS if name != "renew-certificate")
"""Commands that people give; the other one carries a certificate."""
_DAY_S = 86_400.0


class Ship(msgspec.Struct, forbid_unknown_fields=True):
    """Start the rollout of a release that is here."""

    release: int
    group: str = "default"
    rules: dict[str, Any] = {}
    """As in a plan's file (docs/rollouts.md); what is left out is as in the settings."""
    force: str = ""
    """Why it ships although it lost against the release in use."""


class GiveCommand(msgspec.Struct, forbid_unknown_fields=True):
    """Tell devices what to do."""

    name: str
    args: dict[str, Any] = {}
    expires_s: float = _DAY_S
    """After this time it is not carried out any more."""


class SetLabels(msgspec.Struct, forbid_unknown_fields=True):
    """Set labels of a device; null takes one away, what is not named stays."""

    labels: dict[str, str | None]


class NewSegment(msgspec.Struct, forbid_unknown_fields=True):
    """A label query that is to have a name."""

    name: str
    query: str


class SetMode(msgspec.Struct, forbid_unknown_fields=True):
    """How far the devices of a group are trusted; own: no longer say."""

    mode: Literal["monitor", "shadow", "adapt", "own"]


class KeepSilent(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Keep people from being told; patterns with * and ?."""

    kind: str = "*"
    cause: str = "*"
    device: str = "*"
    """Other than *: leave only these devices out of alerts."""
    hours: float
    reason: str


class NewUser(msgspec.Struct, forbid_unknown_fields=True):
    """Somebody who is to have a token."""

    name: str
    role: Role


class Token(msgspec.Struct, frozen=True):
    """A user's token; it is not kept, and cannot be shown again."""

    name: str
    role: Role
    token: str


# ---- what both the API and the forms do


def act_on_rollout(registry: Registry, number: int, verb: str, *, reason: str, actor: str) -> RolloutRecord:
    """Approve, pause, resume or abort; errors as `Registry`."""
    if verb == "approve":
        registry.approve(number, reason=reason, actor=actor)
    elif verb == "pause":
        registry.pause(number, reason=reason, actor=actor)
    elif verb == "resume":
        registry.resume(number, actor=actor)
    else:
        registry.abort(number, reason=reason, actor=actor)
    return registry.rollout(number)


VERBS: dict[str, Role] = {"approve": "releaser", "resume": "releaser", "pause": "operator", "abort": "operator"}
"""What can be done about a rollout, by whom: to stop one takes less than to go on with it."""


def ship(registry: Registry, order: Ship, *, actor: str) -> RolloutRecord:
    """Start a rollout.

    Raises:
        BadRequestError: The rules cannot be used.
        EdgeError: As `Registry.ship`.
    """
    rules = _rules(registry, order)
    number = registry.ship(order.release, group=order.group, plan=rules, actor=actor, force=order.force)
    return registry.rollout(number)


def power(registry: Registry, order: Ship) -> Power:
    """What the A/B test that a rollout would be can be expected to see.

    Raises:
        BadRequestError: The rules cannot be used, or are of no A/B test.
        UnknownReleaseError: There is no such release.
        ConfigError: The devices are chosen by what is no query.
    """
    rules = _rules(registry, order)
    found = registry.power(order.release, group=order.group, plan=rules)
    if found is None:
        raise BadRequestError(
            f'only an A/B test is calculated beforehand: strategy must be "ab", not "{rules.strategy}"'
        )
    return found


def _rules(registry: Registry, order: Ship) -> RolloutRules:
    usual = registry.settings.rollout
    try:
        return msgspec.convert({**msgspec.to_builtins(usual), **order.rules}, type(usual))
    except msgspec.ValidationError as error:
        raise BadRequestError(f"rules: {error}") from error


def give_command(registry: Registry, device: str, order: GiveCommand, *, actor: str) -> CommandRecord:
    """Tell a device what to do; errors as `Identities.order`."""
    _check_order(order)
    return registry.identities.order(device, order.name, order.args, expires_s=order.expires_s, actor=actor)


def _check_order(order: GiveCommand) -> None:
    if order.name not in ORDERS:
        raise ConfigError(f"there is no command {order.name[:64]!r}; there are {', '.join(ORDERS)}")


# ---- endpoints


def _on_rollout(verb: str) -> Endpoint:
    def handle(call: Call) -> RolloutRecord:
        return act_on_rollout(call.registry, call.number, verb, reason=call.body.reason, actor=call.caller.name)

    summaries = {
        "approve": "Let the stage begin that waits for a person",
        "pause": "Tell no further device until it is resumed; gates still halt it",
        "resume": "Go on with a rollout that was paused",
        "abort": "Withdraw the release; devices that run it go back to what they had",
    }
    return Endpoint(
        "POST", f"/rollouts/{{number}}/{verb}", VERBS[verb], handle, summaries[verb], body=Reason, reply=RolloutRecord
    )


def _add_release(call: Call) -> ReleaseView:
    record = call.registry.add_release(call.body, actor=call.caller.name)
    return release_view(call.registry, record.release)


def _ship(call: Call) -> RolloutRecord:
    return ship(call.registry, call.body, actor=call.caller.name)


def _power(call: Call) -> Power:
    return power(call.registry, call.body)


def _command(call: Call) -> CommandRecord:
    return give_command(call.registry, call.name, call.body, actor=call.caller.name)


def _label(call: Call) -> dict[str, Any]:
    given = call.body.labels.items()
    changes = dict(parse_label(f"{key}-" if value is None else f"{key}={value}") for key, value in given)
    call.registry.label(call.name, changes, actor=call.caller.name)
    return device_detail(call)


def _group_command(call: Call) -> list[CommandRecord]:
    order: GiveCommand = call.body
    _check_order(order)
    return call.registry.identities.order_group(
        call.name, order.name, order.args, expires_s=order.expires_s, actor=call.caller.name
    )


def _group_mode(call: Call) -> GroupView:
    mode = "" if call.body.mode == "own" else call.body.mode
    call.registry.modes.set(call.name, mode, actor=call.caller.name)
    return group_view(call.registry.store.groups.get(call.name))


def _resolve(call: Call) -> AlertDetail:
    call.registry.alerts.resolve(call.number, reason=call.body.reason, actor=call.caller.name)
    return call.registry.alerts.show(call.number)


def _silence(call: Call) -> Silence:
    order: KeepSilent = call.body
    number = call.registry.alerts.silence(
        kind=order.kind,
        cause=order.cause,
        device=order.device,
        for_s=order.hours * 3600,
        reason=order.reason,
        actor=call.caller.name,
    )
    return next(silence for silence in call.registry.alerts.silences() if silence.id == number)


def _end_silence(call: Call) -> None:
    call.registry.alerts.end_silence(call.number, actor=call.caller.name)


def _create_segment(call: Call) -> SegmentDetail:
    return call.registry.segments.create(call.body.name, call.body.query, actor=call.caller.name)


def _delete_segment(call: Call) -> None:
    call.registry.segments.delete(call.name, actor=call.caller.name)


def _add_user(call: Call) -> Token:
    order: NewUser = call.body
    token = call.registry.users.add(order.name, order.role, actor=call.caller.name)
    return Token(order.name, order.role, token)


def _revoke_user(call: Call) -> None:
    call.registry.users.revoke(call.name, actor=call.caller.name)


ORDERING = (
    Endpoint(
        "POST", "/releases", "releaser", _add_release,
        "Take in a checkpoint, the tar archive of its folder, without a rollout; the same again changes nothing",
        reply=ReleaseView, status=201, upload=True,
    ),
    Endpoint(
        "POST", "/rollouts", "releaser", _ship, "Start the rollout of a release that is here",
        body=Ship, reply=RolloutRecord, status=201, apart=True,
    ),
    Endpoint(
        "POST", "/rollouts/power", "viewer", _power,
        "What an A/B test by these rules would need, and what it would get; nothing is started",
        body=Ship, reply=Power,
    ),
    *map(_on_rollout, VERBS),
    Endpoint(
        "POST", "/devices/{name}/commands", "operator", _command, "Tell a device what to do",
        body=GiveCommand, reply=CommandRecord, status=201,
    ),
    Endpoint(
        "PUT", "/devices/{name}/labels", "operator", _label, "Set labels of a device; null takes one away",
        body=SetLabels, reply=DeviceDetail,
    ),
    Endpoint(
        "POST", "/segments", "operator", _create_segment, "Give a label query a name, for queries that say @name",
        body=NewSegment, reply=SegmentDetail, status=201,
    ),
    Endpoint(
        "DELETE", "/segments/{name}", "operator", _delete_segment,
        "Forget a segment that no rollout is under way for", status=204,
    ),
    Endpoint(
        "POST", "/groups/{name}/commands", "operator", _group_command, "Tell every device of a group what to do",
        body=GiveCommand, reply=list[CommandRecord], status=201,
    ),
    Endpoint(
        "PUT", "/groups/{name}/mode", "releaser", _group_mode, "Say how far the devices of a group are trusted",
        body=SetMode, reply=GroupView,
    ),
    Endpoint(
        "POST", "/alerts/{number}/resolve", "operator", _resolve,
        "Be done with an alert: it stays quiet until its condition has gone and comes anew",
        body=Reason, reply=AlertDetail,
    ),
    Endpoint(
        "POST", "/silences", "operator", _silence, "Keep people from being told of alerts for some time",
        body=KeepSilent, reply=Silence, status=201,
    ),
    Endpoint("DELETE", "/silences/{number}", "operator", _end_silence, "Let people be told again", status=204),
    Endpoint(
        "POST", "/users", "releaser", _add_user, "Add a user; the token is shown this once",
        body=NewUser, reply=Token, status=201,
    ),
    Endpoint("DELETE", "/users/{name}", "releaser", _revoke_user, "Turn a user away, and end its sessions", status=204),
)  # fmt: skip
