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
from pathlib import Path

import numpy as np
import psutil
import pytest

from edge_sdk.config import LearnConfig
from edge_sdk.errors import LearnError, StoreError
from edge_sdk.head import Head, dequantize
from edge_sdk.learn.base import CHALLENGER, JOB_JSON, JOB_NPZ, RESULT_JSON, LearnJob, Rows
from edge_sdk.learn.executor import InlineExecutor, ProcessExecutor, new_executor, read_result
from edge_sdk.learn.moments import Moments
from edge_sdk.learn.worker import ORPHANED, PAUSE, hold, run_job
from edge_sdk.manifest import LatentSpec

PATIENCE_S = 30.0
LEARNERS = """
import os
from pathlib import Path
import numpy as np
from edge_sdk.head import Head
from edge_sdk.learn.base import LearnResult


def endless(job, *, between):
    while True:
        between()


def steady(job, *, between):
    rng, head, batches = np.random.default_rng(job.seed), job.champion, 30
    for _ in range(batches):
        between()
        noise = {key: rng.normal(0, 0.1, value.shape) for key, value in head.weights.items()}
        weights = {key: (value + noise[key]).astype(np.float32) for key, value in head.weights.items()}
        head = Head(weights, head.labels)
    return head, LearnResult(steps=batches)


def counted(job, *, between):
    with open(os.environ["COUNT"], "ab", buffering=0) as count:
        def told():
            between()
            count.write(b".")
        return steady(job, between=told)


def midway(job, *, between):
    # does half of its work, and goes on as soon as somebody has paused it
    calls = 0
    def awaits_pause():
        nonlocal calls
        calls += 1
        while calls == 15 and not Path(os.environ["PAUSED"]).exists():
            pass
        between()
    return counted(job, between=awaits_pause)


def buggy(job, *, between):
    return 1 / 0


def greedy(job, *, between):
    raise MemoryError("no room for 8 GB")


def silent(job, *, between):
    return None


def wider(job, *, between):
    return job.champion.grown([*job.champion.labels, "more"]), LearnResult()
"""


def job(*, passes=4, fresh=40, hidden=0, **settings):
    rng = np.random.default_rng(5)
    widths = (8, hidden, 3) if hidden else (8, 3)
    weights = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        weights[f"W{i}"] = rng.normal(0, 0.3, (inputs, outputs)).astype(np.float32)
        weights[f"b{i}"] = np.zeros(outputs, np.float32)
    head = Head(weights, ("a", "b", "ü"))
    latent = LatentSpec(dim=8, scale=1 / 64, zero_point=3)
    new, old = (
        Rows(rng.integers(0, 256, (n, 8), dtype=np.uint8), rng.integers(3, size=n), np.ones(n, np.float32))
        for n in (fresh, 70)
    )
    features = head.hidden(dequantize(old.latents, latent))
    return LearnJob(
        champion=head,
        base=head,
        anchor=weights,
        fisher={key: np.abs(value) for key, value in weights.items()},
        fresh=new,
        replay=old,
        moments=Moments.of(features, old.targets, old.weights, head.labels),
        fresh_mass=np.ones(fresh, np.float32),
        latent=latent,
        task="classification",
        config=LearnConfig(**{"learner": "sgd", "passes": passes} | settings),
        seed=9,
    )


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "job"
    path.mkdir()
    return path


@pytest.fixture
def learners(tmp_path, monkeypatch):
    """Learners of a user's own, in a module next to the app."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "own_learners.py").write_text(LEARNERS)
    monkeypatch.syspath_prepend(str(tmp_path / "app"))
    yield
    sys.modules.pop("own_learners", None)


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


def wait_until(true):
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, "it does not come about"
        threading.Event().wait(0.01)


def is_running(pid):
    """Whether the process exists and has not ended, waited for or not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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


