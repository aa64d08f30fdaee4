"""Running the frozen trunk and the head: the `ModelRuntime` protocol and ONNX Runtime behind it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edge_sdk.errors import RuntimeUnavailableError
from edge_sdk.head import Head
from edge_sdk.manifest import TRUNK_FP32, TRUNK_INT8
from edge_sdk.types import AnyArray, FloatArray, LatentArray, Variant

if TYPE_CHECKING:
    import onnxruntime


class ModelRuntime(Protocol):
    """Turns checked, preprocessed inputs into latents. Thread-safe."""

    def latents(self, x: FloatArray) -> LatentArray:
        """float32 [N, ...] to uint8 [N, D]."""
        ...


def new_session(
    path: Path, *, initializers: Mapping[str, FloatArray] | None = None, pool: bool = True
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session: CPU, one thread, no spinning.

    Args:
        path: The model file.
        initializers: Arrays that replace the model's initializers of the same name, of any shape that fits.
        pool: Keep memory for the next run. A head needs so little that this takes more memory and time than it saves:
            90 instead of 230 kB a session, 5 instead of 8 microseconds a row.

    Raises:
        RuntimeUnavailableError: The engine refuses the model.
    """
    import onnxruntime as ort  # noqa: PLC0415 - importing the SDK stays light

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = options.enable_mem_pattern = pool
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
        self._outputs = [self._session.get_outputs()[0].name]

    def latents(self, x: FloatArray) -> LatentArray:
        """float32 [N, ...] to uint8 [N, D].

        Raises:
            RuntimeUnavailableError: The engine failed.
        """
        try:
            result: LatentArray = self._session.run(self._outputs, {self._input: x})[0]
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
            self._session = new_session(onnx_path, initializers=head.weights, pool=False)
        self._outputs = [self._session.get_outputs()[-1].name]
        self.run(np.zeros((1, head.latent_dim), dtype=np.uint8))

    def run(self, latents: LatentArray) -> FloatArray:
        """Probabilities float32 [N, C], or values [N, T] of a regression, for uint8 latents [N, D].

        Raises:
            RuntimeUnavailableError: The engine failed.
        """
        try:
            result: FloatArray = self._session.run(self._outputs, {"latent": latents})[0]
        except Exception as error:
            raise RuntimeUnavailableError(f"the head failed: {error}") from error
        return result


class WholeModel:
    """A model that is not split (adapt=none), in ONNX Runtime. Thread-safe.

    Args:
        path: The model file.
    """

    def __init__(self, path: Path) -> None:
        self._session = new_session(path)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.inputs = [value.name for value in inputs]
        self.outputs = [value.name for value in outputs]
        batch = inputs[0].shape[0] if inputs[0].shape else None
        self.batched = isinstance(batch, str) and all(value.shape and value.shape[0] == batch for value in outputs)
        """Whether every output has a row for each sample; otherwise samples are run one by one."""
        self.with_rows = {value.name for value in outputs if value.shape and value.shape[0] in (batch, 1)}
        """Outputs whose first dimension is the batch; of others it may be what was found in one sample."""

    def run(self, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """Every output by name.

        Raises:
            RuntimeUnavailableError: The engine failed.
        """
        try:
            return dict(zip(self.outputs, self._session.run(self.outputs, dict(feeds)), strict=True))
        except Exception as error:
            raise RuntimeUnavailableError(f"the model failed: {error}") from error
