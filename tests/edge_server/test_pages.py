"""What the dashboard shows, without a browser; `test_browser.py` looks at it in one."""

import asyncio
import html
import json
import re

import msgspec
import pytest

from edge_sdk.messages import MonitorState, to_counts
from edge_server.live import events, seen
from edge_server.plan import RolloutRules
from edge_server.views import VIEWS
from tests.edge_server.conftest import keep_candidate

ATTACK = "<script>alert(1)</script>"


def data(page, name):
    return json.loads(html.unescape(re.search(rf'<script id="{name}"[^>]*>(.*?)</script>', page)[1]))


def paths():
    known = {"{name}": "a", "{number}": "1", "{digest}": "ab" * 32}
    found = [view.path for view in VIEWS if "alerts/" not in view.path]
    for place, value in known.items():
        found = [path.replace(place, value) for path in found]
    return found


@pytest.fixture
def signed_in(browser, token):
    browser.log_in(token("releaser", "rita"))
    return browser


class TestEveryPage:
    def test_it_can_be_seen_before_anything_happened(self, signed_in):
        for path in (
            "/",
            "/devices",
            "/segments",
            "/drift",
            "/rollouts",
            "/releases",
            "/candidates",
            "/alerts",
            "/audit",
            "/users",
        ):
            answer = signed_in.get(path)
            assert answer.status_code == 200, (path, answer.text)
        assert "edge-coordinator devices add" in signed_in.get("/").text

    @pytest.mark.parametrize("path", paths())
    def test_it_has_landmarks_a_heading_and_names_for_all_fields(self, signed_in, small_fleet, path):
        page = signed_in.get(path).text
        assert page.count("<h1") == 1
        for landmark in ("<main", "<header", "<nav", 'href="#main"', 'lang="en"', 'aria-live="polite"'):
            assert landmark in page, landmark
        assert page.count('aria-current="page"') == 1
        for table in re.findall(r"<table.*?</table>", page, re.DOTALL):
            assert "<caption" in table
            assert 'scope="col"' in table
        for field in re.findall(r"<(?:input|select)[^>]*>", page):
            hidden = 'type="hidden"' in field
            before = page[: page.index(field)]
            assert hidden or before.rfind("<label") > before.rfind("</label>"), field

    @pytest.mark.parametrize("path", paths())
    def test_nothing_comes_from_elsewhere_and_nothing_runs_from_the_page(self, signed_in, small_fleet, path):
        page = signed_in.get(path).text
        assert "http://" not in page
        assert "https://" not in page
        assert not re.findall(r"\s(?:on\w+|style)=", page)
        for script in re.findall(r"<script[^>]*>", page):
            assert re.search(r'src="/(static|vendor)/|type="application/json"', script), script

    def test_unknown_parameters_and_things_are_told_as_a_page(self, signed_in):
        for path, status in (("/devices?x=1", 400), ("/devices/nobody", 404), ("/rollouts/9", 404), ("/nothing", 404)):
            answer = signed_in.get(path)
            assert answer.status_code == status
            assert 'role="alert"' in answer.text


