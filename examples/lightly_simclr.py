"""SimCLR with lightly's transforms, head and data loading; of its training script only the import of the loss differs.

    python examples/lightly_simclr.py

Needs `pip install lightly`. The images are torchvision's random FakeData, so nothing is downloaded: put CIFAR10 or your
own data set there to learn something.
"""

import torch
import torchvision
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import Tensor, nn

from fastproto.losses import NTXentLoss  # was: from lightly.loss import NTXentLoss

IMAGES, SIDE, EPOCHS, BATCH, WORKERS = 2048, 32, 10, 256, 4


class SimCLR(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18()
        self.backbone = nn.Sequential(*list(resnet.children())[:-1])
        self.projection_head = SimCLRProjectionHead(512, 512, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(start_dim=1))


def main() -> list[float]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SimCLR().to(device)
    transform = SimCLRTransform(input_size=SIDE, gaussian_blur=0.0)
    dataset = torchvision.datasets.FakeData(IMAGES, (3, SIDE, SIDE), transform=transform)
    dataloader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=WORKERS)
    criterion = NTXentLoss(temperature=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

    losses = []
    for epoch in range(EPOCHS):
        for views, _ in dataloader:
            z0, z1 = (model(view.to(device)) for view in views)
            loss = criterion(z0, z1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        mean = sum(losses[-len(dataloader) :]) / len(dataloader)
        print(f"epoch {epoch + 1}: loss {mean:.5f}")
    return losses


if __name__ == "__main__":
    main()
