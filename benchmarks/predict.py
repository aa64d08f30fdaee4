"""What serving costs: INT8 against FP32, `predict` against bare sessions, memory, start, and latency while learning.

All ratios come from measurements that take turns in one run, on one thread. Run from the root, with nothing else busy:

    make bench-predict

Writes predict.json and predict.md beside this file. What was expected before measuring stands in EXPECTED.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np

from demo import factory
from edge_quantize import Dataset, QuantRecipe, build_checkpoint, export_onnx, quantize_trunk, split
from edge_quantize.calibrate import Calibration
from edge_quantize.quantize import head_graph
from edge_sdk import DeviceConfig, EdgeDevice, Head, __version__, verify_checkpoint
from edge_sdk.config import DriftConfig, LearnConfig, PolicyConfig
from edge_sdk.fuse import fuse
from edge_sdk.manifest import HEAD_NPZ, HEAD_ONNX, TRUNK_FP32, TRUNK_INT8
from edge_sdk.runtime import HeadSession, new_session
from edge_sdk.schema import InputSpec
from edge_sdk.selftest import choose_variant
from edge_sdk.stats import wilson_interval
from edge_server.broker import EmbeddedBroker

_PHASES = 5
RESULT = Path(__file__).with_suffix(".json")
CREATED = "2026-01-01T00:00:00Z"
EXPECTED = {
    "efficientnet int8 speed-up": "1.7, by the probe in DESIGN.md (7.9 ms against 13.7)",
    "cnn int8 speed-up": "below 1: so few multiplications do not pay for quantizing the activations",
    "predict overhead": "10 microseconds: two reductions, one copy, two small objects, one lock",
    "split overhead": "25 microseconds for the second call into the engine",
    "head swap": "3 ms for a session of one dense layer",
    "p99 while learning": "1.2: the child has the other core, but shares cache and memory",
}


# ---- checkpoints


def checkpoint(folder: Path, kind: str) -> Path:
    """A checkpoint of one of the networks, made once."""
    target = folder / kind
    if target.exists():
        return target
    if kind == "efficientnet":
        x, y = models.photo_crops("test", 720), models.photo_numbers("test", 720)
        train = slice(0, 480)
        data = Dataset(x[train], y[train], x[480:], y[480:], models.photo_crops("calibration", 100))
        net, labels, spec = (
            models.photo_net(),
            models.photo_labels(),
            InputSpec(shape=[3, 224, 224], low=-1.1, high=1.1),
        )
    elif kind == "mlp":
        motions = models.basic_motions()
        data = Dataset(motions.train_x, motions.train_y, motions.test_x, motions.test_y)
        net, labels, spec = (
            models.motion_mlp(),
            list(models.MOTIONS),
            InputSpec(shape=list(motions.train_x.shape[1:])),
        )
    else:
        digits = factory.load(seed=0)
        base = digits.factory.only(set(range(8)))
        half = len(base.y) // 2
        data = Dataset(base.x[:half], base.y[:half], base.x[half:], base.y[half:])
        net, labels, spec = models.demo_cnn(), [str(i) for i in range(8)], factory.SPEC
    build_checkpoint(
        net, data, labels=labels, name=kind, release=1, target=target, created=CREATED, input_spec=spec,
        measure_memory=False,
    )  # fmt: skip
    return target


def samples(kind: str, count: int) -> np.ndarray:
    """Inputs as the device sees them."""
    if kind == "efficientnet":
        return models.photo_crops("test", count)
    if kind == "mlp":
        return models.basic_motions().test_x[:count]
    base = factory.load(seed=0).factory.only(set(range(8)))
    return base.x[np.arange(count) % len(base.y)]


def sample(kind: str) -> np.ndarray:
    """One input."""
    return samples(kind, 1)[0]


# ---- timing


def in_turns(
    runs: dict[str, Callable[[], object]], *, rounds: int, before: Callable[[], object] = lambda: None
) -> dict[str, np.ndarray]:
    """Microseconds of each call. The runs take turns, so that a busy moment strikes all.

    Args:
        runs: What is timed, by name.
        rounds: How many calls of each.
        before: Called before each timed call: what an app does just before it predicts.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(5):
            run()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in runs.items():
                before()
                start = time.perf_counter_ns()
                run()
                times[name].append((time.perf_counter_ns() - start) / 1000)
    finally:
        gc.enable()
    return {name: np.array(values) for name, values in times.items()}


