"""One fit: iterations from given centres until they are through or settle, with one word to the host about each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastproto.cluster._empty import split_empty
from fastproto.cluster._lloyd import Iteration, Step, unit


class Report(NamedTuple):
    """What the host learns of an iteration."""

    objective: float  # of the centres that it was given
    imbalance: float  # K Σ count² / (Σ count)²: 1 where all clusters are equally large
    empty: int  # clusters without rows
    time: float  # seconds since the fit began


def fit_centers(
    step: Step,
    centers: Tensor,  # (K, D)
    *,
    n_iter: int,
    tol: float,
    spherical: bool,
    split: int | None,
    ahead: bool,
    watch: Callable[[Report], None],
) -> tuple[Tensor, list[Report]]:
    """The centres after ``n_iter`` iterations, or after the first that changes none or hardly changes the objective.

    Args:
        tol: the share of the objective that counts as hardly, if above 0.
        spherical: centres have unit length.
        split: total number of rows, by which ``split_empty`` chooses what to split; None keeps empty clusters' centres.
        ahead: queues an iteration before the word about the one before it has come: a GPU never waits for the host.
            The result is the same.
        watch: is called with each report.
    """
    began = time.perf_counter()
    reports: list[Report] = []
    found, word = _begin(step, centers, None, tol)
    while True:
        last = len(reports) + 1 == n_iter
        # A split makes other centres than those that the next iteration would have been queued with. Where there was
        # one, the next is likely.
        may_split = split is not None and bool(reports) and reports[-1].empty > 0
        queued = _begin(step, found.centers, found.objective, tol) if ahead and not last and not may_split else None
        objective, imbalance, empty, unchanged, settled = word()
        reports.append(Report(objective, imbalance, int(empty), time.perf_counter() - began))
        watch(reports[-1])
        moved = found.centers
        if empty and split is not None:
            # The rule is stated for counts of rows: weights enter it scaled to a mean of 1.
            moved = split_empty(moved, found.counts * (split / found.counts.sum()), split)
            moved = unit(moved) if spherical else moved
            unchanged, queued = torch.equal(centers, moved), None
        if last or unchanged or settled:
            return moved, reports
        centers = moved
        found, word = queued or _begin(step, centers, found.objective, tol)


def _begin(
    step: Step, centers: Tensor, before: Tensor | None, tol: float
) -> tuple[Iteration, Callable[[], list[float]]]:
    """Queues an iteration and the way of its five numbers to the host: call what is returned to wait for them."""
    found = step(centers)
    total = found.counts.sum()
    settled = torch.zeros_like(total)
    if before is not None and tol > 0:
        settled = (found.objective - before).abs() <= tol * before.abs()
    numbers = (
        found.objective,
        found.counts.square().sum() * len(found.counts) / total.square(),
        (found.counts == 0).sum(),
        (found.centers == centers).all(),
        settled,
    )
    word = torch.stack([number.double() for number in numbers])
    if not word.is_cuda:
        return found, word.tolist
    on_host = word.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(word.device))

    def wait() -> list[float]:
        arrived.synchronize()
        return on_host.tolist()

    return found, wait
