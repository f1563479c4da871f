"""What a configuration is made into: data, views, a state and its optimiser; and what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastproto.train import build, data
from fastproto.train.config import Config, EncoderConfig, OptimizerConfig, PrototypeConfig, ViewConfig
from fastproto.train.data import Dataset
from fastproto.views import SIMC_BOX

CPU = torch.device("cpu")


@pytest.mark.parametrize(("crop", "box"), [("random", (0, 0, 1, 1)), ("contrastive", (0, 0, 1, 1)), ("simc", SIMC_BOX)])
def test_boxes_begin_as_the_crop_asks(tiny_config: Config, tiny_data: Dataset, crop: str, box: tuple) -> None:
    state = build.build_state(replace(tiny_config, crop=crop), tiny_data, CPU)  # type: ignore[arg-type]
    assert torch.equal(state.boxes.boxes, torch.tensor([box] * 40, dtype=torch.float32))


def test_narrow_convolutions_keep_the_layout_without_a_crash(tiny_config: Config, tiny_data: Dataset) -> None:
    for name in ("resnet18", "resnet-tiny"):
        for width, fits in ((8, False), (9, True)):
            config = replace(tiny_config, method="simclr", encoder=EncoderConfig(name, width))
            encoder = build.build_state(config, tiny_data, CPU).method.encoder
            layouts = [p.is_contiguous(memory_format=torch.channels_last) for p in encoder.parameters() if p.ndim == 4]
            assert all(layouts) == fits, (name, width)


def test_views_are_the_configured_ones(tiny_config: Config, tiny_data: Dataset) -> None:
    views = ViewConfig(
        size=None, scale=(0.3, 0.7), ratio=(0.5, 2.0), alpha=0.3, augment="moco", jitter=(0.1, 0.2, 0.3, 0.4),
        blur=(1.0, 0.1), solarize=(0.0, 0.2),
    )  # fmt: skip
    guided = build.build_views(replace(tiny_config, views=views, seed=7), tiny_data)
    assert (guided.size, guided.scale, guided.ratio, guided.alpha) == ((20, 20), (0.3, 0.7), (0.5, 2.0), 0.3)
    assert (guided.augment, guided.jitter, guided.seed, guided.views) == ("moco", (0.1, 0.2, 0.3, 0.4), 7, 2)
    assert (guided.blur, guided.solarize) == ((1.0, 0.1), (0.0, 0.2))
    assert (guided.mean, guided.std) == (tiny_data.mean, tiny_data.std)
    # A plain random crop is uniform.
    assert build.build_views(replace(tiny_config, views=views, crop="random"), tiny_data).alpha == 1.0
    assert build.build_views(tiny_config, tiny_data).size == (16, 16)


def test_only_matrices_and_kernels_are_decayed() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    module[2].weight.requires_grad_(False)
    config = OptimizerConfig(name="sgd", lr=0.3, momentum=0.8, weight_decay=0.1)
    decayed, rest = build.build_optimizer(config, module).param_groups
    assert [id(parameter) for parameter in decayed["params"]] == [id(module[0].weight)]
    assert {id(parameter) for parameter in rest["params"]} == {
        id(parameter) for parameter in (module[0].bias, module[1].weight, module[1].bias, module[2].bias)
    }
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert (decayed["lr"], decayed["momentum"]) == (0.3, 0.8)
    adamw = build.build_optimizer(replace(config, name="adamw"), module)
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["lr"] == 0.3


def test_a_clustering_begins_where_it_is_asked_to(tiny_config: Config, tiny_data: Dataset) -> None:
    found = []
    for warm_start in (False, True):
        config = replace(tiny_config, prototypes=PrototypeConfig(num=(5,), n_iter=1, warm_start=warm_start))
        bank = build.build_state(config, tiny_data, CPU).prototypes
        features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            bank.update(features)
        found.append(float((features - bank.prototypes_0[bank.assignments_0]).square().sum()))
    # One iteration from new centres each time, or three in a row.
    assert found[1] < found[0]


@pytest.mark.parametrize(("method", "part"), [("simsiam", "predictor."), ("spcl", "loss.classifier.")])
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_what_keeps_its_learning_rate_has_groups_of_its_own(
    tiny_config: Config, tiny_data: Dataset, method: str, part: str, optimizer: str
) -> None:
    """Of LARS they take plain steps of SGD, without decay."""
    config = replace(tiny_config, method=method, optimizer=OptimizerConfig(optimizer, weight_decay=0.1))
    state = build.build_state(config, tiny_data, CPU)
    names = {id(parameter): name for name, parameter in state.method.named_parameters()}
    seen = {}
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            seen[names.pop(id(parameter))] = group["constant"], group["weight_decay"], parameter.ndim
    assert not names
    for name, (constant, decay, ndim) in seen.items():
        assert constant == name.startswith(part)
        assert decay == (0.1 if ndim > 1 and not (constant and optimizer == "lars") else 0)
    if optimizer == "lars":
        moved = [p for group in state.optimizer.param_groups if group["constant"] for p in group["params"]]
        for _ in range(2):
            before = [p.detach().clone() for p in moved]
            for p in moved:
                p.grad = torch.randn_like(p)
            state.optimizer.step()
            for p, old in zip(moved, before, strict=True):
                torch.testing.assert_close(p.detach(), old - config.optimizer.lr * p.grad)


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_lars_scales_the_steps_of_matrices_and_kernels_by_their_norms(decay: float) -> None:
    module = nn.Linear(4, 2)
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    upstream = torch.randn_like(weight)
    lars = build.build_optimizer(OptimizerConfig("lars", lr=0.3, momentum=0.0, weight_decay=decay), module)
    ((module.weight * upstream).sum() + module.bias.sum()).backward()
    lars.step()
    # You et al., Large Batch Training of Convolutional Networks, arXiv 1708.03888, algorithm 1.
    trust = 0.001 * weight.norm() / (upstream.norm() + decay * weight.norm())
    torch.testing.assert_close(module.weight.detach(), weight - 0.3 * trust * (upstream + decay * weight))
    torch.testing.assert_close(module.bias.detach(), bias - 0.3)


def test_a_limit_takes_images_evenly_over_the_classes(tiny_config: Config, made: Dataset) -> None:
    limited = build.load_data(replace(tiny_config, limit=16))
    kept = [40 * i // 16 for i in range(16)]
    assert torch.equal(limited.train_images, made.train_images[kept])
    assert torch.equal(limited.train_labels, made.train_labels[kept])
    assert torch.equal(limited.test_images, made.test_images)
    assert build.load_data(tiny_config) is made


def test_data_is_loaded_as_configured(
    monkeypatch: pytest.MonkeyPatch, tiny_config: Config, tiny_data: Dataset
) -> None:
    asked = []
    monkeypatch.setattr(data, "load", lambda *args, **options: asked.append((args, options)) or tiny_data)
    build.load_data(tiny_config)
    options = {"image_size": 48, "class_list": "list.txt", "resident": False, "workers": 3}
    options |= {"strict": True, "gpu_decode": True}
    config = replace(tiny_config, data="imagenet", data_root="/data/sets", test_shards="x.tar", **options)
    build.load_data(config)
    plain = dict.fromkeys(("image_size", "class_list", "test_shards", "resident"))
    (first, first_options), second = asked
    assert first == ("digits", None)
    assert first_options.pop("workers") >= 1
    assert first_options == plain | {"strict": False, "gpu_decode": False}
    options |= {"class_list": Path("list.txt"), "test_shards": "x.tar"}
    assert second == (("imagenet", Path("/data/sets")), options)


def test_processes_that_train_leave_each_other_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.os, "sched_getaffinity", lambda pid: set(range(24)), raising=False)
    assert [build.default_workers(devices) for devices in (1, 2, 4, 24, 48)] == [16, 11, 5, 1, 1]


def test_a_limit_that_leaves_no_label_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_config: Config, tiny_data: Dataset
) -> None:
    labels = torch.full((40,), -1)
    labels[1] = 0
    monkeypatch.setattr(data, "load", lambda *args, **options: replace(tiny_data, train_labels=labels))
    assert build.load_data(replace(tiny_config, limit=39)).train_labels.max() == 0
    with pytest.raises(ValueError, match=r"config: limit expected so many that some have a label, .*, got int 20"):
        build.load_data(replace(tiny_config, limit=20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 41}, "config: limit expected at most the 40 training images, got int 41"),
        ({"batch_size": 41}, "config: batch_size expected at most the 40 training images, got int 41"),
    ],
)
def test_more_than_there_are_images_is_refused(tiny_config: Config, made: Dataset, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build.load_data(replace(tiny_config, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "spcl", "prototypes": PrototypeConfig(num=(5, 3))},
            "spcl: prototypes.num expected one prototype set",
        ),
        ({"views": ViewConfig(scale=(0.9, 0.1))}, "ContrastiveCrop: scale expected"),
        (
            {"encoder": EncoderConfig("timm/vit_tiny_patch16_224")},
            r"encoder: timm/vit_tiny_patch16_224 does not take images of \(20, 20\)",
        ),
        (
            {"prototypes": PrototypeConfig(num=(5, 41))},
            r"config: prototypes.num expected at most the 40 training images, got tuple \(5, 41\)",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(tiny_config: Config, tiny_data: Dataset, changes: dict, message: str) -> None:
    random = torch.get_rng_state()
    build.check_buildable(tiny_config, tiny_data)
    with pytest.raises(ValueError, match=message):
        build.check_buildable(replace(tiny_config, **changes), tiny_data)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_device_that_is_not_there_is_refused(tiny_config: Config, tiny_data: Dataset) -> None:
    with pytest.raises(ValueError, match="config: device expected cpu: no GPU is here, got cuda"):
        build.check_buildable(replace(tiny_config, device="cuda"), tiny_data)
    with pytest.raises(ValueError, match="config: gpu_decode expected false: the run is on a CPU, got bool True"):
        build.check_buildable(replace(tiny_config, gpu_decode=True), tiny_data)
