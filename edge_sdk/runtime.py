"""Running the frozen trunk and the head: the `ModelRuntime` protocol and ONNX Runtime behind it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from edge_sdk.errors import RuntimeUnavailableError, SelfTestError
from edge_sdk.files import load_npz
from edge_sdk.head import Head
from edge_sdk.manifest import HEAD_NPZ, HEAD_ONNX, SELFTEST_NPZ, TRUNK_FP32, TRUNK_INT8, Manifest
from edge_sdk.types import FloatArray, LatentArray

if TYPE_CHECKING:
    import onnxruntime

Variant = Literal["int8", "fp32"]


class ModelRuntime(Protocol):
    """Turns checked, preprocessed inputs into latents. Thread-safe."""

    def latents(self, x: FloatArray) -> LatentArray:
        """float32 [N, ...] to uint8 [N, D]."""
        ...


def new_session(path: Path, *, initializers: Mapping[str, FloatArray] | None = None) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session: CPU, one thread, no spinning.

    Args:
        path: The model file.
        initializers: Arrays that replace the model's initializers of the same name, of any shape that fits.

    Raises:
        RuntimeUnavailableError: The engine refuses the model.
    """
    import onnxruntime as ort  # noqa: PLC0415 - importing the SDK stays light

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    values = []
    for name, array in (initializers or {}).items():
        value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        options.add_initializer(name, value)
        values.append(value)  # the engine reads them while it builds the session
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the engine's exceptions share no base class of their own
        # reported to the coordinator: no folder of this machine belongs into it
        said = str(error).replace(str(path), path.name)
        raise RuntimeUnavailableError(f"ONNX Runtime refuses {path.name}: {said}") from error


class OnnxRuntime:
    """The trunk in ONNX Runtime.

    Args:
        folder: A checkpoint folder.
        variant: Which of its two trunks; both put out the same uint8 latent scale.
    """

    def __init__(self, folder: Path, *, variant: Variant = "int8") -> None:
        self.variant = variant
        self._session = new_session(folder / (TRUNK_INT8 if variant == "int8" else TRUNK_FP32))
        self._input = self._session.get_inputs()[0].name
        self._output = self._session.get_outputs()[0].name

    def latents(self, x: FloatArray) -> LatentArray:
        """float32 [N, ...] to uint8 [N, D].

        Raises:
            RuntimeUnavailableError: The engine failed.
        """
        try:
            result: LatentArray = self._session.run([self._output], {self._input: x})[0]
        except Exception as error:
            raise RuntimeUnavailableError(f"the trunk failed: {error}") from error
        return result


class HeadSession:
    """A head served by ONNX Runtime: `head.onnx` with the given weights in place of its own.

    Thread-safe. Built off the request path; serving then replaces one reference.
    """

    def __init__(self, onnx_path: Path, head: Head) -> None:
        """Load and warm the session.

        Raises:
            RuntimeUnavailableError: The engine refuses the model or the weights.
        """
        self.head = head
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._session = new_session(onnx_path, initializers=head.weights)
        self.run(np.zeros((1, head.latent_dim), dtype=np.uint8))

    def run(self, latents: LatentArray) -> FloatArray:
        """Probabilities float32 [N, C] for uint8 latents [N, D]."""
        result: FloatArray = self._session.run(["probabilities"], {"latent": latents})[0]
        return result


def self_test(
    folder: Path, manifest: Manifest, runtime: ModelRuntime, *, variant: Variant = "int8", tolerance: int = 2
) -> float:
    """Replay the stored inputs through trunk and shipped head and compare with the stored outputs.

    Args:
        folder: A checkpoint folder that has been verified.
        manifest: Its manifest.
        runtime: The trunk to test.
        variant: Which of the two trunks it is: each has stored latents of its own.
        tolerance: Most steps (of 255) by which 99 % of the latent values may differ.

    Returns:
        Share of stored rows on which the predicted label is the stored one (>= 0.98).

    Raises:
        SelfTestError: The outputs differ beyond tolerance.
    """
    stored = load_npz(folder / SELFTEST_NPZ)
    if not {"x", "latents_int8", "latents_fp32", "probabilities"} <= stored.keys() or not len(stored["x"]):
        raise SelfTestError(f"{SELFTEST_NPZ} lacks x, latents_int8, latents_fp32 or probabilities")
    expected = stored[f"latents_{variant}"]
    latents = runtime.latents(manifest.input.apply(manifest.input.check_batch(stored["x"])))
    if latents.shape != expected.shape or latents.dtype != np.uint8:
        raise SelfTestError(f"latents are {latents.dtype} {latents.shape}, stored are {expected.shape}")
    off = np.abs(latents.astype(np.int16) - expected.astype(np.int16))
    if np.quantile(off, 0.99) > tolerance:
        raise SelfTestError(f"{variant} latents differ by up to {off.max()} of 255 steps here; allowed are {tolerance}")
    probabilities = HeadSession(folder / HEAD_ONNX, Head.load(folder / HEAD_NPZ)).run(latents)
    if not np.isfinite(probabilities).all():
        raise SelfTestError("the head puts out NaN or infinity")
    agreement = float((probabilities.argmax(1) == stored["probabilities"].argmax(1)).mean())
    if agreement < 0.98:
        raise SelfTestError(f"only {agreement:.1%} of the stored predictions are reproduced here")
    return agreement
