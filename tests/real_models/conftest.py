"""Real networks, exported and quantized once a session. The loaders are the benchmarks' own: benchmarks/models.py."""

from dataclasses import dataclass

import models
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto

from edge_quantize.calibrate import Calibration
from edge_quantize.export import export_onnx
from edge_quantize.graph import Split, split
from edge_quantize.quantize import Quantizer, QuantRecipe, Trunks, head_graph
from edge_sdk.head import Head, dequantize

CROPS = 512
CALIBRATION_CROPS = 64
METHODS = ("minmax", "percentile", "entropy")


@dataclass(frozen=True)
class Lite0:
    """EfficientNet-Lite0 in its parts, and what FP32 says about the test crops."""

    graph: ModelProto
    parts: Split
    trunks: dict[str, Trunks]
    head: Head
    crops: np.ndarray
    fp32_logits: np.ndarray

    def logits(self, method):
        """Of the INT8 trunk calibrated by `method`, with the float head."""
        trunks = self.trunks[method]
        return self.head.logits(dequantize(all_rows(trunks.int8, self.crops), trunks.latent))


@pytest.fixture(scope="session")
def lite0():
    crops = models.photo_crops("test", CROPS)
    graph = export_onnx(models.efficientnet(), crops[:2])
    parts = split(graph)
    quantizer = Quantizer(parts.trunk, models.photo_crops("calibration", CALIBRATION_CROPS))
    trunks = {m: quantizer.trunks(QuantRecipe(calibration=Calibration(method=m))) for m in METHODS}
    head = Head(parts.weights, tuple(str(i) for i in range(parts.outputs)))
    plain = trunks["minmax"]
    fp32 = head.logits(dequantize(all_rows(plain.fp32, crops), plain.latent))
    return Lite0(graph, parts, trunks, head, crops, fp32)


def one_session(model, *, threads=1, **options):
    """An engine session for a graph or its bytes; further options are attributes of `SessionOptions`."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    for name, value in options.items():
        setattr(settings, name, value)
    data = model.SerializeToString() if isinstance(model, ModelProto) else model
    return ort.InferenceSession(data, settings, providers=["CPUExecutionProvider"])


def all_rows(model, x, *, rows=32):
    """The first output of a model with one input, `rows` at a time, so that memory stays bounded."""
    session = one_session(model)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x[i : i + rows]})[0] for i in range(0, len(x), rows)])


@pytest.fixture(scope="session")
def open_session():
    return one_session


@pytest.fixture(scope="session")
def run_rows():
    return all_rows


@pytest.fixture(scope="session")
def assert_fused_equals_parts():
    """Checks that trunk and head in two sessions equal the same two in one graph, bit for bit."""

    def check(trunks, head, x, *, batches=(1, 7, 32), threads=(1, 2)):
        top = head_graph(head, trunks.latent)
        for trunk in (trunks.int8, trunks.fp32):
            parts = [onnx.load_from_string(trunk), onnx.compose.add_prefix(onnx.load_from_string(top), "head_")]
            fused = onnx.compose.merge_models(
                *parts, io_map=[("latent", "head_latent")], outputs=["head_probabilities"]
            )
            alone = all_rows(trunk, x[: max(batches)], rows=1)
            for count in threads:
                sessions = [one_session(model, threads=count) for model in (trunk, top, fused)]
                for batch in batches:
                    rows = x[:batch]
                    latents = sessions[0].run(None, {sessions[0].get_inputs()[0].name: rows})[0]
                    split = sessions[1].run(["probabilities"], {"latent": latents})[0]
                    whole = sessions[2].run(None, {sessions[2].get_inputs()[0].name: rows})[0]
                    assert latents.dtype == np.uint8
                    assert np.array_equal(latents, alone[:batch]), (count, batch)
                    assert split.tobytes() == whole.tobytes(), (count, batch)

    return check
