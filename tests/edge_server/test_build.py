"""A new base from the owner's rows: trained, packed, held against the release in use, and pushed if it did not lose."""

import json
import traceback
from contextlib import closing

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from edge_sdk.errors import ConfigError
from edge_sdk.files import npz_bytes
from edge_sdk.head import Head
from edge_sdk.manifest import HEAD_NPZ, digest_of, parse_manifest, verify_checkpoint
from edge_server.build import build as make
from edge_server.build import hash_rows, load_build, write_release
from edge_server.cli import main
from edge_server.errors import ReleaseError, TrainerError
from edge_server.evaluate import evaluate
from edge_server.registry import Registry
from edge_server.settings import Settings

pytestmark = pytest.mark.torch
TRAINERS = '''
import numpy as np
import torch
from torch import nn
from edge_sdk.head import Head
from edge_sdk.manifest import HEAD_NPZ

def spoiled(job):
    """The head of the release in use, every label moved to its neighbour."""
    head = Head.load(job.start / HEAD_NPZ)
    return Head({key: np.roll(value, 1, axis=-1) for key, value in head.weights.items()}, head.labels)

def same(job):
    return Head.load(job.start / HEAD_NPZ)

def net(job):
    torch.manual_seed(job.seed)
    made = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, len(job.labels)))
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    x, y = torch.from_numpy(job.input.apply(job.data.train_x)), torch.from_numpy(job.data.train_y)
    for _ in range(60):
        loss = nn.functional.cross_entropy(made(x), y)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    return made
'''


@pytest.fixture(scope="module")
def checkpoint(build):
    """A real one, of the digits 0 to 7."""
    return build()


@pytest.fixture
def home(tmp_path, checkpoint):
    """A coordinator whose group runs the digits 0 to 7."""
    with closing(Registry(tmp_path / "home", settings=Settings(durable=False))) as registry:
        registry.push(checkpoint)
    return tmp_path / "home"


@pytest.fixture
def registry(home):
    with closing(Registry(home, settings=Settings(durable=False))) as registry:
        yield registry


@pytest.fixture
def recipe(tmp_path, digits):
    """Writes rows of some digits and a recipe: `recipe("trainer = ...", digits=10)`."""
    (tmp_path / "my_trainers.py").write_text(TRAINERS)

    def write(text="", *, count=8):
        train, held_out = (digits.factory, digits.life) if count > 8 else (digits.factory.only(set(range(8))),
                                                                           digits.life.only(set(range(8))))  # fmt: skip
        (tmp_path / "train.npz").write_bytes(npz_bytes({"x": train.x, "y": train.y}))
        parity = np.where(held_out.y % 2, "odd", "even")
        (tmp_path / "holdout.npz").write_bytes(npz_bytes({"x": held_out.x, "y": held_out.y, "slice_parity": parity}))
        path = tmp_path / "candidate.toml"
        labels = json.dumps([str(i) for i in range(count)])
        path.write_text(
            f'{text}\nlabels = {labels}\ncreated = "2026-03-01T00:00:00Z"\n'
            '[data]\ntrain = "train.npz"\nholdout = "holdout.npz"\n[card]\ndata = "Handwriting."\n'
        )
        return path

    return write


def test_the_head_is_trained_anew_and_may_learn_labels(registry, recipe, tmp_path, checkpoint):
    made = make(registry, recipe(count=10), out=tmp_path / "candidate", actor="ann")
    manifest = verify_checkpoint(tmp_path / "candidate")
    base = verify_checkpoint(checkpoint)
    assert (manifest.release, manifest.labels[-2:], manifest.trunk_id) == (2, ["8", "9"], base.trunk_id)
    assert manifest.parent == digest_of((checkpoint / "manifest.json").read_bytes())
    assert made.record.verdict == "better", made.record.reason
    assert made.evaluation.challenger > made.evaluation.champion + 0.05
    assert {part.name for part in made.evaluation.slices} == {"parity=even", "parity=odd"}
    card = (tmp_path / "candidate" / "card.md").read_text()
    assert "Handwriting." in card
    assert f"made from: release 1, SHA-256 {manifest.parent}" in card
    assert made.record.report["lineage"]["training_rows_SHA-256"] in card
    number = registry.push(tmp_path / "candidate", actor="ann")
    assert registry.rollout(number).state.status == "running"