def test_the_learners_process_is_small_and_loads_no_engine_and_no_framework(folder):
    job().save(folder)
    script = (
        "import json, sys\n"
        "from edge_sdk.learn import worker\n"
        f"sys.argv = ['worker', {str(folder)!r}]\n"
        "code = worker.main()\n"
        "status = open('/proc/self/status').read()\n"
        "peak = int(status.partition('VmHWM:')[2].split()[0]) / 1024\n"
        "print(json.dumps([code, sorted(sys.modules), peak]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    code, modules, peak_mb = json.loads(done.stdout)
    assert code == 0
    assert read_result(folder, 0).error == ""
    unwanted = {
        "torch",
        "onnx",
        "onnxruntime",
        "scipy",
        "pandas",
        "sklearn",
        "paho",
        "sqlite_utils",
        "sqlite3",
        "psutil",
    }
    assert not unwanted & {name.partition(".")[0] for name in modules}
    assert peak_mb < 80


def test_a_killed_learner_leaves_the_champion_untouched(folder, process):
    job().save(folder)
    InlineExecutor().start(folder)
    assert (folder / CHALLENGER).exists()
    job(passes=10_000_000).save(folder)
    before = (folder / JOB_NPZ).read_bytes()
    process.start(folder)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    result = wait_for(process)
    assert "ended with code -9" in result.error
    assert not (folder / CHALLENGER).exists(), "the challenger of a job before"
    assert not (folder / RESULT_JSON).exists()
    assert (folder / JOB_NPZ).read_bytes() == before
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
        given.fresh.targets[0] = 3
    elif part == "width":
        given = replace(given, replay=replace(given.replay, latents=given.replay.latents[:, :-1]))
    elif part == "count":
        given = replace(given, fresh=replace(given.fresh, latents=given.fresh.latents[:-1]))
    else:
        given = replace(given, anchor={"W0": given.anchor["W0"]})
    given.save(folder)
    executor = new_executor(kind)
    executor.start(folder)
    assert "do not fit its head" in wait_for(executor).error


@pytest.mark.parametrize("kind", ["process", "inline"])
@pytest.mark.parametrize(
    ("learner", "error"),
    [
        ("buggy", "ZeroDivisionError: division by zero"),
        ("greedy", "MemoryError: no room for 8 GB"),
        ("silent", "TypeError: "),
        ("wider", "LearnError: the learner 'own_learners:wider' gave a head of 4 labels"),
    ],
)
def test_whatever_a_users_learner_does_wrong_is_an_error_result(folder, learners, kind, learner, error):
    job(learner=f"own_learners:{learner}").save(folder)
    executor = new_executor(kind)
    executor.start(folder)
    assert wait_for(executor).error.startswith(error)
    assert not (folder / CHALLENGER).exists()


def test_a_failed_job_tells_its_cpu_time_too(folder, learners):
    job(learner="own_learners:buggy").save(folder)
    executor = InlineExecutor()
    executor.start(folder)
    assert executor.poll().seconds > 0


# ---- pausing


def test_a_pause_in_the_middle_changes_no_byte(tmp_path, learners, process, monkeypatch):
    count = tmp_path / "count"
    monkeypatch.setenv("COUNT", str(count))
    monkeypatch.setenv("PAUSED", str(tmp_path / "paused" / PAUSE))
    challengers = []
    for name, learner in (("straight", "steady"), ("paused", "midway")):
        folder = tmp_path / name
        folder.mkdir()
        job(learner=f"own_learners:{learner}").save(folder)
        process.start(folder)
        if name == "paused":
            wait_until(lambda: count.exists() and len(count.read_bytes()) == 14)
            process.pause()
            assert process.paused
            threading.Event().wait(0.3)
            assert process.poll() is None
            assert len(count.read_bytes()) == 14
            process.resume()
            assert not process.paused
        assert wait_for(process).steps == 30
        challengers.append((folder / CHALLENGER).read_bytes())
    assert challengers[0] == challengers[1]
    assert len(count.read_bytes()) == 30


def test_the_learner_that_comes_with_the_sdk_stops_between_batches_and_loses_nothing(tmp_path):
    challengers, waits = [], []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            (folder / PAUSE).unlink()

    for name in ("straight", "paused"):
        folder = tmp_path / name
        folder.mkdir()
        job().save(folder)
        if name == "paused":
            (folder / PAUSE).touch()
        assert run_job(folder, hold(folder, os.getppid(), sleep=sleep)).error == ""
        challengers.append((folder / CHALLENGER).read_bytes())
    assert waits == [0.2, 0.2, 0.2]
    assert challengers[0] == challengers[1]


@pytest.mark.parametrize("kind", ["process", "inline"])
def test_a_job_that_starts_paused_waits_and_gives_the_same_result(folder, kind):
    job().save(folder)
    executor = new_executor(kind)
    executor.pause()
    executor.start(folder)
    assert executor.paused
    assert executor.poll() is None
    assert not (folder / RESULT_JSON).exists()
    assert executor.worked_s == 0
    executor.resume()
    assert wait_for(executor).error == ""
    challenger = (folder / CHALLENGER).read_bytes()
    InlineExecutor().start(folder)
    assert (folder / CHALLENGER).read_bytes() == challenger


@pytest.mark.parametrize("kind", ["process", "inline"])
@pytest.mark.parametrize("end", ["cancelled", "by itself"])
def test_a_pause_ends_with_its_job(folder, kind, end):
    job().save(folder)
    executor = new_executor(kind)
    if end == "cancelled":
        executor.pause()
    executor.start(folder)
    if end == "cancelled":
        executor.cancel()
    else:
        wait_until((folder / RESULT_JSON).exists)
        executor.pause()
        wait_for(executor)
    assert not executor.paused
    executor.resume()
    assert executor.poll() is None
    executor.start(folder)
    assert wait_for(executor).error == ""


def test_a_cancelled_job_does_not_run_at_resume(folder):
    job().save(folder)
    executor = InlineExecutor()
    executor.pause()
    executor.start(folder)
    executor.cancel()
    executor.resume()
    assert executor.poll() is None
    assert not (folder / RESULT_JSON).exists()


def test_pauses_do_not_count_as_work(folder, learners):
    now = 100.0
    process = ProcessExecutor(clock=lambda: now)
    job(learner="own_learners:endless").save(folder)
    try:
        assert process.worked_s == 0
        process.start(folder)
        now += 10
        assert process.worked_s == 10
        process.pause()
        process.pause()
        now += 1_000
        assert process.worked_s == 10
        process.resume()
        process.resume()
        now += 5
        assert process.worked_s == 15
    finally:
        process.cancel()
    now += 99
    assert process.worked_s == 15
    job().save(folder)
    process.start(folder)
    assert process.worked_s == 0
    wait_for(process)


def test_a_learner_that_cannot_be_paused_is_told_and_works_on(folder, process, learners):
    job(learner="own_learners:endless").save(folder)
    process.start(folder)
    process._folder = folder / "gone"
    with pytest.raises(StoreError, match="the learner cannot be paused"):
        process.pause()
    assert not process.paused
    assert is_running(process.pid)


def test_a_learner_ends_when_its_parent_has_died():
    with pytest.raises(SystemExit) as end:
        hold(Path("anywhere"), os.getppid() + 1)()
    assert end.value.code == ORPHANED


@pytest.mark.parametrize("paused", [False, True])
def test_no_orphan_trains_on(folder, learners, paused):
    job(learner="own_learners:endless").save(folder)
    script = (
        "import sys, threading\n"
        "from pathlib import Path\n"
        "from edge_sdk.learn.executor import ProcessExecutor\n"
        f"sys.path.insert(0, {str(folder.parent / 'app')!r})\n"
        "executor = ProcessExecutor()\n"
        f"if {paused}: executor.pause()\n"
        f"executor.start(Path({str(folder)!r}))\n"
        "print(executor.pid, flush=True)\n"
        "threading.Event().wait()\n"
    )
    device = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    with device:
        pid = int(device.stdout.readline())
        assert is_running(pid)
        device.kill()
    wait_until(lambda: not is_running(pid))
    assert not (folder / RESULT_JSON).exists()


def test_all_others_come_before_the_learner(folder, process, learners):
    job(learner="own_learners:endless").save(folder)
    process.start(folder)
    child = psutil.Process(process.pid)
    assert child.nice() == 19
    assert child.ionice().ioclass == psutil.IOPRIO_CLASS_IDLE
    assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == "1000\n"


# ---- ends


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
    assert "usage: python -m edge_sdk.learn.worker JOBDIR [PARENT]" in done.stderr
