import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from edge_quantize import Recipe, load_recipe
from edge_quantize.cli import main
from edge_sdk.errors import ConfigError
from edge_sdk.learn.moments import Moments
from edge_sdk.manifest import (
    MANIFEST_NAME,
    MOMENTS_NPZ,
    TRUNK_INT8,
    describe_folder,
    manifest_bytes,
    parse_manifest,
)

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
name = "digits"
release = 1
output = "out/digits-1"
created = "2026-01-01T00:00:00+00:00"
labels = ["0", "1", "2", "3", "4", "5", "6", "7"]

[model]
call = "net:make"
state = "net.pt"

[data]
train = "train.npz"
holdout = "holdout.npz"

[input]
shape = [1, 8, 8]
low = 0.0
high = 16.0
preprocess = [{ op = "scale", mean = [0.0], std = [16.0] }]

[card]
data = "UCI digits."
"""
NET = """
from torch import nn


def block(inputs, outputs):
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]


def make():
    trunk = [*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 64)]
    return nn.Sequential(*trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8))
"""


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def workshop(tmp_path, trained, digits):
    """A folder with a recipe and all it names."""
    import torch

    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "net.py").write_text(NET)
    torch.save(trained("pooled").state_dict(), tmp_path / "net.pt")
    np.savez(tmp_path / "train.npz", x=digits.train_x, y=digits.train_y)
    np.savez(tmp_path / "holdout.npz", x=digits.holdout_x, y=digits.holdout_y)
    return tmp_path


def without_torch(code):
    check = "; assert not {'torch', 'onnx', 'onnxscript'} & set(sys.modules), sorted(sys.modules)"
    return subprocess.run(
        [sys.executable, "-c", f"import sys; {code}{check}"], capture_output=True, text=True, check=False
    )


@pytest.mark.torch
def test_run_builds_what_library_calls_build_and_again_the_same_bytes_in_another_process(workshop, base):
    result = invoke("run", workshop / "recipe.toml")
    assert result.exit_code == 0, result.output
    assert "INT8" in result.output
    assert "packed digits release 1" in result.output
    first = workshop / "out" / "digits-1"
    assert (first / TRUNK_INT8).read_bytes() == (base.folder / TRUNK_INT8).read_bytes()

    shutil.move(first, workshop / "first")
    command = [sys.executable, "-m", "quantize", "run", str(workshop / "recipe.toml")]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for path in (workshop / "first").iterdir():
        assert path.read_bytes() == (first / path.name).read_bytes(), path.name


@pytest.mark.torch
def test_run_says_in_one_line_that_calibration_rows_are_few(workshop, digits):
    np.savez(workshop / "few.npz", x=digits.train_x[:40])
    recipe = RECIPE.replace('holdout = "holdout.npz"', 'holdout = "holdout.npz"\ncalibration = "few.npz"')
    undated = recipe.replace('created = "2026-01-01T00:00:00+00:00"', "")
    (workshop / "recipe.toml").write_text(undated)
    result = invoke("run", workshop / "recipe.toml")
    assert result.exit_code == 0
    assert parse_manifest((workshop / "out/digits-1" / MANIFEST_NAME).read_bytes()).created.endswith("+00:00")
    assert result.stderr.splitlines() == [
        "warning: calibration on 40 rows; with fewer than 100 the ranges may be too narrow"
    ]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"train.npz"', '"absent.npz"', "absent.npz does not exist"),
        ('"train.npz"', '"net.py"', "net.py"),
        ("net:make", "net:absent", "has no attribute 'absent'"),
        ("release = 1", 'release = 1\nparent = "nowhere"', "nowhere has no manifest.json"),
    ],
)
def test_run_says_in_one_line_what_is_wrong(workshop, old, new, message):
    (workshop / "recipe.toml").write_text(RECIPE.replace(old, new))
    result = invoke("run", workshop / "recipe.toml")
    assert result.exit_code == (3 if "manifest" in message else 2)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.torch
def test_network_without_a_dense_head_is_served_whole_unless_a_head_is_asked_for(workshop):
    recipe = RECIPE.replace('state = "net.pt"', "")
    (workshop / "net.py").write_text(NET.replace("nn.Linear(64, 8)", "nn.Linear(64, 8), nn.Tanh()"))
    (workshop / "recipe.toml").write_text(recipe)
    result = invoke("run", workshop / "recipe.toml")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("adapt       none: ")
    assert result.stdout.endswith("packed digits release 1, adapt=none\n")
    (workshop / "recipe.toml").write_text(recipe.replace("release = 1", 'release = 1\nadapt = "head"').replace(
        "digits-1", "digits-2"
    ))  # fmt: skip
    result = invoke("run", workshop / "recipe.toml")
    assert result.exit_code == 1
    assert "adapt=head is not possible" in result.stderr
    assert "Tanh" in result.stderr
    assert not (workshop / "out/digits-2").exists()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('name = "digits"', 'nmae = "digits"', "nmae"),
        ('call = "net:make"', 'cal = "net:make"', r"cal.*\$\.model"),
        ("release = 1", 'release = "one"', r"\$\.release"),
        ("[card]", '[quantization.calibration]\nmethod = "guess"\n\n[card]', r"\$\.quantization\.calibration\.method"),
        ("[card]", "[memory]\nper_class = 3\n\n[card]", r"per_class must be at least 40, got 3.*\$\.memory"),
        ("[card]", "[card", "recipe.toml"),
    ],
)
def test_recipe_mistake_names_file_and_key(tmp_path, old, new, named):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace(old, new))
    with pytest.raises(ConfigError, match=rf"recipe\.toml: .*{named}" if "recipe" not in named else named):
        load_recipe(path)
    result = invoke("run", path)
    assert result.exit_code == 2
    assert "recipe.toml" in result.stderr


def test_recipe_of_the_readme_is_valid(tmp_path):
    text = (ROOT / "quantize" / "README.md").read_text()
    path = tmp_path / "recipe.toml"
    path.write_text(text.split("```toml\n")[1].split("```")[0])
    assert load_recipe(path).data.calibration == "data/calibration.npz"


def fields(kind):
    """Every key that a recipe may have, as "section.key"."""
    for field in msgspec.structs.fields(kind):
        inner = field.type
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            yield from (f"{field.name}.{key}" for key in fields(inner))
        else:
            yield field.name


def test_recipe_of_the_readme_has_every_key():
    text = (ROOT / "quantize" / "README.md").read_text().split("```toml\n")[1].split("```")[0]
    for key in fields(Recipe):
        assert re.search(rf"^(# )?{key.split('.')[-1]} = ", text, flags=re.MULTILINE), key


GUIDE = (ROOT / "docs" / "quantize.md").read_text()
LEAST = """
name = "oven"
release = 1
output = "oven-1"
model = { onnx = "net.onnx" }
data = { train = "train.npz", holdout = "held-out.npz" }
input = { shape = [6] }
"""


@pytest.mark.parametrize("block", re.findall(r"```toml\n(.*?)```", GUIDE, flags=re.DOTALL))
def test_recipe_block_of_the_guide_is_valid(block):
    recipe = msgspec.convert({**msgspec.toml.decode(LEAST), **msgspec.toml.decode(block)}, Recipe)
    assert recipe.input.model_shape


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::edge_quantize.errors.CalibrationWarning")
def test_python_blocks_of_the_guide_run_one_after_another(tmp_path):
    names = {"folder": tmp_path}
    for block in re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL):
        exec(compile(block, "docs/quantize.md", "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} == {"oven-1", "oven-2", "oven-auto"}
    assert names["again"].manifest.latent.dim > names["result"].manifest.latent.dim


def test_absent_recipe_is_a_usage_error(tmp_path):
    result = invoke("run", tmp_path / "absent.toml")
    assert result.exit_code == 2
    assert "absent.toml: No such file" in result.stderr


@pytest.mark.torch
def test_inspect_prints_the_manifests_facts(base):
    result = invoke("inspect", base.folder)
    assert result.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if not line.startswith(" "))
    assert lines["name"] == "digits"
    assert lines["labels"] == "0, 1, 2, 3, 4, 5, 6, 7"
    assert lines["trunk_id"] == base.manifest.trunk_id
    assert lines["parent"] == lines["state"] == lines["targets"] == lines["thresholds"] == "-"


@pytest.mark.torch
def test_inspect_prints_json(base):
    facts = json.loads(invoke("inspect", base.folder, "--json").stdout)
    assert facts["latent"]["dim"] == 64
    assert facts["trunk_id"] == base.manifest.trunk_id
    assert facts["metrics"] == base.manifest.metrics
    assert facts["files"][MOMENTS_NPZ] == (base.folder / MOMENTS_NPZ).stat().st_size


@pytest.mark.torch
def test_verify_accepts_the_checkpoint_and_tells_damage_by_exit_code(base, tmp_path):
    result = invoke("verify", base.folder)
    told = "10 files, self-test passed, learns from 320 rows of factory memory, moments of 1000\n"
    assert (result.exit_code, result.stdout) == (0, f"ok: digits release 1, {told}")
    folder = shutil.copytree(base.folder, tmp_path / "copy")
    data = (folder / TRUNK_INT8).read_bytes()
    (folder / TRUNK_INT8).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    result = invoke("verify", folder)
    assert result.exit_code == 3
    assert result.stderr.startswith("Error: trunk.int8.onnx has SHA-256")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.torch
def test_verify_finds_moments_of_another_head_though_every_hash_is_right(base, tmp_path):
    folder = shutil.copytree(base.folder, tmp_path / "copy")
    (folder / MOMENTS_NPZ).write_bytes(Moments.none(base.manifest.labels, 5).to_bytes())
    entry = describe_folder(folder, [MOMENTS_NPZ])
    manifest = msgspec.structs.replace(base.manifest, files={**base.manifest.files, **entry})
    (folder / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
    result = invoke("verify", folder)
    assert result.exit_code == 3
    assert result.stderr.startswith("Error: moments.npz: 0 rows of 5 values")


@pytest.mark.torch
def test_altered_manifest_is_an_integrity_error(base, tmp_path):
    folder = shutil.copytree(base.folder, tmp_path / "copy")
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_bytes())
    manifest["files"][TRUNK_INT8]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert invoke("verify", folder).exit_code == 3
    path.write_bytes(path.read_bytes()[:100])
    assert invoke("verify", folder).exit_code == 3
    assert invoke("inspect", folder).exit_code == 3
    path.unlink()
    assert invoke("inspect", folder).exit_code == 3


# ---- auto, compare, and every kind of model


SEARCH = """
[search]
max_loss = 0.05