class TestFleet:
    def test_the_map_holds_every_device_with_its_health(self, get, small_fleet):
        shown = data(get("/").text, "map-data")
        [group] = shown["groups"]
        assert group["devices"] == ["a", "b", "c"]
        assert [shown["health"][int(code)] for code in group["health"]] == ["drift", "ok", "ok"]

    def test_it_shows_what_needs_a_look_rollouts_and_events(self, get, small_fleet):
        page = get("/").text
        assert '<a href="/devices/a">a</a></th>' in page
        assert "badge drift" in page
        assert "90.0%" in page
        assert "Release 2 to default" in page
        assert "<strong>boot</strong>" in page

    def test_what_devices_and_people_say_is_escaped(self, get, coordinator, small_fleet, settle):
        small_fleet[0].event(ATTACK, **{ATTACK: ATTACK})
        small_fleet[0].state(mode=ATTACK)
        settle(small_fleet)
        small_fleet[0].report(mode=ATTACK, monitors=[MonitorState(ATTACK, 30.0, 20.0, True, True)])
        settle(small_fleet)
        coordinator.abort(2, reason=ATTACK)
        for path in ("/", "/devices", "/devices/a", "/rollouts/2", "/audit"):
            page = get(path).text
            assert ATTACK not in page, path
            assert "\\u003cscript" in page or "&lt;script&gt;" in page, path

    def test_unknown_devices_are_visible(self, get, make_coordinator, make_device):
        strict = make_coordinator(accept_unknown=False)
        make_device("stranger")
        strict.pump()
        assert "stranger (1)" in get("/").text

    def test_a_device_page_says_how_much_room_is_left(self, get, small_fleet, settle):
        assert re.search(r"Free disk</dt><dd>-<", get("/devices/a").text)
        small_fleet[0].report(disk_free_mb=99, memory_free_mb=301)
        settle(small_fleet)
        page = get("/devices/a").text
        assert re.search(r"Free disk</dt><dd>99 MB<", page)
        assert re.search(r"Memory</dt><dd>301 MB<", page)

    def test_odd_details_do_not_break_it(self, get, small_fleet, settle):
        small_fleet[0].event("x" * 256, text="y" * 10_000, big=2**64 - 1, nan=float("nan"))
        settle(small_fleet)
        assert "y" * 400 not in get("/").text
        assert get("/devices/a").status_code == 200


class TestDevices:
    @pytest.fixture(autouse=True)
    def many(self, coordinator, make_device):
        for i in range(205):
            make_device(f"d{i:03}", group="north" if i % 2 else "south")
        coordinator.pump()

    def test_more_than_a_page_holds_are_a_link_away(self, get):
        first = get("/devices").text
        assert "205 devices" in first
        following = html.unescape(re.search(r'rel="next" href="([^"]+)"', first)[1])
        page = get(following).text
        assert ">d200</a></th>" in page
        assert ">d199</a></th>" not in page
        assert 'rel="next"' not in page

    def test_filters_narrow_them_down_together(self, get, coordinator):
        page = get("/devices?text=D00&group=north&health=ok&release=").text
        assert re.findall(r">(d\d+)</a></th>", page) == ["d001", "d003", "d005", "d007", "d009"]
        assert "0 devices" in get("/devices?health=offline").text
        coordinator.registry.label("d007", {"site": "berlin"}, actor="test")
        assert re.findall(r">(d\d+)</a></th>", get("/devices?where=site%3Dberlin&group=north").text) == ["d007"]
        assert get("/devices?where=site%3D").status_code == 400
        assert "berlin" in get("/devices/d007").text
        assert get("/devices?health=rosy").status_code == 400


class TestDevice:
    def test_the_timeline_sorts_events_into_lanes_and_tells_evidence(self, get, small_fleet, settle):
        small_fleet[0].event("drift_alarm", monitor="inputs")
        small_fleet[0].event("promoted", to=1)
        small_fleet[0].event("head_rolled_back", to=0)
        settle(small_fleet)
        told = data(get("/devices/a").text, "timeline-data")
        lanes = {event["name"]: event["lane"] for event in told["events"]}
        assert lanes == {
            "boot": "other", "drift alarm": "drift", "promoted": "gate", "head rolled back": "rollback",
        }  # fmt: skip
        assert told["monitors"]["inputs"]["y"] == [1.5]

    def test_a_command_is_given_and_shown(self, signed_in, coordinator, tmp_path):
        coordinator.registry.enrol("pump", group="default", out=tmp_path / "b.json", actor="test")
        signed_in.get("/devices/pump")
        answer = signed_in.send("/devices/pump/command", name="pause-learning", args="seconds=60")
        assert answer.headers["location"] == "/devices/pump#commands"
        [given] = coordinator.registry.store.commands.find(device="pump")
        assert (given.name, given.args, given.actor) == ("pause-learning", {"seconds": 60.0}, "rita")
        assert "pause-learning" in signed_in.get("/devices/pump").text

    @pytest.mark.parametrize(
        ("name", "args"),
        [("explode", ""), ("renew-certificate", "certificate=x"), ("mode", "mode=wild"), ("mode", "monitor")],
    )
    def test_commands_that_make_no_sense_are_refused(self, signed_in, coordinator, tmp_path, name, args):
        coordinator.registry.enrol("pump", group="default", out=tmp_path / "b.json", actor="test")
        signed_in.get("/devices/pump")
        answer = signed_in.send("/devices/pump/command", name=name, args=args)
        assert answer.status_code == 400
        assert 'role="alert"' in answer.text


