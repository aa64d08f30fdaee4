"""Avalanche 0.6 on the streams of the forgetting benchmark, in an environment of its own.

    python avalanche_peer.py --job JOB.npz --out OUT.jsonl [--strategies replay der++] [--sizes 50 500] [--seeds 0 1]

JOB.npz (no pickles) is one scenario; images are uint8 [N, 28, 28], labels int64 [N]:

    scenario                        "class-incremental" or "domain-drift"
    state/NAME                      the factory's state_dict, 10 outputs; unseen classes: weights 0, bias about -5
    base_x, base_y                  the factory's training data: fills buffers, gives EWC its first Fisher information
    exp1_x, exp1_y, exp2_x, ...     the experiences, in order
    val_x, val_y, test_x, test_y    all classes; val is from the training set and shares nothing with the above
    drifted_{val,test}_{x,y}        domain-drift only

OUT.jsonl gets one line as soon as it is known, and what stands there is not run again:

    {"kind": "trial", scenario, strategy, mem_size, params, accuracy}     tuning: seed 0, validation rows
    {"kind": "run", scenario, strategy, mem_size, seed, params, ...}      the measurement on the test rows

A run's `accuracy_matrix` has one row per state of the model (first the factory's) and one column per entry of `tasks`:
the classes of base and of each experience, null before they were seen; or "original" and "drifted".
`final_average_accuracy` is over all test rows, `task_average_accuracy` the mean of the last row. Forgetting is as in
Chaudhry et al. 2018, backward transfer as in Lopez-Paz and Ranzato 2017. CPU time is all that `strategy.train` takes on
the experiences, with its upkeep of buffers and importances; a step is a gradient step (of SLDA: a batch of 8).
"""

# ruff: noqa: E402 - what Avalanche imports must be prepared first

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import itertools
import json
import math
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

warnings.showwarning = lambda *_, **__: None  # Avalanche warns of its own deprecations whatever the filter
sys.modules.setdefault("wandb", ModuleType("wandb"))  # imported by a logger that nothing here uses
try:
    import torchvision  # noqa: F401
except RuntimeError:  # built for CUDA beside a CPU torch: declare its operators, which Avalanche needs for nothing here
    _OPERATORS = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from avalanche.benchmarks import tensors_benchmark
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, ReplayPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer
from avalanche.training.supervised import DER, ER_ACE, GDumb, Naive, StreamingLDA

CLASSES, LATENT, PIXELS = 10, 128, 784
NEW, REPLAYED = 8, 56  # rows of each in a step
GRID: dict[str, tuple[float, ...]] = {
    "lr": (0.001, 0.003, 0.01, 0.03),
    "ewc_lambda": (1, 10, 100),
    "alpha": (0.5, 0.1),  # of DER++, whose beta is 1
    "freeze_bn": (False, True),
    "epochs": (1, 4),
    "shrinkage": (1e-4, 1e-2),
}
# Searched one group after the other. Batches of old and new images together never gained by frozen normalisation.
KNOBS: dict[str, tuple[tuple[str, ...], ...]] = {
    "naive": (("lr", "freeze_bn"), ("epochs",)),
    "ewc": (("lr", "freeze_bn"), ("ewc_lambda",), ("epochs",)),
    "ewc-online": (("lr", "freeze_bn"), ("ewc_lambda",), ("epochs",)),
    "slda": (("shrinkage",),),
    "replay": (("lr",), ("epochs",)),
    "ewc+replay": (("lr",), ("ewc_lambda",), ("epochs",)),
    "der++": (("lr",), ("alpha",), ("epochs",)),
    "er-ace": (("lr", "freeze_bn"), ("epochs",)),
    "gdumb": (("lr",), ("epochs",)),
}
WITHOUT_BUFFER = {"naive", "ewc", "ewc-online", "slda"}
SIZES = {"class-incremental": (0, 50, 200, 500, 1500), "domain-drift": (0, 50, 500)}

Images = tuple[Tensor, Tensor]
Params = dict[str, float]