[search.budget]
max_seconds = 20.0
max_trials = 7
repeats = 5
"""


@pytest.mark.torch
def test_auto_prints_what_was_tried_and_packs_the_recipe_chosen(workshop):
    (workshop / "recipe.toml").write_text(RECIPE + SEARCH)
    result = invoke("auto", workshop / "recipe.toml", "--html", workshop / "page.html")
    assert result.exit_code == 0, result.output
    assert "95 % bounds" in result.stdout
    assert "333 rows" in result.stdout  # a third of the training rows was held back
    assert result.stdout.endswith("packed digits release 1, adapt=head\n")
    assert "[0/" in result.stderr
    assert "fp32" in result.stderr
    page = (workshop / "page.html").read_text()
    assert "Sensitivity of the layers" in page
    assert "<svg" in page
    assert "own dB" in result.stdout
    assert invoke("verify", workshop / "out/digits-1").exit_code == 0
    card = (workshop / "out/digits-1/card.md").read_text()
    tried = [line[2:].split("  ")[0] for line in result.stdout.splitlines() if line[2:].startswith(("uint8", "int8"))]
    assert len(tried) == 7
    assert any(recipe in card for recipe in tried)


@pytest.mark.torch
def test_run_takes_the_recipe_stated_whatever_the_search_says(workshop):
    (workshop / "recipe.toml").write_text(
        RECIPE + SEARCH + '\n[quantization]\nactivation = "int8"\ncalibration = { method = "entropy" }\n'
    )
    result = invoke("run", workshop / "recipe.toml")
    assert result.exit_code == 0, result.output
    assert "95 % bounds" not in result.stdout
    assert "int8, per channel, entropy" in (workshop / "out/digits-1/card.md").read_text()


@pytest.mark.torch
def test_page_that_cannot_be_written_is_a_usage_error(base, workshop):
    page = workshop / "absent" / "page.html"
    result = invoke("compare", base.folder, "--data", workshop / "holdout.npz", "--repeats", 10, "--html", page)
    assert result.exit_code == 2
    assert "page.html cannot be written: No such file" in result.stderr


@pytest.mark.torch
def test_compare_prints_a_table_json_and_a_page(base, workshop):
    arguments = ["compare", base.folder, "--data", workshop / "holdout.npz", "--repeats", 10]
    assert "INT8" in invoke(*arguments).stdout
    result = invoke(*arguments, "--json", "--html", workshop / "page.html")
    found = json.loads(result.stdout)
    assert found["rows"] == len(base.data.holdout_x)
    assert found["variants"]["int8"]["score"]["accuracy"]["value"] == base.manifest.metrics["int8_accuracy"]
    assert (workshop / "page.html").read_text().startswith("<!")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("data", "code", "message"),
    [("absent.npz", 2, "absent.npz does not exist"), ("net.py", 2, "expected a file ending in"),
     ("train_x.npz", 2, "has no array y")],
)  # fmt: skip
def test_compare_says_what_is_wrong_with_the_rows(base, workshop, data, code, message):
    np.savez(workshop / "train_x.npz", x=base.data.train_x)
    result = invoke("compare", base.folder, "--data", workshop / data)
    assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1)
    assert message in result.stderr


WIDE = """
name = "two"
release = 1
output = "out/two-1"
created = "2026-01-01T00:00:00+00:00"
{facts}

