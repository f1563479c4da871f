"""Backbones: images (N, 3, H, W) in, the last feature map (N, C, h, w) and its mean over space (N, C) out."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastproto._check import expect

RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}
TIMM = "timm/"
TINY_WIDTH, RESNET_WIDTH = 32, 64
# Up to this size the stem keeps the resolution: one 3x3 convolution, no pooling (as SimCLR does for CIFAR).
SMALL_IMAGE = 64
MIN_WIDTH = 8
# In channels_last layout the backward pass of convolutions of 2 to 8 channels corrupts the heap (torch 2.14, AVX-512;
# of 8 where they are 1x1, of stride 2, on 48 x 48 and more).
MIN_WIDTH_CHANNELS_LAST = 9


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


class WideResNet(ResNet):
    """torchvision's with another number of channels than 64 in its first stage, the other stages in proportion."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], layers: list[int], width: int, *, zero_init_residual: bool
    ) -> None:
        self._width = width
        super().__init__(block, layers, zero_init_residual=zero_init_residual)
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        if planes == RESNET_WIDTH:
            self.inplanes = self._width
        return super()._make_layer(block, planes * self._width // RESNET_WIDTH, *args, **options)


class TimmTrunk(nn.Module):
    """A timm network without its head, its last features as a map: tokens lie where their patches do."""

    def __init__(self, name: str, image_size: int) -> None:
        import timm

        super().__init__()
        found = timm.is_model(name)
        expect(found, "build_encoder", "name", f"{TIMM}NAME with a name of timm.list_models()", f"{TIMM}{name}")
        settings: Any = timm.get_pretrained_cfg(name)
        self.options: dict[str, Any] = {"img_size": image_size} if settings.fixed_input_size else {}
        try:
            try:
                network: Any = timm.create_model(name, num_classes=0, global_pool="", **self.options)
                self.options["global_pool"] = ""
            except AssertionError:
                # Some networks refuse to be without pooling. Their last features lie before it.
                network = timm.create_model(name, num_classes=0, **self.options)
            self.network, self.num_features = network, int(network.num_features)
            self._freeze_unused(image_size)
        except Exception as error:  # networks refuse in their own ways
            wanted = f"a network that makes a feature map of images of {image_size} x {image_size}"
            reason = " ".join(str(error).split())
            raise ValueError(f"build_encoder: name expected {wanted}, got {TIMM}{name}: {reason}") from error

    def forward(self, images: Tensor) -> Tensor:
        network: Any = self.network
        features = network.forward_features(images)
        expect(isinstance(features, Tensor), "encoder", "its last features", "one tensor", type(features).__name__)
        if features.ndim == 3:
            tokens = features[:, getattr(network, "num_prefix_tokens", 0) :]
            return tokens.transpose(1, 2).unflatten(2, self._grid(images, tokens.shape[1]))
        return features.permute(0, 3, 1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else features

    def _grid(self, images: Tensor, count: int) -> tuple[int, int]:
        """Rows and columns of so many tokens: those of the network's patches if it says, else of square patches."""
        grid = getattr(getattr(self.network, "patch_embed", None), "grid_size", None)
        if grid is None:
            height, width = images.shape[2:]
            side = math.isqrt(height * width // max(count, 1)) or 1
            grid = height // side, width // side
        expect(math.prod(grid) == count, "encoder", "its last features", "a map or a token a patch", f"{count} tokens")
        return tuple(grid)

    @torch.enable_grad()
    def _freeze_unused(self, image_size: int) -> None:
        """Parameters of the head that timm leaves in get no gradient: DDP waits for one of all that are trained."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        # In evaluation nothing is drawn and no statistics move.
        total = self.eval()(torch.zeros(1, 3, image_size, image_size)).sum()
        for parameter, gradient in zip(trained, torch.autograd.grad(total, trained, allow_unused=True), strict=True):
            parameter.requires_grad_(gradient is not None)
        self.train()


def build_encoder(
    name: str, *, image_size: int, width: int | None = None, stem: str = "auto", zero_init: bool = False
) -> Encoder:
    """A fresh encoder by name.

    Args:
        name: "resnet-tiny": a 3x3 stem and four residual blocks of 1, 2, 4 and 4 times width channels, the first three
            of which halve the resolution; made for small images on a CPU. "resnet18", 34, 50, 101, 152: torchvision's,
            with its names in ``trunk``. "timm/NAME": timm's, any whose last features are a map or tokens of patches.
        image_size: side of the images; a timm transformer takes images of this size alone.
        width: channels of the first stage, at least 8; None: 32 for resnet-tiny, 64 for torchvision's. timm's networks
            have their own.
        stem: "small", of torchvision's networks: 3x3 without pooling; "large": torchvision's own, 7x7 with pooling;
            "auto": small up to 64 px. The others have one stem.
        zero_init: of torchvision's networks: the last normalisation of each residual branch starts at 0, which leaves
            the branch out. timm does so by itself.

    Raises:
        ValueError: no encoder has that name; a width below 8, or for a timm network; a stem or zero_init that it does
            not have; a network of timm that gives no feature map.
    """
    known = f"one of resnet-tiny, {', '.join(RESNETS)}, {TIMM}NAME"
    expect(name == "resnet-tiny" or name in RESNETS or name.startswith(TIMM), "build_encoder", "name", known, name)
    expect(width is None or width >= MIN_WIDTH, "build_encoder", "width", f"at least {MIN_WIDTH}", width)
    expect(stem == "auto" or name in RESNETS, "build_encoder", "stem", f"auto: {name} has its own", stem)
    expect(not zero_init or name in RESNETS, "build_encoder", "zero_init", f"False: {name} has its own", zero_init)
    if name == "resnet-tiny":
        width = width or TINY_WIDTH
        return Encoder(_tiny_trunk(width), 4 * width)
    if name in RESNETS:
        small = has_small_stem(name, image_size, stem)
        return _resnet(name, width or RESNET_WIDTH, small=small, zero_init=zero_init)
    expect(width is None, "build_encoder", "width", f"none: {name} has its own", width)
    trunk = TimmTrunk(name.removeprefix(TIMM), image_size)
    return Encoder(trunk, trunk.num_features)


def has_small_stem(name: str, image_size: int, stem: str) -> bool:
    """Whether ``build_encoder`` gives one of torchvision's networks the stem that keeps the resolution."""
    return name in RESNETS and (image_size <= SMALL_IMAGE if stem == "auto" else stem == "small")


def _resnet(name: str, width: int, *, small: bool, zero_init: bool) -> Encoder:
    block, layers = RESNETS[name]
    if width == RESNET_WIDTH:
        network = ResNet(block, layers, zero_init_residual=zero_init)
    else:
        network = WideResNet(block, layers, width, zero_init_residual=zero_init)
    if small:
        network.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    # All but the average pooling and the classifier.
    trunk = nn.Sequential(OrderedDict(list(network.named_children())[:-2]))
    return Encoder(trunk, 8 * width * block.expansion)


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
