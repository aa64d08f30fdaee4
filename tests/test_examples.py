"""Every example and every Python block of the README runs as it stands, alone and offline."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("0*.py"))
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def run(*arguments, cwd=ROOT):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "examples")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_there_is_one_example_for_each_use():
    assert [path.name[:2] for path in EXAMPLES] == ["01", "02", "03", "05", "06"]  # 04 is a folder, tested with Node


@pytest.mark.torch
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_is_short(example, tmp_path):
    assert len(example.read_text().splitlines()) < 60
    result = run(str(example), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.torch
@pytest.mark.parametrize("block", BLOCKS, ids=[f"block-{number}" for number in range(len(BLOCKS))])
def test_readme_block_runs(block, tmp_path):
    result = run("-c", block, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.torch
def test_the_demo_ends_as_it_should_and_the_same_seed_gives_the_same_report(tmp_path):
    for name in ("first", "second"):
        result = run("-m", "demo.run", "--out", str(tmp_path / name), "--seed", "3")
        assert result.returncode == 0, result.stdout + result.stderr
    first, second = tmp_path / "first", tmp_path / "second"
    assert (first / "report.json").read_bytes() == (second / "report.json").read_bytes()
    assert (first / "rollouts.json").read_bytes() == (second / "rollouts.json").read_bytes()
    page = (first / "report.html").read_text()
    assert "A fleet that learns" in page
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="http', page)