def bare(folder: Path, trunk: str) -> Callable[[np.ndarray], np.ndarray]:
    """The two sessions and nothing else."""
    first, second = new_session(folder / trunk), new_session(folder / HEAD_ONNX)
    name = first.get_inputs()[0].name

    def run(x: np.ndarray) -> np.ndarray:
        latent = first.run(["latent"], {name: x})[0]
        return second.run(["probabilities"], {"latent": latent})[0]

    return run


# ---- the measurements


def variants(folder: Path, kind: str, rounds: int) -> dict[str, Any]:
    """INT8 against FP32 at batch 1, and which of them a device serves."""
    place = checkpoint(folder, kind)
    x = sample(kind)[None]
    int8, fp32 = bare(place, TRUNK_INT8), bare(place, TRUNK_FP32)
    times = in_turns({"int8": lambda: int8(x), "fp32": lambda: fp32(x)}, rounds=rounds)
    size = {name: (place / name).stat().st_size for name in (TRUNK_INT8, TRUNK_FP32, HEAD_ONNX)}
    manifest = verify_checkpoint(place)
    choice = choose_variant(place, manifest, "auto")
    return {
        "int8_ms": np.median(times["int8"]) / 1000,
        "fp32_ms": np.median(times["fp32"]) / 1000,
        "speed_up": np.median(times["fp32"]) / np.median(times["int8"]),
        "trunk_size_ratio": size[TRUNK_INT8] / size[TRUNK_FP32],
        "size_ratio": (size[TRUNK_INT8] + size[HEAD_ONNX]) / (size[TRUNK_FP32] + size[HEAD_ONNX]),
        "served": choice.variant,
        "reason": choice.reason,
        "agreement": manifest.metrics["agreement"],
        "int8_accuracy": manifest.metrics["int8_accuracy"],
        "fp32_accuracy": manifest.metrics["fp32_accuracy"],
    }


def agreement(crops: int) -> dict[str, Any]:
    """Top-1 agreement of INT8 with FP32 on ImageNet's 1000 labels, for each recipe tried; photos kept apart."""
    x = models.photo_crops("test", crops)
    parts = split(export_onnx(models.efficientnet(), x[:2]))
    head = Head(parts.weights, tuple(str(i) for i in range(parts.outputs)))
    calibration = models.photo_crops("calibration", 100)
    found: dict[str, Any] = {}
    for recipe in (
        QuantRecipe(),
        QuantRecipe(calibration=Calibration(method="percentile")),
        QuantRecipe(calibration=Calibration(method="entropy")),
        QuantRecipe(activation="int8"),
        QuantRecipe(per_channel=False),
    ):
        trunks = quantize_trunk(parts.trunk, calibration, recipe)
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            (place / TRUNK_INT8).write_bytes(trunks.int8)
            (place / TRUNK_FP32).write_bytes(trunks.fp32)
            (place / HEAD_ONNX).write_bytes(head_graph(head, trunks.latent))
            int8, fp32 = bare(place, TRUNK_INT8), bare(place, TRUNK_FP32)
            same = sum(int(int8(row[None]).argmax() == fp32(row[None]).argmax()) for row in x)
        low, high = wilson_interval(same, crops)
        found[recipe.name] = {"agreement": same / crops, "low": low, "high": high}
    best = max(found.values(), key=lambda result: result["agreement"])
    default = found[QuantRecipe().name]["agreement"]
    return {"recipes": found, "crops": crops, "default_within_best": best["low"] <= default}


