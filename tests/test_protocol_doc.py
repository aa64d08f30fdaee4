"""docs/protocol.md is complete, and its tables and examples are what the code does."""

import ast
import re
import typing
from pathlib import Path
from types import NoneType

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

import edge_sdk
import edge_server
from edge_sdk import messages
from edge_sdk.config import LearnConfig
from edge_sdk.desired import signed_bytes
from edge_sdk.gate import Verdict
from edge_sdk.messages import Need, Topics, block_count, cohort, from_bitmap, from_places, to_bitmap
from edge_sdk.reporter import _TOTALS
from edge_sdk.transport import MemoryBroker, MemoryTransport
from edge_server import rollout

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
DOCUMENT = (ROOT / "docs" / "protocol.md").read_text()
SDK = Path(edge_sdk.__file__).parent
SERVER = Path(edge_server.__file__).parent

STRUCTS = {
    name: value
    for name, value in vars(messages).items()
    if isinstance(value, type) and issubclass(value, msgspec.Struct) and value is not msgspec.Struct
}
CONSTANTS = ("WIRE_VERSION", "MAX_MESSAGE_BYTES", "BLOCK_BYTES", "THRESHOLD_ALL", "DEFAULT_PREFIX")


# ---- reading the document


def section(title):
    """The text under the heading `title`, up to the next heading of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,3}} |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found, f"docs/protocol.md has no section {title!r}"
    return found[2]


def tables(text):
    """Rows of cells of all tables in a text, without headings and rules."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-")]


def code(cell):
    """Everything in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def example(name):
    found = re.search(rf"^```text example={name}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found, f"docs/protocol.md has no example {name!r}"
    return found[1]


def example_bytes(name):
    return bytes.fromhex("".join(line.partition("#")[0] for line in example(name).splitlines()))


def example_values(name):
    return {
        key.strip(): value.strip() for key, _, value in (line.partition("=") for line in example(name).splitlines())
    }


EVENTS = {code(row[0])[0]: row for row in tables(section("7. Events")) if code(row[0])}


# ---- reading the code


class Emits(ast.NodeVisitor):
    """Every event that a module emits, with the keys of its detail.

    An emit call is one of a function named emit or _emit, or of one that passes its own parameter on to it as the
    name. What cannot be read from the source fails the test, so that no event slips by.

    Args:
        path: The module.
        forwarders: Keys of the detail by name of the functions that pass a name on; filled.
    """

    def __init__(self, path, forwarders):
        self.path, self.forwarders = path, forwarders
        self.scopes = []
        self.found = []
        self.visit(ast.parse(path.read_text()))

    def visit_FunctionDef(self, node):
        self.scopes.append(node)
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Call(self, node):
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called in self.forwarders:
            self.found += [(name, self.forwarders[called]) for name in self.names(node.args[0])]
        elif called in ("emit", "_emit"):
            self.take(*node.args)
        self.generic_visit(node)

    def take(self, name, detail=None):
        scope = self.scopes[-1]
        if isinstance(name, ast.Starred):  # made as tuples somewhere in the same function
            pairs = [node.elts for node in ast.walk(scope) if isinstance(node, ast.Tuple) and len(node.elts) == 2]
            pairs = [(first, second) for first, second in pairs if isinstance(second, ast.Dict)]
            assert pairs, self.where(name)
            self.found += [(text, self.keys(second)) for first, second in pairs for text in self.names(first)]
        elif isinstance(name, ast.Name) and name.id in [argument.arg for argument in scope.args.args]:
            self.forwarders[scope.name] = self.keys(detail)
        else:
            self.found += [(text, self.keys(detail)) for text in self.names(name)]

    def names(self, node):
        if isinstance(node, ast.IfExp):
            return self.names(node.body) + self.names(node.orelse)
        if isinstance(node, ast.Name):
            return self.names(self.assigned(node))
        assert isinstance(node, ast.Constant), self.where(node)
        return [node.value]

    def keys(self, node):
        """The keys of a dict, or of the one last assigned to a name before, in the same function."""
        if isinstance(node, ast.Dict):
            found = set()
            for key, value in zip(node.keys, node.values, strict=True):
                found |= self.keys(value) if key is None else {key.value}  # None: **value
            return found
        if isinstance(node, ast.Name):
            return self.keys(self.assigned(node))
        assert ast.unparse(node) == "msgspec.structs.asdict(verdict)", self.where(node)
        return set(Verdict.__struct_fields__)

    def assigned(self, name):
        """What was last assigned to a name before, in the same function."""
        values = [
            node.value
            for node in ast.walk(self.scopes[-1])
            if isinstance(node, ast.Assign)
            and node.lineno < name.lineno
            and any(isinstance(target, ast.Name) and target.id == name.id for target in node.targets)
        ]
        assert values, self.where(name)
        return max(values, key=lambda value: value.lineno)

    def where(self, node):
        return f"{self.path.name}:{node.lineno}: cannot read {ast.unparse(node)}"


def emitted():
    forwarders = {}
    sources = sorted(SDK.rglob("*.py"))
    for path in sources:
        Emits(path, forwarders)  # twice: a forwarder may be called before it is defined
    return [(path.name, *found) for path in sources for found in Emits(path, forwarders).found]


EMITTED = emitted()


def topic_kinds(method):
    """Last levels of the topics that device and coordinator make with `Topics.up` or `Topics.down`."""
    kinds = set()
    for path in [*SDK.rglob("*.py"), *SERVER.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
                kinds |= {
                    n.value for n in ast.walk(node.args[1]) if isinstance(n, ast.Constant) and len(node.args) == 2
                }
    return kinds


def type_name(annotation):
    """A field's type as the document writes it."""
    if annotation is msgspec.Raw:
        return "body"
    names = {bytes: "bin", int: "int", float: "float", str: "str", bool: "bool"}
    if annotation in names:
        return names[annotation]
    if isinstance(annotation, type) and annotation.__name__ in STRUCTS:
        return annotation.__name__
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is list:
        return f"array({type_name(arguments[0])})"
    if typing.get_origin(annotation) is dict:
        return f"map({type_name(arguments[0])}, {type_name(arguments[1])})"
    return " or ".join("nil" if argument is NoneType else type_name(argument) for argument in arguments)


