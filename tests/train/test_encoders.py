"""Encoders against torchvision's networks and against the formula of a residual block."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from fastproto.train.encoders import Block, build_encoder


@pytest.mark.parametrize(
    ("name", "width", "image_size", "images", "shape"),
    [
        ("resnet-tiny", 10, 32, (2, 3, 32, 32), (2, 40, 4, 4)),
        ("resnet-tiny", None, 40, (1, 3, 33, 57), (1, 128, 5, 8)),
        ("resnet18", None, 32, (2, 3, 32, 32), (2, 512, 4, 4)),
        ("resnet18", 16, 64, (1, 3, 40, 40), (1, 128, 5, 5)),
        ("resnet18", 8, 65, (1, 3, 96, 96), (1, 64, 3, 3)),
        ("resnet34", 12, 32, (1, 3, 32, 32), (1, 96, 4, 4)),
        ("resnet50", 8, 32, (1, 3, 32, 32), (1, 256, 4, 4)),
        ("timm/resnet18", None, 64, (1, 3, 64, 64), (1, 512, 2, 2)),
        ("timm/vit_tiny_patch16_224", None, 48, (1, 3, 48, 48), (1, 192, 3, 3)),
        ("timm/swin_tiny_patch4_window7_224", None, 64, (1, 3, 64, 64), (1, 768, 2, 2)),
        ("timm/convnext_atto", None, 64, (1, 3, 32, 96), (1, 320, 1, 3)),
        ("timm/mixer_s32_224", None, 64, (1, 3, 64, 64), (1, 512, 2, 2)),
        ("timm/deit_tiny_distilled_patch16_224", None, 64, (1, 3, 64, 64), (1, 192, 4, 4)),
        ("timm/efficientvit_b0", None, 64, (1, 3, 64, 64), (1, 128, 2, 2)),
        ("timm/xcit_nano_12_p16_224", None, 64, (1, 3, 32, 96), (1, 128, 2, 6)),
    ],
)
def test_features_are_the_mean_of_the_feature_map(
    name: str, width: int | None, image_size: int, images: tuple, shape: tuple
) -> None:
    encoder = build_encoder(name, image_size=image_size, width=width).eval()
    x = torch.rand(images)
    with torch.no_grad():
        feature_map, features = encoder.feature_map(x), encoder(x)
    assert feature_map.shape == shape
    assert encoder.num_features == shape[1]
    torch.testing.assert_close(features, feature_map.flatten(2).mean(2))


def test_a_transformers_map_has_its_tokens_where_their_patches_are() -> None:
    encoder = build_encoder("timm/vit_tiny_patch16_224", image_size=64).eval()
    # Without attention and position, a token depends on its patch alone.
    for block in encoder.trunk.network.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    nn.init.zeros_(encoder.trunk.network.pos_embed)
    x = torch.zeros(1, 3, 64, 64)
    x[:, :, 16:32, 48:] = 1
    with torch.no_grad():
        change = (encoder.feature_map(x) - encoder.feature_map(torch.zeros_like(x))).abs().sum(1)[0]
    assert (change > 1e-3).nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("name", "head"), [("convnext_atto", "head.norm."), ("mobilenetv3_small_050", "conv_head."), ("resnet18", None)]
)
def test_what_the_feature_map_of_a_timm_network_does_not_use_is_not_trained(name: str, head: str | None) -> None:
    torch.manual_seed(3)
    encoder = build_encoder(f"timm/{name}", image_size=32)
    torch.manual_seed(3)
    network = timm.create_model(name, num_classes=0, global_pool="")
    # Looking for it changes nothing else.
    assert encoder.training
    for (path, value), (other, expected) in zip(
        encoder.trunk.network.state_dict().items(), network.state_dict().items(), strict=True
    ):
        assert path == other and torch.equal(value, expected)
    assert {parameter.grad for parameter in encoder.parameters()} == {None}
    encoder(torch.rand(2, 3, 32, 32)).sum().backward()
    for path, parameter in encoder.trunk.network.named_parameters():
        used = head is None or not path.startswith(head)
        assert parameter.requires_grad == used == (parameter.grad is not None), path


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_names_of_the_weights_are_torchvisions(name: str) -> None:
    encoder, network = build_encoder(name, image_size=224), getattr(models, name)()
    missing, unexpected = network.load_state_dict(encoder.trunk.state_dict(), strict=False)
    assert missing == ["fc.weight", "fc.bias"]
    assert not unexpected


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_large_images_get_torchvisions_network(name: str) -> None:
    torch.manual_seed(3)
    encoder = build_encoder(name, image_size=224).eval()
    torch.manual_seed(3)
    network = getattr(models, name)().eval()
    network.fc = nn.Identity()
    x = torch.rand(1, 3, 80, 72)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), network(x))


@pytest.mark.parametrize(("channels_in", "channels_out", "stride"), [(8, 8, 1), (8, 8, 2), (8, 13, 1)])
def test_a_block_is_two_convolutions_beside_a_shortcut(channels_in: int, channels_out: int, stride: int) -> None:
    block = Block(channels_in, channels_out, stride).double().eval()
    for norm in (module for module in block.modules() if isinstance(module, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)

    def normalise(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        scale = norm.weight / (norm.running_var + 1e-5).sqrt()
        return x * scale[:, None, None] + (norm.bias - norm.running_mean * scale)[:, None, None]

    x = torch.randn(2, channels_in, 9, 7, dtype=torch.float64)
    inner = normalise(F.conv2d(x, block.conv1.weight, stride=stride, padding=1), block.norm1).clamp(min=0)
    inner = normalise(F.conv2d(inner, block.conv2.weight, padding=1), block.norm2)
    shortcut = x
    if stride == 2 or channels_in != channels_out:
        shortcut = normalise(F.conv2d(x, block.shortcut[0].weight, stride=stride), block.shortcut[1])
    torch.testing.assert_close(block(x), (inner + shortcut).clamp(min=0))


def test_every_weight_of_the_tiny_encoder_learns_in_either_layout() -> None:
    encoder = build_encoder("resnet-tiny", image_size=32, width=8)
    gradients = []
    x = torch.rand(4, 3, 17, 23)
    upstream = torch.randn(4, 32)
    for layout in (torch.contiguous_format, torch.channels_last):
        encoder = encoder.to(memory_format=layout)
        encoder.zero_grad()
        encoder(x).backward(upstream)
        gradients.append([parameter.grad.clone() for parameter in encoder.parameters()])
    for plain, channels_last in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, channels_last, rtol=1e-3, atol=1e-4)


def test_the_stem_can_be_chosen() -> None:
    for stem, image_size, kernel in (("small", 96, 3), ("large", 32, 7), ("auto", 96, 7), ("auto", 32, 3)):
        encoder = build_encoder("resnet18", image_size=image_size, width=8, stem=stem)
        assert encoder.trunk.conv1.kernel_size == (kernel, kernel)
        assert isinstance(encoder.trunk.maxpool, nn.Identity) == (kernel == 3)
    with pytest.raises(ValueError, match="stem expected auto: resnet-tiny has its own, got small"):
        build_encoder("resnet-tiny", image_size=32, stem="small")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_residual_branches_may_start_at_nothing(name: str) -> None:
    """As torchvision's zero_init_residual: a branch adds nothing, and its first convolution gets no gradient yet."""
    theirs = getattr(models, name)(zero_init_residual=True).state_dict()
    for zero_init in (False, True):
        ours = build_encoder(name, image_size=224, zero_init=zero_init).trunk.state_dict()
        zeros = {key for key, value in ours.items() if key.endswith("weight") and not value.any()}
        expected = {key for key, value in theirs.items() if key.endswith("weight") and not value.any()}
        assert zeros == (expected if zero_init else set())
    with pytest.raises(ValueError, match="zero_init expected False: resnet-tiny has its own, got bool True"):
        build_encoder("resnet-tiny", image_size=32, zero_init=True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("volo_d1_224", "encoder: its last features expected a map or a token a patch, got 17 tokens"),
        ("pit_ti_224", "encoder: its last features expected a map or a token a patch, got 1 tokens"),
    ],
)
def test_a_timm_network_without_a_feature_map_is_refused(name: str, reason: str) -> None:
    wanted = r"build_encoder: name expected a network that makes a feature map of images of 64 x 64"
    with pytest.raises(ValueError, match=f"{wanted}, got timm/{name}: {reason}$"):
        build_encoder(f"timm/{name}", image_size=64)


def test_unknown_names_and_narrow_ones_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"build_encoder: name expected one of resnet-tiny, resnet18, .*, timm/NAME, got vit"
    ):
        build_encoder("vit", image_size=32)
    with pytest.raises(ValueError, match=r"name expected timm/NAME with a name of timm.list_models\(\), got timm/vit"):
        build_encoder("timm/vit", image_size=32)
    with pytest.raises(ValueError, match="build_encoder: width expected at least 8, got int 7"):
        build_encoder("resnet-tiny", image_size=32, width=7)
    with pytest.raises(ValueError, match="width expected none: timm/resnet18 has its own, got int 64"):
        build_encoder("timm/resnet18", image_size=32, width=64)