def test_the_same_recipe_gives_the_same_bytes(registry, recipe, tmp_path):
    path = recipe("release = 7\nlearner = 'slda'")
    first, second = (make(registry, path, out=tmp_path / name).record.digest for name in ("one", "two"))
    assert first == second
    assert [record.release for record in registry.store.candidates.page()] == [7]


def test_a_candidate_that_lost_is_not_pushed_without_a_reason(registry, recipe, tmp_path):
    made = make(registry, recipe('trainer = "my_trainers:spoiled"'), out=tmp_path / "candidate")
    assert made.record.verdict == "lost"
    with pytest.raises(ReleaseError, match="lost against release 1 on the held-out rows"):
        registry.push(tmp_path / "candidate")
    assert registry.push(tmp_path / "candidate", force="a test of the alarm") == 2


def test_one_that_changes_nothing_is_equal(registry, recipe, tmp_path):
    made = make(registry, recipe('trainer = "my_trainers:same"'), out=tmp_path / "candidate")
    assert (made.record.verdict, made.evaluation.champion) == ("equal", made.evaluation.challenger)


def test_a_network_from_scratch_is_quantized_and_compared(registry, recipe, tmp_path):
    text = 'start = "scratch"\ntrainer = "my_trainers:net"\nname = "digits-mlp"\ninput = {shape = [1, 8, 8]}'
    made = make(registry, recipe(text), out=tmp_path / "candidate")
    manifest = verify_checkpoint(tmp_path / "candidate")
    assert (manifest.name, manifest.parent, manifest.adapt) == ("digits-mlp", None, "head")
    assert made.evaluation.challenger > 0.7
    assert made.comparison.rows == made.evaluation.rows


def test_what_is_worse_in_one_slice_has_lost(checkpoint, tmp_path, digits, registry):
    """The odd digits are given up for nothing: overall it may pass, for them it is no use."""
    import shutil

    from edge_sdk.manifest import MANIFEST_NAME, describe_folder, manifest_bytes

    folder = shutil.copytree(checkpoint, tmp_path / "one-eyed")
    head = Head.load(folder / HEAD_NPZ)
    bias = head.weights["b0"].copy()
    bias[1::2] -= 12.0
    (folder / HEAD_NPZ).write_bytes(Head({**head.weights, "b0": bias}, head.labels).to_bytes())
    manifest = parse_manifest((folder / MANIFEST_NAME).read_bytes())
    entries = describe_folder(folder, tuple(manifest.files))
    (folder / MANIFEST_NAME).write_bytes(manifest_bytes(msgspec.structs.replace(manifest, files=entries)))
    pool = digits.life.only(set(range(8)))
    slices = {"odd": pool.y % 2 == 1, "even": pool.y % 2 == 0, "none": np.zeros(len(pool.y), np.bool_)}
    found = evaluate(checkpoint, folder, pool.x, pool.y, manifest.labels, slices)
    assert (found.verdict, "harms odd" in found.reason) == ("lost", True), found
    assert [part.harmed for part in found.slices] == [True, False]
    assert evaluate(None, folder, pool.x, pool.y, manifest.labels, {}).verdict == "alone"
    untold = evaluate(checkpoint, folder, pool.x, None, manifest.labels, {})
    assert (untold.verdict, untold.challenger, untold.rows) == ("alone", None, len(pool.x))