def overhead(folder: Path, kind: str, rounds: int) -> dict[str, Any]:
    """`predict`, with checks, monitors and logging on and the maintenance thread running, against the bare sessions."""
    place, x = checkpoint(folder, kind), sample(kind)
    variant = "int8" if kind == "efficientnet" else choose_variant(place, verify_checkpoint(place), "auto").variant
    batch, original = x[None], x.copy()
    with tempfile.TemporaryDirectory() as home:
        config = DeviceConfig(variant=variant, durability="normal")
        with EdgeDevice(home, checkpoint=place, config=config) as device:
            model: Any = device._served.model  # noqa: SLF001 - the very same two sessions
            first, second = model.trunk._session, model.head._session  # noqa: SLF001
            name = first.get_inputs()[0].name

            def run() -> np.ndarray:
                latent = first.run(["latent"], {name: batch})[0]
                return second.run(["probabilities"], {"latent": latent})[0]

            # an app has just written its input: a camera frame, a window of samples
            times = in_turns(
                {"bare": run, "predict": lambda: device.predict(x)},
                rounds=rounds,
                before=lambda: np.copyto(x, original),
            )
            device.step()
            counted = device.status().counters.predictions
    p50 = {name: np.median(values) for name, values in times.items()}
    return {
        "variant": variant,
        "bare_us": p50["bare"],
        "predict_us": p50["predict"],
        "added_us": p50["predict"] - p50["bare"],
        "ratio": p50["predict"] / p50["bare"],
        "logged": counted,
    }