[model]
onnx = "two.onnx"

[data]
holdout = "held.npz"
calibration = "held-x.npz"

[input]
name = "a"
shape = [4]

[[more_inputs]]
name = "b"
shape = [3]
"""
KINDS = {
    "raw": 'task = "raw"',
    "regression": 'task = "regression"\nlabels = ["load", "heat"]',
    "multilabel": 'task = "multilabel"\nlabels = ["on", "hot"]\nthresholds = [0.3, 0.6]',
    "classification": 'labels = ["on", "off"]',
}


@pytest.fixture
def two_inputs(tmp_path):
    """Writes a recipe for an ONNX file with two inputs, and its rows."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def write(task):
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(240, 4)).astype(np.float32), rng.normal(size=(240, 3)).astype(np.float32)
        w = rng.normal(size=(7, 2)).astype(np.float32)
        nodes = [
            helper.make_node("Concat", ["a", "b"], ["both"], axis=1),
            helper.make_node("MatMul", ["both", "w"], ["y"]),
        ]
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name, size in
                  (("a", 4), ("b", 3), ("y", 2))]  # fmt: skip
        graph = helper.make_graph(nodes, "two", values[:2], values[2:], [numpy_helper.from_array(w, "w")])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "two.onnx")
        y = np.concatenate([a, b], axis=1) @ w
        truth = {
            "raw": {},
            "regression": {"y": y},
            "multilabel": {"y": (y > 0) * 1},
            "classification": {"y": y.argmax(1)},
        }
        np.savez(tmp_path / "held.npz", **{"x.a": a, "x.b": b}, **truth[task])
        np.savez(tmp_path / "held-x.npz", **{"x.a": a[::2] + 0.01, "x.b": b[::2]})
        (tmp_path / "recipe.toml").write_text(WIDE.format(facts=KINDS[task]))
        return tmp_path

    return write


