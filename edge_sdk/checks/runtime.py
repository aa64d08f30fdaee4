"""The contract of a `ModelRuntime`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from edge_sdk.checks.common import require

if TYPE_CHECKING:
    from edge_sdk.runtime import ModelRuntime
    from edge_sdk.types import FloatArray


def check_runtime(runtime: ModelRuntime, x: FloatArray, *, latent_dim: int, threads: int = 4) -> None:
    """Check a `ModelRuntime`.

    Args:
        runtime: With its model loaded.
        x: At least two checked and preprocessed inputs, float32 [N, ...].
        latent_dim: Width of the latent, as the manifest says.
        threads: From how many it is called at once.

    Raises:
        CheckFailed: A rule is broken.
    """
    given = x.copy()
    whole = runtime.latents(x)
    require(whole.dtype == np.uint8, f"latents are uint8, got {whole.dtype}")
    require(whole.shape == (len(x), latent_dim), f"latents are [N, {latent_dim}], got {whole.shape}")
    require(np.array_equal(x, given), "inputs are left as they were")
    singles = np.concatenate([runtime.latents(x[i : i + 1]) for i in range(len(x))])
    require(np.array_equal(singles, whole), "a batch gives exactly what its samples give one by one")
    require(np.array_equal(runtime.latents(x[::-1].copy())[::-1], whole), "a sample's latent depends on it alone")
    kept = whole.copy()
    with ThreadPoolExecutor(threads) as pool:
        parts = [x[i % len(x) :] for i in range(8 * threads)]
        results = list(pool.map(runtime.latents, parts))
    require(
        all(np.array_equal(r, kept[len(x) - len(p) :]) for r, p in zip(results, parts, strict=True)),
        "calls from several threads at once give what they give alone",
    )
    require(np.array_equal(whole, kept), "a result belongs to the caller: later calls do not change it")
