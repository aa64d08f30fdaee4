from pathlib import Path

import pytest

from edge_sdk.errors import ConfigError
from edge_server.plan import RolloutRules
from edge_server.settings import BrokerSettings, Settings, is_loopback, load_settings

SERVER = Path(__file__).parents[2] / "server"


def write(tmp_path, text):
    path = tmp_path / "coordinator.toml"
    path.write_text(text)
    return path


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load_settings(write(tmp_path, "")) == Settings()


def test_the_example_loads_and_shows_the_defaults():
    example = load_settings(SERVER / "coordinator.example.toml")
    assert example.broker == BrokerSettings(embedded=True)
    assert example.rollout == RolloutRules()
    assert example == Settings(broker=BrokerSettings(embedded=True))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prefx = 'edge'", "prefx"),
        ("[broker]\nhots = 'x'", "hots"),
        ("[rollout]\nstages = [10]", "$.rollout"),
        ("[rollout]\nsoak_s = 'long'", "$.rollout.soak_s"),
        ("[broker]\nport = 70000", "port"),
        ("[broker]\nport = 0", "port"),
        ("[broker]\nhost = ''", "host"),
        ("[http]\nhost = '0.0.0.0'", "in the clear"),
        ("[http]\nhost = 'example.org'", "loopback"),
        ("[http]\ncert_file = 'x.crt'", "come together"),
        ("[http]\npublic_url = 'fleet.example.org'", "https://name"),
        ("[http]\npublic_url = 'https://fleet.example.org/path'", "https://name"),
        ("[http]\nlogins_per_minute = 0", "logins_per_minute"),
        ("prefix = 'a/b'", "prefix"),
        ("blocks_per_turn = 0", "blocks_per_turn"),
        ("rollout_interval_s = nan", "rollout_interval_s"),
        ("this is no toml", "cannot be read"),
    ],
)
def test_a_mistake_is_an_error_that_names_file_and_key(tmp_path, text, named):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert str(path) in str(caught.value)
    assert named in str(caught.value)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match="edge-coordinator init"):
        load_settings(tmp_path / "coordinator.toml")


def test_the_embedded_broker_may_take_any_port():
    assert BrokerSettings(embedded=True, port=0).port == 0


@pytest.mark.parametrize(
    ("host", "answer"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("x", False)],
)
def test_loopback_is_told_from_the_rest(host, answer):
    assert is_loopback(host) is answer
