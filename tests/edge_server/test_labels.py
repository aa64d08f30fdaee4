"""Label queries: what they read, and that the database answers as the predicate does."""

import json

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import ConfigError
from edge_server.cli import main
from edge_server.errors import DeviceError, UnknownDeviceError
from edge_server.labels import MAX_LABELS, Has, Is, Not, Several, parse, parse_label
from edge_server.registry import Registry
from edge_server.store import Store

BERLIN = {"name": "a", "group": "lab", "hw": "pi4", "sdk": "1.0", "release": "3", "mode": "adapt", "site": "berlin"}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("site=berlin", True),
        ("site = berlin", True),
        ("site!=berlin", False),
        ("site", True),
        ("line", False),
        ("not line", True),
        ("not not site", True),
        ("line!=3", True),
        ("site=berlin and hw!=pi3", True),
        ("site=berlin hw=pi4", True),
        ("site=berlin hw=pi3", False),
        ("site=rome or hw=pi4", True),
        ("site=rome or hw=pi4 and release=4", False),
        ("(site=rome or hw=pi4) and release=3", True),
        ("site in (rome, berlin)", True),
        ("not site in (rome, berlin)", False),
        ("not (site=rome or line)", True),
        ('hw="pi4"', True),
        ('site="new york"', False),
        ("group=lab (mode=adapt)", True),
        ("name in (a,b)", True),
    ],
)
def test_queries_say_what_they_read_like(query, expected):
    assert parse(query).matches(BERLIN) is expected


@pytest.mark.parametrize(
    ("query", "where"),
    [
        ("", "at the end"),
        ("site=", "at the end"),
        ("=berlin", "expected a key at '=berlin'"),
        ("site=berlin and", "at the end"),
        ("site=berlin or or", "expected a key"),
        ("(site=berlin", "expected ')'"),
        ("site=berlin)", "expected 'and', 'or' or the end"),
        ("site in berlin", "expected '('"),
        ("site in (berlin", "expected ')'"),
        ("site;drop table devices", "expected 'and', 'or' or the end"),
        ("3=x", "expected a key"),
        ('site="berlin', "expected a value"),
        ("x=1 " * 300, "at most 1024"),
        ("(" * 100 + "x" + ")" * 100, "nested deeper"),
    ],
)
def test_what_is_no_query_is_refused_with_its_place(query, where):
    with pytest.raises(ConfigError) as told:
        parse(query)
    assert where in str(told.value)


@given(st.text(max_size=60))
def test_no_text_makes_the_parser_fail_otherwise(text):
    try:
        parse(text)
    except ConfigError:
        return


KEYS = st.sampled_from(["site", "line", "hw", "group", "release", "mode"])
VALUES = st.sampled_from(["berlin", "rome", "3", "pi4", "lab", "adapt", ""])
QUERIES = st.recursive(
    st.builds(Has, KEYS) | st.builds(Is, KEYS, st.lists(VALUES, min_size=1, max_size=3).map(tuple)),
    lambda inner: (
        st.builds(Not, inner)
        | st.builds(Several, st.lists(inner, min_size=1, max_size=3).map(tuple), all_of=st.booleans())
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("labels") / "coordinator.db", durable=False)
    with store.transaction():
        for name, site, line, hw, release in [
            ("a", "berlin", None, "pi4", 3), ("b", "rome", "3", "", None), ("c", None, "", "pi3", 3),
            ("d", "berlin", "3", "pi4", None),
        ]:  # fmt: skip
            store.devices.add(name, group="lab" if name < "c" else "plant", credential="x", now=0.0)
            store.execute("UPDATE devices SET hardware = ?, row_release = ? WHERE name = ?", (hw, release, name))
            store.labels.set(name, {key: v for key, v in (("site", site), ("line", line)) if v is not None})
    yield store
    store.close()


@settings(max_examples=200, deadline=None)
@given(QUERIES)
def test_the_database_finds_what_the_predicate_is_true_of(fleet, query):
    expected = [name for name in "abcd" if query.matches(fleet.labels.facts(name))]
    assert fleet.labels.matching(query) == expected


def test_a_query_for_a_value_uses_the_index(fleet):
    condition = parse("site=berlin").to_sql()
    sql = f"EXPLAIN QUERY PLAN SELECT d.name FROM devices d WHERE {condition.text}"
    plan = [row[3] for row in fleet.read(sql, *condition.values)]
    assert any("idx_labels_key_value" in step for step in plan), plan


@pytest.mark.parametrize("text", ["site", "hw=pi4", "and=1", "1=2", "=x", "site=" + "x" * 129, 'site=a"b', "a b=c"])
def test_labels_that_no_query_could_ask_for_are_refused(text):
    with pytest.raises(ConfigError):
        parse_label(text)


@pytest.fixture
def registry(tmp_path):
    opened = Registry(tmp_path)
    for name in ("a", "b"):
        opened.enrol(name, group="lab", out=tmp_path / f"{name}.json", actor="test")
    yield opened
    opened.close()


def test_labels_are_set_replaced_and_taken_away_and_the_audit_says_by_whom(registry):
    registry.label("a", {"site": "rome", "line": "3"}, actor="ann")
    assert registry.label("a", {"site": "berlin", "line": None}, actor="ben") == {"site": "berlin"}
    assert registry.device("a").labels == {"site": "berlin"}
    assert registry.matching("site=berlin") == ["a"]
    assert registry.store.read("SELECT actor FROM audit WHERE action = 'device labelled'") == [("ann",), ("ben",)]


def test_a_device_that_is_unknown_or_has_too_many_labels_gets_none(registry):
    with pytest.raises(UnknownDeviceError):
        registry.label("x", {"site": "rome"}, actor="ann")
    with pytest.raises(DeviceError):
        registry.label("a", {f"k{number}": "v" for number in range(MAX_LABELS + 1)}, actor="ann")
    assert registry.device("a").labels == {}


def test_the_command_line_labels_and_lists(tmp_path):
    def run(*arguments):
        result = CliRunner().invoke(main, [*arguments, "--home", str(tmp_path)])
        assert result.exit_code == 0, result.output
        return result.output

    run("init")
    for name in ("a", "b"):
        run("devices", "add", name, "--out", str(tmp_path / f"{name}.json"))
    assert run("devices", "label", "a", "site=berlin", "line=3") == "a: line=3 site=berlin\n"
    assert "site=berlin" in run("devices", "list")
    listed = json.loads(run("devices", "list", "--where", "site=berlin", "--json"))
    assert [(record["name"], record["labels"]) for record in listed] == [("a", {"line": "3", "site": "berlin"})]
    assert CliRunner().invoke(main, ["devices", "list", "--where", "x=", "--home", str(tmp_path)]).exit_code == 2
