"""Flower's side of benchmarks/fleet.py, in an environment of its own: federated averaging of the same head.

Every client runs the same INT8 trunk over its own samples and takes gradient steps on the linear head, which the server
averages.
Reads a folder that fleet.py wrote, prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import cache
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
BEGAN = time.monotonic()

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
from flwr.client import ClientApp, NumPyClient  # noqa: E402
from flwr.common import Context, ndarrays_to_parameters  # noqa: E402
from flwr.server import ServerApp, ServerAppComponents, ServerConfig  # noqa: E402
from flwr.server.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402

FOLDER = Path(os.environ.get("EDGE_FLOWER_JOB") or sys.argv[1])
os.environ["EDGE_FLOWER_JOB"] = str(FOLDER)
JOB = json.loads((FOLDER / "job.json").read_text())


@cache
def trunk() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(FOLDER / "trunk.onnx", options, providers=["CPUExecutionProvider"])


def encode(x: np.ndarray) -> np.ndarray:
    session = trunk()
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    return (found.astype(np.float32) - JOB["zero_point"]) * JOB["scale"]


class Client(NumPyClient):
    """A client with its own samples."""

    def __init__(self, number: int) -> None:
        held = np.load(FOLDER / f"client-{number}.npz")
        self.x, self.y, self.number = held["x"], held["y"], number

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:  # noqa: ARG002
        w, b = (part.copy() for part in parameters)
        latents, rng = encode(self.x), np.random.default_rng(self.number)
        truth = np.eye(len(b), dtype=np.float32)[self.y]
        for _ in range(JOB["passes"]):
            for rows in np.array_split(rng.permutation(len(latents)), max(1, len(latents) // 8)):
                logits = latents[rows] @ w + b
                chances = np.exp(logits - logits.max(axis=1, keepdims=True))
                error = (chances / chances.sum(axis=1, keepdims=True) - truth[rows]) / len(rows)
                w -= 0.05 * latents[rows].T @ error
                b -= 0.05 * error.sum(axis=0)
        return [w, b], len(self.x), {}


def client_fn(context: Context) -> object:
    return Client(int(context.node_config["partition-id"])).to_client()


def server_fn(_context: Context) -> ServerAppComponents:
    head = np.load(FOLDER / "head.npz")
    strategy = FedAvg(
        fraction_fit=1.0, fraction_evaluate=0.0, min_fit_clients=JOB["clients"], min_available_clients=JOB["clients"],
        initial_parameters=ndarrays_to_parameters([head["w"], head["b"]]),
    )  # fmt: skip
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=JOB["rounds"]))


def main() -> None:
    run_simulation(
        server_app=ServerApp(server_fn=server_fn),
        client_app=ClientApp(client_fn=client_fn),
        num_supernodes=JOB["clients"],
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    print(json.dumps({"seconds": time.monotonic() - BEGAN}))


if __name__ == "__main__":
    main()
