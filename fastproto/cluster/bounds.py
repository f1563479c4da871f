"""Bounds: what one iteration of k-means leaves the next, so that it need not try every centre on every row.

Rows of one cluster stand together in panels, neighbouring centres together in groups. A panel misses a group by
    s = min_n ( min_{c in group} ||x_n - c|| - ||x_n - own_n|| )
at least: the slack. Once the group's centres have moved by at most ``drift`` and the distances to the own centres have
grown by at most g, no centre of the group is nearest to any row of the panel while s - drift - g > 0. Labels and
distances are those of a full search. docs/math/assign.md has the proof with its rounding.

Source: Ding et al., "Yinyang k-means", ICML 2015, section 3, with panels in the place of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastproto import _native
from fastproto.ops._dispatch import OPS
from fastproto.ops.assign import assign, launch
from fastproto.ops.update import update

GROUPING_ITERATIONS = 5
SHARE = 4  # bounds take a fourth of the memory of the rows at most


class Search:
    """Nearest centres of the same rows over and over, chunk by chunk: with bounds where there are kernels for them.

    Args:
        metric: "l2" or "ip". Inner products have no bounds yet.
        exact: False for a search that may err as ``assign`` says; it keeps no bounds.

    Attributes:
        tried: pairs of a row and a centre whose distance was computed, so far.
    """

    def __init__(self, metric: str, exact: bool = True) -> None:
        self.metric, self.exact, self._tried_in_full = metric, exact, 0
        self.bounds: dict[int, Bounds] = {}

    @property
    def tried(self) -> int:
        return self._tried_in_full + sum(bounds.tried for bounds in self.bounds.values())

    def nearest(self, start: int, x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and distances as from ``assign``, of the chunk ``x`` that begins at row ``start``.

        They are valid until the next call for this chunk.
        """
        if self._bounded(x, centers):
            if start not in self.bounds:
                self.bounds[start] = Bounds()
            return self.bounds[start].assign(x, centers)
        self._tried_in_full += len(x) * len(centers)
        return assign(x, centers, self.metric, self.exact)

    def add_tried(self, pairs: int) -> None:
        """Counts pairs that another search has computed."""
        self._tried_in_full += pairs

    def forget(self) -> None:
        """Frees the bounds, which only a search of the same rows could use."""
        self._tried_in_full, self.bounds = self.tried, {}

    def _bounded(self, x: Tensor, centers: Tensor) -> bool:
        if self.metric != "l2" or not self.exact or x.device.type != "cpu" or OPS["assign"].choose("cpu") != "cpp":
            return False
        assert _native.cpp is not None
        # One float32 for each panel and group: worth it while that is a fraction of the rows themselves.
        pairs = _native.cpp.assign_panel_rows() * _native.cpp.assign_group_centers()
        slack = len(x) * len(centers) // pairs
        return torch.float64 not in (x.dtype, centers.dtype) and 4 * slack <= x.nbytes // SHARE


class Bounds:
    """The searches of one fit, all over the same rows, the first two of them full. Needs the C++ kernels.

    Attributes:
        tried: pairs of a row and a centre whose distance was computed, so far.
    """

    def __init__(self) -> None:
        assert _native.cpp is not None
        self.tried = 0
        self.panel_rows, self.group_centers = _native.cpp.assign_panel_rows(), _native.cpp.assign_group_centers()
        nothing = torch.empty(0, device="cpu")
        self.labels = self.distance = self.row_order = self.center_order = self.slack = self.centers = nothing

    def assign(
        self,
        x: Tensor,  # (N, D) float32, float16 or bfloat16, on the CPU
        centers: Tensor,  # (K, D) float
    ) -> tuple[Tensor, Tensor]:
        """Labels (N,) and squared distances (N,) as from ``assign``; valid until the next call."""
        if not len(self.labels):
            self.labels, self.distance = assign(x, centers)
            self.tried += len(x) * len(centers)
            return self.labels, self.distance
        if not len(self.slack):
            self._arrange(centers)
        drift = (centers.double() - self.centers.double()).norm(dim=1)
        tried = torch.zeros((), dtype=torch.int64, device="cpu")
        launch(
            x, centers, "l2", True, self.labels, self.distance, self.row_order, self.center_order,
            self._per_group(drift), self.slack, tried,
        )  # fmt: skip
        self.centers = centers
        self.tried += int(tried)
        return self.labels, self.distance

    def _arrange(self, centers: Tensor) -> None:
        """Puts neighbouring centres into one group, and rows of neighbouring centres into one panel."""
        size, k = self.group_centers, len(centers)
        anchors = centers[:: max(1, size // 2)]
        for _ in range(GROUPING_ITERATIONS):
            labels, _ = assign(centers, anchors)
            sums, counts = update(centers, labels, len(anchors))
            anchors = torch.where(counts[:, None] > 0, sums / counts[:, None], anchors.double()).to(centers.dtype)
        self.center_order = labels.argsort(stable=True)
        place = torch.empty_like(self.center_order)
        place[self.center_order] = torch.arange(k, device="cpu")
        self.row_order = place[self.labels].argsort(stable=True)
        slack = -(-len(self.labels) // self.panel_rows), -(-k // size)
        self.slack = torch.full(slack, -torch.inf, dtype=torch.float32, device="cpu")
        self.centers = centers

    def _per_group(self, drift: Tensor) -> Tensor:
        """The largest drift of a group's centres, rounded up: (groups,) float32."""
        padded = torch.nn.functional.pad(drift[self.center_order], (0, -len(drift) % self.group_centers))
        return (padded.view(-1, self.group_centers).amax(1) * (1 + 1e-6)).float()
