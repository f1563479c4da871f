"""What frozen features are worth: weighted nearest neighbours and linear probes, of all labels or of a few.

All are deterministic, run where the features lie, and see labels that training never saw.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproto._check import expect, expect_tensor
from fastproto._random import Stream, random_bits
from fastproto.train.data import Dataset, Images, Streamed, squares
from fastproto.train.files import is_table, read_json, write_text
from fastproto.train.lock import in_turn
from fastproto.train.probes import check_features, linear_probe, linear_sgd

Metric = Literal["knn20", "knn200", "linear", "linear_sgd"]
KNN: tuple[Metric, ...] = ("knn20", "knn200")

# Similarities held at once by knn: 64 MiB of float32.
SIMILARITIES = 2**24
# Images encoded at once on a GPU and on a CPU. What a layer leaves of 512 small ones are 33 MB, which malloc takes from
# the system anew for every layer: ResNet-18 of width 16 took 3.0 s for 2048 images of 32², and takes 1.7.
BATCH, CPU_BATCH = 512, 64


@torch.no_grad()
def embed(
    encode: Callable[[Tensor], Tensor],
    images: Images,  # (N, 3, H, W) uint8
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int | None = None,
    *,
    ids: Tensor | None = None,  # (n,) int64
    whole: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """Features (n, C) float32 of un-augmented images, on ``device``.

    Args:
        encode: maps normalised float32 images (B, 3, H, W) to features (B, C). A module has to be in eval mode.
        images: (N, 3, H, W) uint8, N at least 1, or streamed.
        mean: per channel, of the images divided by 255.
        std: likewise.
        batch_size: images encoded at once; None: 512 on a GPU, 64 on a CPU.
        ids: numbers of the images, in the order of the features; None: all.
        whole: squeeze streamed images into their squares, so that all of them is seen, instead of keeping their centre.
        device: where ``encode`` runs; where the images are by default.

    Raises:
        TypeError: images of another dtype.
        ValueError: images of another shape or none at all, a batch_size below 1, a module in training mode.

    Example:
        >>> images = torch.full((5, 3, 8, 8), 51, dtype=torch.uint8)
        >>> embed(lambda x: x.mean((2, 3)), images, (0.0, 0.1, 0.2), (1.0, 1.0, 1.0), batch_size=2).shape
        torch.Size([5, 3])
    """
    if not isinstance(images, Streamed):
        expect_tensor(images, "embed", "images", ("N", 3, "H", "W"), (torch.uint8,))
    expect(len(images) > 0, "embed", "images", "at least one", images)
    training = isinstance(encode, nn.Module) and encode.training
    expect(not training, "embed", "encode", "a module in eval mode", "one in training mode")
    if device is None:
        device = images.device if isinstance(images, Tensor) else torch.device("cpu")
    if batch_size is None:
        batch_size = CPU_BATCH if device.type == "cpu" else BATCH
    expect(batch_size >= 1, "embed", "batch_size", "at least 1", batch_size)
    shift = torch.tensor(mean, device=device).view(3, 1, 1) * 255
    scale = 1 / (torch.tensor(std, device=device).view(3, 1, 1) * 255)
    shares = (torch.arange(len(images)) if ids is None else ids).split(batch_size)
    parts = squares(images, shares, device, whole=whole)
    return torch.cat([encode((part - shift) * scale).float() for part in parts])


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
        TypeError: features that are not float tensors, labels that are not int64 tensors.
        ValueError: shapes that do not fit, no rows, features that are not finite, labels outside 0…num_classes - 1,
            k or temperature not positive.

    Example:
        >>> features, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> knn(features, labels, features + 0.1, labels, k=2, temperature=0.07, num_classes=3)
        1.0

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, arXiv 1805.01978, 3.4.
    """
    check_features("knn", train_features, train_labels, test_features, test_labels, num_classes)
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