class Net(nn.Module):
    """The factory's network, with the scaling of pixels inside, so that buffers hold bytes."""

    def __init__(self, *, freeze_bn: bool = False) -> None:
        super().__init__()
        self.freeze_bn = freeze_bn
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
            nn.Linear(64 * 49, LATENT), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(LATENT, CLASSES)

    def train(self, mode: bool = True) -> Net:  # noqa: FBT001, FBT002 - torch's signature
        """Avalanche calls this before each experience; frozen batch normalisation keeps the factory's statistics."""
        super().train(mode)
        for layer in self.trunk:
            if self.freeze_bn and isinstance(layer, nn.BatchNorm2d):
                layer.eval()
        return self

    def latents(self, x: Tensor) -> Tensor:
        """uint8 [N, 28, 28] to float32 [N, 128]."""
        return self.trunk(x[:, None].float() / 255)

    def forward(self, x: Tensor) -> Tensor:
        """uint8 [N, 28, 28] to logits [N, 10]."""
        return self.head(self.latents(x))


class Features(Net):
    """The same network seen by SLDA, which has its own classifier."""

    def forward(self, x: Tensor) -> Tensor:
        """uint8 [N, 28, 28] to float32 [N, 128]."""
        return self.latents(x)


@dataclass(frozen=True)
class Job:
    """What JOB.npz holds; `experiences[0]` is the factory's own."""

    scenario: str
    state: dict[str, Tensor]
    base: Images
    experiences: Sequence[Any]
    new_rows: int
    tasks: list[str]
    val: list[Images]  # one for each task
    test: list[Images]


def read_job(path: Path) -> Job:
    """Read a job; the format stands at the top of this file."""
    with np.load(path, allow_pickle=False) as file:
        scenario = str(file["scenario"])
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "scenario"}

    def images(name: str) -> Images:
        return arrays[f"{name}_x"], arrays[f"{name}_y"]

    count = sum(name.startswith("exp") and name.endswith("_x") for name in arrays)
    stream = [images("base"), *(images(f"exp{i}") for i in range(1, count + 1))]
    benchmark = tensors_benchmark(train_tensors=stream, test_tensors=stream[:1], task_labels=[0] * len(stream),
                                  complete_test_set_only=True)  # fmt: skip
    groups = [y.unique() for _, y in stream]

    def by_task(name: str) -> list[Images]:
        if scenario == "domain-drift":
            return [images(name), images(f"drifted_{name}")]
        x, y = images(name)
        return [(x[rows], y[rows]) for rows in (torch.isin(y, group) for group in groups)]

    return Job(
        scenario=scenario,
        state={name.removeprefix("state/"): value for name, value in arrays.items() if name.startswith("state/")},
        base=stream[0],
        experiences=benchmark.train_stream,
        new_rows=sum(len(y) for _, y in stream[1:]),
        tasks=["original", "drifted"]
        if scenario == "domain-drift"
        else [",".join(map(str, g.tolist())) for g in groups],
        val=by_task("val"),
        test=by_task("test"),
    )


