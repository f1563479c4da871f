"""A fit's iterations: how many there are, and that queuing the next before the last is known changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastproto.cluster._fit import Report, fit_centers
from fastproto.cluster._lloyd import Iteration, lloyd
from fastproto.cluster._rows import Rows
from fastproto.cluster.bounds import Search


def fit(x: Tensor, centers: Tensor, **options) -> tuple[Tensor, list[Report], int]:
    """Centres, reports, and how many iterations were computed for them."""
    rows = Rows(x)
    rows.survey("test")
    spherical = options.get("spherical", False)
    step, calls = lloyd(rows, spherical, Search("ip" if spherical else "l2")), []

    def counted(given: Tensor) -> Iteration:
        calls.append(given)
        return step(given)

    options = {"n_iter": 50, "tol": 0.0, "spherical": False, "split": len(x), "ahead": False} | options
    found, reports = fit_centers(counted, centers, **options, watch=lambda report: None)
    return found, [report._replace(time=0.0) for report in reports], len(calls)


def starts(kind: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(300, 4)
    far = torch.full((6, 4), 100.0)
    return x, {"rows": x[:9].clone(), "far": torch.cat([x[:3], far]), "all far": 10 * far}[kind]


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("split", [None, 300])
@pytest.mark.parametrize(("n_iter", "tol"), [(1, 0.0), (5, 0.0), (50, 0.0), (50, 1e-2)])
@pytest.mark.parametrize("start", ["rows", "far", "all far"])
def test_queuing_ahead_changes_nothing(start: str, n_iter: int, tol: float, split: int | None, spherical: bool) -> None:
    x, centers = starts(start)
    options = {"n_iter": n_iter, "tol": tol, "split": split, "spherical": spherical}
    blocking, ahead = (fit(x, centers, **options, ahead=ahead) for ahead in (False, True))
    assert torch.equal(ahead[0], blocking[0])
    assert ahead[1] == blocking[1]


def test_waste_is_one_iteration_where_the_fit_ends_early_and_one_for_a_run_of_splits() -> None:
    x, centers = starts("rows")
    _, reports, calls = fit(x, centers)
    assert calls == len(reports) < 50
    assert fit(x, centers, ahead=True)[2] == calls + 1
    assert fit(x, centers, ahead=True, n_iter=5)[2] == 5
    x, centers = starts("far")
    _, reports, calls = fit(x, centers, n_iter=6)
    assert reports[0].empty > 0
    assert all(report.empty == 0 for report in reports[-2:])
    assert fit(x, centers, n_iter=6, ahead=True)[2] == 7


def test_reports_tell_objective_imbalance_and_empty_clusters() -> None:
    x = torch.tensor([[0.0], [1.0], [10.0]])
    _, reports, _ = fit(x, torch.tensor([[0.0], [10.0], [99.0]]), n_iter=1)
    assert reports == [Report(objective=1.0, imbalance=3 * (2**2 + 1) / 3**2, empty=1, time=0.0)]


def test_ends_with_the_iteration_that_changes_nothing() -> None:
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    centers, reports, _ = fit(x, torch.tensor([[0.0], [10.0]]))
    assert torch.equal(centers, torch.tensor([[0.5], [10.5]]))
    assert [report.objective for report in reports] == [2.0, 1.0]
