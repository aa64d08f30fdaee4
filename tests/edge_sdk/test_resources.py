"""What the machine tells: nothing is made up, and a board that fails to tell stops nothing."""

import logging
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from edge_sdk.clock import ManualClock
from edge_sdk.policy import ResourceState
from edge_sdk.resources import FixedReader, PsutilReader, SafeReader, local_minute


class Battery(NamedTuple):
    percent: float
    power_plugged: bool


class Sensor(NamedTuple):
    current: float


@pytest.fixture
def utc(monkeypatch):
    """The local time zone; put back afterwards."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_a_fixed_reader_tells_what_it_was_given():
    state = ResourceState(battery=0.5)
    assert FixedReader(state, rss_mb=12.0).read() is state
    assert FixedReader(state, rss_mb=12.0).rss_mb() == 12.0
    assert FixedReader().read() == ResourceState()


def test_this_machine_tells_memory_and_load():
    reader = PsutilReader()
    assert reader.rss_mb() > 1
    state = reader.read()
    assert 0 < state.free_mb < state.total_mb
    assert reader.disk_free_mb(Path("/")) == pytest.approx(shutil.disk_usage("/").free / 1e6, rel=0.1)
    assert state.cpu_load >= 0
    assert state.cores == os.cpu_count()


def test_battery_the_hottest_sensor_and_the_load_of_each_core_are_told(monkeypatch):
    monkeypatch.setattr(psutil, "sensors_battery", lambda: Battery(42, power_plugged=False))
    sensors = {"cpu": [Sensor(50.0), Sensor(61.5)], "disk": [Sensor(40.0)], "none": []}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (3.0, 9.0, 9.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    state = PsutilReader().read()
    assert (state.battery, state.on_mains, state.temperature_c) == (0.42, False, 61.5)
    assert (state.cpu_load, state.cores) == (0.75, 4)


@pytest.mark.parametrize("error", [OSError("no such sensor"), PermissionError(), AttributeError("sensors_battery")])
def test_what_the_platform_does_not_tell_is_unknown(monkeypatch, error):
    def fail():
        raise error

    for name in ("sensors_battery", "sensors_temperatures", "virtual_memory", "getloadavg"):
        monkeypatch.setattr(psutil, name, fail)
    assert PsutilReader().read() == ResourceState(cores=os.cpu_count())


def test_a_machine_without_battery_and_sensors_is_no_failure(monkeypatch):
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None)
    monkeypatch.setattr(psutil, "sensors_temperatures", dict)
    state = PsutilReader().read()
    assert (state.battery, state.on_mains, state.temperature_c) == (None, None, None)


class Broken:
    def read(self):
        raise ZeroDivisionError("the board's own driver")

    def rss_mb(self):
        raise RuntimeError("neither")

    def disk_free_mb(self, folder):
        raise OSError(f"{folder} was taken away")


def test_room_on_the_disk_is_unknown_where_a_board_of_ones_own_does_not_tell():
    class Board:
        def read(self):
            return ResourceState()

    assert SafeReader(Board(), ManualClock()).disk_free_mb(Path("/")) is None
    assert SafeReader(FixedReader(disk_free_mb=7.5), ManualClock()).disk_free_mb(Path("/")) == 7.5


def test_a_reader_that_raises_is_logged_once_and_all_but_the_time_is_unknown(utc, caplog):
    reader = SafeReader(Broken(), ManualClock(3_600.0))
    with caplog.at_level(logging.ERROR, logger="edge_sdk.resources"):
        for _ in range(3):
            assert reader.read() == ResourceState(local_minute=60)
            assert reader.rss_mb() == 0.0
            assert reader.disk_free_mb(Path("/")) is None
    assert [record.getMessage() for record in caplog.records] == ["Broken failed; what it reads counts as unknown"]


def test_the_time_of_day_follows_the_devices_clock_unless_the_reader_tells_it(utc):
    clock = ManualClock(86_400.0 * 20_000)
    reader = SafeReader(FixedReader(ResourceState(free_mb=5.0), rss_mb=3.0), clock)
    assert reader.read() == ResourceState(free_mb=5.0, local_minute=0)
    clock.advance(90 * 60)
    assert reader.read().local_minute == 90
    assert reader.rss_mb() == 3.0
    assert SafeReader(FixedReader(ResourceState(local_minute=7)), clock).read().local_minute == 7


def test_the_time_of_day_is_local(utc, monkeypatch):
    assert local_minute(86_399.0) == 1_439
    monkeypatch.setenv("TZ", "XYZ-5:30")
    time.tzset()
    assert local_minute(0.0) == 330
