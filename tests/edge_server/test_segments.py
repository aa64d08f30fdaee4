"""Segments: label queries with a name, wherever a query is taken."""

import json

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import ConfigError
from edge_server.cli import main
from edge_server.errors import RolloutError, SegmentError, UnknownSegmentError
from edge_server.labels import parse, segments_of, spell_out
from edge_server.plan import RolloutRules

SEGMENTS = {"pilot": "site=berlin or site=rome", "new.hw": "hw=pi5"}


@pytest.fixture
def registry(coordinator, fleet):
    """Eight devices, of which d0 and d1 are in the north."""
    found = coordinator.registry
    for name in ("d0", "d1"):
        found.label(name, {"site": "north"}, actor="ann")
    return found


class TestQueries:
    @pytest.mark.parametrize(("query", "site", "expected"), [
        ("@pilot", "rome", True),
        ("@pilot", "oslo", False),
        ("not @pilot", "oslo", True),
        ("@pilot and hw=pi4", "rome", True),
        ("@pilot @new.hw", "rome", False),
        ("(@new.hw or @pilot) site!=rome", "berlin", True),
        ('site="@pilot"', "@pilot", True),
    ])  # fmt: skip
    def test_a_name_stands_for_the_whole_query(self, query, site, expected):
        assert parse(spell_out(query, SEGMENTS)).matches({"site": site, "hw": "pi4"}) is expected

    @pytest.mark.parametrize("query", ["@nobody", "@", "@pilots", "site=north and @Pilot"])
    def test_a_name_that_is_none_is_refused_and_those_there_are_told(self, query):
        with pytest.raises(ConfigError, match=r"there is no segment '\w*'; there are: new\.hw, pilot"):
            spell_out(query, SEGMENTS)

    def test_names_are_told_once_and_in_order_without_what_is_quoted(self):
        assert segments_of('@b or @a "@c" @b') == ("b", "a")

    @given(st.text(alphabet='ab @"=()', max_size=20))
    def test_a_text_without_names_stays_as_it_is(self, text):
        if not segments_of(text):
            assert spell_out(text, {}) == text


class TestRecords:
    def test_one_is_made_shown_used_and_deleted(self, registry, rows):
        made = registry.segments.create("north", " site=north ", actor="ann")
        assert (made.query, made.devices, made.actor, made.rollouts) == ("site=north", 2, "ann", [])
        assert registry.matching("@north and not name=d1") == ["d0"]
        assert registry.segments.create("rest", "not @north", actor="ann").query == "not (site=north)"
        registry.segments.delete("north", actor="ben")
        assert [segment.name for segment in registry.segments.all()] == ["rest"]
        assert len(registry.matching("@rest")) == 6
        told = rows("SELECT actor, action FROM audit WHERE action LIKE 'segment%'")
        assert told == [("ann", "segment created"), ("ann", "segment created"), ("ben", "segment deleted")]

    def test_what_cannot_be_is_refused_and_nothing_is_kept(self, registry):
        registry.segments.create("north", "site=north", actor="ann")
        with pytest.raises(SegmentError, match="already"):
            registry.segments.create("north", "site=south", actor="ann")
        for name in ("", "1st", "a b", "@a", "x" * 64, "ü"):
            with pytest.raises(ConfigError, match="cannot name a segment"):
                registry.segments.create(name, "site=south", actor="ann")
        for query in ("", "site=", "@south", "site=north) or (hw=pi4"):
            with pytest.raises(ConfigError):
                registry.segments.create("south", query, actor="ann")
        with pytest.raises(UnknownSegmentError):
            registry.segments.delete("south", actor="ann")
        assert [segment.query for segment in registry.segments.all()] == ["site=north"]

    def test_fleet_views_take_one(self, registry):
        registry.segments.create("north", "site=north", actor="ann")
        assert registry.insight.view(since=0.0, where="@north") == []
        with pytest.raises(ConfigError, match="no segment"):
            registry.insight.view(since=0.0, where="@south")