def split_cost(folder: Path, kind: str, rounds: int) -> dict[str, Any]:
    """Trunk and head in two sessions against the same in one graph."""
    place = checkpoint(folder, kind)
    manifest = verify_checkpoint(place)
    run = bare(place, TRUNK_INT8)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "fused.onnx"
        path.write_bytes(fuse(place, manifest, Head.load(place / HEAD_NPZ), "int8"))
        fused = new_session(path)
    given = fused.get_inputs()[0].name
    result: dict[str, Any] = {}
    for size in (1, 32):
        x = np.repeat(sample(kind)[None], size, axis=0)
        times = in_turns(
            {"split": lambda x=x: run(x), "fused": lambda x=x: fused.run(["probabilities"], {given: x})},
            rounds=rounds if size == 1 else max(20, rounds // 20),
        )
        p50 = {key: np.median(values) for key, values in times.items()}
        result |= {
            f"batch_{size}_added_us": p50["split"] - p50["fused"],
            f"batch_{size}_ratio": p50["split"] / p50["fused"],
        }
    return result


def head_swap(folder: Path, kind: str) -> dict[str, Any]:
    """From learned weights to a warmed session, against exporting and quantizing the network again."""
    place = checkpoint(folder, kind)
    head = Head.load(place / HEAD_NPZ)
    rng = np.random.default_rng(0)
    learned = Head(
        {k: v + rng.normal(0, 1e-3, v.shape).astype(np.float32) for k, v in head.weights.items()}, head.labels
    )
    swap = np.median(in_turns({"swap": lambda: HeadSession(place / HEAD_ONNX, learned)}, rounds=50)["swap"]) / 1000
    x = models.photo_crops("calibration", 100) if kind == "efficientnet" else np.repeat(sample(kind)[None], 100, axis=0)
    net = {"efficientnet": models.efficientnet, "mlp": models.motion_mlp, "cnn": models.demo_cnn}[kind]()
    if kind != "efficientnet":
        x = x + rng.normal(0, 0.1, x.shape).astype(np.float32)
    start = time.perf_counter()
    quantize_trunk(split(export_onnx(net, x[:2])).trunk, x)
    export = (time.perf_counter() - start) * 1000
    return {"swap_ms": swap, "re_export_ms": export, "times_faster": export / swap}


_MEMORY = """
import os, sys, numpy as np
from edge_sdk import DeviceConfig, EdgeDevice
from edge_sdk.config import BrokerConfig, DriftConfig
home, place, port, x = sys.argv[1], sys.argv[2], int(sys.argv[3]), np.load(sys.argv[4])
transport = None
if port:
    from edge_sdk.mqtt import MqttTransport
    transport = MqttTransport("127.0.0.1", port, client_id="bench")
device = EdgeDevice(home, checkpoint=place, config=DeviceConfig(device="bench", variant="int8"), transport=transport)
if transport:
    device.connect()
for _ in range(40):
    for _ in range(8):
        device.observe(device.predict(x).id, device.labels[0])
    device.step()
assert not transport or device.connected, "no connection to the broker"
rss = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
assert "torch" not in sys.modules
print(rss, device.status().counters.predictions)
device.stop()
"""

_READY = """
import sys, time, numpy as np
import onnxruntime
from edge_sdk import DeviceConfig, EdgeDevice
from edge_sdk.runtime import new_session
import edge_sdk.database, psutil, sqlite3, sqlite_utils
from pathlib import Path
home, place, x = sys.argv[1], Path(sys.argv[2]), np.load(sys.argv[3])
def device():
    EdgeDevice(home, config=DeviceConfig(variant="int8")).predict(x)
def bare():
    first, second = new_session(place / "trunk.int8.onnx"), new_session(place / "head.onnx")
    latent = first.run(["latent"], {first.get_inputs()[0].name: x[None]})[0]
    second.run(["probabilities"], {"latent": latent})
order = [device, bare] if sys.argv[4] == "device" else [bare, device]
start = time.perf_counter()
order[0]()
print((time.perf_counter() - start) * 1000)
"""


def in_a_process(code: str, *arguments: object) -> list[float]:
    """Numbers that a fresh Python prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True, env=environment
    )
    return [float(number) for number in done.stdout.split()]


def memory(folder: Path) -> dict[str, Any]:
    """Resident memory of a device in a process of its own, without and with MQTT."""
    place = checkpoint(folder, "efficientnet")
    np.save(folder / "x.npy", sample("efficientnet"))
    with tempfile.TemporaryDirectory() as home:
        arguments = (Path(home) / "device", place)
        installing = in_a_process(_MEMORY, *arguments, 0, folder / "x.npy")
        alone = in_a_process(_MEMORY, *arguments, 0, folder / "x.npy")
        with EmbeddedBroker() as broker:
            connected = in_a_process(_MEMORY, *arguments, broker.port, folder / "x.npy")
    return {"rss_mb": alone[0], "rss_with_mqtt_mb": connected[0], "rss_of_the_installing_process_mb": installing[0]}


def ready(folder: Path, repeats: int) -> dict[str, Any]:
    """After imports: opening an installed device and predicting once, against loading the two sessions bare."""
    place = checkpoint(folder, "efficientnet")
    np.save(folder / "x.npy", sample("efficientnet"))
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / "device"
        EdgeDevice(home, checkpoint=place, config=DeviceConfig(variant="int8")).stop()
        times = {which: [] for which in ("device", "bare")}
        for _ in range(repeats):
            for which in times:
                times[which] += in_a_process(_READY, home, place, folder / "x.npy", which)
    p50 = {which: float(np.median(values)) for which, values in times.items()}
    return {"device_ms": p50["device"], "bare_ms": p50["bare"], "ratio": p50["device"] / p50["bare"]}


def while_learning(folder: Path, kind: str, *, every_s: float, seconds: float) -> dict[str, Any]:
    """Latency from the moment a request was due, with requests on a clock, while a child learns and while none does."""
    place, pool = checkpoint(folder, kind), samples(kind, 300)
    config = DeviceConfig(
        mode="shadow",
        variant="int8",
        durability="normal",
        drift=DriftConfig(rows_per_day=1e9),
        policy=PolicyConfig(cooldown_s=0.0, volume_rows=10**9),
        learn=LearnConfig(passes=2_000_000, max_seconds=3600, executor="process"),
    )
    late: dict[str, list[np.ndarray]] = {"idle": [], "learning": []}
    with tempfile.TemporaryDirectory() as home, EdgeDevice(home, checkpoint=place, config=config) as device:
        for _ in range(_PHASES):
            late["idle"].append(open_loop(device, pool, every_s, seconds))
            for row in pool:  # new labels, whatever the monitors made of the same few inputs over and over
                prediction = device.predict(row)
                device.observe(prediction.id, prediction.label)
            device.step()
            device.learn_now()
            until(lambda: device.status().phase == "training")
            late["learning"].append(open_loop(device, pool, every_s, seconds))
            if device.status().phase != "training":
                raise RuntimeError("learning ended before the measurement did")
            device._adaptation.abandon(time.time())  # noqa: SLF001 - ends the child: nothing else would
    # the median over the phases: a stall of the machine strikes one of them
    p99, p50 = (
        {name: float(np.median([np.quantile(part, level) for part in parts])) for name, parts in late.items()}
        for level in (0.99, 0.5)
    )
    return {
        "every_ms": every_s * 1000,
        "idle_p50_ms": p50["idle"],
        "learning_p50_ms": p50["learning"],
        "idle_p99_ms": p99["idle"],
        "learning_p99_ms": p99["learning"],
        "p99_ratio": p99["learning"] / p99["idle"],
    }


def open_loop(device: EdgeDevice, pool: np.ndarray, every_s: float, seconds: float) -> np.ndarray:
    """Milliseconds from when each request was due to its answer; a late answer delays none of the due times."""
    start = time.perf_counter()
    found = []
    for i in range(int(seconds / every_s)):
        due = start + i * every_s
        while (left := due - time.perf_counter()) > 0:
            time.sleep(left if left > 0.001 else 0)
        device.predict(pool[i % len(pool)])
        found.append((time.perf_counter() - due) * 1000)
    return np.array(found)


def until(happened: Callable[[], bool], *, seconds: float = 60.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise RuntimeError("it did not happen in time")
        time.sleep(0.05)


# ---- the table


def rows(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """What, target, measured, met."""
    net, cnn = found["variants"]["efficientnet"], found["variants"]["cnn"]
    agree = found["agreement"]
    default = agree["recipes"][QuantRecipe().name]
    table = [
        ("EfficientNet-Lite0 INT8 vs FP32, batch 1", ">= 1.7x", f"{net['speed_up']:.2f}x", net["speed_up"] >= 1.7),
        ("  trunk file INT8 / FP32", "<= 0.29x", f"{net['trunk_size_ratio']:.3f}x", net["trunk_size_ratio"] <= 0.29),
        ("  trunk and head of 8 labels", "<= 0.29x", f"{net['size_ratio']:.3f}x", net["size_ratio"] <= 0.29),
        (
            f"  agreement on {agree['crops']} crops, 1000 labels",
            "within the interval of the best recipe",
            f"{default['agreement']:.3f} ({default['low']:.3f} to {default['high']:.3f})",
            agree["default_within_best"],
        ),
        (
            "small CNN INT8 vs FP32, batch 1",
            ">= 1.4x, or FP32 is served",
            f"{cnn['speed_up']:.2f}x, {cnn['served']} is served",
            cnn["speed_up"] >= 1.4 or cnn["served"] == "fp32",
        ),
    ]
    for kind, cost in found["overhead"].items():
        limit = "<= 1.01x" if kind == "efficientnet" else "<= +15 us"
        met = cost["ratio"] <= 1.01 if kind == "efficientnet" else cost["added_us"] <= 15
        said = f"+{cost['added_us']:.1f} us ({cost['bare_us']:.1f} to {cost['predict_us']:.1f}, {cost['ratio']:.3f}x)"
        table.append((f"predict vs two bare sessions, {kind}", limit, said, met))
    for kind, cost in found["split"].items():
        one, many = cost["batch_1_added_us"], cost["batch_32_ratio"]
        table.append((f"trunk + head vs fused, {kind}, batch 1", "<= +40 us", f"{one:+.1f} us", one <= 40))
        table.append((f"trunk + head vs fused, {kind}, batch 32", "<= 1.03x", f"{many:.3f}x", many <= 1.03))
    for kind, swap in found["head_swap"].items():
        table.append(
            (f"head live after learning, {kind}", "<= 12 ms", f"{swap['swap_ms']:.1f} ms", swap["swap_ms"] <= 12)
        )
        times = swap["times_faster"]
        table.append((f"  against exporting again, {kind}", ">= 300x", f"{times:.0f}x", times >= 300))
    rss = found["memory"]
    table += [
        (
            "RSS, EfficientNet INT8: predict, monitors, store",
            "<= 90 MB",
            f"{rss['rss_mb']:.1f} MB",
            rss["rss_mb"] <= 90,
        ),
        ("  in the process that installed it", "-", f"{rss['rss_of_the_installing_process_mb']:.1f} MB", True),
        ("  with MQTT", "<= 110 MB", f"{rss['rss_with_mqtt_mb']:.1f} MB", rss["rss_with_mqtt_mb"] <= 110),
        (
            "ready to predict, after imports, vs bare sessions",
            "<= 1.5x",
            f"{found['ready']['ratio']:.2f}x ({found['ready']['bare_ms']:.0f} to {found['ready']['device_ms']:.0f} ms)",
            found["ready"]["ratio"] <= 1.5,
        ),
    ]
    for kind, late in found["while_learning"].items():
        said = f"{late['p99_ratio']:.2f}x ({late['idle_p99_ms']:.2f} to {late['learning_p99_ms']:.2f} ms)"
        table.append((f"p99 while learning vs idle, {kind}", "<= 1.5x", said, late["p99_ratio"] <= 1.5))
    return table


def main() -> None:
    """Measure, print, write."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="Few repeats, nothing is written.")
    options.add_argument(
        "--checkpoints", type=Path, default=None, help="Where to keep the checkpoints for the next run."
    )
    given = options.parse_args()
    warnings.simplefilter("ignore")
    scale = 10 if given.quick else 1
    kinds = ("mlp", "cnn", "efficientnet")
    rounds = {"mlp": 6000 // scale, "cnn": 4000 // scale, "efficientnet": 300 // scale}
    with tempfile.TemporaryDirectory() as name:
        folder = given.checkpoints or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        found = {
            "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
            "version": __version__,
            "expected": EXPECTED,
            "while_learning": {
                "cnn": while_learning(folder, "cnn", every_s=0.005, seconds=8 / scale),
                "efficientnet": while_learning(folder, "efficientnet", every_s=0.02, seconds=8 / scale),
            },
            "variants": {kind: variants(folder, kind, rounds[kind]) for kind in kinds},
            "agreement": agreement(64 if given.quick else 512),
            "overhead": {kind: overhead(folder, kind, rounds[kind]) for kind in kinds},
            "split": {kind: split_cost(folder, kind, rounds[kind] // 2) for kind in kinds},
            "head_swap": {kind: head_swap(folder, kind) for kind in kinds},
            "memory": memory(folder),
            "ready": ready(folder, 3 if given.quick else 11),
        }
    table = rows(found)
    lines = ["| | target | measured | met |", "|---|---|---|---|"]
    lines += [
        f"| {what.strip()} | {target} | {said} | {'yes' if met else '**no**'} |" for what, target, said, met in table
    ]
    for what, target, said, met in table:
        print(f"{'ok  ' if met else 'MISS'} {what:52} {target:40} {said}")
    if not given.quick:
        RESULT.write_text(json.dumps(found, indent=1, default=float) + "\n")
        RESULT.with_suffix(".md").write_text("\n".join(lines) + "\n")


def cpu_name() -> str:
    """As the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
