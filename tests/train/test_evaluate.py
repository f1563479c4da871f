"""Embedding, weighted nearest neighbours against a plain loop, the linear probe against scikit-learn."""

from __future__ import annotations

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastproto.train import evaluate as evaluation
from fastproto.train.data import Dataset
from fastproto.train.evaluate import balanced, embed, evaluate, knn, linear_probe, linear_sgd


def clusters(rows: int, width: int, classes: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(rows) % classes
    return centres[labels] + spread * torch.randn(rows, width), labels


def knn_oracle(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int,
    temperature: float,
    num_classes: int,
) -> float:
    correct = 0
    for row, label in zip(test.double().numpy(), test_labels.tolist(), strict=True):
        scored = []
        for key, key_label in zip(train.double().numpy(), train_labels.tolist(), strict=True):
            scored.append((float(row @ key) / (np.linalg.norm(row) * np.linalg.norm(key)), key_label))
        votes = [0.0] * num_classes
        for similarity, key_label in sorted(scored, reverse=True)[:k]:
            votes[key_label] += math.exp(similarity / temperature)
        correct += votes.index(max(votes)) == label
    return correct / len(test)


@pytest.mark.parametrize(
    ("rows", "width", "classes", "k", "temperature"),
    [(33, 24, 4, 5, 0.07), (130, 96, 10, 20, 0.1), (61, 3, 5, 60, 1.0), (1, 1, 1, 1, 0.5), (20, 7, 3, 200, 0.1)],
)
@pytest.mark.parametrize("similarities", [1, 500, 2**24])
def test_knn_is_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, rows: int, width: int, classes: int, k: int, temperature: float, similarities: int
) -> None:
    monkeypatch.setattr(evaluation, "SIMILARITIES", similarities)
    train, train_labels = clusters(rows, width, classes, spread=2.0)
    test, test_labels = clusters(33, width, classes, spread=2.0)
    got = knn(train, train_labels, test, test_labels, k=k, temperature=temperature, num_classes=classes)
    assert got == knn_oracle(train, train_labels, test, test_labels, k, temperature, classes)


def test_knn_weighs_votes_by_similarity() -> None:
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels = torch.tensor([0, 1, 1])
    test, wanted = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    # exp(1/τ) against 2 exp(0.6/τ): the near one wins below τ = 0.4 / ln 2 = 0.577.
    assert knn(train, labels, test, wanted, k=3, temperature=0.5, num_classes=2) == 1.0
    assert knn(train, labels, test, wanted, k=3, temperature=0.7, num_classes=2) == 0.0
    assert knn(train, labels, test, wanted, k=3, temperature=1e-4, num_classes=2) == 1.0


def test_knn_takes_other_dtypes_strides_duplicates_and_zero_rows() -> None:
    train, labels = clusters(40, 24, 4)
    test, wanted = clusters(33, 24, 4)
    train[0] = 0
    train[5] = train[9]
    expected = knn(train, labels, test, wanted, k=7, temperature=0.1, num_classes=4)
    strided = train.t().contiguous().t()
    assert knn(strided, labels, test, wanted, k=7, temperature=0.1, num_classes=4) == expected
    double = knn(train.double(), labels, test.double(), wanted, k=7, temperature=0.1, num_classes=4)
    assert double == expected
    assert knn(train.bfloat16(), labels, test.bfloat16(), wanted, k=7, temperature=0.1, num_classes=4) > 0.5


@pytest.mark.parametrize(
    ("rows", "width", "classes", "spread"), [(300, 24, 4, 1.5), (507, 96, 10, 4.0), (33, 130, 3, 8.0)]
)
def test_linear_probe_is_logistic_regression(rows: int, width: int, classes: int, spread: float) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, train_labels = clusters(rows, width, classes, spread)
    test, test_labels = clusters(400, width, classes, spread)
    scaler = StandardScaler().fit(train.double().numpy())
    oracle = LogisticRegression(max_iter=5000, tol=1e-8).fit(scaler.transform(train.double()), train_labels.numpy())
    expected = oracle.score(scaler.transform(test.double()), test_labels.numpy())
    got = linear_probe(train, train_labels, test, test_labels, num_classes=classes)
    # One row in four hundred may lie on the border within float32.
    assert abs(got - expected) <= 1 / 400 + 1e-9
    assert 1 / classes < expected


def test_linear_probe_ignores_scale_shift_and_dead_channels() -> None:
    train, train_labels = clusters(120, 16, 4, 1.5)
    test, test_labels = clusters(100, 16, 4, 1.5)
    expected = linear_probe(train, train_labels, test, test_labels, num_classes=4)
    # Powers of two change no digit; a channel that is constant in training must not decide anything.
    scaled = torch.cat([train * 1024, torch.full((120, 1), 3.3)], 1), torch.cat([test * 1024, torch.randn(100, 1)], 1)
    assert linear_probe(scaled[0], train_labels, scaled[1], test_labels, num_classes=4) == expected
    assert linear_probe(train, train_labels, test, test_labels, num_classes=9) == pytest.approx(expected, abs=0.02)


