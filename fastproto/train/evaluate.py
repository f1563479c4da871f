"""What frozen features are worth: weighted nearest neighbours and a linear probe.

Both are deterministic, run where the features lie, and see labels that training never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproto._check import FLOATS, expect, expect_tensor
from fastproto.train.data import Dataset

# Similarities held at once by knn: 64 MiB of float32.
SIMILARITIES = 2**24


@torch.no_grad()
def embed(
    encode: Callable[[Tensor], Tensor],
    images: Tensor,  # (N, 3, H, W) uint8
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 512,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Features (N, C) float32 of whole images, un-augmented, on ``device``.

    Args:
        encode: maps normalised float32 images (B, 3, H, W) to features (B, C). A module has to be in eval mode.
        images: (N, 3, H, W) uint8, N at least 1.
        mean: per channel, of the images divided by 255.
        std: likewise.
        batch_size: images encoded at once.
        device: where ``encode`` runs; where the images are by default.

    Raises:
        TypeError: images of another dtype.
        ValueError: images of another shape or none at all, a batch_size below 1, a module in training mode.

    Example:
        >>> images = torch.full((5, 3, 8, 8), 51, dtype=torch.uint8)
        >>> embed(lambda x: x.mean((2, 3)), images, (0.0, 0.1, 0.2), (1.0, 1.0, 1.0), batch_size=2).shape
        torch.Size([5, 3])
    """
    expect_tensor(images, "embed", "images", ("N", 3, "H", "W"), (torch.uint8,))
    expect(len(images) > 0, "embed", "images", "at least one", images)
    expect(batch_size >= 1, "embed", "batch_size", "at least 1", batch_size)
    training = isinstance(encode, nn.Module) and encode.training
    expect(not training, "embed", "encode", "a module in eval mode", "one in training mode")
    device = images.device if device is None else device
    shift = torch.tensor(mean, device=device).view(3, 1, 1) * 255
    scale = 1 / (torch.tensor(std, device=device).view(3, 1, 1) * 255)
    return torch.cat([encode((batch.to(device) - shift) * scale).float() for batch in images.split(batch_size)])


@torch.no_grad()
def knn(
    train_features: Tensor,  # (N, C) float
    train_labels: Tensor,  # (N,) int64
    test_features: Tensor,  # (M, C) float
    test_labels: Tensor,  # (M,) int64
    *,
    k: int,
    temperature: float,
    num_classes: int,
) -> float:
    """Share of test rows whose k nearest training rows vote for their class.

    Nearest by cosine similarity s; a neighbour's vote weighs exp(s / temperature). All N rows vote where k exceeds N; a
    tie goes to the lowest class. Never in memory: the (M, N) similarities.

    Raises:
        TypeError: features that are no float tensors, labels that are no int64 tensors.
        ValueError: shapes that do not fit, no rows, features that are not finite, labels outside 0…num_classes - 1,
            k or temperature not positive.

    Example:
        >>> features, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> knn(features, labels, features + 0.1, labels, k=2, temperature=0.07, num_classes=3)
        1.0

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, arXiv 1805.01978, 3.4.
    """
    _check_features("knn", train_features, train_labels, test_features, test_labels, num_classes)
    expect(k >= 1, "knn", "k", "at least 1", k)
    expect(temperature > 0, "knn", "temperature", "a positive number", temperature)
    keys = F.normalize(train_features.float(), dim=1)
    queries = F.normalize(test_features.float(), dim=1)
    correct = 0
    rows = max(1, SIMILARITIES // len(keys))
    for query, label in zip(queries.split(rows), test_labels.split(rows), strict=True):
        similarity, index = (query @ keys.T).topk(min(k, len(keys)), dim=1)
        # The nearest weighs 1: no temperature overflows. In float64 the order of the additions decides no vote.
        weight = ((similarity - similarity[:, :1]) / temperature).double().exp()
        votes = weight.new_zeros(len(query), num_classes).scatter_add_(1, train_labels[index], weight)
        correct += int((votes.argmax(1) == label).sum())
    return correct / len(queries)


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
    data; and unlike scikit-learn it runs on the GPU where the features are.

    Args:
        train_features: (N, C); each column is shifted and scaled to mean 0 and deviation 1 over these rows.
        train_labels: (N,) int64.
        test_features: (M, C).
        test_labels: (M,) int64.
        num_classes: one more than the highest label.
        max_iter: iterations of L-BFGS, each of about one pass over the data.

    Raises:
        TypeError: features that are no float tensors, labels that are no int64 tensors.
        ValueError: shapes that do not fit, no rows, features that are not finite, labels outside 0…num_classes - 1.

    Example:
        >>> features, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> linear_probe(features, labels, features + 0.1, labels, num_classes=3)
        1.0
    """
    _check_features("linear_probe", train_features, train_labels, test_features, test_labels, num_classes)
    expect(max_iter >= 1, "linear_probe", "max_iter", "at least 1", max_iter)
    train = train_features.detach().float()
    mean, deviation = train.mean(0), train.std(0, correction=0)
    # A dead channel stays 0 instead of becoming noise or NaN.
    scale = torch.where(deviation > 1e-6 * (1 + mean.abs()), 1 / deviation, 0.0)
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


def evaluate(
    encode: Callable[[Tensor], Tensor], dataset: Dataset, *, batch_size: int = 512, device: torch.device | None = None
) -> dict[str, float]:
    """Accuracies on the test images, as fractions: ``knn20`` (k 20, temperature 0.07: DINO), ``knn200`` (k 200, 0.1: Wu
    et al., lightly) and ``linear``.

    Args:
        encode: maps normalised float32 images (B, 3, H, W) to features (B, C). A module has to be in eval mode.
        dataset: as ``load`` returns it.
        batch_size: images encoded at once.
        device: where ``encode`` runs; where the images are by default.

    Raises:
        ValueError: features that are not finite, a module in training mode.

    Example:
        >>> from fastproto.train.data import load
        >>> scores = evaluate(lambda x: x[:, :, ::5, ::5].flatten(1), load("digits"))
        >>> sorted(scores)
        ['knn20', 'knn200', 'linear']
    """
    (train, train_labels), (test, test_labels) = (
        (embed(encode, images, dataset.mean, dataset.std, batch_size, device=device), labels)
        for images, labels in (
            (dataset.train_images, dataset.train_labels),
            (dataset.test_images, dataset.test_labels),
        )
    )
    parts = (train, train_labels.to(train.device), test, test_labels.to(test.device))
    classes = len(dataset.classes)
    return {
        "knn20": knn(*parts, k=20, temperature=0.07, num_classes=classes),
        "knn200": knn(*parts, k=200, temperature=0.1, num_classes=classes),
        "linear": linear_probe(*parts, num_classes=classes),
    }


def _check_features(
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