# ---- the tests


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants(name):
    values = {code(row[0])[0]: row[1] for row in tables(DOCUMENT) if code(row[0]) and len(row) == 3}
    assert values[name] == str(getattr(messages, name))


def test_the_title_names_the_wire_version():
    assert DOCUMENT.startswith(f"# Wire protocol, version {messages.WIRE_VERSION}\n")


def test_there_are_messages_to_document():
    assert {"State", "Report", "Event", "Gap", "Envelope", "Ack", "Need", "Desired"} <= set(STRUCTS)


@pytest.mark.parametrize("name", STRUCTS)
def test_every_field_is_documented_in_order_with_its_type_and_meaning(name):
    rows = [row for row in tables(section(name)) if row[0].isdigit()]
    kinds = typing.get_type_hints(STRUCTS[name])
    assert [int(row[0]) for row in rows] == list(range(len(rows)))
    documented = [(code(row[1])[0], code(row[2])[0]) for row in rows]
    assert documented == [(field, type_name(kinds[field])) for field in STRUCTS[name].__struct_fields__]
    for row in rows:
        assert row[3] or row[2] == "`bool`", f"{name}.{row[1]} has no meaning"


@pytest.mark.parametrize("name", STRUCTS)
def test_defaults_are_stated(name):
    rows = {code(row[1])[0]: row[3] for row in tables(section(name)) if row[0].isdigit()}
    for field in msgspec.structs.fields(STRUCTS[name]):
        if not field.required:
            default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
            told = "nil" if default is None else default if default != "" else '""'
            assert f"a reader takes {told} if it is missing" in rows[field.name]


def test_no_section_describes_a_message_that_is_gone():
    headings = re.findall(r"^### (.*)$", DOCUMENT.split("## 4. Messages")[1].split("## 5. ")[0], re.MULTILINE)
    assert sorted(headings) == sorted(STRUCTS)


def test_every_topic_is_documented():
    topics = Topics("P")
    up, down = topic_kinds("up"), topic_kinds("down")
    assert {"report", "event", "need", "state"} <= up
    assert "ack" in down
    made = {topics.up("{device}", kind) for kind in up} | {topics.down("{device}", kind) for kind in down}
    made |= {topics.desired("{group}"), topics.block("{digest}", "{index}"), topics.metadata("{name}"),
             topics.alerts("{sink}")}  # fmt: skip
    documented = {code(row[0])[0] for row in tables(section("2. Topics")) if code(row[0])}
    assert documented == {topic.replace("P/", "{prefix}/", 1) for topic in made}


def test_emitted_events_are_found_in_the_source():
    assert {file for file, _, _ in EMITTED} >= {"adapt.py", "upgrade.py", "monitoring.py", "maintenance.py"}
    assert {name for _, name, _ in EMITTED} >= {*_TOTALS, "would_promote", "rollback_refused", "drift_warning"}


def test_the_documented_events_are_those_that_are_emitted():
    assert set(EVENTS) == {name for _, name, _ in EMITTED}


