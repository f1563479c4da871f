"""PCL with PyTorch Lightning: NT-Xent on two views, and ProtoNCE on prototypes that are clustered before every epoch.

    python examples/lightning_proto_nce.py
    python examples/lightning_proto_nce.py --devices 2      # two processes

Needs `pip install ".[train]" pytorch-lightning`. The data are the trainer's digits, made on the spot: any uint8 images
(N, 3, H, W) will do. Each process clusters its share of them; sums and centres cross, so all have the same prototypes.
Two processes draw other batches than one: where a batch is the whole data, their losses are the same.
"""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastproto.cluster import PrototypeBank
from fastproto.losses import NTXentLoss, ProtoNCELoss
from fastproto.train.data import load
from fastproto.views import ContrastiveCrop

SIDE, DIM, PROTOTYPES = 32, 64, (20, 40)


class PCL(pl.LightningModule):
    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images
        self.make_views = ContrastiveCrop(SIDE)
        self.encoder = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64 * 6 * 6, DIM)
        # All processes' embeddings are contrasted with each other, and the mean is over all of their rows.
        self.contrast = NTXentLoss(temperature=0.2, gather_distributed=True)
        self.prototype = ProtoNCELoss(gather_distributed=True)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def setup(self, stage: str) -> None:
        # Not in __init__: the process group is there only now. It is None where there is a single process.
        self.bank = PrototypeBank(len(self.images), DIM, PROTOTYPES, process_group=dist.group.WORLD)

    @torch.no_grad()
    def on_train_epoch_start(self) -> None:
        # In rank order the shares make up the data set.
        share = self.images.tensor_split(self.trainer.world_size)[self.global_rank].to(self.device)
        whole = nn.functional.interpolate(share / 255, SIDE)
        self.bank.update(nn.functional.normalize(self(whole), dim=1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, ids = batch
        z0, z1 = (self(view) for view in self.make_views(images, ids, epoch=self.current_epoch))
        loss = self.contrast(z0, z1) + self.prototype(z0, *self.bank.lookup(ids))
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(ids))
        return loss

    def on_train_epoch_end(self) -> None:
        self.losses.append(float(self.trainer.callback_metrics["loss"]))
        self.print(f"epoch {self.current_epoch + 1}: loss {self.losses[-1]:.5f}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description="PCL on digits with PyTorch Lightning.")
    parser.add_argument("--devices", type=int, default=1, help="processes, each with a GPU or a share of the CPU")
    parser.add_argument("--accelerator", default="auto", help="auto, cpu or gpu")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128, help="images in a step, over all processes")
    parser.add_argument("--images", type=int, default=1437, help="train on the first so many")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    images = load("digits").train_images[: options.images]
    # Lightning gives each process its own part of every epoch. Equal batches everywhere: the last, smaller one is left.
    dataset = TensorDataset(images, torch.arange(len(images)))
    dataloader = DataLoader(dataset, options.batch_size // options.devices, shuffle=True, drop_last=True)
    model = PCL(images)
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, dataloader)
    if dist.is_initialized():
        # A thread of Gloo that outlives the interpreter would abort the process; the bank holds the group, too.
        del model.bank
        dist.destroy_process_group()
    return model.losses


if __name__ == "__main__":
    main()
