"""docs/scenarios.md says what the code reads, and the scenarios that ship can run."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import msgspec
import numpy as np
import pytest

from demo import factory
from edge_sdk import EdgeDevice, ManualClock, plan, scenario, streams, worlds
from edge_sdk.manifest import MANIFEST_NAME, REQUIRED, FileEntry, LatentSpec, Manifest, TargetSpec
from edge_sdk.schema import InputSpec

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "scenarios.md"
SCENARIOS = sorted((ROOT / "examples" / "scenarios").glob("*.toml"))
SECTIONS = {
    "Top level": scenario.Scenario,
    "[fleet]": scenario.FleetConfig,
    "[data]": worlds.DataConfig,
    "[[drift]] and [[cohort.drift]]": streams.Drift,
    "[[cohort]]": scenario.Cohort,
    "[cohort.label]": scenario.LabelConfig,
    "[cohort.network]": scenario.NetworkConfig,
    "[[cohort.network.outage]]": scenario.OutageConfig,
    "[cohort.battery]": scenario.BatteryConfig,
    "[cohort.clock]": scenario.ClockConfig,
    "[cohort.loss]": scenario.LossConfig,
    "[cohort.poison]": scenario.PoisonConfig,
    "[[release]]": scenario.Release,
    "[expect]": scenario.Expect,
}


def page():
    """What docs/scenarios.md must say."""
    text = PAGE.read_text().split("## ")[0]
    for heading, kind in SECTIONS.items():
        text += f"## {heading}\n\n{inspect.getdoc(kind).splitlines()[0]}\n\n"
        text += "| key | default | meaning |\n|---|---|---|\n" + "".join(keys(kind)) + "\n"
        if kind is worlds.DataConfig:
            text += "| source | what it gives |\n|---|---|\n"
            text += "".join(f"| `{name}` | {gives} |\n" for name, gives in worlds.SOURCES.items()) + "\n"
        if kind is streams.Drift:
            text += effects()
    return text.rstrip() + "\n"


def keys(kind):
    """A line for each key that is a value, or a list of them."""
    source = next(node for node in ast.walk(ast.parse(inspect.getsource(sys.modules[kind.__module__])))
                  if isinstance(node, ast.ClassDef) and node.name == kind.__name__)  # fmt: skip
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    for node, following in zip(source.body, [*source.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or (kind is scenario.Scenario and node.target.id == "file"):
            continue
        name = node.target.id
        if isinstance(hints[name], type) and issubclass(hints[name], msgspec.Struct):
            continue  # has a section of its own
        assert isinstance(following, ast.Expr), f"{kind.__name__}.{name} has no docstring"
        choices = [repr(value) for value in typing.get_args(hints[name]) if isinstance(value, str)]
        said = " / ".join(choices) + ". " if choices and kind is not worlds.DataConfig and name != "effect" else ""
        yield f"| `{name}` | {default(fields[name])} | {said}{' '.join(following.value.value.split())} |\n"


def default(field):
    if field.required:
        return "required"
    if field.default is None:
        return "none"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return f"`{'[]' if value == () else str(value).lower() if isinstance(value, bool) else repr(value)}`"


def effects():
    text = "| effect | kind | what it does; unit of `size` | default `size` | further keys |\n|---|---|---|---|---|\n"
    for name, effect in streams.EFFECTS.items():
        size = "" if effect.size is None else f"{effect.size:g}"
        further = ", ".join(f"`{key}`" for key in effect.keys)
        only = "images" if effect.images else effect.truths
        meaning = effect.meaning + (f" ({only} only)" if only else "")
        text += f"| `{name}` | {effect.kind} | {meaning} | {size} | {further} |\n"
    return text + (
        "\nCovariate: inputs change; prior: how often each label comes; concept: which truth an input has. With an\n"
        "incremental or seasonal course, sizes go from what changes nothing to `size`; `unit`, `stuck`, `dead`,\n"
        "`relation` and the effects on labels know no half measures and come to more and more of the samples. Inputs\n"
        "stay in the range that the data declare. Truths are labels, or numbers where the model predicts numbers.\n\n"
    )


def test_the_page_says_what_the_code_reads():
    assert PAGE.read_text() == page(), "run: python tests/test_scenario_docs.py, then look at the change of the page"


def test_every_section_of_a_scenario_has_a_place_on_the_page():
    def structs(kind, seen):
        for hint in typing.get_type_hints(kind).values():
            for part in (hint, *typing.get_args(hint)):
                if isinstance(part, type) and issubclass(part, msgspec.Struct) and part not in seen:
                    seen.add(part)
                    structs(part, seen)
        return seen

    assert structs(scenario.Scenario, {scenario.Scenario}) == set(SECTIONS.values())


@pytest.fixture
def checkout(tmp_path):
    """The examples beside manifests of the checkpoints that they name."""
    shutil.copytree(ROOT / "examples" / "scenarios", tmp_path / "examples" / "scenarios")
    shapes = {"digits": [1, 8, 8], "basic-motions": [6, 50], "sine": [2], "friedman": [10]}
    labels = {"digits": list("01234567"), "basic-motions": list(worlds.MOTIONS), "sine": ["no", "yes"],
              "friedman": ["y"]}  # fmt: skip
    numbers = {"task": "regression", "targets": [TargetSpec(14.0, 5.0, 2.5)]}
    for source, shape in shapes.items():
        for release in (1, 2, 3):
            folder = tmp_path / "build" / "checkpoints" / source / f"release-{release}"
            folder.mkdir(parents=True)
            manifest = Manifest(
                name=source, release=release, created="2026-01-01T00:00:00Z", labels=labels[source],
                files={name: FileEntry(1, "0" * 64) for name in REQUIRED}, input=InputSpec(shape=shape),
                latent=LatentSpec(dim=4), **(numbers if source == "friedman" else {}),
            )  # fmt: skip
            (folder / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))
    return tmp_path / "examples" / "scenarios"


@pytest.mark.parametrize("name", [path.name for path in SCENARIOS])
def test_scenarios_that_ship_can_be_planned_and_their_data_drawn(checkout, name):
    ready = plan.prepare(checkout / name)
    assert len(ready.devices) == ready.scenario.fleet.devices
    assert ready.scenario.about
    assert ready.scenario.expect != scenario.Expect()  # `make scenarios` holds each to something
    end = ready.scenario.fleet.duration_h * streams.HOUR_S
    for device in ready.devices:
        stream = device.stream(ready.world)
        for time in (0.0, end / 2, end):
            x, y = stream.draw(3, time)
            assert x.shape == (3, *ready.world.spec.shape)
            device.late_labels(ready.world).draw(y, time)


def test_the_scenarios_that_ship_show_every_course_and_every_kind_of_drift():
    text = "".join(path.read_text() for path in SCENARIOS)
    drifts = set(re.findall(r'effect = "(\w+)"', text))
    assert drifts == set(streams.EFFECTS)
    assert set(re.findall(r'course = "(\w+)"', text)) | {"sudden"} == set(typing.get_args(streams.Course))


def test_the_scenario_on_the_page_is_one(checkout):
    (block,) = re.findall(r"(?:^(?:    .*)?\n)+(?=Everything)", PAGE.read_text(), flags=re.MULTILINE)
    path = checkout / "page.toml"
    path.write_text(block.replace("    ", "").replace('"checkpoints', '"../../build/checkpoints'))
    ready = plan.prepare(path)
    assert {device.cohort for device in ready.devices} == {"steady", "tilted"}


def test_the_model_of_the_digits_has_seen_nothing_that_devices_draw():
    """The demo's factory makes the checkpoints of the scenarios; its split is the one of the source."""
    made, world = factory.load(seed=0), worlds.open_world(worlds.DataConfig(source="digits"))
    for theirs, ours in ((made.factory, world.factory), (made.life, world.pool), (made.score, world.score)):
        np.testing.assert_array_equal(theirs.x, ours.x)
        np.testing.assert_array_equal(theirs.y, ours.y)


@pytest.mark.torch
def test_made_checkpoints_answer_what_their_scenario_shows_them(tmp_path):
    """Missing and absurd values included: what is refused would never be counted."""
    script = ROOT / "examples" / "scenarios" / "make_checkpoints.py"
    out = tmp_path / "build" / "checkpoints"
    subprocess.run([sys.executable, script, "basic-motions", "--out", out], check=True, capture_output=True)
    shutil.copytree(script.parent, tmp_path / "examples" / "scenarios")
    ready = plan.prepare(tmp_path / "examples" / "scenarios" / "sensor-faults.toml")
    by_cohort = {device.cohort: device for device in ready.devices}
    right = {}
    with EdgeDevice(tmp_path / "home", checkpoint=Path(ready.scenario.fleet.checkpoint), clock=ManualClock()) as device:
        for cohort, planned in by_cohort.items():
            x, y = planned.stream(ready.world).draw(200, 90 * streams.HOUR_S)
            labels = [prediction.label for prediction in device.predict_batch(x)]
            right[cohort] = np.mean([label == ready.world.labels[i] for label, i in zip(labels, y, strict=True)])
    assert right["sound"] > 0.8
    assert min(right.values()) < 0.8


if __name__ == "__main__":
    PAGE.write_text(page())
