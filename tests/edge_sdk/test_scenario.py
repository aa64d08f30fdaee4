"""Scenario files: what they say is read as it stands, and whatever is wrong is one error that names file and key."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import ConfigError
from edge_sdk.manifest import MANIFEST_NAME, REQUIRED, FileEntry, LatentSpec, Manifest
from edge_sdk.scenario import Cohort, Expect, Measured, ReleaseOutcome, Scenario, cohort_sizes, load_scenario
from edge_sdk.schema import InputSpec
from edge_sdk.streams import Drift

MINIMAL = """
[fleet]
checkpoint = "one"
devices = 10
duration_h = 100
[data]
source = "sea"
"""


def manifest_only(folder, release, *, shape=(3,), labels=("no", "yes"), **options):
    """A checkpoint as far as a scenario looks at it."""
    files = {name: FileEntry(1, "0" * 64) for name in REQUIRED}
    manifest = Manifest(name="made", release=release, created="2026-01-01T00:00:00Z", labels=list(labels), files=files,
                        input=InputSpec(shape=list(shape)), latent=LatentSpec(dim=4), **options)  # fmt: skip
    folder.mkdir()
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))


@pytest.fixture
def write(tmp_path):
    """Writes a scenario beside checkpoints named one, two and three."""
    for release, name in enumerate(("one", "two", "three"), 1):
        manifest_only(tmp_path / name, release)

    def write_one(text="", base=MINIMAL):
        path = tmp_path / "scenario.toml"
        path.write_text(base + text)
        return path

    return write_one


def test_a_minimal_scenario_has_a_default_for_everything_else(write, tmp_path):
    scenario = load_scenario(write())
    assert scenario.fleet.checkpoint == str(tmp_path / "one")
    assert (scenario.fleet.tick_s, scenario.fleet.predictions_per_h, scenario.fleet.seed) == (300, 60, 0)
    assert scenario.cohort == scenario.drift == scenario.release == ()
    assert scenario.expect == Expect()
    assert scenario.file.endswith("scenario.toml")


def test_a_full_scenario_is_read_as_it_stands(write):
    scenario = load_scenario(
        write("""
        [[drift]]
        effect = "noise"
        at_h = 3
        [[cohort]]
        name = "a"
        share = 0.3
        label = { share = 0.2, delay_h = 1, noise = 0.1, per_day = 5, source = "staff" }
        network = { online_share = 0.5, outage_h = 2, outage = [{ at_h = 5, for_h = 1 }] }
        poison = { share = 0.5, kind = "target", label = "yes" }
        loss = { share = 0.1, from_h = 5, until_h = 90 }
        clock = { skew_s = 30, drift_ppm = 100 }
        [cohort.battery]
        drain_per_h = 0.1
        [[cohort.drift]]
        effect = "relation"
        variant = 2
        course = "gradual"
        at_h = 24
        [cohort.config]
        mode = "adapt"
        learn.learner = "slda"
        [[cohort]]
        name = "b"
        [[release]]
        checkpoint = "two"
        at_h = 10
        bad = true
        [expect]
        min_accuracy = 0.8
        """)
    )
    first, second = scenario.cohort
    assert first.drift == (Drift(effect="relation", variant=2, course="gradual", at_h=24.0),)
    assert (first.label.source, first.network.outage[0].for_h, first.battery.drain_per_h) == ("staff", 1, 0.1)
    assert (first.poison.label, first.loss.until_h, first.clock.skew_s) == ("yes", 90, 30)
    assert second == Cohort(name="b")
    assert scenario.release[0].bad
    assert msgspec.json.decode(msgspec.json.encode(scenario), type=Scenario) == scenario


COHORTS = '[[cohort]]\nname = "a"\n{}\n[[cohort]]\nname = "b"\n{}\n'
DRIFT = '[[drift]]\neffect = "noise"\n[[cohort]]\nname = "a"\n[[cohort.drift]]\n'


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        # unknown and misspelt keys
        ("[flet]\ndevices = 3", "flet", "unknown key; did you mean 'fleet'?"),
        ("file = 'x'", "data.file", "unknown key"),
        ("[[cohort]]\nname = 'a'\nlabel = { sahre = 0.1 }", "cohort[0].label.sahre", "did you mean 'share'"),
        (DRIFT + "effect = 'noise'\nat = 3", "cohort[0].drift[0].at", "did you mean 'at_h'"),
        ("[[cohort]]\nname = 'a'\nbattery = { volts = 3 }", "cohort[0].battery.volts", "there is start, drain_per_h"),
        ("[config]\nlearn.leaner = 'slda'", "config.learn.leaner", "did you mean 'learner'"),
        ("[[cohort]]\nname = 'a'\nconfig = { gate = { alhpa = 0.1 } }", "cohort[0].config.gate.alhpa", "'alpha'"),
        # impossible values
        (DRIFT + "effect = 'nose'", "cohort[0].drift[0].effect", "did you mean 'noise'? It is one of 'rotation'"),
        (DRIFT + "effect = 'noise'\ncourse = 'often'", "cohort[0].drift[0].course", "'sudden', 'gradual'"),
        (DRIFT + "effect = 'labels'\nlabels = { a = 1.2 }", "cohort[0].drift[0].labels", "<= 1.0"),
        (DRIFT + "effect = 'swap'", "cohort[0].drift[0]", "needs `cycle`"),
        (DRIFT + "effect = 'noise'\nat_h = 'noon'", "cohort[0].drift[0].at_h", "expected float, got str"),
        ("[[cohort]]\nshare = 0.2", "cohort[0].name", "missing"),
        ("[[cohort]]\nname = 'a b'", "cohort[0].name", "regex"),
        ("[[cohort]]\nname = 'a'\nshare = 1.5", "cohort[0].share", "<= 1.0"),
        ("[[cohort]]\nname = 'a'\nlabel = { noise = -1 }", "cohort[0].label.noise", ">= 0.0"),
        ("[[cohort]]\nname = 'a'\npoison = { kind = 'target' }", "cohort[0].poison", "needs label"),
        ("[[cohort]]\nname = 'a'\nbattery = { plug_from_h = 6 }", "cohort[0].battery", "must differ"),
        ("[config]\ngate.alpha = 7", "config.gate.alpha", "< 1.0"),
        ("[config]\nresources.quiet_hours = ['x']", "config", "resources.quiet_hours"),
        ("[expect]\nmin_accuracy = nan", "expect.min_accuracy", "no number"),
        ("[[cohort]]\nname = 'a'\nloss = { from_h = inf }", "cohort[0].loss.from_h", "no number"),
        # what the simulation itself decides
        ("[config]\ndevice = 'x'", "config.device", "made by the simulation"),
        ("[[cohort]]\nname = 'a'\nconfig = { seed = 3 }", "cohort[0].config.seed", "made by the simulation"),
        # impossible shares
        (COHORTS.format("share = 0.5", "share = 0.4"), "cohort", "make 9 of 10 devices"),
        (COHORTS.format("share = 0.5", "share = 0.6"), "cohort", "make 11 of 10 devices"),
        (COHORTS.format("count = 7", "count = 4"), "cohort", "make 11 of 10 devices (fleet.devices); lower them"),
        (COHORTS.format("", ""), "cohort[1].share", "only one cohort may have the rest"),
        (COHORTS.format("share = 1.0", ""), "cohort[1].share", "of 10 devices it has none"),
        (COHORTS.format("share = 0.001", ""), "cohort[0].share", "of 10 devices it has none"),
        (COHORTS.format("share = 0.5\ncount = 5", ""), "cohort[0].count", "share is there as well"),
        ("[[cohort]]\nname = 'a'\ncount = 4\n" * 2, "cohort[1].name", "the name of another cohort"),
        # what never happens
        ("[[drift]]\neffect = 'noise'\nat_h = 100", "drift[0].at_h", "not before the end: fleet.duration_h is 100"),
        (DRIFT + "effect = 'noise'\nat_h = 200", "cohort[0].drift[0].at_h", "not before the end"),
        ("[[release]]\ncheckpoint = 'two'\nat_h = 100", "release[0].at_h", "not before the end"),
        ("[expect]\nmin_accuracy_from_h = 100", "expect.min_accuracy_from_h", "not before the end"),
        ("[expect]\nmax_error_from_h = 100", "expect.max_error_from_h", "not before the end"),
        ("[[cohort]]\nname = 'a'\nnetwork.outage = [{ at_h = 100, for_h = 1 }]", "cohort[0].network.outage[0].at_h",
         "not before the end"),
        ("[[cohort]]\nname = 'a'\nloss = { from_h = 9, until_h = 8 }", "cohort[0].loss.until_h", "between from_h (9)"),
        # missing files
        ("[[release]]\ncheckpoint = 'four'\nat_h = 1", "release[0].checkpoint", "no checkpoint in"),
        ("[[release]]\ncheckpoint = 'one'\nat_h = 1", "release[0].checkpoint", "not newer than release 1"),
        ("[[release]]\ncheckpoint = 'two'\nat_h = 1\ngroup = 'x'", "release[0].group", "there is 'default'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_error_with_file_key_and_what_to_do(write, text, key, says):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_scenario(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {key}: ")
    assert says.replace("`", "") in message.replace("`", "")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("[data]\nsource = 'sea'", "fleet: missing"),
        ("[fleet]\ncheckpoint = 'one'", "data: missing"),
        ("[fleet]\n[data]\nsource = 'sea'", "fleet.checkpoint: missing"),
        (MINIMAL.replace("one", "none"), "fleet.checkpoint: no checkpoint in"),
        (MINIMAL.replace("sea", "see"), "data.source: 'see' is none of them; did you mean 'sea'?"),
        (MINIMAL.replace("devices = 10", "devices = 0"), "fleet.devices: expected int >= 1"),
        (MINIMAL.replace("devices = 10", "settings = 'device.toml'"), "fleet.settings: "),
        (MINIMAL.replace("devices = 10", "tick_s = 1e9"), "fleet.tick_s: "),
        ("[fleet", "not TOML"),
    ],
)
def test_a_scenario_without_its_fleet_or_data_is_refused(write, base, says):
    path = write(base=base)
    with pytest.raises(ConfigError) as caught:
        load_scenario(path)
    assert str(caught.value).startswith(f"{path}: {says}")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: No such file"):
        load_scenario(tmp_path / "nowhere.toml")


def test_a_damaged_checkpoint_is_named(write, tmp_path):
    (tmp_path / "one" / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"fleet\.checkpoint: .*manifest\.json is damaged"):
        load_scenario(write())


# ---- how many devices


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(6, 200), st.booleans())
def test_cohorts_always_make_the_whole_fleet(parts, devices, with_rest):
    cohorts = [Cohort(name=f"c{i}", share=part / (sum(parts) + with_rest)) for i, part in enumerate(parts)]
    cohorts += [Cohort(name="rest")] if with_rest else []
    scenario = msgspec.convert({"fleet": {"checkpoint": "x", "devices": devices}, "data": {"source": "sea"}}, Scenario)
    scenario = msgspec.structs.replace(scenario, cohort=tuple(cohorts), file="made")
    try:
        sizes = cohort_sizes(scenario)
    except ConfigError as error:
        assert "it has none" in str(error)  # noqa: PT017 - a small cohort of a small fleet
        return
    assert sum(sizes) == devices
    for cohort, size in zip(cohorts, sizes, strict=True):
        assert cohort.share is None or abs(size - cohort.share * devices) <= 1 + 1e-6


def test_counts_and_shares_may_be_mixed_and_one_cohort_has_the_rest(write):
    text = COHORTS.format("count = 3", "share = 0.25") + '[[cohort]]\nname = "c"\n'
    assert cohort_sizes(load_scenario(write(text))) == [3, 2, 5]


# ---- expectations


def test_what_was_expected_and_came_out_is_no_failure():
    expect = Expect(min_accuracy=0.8, max_false_alarms_per_device_day=0.2, max_bytes_per_device_day=1e5,
                    good_releases_complete=True)  # fmt: skip
    releases = (ReleaseOutcome("2", False, "completed"), ReleaseOutcome("3", True, "rolled_back"))
    found = Measured(accuracy=0.8, false_alarms_per_device_day=0.2, bytes_per_device_day=1e5, releases=releases)
    assert expect.unmet(found) == []
    assert Expect().unmet(Measured()) == []


@pytest.mark.parametrize(
    ("expect", "found", "key"),
    [
        (Expect(min_accuracy=0.8), Measured(accuracy=0.79), "min_accuracy"),
        (Expect(min_accuracy=0.8), Measured(), "min_accuracy"),
        (Expect(max_error=0.3), Measured(error=0.31), "max_error"),
        (Expect(max_error=0.3), Measured(), "max_error"),
        (Expect(max_false_alarms_per_device_day=0.1), Measured(false_alarms_per_device_day=0.2), "max_false_alarms"),
        (Expect(max_bytes_per_device_day=10), Measured(bytes_per_device_day=None), "max_bytes"),
        (Expect(), Measured(releases=(ReleaseOutcome("3", True, "completed"),)), "bad_releases_stop"),
        (Expect(), Measured(releases=(ReleaseOutcome("3", True, "running"),)), "bad_releases_stop"),
        (Expect(good_releases_complete=True), Measured(releases=(ReleaseOutcome("2", False, "rolled_back"),)), "good_"),
    ],
)
def test_what_was_expected_and_did_not_come_out_is_told_by_its_key(expect, found, key):
    (line,) = expect.unmet(found)
    assert line.startswith(f"expect.{key}")


def test_expectations_can_be_waived():
    bad = Measured(releases=(ReleaseOutcome("3", True, "completed"), ReleaseOutcome("2", False, "rolled_back")))
    assert Expect(bad_releases_stop=False).unmet(bad) == []


def test_settings_of_a_real_device_are_taken_but_for_what_is_its_own(write, tmp_path):
    (tmp_path / "device.toml").write_text(
        'device = "kitchen"\nmode = "adapt"\nvariant = "fp32"\n[broker]\nhost = "x"\n[learn]\nlearner = "slda"\n'
    )
    load_scenario(write(base=MINIMAL.replace("devices = 10", 'settings = "device.toml"')))
    (tmp_path / "device.toml").write_text('moed = "adapt"\n')
    with pytest.raises(ConfigError, match=r"fleet\.settings\.moed: unknown key; did you mean 'mode'"):
        load_scenario(write(base=MINIMAL.replace("devices = 10", 'settings = "device.toml"')))
