"""Where learning runs: the same bytes in a child process and in place, and an end that is always told."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from edge_sdk.config import LearnConfig
from edge_sdk.errors import LearnError
from edge_sdk.head import Head
from edge_sdk.learn.base import CHALLENGER, JOB_JSON, JOB_NPZ, RESULT_JSON, LearnJob
from edge_sdk.learn.executor import InlineExecutor, ProcessExecutor, new_executor, read_result
from edge_sdk.manifest import LatentSpec

PATIENCE_S = 30.0


def job(*, passes=4, fresh=40, hidden=0, **settings):
    rng = np.random.default_rng(5)
    widths = (8, hidden, 3) if hidden else (8, 3)
    weights = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        weights[f"W{i}"] = rng.normal(0, 0.3, (inputs, outputs)).astype(np.float32)
        weights[f"b{i}"] = np.zeros(outputs, np.float32)
    return LearnJob(
        champion=Head(weights, ("a", "b", "ü")),
        anchor=weights,
        fisher={key: np.abs(value) for key, value in weights.items()},
        fresh_latents=rng.integers(0, 256, (fresh, 8), dtype=np.uint8),
        fresh_labels=rng.integers(3, size=fresh),
        replay_latents=rng.integers(0, 256, (70, 8), dtype=np.uint8),
        replay_labels=rng.integers(3, size=70),
        latent=LatentSpec(dim=8, scale=1 / 64, zero_point=3),
        config=LearnConfig(passes=passes, **settings),
        seed=9,
    )


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "job"
    path.mkdir()
    return path


@pytest.fixture
def process():
    executor = ProcessExecutor()
    yield executor
    executor.cancel()


def wait_for(executor):
    deadline = time.monotonic() + PATIENCE_S
    while (result := executor.poll()) is None:
        assert time.monotonic() < deadline, "the learner does not end"
        threading.Event().wait(0.01)
    return result


def is_running(pid):
    """Whether the process exists and has not been waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("hidden", [0, 12], ids=["linear", "one hidden layer"])
def test_process_and_inline_give_equal_bytes(tmp_path, process, hidden):
    results, challengers = [], []
    for name, executor in (("process", process), ("inline", InlineExecutor())):
        folder = tmp_path / name
        folder.mkdir()
        job(hidden=hidden).save(folder)
        executor.start(folder)
        results.append(wait_for(executor))
        challengers.append((folder / CHALLENGER).read_bytes())
        assert executor.poll() is None
    assert challengers[0] == challengers[1]
    assert Head.load(challengers[0]).labels == ("a", "b", "ü")
    first, second = results
    assert (first.error, first.steps, first.first_loss, first.last_loss) == (
        "", second.steps, second.first_loss, second.last_loss,
    )  # fmt: skip