class TestRollouts:
    RULES = RolloutRules(where="@north", stages=(50, 100), soak_s=0.0, min_labelled=0)

    def test_one_that_is_under_way_keeps_its_segment_and_what_it_was(self, registry, checkpoint):
        registry.segments.create("north", "site=north", actor="ann")
        number = registry.push(checkpoint(2), plan=self.RULES, actor="ann")
        plan = registry.rollout(number).plan
        assert (plan.where, plan.segments) == ("(site=north)", ("north",))
        assert registry.segments.show("north").rollouts == [number]
        with pytest.raises(SegmentError, match=f"in use by rollout {number}: wait for its end, or abort it"):
            registry.segments.delete("north", actor="ann")
        registry.abort(number, actor="ann")
        registry.advance()
        registry.advance()
        assert not registry.rollout(number).state.is_active
        registry.segments.delete("north", actor="ann")
        registry.segments.create("north", "site=far-north", actor="ann")
        assert registry.rollout(number).plan.where == "(site=north)"

    def test_two_for_the_same_devices_collide_whatever_they_call_them(self, registry, checkpoint):
        registry.segments.create("north", "site=north", actor="ann")
        registry.push(checkpoint(2), plan=self.RULES, actor="ann")
        with pytest.raises(RolloutError, match="busy"):
            registry.push(checkpoint(3), plan=msgspec.structs.replace(self.RULES, where="name=d0"), actor="ann")

    def test_one_of_what_moves_is_refused_as_the_query_would_be(self, registry, checkpoint):
        registry.segments.create("old", "release=1", actor="ann")
        with pytest.raises(ConfigError, match="release changes while a rollout goes on"):
            registry.push(checkpoint(2), plan=msgspec.structs.replace(self.RULES, where="@old"), actor="ann")


def test_the_command_line(tmp_path):
    def run(*arguments, code=0):
        result = CliRunner().invoke(main, [*arguments, "--home", str(tmp_path)])
        assert result.exit_code == code, result.output
        return result.output

    run("init")
    run("devices", "add", "a", "--out", str(tmp_path / "a.json"))
    run("devices", "label", "a", "site=berlin")
    assert run("segments", "create", "pilot", "site=berlin") == "segment pilot has 1 devices; queries call it @pilot\n"
    assert json.loads(run("segments", "create", "rest", "not @pilot", "--json"))["query"] == "not (site=berlin)"
    assert [record["name"] for record in json.loads(run("segments", "list", "--json"))] == ["pilot", "rest"]
    assert "site=berlin" in run("segments", "show", "pilot")
    assert json.loads(run("devices", "list", "--where", "@pilot", "--json"))[0]["name"] == "a"
    assert "no segment 'x'" in run("devices", "list", "--where", "@x", code=2)
    assert json.loads(run("segments", "delete", "pilot", "--json")) == {"segment": "pilot", "deleted": True}
    assert "there is no segment 'pilot'" in run("segments", "delete", "pilot", code=1)


def test_the_page_makes_and_deletes_them_for_those_who_may(browser, make_browser, token, registry):
    browser.log_in(token("operator", "olga"))
    browser.get("/segments")
    answer = browser.send("/segments", name="north", query="site=north")
    assert (answer.status_code, answer.headers["location"]) == (303, "/segments")
    page = browser.get("/segments").text
    assert 'href="/devices?where=%40north">2<' in page
    assert '<option value="@north">' in browser.get("/devices").text
    assert browser.get("/devices?where=%40north").text.count("</a></th>") == 2
    viewer = make_browser()
    viewer.log_in(token("viewer", "vic"))
    assert "Create" not in viewer.get("/segments").text
    assert viewer.send("/segments/north/delete").status_code == 403
    browser.get("/segments")
    assert browser.send("/segments/north/delete").status_code == 303
    assert registry.segments.all() == []
