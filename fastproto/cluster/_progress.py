"""The bar that a fit shows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastproto.cluster._fit import Report


@contextmanager
def progress(iterations: int, n_clusters: int, *, shown: bool) -> Iterator[Callable[[Report], None]]:
    """What to call with each report. Without tqdm, which the core does not need, a warning and no bar."""
    tqdm = _tqdm() if shown else None
    if tqdm is None:
        yield lambda report: None
        return
    with tqdm(total=iterations, desc=f"k-means, {n_clusters} clusters", unit="iteration") as bar:

        def show(report: Report) -> None:
            bar.set_postfix_str(f"objective {report.objective:.6g}", refresh=False)
            bar.update()

        yield show
        # Fits that converged took fewer.
        bar.total = bar.n
        bar.refresh()


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        warnings.warn("KMeans: no progress is shown: tqdm is not installed", stacklevel=2)
        return None
    return tqdm