def test_linear_probe_gives_the_same_twice_and_under_no_grad() -> None:
    train, train_labels = clusters(200, 24, 4, 3.0)
    test, test_labels = clusters(200, 24, 4, 3.0)
    train.requires_grad_()
    first = linear_probe(train, train_labels, test, test_labels, num_classes=4)
    with torch.no_grad():
        assert linear_probe(train, train_labels, test, test_labels, num_classes=4) == first
    assert train.grad is None


def test_linear_probe_stops_after_max_iter() -> None:
    train, train_labels = clusters(200, 6, 10, 0.5)
    train = train @ torch.linspace(1, 1.01, 36).reshape(6, 6) + 1e-3 * train
    one = linear_probe(train, train_labels, train, train_labels, num_classes=10, max_iter=1)
    many = linear_probe(train, train_labels, train, train_labels, num_classes=10, max_iter=100)
    assert one < many - 0.1


@pytest.mark.parametrize("batch_size", [1, 4, 512])
def test_embed_normalises_each_channel(batch_size: int) -> None:
    images = torch.randint(0, 256, (9, 3, 5, 7), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 1.0)
    got = embed(lambda x: x.flatten(1), images, mean, std, batch_size)
    pixels = images.numpy().astype(np.float64) / 255
    expected = (pixels - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected.reshape(9, -1), atol=2e-6)


def test_embed_returns_float32_without_a_graph_and_minds_the_mode() -> None:
    images = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5)).eval()
    features = embed(encoder, images, (0.0,) * 3, (1.0,) * 3)
    assert not features.requires_grad
    assert features.shape == (3, 5)
    assert embed(lambda x: x.flatten(1).half(), images, (0.0,) * 3, (1.0,) * 3).dtype == torch.float32
    with pytest.raises(ValueError, match="embed: encode expected a module in eval mode, got one in training mode"):
        embed(encoder.train(), images, (0.0,) * 3, (1.0,) * 3)


def test_embed_refuses() -> None:
    ones = (1.0, 1.0, 1.0)
    with pytest.raises(TypeError, match=r"embed: images expected a uint8 tensor \(N, 3, H, W\), got float32"):
        embed(torch.flatten, torch.zeros(2, 3, 4, 4), ones, ones)
    with pytest.raises(ValueError, match=r"embed: images expected \(N, 3, H, W\), got uint8 \(2, 1, 4, 4\)"):
        embed(torch.flatten, torch.zeros(2, 1, 4, 4, dtype=torch.uint8), ones, ones)
    with pytest.raises(ValueError, match="embed: images expected at least one, got uint8"):
        embed(torch.flatten, torch.zeros(0, 3, 4, 4, dtype=torch.uint8), ones, ones)
    with pytest.raises(ValueError, match="embed: batch_size expected at least 1, got int 0"):
        embed(torch.flatten, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ones, ones, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "train_features expected a float32"),
        ({0: torch.zeros(4)}, ValueError, r"train_features expected \(N, C\), got float32 \(4,\)"),
        ({0: torch.zeros(0, 3), 1: torch.zeros(0, dtype=torch.int64)}, ValueError, "train_features expected at least"),
        ({0: torch.full((4, 3), math.nan)}, ValueError, "train_features expected finite values, got NaN or infinity"),
        ({1: torch.zeros(5, dtype=torch.int64)}, ValueError, r"train_labels expected \(4,\) on cpu, got int64 \(5,\)"),
        ({1: torch.zeros(4)}, TypeError, r"train_labels expected an int64 tensor"),
        ({1: torch.tensor([0, 1, 2, 0])}, ValueError, "train_labels expected 0…1, got labels from 0 to 2"),
        ({2: torch.zeros(2, 4)}, ValueError, r"test_features expected \(M, 3\) on cpu, got float32 \(2, 4\)"),
        ({2: torch.full((2, 3), math.inf)}, ValueError, "test_features expected finite values"),
        ({3: torch.tensor([0, -1])}, ValueError, "test_labels expected 0…1, got labels from -1 to 0"),
    ],
)
def test_knn_and_linear_probe_refuse(change: dict[int, Tensor], error: type[Exception], message: str) -> None:
    good = [torch.rand(4, 3), torch.tensor([0, 1, 0, 1]), torch.rand(2, 3), torch.tensor([0, 1])]
    arguments = [change.get(i, value) for i, value in enumerate(good)]
    with pytest.raises(error, match="^knn: " + message):
        knn(*arguments, k=1, temperature=0.1, num_classes=2)
    with pytest.raises(error, match="^linear_probe: " + message):
        linear_probe(*arguments, num_classes=2)


def test_knn_and_linear_probe_refuse_options() -> None:
    good = [torch.rand(4, 3), torch.tensor([0, 1, 0, 1]), torch.rand(2, 3), torch.tensor([0, 1])]
    with pytest.raises(ValueError, match="knn: k expected at least 1, got int 0"):
        knn(*good, k=0, temperature=0.1, num_classes=2)
    with pytest.raises(ValueError, match=r"knn: temperature expected a positive number, got float 0\.0"):
        knn(*good, k=1, temperature=0.0, num_classes=2)
    with pytest.raises(ValueError, match="linear_probe: max_iter expected at least 1, got int 0"):
        linear_probe(*good, num_classes=2, max_iter=0)