def test_a_release_comes_back_from_the_coordinators_files(registry, checkpoint, tmp_path):
    release = registry.releases()[0]
    folder = write_release(registry.blobs, release, tmp_path / "again")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in checkpoint.iterdir()
    }


def test_the_lineage_is_of_rows_and_truth(tmp_path):
    for name, data in (("a_x", b"rows"), ("a_y", b"truth"), ("b_x", b"rows"), ("b_y", b"lies")):
        (tmp_path / f"{name}.npy").write_bytes(data)
    assert hash_rows(tmp_path / "a_x.npy") != hash_rows(tmp_path / "b_x.npy")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('start = "scratch"', "needs a trainer"),
        ('start = "scratch"\ntrainer = "a:b"', "needs name, input"),
        ("epochs = 3", "epochs"),
        ('trainer = "nowhere:at_all"', "cannot be imported"),
        ("learner = 'none-such'", "learn.learner"),
    ],
)
def test_what_cannot_be_built_is_refused(registry, recipe, tmp_path, text, problem):
    with pytest.raises(ConfigError, match=problem):
        make(registry, recipe(text), out=tmp_path / "candidate")
    assert not (tmp_path / "candidate").exists()


BAD = """
import json, sys

def raises(job):
    raise ValueError("no row is\\nof plant A")

def deep(job):
    return json.loads("{")

def leaves(job):
    sys.exit("no GPU here")

def nothing(job):
    return None

def junk(job):
    return {"weights": [1, 2]}

number = 7
"""


@pytest.fixture
def attempt(home, recipe, tmp_path):
    """Builds a recipe by the command line; returns its result."""
    (home / "coordinator.toml").write_text("durable = false\n")
    (tmp_path / "my_bad_trainers.py").write_text(BAD)
    (tmp_path / "my_broken_module.py").write_text("def f(:\n")

    def run(text="", *flags, **files):
        path = recipe(text)
        for name, content in files.items():
            (tmp_path / f"{name}.csv").write_bytes(content)
            path.write_text(path.read_text().replace(f'"{name}.npz"', f'"{name}.csv"'))
        if "target" in text:
            path.write_text(path.read_text().replace(text, "").replace("[data]", f"[data]\n{text}"))
        arguments = ["build", str(path), "--out", str(tmp_path / "candidate"), "--home", str(home)]
        return CliRunner().invoke(main, [*flags, *arguments])

    return run


@pytest.mark.parametrize(
    ("trainer", "code", "problem"),
    [
        ("my_bad_trainers:raises", 1, "failed: ValueError: no row is of plant A (my_bad_trainers.py, line 5)"),
        ("my_bad_trainers:deep", 1, "failed: json.decoder.JSONDecodeError: Expecting property name"),
        ("my_bad_trainers:leaves", 1, "failed: SystemExit: no GPU here"),
        ("my_bad_trainers:nothing", 1, "returned None"),
        ("my_bad_trainers:junk", 1, "a network is a torch module, an ONNX graph or the path of one, got dict"),
        ("my_bad_trainers:number", 2, "is no function but int"),
        ("my_broken_module:f", 2, "cannot be imported: File"),
    ],
)
def test_a_trainer_that_fails_is_named_with_its_message_in_one_line(attempt, tmp_path, trainer, code, problem):
    result = attempt(f'trainer = "{trainer}"')
    error = result.stderr.splitlines()[-1]
    assert (result.exit_code, error.startswith("error: ")) == (code, True), result.output
    assert problem in error
    assert "Traceback" not in result.output
    assert not (tmp_path / "candidate").exists()


def test_the_traceback_of_a_trainer_is_kept_for_who_debugs(attempt):
    result = attempt('trainer = "my_bad_trainers:raises"', "--debug")
    assert isinstance(result.exception, TrainerError)
    frames = traceback.extract_tb(result.exception.__cause__.__traceback__)
    assert frames[-1].name == "raises"