class FactoryEWC(EWCPlugin):
    """Avalanche's plugin; what it computes on the factory's own data is kept for the next run."""

    kept: tuple[Any, Any] | None = None

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Take importances and anchors after an experience."""
        if strategy.clock.train_exp_counter > 0:
            super().after_training_exp(strategy, **kwargs)
            return
        if FactoryEWC.kept is None:
            with torch.random.fork_rng(devices=[]):  # so that this run and the next draw the same batches
                super().after_training_exp(strategy, **kwargs)
            FactoryEWC.kept = self.importances[0], self.saved_params[0]
        self.importances[0], self.saved_params[0] = FactoryEWC.kept


def build(job: Job, name: str, mem_size: int, params: Params) -> Any:
    """An Avalanche strategy around the factory's weights."""
    net = Features() if name == "slda" else Net(freeze_bn=bool(params.get("freeze_bn")))
    net.load_state_dict(job.state)  # strict: every name and shape must match
    net.to(memory_format=torch.channels_last)  # a fifth faster on a CPU, same results
    loss, evaluator = nn.CrossEntropyLoss(), EvaluationPlugin()
    if name == "slda":
        return StreamingLDA(slda_model=net, criterion=loss, input_size=LATENT, num_classes=CLASSES, train_mb_size=NEW,
                            shrinkage_param=params["shrinkage"], evaluator=evaluator)  # fmt: skip
    batch, epochs, replayed = NEW, int(params["epochs"]), min(REPLAYED, mem_size)
    if name == "gdumb":  # trains on its buffer alone: as many steps, of as many rows, as the others
        batch = NEW + REPLAYED
        steps = epochs * job.new_rows / (len(job.experiences) - 1) / NEW
        epochs = max(1, round(steps / math.ceil(mem_size / batch)))
    common: dict[str, Any] = {
        "model": net, "criterion": loss, "train_mb_size": batch, "train_epochs": epochs, "evaluator": evaluator,
        "optimizer": torch.optim.SGD(net.parameters(), lr=params["lr"], momentum=0.9),
    }  # fmt: skip
    match name:
        case "der++":
            return DER(mem_size=mem_size, batch_size_mem=replayed, alpha=params["alpha"], beta=1.0, **common)
        case "er-ace":
            return ER_ACE(mem_size=mem_size, batch_size_mem=replayed, **common)
        case "gdumb":
            return GDumb(mem_size=mem_size, **common)
    plugins: list[Any] = []
    if "replay" in name:
        plugins.append(ReplayPlugin(mem_size, NEW, REPLAYED, storage_policy=ClassBalancedBuffer(mem_size)))
    if name == "ewc":
        plugins.append(FactoryEWC(params["ewc_lambda"]))
    elif "ewc" in name:
        plugins.append(FactoryEWC(params["ewc_lambda"], mode="online", decay_factor=1.0))
    return Naive(plugins=plugins, **common)


def start(strategy: Any, job: Job) -> None:
    """Show a strategy the factory's data without training: it fills its buffer, takes importances or fits its means."""
    if isinstance(strategy, StreamingLDA):
        x, y = job.base
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            strategy.fit_base(torch.cat([strategy.model(rows) for rows in x.split(64)]), y)
        return
    epochs, batch = strategy.train_epochs, strategy.train_mb_size
    strategy.train_epochs = 0
    if isinstance(strategy, DER):
        strategy.train_mb_size = 64  # here the batch of a forward pass alone, for the logits to keep
    strategy.train(job.experiences[0], eval_streams=[])
    strategy.train_epochs, strategy.train_mb_size = epochs, batch


@torch.no_grad()
def accuracy(strategy: Any, images: Images) -> float:
    """Share of correct answers among all ten classes."""
    strategy.model.eval()
    right = 0
    for x, y in zip(*(part.split(64) for part in images), strict=True):
        out = strategy.model(x)
        right += int(((strategy.predict(out) if isinstance(strategy, StreamingLDA) else out).argmax(1) == y).sum())
    return right / len(images[1])


def state_bytes(strategy: Any) -> int:
    """What is kept beside the model: buffered images (and logits), importances and anchors, or SLDA's moments."""
    if isinstance(strategy, StreamingLDA):
        return 4 * (strategy.muK.numel() + strategy.cK.numel() + strategy.Sigma.numel())
    total = 0
    for part in (strategy, *strategy.plugins):
        if hasattr(part, "storage_policy"):
            total += len(part.storage_policy.buffer) * (PIXELS + (4 * CLASSES if isinstance(part, DER) else 0))
        if isinstance(part, EWCPlugin):
            kept = [*part.importances.values(), *part.saved_params.values()]
            total += 4 * sum(value.data.numel() for group in kept for value in group.values())
    return total


