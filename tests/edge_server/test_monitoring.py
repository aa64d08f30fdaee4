"""/metrics, /healthz, /readyz and the log."""

import io
import json
import logging
import re
import threading

import pytest

from edge_sdk.errors import StoreError
from edge_server.app import create_app
from edge_server.logs import JsonFormatter
from edge_server.monitoring import Pulse, metrics_text, problems
from edge_server.service import turn_by_turn

LINE = re.compile(r'[a-z_]+(\{([a-z]+="([^"\\\n]|\\["\\n])*",?)*\})? -?[0-9.e+-]+')


def test_metrics_tell_the_fleet_in_the_text_format(get, small_fleet):
    answer = get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = [line for line in answer.text.splitlines() if not line.startswith("#")]
    assert all(LINE.fullmatch(line) for line in samples), samples
    assert 'edge_devices{health="ok",release="1"} 2' in samples
    assert 'edge_devices{health="drift",release="1"} 1' in samples
    assert 'edge_ingest_rows_total{outcome="accepted"} 6' in samples
    assert 'edge_rollouts{status="running"} 1' in samples
    assert 'edge_alerts_firing{severity="critical"} 0' in samples
    assert "edge_broker_connected 1" in samples
    assert "edge_ingest_lag_seconds 1.5" in samples
    named = re.findall(r"# TYPE (\w+) (gauge|counter)", answer.text)
    assert len({name for name, _ in named}) == len(named)


def test_metrics_tell_how_much_room_devices_have(coordinator, make_device, settle, clock):
    devices = [make_device(f"d{number}") for number in range(21)]
    for number, device in enumerate(devices[:20]):
        device.report(disk_free_mb=90 + number, memory_free_mb=500, memory_total_mb=1000)
    devices[20].report()
    settle(devices)
    lines = metrics_text(coordinator.registry, None).splitlines()
    assert 'edge_device_disk_free_bytes{quantile="0"} 90000000' in lines
    assert 'edge_device_disk_free_bytes{quantile="0.5"} 99000000' in lines
    assert 'edge_device_memory_free_bytes{quantile="0.05"} 500000000' in lines
    assert "edge_devices_low_on_disk 10" in lines
    clock.advance(86_401.0)
    assert "disk" not in metrics_text(coordinator.registry, None)


def test_metrics_without_a_coordinator_beside_leave_out_what_only_it_knows(coordinator):
    text = metrics_text(coordinator.registry, None)
    assert "edge_broker_connected" not in text
    assert "edge_devices_online 0" in text


class TestReady:
    @pytest.fixture
    def pulse(self):
        return {"connected": True}

    @pytest.fixture
    def app(self, coordinator, pulse):
        return create_app(coordinator.registry, pulse=lambda: Pulse(connected=pulse["connected"], lag_s=0.0))

    def test_it_is_with_a_database_and_a_broker(self, get):
        assert get("/readyz").json() == {"status": "ok", "problems": []}

    def test_it_is_not_without_the_broker(self, get, pulse):
        pulse["connected"] = False
        answer = get("/readyz")
        assert (answer.status_code, answer.json()["problems"]) == (503, ["there is no connection to the broker"])
        assert get("/healthz").status_code == 200

    def test_it_is_not_when_the_database_cannot_be_written(self, get, coordinator):
        coordinator.registry.store.conn.execute("PRAGMA query_only = ON")
        answer = get("/readyz")
        assert answer.status_code == 503
        assert "cannot be written" in answer.json()["problems"][0]
        assert get("/healthz").status_code == 200

    def test_it_is_not_while_what_devices_send_cannot_be_stored_which_is_logged_once(
        self, coordinator, clock, monkeypatch, caplog
    ):
        stop, step = threading.Event(), coordinator.step
        outcomes = iter([StoreError("no room"), StoreError("no room"), None])
        seen = []

        def turn():
            seen.append((problems(coordinator.registry, coordinator.pulse), metrics(coordinator)))
            error = next(outcomes, stop)
            if error is stop:
                stop.set()
            elif error is not None:
                raise error
            return step()

        def metrics(coordinator):
            return re.findall(
                r"^edge_storing (\d)$", metrics_text(coordinator.registry, coordinator.pulse), re.MULTILINE
            )

        monkeypatch.setattr(coordinator, "step", turn)
        monkeypatch.setattr("edge_server.service._RETRY_S", 0.0)
        coordinator.start()
        with caplog.at_level(logging.INFO):
            turn_by_turn(coordinator, stop)
        failing = ["what devices send cannot be stored: no room"]
        assert [found for found, _ in seen] == [[], failing, failing, []]
        assert [told for _, told in seen] == [["1"], ["0"], ["0"], ["1"]]
        assert [r.levelname for r in caplog.records if "stored" in r.message] == ["ERROR", "INFO"]


def test_log_lines_are_json_with_what_was_given_beside_the_message():
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("edge_server.test")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.info("%s devices\nmore", 3, extra={"rollout": 7})
    logger.error("failed", exc_info=ValueError("broken"))
    logger.removeHandler(handler)
    first, second = map(json.loads, out.getvalue().splitlines())
    assert (first["message"], first["level"], first["rollout"]) == ("3 devices\nmore", "info", 7)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert "ValueError: broken" in second["traceback"]


def test_a_request_is_logged_with_its_status_and_without_its_token(get, token, caplog):
    secret = token("viewer")
    with caplog.at_level(logging.DEBUG, "edge_server.guard"):
        get("/api/v1/fleet", headers={"authorization": f"Bearer {secret}"})
    [record] = [record for record in caplog.records if record.name == "edge_server.guard"]
    assert (record.path, record.status) == ("/api/v1/fleet", 200)
    assert secret not in str(vars(record))
