"""The orders that a person gives on the dashboard; the same functions as the API's do what is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from edge_server.api_orders import VERBS, GiveCommand, Ship, Token, act_on_rollout, give_command, power, ship
from edge_server.endpoint import BadRequestError, Call, Reason, whole_number
from edge_server.records import Role
from edge_server.users import ROLES
from edge_server.views import release, users


@dataclasses.dataclass(frozen=True)
class Shown:
    """A page that answers a form itself, because it is to be seen only once."""

    template: str
    section: str
    context: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """One kind of form.

    Attributes:
        path: Where it is sent.
        role: The least that may send it.
        handle: Does what it asks; gives where to go next, or a page.
        apart: As of an `Endpoint`.
    """

    path: str
    role: Role
    handle: Callable[[Call], str | Shown]
    apart: bool = False


def _on_rollout(verb: str) -> Form:
    def handle(call: Call) -> str:
        reason = _reason(call)
        act_on_rollout(call.registry, call.number, verb, reason=reason, actor=call.caller.name)
        return f"/rollouts/{call.number}"

    return Form(f"/rollouts/{{number}}/{verb}", VERBS[verb], handle)


def _ship(call: Call) -> str:
    return f"/rollouts/{ship(call.registry, _order(call), actor=call.caller.name).id}"


def _power(call: Call) -> Shown:
    found = power(call.registry, _order(call))
    return Shown("release.html", "/releases", release(call, given=call.body, power=found))


def _order(call: Call) -> Ship:
    """A rollout as a form describes it; what was left empty is as in the settings."""
    given = {name: value.strip() for name, value in call.body.items() if value.strip()}
    rules: dict[str, Any] = {name: given[name] for name in ("strategy", "approval") if name in given}
    rules["where"] = given.get("where", "")
    if stages := [part.strip() for part in given.get("stages", "").split(",") if part.strip()]:
        rules["stages"] = [int(part) if part.isascii() and part.isdigit() else part for part in stages]
    if "control_percent" in given:
        rules["control_percent"] = whole_number(given["control_percent"], "control_percent", least=0)
    for name in ("effect", "power"):
        if name in given:
            rules[name] = _number(given[name], f"{name}_percent") / 100
    return Ship(release=call.number, group=given.get("group", ""), rules=rules)


def _command(call: Call) -> str:
    pairs = [part.partition("=") for part in call.body.get("args", "").split()]
    if not all(equals for _, equals, _ in pairs):
        raise BadRequestError("arguments must be KEY=VALUE, with spaces between them")
    order = GiveCommand(name=call.body.get("name", ""), args={key: value for key, _, value in pairs})
    give_command(call.registry, call.name, order, actor=call.caller.name)
    return f"/devices/{quote(call.name)}#commands"


def _resolve(call: Call) -> str:
    call.registry.alerts.resolve(call.number, reason=_reason(call), actor=call.caller.name)
    return f"/alerts/{call.number}"


def _silence(call: Call) -> str:
    fields = call.body
    hours = _number(fields.get("hours", ""), "hours")
    call.registry.alerts.silence(
        kind=fields.get("kind", "*"),
        cause=fields.get("cause", "*"),
        device=fields.get("device", "*"),
        for_s=hours * 3600,
        reason=fields.get("reason", ""),
        actor=call.caller.name,
    )
    return "/alerts#silences"


def _end_silence(call: Call) -> str:
    call.registry.alerts.end_silence(call.number, actor=call.caller.name)
    return "/alerts#silences"


def _create_segment(call: Call) -> str:
    call.registry.segments.create(call.body.get("name", ""), call.body.get("query", ""), actor=call.caller.name)
    return "/segments"


def _delete_segment(call: Call) -> str:
    call.registry.segments.delete(call.name, actor=call.caller.name)
    return "/segments"


def _add_user(call: Call) -> Shown:
    name, role = call.body.get("name", ""), call.body.get("role", "")
    known = next((known for known in ROLES if known == role), None)
    if known is None:
        raise BadRequestError(f"role must be {', '.join(ROLES)}, got {role[:32]!r}")
    token = call.registry.users.add(name, known, actor=call.caller.name)
    return Shown("users.html", "/users", {**users(call), "token": Token(name, known, token)})


def _revoke_user(call: Call) -> str:
    call.registry.users.revoke(call.name, actor=call.caller.name)
    return "/users"


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise BadRequestError(f"{name} must be a number, got {text[:32]!r}") from error


def _reason(call: Call) -> str:
    try:
        return Reason(reason=call.body.get("reason", "")).reason
    except ValueError as error:
        raise BadRequestError(str(error)) from error


FORMS = (
    *map(_on_rollout, VERBS),
    Form("/releases/{number}/ship", "releaser", _ship, apart=True),
    Form("/releases/{number}/power", "releaser", _power),
    Form("/devices/{name}/command", "operator", _command),
    Form("/segments", "operator", _create_segment),
    Form("/segments/{name}/delete", "operator", _delete_segment),
    Form("/alerts/{number}/resolve", "operator", _resolve),
    Form("/silences", "operator", _silence),
    Form("/silences/{number}/end", "operator", _end_silence),
    Form("/users", "releaser", _add_user),
    Form("/users/{name}/revoke", "releaser", _revoke_user),
)