def balanced(
    labels: Tensor,  # (N,) int64
    share: float,
    num_classes: int,
    *,
    seed: int = 0,
) -> Tensor:
    """Numbers of the rows that keep their label where only a share of all labels is known, in ascending order.

    Every class keeps round(share * N / num_classes) of its rows, at least one and at most all it has: those that come
    first in a permutation keyed by (seed, row), so that a smaller share is part of a larger one.

    Raises:
        TypeError: labels that are no int64 tensor.
        ValueError: labels of another shape, a share outside (0, 1].

    Example:
        >>> labels = torch.arange(100) % 2
        >>> labels[balanced(labels, 0.1, 2)].bincount()
        tensor([5, 5])

    Source: Chen et al., A Simple Framework for Contrastive Learning, arXiv 2002.05709, 6 (1 % and 10 % of the labels).
    """
    expect_tensor(labels, "balanced", "labels", ("N",), (torch.int64,))
    expect(0 < share <= 1, "balanced", "share", "a number above 0, at most 1", share)
    if share == 1:
        return torch.arange(len(labels), device=labels.device)
    rows = torch.arange(len(labels), device=labels.device)
    order = random_bits(rows, Stream.LABELS, 1, views=1, seed=seed, epoch=0).flatten().argsort(stable=True)
    each = max(1, round(share * len(labels) / num_classes))
    return torch.cat([order[labels[order] == label][:each] for label in range(num_classes)]).sort().values


def read_evaluations(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """What RUN/evaluation.json holds: by checkpoint, then by share of the labels, accuracies by metric.

    Raises:
        ValueError: the file holds something else.
    """
    path = folder / "evaluation.json"
    found = read_json(path)
    got = "something else" if isinstance(found, dict) else type(found).__name__
    expect(is_table(found, 3), "run", str(path), "accuracies by checkpoint and share of the labels", got)
    return found


def add_evaluation(folder: Path, checkpoint: str, labels: float, scores: Mapping[str, float]) -> None:
    """Adds the scores of a checkpoint to RUN/evaluation.json, which is written whole or not at all."""
    # Another evaluation may end at this moment. The folder itself may be held by a training.
    with in_turn(folder / "config.yaml"):
        known = read_evaluations(folder)
        shares = known.get(checkpoint, {})
        share = f"labels {labels:g}"
        shares = shares | {share: shares.get(share, {}) | dict(scores)}
        write_text(folder / "evaluation.json", json.dumps(known | {checkpoint: shares}, indent=2) + "\n")


def evaluate(
    encode: Callable[[Tensor], Tensor],
    dataset: Dataset,
    *,
    metrics: Sequence[Metric] = ("knn20", "knn200", "linear"),
    labels: float = 1.0,
    batch_size: int | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Accuracies on the test images, as fractions: ``knn20`` (k 20, temperature 0.07: DINO), ``knn200`` (k 200, 0.1: Wu
    et al., lightly), ``linear``, and ``linear_sgd`` with ``linear_sgd/LR`` for each learning rate, of which it is the
    best. Images without a label and files that do not decode take no part.

    Args:
        encode: maps normalised float32 images (B, 3, H, W) to features (B, C). A module has to be in eval mode.
        dataset: as ``load`` returns it.
        metrics: what is computed.
        labels: share of the training images that have a label, the same number in each class; the others are not seen.
        batch_size: images encoded at once; None: 512 on a GPU, 64 on a CPU.
        device: where ``encode`` runs; where the images are by default.

    Raises:
        ValueError: features that are not finite, a module in training mode, an unknown metric, labels outside (0, 1].

    Example:
        >>> from fastproto.train.data import load
        >>> scores = evaluate(lambda x: x[:, :, ::5, ::5].flatten(1), load("digits"))
        >>> sorted(scores)
        ['knn20', 'knn200', 'linear']
    """
    parts: list[Tensor] = []
    for images, numbers in (
        (dataset.train_images, dataset.train_labels),
        (dataset.test_images, dataset.test_labels),
    ):
        ids = (numbers >= 0).nonzero()[:, 0]
        features = embed(encode, images, dataset.mean, dataset.std, batch_size, ids=ids, device=device)
        if isinstance(images, Streamed) and images.broken:
            whole = ~torch.isin(ids, torch.tensor(sorted(images.broken)))
            ids, features = ids[whole], features[whole.to(features.device)]
        parts += [features, numbers[ids].to(features.device)]
    classes = len(dataset.classes)
    kept = balanced(parts[1], labels, classes)
    parts[:2] = parts[0][kept], parts[1][kept]
    found: dict[str, float] = {}
    for metric in metrics:
        if metric == "knn20":
            found[metric] = knn(*parts, k=20, temperature=0.07, num_classes=classes)
        elif metric == "knn200":
            found[metric] = knn(*parts, k=200, temperature=0.1, num_classes=classes)
        elif metric == "linear":
            found[metric] = linear_probe(*parts, num_classes=classes)
        else:
            expect(metric in get_args(Metric), "evaluate", "metrics", "|".join(get_args(Metric)), metric)
            by_rate = linear_sgd(*parts, num_classes=classes)
            found |= {metric: max(by_rate.values())} | {f"{metric}/{rate:g}": by_rate[rate] for rate in by_rate}
    return found
