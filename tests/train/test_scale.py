"""Several processes against one with the whole batch: normalisation, and whole runs under torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastproto.testing import assert_matches_single_process
from fastproto.train.checkpoint import load_run, read_log
from fastproto.train.sync_norm import SumBatchNorm, synchronise

RECIPE = """
data: imagefolder:{images}
epochs: 2
batch_size: 8
image_size: 16
device: cpu
encoder: {{name: resnet-tiny, width: 8}}
head: {{hidden: 16, dim: 8}}
views: {{size: 16, box_warmup: 1, box_interval: 1, augment: none}}
prototypes: {{num: [3], warmup: 1, n_iter: 3}}
target: {{queue: 16}}
optimizer: {{lr: 0.01, warmup: 0.5}}
"""


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


@pytest.mark.parametrize("world_size", [2, 3])
def test_normalisation_sees_the_rows_of_all_processes(world_size: int) -> None:
    maps, rows = 3 + torch.randn(6, 3, 4, 2).double(), 1e3 + torch.randn(6, 5).double()
    inputs = [maps.requires_grad_(), rows.requires_grad_(), torch.randn_like(maps), torch.randn_like(rows)]
    assert all(isinstance(norm, SumBatchNorm) for norm in Norms().norms)
    assert_matches_single_process(Norms(), inputs, world_size)


@pytest.mark.parametrize("method", ["simclr", "pauc"])
def test_two_processes_find_the_weights_of_one(tmp_path: Path, method: str) -> None:
    draw = np.random.default_rng(0)
    for label, bright in (("dark", 0), ("light", 120)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(15):
            pixels = draw.integers(0, 120, (18, 20, 3)) + bright
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / label / f"{index}.png")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(images=tmp_path / "images"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = []
    for start in ([sys.executable], torchrun):
        run = tmp_path / str(len(found))
        command = [*start, "-m", "fastproto", "train", str(recipe), "--method", method, "--out", str(run)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("linear probe") == 1
        found.append((load_run(run), read_log(run)))
    (one, one_log), (two, two_log) = found
    assert (one.config.devices, two.config.devices) == (1, 2)
    for row_one, row_two in zip(one_log, two_log, strict=True):
        assert row_two["loss"] == pytest.approx(row_one["loss"], rel=1e-3)
    ours, theirs = one.method.state_dict(), two.method.state_dict()
    if "queue" in ours:  # it has the same rows, rank by rank
        ours["queue"], theirs["queue"] = (keys[keys[:, 0].argsort()] for keys in (ours["queue"], theirs["queue"]))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