class TestRollouts:
    def test_its_page_offers_what_can_be_done_now(self, signed_in, small_fleet):
        def offered():
            page = signed_in.get("/rollouts/2").text
            return re.findall(r'action="/rollouts/2/(\w+)"', page)

        assert offered() == ["pause", "abort"]
        assert signed_in.send("/rollouts/2/pause", reason="lunch").headers["location"] == "/rollouts/2"
        assert offered() == ["resume", "abort"]
        signed_in.send("/rollouts/2/resume")
        signed_in.send("/rollouts/2/abort", reason="wrong labels")
        assert offered() == []
        assert "aborted: wrong labels" in signed_in.get("/rollouts/2").text

    def test_a_stage_that_waits_for_a_person_can_be_approved(self, signed_in, coordinator, checkpoint, small_fleet):
        coordinator.abort(2)
        for device in small_fleet:
            device.release = 1
        coordinator.advance()
        signed_in.get("/releases/2")
        coordinator.push(checkpoint(3), group="other")
        signed_in.get("/releases/3")
        answer = signed_in.send("/releases/3/ship", group="default", approval="each", stages="1 devices, 100")
        path = answer.headers["location"]
        plan = coordinator.registry.rollout(int(path.rpartition("/")[2])).plan
        assert (plan.group, plan.stages, plan.approval) == ("default", ("1 devices", 100), "each")
        assert "/approve" in signed_in.get(path).text
        assert signed_in.send(f"{path}/approve", reason="looks fine").status_code == 303
        assert "approved by rita: looks fine" in signed_in.get(path).text

    def test_what_cannot_be_done_now_is_told_in_words(self, signed_in, small_fleet):
        signed_in.get("/rollouts/1")
        answer = signed_in.send("/rollouts/1/pause")
        assert answer.status_code == 409
        assert "only a running one can be" in answer.text


class TestReleases:
    def test_the_card_is_shown_without_its_html(self, get, coordinator, checkpoint, monkeypatch):
        coordinator.push(checkpoint(1))
        card = f"# Pump\n\n{ATTACK} [x](javascript:alert(1))\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
        detail = msgspec.structs.replace(coordinator.registry.release(1), card=card)
        monkeypatch.setattr(coordinator.registry, "release", lambda number: detail)
        page = get("/releases/1").text
        assert "Pump</h3>" in page
        assert "<td>1</td>" in page
        assert ATTACK not in page
        assert 'href="javascript' not in page

    def test_lineage_leads_to_the_releases_it_was_made_from(self, get, coordinator, checkpoint):
        from edge_sdk.manifest import MANIFEST_NAME, digest_of, manifest_bytes, parse_manifest

        first, second = checkpoint(1), checkpoint(2)
        manifest = parse_manifest((second / MANIFEST_NAME).read_bytes())
        parent = digest_of((first / MANIFEST_NAME).read_bytes())
        (second / MANIFEST_NAME).write_bytes(manifest_bytes(msgspec.structs.replace(manifest, parent=parent)))
        coordinator.push(first)
        coordinator.push(second)
        assert 'made from <a href="/releases/1">release 1</a>' in get("/releases/2").text
        assert get("/api/v1/releases/2").json()["lineage"][0]["release"] == 1


