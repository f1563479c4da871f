"""Linear classifiers of frozen features: the optimum, and what papers report, stochastic gradient descent."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastproto._check import FLOATS, expect, expect_tensor

# Those of DINOv2's code, at a batch of 256.
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


def linear_probe(
    train_features: Tensor,  # (N, C) float
    train_labels: Tensor,  # (N,) int64
    test_features: Tensor,  # (M, C) float
    test_labels: Tensor,  # (M,) int64
    *,
    num_classes: int,
    max_iter: int = 200,
) -> float:
    """Accuracy of multinomial logistic regression on the standardised features.

    Minimises mean cross-entropy + ||W||^2 / (2N), scikit-learn's objective at its default C = 1, by full-batch L-BFGS
    with a strong Wolfe line search. No learning rate to tune, no random number, a bounded number of passes over the
    data; and unlike scikit-learn it runs on the GPU where the features are. This is the probe that runs are
    compared by here; ``linear_sgd`` is for figures beside those of papers.

    Args:
        train_features: (N, C); each column is shifted and scaled to mean 0 and deviation 1 over these rows.
        train_labels: (N,) int64.
        test_features: (M, C).
        test_labels: (M,) int64.
        num_classes: one more than the highest label.
        max_iter: iterations of L-BFGS, each of about one pass over the data.

    Raises:
        TypeError: features that are not float tensors, labels that are not int64 tensors.
        ValueError: shapes that do not fit, no rows, features that are not finite, labels outside 0…num_classes - 1.

    Example:
        >>> features, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> linear_probe(features, labels, features + 0.1, labels, num_classes=3)
        1.0
    """
    check_features("linear_probe", train_features, train_labels, test_features, test_labels, num_classes)
    expect(max_iter >= 1, "linear_probe", "max_iter", "at least 1", max_iter)
    train = train_features.detach().float()
    mean, scale = _standard(train)
    train = (train - mean) * scale
    weight = train.new_zeros(num_classes, train.shape[1], requires_grad=True)
    bias = train.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        max_eval=2 * max_iter,
        tolerance_grad=1e-5,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(train, weight, bias), train_labels) + weight.square().sum() / (2 * len(train))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    with torch.no_grad():
        predicted = F.linear((test_features.float() - mean) * scale, weight, bias).argmax(1)
    return float((predicted == test_labels).double().mean())


@torch.no_grad()
def linear_sgd(
    train_features: Tensor,  # (N, C) float
    train_labels: Tensor,  # (N,) int64
    test_features: Tensor,  # (M, C) float
    test_labels: Tensor,  # (M,) int64
    *,
    num_classes: int,
    steps: int = 12_500,
    batch_size: int = 1024,
    device: torch.device | None = None,
) -> dict[float, float]:
    """Accuracy of a linear classifier for each of DINOv2's 13 learning rates, all trained in one pass.

    The 13 classifiers lie side by side, so that a step is two matrix products for all of them: stochastic gradient
    descent on the mean cross-entropy with momentum 0.9, no weight decay, and a learning rate lr * batch / 256 that
    falls to 0 along a cosine. It is DINOv2's protocol on whole images instead of random crops, on features
    standardised column by column (as MAE's probe does), from weights 0 instead of small random ones.

    For figures to stand beside published ones on large sets, where papers take the best of the 13. They take it by the
    test images, which favours whoever tries more; where that must not be, or on small sets, ``linear_probe`` is the
    answer: it has no learning rate. Batches are keyed by the epoch, so the same bits come every time.

    Args:
        train_features: (N, C), on any device: batches are moved to where the classifiers are, so features of a large
            set may stay in host memory.
        train_labels: (N,) int64.
        test_features: (M, C), on the device of train_features.
        test_labels: (M,) int64.
        num_classes: one more than the highest label.
        steps: batches that are learnt from.
        batch_size: rows in one; all rows where there are fewer.
        device: of the classifiers; that of the features by default.

    Returns:
        Share of test rows that are classified correctly, by learning rate.

    Raises:
        TypeError: features that are not float tensors, labels that are not int64 tensors.
        ValueError: shapes that do not fit, no rows, features that are not finite, labels outside 0…num_classes - 1,
            steps or batch_size below 1.

    Example:
        >>> features, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> linear_sgd(features, labels, features + 0.1, labels, num_classes=3, steps=50)[0.1]
        1.0

    Source: Oquab et al., DINOv2, arXiv 2304.07193, B.3; He et al., Masked Autoencoders, arXiv 2111.06377, A.1.
    """
    op = "linear_sgd"
    check_features(op, train_features, train_labels, test_features, test_labels, num_classes)
    expect(steps >= 1, op, "steps", "at least 1", steps)
    expect(batch_size >= 1, op, "batch_size", "at least 1", batch_size)
    device = train_features.device if device is None else device
    mean, scale = (part.to(device) for part in _standard(train_features))
    count, heads = len(train_features), len(LEARNING_RATES)
    size = min(batch_size, count)
    rates = torch.tensor(LEARNING_RATES, device=device).repeat_interleave(num_classes)[:, None] * (size / 256)
    # The last column, of a feature that is always 1, is the bias.
    weight = torch.zeros(heads * num_classes, train_features.shape[1] + 1, device=device)
    velocity = torch.zeros_like(weight)

    def logits(features: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised rows (B, C + 1), and what the classifiers make of them (B, heads, classes)."""
        rows = F.pad((features.to(device).float() - mean) * scale, (0, 1), value=1.0)
        return rows, (rows @ weight.T).unflatten(1, (heads, num_classes))

    for step in range(steps):
        epoch, place = divmod(step, count // size)
        if place == 0:
            order = torch.from_numpy(np.random.default_rng(epoch).permutation(count)).to(train_features.device)
        ids = order[place * size : (place + 1) * size]
        rows, scores = logits(train_features[ids])
        wanted = F.one_hot(train_labels[ids].to(device), num_classes)
        error = scores.softmax(2) - wanted[:, None]
        velocity = 0.9 * velocity + error.flatten(1).T @ rows / size
        weight -= rates * velocity * (0.5 + 0.5 * math.cos(math.pi * step / steps))

    correct = torch.zeros(heads, dtype=torch.int64, device=device)
    for part, labels in zip(test_features.split(batch_size), test_labels.split(batch_size), strict=True):
        correct += (logits(part)[1].argmax(2) == labels.to(device)[:, None]).sum(0)
    return dict(zip(LEARNING_RATES, (correct.double() / len(test_features)).tolist(), strict=True))


def _standard(features: Tensor) -> tuple[Tensor, Tensor]:
    """Per column (C,) the mean and one over the standard deviation, float32."""
    mean, deviation = features.float().mean(0), features.float().std(0, correction=0)
    # A dead channel stays 0 instead of becoming noise or NaN.
    return mean, torch.where(deviation > 1e-6 * (1 + mean.abs()), 1 / deviation, 0.0)


def check_features(
    op: str, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, num_classes: int
) -> None:
    expect_tensor(train, op, "train_features", ("N", "C"), FLOATS)
    expect_tensor(test, op, "test_features", ("M", train.shape[1]), FLOATS, train.device)
    for name, rows, labels in (("train", train, train_labels), ("test", test, test_labels)):
        expect(len(rows) > 0, op, f"{name}_features", "at least one row", rows)
        expect(bool(rows.isfinite().all()), op, f"{name}_features", "finite values", "NaN or infinity among them")
        expect_tensor(labels, op, f"{name}_labels", (len(rows),), (torch.int64,), train.device)
        low, high = (int(value) for value in labels.aminmax())
        inside = low >= 0 and high < num_classes
        expect(inside, op, f"{name}_labels", f"0…{num_classes - 1}", f"labels from {low} to {high}")
