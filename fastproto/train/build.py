"""What a run is made of by its configuration: data, views, encoder, and the state to start from."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastproto import _settings
from fastproto._check import expect
from fastproto.cluster import PrototypeBank
from fastproto.train import data
from fastproto.train.checkpoint import State
from fastproto.train.config import Config, OptimizerConfig
from fastproto.train.encoders import MIN_WIDTH_CHANNELS_LAST, Encoder, build_encoder
from fastproto.train.methods import build_method
from fastproto.train.sync_norm import synchronise
from fastproto.views import SIMC_BOX, BoxBank, ContrastiveCrop

# More decode faster than any one GPU trains.
MOST_WORKERS = 16


def load_data(config: Config) -> data.Dataset:
    """The configured data set, and of its training images as many as the configuration says.

    Raises:
        ValueError: what ``data.load`` raises; fewer training images than ``limit`` or the batch size.
    """
    root, class_list = (None if path is None else Path(path) for path in (config.data_root, config.class_list))
    local = _settings.torchrun_local_world or config.devices
    dataset = data.load(
        config.data,
        root,
        image_size=config.image_size,
        class_list=class_list,
        test_shards=config.test_shards,
        resident=config.resident,
        workers=default_workers(local) if config.workers is None else config.workers,
        strict=config.strict,
        gpu_decode=config.gpu_decode,
    )
    count = len(dataset.train_images)
    if config.limit is not None:
        expect(config.limit <= count, "config", "limit", f"at most the {count} training images", config.limit)
        dataset, count = dataset.limited(config.limit), config.limit
        labelled = bool((dataset.train_labels >= 0).any())
        expect(labelled, "config", "limit", "so many that some have a label, for evaluation", config.limit)
    expect(
        config.batch_size <= count, "config", "batch_size", f"at most the {count} training images", config.batch_size
    )
    return dataset


def default_workers(devices: int) -> int:
    """Processes that decode for each of so many that train on this machine: all cores but one each, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // devices - 1))


def build_views(config: Config, dataset: data.Dataset) -> ContrastiveCrop:
    """What makes the two views of every image."""
    return ContrastiveCrop(
        **view_options(config, dataset.train_images.shape[2]),
        blur=config.views.blur,
        solarize=config.views.solarize,
        mean=dataset.mean,
        std=dataset.std,
    )


def view_options(config: Config, side: int) -> dict[str, Any]:
    """How they are made of images of that side, but for what only one of them may have."""
    views = config.views
    return {
        "size": views.size or side,
        "scale": views.scale,
        "ratio": views.ratio,
        "alpha": 1.0 if config.crop == "random" else views.alpha,
        "augment": views.augment,
        "jitter": views.jitter,
        "seed": config.seed,
    }


def build_state(config: Config, dataset: data.Dataset, device: torch.device) -> State:
    """The state before the first step: random weights by the seed, whole images as boxes, no prototypes."""
    torch.manual_seed(config.seed)
    encoder = configured_encoder(config, dataset.train_images.shape[2])
    if config.encoder.width is None or config.encoder.width >= MIN_WIDTH_CHANNELS_LAST:
        # Convolutions on a CPU are up to twice as fast on this layout, and faster on a GPU in half precision.
        encoder = encoder.to(memory_format=torch.channels_last)
    method = build_method(config, encoder).to(device)
    if config.devices > 1 and config.sync_norm:
        method = synchronise(method, device)
    count = len(dataset.train_images)
    boxes = BoxBank(count).to(device)
    if config.crop == "simc":
        boxes.update(torch.arange(count, device=device), torch.tensor([SIMC_BOX], device=device).expand(count, 4))
    prototypes = None
    if method.clusters:
        chosen = config.prototypes
        expect(max(chosen.num) <= count, "config", "prototypes.num", f"at most the {count} training images", chosen.num)
        prototypes = PrototypeBank(
            count,
            method.cluster_dim,
            chosen.num,
            temperature=chosen.temperature,
            n_iter=chosen.n_iter,
            n_init=chosen.n_init,
            warm_start=chosen.warm_start,
            seed=config.seed,
        ).to(device)
    origin = {
        **configured_origin(config),
        "number of training images": count,
        "digest of the names and labels of the training images": dataset.digest,
    }
    optimizer = build_optimizer(config.optimizer, method)
    return State(method, optimizer, boxes, prototypes, origin=origin, inputs=inputs_of(dataset))