def test_the_learners_process_loads_no_engine_and_no_framework(folder):
    job().save(folder)
    script = (
        "import json, sys\n"
        "from edge_sdk.learn import worker\n"
        f"sys.argv = ['worker', {str(folder)!r}]\n"
        "code = worker.main()\n"
        "print(json.dumps([code, sorted(sys.modules)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    code, modules = json.loads(done.stdout)
    assert code == 0
    assert read_result(folder, 0).error == ""
    unwanted = {"torch", "onnx", "onnxruntime", "scipy", "pandas", "sklearn", "paho", "sqlite_utils"}
    assert not unwanted & {name.partition(".")[0] for name in modules}


def test_a_killed_child_yields_a_result_with_an_error(folder, process):
    job(passes=10_000_000).save(folder)
    process.start(folder)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    result = wait_for(process)
    assert "ended with code -9" in result.error
    assert not (folder / CHALLENGER).exists()
    assert process.pid is None
    assert process.poll() is None


def test_an_executor_can_be_used_again_after_a_child_was_killed(folder, process):
    job(passes=10_000_000).save(folder)
    process.start(folder)
    os.kill(process.pid, signal.SIGKILL)
    assert wait_for(process).error
    job().save(folder)
    process.start(folder)
    assert wait_for(process).error == ""


def test_cancel_ends_the_child(folder, process):
    job(passes=10_000_000).save(folder)
    process.start(folder)
    pid = process.pid
    assert is_running(pid)
    process.cancel()
    assert not is_running(pid)
    assert process.poll() is None
    process.cancel()


def test_only_one_job_runs_at_a_time(folder, process):
    job(passes=10_000_000).save(folder)
    process.start(folder)
    with pytest.raises(LearnError, match="runs already"):
        process.start(folder)


def test_cancelling_an_inline_job_drops_its_result(folder):
    job().save(folder)
    executor = InlineExecutor()
    executor.start(folder)
    executor.cancel()
    assert executor.poll() is None


def damage(folder, how):
    arrays = folder / JOB_NPZ
    if how == "arrays gone":
        arrays.unlink()
    elif how == "arrays altered":
        data = bytearray(arrays.read_bytes())
        middle = len(data) // 2
        data[middle : middle + 40] = bytes(40)
        arrays.write_bytes(data)
    elif how == "header cut":
        header = folder / JOB_JSON
        header.write_bytes(header.read_bytes()[:-5])
    elif how == "header of another job":
        header = folder / JOB_JSON
        header.write_bytes(header.read_bytes().replace(b'"a",', b""))


@pytest.mark.parametrize("kind", ["process", "inline"])
@pytest.mark.parametrize("how", ["arrays gone", "arrays altered", "header cut", "header of another job"])
def test_a_damaged_job_is_an_error_result(folder, kind, how):
    job().save(folder)
    damage(folder, how)
    executor = new_executor(kind)
    executor.start(folder)
    result = wait_for(executor)
    assert result.error.startswith("IntegrityError: ")
    assert not (folder / CHALLENGER).exists()
    assert (folder / RESULT_JSON).exists()


@pytest.mark.parametrize("kind", ["process", "inline"])
@pytest.mark.parametrize(
    ("settings", "error"),
    [({"fresh": 0}, "EmptyBufferError"), ({"learning_rate": 1e42, "ewc_lambda": 0.0}, "DivergedError")],
    ids=["nothing fresh", "diverging"],
)
def test_an_error_of_learning_is_an_error_result(folder, kind, settings, error):
    job(**settings).save(folder)
    executor = new_executor(kind)
    executor.start(folder)
    assert wait_for(executor).error.startswith(f"{error}: ")
    assert not (folder / CHALLENGER).exists()


@pytest.mark.parametrize("kind", ["process", "inline"])
@pytest.mark.parametrize("part", ["label", "width", "count", "anchor"])
def test_rows_that_do_not_fit_the_head_are_an_error_result(folder, kind, part):
    given = job()
    if part == "label":
        given.fresh_labels[0] = 3
    elif part == "width":
        given = replace(given, replay_latents=given.replay_latents[:, :-1])
    elif part == "count":
        given = replace(given, fresh_latents=given.fresh_latents[:-1])
    else:
        given = replace(given, anchor={"W0": given.anchor["W0"]})
    given.save(folder)
    executor = new_executor(kind)
    executor.start(folder)
    assert "do not fit its head" in wait_for(executor).error


def test_a_child_that_dies_with_a_word_is_quoted(folder):
    (folder / "stderr.txt").write_text("Traceback …\nMemoryError: too large\n")
    assert read_result(folder, 1).error == (
        "LearnError: the learner ended with code 1 and left no result: MemoryError: too large"
    )


def test_a_half_written_result_counts_as_none(folder):
    (folder / RESULT_JSON).write_bytes(b'{"err')
    assert "left no result" in read_result(folder, 0).error


def test_a_python_that_cannot_be_started_is_a_learn_error(folder, process, monkeypatch):
    job().save(folder)
    monkeypatch.setattr(sys, "executable", str(folder / "no-such-python"))
    with pytest.raises(LearnError, match="cannot be started"):
        process.start(folder)
    assert process.poll() is None


def test_the_worker_explains_its_use():
    done = subprocess.run([sys.executable, "-m", "edge_sdk.learn.worker"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: python -m edge_sdk.learn.worker JOBDIR" in done.stderr