def test_evaluate_is_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (90, 3, 6, 6), dtype=torch.uint8)
    labels = torch.arange(90) % 3
    images[:, 0] = (images[:, 0] // 4) + 60 * labels[:, None, None].to(torch.uint8)
    data = Dataset("made", images[:60], labels[:60], images[60:], labels[60:], ("a", "b", "c"), (0.5,) * 3, (0.2,) * 3)

    def encode(x: Tensor) -> Tensor:
        return x[:, :, ::3, ::3].flatten(1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = evaluate(encode, data, batch_size=7, device=torch.device("cpu"))
    train, test = (embed(encode, part, data.mean, data.std) for part in (data.train_images, data.test_images))
    parts = (train, data.train_labels, test, data.test_labels)
    assert scores == {
        "knn20": knn(*parts, k=20, temperature=0.07, num_classes=3),
        "knn200": knn(*parts, k=200, temperature=0.1, num_classes=3),
        "linear": linear_probe(*parts, num_classes=3),
    }
    assert scores["knn20"] > 0.6
    assert scores["linear"] > 0.6

    monkeypatch.setattr(evaluation, "linear_sgd", partial(linear_sgd, steps=30))
    some = evaluate(encode, data, metrics=("linear_sgd", "knn20"), labels=0.25)
    kept = balanced(data.train_labels, 0.25, 3)
    assert len(kept) == 15
    parts = (train[kept], data.train_labels[kept], test, data.test_labels)
    by_rate = linear_sgd(*parts, num_classes=3, steps=30)
    assert some == {
        "linear_sgd": max(by_rate.values()),
        **{f"linear_sgd/{rate:g}": accuracy for rate, accuracy in by_rate.items()},
        "knn20": knn(*parts, k=20, temperature=0.07, num_classes=3),
    }
    assert {"linear_sgd/1e-05", "linear_sgd/0.0005", "linear_sgd/0.1"} < some.keys()
    with pytest.raises(ValueError, match=r"metrics expected knn20\|knn200\|linear\|linear_sgd, got svm"):
        evaluate(encode, data, metrics=("svm",))  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "classes", "share"), [(1000, 10, 0.1), (1000, 10, 0.01), (60, 7, 0.5), (9, 3, 0.01)])
def test_balanced_keeps_equally_many_of_every_class(rows: int, classes: int, share: float) -> None:
    labels = torch.arange(rows) % classes
    kept = balanced(labels, share, classes)
    each = max(1, round(share * rows / classes))
    assert labels[kept].bincount(minlength=classes).tolist() == [each] * classes
    assert kept.tolist() == sorted(set(kept.tolist()))


def test_balanced_is_keyed_nested_and_fair_to_small_classes() -> None:
    labels = torch.cat([torch.zeros(900), torch.ones(98), torch.full((2,), 2)]).long()
    few, more = (set(balanced(labels, share, 3).tolist()) for share in (0.03, 0.3))
    assert few < more
    assert labels[sorted(few)].bincount().tolist() == [10, 10, 2]
    assert labels[sorted(more)].bincount().tolist() == [100, 98, 2]
    # Rows that come later change nothing for those before them, another seed does, the generator is not asked.
    state = torch.get_rng_state()
    longer = torch.cat([labels, torch.full((500,), 3)])
    assert [row for row in balanced(longer, 0.0267, 4).tolist() if row < 1000] == sorted(few)
    assert set(balanced(labels, 0.03, 3, seed=1).tolist()) != few
    assert torch.equal(torch.get_rng_state(), state)
    # Drawn from all over the class.
    zeros = torch.tensor(sorted(row for row in more if row < 900)).double()
    assert abs(zeros.mean() - 450) < 4 * 260 / len(zeros) ** 0.5
    assert balanced(labels, 1.0, 3).tolist() == list(range(1000))


def test_balanced_refuses() -> None:
    with pytest.raises(ValueError, match=r"balanced: share expected a number above 0, at most 1, got float 1\.5"):
        balanced(torch.zeros(3, dtype=torch.int64), 1.5, 1)
    with pytest.raises(ValueError, match=r"balanced: share expected a number above 0, at most 1, got int 0"):
        balanced(torch.zeros(3, dtype=torch.int64), 0, 1)
    with pytest.raises(TypeError, match="balanced: labels expected an int64 tensor"):
        balanced(torch.zeros(3), 0.5, 1)


@pytest.mark.gpu
def test_on_a_gpu_the_scores_are_the_same() -> None:
    train, train_labels = clusters(300, 96, 4, 3.0)
    test, test_labels = clusters(130, 96, 4, 3.0)
    on_cpu = (train, train_labels, test, test_labels)
    on_gpu = tuple(tensor.cuda() for tensor in on_cpu)
    for score, options in ((knn, {"k": 20, "temperature": 0.1}), (linear_probe, {})):
        assert score(*on_gpu, num_classes=4, **options) == pytest.approx(
            score(*on_cpu, num_classes=4, **options), abs=1.5 / 130
        )