def inputs_of(dataset: data.Dataset) -> dict[str, Any]:
    """What a checkpoint says of what its encoder takes."""
    size = list(dataset.train_images.shape[2:])
    return {"data": dataset.name, "size": size, "mean": list(dataset.mean), "std": list(dataset.std)}


def configured_origin(config: Config) -> dict[str, str]:
    """What a checkpoint has in common with a run, as far as the configuration says."""
    # Without the path: data may be moved.
    return {"method": config.method, "data": config.data.partition(":")[0]}


def configured_encoder(config: Config, height: int) -> Encoder:
    """A fresh encoder for a run's views; ``height`` is that of its images."""
    chosen = config.encoder
    return build_encoder(
        chosen.name,
        image_size=config.views.size or height,
        width=chosen.width,
        stem=chosen.stem,
        zero_init=chosen.zero_init,
    )


def check_buildable(config: Config, dataset: data.Dataset, checkpoint: Path | None = None) -> None:
    """Refuses what cannot be built, by building it, and a checkpoint that does not fit, by loading it.

    Raises:
        ModuleNotFoundError: wandb is asked for and not installed.
        ValueError: settings that a part refuses; a device that is not there; what ``State.load`` raises.
    """
    expect(config.device != "cuda" or torch.cuda.is_available(), "config", "device", "cpu: no GPU is here", "cuda")
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    expect(on_gpu or not config.gpu_decode, "config", "gpu_decode", "false: the run is on a CPU", True)
    if config.wandb:
        importlib.import_module("wandb")
    with torch.random.fork_rng():
        state = build_state(config, dataset, torch.device("cpu"))
        if checkpoint is not None:
            state.load(checkpoint)
        encoder = state.method.eval().encoder
    build_views(config, dataset)
    height, width = dataset.train_images.shape[2:]
    for size in {(height, width), (config.views.size or height,) * 2}:
        try:
            shape = encoder.feature_map(torch.zeros(1, 3, *size)).shape
        except Exception as error:  # networks refuse sizes in their own ways
            raise ValueError(f"encoder: {config.encoder.name} does not take images of {size}: {error}") from error
        good = len(shape) == 4 and shape[1] == encoder.num_features
        expect(good, "encoder", "name", "a network whose last features are a map", config.encoder.name)


def build_optimizer(config: OptimizerConfig, method: nn.Module) -> torch.optim.Optimizer:
    """The optimiser over all trained parameters; biases and norms, which have one dimension, are not decayed.

    A group whose learning rate the loop leaves alone, as the method asks, has a true "constant"; of LARS it takes plain
    steps of SGD without decay.
    """
    chosen: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    constant_parts = tuple(f"{part}." for part in getattr(method, "constant_lr", ()))
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            key = (parameter.ndim <= 1, name.startswith(constant_parts))
            chosen.setdefault(key, []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": chosen[flat, constant], "weight_decay": 0.0 if flat else config.weight_decay, "constant": constant}
        for flat, constant in sorted(chosen)
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    if config.name == "lars":
        from timm.optim import Lars

        # As in SimCLR (arXiv 2002.05709, appendix B.1) only the steps of biases and norms are not scaled. By itself
        # timm's scales no step of what is not decayed, which with a weight decay of 0 is everything.
        for group, (flat, constant) in zip(groups, sorted(chosen), strict=True):
            group["always_adapt"] = not flat and not constant
            if constant:  # timm's scales every step of what is decayed
                group.update(momentum=0.0, weight_decay=0.0)
        return Lars(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
