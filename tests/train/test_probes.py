"""Stochastic gradient descent at 13 learning rates at once against torch's, one classifier at a time in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastproto.train import probes
from fastproto.train.probes import LEARNING_RATES, linear_sgd


def clusters(rows: int, width: int, classes: int, noise: float) -> tuple[Tensor, Tensor]:
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(rows) % classes
    # Noise that all columns share has to be learnt away, which a small learning rate does not do in time.
    spread = noise * (torch.randn(rows, width) + 5 * torch.randn(rows, 1))
    return 3 * (centres[labels] + spread) + 1, labels


def oracle(
    train: Tensor, train_labels: Tensor, test: Tensor, rate: float, classes: int, steps: int, batch: int
) -> Tensor:
    """Scores (M, K) of one classifier, by torch.optim."""
    train, test = train.double(), test.double()
    mean, deviation = train.mean(0), train.std(0, correction=0)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    batch = min(batch, len(train))
    model = nn.Linear(train.shape[1], classes).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate * batch / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows: list[np.ndarray] = []
    for epoch in range(steps):
        order = np.random.default_rng(epoch).permutation(len(train))
        rows += [order[i : i + batch] for i in range(0, len(train) - batch + 1, batch)]
    for ids in rows[:steps]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train[ids]), train_labels[ids]).backward()
        optimizer.step()
        schedule.step()
    return model(test).detach()


@pytest.mark.parametrize(
    ("rows", "width", "classes", "steps", "batch"), [(130, 24, 4, 40, 32), (33, 7, 3, 25, 1024), (61, 96, 10, 12, 20)]
)
def test_every_learning_rate_is_torchs_descent(rows: int, width: int, classes: int, steps: int, batch: int) -> None:
    train, train_labels = clusters(rows, width, classes, 1.0)
    test, test_labels = clusters(500, width, classes, 1.0)
    got = linear_sgd(train, train_labels, test, test_labels, num_classes=classes, steps=steps, batch_size=batch)
    assert tuple(got) == LEARNING_RATES
    assert len(got) == 13
    for rate, accuracy in got.items():
        scores = oracle(train, train_labels, test, rate, classes, steps, batch)
        expected = (scores.argmax(1) == test_labels).double().mean()
        # One row in five hundred may lie on the border within float32.
        assert accuracy == pytest.approx(float(expected), abs=1.5 / 500), rate
    assert max(got.values()) > min(got.values()) + 0.01


def test_the_classifiers_do_not_feel_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    train, train_labels = clusters(200, 16, 5, 1.0)
    test, test_labels = clusters(300, 16, 5, 1.0)
    parts = (train, train_labels, test, test_labels)
    together = linear_sgd(*parts, num_classes=5, steps=60)
    assert len(set(together.values())) > 3
    for rate in LEARNING_RATES[::4]:
        monkeypatch.setattr(probes, "LEARNING_RATES", (rate,))
        assert linear_sgd(*parts, num_classes=5, steps=60)[rate] == pytest.approx(together[rate], abs=1.5 / 300)


def test_linear_sgd_gives_the_same_twice_for_any_scale_and_ignores_dead_channels() -> None:
    train, train_labels = clusters(120, 16, 4, 1.5)
    test, test_labels = clusters(100, 16, 4, 1.5)
    expected = linear_sgd(train, train_labels, test, test_labels, num_classes=4, steps=20, batch_size=50)
    drawn = torch.get_rng_state()
    dead = torch.cat([train * 1024, torch.full((120, 1), 3.3)], 1), torch.cat([test * 1024, torch.randn(100, 1)], 1)
    torch.set_rng_state(drawn)
    for features, others in ((train, test), dead, (train.T.contiguous().T, test)):
        features = features.requires_grad_(features.is_leaf)
        again = linear_sgd(features, train_labels, others, test_labels, num_classes=4, steps=20, batch_size=50)
        assert again == expected
        assert features.grad is None
    assert torch.equal(torch.get_rng_state(), drawn)


def test_linear_sgd_refuses() -> None:
    good = [torch.rand(4, 3), torch.tensor([0, 1, 0, 1]), torch.rand(2, 3), torch.tensor([0, 1])]
    with pytest.raises(ValueError, match="linear_sgd: steps expected at least 1, got int 0"):
        linear_sgd(*good, num_classes=2, steps=0)
    with pytest.raises(ValueError, match="linear_sgd: batch_size expected at least 1, got int 0"):
        linear_sgd(*good, num_classes=2, batch_size=0)
    with pytest.raises(ValueError, match="linear_sgd: train_labels expected 0…0, got labels from 0 to 1"):
        linear_sgd(*good, num_classes=1)
    with pytest.raises(ValueError, match="linear_sgd: test_features expected finite values"):
        linear_sgd(good[0], good[1], good[2] / 0, good[3], num_classes=2)


@pytest.mark.gpu
def test_linear_sgd_on_a_gpu_from_there_and_from_the_host() -> None:
    train, train_labels = clusters(300, 96, 4, 3.0)
    test, test_labels = clusters(130, 96, 4, 3.0)
    on_cpu = (train, train_labels, test, test_labels)
    expected = linear_sgd(*on_cpu, num_classes=4, steps=40, batch_size=64)
    gpu = torch.device("cuda")
    on_gpu = linear_sgd(*(part.cuda() for part in on_cpu), num_classes=4, steps=40, batch_size=64)
    streamed = linear_sgd(*on_cpu, num_classes=4, steps=40, batch_size=64, device=gpu)
    assert on_gpu == pytest.approx(expected, abs=2.5 / 130)
    assert streamed == pytest.approx(expected, abs=2.5 / 130)
