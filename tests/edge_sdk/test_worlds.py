"""Worlds: every source gives parts that share no sample, the same each time, and says what is wrong with a file."""

import gzip
import sys
import typing
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from edge_sdk import worlds
from edge_sdk.errors import ConfigError, MissingExtraError
from edge_sdk.schema import Column, InputSpec
from edge_sdk.worlds import SOURCES, DataConfig, open_world

GENERATED = {"sea": 4, "stagger": 3, "sine": 4, "mixed": 2, "led": 0, "random-rbf": 0, "waveform": 0}
"""And how many relations each has; Agrawal's ten take seconds."""


def opened(**options):
    return open_world(DataConfig(**options))


def check(world):
    """What is true of every world."""
    parts = (world.factory, world.pool, world.score)
    for pool in parts:
        assert pool.x.dtype == np.float32
        assert pool.y.dtype == np.int64
        assert pool.x.shape == (len(pool.y), *world.spec.shape)
        assert pool.y.min() >= 0
        assert pool.y.max() < len(world.labels)
        world.spec.check_batch(pool.x)
    assert len(world.sensors) in (0, world.spec.shape[world.axis])


def test_the_table_of_sources_holds_every_source():
    assert list(SOURCES) == list(typing.get_args(worlds.Source))


@pytest.mark.parametrize("source", GENERATED)
def test_generated_worlds_are_the_same_each_time_and_know_their_relations(source):
    world = opened(source=source, rows=400)
    check(world)
    again, other = opened(source=source, rows=400), opened(source=source, rows=400, split_seed=1)
    assert again.pool.x.tobytes() == world.pool.x.tobytes() != other.pool.x.tobytes()
    assert len(world.pool.others) == GENERATED[source]
    if world.pool.others:
        np.testing.assert_array_equal(world.pool.others[0], world.pool.y)
        assert (world.pool.others[1] != world.pool.y).any()


def test_another_relation_may_hold_from_the_start():
    first, second = opened(source="sea", rows=200), opened(source="sea", rows=200, variant=2)
    np.testing.assert_array_equal(first.pool.x, second.pool.x)
    np.testing.assert_array_equal(first.pool.others[2], second.pool.y)


def test_sea_is_what_its_paper_says():
    pool = opened(source="sea", rows=500).pool
    for relation, threshold in enumerate((8, 9, 7, 9.5)):
        np.testing.assert_array_equal(pool.x[:, :2].sum(1) > threshold, pool.others[relation] == 1)


def test_friedman_is_what_its_paper_says_and_has_the_same_samples_under_every_relation():
    world = opened(source="friedman", rows=2_000)
    pool, x = world.pool, world.pool.x.astype(float)
    assert (world.targets, world.labels, len(pool.others)) == (("y",), (), 4)
    said = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    errors = [(other[:, 0] - said).std() for other in pool.others]
    assert errors[0] == pytest.approx(1, abs=0.1)
    assert min(errors[1:3]) > 3
    corner = (x[:, 1] < 0.3) & (x[:, 2] < 0.3) | (x[:, 1] > 0.7) & (x[:, 2] > 0.7)
    np.testing.assert_allclose(pool.others[3][~corner], pool.y[~corner])
    assert np.abs(pool.others[3][corner] - pool.y[corner]).mean() > 2
    np.testing.assert_array_equal(opened(source="friedman", rows=2_000, variant=2).pool.y, pool.others[2])


def test_digits_come_in_three_parts_that_share_none():
    world = opened(source="digits")
    check(world)
    parts = [{image.tobytes() for image in pool.x} for pool in (world.factory, world.pool, world.score)]
    assert all(a.isdisjoint(b) for a, b in combinations(parts, 2))
    assert [len(pool.y) for pool in (world.factory, world.pool, world.score)] == [808, 629, 360]


def test_the_parts_are_as_large_as_the_file_says():
    world = opened(source="digits", factory_share=0.0, score_share=0.5, rows=1_000)
    assert [len(pool.y) for pool in (world.factory, world.pool, world.score)] == [0, 500, 500]


def test_motions_of_one_recording_stay_in_one_part():
    world = opened(source="basic-motions")
    check(world)
    assert world.sensors[0] == "accel_x"
    seen = [
        {row.tobytes() for window in pool.x for row in window.T} for pool in (world.factory, world.pool, world.score)
    ]
    assert all(a.isdisjoint(b) for a, b in combinations(seen, 2))


@pytest.fixture
def clothes(tmp_path, rng):
    """Fashion-MNIST's four files, with few images in them."""
    for name, count in (("train", 60), ("t10k", 20)):
        images, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return tmp_path


def test_fashion_mnist_is_read_by_path_and_scored_on_its_test_images(clothes):
    world = opened(source="fashion-mnist", path=str(clothes))
    check(world)
    assert [len(pool.y) for pool in (world.factory, world.pool, world.score)] == [33, 27, 20]
    assert world.score.x.max() == 1


def test_fewer_clothes_are_kept_if_so_wished(clothes):
    world = opened(source="fashion-mnist", path=str(clothes), rows=50)
    assert [len(pool.y) for pool in (world.factory, world.pool, world.score)] == [22, 18, 10]


@pytest.mark.parametrize(
    "damage", [b"", b"no gzip", gzip.compress(b"\0\0\x08\x03\0\0\0\x01")], ids=["empty", "plain", "cut off"]
)
def test_damaged_clothes_are_refused_by_name(clothes, damage):
    (clothes / "train-images-idx3-ubyte.gz").write_bytes(damage)
    with pytest.raises(ConfigError, match=r"^data.path: .*train-images.* damaged"):
        opened(source="fashion-mnist", path=str(clothes))


# ---- tables


