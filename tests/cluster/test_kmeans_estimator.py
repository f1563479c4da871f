"""KMeans among scikit-learn's estimators: its parameters, clones of it, pipelines and searches."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from fastproto.cluster import KMeans

sklearn = pytest.importorskip("sklearn")
ROWS = np.concatenate([np.random.default_rng(n).normal(20 * n, 1, (40, 3)) for n in range(3)])
OTHERS: dict[str, Any] = {
    "n_clusters": 3,
    "n_iter": 7,
    "n_init": 2,
    "init": "k-means++",
    "spherical": True,
    "tol": 0.5,
    "max_points_per_cluster": 9,
    "empty": "keep",
    "seed": 4,
    "precision": "fast",
    "chunk_rows": 8,
    "device": torch.device("cpu"),
    "progress": True,
}


def test_parameters_are_those_of_the_constructor() -> None:
    kmeans, expected = KMeans(**OTHERS), {**OTHERS, "engine": "fastproto", "process_group": None}
    assert kmeans.get_params() == kmeans.get_params(deep=False) == expected
    assert list(kmeans.get_params()) == list(inspect.signature(KMeans).parameters)
    changed = KMeans(5)
    assert changed.set_params(**OTHERS) is changed
    assert changed.get_params() == kmeans.get_params()
    assert changed.set_params().get_params() == kmeans.get_params()


def test_what_was_fitted_stays_until_the_next_fit() -> None:
    kmeans = KMeans(3).fit(ROWS)
    expected = kmeans.predict(ROWS), kmeans.transform(ROWS)
    kmeans.set_params(n_clusters=5, n_iter=1)
    assert torch.equal(kmeans.predict(ROWS), expected[0])
    assert torch.equal(kmeans.transform(ROWS), expected[1])
    assert kmeans.fit(ROWS).transform(ROWS).shape == (120, 5)


def test_the_metric_of_a_fit_stays_until_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(300, 8) + 3
    fitted = KMeans(5).fit(x)
    score = fitted.score(x)
    fitted.set_params(spherical=True)
    assert torch.equal(fitted.predict(x), fitted.labels_) and fitted.score(x) == score
    with monkeypatch.context() as patch:  # with new centres, as it assigns
        patch.setattr("fastproto.cluster.kmeans.assign_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fitted.fit(x)
    assert fitted.score(x) > 0
    fitted.fit(x)
    assert torch.equal(fitted.predict(x), fitted.labels_) and fitted.score(x) > 0


def test_bad_parameters_change_nothing() -> None:
    kmeans = KMeans(3).fit(ROWS)
    before, centers = kmeans.get_params(), kmeans.cluster_centers_
    with pytest.raises(ValueError, match=r"KMeans.set_params: parameters expected some of n_clusters, .* got clusters"):
        kmeans.set_params(n_iter=3, clusters=3)
    with pytest.raises(ValueError, match="KMeans: n_init expected an integer of at least 1, got int 0"):
        kmeans.set_params(n_iter=3, n_init=0)
    assert kmeans.get_params() == before
    assert kmeans.cluster_centers_ is centers


@pytest.mark.parametrize("init", [torch.randn(3, 3), np.random.default_rng(0).normal(size=(3, 3))])
def test_a_clone_has_the_parameters_and_nothing_learnt(init: Any) -> None:
    from sklearn.base import clone

    kmeans = KMeans(3, init=init, n_iter=2).fit(ROWS)
    other = clone(kmeans)
    assert type(other.init) is type(init)
    assert np.array_equal(other.init, init)
    assert other.n_iter == 2
    assert not hasattr(other, "cluster_centers_")
    assert torch.equal(other.fit(ROWS).cluster_centers_, kmeans.cluster_centers_)


def test_in_a_pipeline() -> None:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pipeline = make_pipeline(StandardScaler(), KMeans(2)).set_params(kmeans__n_clusters=3, kmeans__init="k-means++")
    scaled = StandardScaler().fit_transform(ROWS)
    expected = KMeans(3, init="k-means++").fit(scaled)
    assert torch.equal(pipeline.fit_predict(ROWS), expected.labels_)
    assert torch.equal(pipeline.transform(ROWS), expected.transform(scaled))
    labels = np.arange(len(ROWS)) % 7
    assert torch.equal(pipeline.fit(ROWS, labels)[-1].cluster_centers_, expected.cluster_centers_)
    assert torch.equal(pipeline.fit_predict(ROWS, labels), expected.labels_)


def test_in_a_search() -> None:
    from sklearn.model_selection import GridSearchCV

    search = GridSearchCV(KMeans(1, init="k-means++"), {"n_clusters": [1, 3], "n_iter": [1, 20]}, cv=2)
    search.fit(np.random.default_rng(0).permutation(ROWS))
    assert search.best_params_["n_clusters"] == 3
    assert search.best_estimator_.counts_.tolist() == [40, 40, 40]


def test_repr_shows_what_is_not_by_default() -> None:
    assert repr(KMeans(3)) == "KMeans(n_clusters=3)"
    assert repr(KMeans(3, n_init=2, empty="keep")) == "KMeans(n_clusters=3, n_init=2, empty='keep')"
    assert repr(KMeans(2, init=torch.zeros(2, 9))) == "KMeans(n_clusters=2, init=float32 (2, 9) on cpu)"


class Shy(KMeans):
    """A subclass with arguments of its own."""

    def __init__(self, n_clusters: int, shyness: int = 3) -> None:
        self.shyness = shyness
        super().__init__(n_clusters)


def test_a_subclass_has_parameters_of_its_own() -> None:
    assert Shy(5, 7).get_params() == {"n_clusters": 5, "shyness": 7}
    assert repr(Shy(5)) == "Shy(n_clusters=5)"
