"""Normalisation over several processes against one with the whole batch; test_scale.py has it in whole runs of two.

Apart from those: the processes import this file, and the trainer takes longer to import than the test to run.
"""

from __future__ import annotations

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from fastproto.testing import assert_matches_single_process
from fastproto.train import sync_norm
from fastproto.train.sync_norm import SumBatchNorm, synchronise


class Norms(nn.Module):
    """Normalisations of maps and rows, with and without weights, running statistics and a fixed momentum."""

    def __init__(self) -> None:
        super().__init__()
        norms = [nn.BatchNorm2d(3), nn.BatchNorm1d(5, momentum=None), nn.BatchNorm1d(5, affine=False)]
        norms.append(nn.BatchNorm1d(5, track_running_stats=False))
        norms.append(BatchNormAct2d(3))
        for norm in norms:
            if norm.affine:
                nn.init.uniform_(norm.weight)
                nn.init.uniform_(norm.bias)
        self.norms = synchronise(nn.ModuleList(norms), torch.device("cpu")).double()

    def forward(self, maps: Tensor, rows: Tensor, upstream_maps: Tensor, upstream_rows: Tensor) -> Tensor:
        out = ((self.norms[0](maps) + self.norms[-1](maps)) * upstream_maps).sum((1, 2, 3))
        for norm in (*self.norms[1:-1], self.norms[1]):
            out = out + (norm(rows) * upstream_rows).sum(1)
        return out.square().mean()


def test_normalisation_sees_the_rows_of_all_processes() -> None:
    maps, rows = 3 + torch.randn(6, 3, 4, 2).double(), 1e3 + torch.randn(6, 5).double()
    inputs = [maps.requires_grad_(), rows.requires_grad_(), torch.randn_like(maps), torch.randn_like(rows)]
    assert all(isinstance(norm, SumBatchNorm) for norm in Norms().norms)
    assert_matches_single_process(Norms(), inputs, world_size=3)


def test_half_precision_is_normalised_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's does, whose running statistics stay in float32; autocast hands over bfloat16."""
    monkeypatch.setattr(sync_norm, "rank_and_world", lambda: (0, 2))
    # The other process has the same rows.
    monkeypatch.setattr(sync_norm, "sum_over_ranks", lambda value: 2 * value)
    monkeypatch.setattr(sync_norm.dist, "all_reduce", lambda value: value.mul_(2))
    rows = (100 + torch.randn(64, 3)).bfloat16()
    alone, shared = nn.BatchNorm1d(3), nn.ModuleList([nn.BatchNorm1d(3)])
    both = torch.cat([rows, rows])
    wanted = alone(both)[:64]
    found = synchronise(shared, torch.device("cpu"))[0](rows)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.01)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(shared[0], name), getattr(alone, name))
