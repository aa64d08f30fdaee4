"""What the monitors watch of the latent: random cosine features, which see a change of any kind of its distribution."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edge_sdk.types import AnyArray, DoubleArray, FloatArray, LatentArray

PROJECTIONS = 32
MAX_DIM = 12_000
"""Widest latent watched: its signs take 48 kB."""


@dataclass(frozen=True)
class LatentChannels:
    """Sign projections of the latent and a cosine of each: channels in [0, 1].

    A class that becomes frequent, or a part of every input that is covered, moves the mean of some cosine even where
    no single value of the latent moves much: their phases differ, so that some answer to the place of a projection
    and some to its spread.

    Attributes:
        signs: uint8 [D, 4]: one bit for each of 32 projections.
        scale: float32 [32]: turns a projection of uint8 codes into standard deviations of the reference.
        phase: float32 [32]: includes the reference's mean.

    Source:
        Rahimi & Recht 2007, "Random features for large-scale kernel machines", NeurIPS; signs instead of normal
        projections as in Achlioptas 2003, doi:10.1016/S0022-0000(03)00025-4.
    """

    signs: AnyArray
    scale: FloatArray
    phase: FloatArray

    @classmethod
    def build(cls, latents: LatentArray) -> LatentChannels:
        """Projections for latents like these, uint8 [N, D]; the same for the same width.

        The bits come from a hash, so that a device could make them without a random generator.

        Raises:
            ValueError: The latent is wider than `MAX_DIM`.
        """
        width = latents.shape[1]
        if width > MAX_DIM:
            raise ValueError(f"latents of up to {MAX_DIM} values are watched, got {width}")
        bits = hashlib.shake_256(b"latent channels").digest(width * PROJECTIONS // 8)
        signs = np.frombuffer(bits, np.uint8).reshape(width, PROJECTIONS // 8)
        plain = cls(signs, np.ones(PROJECTIONS, np.float32), np.zeros(PROJECTIONS, np.float32))
        seen = plain._project(latents).astype(np.float64)
        # one code at least: of a projection that never moved, the least step is a standard deviation
        scale = 1 / np.maximum(seen.std(axis=0), 1.0)
        turn = 2 * math.pi * np.arange(PROJECTIONS) / PROJECTIONS
        return cls(signs, scale.astype(np.float32), (turn - seen.mean(axis=0) * scale).astype(np.float32))

    def channels(self, latents: LatentArray) -> DoubleArray:
        """Latents uint8 [N, D] as channels, float64 [N, 32] in [0, 1].

        Raises:
            ValueError: The latents have another width.
        """
        if latents.ndim != 2 or latents.shape[1] != len(self.signs):
            raise ValueError(f"expected latents of width {len(self.signs)}, got shape {latents.shape}")
        result: DoubleArray = (1 + np.cos(self._project(latents) * self.scale + self.phase).astype(np.float64)) / 2
        return result

    def _project(self, latents: LatentArray) -> FloatArray:
        # in float32 a matrix product takes a tenth of the time of one in integers, and is exact up to 2**24
        result: FloatArray = latents.astype(np.float32) @ self._matrix
        return result

    @cached_property
    def _matrix(self) -> FloatArray:
        return np.unpackbits(self.signs, axis=1).astype(np.float32) * 2 - 1


def latent_names() -> list[str]:
    """What `LatentChannels.channels` gives, in order."""
    return [f"latent projection {i + 1}" for i in range(PROJECTIONS)]