def forget_peak_memory() -> None:
    """Let the peak of resident memory start again, where the kernel can (Linux)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def plain_mean(row: list[float | None], images: list[Images]) -> float:
    """Accuracy over the rows of all tasks."""
    return float(np.average(np.array(row, float), weights=[len(y) for _, y in images]))


def validate(job: Job, name: str, mem_size: int, params: Params) -> float:
    """Accuracy on the validation rows after the last experience."""
    RNGManager.set_random_seeds(0)
    strategy = build(job, name, mem_size, params)
    start(strategy, job)
    strategy.train(job.experiences[1:], eval_streams=[])
    return plain_mean([accuracy(strategy, images) for images in job.val], job.val)


def measure(job: Job, name: str, mem_size: int, params: Params, seed: int) -> dict[str, Any]:
    """One run over all experiences, as it is written to OUT.jsonl."""
    RNGManager.set_random_seeds(seed)
    strategy = build(job, name, mem_size, params)
    start(strategy, job)
    drift = job.scenario == "domain-drift"

    def row(seen: int) -> list[float | None]:
        return [accuracy(strategy, images) if drift or i < seen else None for i, images in enumerate(job.test)]

    matrix, cpu_s = [row(1)], 0.0
    forget_peak_memory()
    for i, experience in enumerate(job.experiences[1:], 2):
        began = time.process_time()
        strategy.train(experience, eval_streams=[])
        cpu_s += time.process_time() - began
        matrix.append(row(i))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    table = np.array(matrix, float)
    old = range(len(job.tasks) - 1)  # task j is learned in row j; nothing can be forgotten of the last
    return {
        "tasks": job.tasks,
        "accuracy_matrix": matrix,
        "final_average_accuracy": plain_mean(matrix[-1], job.test),
        "task_average_accuracy": float(table[-1].mean()),
        "forgetting": float(np.mean([table[j:-1, j].max() - table[-1, j] for j in old])),
        "backward_transfer": float(np.mean([table[-1, j] - table[j, j] for j in old])),
        "original": matrix[-1][0] if drift else None,
        "drifted": matrix[-1][1] if drift else None,
        "cpu_s_per_sample": cpu_s / job.new_rows,
        "ms_per_step": 1e3 * cpu_s / strategy.clock.train_iterations,
        "peak_rss_mb": peak_mb,
        "state_bytes": state_bytes(strategy),
        "diverged": not all(bool(value.isfinite().all()) for value in strategy.model.parameters()),
    }


def search(groups: Sequence[Sequence[str]], score: Callable[[Params], float]) -> Params:
    """The best parameters of each group, the later ones at their first values; ties go to what stands first."""
    params = {knob: GRID[knob][0] for group in groups for knob in group}
    for group in groups:
        cells = itertools.product(*(GRID[knob] for knob in group))
        params = max(({**params, **dict(zip(group, values, strict=True))} for values in cells), key=score)
    return params


class Record:
    """OUT.jsonl: lines are added, and those that stand there are known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The line that has all these values."""
        return next((line for line in self.lines if key.items() <= line.items()), None)

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        """Write a line to the disk."""
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line


def main() -> None:
    """Tune on the validation rows and measure on the test rows, for each strategy, size and seed that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strategies", nargs="+", choices=KNOBS, default=list(KNOBS))
    parser.add_argument("--sizes", nargs="+", type=int, help="samples in the buffer; 0: strategies without one")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--scenario", choices=SIZES, help="do nothing if the job is of the other")
    parser.add_argument("--tune", action="store_true", help="tune only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    job, record = read_job(args.job), Record(args.out)
    if args.scenario not in (None, job.scenario):
        return
    cells = [(name, size) for size in args.sizes or SIZES[job.scenario] for name in args.strategies
             if (size == 0) == (name in WITHOUT_BUFFER)]  # fmt: skip
    for name, size in cells:
        cell = {"scenario": job.scenario, "strategy": name, "mem_size": size}

        def score(params: Params, name: str = name, size: int = size, cell: dict[str, Any] = cell) -> float:
            key = {"kind": "trial", **cell, "params": params}
            line = record.find(key) or record.add({**key, "accuracy": validate(job, name, size, params)})
            return float(line["accuracy"])

        params = search(KNOBS[name], score)
        print(f"{name} {size}: {params}, validation accuracy {score(params):.3f}", flush=True)
        for seed in [] if args.tune else args.seeds:
            key = {"kind": "run", **cell, "seed": seed}
            run = record.find(key) or record.add({**key, "params": params, **measure(job, name, size, params, seed)})
            print(f"  seed {seed}: {run['final_average_accuracy']:.3f}, forgetting {run['forgetting']:.3f}, "
                  f"{run['ms_per_step']:.1f} ms a step", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
