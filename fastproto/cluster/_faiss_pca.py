"""faiss.PCAMatrix, by which DeepCluster's scripts whiten features before they cluster them."""

from __future__ import annotations

import math

import numpy as np
import torch

from fastproto._check import expect, expect_positive_ints, is_integer, is_number
from fastproto.cluster._faiss_flat import float32
from fastproto.cluster.whiten import power, principal_directions


class PCAMatrix:
    """Vectors along their principal directions:  y = diag(λ)^eigen_power Vᵀ (x - μ).

    μ is the mean of the training vectors, V diag(λ) Vᵀ the sum of (x - μ)(x - μ)ᵀ over them, not divided by their
    number. Directions without variance give 0 for a negative power. Signs are fixed; faiss leaves them open.

    Args:
        d_in, d_out: dimensions of the vectors and of what ``apply`` makes of them, the ``d_out`` largest λ.
        eigen_power: 0 to rotate, -0.5 to whiten.
        random_rotation: not supported; only False is accepted.

    Attributes:
        is_trained: whether there are directions.
        mean, eigenvalues: μ (d_in,) and all λ (d_in,), the largest first, float32, after ``train``.

    Example:
        >>> import numpy as np
        >>> import fastproto.cluster.faiss_compat as faiss
        >>> x = np.random.default_rng(0).random((1000, 16), dtype=np.float32)
        >>> mat = faiss.PCAMatrix(16, 4, eigen_power=-0.5)
        >>> mat.train(x)
        >>> mat.apply_py(x).shape
        (1000, 4)
    """

    def __init__(self, d_in: int, d_out: int, eigen_power: float = 0.0, random_rotation: bool = False) -> None:
        op = "faiss_compat.PCAMatrix"
        expect_positive_ints(op, d_in=d_in)
        expect(is_integer(d_out) and 1 <= d_out <= d_in, op, "d_out", f"an integer in 1 ... {d_in}", d_out)
        known = is_number(eigen_power) and math.isfinite(eigen_power)
        expect(known, op, "eigen_power", "a finite number", eigen_power)
        expect(not random_rotation, op, "random_rotation", "False, which is all that is supported", random_rotation)
        self.d_in, self.d_out, self.eigen_power = int(d_in), int(d_out), eigen_power
        self.is_trained = False

    def train(self, x: np.ndarray) -> None:
        """Learns the directions of the vectors (N, d_in). ValueError for another shape, NaN or infinity."""
        op = "faiss_compat.PCAMatrix.train"
        vectors = torch.tensor(float32(x, op, self.d_in), device="cpu")
        expect(len(vectors) > 0, op, "x", "at least one vector", x)
        mean, variances, directions = principal_directions(vectors, self.d_in, op)
        eigenvalues, directions = variances * len(vectors), directions[:, : self.d_out]
        scale = power(eigenvalues[: self.d_out], self.eigen_power) if self.eigen_power else 1
        self.mean, self.eigenvalues = mean.float().numpy(), eigenvalues.float().numpy()
        self._mean, self._projection = mean.numpy(), (directions * scale).numpy()
        self.is_trained = True

    def apply(self, x: np.ndarray) -> np.ndarray:
        """The vectors (N, d_in) as (N, d_out) float32. RuntimeError before ``train``."""
        op = "faiss_compat.PCAMatrix.apply"
        if not self.is_trained:
            raise RuntimeError(f"{op}: call train first")
        return np.asarray((float32(x, op, self.d_in) - self._mean) @ self._projection, dtype=np.float32)

    # The name of older versions of faiss.
    apply_py = apply
