import sys
from pathlib import Path

import pytest

import edge_quantize
from edge_sdk.errors import EdgeError, MissingExtraError


@pytest.mark.torch
def test_every_public_name_resolves_and_is_listed_in_order():
    assert edge_quantize.__all__ == sorted(edge_quantize.__all__)
    assert dir(edge_quantize) == edge_quantize.__all__
    for name in edge_quantize.__all__:
        assert getattr(edge_quantize, name).__module__.startswith("edge_quantize.")


def test_no_public_name_is_hidden_by_a_module_of_the_same_name():
    modules = {path.stem for path in Path(edge_quantize.__file__).parent.glob("*.py")}
    assert not modules & set(edge_quantize.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = edge_quantize.quantise


def test_absent_packages_are_named_with_the_line_that_installs_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "edge_quantize.graph", raising=False)
    monkeypatch.delitem(vars(edge_quantize), "split", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'edge-sdk\[quantize\]'"):
        _ = edge_quantize.split


def test_errors_are_edge_errors():
    for name in ("DataError", "ExportError", "ParityError"):
        assert issubclass(getattr(edge_quantize, name), EdgeError)