@pytest.mark.parametrize("task", KINDS)
def test_onnx_file_with_several_inputs_goes_through_every_command(two_inputs, task):
    folder = two_inputs(task)
    seen = invoke("inspect", folder / "two.onnx")
    assert seen.exit_code == 0
    assert "2 inputs" in seen.stdout
    assert json.loads(invoke("inspect", folder / "two.onnx", "--json").stdout)["level"] == "none"
    ran = invoke("run", folder / "recipe.toml", "--html", folder / "run.html")
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.endswith("packed two release 1, adapt=none\n")
    packed = folder / "out/two-1"
    assert invoke("verify", packed).stdout.startswith("ok: two release 1, 5 files")
    facts = invoke("inspect", packed)
    assert facts.exit_code == 0, facts.output
    assert ["task", task] in [line.split() for line in facts.stdout.splitlines()]
    compared = invoke("compare", packed, "--data", folder / "held.npz", "--repeats", 10, "--json")
    assert compared.exit_code == 0, compared.output
    assert set(json.loads(compared.stdout)["variants"]) == {"int8", "fp32"}


def test_rows_of_inputs_that_differ_in_number_are_refused(two_inputs):
    folder = two_inputs("raw")
    np.savez(folder / "held.npz", **{"x.a": np.zeros((240, 4), np.float32), "x.b": np.zeros((9, 3), np.float32)})
    result = invoke("run", folder / "recipe.toml")
    assert result.exit_code == 2
    assert "x.a, x.b must have the same number of rows" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("inspect", "absent.onnx"), 2, "absent.onnx does not exist"),
        (("inspect", "damaged.onnx"), 1, "damaged.onnx is no ONNX file"),
        (("inspect", "nowhere"), 2, "nowhere does not exist"),
        (("inspect", "recipe.toml"), 2, "recipe.toml is neither a folder nor an ONNX file"),
        (("inspect", "."), 3, "has no manifest.json"),
        (("verify", "nowhere"), 2, "nowhere does not exist"),
        (("compare", "nowhere", "--data", "x.npz"), 2, "nowhere does not exist"),
        (("auto", "absent.toml"), 2, "absent.toml: No such file"),
        (("run", "recipe.toml"), 2, "absent.onnx does not exist"),
    ],
)
def test_bad_input_has_its_exit_code_and_one_line(tmp_path, arguments, code, message):
    (tmp_path / "damaged.onnx").write_bytes(b"no graph")
    (tmp_path / "recipe.toml").write_text(WIDE.format(facts='task = "raw"').replace("two.onnx", "absent.onnx"))
    command, name, *rest = arguments
    result = invoke(command, tmp_path / name, *rest)
    assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1), result.stderr
    assert message in result.stderr


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").touch()

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    result = invoke("verify", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == f"Error: {tmp_path}/manifest.json: Permission denied\n"


def test_debug_shows_the_error_itself(tmp_path):
    result = invoke("--debug", "verify", tmp_path)
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "IntegrityError"


@pytest.mark.torch
def test_inspect_and_verify_load_neither_torch_nor_onnx(base):
    calls = "".join(
        f"; main([{command!r}, {str(base.folder)!r}], standalone_mode=False)" for command in ("inspect", "verify")
    )
    done = without_torch("import edge_quantize; from edge_quantize.cli import main" + calls)
    assert done.returncode == 0, done.stderr
