"""The embedded broker starts, stops, starts again, and stays on this machine."""

import socket
import sys
import tempfile

import psutil
import pytest

from edge_sdk.errors import MissingExtraError, TransportError
from edge_server.broker import EmbeddedBroker


def accepts_connections(host, port):
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def listening_addresses(port):
    return {
        connection.laddr.ip
        for child in psutil.Process().children(recursive=True)
        for connection in child.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }


@pytest.fixture
def own_temp(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_restarts_on_the_port_it_chose(own_temp):
    broker = EmbeddedBroker()
    assert broker.host == "127.0.0.1"
    assert broker.port > 0
    port = broker.port
    for _ in range(3):
        broker.start()
        broker.start()
        assert accepts_connections(broker.host, broker.port)
        broker.stop()
        broker.stop()
        assert broker.port == port
        assert not accepts_connections(broker.host, broker.port)


def test_is_reachable_from_this_machine_only():
    with EmbeddedBroker() as broker:
        assert listening_addresses(broker.port) == {"127.0.0.1"}


def test_configuration_is_private_while_it_runs_and_gone_afterwards(own_temp):
    with EmbeddedBroker(credentials={"edge": 'sec"ret\\'}):
        (folder,) = own_temp.iterdir()
        assert folder.stat().st_mode & 0o077 == 0
        assert "edge" in (folder / "broker.toml").read_text()
    assert list(own_temp.iterdir()) == []


def test_a_taken_port_is_a_typed_error_and_leaves_nothing(own_temp):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        broker = EmbeddedBroker(port=taken.getsockname()[1])
        with pytest.raises(TransportError, match=r"cannot run on 127\.0\.0\.1"):
            broker.start()
    assert list(own_temp.iterdir()) == []

    broker.start()
    broker.stop()


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "iotcore", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edge-sdk\[server\]'"):
        EmbeddedBroker().start()


def test_no_child_is_left_behind():
    before = {child.pid for child in psutil.Process().children()}
    with EmbeddedBroker():
        assert {child.pid for child in psutil.Process().children()} - before
    assert not {child.pid for child in psutil.Process().children()} - before
