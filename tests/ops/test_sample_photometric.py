"""sample_photometric: the distributions it promises, keyed by sample."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from fastproto.views import sample_photometric

IDS = torch.arange(6000)


def test_jitter_is_uniform_and_independent() -> None:
    p = sample_photometric(IDS, views=1, jitter=(0.4, 0.2, 1.5, 0.1), jitter_p=1.0)
    bounds = [(0.6, 1.4), (0.8, 1.2), (0.0, 2.5), (-0.1, 0.1)]
    for column, (low, high) in zip(p["jitter"].unbind(1), bounds, strict=True):
        assert scipy.stats.kstest(column.numpy(), "uniform", (low, high - low)).pvalue > 1e-3
    assert (torch.corrcoef(p["jitter"].T) - torch.eye(4)).abs().max() < 0.06


def test_every_order_is_as_likely() -> None:
    p = sample_photometric(IDS, views=1)
    counts = torch.zeros(4, 4, 4, 4)
    counts.index_put_(tuple(p["order"].T), torch.ones(len(IDS)), accumulate=True)
    seen = torch.stack([counts[order] for order in itertools.permutations(range(4))])
    assert seen.sum() == len(IDS)
    assert scipy.stats.chisquare(seen.double().numpy()).pvalue > 1e-3


@pytest.mark.parametrize("probability", [0.2, 0.8, 1.0])
def test_probabilities(probability: float) -> None:
    p = sample_photometric(
        IDS, jitter_p=probability, gray_p=probability, blur_p=probability, solarize_p=probability, threshold=0.25
    )
    chosen = {
        "jitter": (p["jitter"] != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(dim=1),
        "gray": p["gray"],
        "sigma": p["sigma"] > 0,
        "threshold": p["threshold"] == 0.25,
    }
    for column in chosen.values():
        assert column.shape == (2 * len(IDS),)
        assert float(column.double().mean()) == pytest.approx(probability, abs=0.015)
    together = torch.stack(list(chosen.values())).double()
    if probability < 1:
        assert (torch.corrcoef(together) - torch.eye(4)).abs().max() < 0.05
    assert (p["threshold"][~chosen["threshold"]] == math.inf).all()
    blurred = p["sigma"][p["sigma"] > 0]
    assert scipy.stats.kstest(blurred.numpy(), "uniform", (0.1, 1.9)).pvalue > 1e-3


def test_what_never_happens_is_left_out() -> None:
    assert set(sample_photometric(IDS)) == {"jitter", "order", "gray"}
    assert set(sample_photometric(IDS, jitter_p=0, gray_p=0)) == set()
    others = sample_photometric(IDS, jitter=(0, 0, 0, 0), blur_p=0.1, solarize_p=0.1)
    assert set(others) == {"gray", "sigma", "threshold"}


def test_keyed_by_sample() -> None:
    ids = torch.randperm(1000)[:33]
    options = {"blur_p": 0.5, "solarize_p": 0.5, "seed": 3, "epoch": 4}
    whole = sample_photometric(ids, **options)
    for rows in torch.arange(33).split(6):
        part = sample_photometric(ids[rows].int(), **options)
        for name, value in part.items():
            assert torch.equal(value.unflatten(0, (2, -1)), whole[name].unflatten(0, (2, 33))[:, rows])
    for other in ({"seed": 4}, {"epoch": 5}):
        changed = sample_photometric(ids, **{**options, **other})
        assert not torch.equal(changed["jitter"], whole["jitter"])
    view0, view1 = whole["jitter"].chunk(2)
    assert not torch.equal(view0, view1)


def test_switching_one_change_on_leaves_the_others() -> None:
    one, two = sample_photometric(IDS), sample_photometric(IDS, blur_p=0.5, solarize_p=0.2)
    for name, value in one.items():
        assert torch.equal(value, two[name])


def test_each_view_may_have_a_probability_of_its_own() -> None:
    """A view's rows are those that it has where all views have its probabilities."""
    blur, solarize, options = (1.0, 0.1, 0.1, 0.0), (0.0, 0.2, 0.2, 1.0), {"views": 4, "seed": 7, "epoch": 2}
    mixed = sample_photometric(IDS, blur_p=blur, solarize_p=solarize, **options)
    n = len(IDS)
    for v, (b, s) in enumerate(zip(blur, solarize, strict=True)):
        alike = sample_photometric(IDS, blur_p=b, solarize_p=s, **options)
        nothing = {"sigma": torch.zeros(4 * n), "threshold": torch.full((4 * n,), math.inf)}
        for name, rows in mixed.items():
            expected = alike.get(name, nothing.get(name))
            assert torch.equal(rows[v * n : (v + 1) * n], expected[v * n : (v + 1) * n]), (v, name)
    assert sample_photometric(IDS[:0], blur_p=(1.0, 0.1))["sigma"].shape == (0,)


def test_arrays_are_as_good_as_tuples() -> None:
    options = {"sigma": torch.tensor([0.5, 1.5], dtype=torch.float64), "blur_p": np.array([1.0, 0.5])}
    expected = sample_photometric(IDS, sigma=(0.5, 1.5), blur_p=(1.0, 0.5))
    for name, rows in sample_photometric(IDS, **options).items():
        assert torch.equal(rows, expected[name]), name


def test_dtypes() -> None:
    p = sample_photometric(IDS[:1], blur_p=0.5, solarize_p=0.5, views=3)
    dtypes = {name: value.dtype for name, value in p.items()}
    f = torch.float32
    assert dtypes == {"jitter": f, "order": torch.int64, "gray": torch.bool, "sigma": f, "threshold": f}
    assert sample_photometric(IDS[:0])["jitter"].shape == (0, 4)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "sample_ids expected an int64 or int32 tensor", {"sample_ids": IDS.float()}),
        (ValueError, r"jitter_p expected a number in \[0, 1\], got float 1.5", {"jitter_p": 1.5}),
        (ValueError, "gray_p expected", {"gray_p": -0.5}),
        (TypeError, "blur_p expected a number in .0, 1., or one for each view, got str", {"blur_p": "0.5"}),
        (ValueError, "blur_p expected a number in .0, 1., or one for each view, got tuple", {"blur_p": (0.5,)}),
        (TypeError, "blur_p expected a number in .0, 1., or one for each view, got bool", {"blur_p": True}),
        (ValueError, "solarize_p expected", {"solarize_p": math.nan}),
        (ValueError, "solarize_p expected", {"solarize_p": (0.5, 1.5)}),
        (ValueError, "threshold expected", {"threshold": 128}),
        (ValueError, "jitter expected four strengths of at least 0, that of the hue", {"jitter": (0.4, 0.4, 0.4, 0.6)}),
        (ValueError, "jitter expected four strengths", {"jitter": (0.4, 0.4, -0.4, 0.1)}),
        (ValueError, "jitter expected four strengths", {"jitter": (0.4, 0.4, 0.4)}),
        (TypeError, "jitter expected four strengths, got float 0.4", {"jitter": 0.4}),
        (ValueError, r"sigma expected \(low, high\) with 0 <= low <= high", {"sigma": (2.0, 0.1)}),
        (TypeError, "sigma expected a pair of numbers", {"sigma": 2.0}),
        (ValueError, r"sigma expected \(low, high\) with 0 <= low <= high < 1e.18, got tuple", {"sigma": (0.1, 1e300)}),
        (ValueError, "views expected 1 to 4096", {"views": 0}),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match="^sample_photometric: " + message):
        sample_photometric(**{"sample_ids": IDS, **arguments})
