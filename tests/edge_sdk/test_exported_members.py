import pytest

import edge_sdk


def test_every_public_name_resolves_and_is_listed_in_order():
    assert edge_sdk.__all__ == sorted(edge_sdk.__all__)
    assert dir(edge_sdk) == edge_sdk.__all__
    for name in edge_sdk.__all__:
        assert getattr(edge_sdk, name) is not None


def test_a_public_name_comes_from_the_package_itself():
    for name in set(edge_sdk.__all__) - {"Mode", "__version__"}:  # a type alias and a string have no home
        assert getattr(edge_sdk, name).__module__.startswith("edge_sdk.")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'EdgeDevise'"):
        _ = edge_sdk.EdgeDevise
