"""Backbones: images (N, 3, H, W) in, the last feature map (N, C, h, w) and its mean over space (N, C) out."""

from __future__ import annotations

from typing import get_args

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from fastproto._check import expect
from fastproto.train.config import EncoderName

# Up to this size the stem keeps the resolution: one 3x3 convolution, no pooling (as SimCLR does for CIFAR).
SMALL_IMAGE = 64
# In channels_last layout the backward pass of convolutions of 2 to 7 channels corrupts the heap (torch 2.14, AVX-512).
MIN_WIDTH = 8


class Encoder(nn.Module):
    """A convolutional trunk and global average pooling.

    Args:
        trunk: maps (N, 3, H, W) to (N, num_features, h, w).
        num_features: channels C of the trunk's output.

    Example:
        >>> import torch
        >>> encoder = build_encoder("resnet-tiny", image_size=32, width=8)
        >>> images = torch.rand(2, 3, 32, 32)
        >>> encoder.feature_map(images).shape, encoder(images).shape
        (torch.Size([2, 32, 4, 4]), torch.Size([2, 32]))
    """

    def __init__(self, trunk: nn.Module, num_features: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.num_features = num_features

    def feature_map(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, C, h, w): what localisation looks at."""
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, C): what the heads, the clustering and the evaluation see."""
        return self.feature_map(images).mean((2, 3))


class Block(nn.Module):
    """The basic residual block: two 3x3 convolutions beside the identity, or beside a 1x1 where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


def build_encoder(name: EncoderName, *, image_size: int, width: int = 24) -> Encoder:
    """A fresh encoder by name.

    Args:
        name: "resnet-tiny": a 3x3 stem and four residual blocks of 1, 2, 4 and 4 times width channels, the first three
            of which halve the resolution; made for small images on a CPU. "resnet18", "resnet50": torchvision's.
        image_size: side of the images. Up to 64 px the torchvision networks get a 3x3 stem without pooling.
        width: channels of the first block of resnet-tiny, at least 8; the others have their own.

    Raises:
        ValueError: no encoder has that name; a width below 8.
    """
    expect(name in get_args(EncoderName), "build_encoder", "name", f"one of {', '.join(get_args(EncoderName))}", name)
    if name == "resnet-tiny":
        expect(width >= MIN_WIDTH, "build_encoder", "width", f"at least {MIN_WIDTH}", width)
        return Encoder(_tiny_trunk(width), 4 * width)
    network = {"resnet18": resnet18, "resnet50": resnet50}[name]()
    if image_size <= SMALL_IMAGE:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    # All but the average pooling and the classifier.
    return Encoder(nn.Sequential(*list(network.children())[:-2]), network.fc.in_features)


def _tiny_trunk(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Block(width, width, stride=2),
        Block(width, 2 * width, stride=2),
        Block(2 * width, 4 * width, stride=2),
        Block(4 * width, 4 * width, stride=1),
    )
