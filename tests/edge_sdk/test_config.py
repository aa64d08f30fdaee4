"""A setting is right, or the message names file and key."""

import msgspec
import pytest

from edge_sdk.config import DeviceConfig, load_config
from edge_sdk.errors import ConfigError

OUT_OF_BOUNDS = [
    ("", "mode", '"trusted"'),
    ("", "variant", '"fp16"'),
    ("", "flush_interval_s", "0"),
    ("", "durability", '"none"'),
    ("", "seed", '"seven"'),
    ("broker", "port", "0"),
    ("broker", "port", "65536"),
    ("broker", "keepalive_s", "0"),
    ("join", "max_bytes", "0"),
    ("join", "window_s", "0.0"),
    ("join", "max_pending", "0"),
    ("join", "max_pending_bytes", "0"),
    ("drift", "alarms_per_day", "0"),
    ("drift", "rows_per_day", "-1"),
    ("drift", "block_rows", "0"),
    ("drift", "rereference_rows", "199"),
    ("", "holdout_share", "1.1"),
    ("join", "log_fraction", "0"),
    ("join", "log_fraction", "1.1"),
    ("replay", "kind", '"ring"'),
    ("replay", "max_bytes", "-1"),
    ("replay", "factory_rows", "-1"),
    ("replay", "judge_share", "1.1"),
    ("replay", "retain_days", "-1"),
    ("learn", "executor", '"thread"'),
    ("learn", "learner", "7"),
    ("learn", "learning_rate", "0"),
    ("learn", "momentum", "1.0"),
    ("learn", "anchor_rows", "-1"),
    ("learn", "ewc_lambda", "-0.1"),
    ("learn", "consolidation", '"never"'),
    ("learn", "decay", "1.1"),
    ("learn", "new_per_batch", "0"),
    ("learn", "replayed_per_batch", "-1"),
    ("learn", "passes", "0"),
    ("learn", "balanced_passes", "-1"),
    ("learn", "loss", '"absolute"'),
    ("learn", "huber_delta", "0"),
    ("learn", "label_smoothing", "1.0"),
    ("learn", "filter_share", "0.6"),
    ("learn", "window", '"sliding"'),
    ("learn", "window_rows", "0"),
    ("learn", "max_rows", "0"),
    ("learn", "scratch_every", "-1"),
    ("learn", "max_labels", "1"),
    ("learn", "new_labels", '"maybe"'),
    ("learn", "max_seconds", "0"),
    ("feedback", "sources", "{ operator = 1.5 }"),
    ("feedback", "default_weight", "-0.1"),
    ("feedback", "max_per_source_hour", "-1"),
    ("feedback", "requests_per_day", "-1"),
    ("feedback", "request_ttl_s", "0"),
    ("policy", "triggers", '[["boredom"]]'),
    ("policy", "min_fresh_rows", "0"),
    ("policy", "volume_rows", "0"),
    ("policy", "accuracy_target", "1.01"),
    ("policy", "calibration_target", "1.01"),
    ("policy", "schedule_s", "-1"),
    ("policy", "cooldown_s", "-1"),
    ("resources", "min_battery", "-0.1"),
    ("resources", "require_mains", "1"),
    ("resources", "max_temperature_c", "0"),
    ("resources", "min_free_mb", "-1"),
    ("resources", "max_cpu_load", "-1"),
    ("resources", "quiet_hours", '"22:00-06:00"'),
    ("resources", "seconds_per_day", "-1"),
    ("resources", "joules_per_day", "-1"),
    ("resources", "watts", "0"),
    ("resources", "flash_bytes_per_day", "-1"),
    ("gate", "alpha", "0"),
    ("gate", "alpha", "1"),
    ("gate", "class_margin", "1.5"),
    ("gate", "slice_margin", "1.5"),
    ("gate", "factory_margin", "-0.5"),
    ("gate", "calibration_margin", "-0.5"),
    ("gate", "max_latency_ratio", "0.9"),
    ("gate", "max_boots", "0"),
    ("gate", "min_class_rows", "0"),
    ("gate", "max_wait_s", "0"),
    ("gate", "probation_rows", "0"),
    ("gate", "probation_s", "0"),
    ("report", "interval_s", "0"),
    ("report", "min_count", "0"),
    ("report", "outbox_rows", "0"),
    ("report", "outbox_bytes", "0"),
    ("report", "resend_s", "0"),
    ("update", "window_blocks", "0"),
    ("update", "retry_s", "0"),
    ("update", "max_bytes", "0"),
    ("update", "min_free_bytes", "-1"),
    ("update", "probation_rows", "0"),
    ("update", "probation_s", "0"),
    ("update", "max_accuracy_drop", "1.1"),
    ("update", "max_boots", "0"),
]
SECTIONS = [field.name for field in msgspec.structs.fields(DeviceConfig) if isinstance(field.default, msgspec.Struct)]


