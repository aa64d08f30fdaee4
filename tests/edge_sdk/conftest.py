"""What the command line changes in a process is put back after each test."""

import logging

import pytest


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv("EDGE_HOME", raising=False)
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
