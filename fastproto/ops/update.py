"""update: sums and counts of the rows that carry each label, in a fixed order."""

from __future__ import annotations

from torch import Tensor

from fastproto._check import INTEGERS, expect, expect_tensor, reads_data
from fastproto.ops._dispatch import Op
from fastproto.reference import update as reference


def update(
    x: Tensor,  # (N, D) float
    labels: Tensor,  # (N,) int64 or int32
    num_clusters: int,
    weights: Tensor | None = None,  # (N,) float
) -> tuple[Tensor, Tensor]:
    """Sums (K, D) and counts (K,), both float64: Σ w_n x_n and Σ w_n over the rows n of each label.

    Rows labelled -1 are left out. The same bits from run to run, whatever the number of threads. Not differentiable.

    Raises:
        TypeError: an argument is no tensor of the right dtype.
        ValueError: shapes or devices do not fit, or (where data is read) a label is outside -1 ... K - 1.
    """
    expect(num_clusters >= 1, "update", "num_clusters", "at least 1", num_clusters)
    expect_tensor(x, "update", "x", ("N", "D"))
    expect_tensor(labels, "update", "labels", (x.shape[0],), INTEGERS, x.device)
    expect(x.shape[1] >= 1, "update", "x", "at least one dimension", x)
    if weights is not None:
        expect_tensor(weights, "update", "weights", (x.shape[0],), device=x.device)
    expect_labels(labels, num_clusters, "update")
    sums, counts = _op(x, labels.long(), num_clusters, weights)
    return sums, counts


def expect_labels(labels: Tensor, num_clusters: int, op: str) -> None:
    """Raises ValueError for a label outside -1 ... K - 1, where data may be read."""
    if labels.numel() and reads_data(labels):
        low, high = (int(value) for value in labels.aminmax())
        expect(low >= -1 and high < num_clusters, op, "labels", f"-1 ... {num_clusters - 1}", f"{low} ... {high}")


_op = Op("update", reference=reference.update)