@pytest.fixture
def load(tmp_path):
    def load_text(text):
        path = tmp_path / "device.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(path)

    return load_text


def toml(config):
    """Every setting, written out."""
    lines, tables = [], []
    for key, value in msgspec.to_builtins(config).items():
        if isinstance(value, dict):
            tables += [f"[{key}]", *(f"{name} = {msgspec.json.encode(item).decode()}" for name, item in value.items())]
        else:
            lines.append(f"{key} = {msgspec.json.encode(value).decode()}")
    return "\n".join(lines + tables)


def test_an_empty_file_gives_the_defaults(load):
    assert load("") == DeviceConfig()


def test_all_defaults_survive_being_written_and_read(load):
    assert load(toml(DeviceConfig())) == DeviceConfig()


def test_what_is_set_is_taken_and_the_rest_keeps_its_default(load):
    config = load('device = "pump-1"\nmode = "adapt"\n[broker]\nhost = "broker"\nport = 8883\n[gate]\nalpha = 0.01\n')
    assert (config.device, config.mode, config.broker.host, config.broker.port) == ("pump-1", "adapt", "broker", 8883)
    assert config.gate == msgspec.structs.replace(DeviceConfig().gate, alpha=0.01)
    assert config.learn == DeviceConfig().learn


@pytest.mark.parametrize(("section", "key", "value"), OUT_OF_BOUNDS)
def test_a_value_out_of_bounds_is_refused_and_file_and_key_are_named(load, tmp_path, section, key, value):
    with pytest.raises(ConfigError) as caught:
        load((f"[{section}]\n" if section else "") + f"{key} = {value}")
    assert str(tmp_path / "device.toml") in str(caught.value)
    assert f"$.{section}.{key}".replace("..", ".") in str(caught.value)


def test_every_section_has_bounds_that_are_tested():
    assert {section for section, _, _ in OUT_OF_BOUNDS} == {"", *SECTIONS}


@pytest.mark.parametrize("section", ["", *SECTIONS])
def test_a_typo_is_refused_and_file_and_key_are_named(load, tmp_path, section):
    with pytest.raises(ConfigError, match="hots") as caught:
        load((f"[{section}]\n" if section else "") + 'hots = "broker"')
    assert str(tmp_path / "device.toml") in str(caught.value)
    assert section in str(caught.value)


def test_an_unknown_section_is_refused_and_named(load):
    with pytest.raises(ConfigError, match="lern"):
        load("[lern]\npasses = 3")


def test_a_section_that_is_not_a_table_is_refused(load):
    with pytest.raises(ConfigError, match=r"\$\.gate"):
        load("gate = 3")


@pytest.mark.parametrize("text", ["device = pump", "[broker", b"\xff\xfe\x00", "device = 'a'\ndevice = 'b'"])
def test_what_is_not_toml_is_refused_and_the_file_named(load, text):
    with pytest.raises(ConfigError, match=r"device\.toml"):
        load(text)


def test_a_missing_file_is_refused_and_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: No such file"):
        load_config(tmp_path / "nowhere.toml")


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(AttributeError):
        DeviceConfig().mode = "adapt"
