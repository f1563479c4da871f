"""Views, NT-Xent and ProtoNCE in a plain PyTorch loop.

    python examples/plain_loop.py

The data are the trainer's digits, made on the spot (`pip install ".[train]"`): any uint8 images (N, 3, H, W) will do.
"""

import torch
from torch import nn

from fastproto.cluster import PrototypeBank
from fastproto.losses import NTXentLoss, ProtoNCELoss
from fastproto.train.data import load
from fastproto.views import ContrastiveCrop

IMAGES, EPOCHS, BATCH, PROTOTYPES, DIM = 1437, 10, 128, (20, 40), 64


def main() -> list[float]:
    torch.manual_seed(0)
    images = load("digits").train_images[:IMAGES]
    make_views = ContrastiveCrop(32)
    encoder = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(encoder, nn.Linear(64 * 6 * 6, DIM))
    optimizer = torch.optim.Adam(model.parameters())
    contrast, prototype = NTXentLoss(temperature=0.2), ProtoNCELoss()
    bank = PrototypeBank(len(images), DIM, PROTOTYPES)
    losses = []
    for epoch in range(EPOCHS):
        with torch.no_grad():
            whole = nn.functional.interpolate(images / 255, 32)
            bank.update(nn.functional.normalize(model(whole), dim=1))
        total = 0.0
        for ids in torch.randperm(len(images)).split(BATCH):
            z0, z1 = (model(view) for view in make_views(images[ids], ids, epoch=epoch))
            loss = contrast(z0, z1) + prototype(z0, *bank.lookup(ids))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(ids)
        losses.append(total / len(images))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