class TestAlerts:
    @pytest.fixture
    def alert(self, coordinator, small_fleet, clock):
        for _ in range(5):
            clock.advance(100_000)
            coordinator.registry.alerts.look()
        return coordinator.registry.alerts.find(status="firing")[-1].id

    def test_one_is_shown_with_its_runbook_and_resolved(self, alert, signed_in, coordinator):
        page = signed_in.get(f"/alerts/{alert}").text
        assert coordinator.registry.alerts.show(alert).todo[0] in html.unescape(page)
        assert signed_in.send(f"/alerts/{alert}/resolve", reason="known").status_code == 303
        assert "closed by rita" in signed_in.get(f"/alerts/{alert}").text

    def test_silences_begin_and_end(self, alert, signed_in, coordinator):
        signed_in.get("/alerts")
        refused = signed_in.send("/silences", kind="*", cause="*", device="*", hours="x", reason="y")
        assert refused.status_code == 400
        assert signed_in.send("/silences", kind="device_*", hours="2", reason="moving house").status_code == 303
        [silence] = coordinator.registry.alerts.silences()
        assert (silence.actor, silence.reason) == ("rita", "moving house")
        assert "moving house" in signed_in.get("/alerts").text
        signed_in.send(f"/silences/{silence.id}/end")
        assert coordinator.registry.alerts.silences() == []


class TestUsers:
    def test_a_token_is_shown_once_and_works(self, signed_in, make_browser):
        signed_in.get("/users")
        shown = signed_in.send("/users", name="vic", role="viewer")
        secret = re.search(r'class="token">([\w-]+)<', shown.text)[1]
        assert secret not in signed_in.get("/users").text
        other = make_browser()
        other.log_in(secret)
        assert "vic (viewer)" in other.get("/").text
        signed_in.send("/users/vic/revoke")
        assert other.get("/").status_code == 303

    def test_a_name_that_is_taken_is_told_in_words(self, signed_in):
        signed_in.get("/users")
        assert signed_in.send("/users", name="rita", role="viewer").status_code == 409
        assert signed_in.send("/users", name="new", role="king").status_code == 400


class TestDrift:
    def test_numbers_come_by_feature_and_cohort(self, get, coordinator, make_device, settle, summary, clock):
        devices = [make_device(name) for name in ("a", "b")]
        for device in devices:
            device.put(summary(start=clock.now() - 3600, end=clock.now(), bins=8, counts=to_counts([7] * 16)))
        settle(devices)
        clock.advance(1)
        told = get("/drift/data?by=group&hours=24").json()
        assert told["x"] == ["group=default"]
        assert sorted(told["y"]) == ["acc_x", "acc_y"]
        assert told["devices"] == [2]
        assert get("/drift/data?by=nonsense").status_code == 400
        assert get("/drift/freshness").json()["advice"]