def table(rows=300, columns=64, label="said", value="1"):
    header = [*(f"p{i}" for i in range(columns)), label]
    lines = [",".join(header), *(",".join([*["0.5"] * columns, value]) for _ in range(rows))]
    return "\n".join(lines).encode()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (table(label="truth"), "train.csv has no column 'said'"),
        (table(columns=63), "train.csv has 63 columns of values, the model takes shape"),
        (table(value="robot"), "robot"),
        (table() + b"\n1,2", "row 300: 2 fields where the header has 65"),
        (table().replace(b"0.5", b"much", 1), "row 0: 'p0' is 'much', expected a number"),
        (table()[:90] + b"\xff\xfe", "train.csv is not readable CSV in UTF-8"),
        (b"", "train.csv has no rows"),
        (table(), "label"),
    ],
)
def test_rows_that_cannot_be_used_are_told_in_one_line(attempt, content, problem):
    result = attempt('target = ["said"]', train=content, holdout=table())
    error = result.stderr.splitlines()[-1]
    assert (result.exit_code, error.startswith("error: ")) == (1, True), result.output
    assert problem in error
    assert "Traceback" not in result.output


def test_too_few_held_out_rows_are_told_in_one_line(attempt, recipe, tmp_path, digits):
    path = recipe()
    few = digits.life.only(set(range(8)))
    (tmp_path / "few.npz").write_bytes(npz_bytes({"x": few.x[:150], "y": few.y[:150]}))
    result = attempt(holdout=table(rows=150), train=table())
    assert "train.csv: say which column holds the labels" in result.stderr.splitlines()[-1]
    path = recipe()
    path.write_text(path.read_text().replace("holdout.npz", "few.npz"))
    result = CliRunner().invoke(
        main, ["build", str(path), "--out", str(tmp_path / "candidate"), "--home", str(tmp_path / "home")]
    )
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith("a monitor reference needs at least 200 rows, got 150")


def test_labels_must_begin_with_those_in_use(registry, recipe, tmp_path):
    path = recipe()
    path.write_text(path.read_text().replace('"0", "1"', '"1", "0"'))
    with pytest.raises(ConfigError, match="labels must begin with"):
        make(registry, path, out=tmp_path / "candidate")


def test_a_group_without_a_release_has_nothing_to_start_from(registry, recipe, tmp_path):
    with pytest.raises(ConfigError, match="no release to start from"):
        make(registry, recipe(), out=tmp_path / "candidate", group="lab")
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load_build(tmp_path / "none.toml")


def test_the_command_says_how_it_did_and_pushes_what_did_not_lose(home, recipe, tmp_path):
    (home / "coordinator.toml").write_text("durable = false\n")

    def run(*arguments, expect=0):
        result = CliRunner().invoke(main, [*map(str, arguments), "--home", str(home)])
        assert result.exit_code == expect, (result.output, result.exception)
        return result

    result = run("build", recipe(count=10), "--out", tmp_path / "good", "--push", "--json")
    assert json.loads(result.stdout)["verdict"] == "better"
    assert "[2/5] training: head" in result.stderr
    assert "rollout 2" in result.stderr
    result = run("build", recipe('trainer = "my_trainers:spoiled"'), "--out", tmp_path / "bad", "--push", expect=1)
    assert "lost" in result.stdout
    assert "parity=odd" in result.stdout
    table = run("candidates", "list").output.splitlines()
    assert [line.split()[0] for line in table] == ["release", "3", "2"]
    shown = run("candidates", "show", table[1].split()[2]).output
    assert shown.index("parity=odd") < shown.index("lost; ") < shown.index("made from: release 1") < shown.index("# ")
    assert json.loads(run("candidates", "show", table[1].split()[2], "--json").output)["pushed"] is False
    assert "no candidate" in run("candidates", "show", "ff", expect=1).stderr
    assert "exists already" in run("build", recipe(), "--out", tmp_path / "bad", expect=2).stderr
