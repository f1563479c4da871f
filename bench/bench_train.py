"""One epoch of SimCLR: the trainer against lightly's example script, with one encoder, head size, batch and precision.

Ours is the whole of ``train`` for one epoch, checkpoint and log included, less the evaluation. lightly's is the loop of
its examples/pytorch/simclr.py: its transform, its head, its loss, PIL images in two workers of a DataLoader, which stay
from epoch to epoch. The images are noise; what is learnt from them is not looked at.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from harness import Suite, Work
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image

pytest.importorskip("jsonargparse")
pytest.importorskip("lightly")

from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform

from fastproto.train import loop
from fastproto.train.config import Config, EncoderConfig, HeadConfig
from fastproto.train.data import Dataset
from fastproto.train.encoders import build_encoder
from fastproto.train.files import read_log

COUNT, BATCH, WIDTH, SIDE = 1024, 256, 16, 32
HEAD = HeadConfig(hidden=8 * WIDTH, dim=128)


class PilImages(torch.utils.data.Dataset):
    """What torchvision's CIFAR-10 gives."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = [to_pil_image(image) for image in images]
        self.transform = SimCLRTransform(input_size=SIDE, gaussian_blur=0.0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[list[torch.Tensor], int]:
        return self.transform(self.images[index]), 0


class LightlySimCLR(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = build_encoder("resnet18", image_size=SIDE, width=WIDTH)
        self.projection_head = SimCLRProjectionHead(8 * WIDTH, HEAD.hidden, HEAD.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection_head(self.backbone(x))


def test_cpu(suite: Suite, benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(256, (COUNT, 3, SIDE, SIDE), dtype=torch.uint8)
    labels = torch.zeros(COUNT, dtype=torch.int64)
    dataset = Dataset("noise", images, labels, images[:1], labels[:1], ("none",), (0.5,) * 3, (0.25,) * 3)
    config = Config(
        method="simclr",
        crop="random",
        epochs=1,
        batch_size=BATCH,
        device="cpu",
        encoder=EncoderConfig("resnet18", WIDTH),
        head=HEAD,
    )
    monkeypatch.setattr(loop, "evaluate", lambda encode, dataset, **options: {"knn20": 0.0, "knn200": 0.0})
    waits = []

    def ours() -> None:
        loop.train(config, dataset, tmp_path / "run")
        waits.append(read_log(tmp_path / "run")[-1]["data_wait"])

    model, criterion = LightlySimCLR(), NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    loader = DataLoader(
        PilImages(images), batch_size=BATCH, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )

    def lightlys() -> None:
        for (x0, x1), _ in loader:
            loss = criterion(model(x0), model(x1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    shape = f"{COUNT} x 3 x {SIDE}^2, batch {BATCH}, resnet18 of width {WIDTH}"
    suite.compare(Work("simclr epoch", shape, "float32", "cpu"), {"fastproto": ours, "lightly's example": lightlys})
    print(f"\nshare of an epoch that waits for views: {statistics.median(waits):.1%}")
    benchmark.pedantic(ours, rounds=1)
