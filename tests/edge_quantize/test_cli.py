import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_quantize import load_recipe
from edge_quantize.cli import main
from edge_sdk.errors import ConfigError
from edge_sdk.manifest import MANIFEST_NAME, TRUNK_INT8, parse_manifest

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
def test_network_without_a_dense_head_exits_with_a_failed_check(workshop):
    (workshop / "recipe.toml").write_text(RECIPE.replace('state = "net.pt"', ""))
    (workshop / "net.py").write_text(NET.replace("nn.Linear(64, 8)", "nn.Linear(64, 8), nn.Softmax(dim=1)"))
    result = invoke("run", workshop / "recipe.toml")
    assert result.exit_code == 1
    assert "ends in Softmax" in result.stderr


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
    assert lines["parent"] == "-"


@pytest.mark.torch
def test_inspect_prints_json(base):
    facts = json.loads(invoke("inspect", base.folder, "--json").stdout)
    assert facts["latent"]["dim"] == 64
    assert facts["trunk_id"] == base.manifest.trunk_id
    assert facts["metrics"] == base.manifest.metrics


@pytest.mark.torch
def test_verify_accepts_the_checkpoint_and_tells_damage_by_exit_code(base, tmp_path):
    result = invoke("verify", base.folder)
    assert (result.exit_code, result.stdout) == (0, "ok: digits release 1, 9 files, self-test passed\n")
    folder = shutil.copytree(base.folder, tmp_path / "copy")
    data = (folder / TRUNK_INT8).read_bytes()
    (folder / TRUNK_INT8).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    result = invoke("verify", folder)
    assert result.exit_code == 3
    assert result.stderr.startswith("Error: trunk.int8.onnx has SHA-256")
    assert len(result.stderr.splitlines()) == 1


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