@pytest.mark.parametrize("name", EVENTS)
def test_the_details_of_an_event_are_documented(name):
    row = EVENTS[name]
    assert len(row) == 4
    assert row[3], "no meaning"
    documented = set(code(row[2]))
    if "`promoted`" in row[2]:
        documented |= set(code(EVENTS["promoted"][2])) - {"to", "parent", "recovered"}
        documented -= {"promoted", "to", "parent"}
    documented -= {"Event", "release"} if name == "promoted" else {"Event"}
    documented -= {"head"} if name != "release_activated" else set()
    written = set().union(*(keys for _, event, keys in EMITTED if event == name))
    assert documented == written


def test_every_rollout_status_is_documented():
    statuses = typing.get_args(rollout.Status)
    assert len(statuses) == 5
    text = section("The coordinator's side")
    diagram = re.search(r"```text\n(.*?)```", text, re.DOTALL)[1]
    rows = {code(row[0])[0] for row in tables(text) if code(row[0])}
    assert sorted(rows) == sorted(statuses)
    for status in statuses:
        assert re.search(rf"\b{status}\b", diagram), status


def test_kinds_of_envelope_and_reasons_of_state_are_documented():
    for word in ("report", "event", "gap"):
        assert f'"{word}"' in section("Envelope")
    for word in ("birth", "stopped", "lost"):
        assert f'"{word}"' in section("State")


@pytest.mark.torch
def test_what_the_privacy_section_keeps_on_the_device_is_in_no_message(make_device, digits, clock):
    broker = MemoryBroker()
    ear = MemoryTransport(broker)
    ear.connect()
    ear.subscribe("#")
    device = make_device(
        transport=MemoryTransport(broker), holdout_share=0.5, learn=LearnConfig(executor="inline", new_labels="ask")
    )
    device.connect()
    x, y = digits.life.x[:400], [str(label) for label in digits.life.y[:400]]
    device.learn(x[:300], y[:300], source="the-operator", slice="the-yard")
    device.accept_label("8")
    device.learn_now()
    for number, (sample, label) in enumerate(zip(x[300:], y[300:], strict=True)):
        device.predict(sample, id=f"the-sample-{number}", slice="the-yard")
        if number % 2:
            device.observe(f"the-sample-{number}", label, source="the-operator")
    device.step()
    device.reward("the-sample-0", 1.0, source="the-clicks")
    device.label_requests(5)
    device.step()
    clock.advance(2 * 86_400)
    device.step()
    device.stop()
    payloads = [message.payload for message in ear.receive()]
    told = b"".join(payloads)
    events = {name for name in EVENTS if name.encode() in told}
    assert {"learn_started", "promoted", "label_asked", "requests_expired"} <= events
    for private in (b"the-yard", b"the-operator", b"the-clicks", b"the-sample", b"holdout"):
        assert private not in told


@pytest.mark.parametrize("name", ["envelope", "ack", "need"])
def test_the_example_is_the_golden_message(name):
    assert example_bytes(name) == (GOLDEN / f"{name}.bin").read_bytes()


def test_the_example_of_a_need_asks_for_what_the_text_says():
    need = messages.decode(example_bytes("need"), Need)
    count = block_count(need.size)
    wanted = re.search(r"The Need for blocks (\d+), (\d+) and (\d+) of a file of (\d+) bytes", DOCUMENT)
    assert need.size == int(wanted[4])
    assert from_bitmap(need.blocks, count) == {int(wanted[i]) for i in (1, 2, 3)}


def test_the_example_of_a_signature():
    values = example_values("signed")
    payload = (GOLDEN / "desired-signed.bin").read_bytes()
    found = messages.decode(payload, messages.Desired).signatures[0]
    data = signed_bytes(payload, prefix="edge", group="default")
    assert (values["key id"], values["signature"]) == (found.key, found.value.hex())
    assert data.startswith(bytes.fromhex(values["begins"]))
    assert data.endswith(bytes.fromhex(values["ends"]))
    assert values["signed"] == f"{len(data)} bytes"
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(values["public key"])).verify(found.value, data)


def test_the_example_of_a_cohort():
    values = example_values("cohort")
    number = cohort(values["salt"], values["device"])
    assert values["cohort"] == str(number)
    assert values["bytes"] == number.to_bytes(4, "big").hex()
    assert f"With a `threshold` of {number + 1} or more" in DOCUMENT


def test_the_example_of_devices_in_a_part():
    values = example_values("devices")
    numbers = [int(number) for number in values["cohorts"].split()]
    assert numbers == sorted(cohort("default-2", name) for name in ("pump-1", "pump-3"))
    assert from_places(bytes.fromhex(values["devices"])) == numbers


def test_the_example_of_a_bitmap():
    values = example_values("bitmap")
    size, count = int(values["size"]), int(values["count"])
    assert count == block_count(size)
    assert int(values["last block"]) == size - (count - 1) * messages.BLOCK_BYTES
    blocks = {int(word) for word in values["asked for"].split()}
    assert values["blocks"] == to_bitmap(blocks, count).hex()
