"""The monitors against their formulas in float64, at both ends of what they measure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastproto.train import monitors
from fastproto.train.monitors import MONITORS, embedding_monitors, prototype_monitors


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("shape", [(1, 1), (1, 24), (33, 1), (33, 24), (130, 96), (20, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_embedding_monitors_are_the_formulas(shape: tuple[int, int], dtype: torch.dtype) -> None:
    embeddings = (torch.randn(shape) + 0.3).to(dtype)
    z = unit(embeddings.double().numpy())
    gram = np.linalg.eigvalsh(z @ z.T)
    singular = np.sqrt(np.clip(gram, 0, None))
    share = singular / singular.sum()
    share = share[share > 1e-7]
    expected = {
        "embedding_std": np.sqrt(np.mean((z - z.mean(0)) ** 2, axis=0)).mean() * math.sqrt(shape[1]),
        "effective_rank": math.exp(-float((share * np.log(share)).sum())),
    }
    assert embedding_monitors(embeddings) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_embedding_monitors_know_the_sphere_from_a_point_and_a_line() -> None:
    sphere = embedding_monitors(torch.randn(4000, 16))
    assert sphere["embedding_std"] == pytest.approx(1, abs=0.01)
    assert sphere["effective_rank"] == pytest.approx(16, abs=0.1)
    point = embedding_monitors(torch.randn(1, 16).expand(50, 16))
    assert point["embedding_std"] == pytest.approx(0, abs=1e-7)
    assert point["effective_rank"] == pytest.approx(1, abs=1e-6)
    plane = embedding_monitors(torch.randn(400, 2) @ torch.linalg.qr(torch.randn(16, 2))[0].T)
    assert plane["effective_rank"] == pytest.approx(2, abs=0.05)
    # The scale of an embedding is nothing that a cosine sees.
    rows = torch.randn(50, 16)
    assert embedding_monitors(rows * torch.rand(50, 1)) == pytest.approx(embedding_monitors(rows), rel=1e-5)


def oracle(z: Tensor, centers: Tensor, own: Tensor, phi: Tensor) -> dict[str, float]:
    z, centers, phi = (tensor.double().numpy() for tensor in (z, centers, phi))
    logits = (z @ centers.T) / phi
    p = np.exp(logits - logits.max(1, keepdims=True))
    mean = (p / p.sum(1, keepdims=True)).mean(0)
    count = len(centers)
    pairs = [np.linalg.norm(centers[i] - centers[j]) for i in range(count) for j in range(count) if i != j]
    found = {
        "prototype_perplexity": math.exp(-sum(x * math.log(x) for x in mean if x > 0)),
        "prototype_min": count * mean.min(),
        "prototype_max": count * mean.max(),
    }
    if pairs:
        found["prototype_spread"] = np.linalg.norm(z - centers[own.numpy()], axis=1).mean() / np.mean(pairs)
    return found


@pytest.mark.parametrize(("rows", "number", "dim"), [(33, 7, 24), (600, 30, 96), (1, 1, 1), (5, 9, 3), (40, 1, 8)])
def test_prototype_monitors_are_the_formulas(rows: int, number: int, dim: int) -> None:
    features = torch.nn.functional.normalize(torch.randn(rows, dim), dim=1)
    prototypes = torch.nn.functional.normalize(torch.randn(number, dim), dim=1)
    phi = torch.rand(number) * 0.3 + 0.05
    own = torch.randint(0, number, (rows,))
    expected = oracle(features, prototypes, own, phi)
    assert prototype_monitors(features, prototypes, own, phi) == pytest.approx(expected, rel=1e-5)
    strided = features.T.contiguous().T
    assert prototype_monitors(strided, prototypes, own.int(), phi) == pytest.approx(expected, rel=1e-5)


def test_prototype_monitors_take_some_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.nn.functional.normalize(torch.randn(100, 8), dim=1)
    prototypes = torch.nn.functional.normalize(torch.randn(20, 8), dim=1)
    own, phi = torch.randint(0, 20, (100,)), torch.full((20,), 0.2)
    monkeypatch.setattr(monitors, "ROWS", 30)
    monkeypatch.setattr(monitors, "PROTOTYPES", 6)
    rows = [i * 100 // 30 for i in range(30)]
    some = prototypes[[i * 20 // 6 for i in range(6)]].double()
    expected = oracle(features[rows], prototypes, own[rows], phi)
    within = (features[rows] - prototypes[own[rows]]).norm(dim=1).mean()
    expected["prototype_spread"] = float(within / torch.pdist(some).mean())
    assert prototype_monitors(features, prototypes, own, phi) == pytest.approx(expected, rel=1e-5)


def test_prototype_monitors_know_even_use_dead_prototypes_and_coagulation() -> None:
    corners, phi = torch.eye(4), torch.full((4,), 0.02)
    even = prototype_monitors(corners.repeat(5, 1), corners, torch.arange(20) % 4, phi)
    assert even == pytest.approx(
        {"prototype_perplexity": 4, "prototype_min": 1, "prototype_max": 1, "prototype_spread": 0}, abs=1e-6
    )
    one = prototype_monitors(corners[:1].repeat(5, 1), corners, torch.zeros(5, dtype=torch.int64), phi)
    assert one["prototype_perplexity"] == pytest.approx(1, abs=1e-6)
    assert (one["prototype_min"], one["prototype_max"]) == pytest.approx((0, 4), abs=1e-6)

    def spread(noise: float) -> float:
        z = torch.nn.functional.normalize(corners.repeat(50, 1) + noise * torch.randn(200, 4), dim=1)
        return prototype_monitors(z, corners, torch.arange(200) % 4, phi)["prototype_spread"]

    assert spread(0.01) < spread(0.1) < spread(0.3) < 1


def test_every_monitor_is_explained() -> None:
    found = embedding_monitors(torch.eye(3)) | prototype_monitors(
        torch.eye(3), torch.eye(3), torch.arange(3), torch.ones(3)
    )
    assert list(found) == list(MONITORS)
    assert all(about.endswith(".") and "\n" not in about for about in MONITORS.values())


def test_monitors_refuse() -> None:
    with pytest.raises(ValueError, match="embedding_monitors: embeddings expected at least one row"):
        embedding_monitors(torch.zeros(0, 3))
    with pytest.raises(TypeError, match="embedding_monitors: embeddings expected a float32"):
        embedding_monitors(torch.zeros(2, 3, dtype=torch.int64))
    good = [torch.eye(3), torch.eye(3)[:2], torch.zeros(3, dtype=torch.int64), torch.ones(2)]
    for index, bad, message in (
        (0, torch.zeros(0, 3), "features expected at least one row"),
        (1, torch.zeros(2, 4), r"prototypes expected \(K, 3\)"),
        (2, torch.zeros(2, dtype=torch.int64), r"assignments expected \(3,\)"),
        (3, torch.ones(3), r"concentration expected \(2,\)"),
    ):
        with pytest.raises(ValueError, match=f"prototype_monitors: {message}"):
            prototype_monitors(*[bad if i == index else value for i, value in enumerate(good)])
    with pytest.raises(TypeError, match="prototype_monitors: assignments expected an int64 or int32"):
        prototype_monitors(good[0], good[1], torch.zeros(3), good[3])


@pytest.mark.gpu
def test_monitors_on_a_gpu() -> None:
    features = torch.nn.functional.normalize(torch.randn(300, 24), dim=1)
    arguments = (features, features[:9].clone(), torch.randint(0, 9, (300,)), torch.full((9,), 0.2))
    on_gpu = tuple(tensor.cuda() for tensor in arguments)
    assert prototype_monitors(*on_gpu) == pytest.approx(prototype_monitors(*arguments), rel=1e-3)
    assert embedding_monitors(on_gpu[0]) == pytest.approx(embedding_monitors(features), rel=1e-6)
