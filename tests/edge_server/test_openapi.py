"""The OpenAPI document says what the API does."""

import re

import msgspec
import pytest
from starlette.routing import Route

from edge_server.app import ENDPOINTS
from edge_server.openapi import PREFIX, document

DOCUMENT = document(ENDPOINTS)
METHODS = {"GET", "POST", "PUT", "DELETE"}


def test_it_names_every_route_of_the_api_and_no_other(app):
    routes = {
        (method, route.path)
        for route in app.routes
        if isinstance(route, Route) and route.path.startswith(PREFIX)
        for method in route.methods & METHODS
    }
    told = {(method.upper(), path) for path, found in DOCUMENT["paths"].items() for method in found}
    assert routes - {("GET", f"{PREFIX}/openapi.json")} == told


def test_it_is_served_as_it_is_made(get):
    answer = get(f"{PREFIX}/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == msgspec.json.decode(msgspec.json.encode(DOCUMENT))
    assert answer.json()["openapi"] == "3.1.0"


def test_every_reference_leads_somewhere():
    text = msgspec.json.encode(DOCUMENT).decode()
    used = set(re.findall(r"#/components/schemas/([\w.]+)", text))
    assert used <= set(DOCUMENT["components"]["schemas"])


def test_operations_have_names_of_their_own_and_path_parameters_are_declared():
    operations = [(path, operation) for path, found in DOCUMENT["paths"].items() for operation in found.values()]
    names = [operation["operationId"] for _, operation in operations]
    assert len(set(names)) == len(names)
    for path, operation in operations:
        declared = {entry["name"] for entry in operation.get("parameters", []) if entry["in"] == "path"}
        assert declared == set(re.findall(r"{(\w+)}", path))


GETS = [endpoint for endpoint in ENDPOINTS if endpoint.method == "GET"]


@pytest.mark.parametrize("endpoint", GETS, ids=lambda endpoint: endpoint.path)
def test_what_is_answered_has_the_declared_form(endpoint, get, small_fleet, token, coordinator, clock):
    headers = {"authorization": f"Bearer {token('releaser')}"}
    clock.advance(200_000)
    for _ in range(3):
        coordinator.registry.alerts.look()
    path = PREFIX + endpoint.path.replace("{name}", "a").replace("{number}", "1").replace("{digest}", "ab" * 32)
    answer = get(path, headers=headers)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    if endpoint.page is None:
        msgspec.convert(body, endpoint.reply)
        declared = [endpoint.reply] if not isinstance(body, list) else []
        entries = [body] if declared else []
    else:
        name, kind = endpoint.page
        assert set(body) == {name, "next"}
        msgspec.convert(body["next"], kind | None)
        msgspec.convert(body[name], list[endpoint.reply])
        entries, declared = body[name], [endpoint.reply]
        assert entries or name in ("silences", "commands")
    for entry in entries:
        told = set(DOCUMENT["components"]["schemas"][declared[0].__name__]["properties"])
        assert set(entry) == told


@pytest.mark.parametrize("endpoint", [e for e in GETS if e.page], ids=lambda endpoint: endpoint.path)
def test_every_list_comes_in_pages(endpoint, get, small_fleet):
    path = PREFIX + endpoint.path.replace("{name}", "a")
    assert get(f"{path}?limit=500").status_code == 200
    assert get(f"{path}?limit=501").status_code == 400


def test_devices_are_chosen_by_their_labels(get, small_fleet, coordinator):
    for name in ("a", "c"):
        coordinator.registry.label(name, {"site": "berlin"}, actor="test")
    first = get(f"{PREFIX}/devices?where=site%3Dberlin&limit=1").json()
    assert ([device["name"] for device in first["devices"]], first["next"]) == (["a"], "a")
    second = get(f"{PREFIX}/devices?where=site%3Dberlin&limit=1&after=a").json()
    assert ([device["name"] for device in second["devices"]], second["next"]) == (["c"], None)
    assert get(f"{PREFIX}/devices?where=and").status_code == 400


@pytest.fixture
def order(request_, token, small_fleet):
    headers = {"authorization": f"Bearer {token('releaser', 'rita')}"}

    def send(method, path, body=None):
        return request_(method, PREFIX + path, headers=headers, json=body or {})

    return send


def test_a_test_is_calculated_without_being_started(order, coordinator):
    test = {"release": 2, "rules": {"strategy": "ab", "effect": 0.05, "control_percent": 40}}
    power = order("POST", "/rollouts/power", test).json()
    assert (power["effect"], power["treated"] + power["control"], power["enough"]) == (0.05, 3, False)
    assert power["rows"] > 100
    assert (power["expected"], power["days"], power["detectable"]) == (0, None, None), "no time was reported on"
    assert order("POST", "/rollouts/power", {"release": 2}).status_code == 400
    assert order("POST", "/rollouts/power", {**test, "release": 9}).status_code == 404
    assert len(coordinator.registry.rollouts()) == 2


def test_segments_over_the_api(order):
    order("PUT", "/devices/b/labels", {"labels": {"site": "berlin"}})
    pilot = order("POST", "/segments", {"name": "pilot", "query": "site=berlin"})
    assert (pilot.status_code, pilot.json()["devices"], pilot.json()["actor"]) == (201, 1, "rita")
    assert order("POST", "/segments", {"name": "pilot", "query": "site=rome"}).status_code == 409
    assert order("POST", "/segments", {"name": "other", "query": "site="}).status_code == 400
    assert [device["name"] for device in order("GET", "/devices?where=%40pilot").json()["devices"]] == ["b"]
    assert order("GET", "/fleet/view?where=%40nobody").status_code == 400
    for_pilot = order("POST", "/rollouts", {"release": 2, "group": "lab", "rules": {"where": "@pilot"}}).json()
    assert (for_pilot["plan"]["where"], for_pilot["plan"]["segments"]) == ("(site=berlin)", ["pilot"])
    refused = order("DELETE", "/segments/pilot")
    assert (refused.status_code, refused.json()["error"]["type"]) == (409, "SegmentError")
    assert order("POST", f"/rollouts/{for_pilot['id']}/abort").status_code == 200
    assert order("DELETE", "/segments/a").status_code == 204
    assert order("GET", "/segments/a").status_code == 404


def test_orders_over_the_api(order, request_, coordinator, tmp_path):
    assert order("POST", "/rollouts/2/pause", {"reason": "lunch"}).json()["state"]["paused"] is True
    assert order("POST", "/rollouts/2/approve").status_code == 409
    assert order("POST", "/rollouts/2/resume").json()["state"]["paused"] is False
    started = order("POST", "/rollouts", {"release": 2, "group": "north", "rules": {"stages": ["5 devices", 100]}})
    assert (started.status_code, started.json()["plan"]["group"]) == (201, "north")
    assert order("POST", "/rollouts", {"release": 9}).status_code == 404
    assert order("POST", "/rollouts", {"release": 2, "rules": {"stages": [3]}}).status_code == 400
    assert order("POST", "/rollouts", {"release": 2, "rules": {"nonsense": 1}}).status_code == 400

    coordinator.registry.enrol("pump", group="pumps", out=tmp_path / "b.json", actor="test")
    given = order("POST", "/devices/pump/commands", {"name": "pause-learning", "args": {"seconds": 60}})
    assert (given.status_code, given.json()["actor"]) == (201, "rita")
    assert order("POST", "/devices/pump/commands", {"name": "renew-certificate"}).status_code == 400
    assert order("POST", "/devices/nobody/commands", {"name": "status"}).status_code == 404
    labelled = order("PUT", "/devices/pump/labels", {"labels": {"site": "berlin", "room": None}})
    assert (labelled.status_code, labelled.json()["labels"]) == (200, {"site": "berlin"})
    assert order("PUT", "/devices/pump/labels", {"labels": {"a b": "c"}}).status_code == 400
    order("POST", "/devices/pump/commands", {"name": "status"})
    newest = order("GET", "/commands?device=pump&limit=1").json()
    oldest = order("GET", f"/commands?device=pump&limit=1&before={newest['next']}").json()
    assert {newest["commands"][0]["name"], oldest["commands"][0]["name"]} == {"pause-learning", "status"}
    assert oldest["next"] is None
    assert len(order("POST", "/groups/pumps/commands", {"name": "status"}).json()) == 1
    assert order("PUT", "/groups/pumps/mode", {"mode": "monitor"}).json()["mode"] == "monitor"
    assert order("PUT", "/groups/pumps/mode", {"mode": "wild"}).status_code == 400

    silence = order("POST", "/silences", {"kind": "device_*", "hours": 2, "reason": "moving"}).json()
    assert order("DELETE", f"/silences/{silence['id']}").status_code == 204
    assert order("DELETE", f"/silences/{silence['id']}").status_code == 404
    added = order("POST", "/users", {"name": "vic", "role": "viewer"}).json()
    assert request_("GET", f"{PREFIX}/me", headers={"authorization": f"Bearer {added['token']}"}).json() == {
        "name": "vic", "role": "viewer",
    }  # fmt: skip
    assert order("DELETE", "/users/vic").status_code == 204
