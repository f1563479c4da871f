"""Normalisation over several processes against one with the whole batch; test_scale.py has it in whole runs of two.

Apart from those: the processes import this file, and the trainer takes longer to import than the test to run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastproto.testing import assert_matches_single_process
from fastproto.train.sync_norm import SumBatchNorm, synchronise


class Norms(nn.Module):
    """Normalisations of maps and rows, with and without weights, running statistics and a fixed momentum."""

    def __init__(self) -> None:
        super().__init__()
        norms = [nn.BatchNorm2d(3), nn.BatchNorm1d(5, momentum=None), nn.BatchNorm1d(5, affine=False)]
        norms.append(nn.BatchNorm1d(5, track_running_stats=False))
        for norm in norms:
            if norm.affine:
                nn.init.uniform_(norm.weight)
                nn.init.uniform_(norm.bias)
        self.norms = synchronise(nn.ModuleList(norms), torch.device("cpu")).double()

    def forward(self, maps: Tensor, rows: Tensor, upstream_maps: Tensor, upstream_rows: Tensor) -> Tensor:
        out = (self.norms[0](maps) * upstream_maps).sum((1, 2, 3))
        for norm in (*self.norms[1:], self.norms[1]):
            out = out + (norm(rows) * upstream_rows).sum(1)
        return out.square().mean()


def test_normalisation_sees_the_rows_of_all_processes() -> None:
    maps, rows = 3 + torch.randn(6, 3, 4, 2).double(), 1e3 + torch.randn(6, 5).double()
    inputs = [maps.requires_grad_(), rows.requires_grad_(), torch.randn_like(maps), torch.randn_like(rows)]
    assert all(isinstance(norm, SumBatchNorm) for norm in Norms().norms)
    assert_matches_single_process(Norms(), inputs, world_size=3)