class TestStarting:
    def test_a_test_is_calculated_before_it_is_started_and_its_figures_stay(self, signed_in, small_fleet, coordinator):
        fields = {
            "group": "default", "where": "not @a", "strategy": "ab", "stages": "5 devices, 100", "approval": "last",
            "control_percent": "40", "effect": "7.5", "power": "90",
        }  # fmt: skip
        signed_in.get("/releases/2")
        page = signed_in.send("/releases/2/power", **fields).text
        assert "What the test could see" in page
        for name, value in fields.items():
            chosen = (
                re.search(rf'name="{name}"[^>]* value="{value}"', page) or f"<option selected>{value}</option>" in page
            )
            assert chosen, name
        assert len(coordinator.registry.rollouts()) == 2
        coordinator.abort(2)
        coordinator.registry.advance()
        coordinator.registry.advance()
        signed_in.get("/releases/2")
        answer = signed_in.send("/releases/2/ship", **{**fields, "group": "lab", "strategy": "canary"})
        assert answer.status_code == 303, answer.text
        plan = coordinator.registry.rollout(3).plan
        assert (plan.where, plan.segments, plan.stages) == ("not (site=berlin)", ("a",), ("5 devices", 100))
        assert (plan.effect, plan.power, plan.control_percent) == (0.075, 0.9, 40)

    def test_what_cannot_be_calculated_is_said(self, signed_in, small_fleet):
        signed_in.get("/releases/2")
        for fields, why in (
            ({"strategy": "canary"}, "strategy must be"),
            ({"strategy": "ab", "effect": "much"}, "effect_percent must be"),
            ({"strategy": "ab", "control_percent": "x"}, "control_percent must be"),
            ({"strategy": "ab", "where": "@none"}, "there is no segment"),
        ):  # fmt: skip
            answer = signed_in.send("/releases/2/power", group="default", **fields)
            assert answer.status_code == 400
            assert why in answer.text

    def test_the_figures_of_a_test_stand_on_its_rollouts_page(
        self, signed_in, small_fleet, coordinator, checkpoint, clock, settle
    ):
        start = clock.now()
        clock.advance(6 * 3600)
        for device in small_fleet:
            device.report(labelled=400, start=start)
        settle(small_fleet)
        coordinator.abort(2)
        coordinator.registry.advance()
        coordinator.registry.advance()
        number = coordinator.push(checkpoint(3), plan=RolloutRules(strategy="ab", on_small="warn", effect=0.05))
        power = coordinator.registry.rollout(number).state.power
        page = signed_in.get(f"/rollouts/{number}").text
        # 500 labels of each device in a quarter of a day
        assert power.days == pytest.approx(power.rows / (2000 * power.treated))
        assert power.expected == 7 * 2000 * power.treated
        assert power.enough is (power.days <= 7.0) is (power.detectable <= 0.05)
        assert f"<dt>Labelled predictions needed</dt><dd>{power.rows}</dd>" in page
        assert f"<dd>{power.days:.3g} days</dd>" in page
        assert f"<dd>{power.detectable:.1%} or more</dd>" in page

    def test_a_candidate_is_shown_by_slice_with_lineage_and_card(self, get, small_fleet, coordinator, checkpoint):
        page = get("/candidates/" + "ab" * 32).text
        rows = re.findall(r'<th scope="row">(site=\w+)</th>', page)
        assert rows == ["site=berlin", "site=rome"]
        assert "-20.0 points" in page
        assert "release 1, SHA-256" in page
        assert "<h3>digits</h3>" in page
        assert "<b>tests</b>" not in page
        assert '<a href="/candidates/' in get("/candidates").text
        assert get("/candidates/" + "cd" * 32).status_code == 404
        coordinator.abort(2)
        coordinator.registry.add_release(checkpoint(3))
        digest = coordinator.registry.release(3).release.digest
        keep_candidate(coordinator.registry, digest=digest, verdict="better")
        assert f'href="/candidates/{digest}"' in get("/releases/3").text
        assert '<a href="/releases/3">yes</a>' in get(f"/candidates/{digest}").text
        assert get("/candidates?before=" + digest).text.count('scope="row"') == 1


class TestLive:
    def test_a_page_is_told_what_changed_and_nothing_else(self, coordinator, small_fleet, settle):
        async def listen():
            stream = events(coordinator.registry, lambda: True, (), "", look_s=0.0)
            first = await anext(stream)
            coordinator.registry.pause(2, reason="lunch", actor="test")
            second = await anext(stream)
            small_fleet[0].event("boot")
            settle(small_fleet)
            return first, second, await anext(stream), await anext(stream)

        first, second, third, fourth = asyncio.run(listen())
        assert first.startswith("retry:")
        assert second == "event: change\ndata: rollouts audit\n\n"
        assert third == "event: change\ndata: devices\n\n"
        assert fourth.startswith(":")

    def test_what_changed_between_the_page_and_its_stream_is_told_at_once(self, coordinator, small_fleet):
        registry = coordinator.registry

        async def listen(shown):
            stream = events(registry, lambda: True, ("rollouts",), shown, look_s=0.0)
            return [await anext(stream) for _ in range(2)][1]

        shown = seen(registry, ("rollouts",))
        small_fleet[0].state(online=False, reason="stopped")
        coordinator.pump()
        assert asyncio.run(listen(shown)).startswith(":")  # the page does not show devices
        registry.pause(2, reason="lunch", actor="test")
        assert asyncio.run(listen(shown)) == "event: change\ndata: rollouts\n\n"

    def test_it_ends_when_the_session_does(self, coordinator):
        async def listen():
            allowed = iter((True, False))
            return [text async for text in events(coordinator.registry, lambda: next(allowed), (), "", look_s=0.0)]

        assert len(asyncio.run(listen())) == 1