def write(path, columns):
    if path.suffix == ".parquet":
        parquet.write_table(pa.table(columns), path)
    else:
        lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def columns(rng):
    return {
        "t": rng.normal(0, 1, 40).round(3).tolist(),
        "what": ["on", "off"] * 20,
        "u": list(range(40)),
        "site": ["north", "south", "east", "west"] * 10,
    }


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_of_ones_own_is_a_world(tmp_path, columns, ending):
    path = write(tmp_path / f"mine.{ending}", columns)
    world = opened(source="table", path=path, label_column="what", columns=("u", "t"))
    check(world)
    assert world.labels == ("off", "on")
    assert world.sensors == ("u", "t")
    everything = np.concatenate([pool.x[:, 0] for pool in (world.factory, world.pool, world.score)])
    assert sorted(everything) == list(range(40))
    np.testing.assert_array_equal(world.pool.y, world.pool.x[:, 0] % 2 == 0)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_may_hold_numbers_to_predict(tmp_path, columns, ending):
    path = write(tmp_path / f"mine.{ending}", {**columns, "w": [2 * cell for cell in columns["t"]]})
    world = opened(source="table", path=path, target_columns=("u", "w"), columns=("t",))
    assert (world.targets, world.labels, world.sensors) == (("u", "w"), (), ("t",))
    every = np.concatenate([pool.y for pool in (world.factory, world.pool, world.score)])
    assert sorted(every[:, 0]) == list(range(40))
    np.testing.assert_allclose(world.pool.y[:, 1], 2 * world.pool.x[:, 0], rtol=1e-6)
    np.testing.assert_allclose(world.spreads, world.pool.y.std(axis=0))
    assert world.truths(world.pool.y[:1]) == world.pool.y[:1].tolist()


def test_a_number_that_is_none_is_named_with_its_row(tmp_path):
    for cell in ("high", "nan", "inf"):
        (tmp_path / "mine.csv").write_text(f"t,y\n1,2.5\n2,{cell}\n")
        with pytest.raises(ConfigError, match=f"data.target_columns: mine.csv, row 1: 'y' is '{cell}'"):
            opened(source="table", path=str(tmp_path / "mine.csv"), target_columns=("y",))


def test_the_model_says_how_a_table_becomes_numbers(tmp_path, columns):
    path = write(tmp_path / "mine.csv", columns)
    kinds = [Column(name="site", kind="category", values=["east", "north", "south", "west"]), Column(name="t")]
    world = open_world(
        DataConfig(source="table", path=path, label_column="what"), spec=InputSpec(shape=[2], columns=kinds)
    )
    assert set(world.pool.x[:, 0]) <= {0, 1, 2, 3}
    assert world.sensors == ("site", "t")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"label_column": "truth"}, r"data.label_column: mine.csv has no column 'truth'; it has t, what, u, site"),
        ({"columns": ("v",)}, r"data.columns: mine.csv has no column 'v'"),
        ({"columns": ()}, r"data.path: mine.csv: row 0: column 'site'"),
        ({"label_column": "u"}, r"data.label_column: 'u' has 40 .* say target_columns = \[\"u\"\]"),
        ({"target_columns": ("v",)}, r"data.target_columns: mine.csv has no column 'v'"),
        ({"target_columns": ("t",)}, r"data.columns: 't' is what is to be predicted"),
        ({"target_columns": ("u",), "labels": ("on",)}, r"data.labels: table gives numbers \(u\), not labels"),
        ({"path": "nowhere.csv"}, r"data.path: there is no file"),
        ({"path": "mine.txt"}, r"data.path: .*\.csv or \.parquet"),
        ({"path": ""}, r"data.path"),
        ({"labels": ("on", "broken")}, r"data.labels: no label 'broken'; table has off, on"),
        ({"score_share": 0.6}, r"data.score_share: .* leaves devices nothing"),
        ({"factory_share": 0.01}, r"data.factory_share: .* is none"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_by_its_key(tmp_path, columns, monkeypatch, changes, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.csv", columns)
    options = {"source": "table", "path": "mine.csv", "label_column": "what", "columns": ("t",), **changes}
    with pytest.raises(ConfigError, match=f"^{says}"):
        opened(**options)


def test_a_row_without_a_label_or_with_too_few_cells_is_named(tmp_path):
    for text, says in (("t,label\n1,a\n2,\n", "row 1: 'label' is empty"), ("t,label\n1,a\n2\n", "row 1: 1 fields"),
                       ("t,label\n", "holds no rows")):  # fmt: skip
        (tmp_path / "mine.csv").write_text(text)
        with pytest.raises(ConfigError, match=says):
            opened(source="table", path=str(tmp_path / "mine.csv"))


# ---- what is not there


def test_missing_packages_are_named_with_the_line_that_installs_them(monkeypatch):
    for module, source in (("sklearn", "digits"), ("river.datasets", "sea")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=r"pip install 'edge-sdk\[simulate\]'"):
            opened(source=source)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source": "fashion-mnist", "path": "nowhere"}, "data.path: nowhere holds no train-images"),
        ({"source": "basic-motions", "path": "nowhere"}, "data.path: nowhere/BasicMotions_TRAIN.ts cannot be read"),
        ({"source": "digits", "path": "x.csv"}, "data.path: the source 'digits' reads no file"),
        ({"source": "sea", "variant": 4}, "data.variant: sea has relations 0 to 3"),
        ({"source": "friedman", "target_columns": ("y",)}, "data.target_columns: the source 'friedman' has no columns"),
        ({"source": "led", "variant": 1}, "data.variant: led has relations 0 to 0"),
    ],
)
def test_data_that_are_not_there_are_named_by_their_key(options, says):
    with pytest.raises(ConfigError, match=f"^{says}"):
        opened(**options)
