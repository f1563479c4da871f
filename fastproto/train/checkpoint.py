"""What a run carries from step to step, what it leaves on disk, and how both are read back.

A run's folder holds config.yaml, log.csv, TensorBoard events, checkpoints/epoch-NNNN.pt (NNNN complete epochs) and,
where neighbours are asked on the way, checkpoints/best.pt; and at its end result.json and report.html.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastproto import _settings
from fastproto._check import LONGEST, expect
from fastproto.cluster import PrototypeBank
from fastproto.train import data
from fastproto.train.config import Config, OptimizerConfig, difference, read_config, to_yaml
from fastproto.train.encoders import build_encoder
from fastproto.train.files import read_log, read_result, write_text, write_whole
from fastproto.train.methods import Method, build_method
from fastproto.train.sync_norm import synchronise
from fastproto.views import SIMC_BOX, BoxBank, ContrastiveCrop

# The first line of a run's config.yaml: a folder without it is not ours to overwrite.
MARK = "# A fastproto run: the configuration it was started with."
# The mark goes last: a removal that was cut short leaves a folder that is still known as a run.
FILES = (
    "log.csv",
    "result.json",
    "evaluation.json",
    "report.html",
    "events.out.tfevents.*",
    "wandb",
    "export",
    "checkpoints",
    "config.yaml",
)
# The run's files in folders where a user may keep others; one that is being written is .NAME.part.
INSIDE = {
    "export": r"README\.md|torchvision\.pt|timm\.safetensors|encoder\.safetensors|encoder\.onnx",
    "checkpoints": r"epoch-[0-9]{4,}\.pt|best\.pt|best\.part",
}
CHECKPOINT = re.compile(r"epoch-[0-9]{4,}\.pt")
# More decode faster than any one GPU trains.
MOST_WORKERS = 16
# What a checkpoint holds of a State: state_dicts, and plain values.
PARTS = ("method", "optimizer", "boxes", "prototypes")
VALUES = ("epoch", "step", "sums", "seconds", "before", "clustering", "log")


@dataclass
class State:
    """All that a step of the loop depends on and changes."""

    method: Method
    optimizer: torch.optim.Optimizer
    boxes: BoxBank
    prototypes: PrototypeBank | None
    epoch: int = 0  # complete epochs
    step: int = 0  # complete steps of the epoch after them
    sums: dict[str, Tensor] = field(default_factory=dict)  # of each loss term over these steps
    seconds: dict[str, float] = field(default_factory=dict)  # of each phase since the last row of the log
    before: dict[str, float] = field(default_factory=dict)  # accuracies of the random encoder, once they are known
    clustering: dict[str, float] = field(default_factory=dict)  # monitors of the last clustering
    log: list[dict[str, float]] = field(default_factory=list)  # one row per complete epoch
    origin: dict[str, Any] = field(default_factory=dict)  # what a checkpoint must have in common to be loaded

    def save(self, folder: Path, keep: int = 2) -> Path:
        """Writes a checkpoint, whole or not at all, and removes all but the last ``keep``."""
        parts = {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}
        values = {name: getattr(self, name) for name in VALUES}
        random = {"cpu": torch.get_rng_state()}
        more = {"random": random, "origin": self.origin}
        if torch.cuda.is_initialized():
            random["cuda"] = torch.cuda.get_rng_state()
        saved = {name: part.state_dict() for name, part in parts.items()}
        path = folder / "checkpoints" / f"epoch-{self.epoch:04d}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: torch.save(saved | values | more, file))
        for old in _checkpoints(folder)[:-keep]:
            old.unlink()
        return path

    def load(self, path: Path) -> None:
        """Takes over what a checkpoint holds, random state included.

        Raises:
            ValueError: what ``read_checkpoint`` raises; a checkpoint of another method, encoder or data set.
            OSError: the file cannot be read.
        """
        saved = read_checkpoint(path)
        for name, wanted in self.origin.items():
            # Checkpoints did not always say it.
            found = saved.get("origin", {}).get(name, wanted)
            expect(found == wanted, "checkpoint", str(path), f"{name} {wanted}", str(found))
        for name in PARTS:
            if getattr(self, name) is not None:
                try:
                    getattr(self, name).load_state_dict(saved[name])
                except Exception as error:  # parts refuse in their own ways, some at a length of many lines
                    reason = "".join(str(error).splitlines()[-1:]).strip()[:LONGEST]
                    raise ValueError(f"checkpoint: {path} does not fit the run's {name}: {reason}") from error
        for name in VALUES:
            # A run that was begun before a value existed goes on without it.
            setattr(self, name, saved.get(name, getattr(self, name)))
        torch.set_rng_state(saved["random"]["cpu"])
        if "cuda" in saved["random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["random"]["cuda"])


@dataclass(frozen=True)
class Run:
    """A run read back from its folder by ``load_run``: its settings, data, trained parts and results, on the CPU."""

    path: Path
    config: Config
    dataset: data.Dataset
    method: Method  # trained weights, eval mode; .encoder(x) -> (N, C), .encoder.feature_map(x) -> (N, C, h, w)
    views: ContrastiveCrop  # what made the views: (images, sample_ids, boxes=None, epoch=0) -> tuple of views
    boxes: Tensor  # (N, 4) fractions (h0, w0, h1, w1), one per training image; the whole image where none were found
    prototypes: list[Tensor]  # one (K, D) per prototype set; empty for methods without prototypes
    assignments: list[Tensor]  # one (N,) int64 per prototype set, -1 where an image has none
    log: list[dict[str, float]]  # one row per epoch, as in log.csv; the keys are its columns
    result: dict[str, Any]  # result.json; empty while the run has not ended


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
    views = config.views
    return ContrastiveCrop(
        views.size or dataset.train_images.shape[2],
        scale=views.scale,
        ratio=views.ratio,
        alpha=1.0 if config.crop == "random" else views.alpha,
        augment=views.augment,
        jitter=views.jitter,
        blur=views.blur,
        solarize=views.solarize,
        mean=dataset.mean,
        std=dataset.std,
        seed=config.seed,
    )


def build_state(config: Config, dataset: data.Dataset, device: torch.device) -> State:
    """The state before the first step: random weights by the seed, whole images as boxes, no prototypes."""
    torch.manual_seed(config.seed)
    size = config.views.size or dataset.train_images.shape[2]
    chosen_encoder = config.encoder
    encoder = build_encoder(chosen_encoder.name, image_size=size, width=chosen_encoder.width, stem=chosen_encoder.stem)
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
        "method": config.method,
        # Without the path: data may be moved.
        "data": config.data.partition(":")[0],
        "number of training images": count,
        "digest of the names and labels of the training images": dataset.digest,
    }
    return State(method, build_optimizer(config.optimizer, method), boxes, prototypes, origin=origin)


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

    A group whose learning rate the loop leaves alone, as the method asks, has a true "constant".
    """
    chosen: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            key = (parameter.ndim <= 1, name.split(".")[0] in getattr(method, "constant_lr", ()))
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
        for group, (flat, _) in zip(groups, sorted(chosen), strict=True):
            group["always_adapt"] = not flat
        return Lars(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run of ours."""
    config = folder / "config.yaml"
    return config.is_file() and config.read_text(errors="replace").startswith(MARK)


def latest_checkpoint(folder: Path) -> Path:
    """The checkpoint of the most epochs that can be read; a damaged one after it is left where it is, with a warning.

    Raises:
        ValueError: the folder holds no run, or none with a checkpoint, or all are damaged.
    """
    expect(is_run(folder), "run", "folder", "one that holds a run", str(folder))
    checkpoints = _checkpoints(folder)
    expect(bool(checkpoints), "run", "folder", "a run with a checkpoint", f"{folder}, which has none")
    while True:
        newest = checkpoints.pop()
        try:
            read_checkpoint(newest)
            return newest
        except ValueError as error:
            if not checkpoints:
                raise
            warnings.warn(f"{error}; taking {checkpoints[-1]}", stacklevel=2)


def resume_point(folder: Path) -> Path | None:
    """Where a run goes on: its latest checkpoint; None for the start, where it was killed before its first.

    Raises:
        ValueError: what ``latest_checkpoint`` raises, but for a run that had not begun.
    """
    begun = bool(_checkpoints(folder)) or (folder / "log.csv").exists()
    return latest_checkpoint(folder) if begun or not is_run(folder) else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What ``State.save`` wrote.

    Raises:
        ValueError: the file is damaged, or holds something else.
        OSError: it is not there, or may not be read.
    """
    with open(path, "rb") as file:
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # by where it is cut or spoilt it fails in most ways there are, OSError among them
            raise ValueError(f"checkpoint: {path} is damaged") from error
    ours = isinstance(saved, dict) and saved.keys() >= {"method", "optimizer", "boxes", "epoch", "random"}
    expect(ours, "checkpoint", str(path), "what a training writes", "another file of torch's")
    return saved


def keep_best(path: Path) -> None:
    """Gives a checkpoint the second name best.pt, which stays when it goes; a copy where files have but one name."""
    part, best = path.with_name("best.part"), path.with_name("best.pt")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:  # FAT, and some folders of other machines
        with open(path, "rb") as source:
            write_whole(best, lambda file: shutil.copyfileobj(source, file))
    else:
        os.replace(part, best)


def check_folder(folder: Path, config: Config, *, resume: bool, overwrite: bool) -> Path | None:
    """Refuses a folder that training must not write into; else says where it goes on, if at all. Writes nothing itself.

    Raises:
        ValueError: both flags; a folder that holds something else than a run, or a run without either flag, or that
            cannot be made; with ``resume`` no run, one of another configuration, or a damaged checkpoint.
    """
    expect(not (resume and overwrite), "train", "--resume and --overwrite", "one of them", "both")
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    start = resume_point(folder) if resume else None
    if resume:
        changed = difference(read_config(folder / "config.yaml"), config)
        expect(not changed, "train", "--resume", "the configuration of the run", f"another: {changed}")
    elif occupied:
        expect(is_run(folder), "train", "--out", "a new or empty folder", f"{folder}, which holds something else")
        refused = f"{folder}, which holds a run: go on with --resume or start anew with --overwrite"
        expect(overwrite, "train", "--out", "a new or empty folder", refused)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    expect(writable, "train", "--out", "a folder that can be written", f"{folder}: {there} is none")
    return start


def start_folder(folder: Path, config: Config) -> None:
    """Removes the run that the folder holds, if any, and nothing else, and writes the new run's configuration."""
    if is_run(folder):
        for path in (path for pattern in FILES for path in folder.glob(pattern)):
            if path.name in INSIDE and path.is_dir():
                _empty(path, INSIDE[path.name])
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", f"{MARK}\n{to_yaml(config)}")


def _empty(folder: Path, names: str) -> None:
    """Removes the files of these names, a pattern, and the folder if nothing is left; a link to one stays."""
    for path in folder.iterdir():
        if re.fullmatch(rf"{names}|\.({names})\.part", path.name):
            path.unlink()
    if not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def load_run(folder: Path | str, checkpoint: Path | None = None, dataset: data.Dataset | None = None) -> Run:
    """Reads a run back from its folder, on the CPU, at its last checkpoint or another.

    Its data are read again, unless they are given: what ``load_data`` made of the run's configuration.

    Raises:
        ValueError: the folder holds no run, or none with a checkpoint; the data it was trained on is gone; the
            checkpoint is not there, is damaged, or is of another method, encoder or data set; log.csv
            or result.json is damaged.
        OSError: the checkpoint cannot be read.
    """
    folder = Path(folder)
    checkpoint = latest_checkpoint(folder) if checkpoint is None else checkpoint
    expect(is_run(folder), "run", "folder", "one that holds a run", str(folder))
    kept = ", ".join(map(str, sorted(folder.glob("checkpoints/*.pt")))) or "those that a training writes"
    expect(checkpoint.is_file(), "run", "checkpoint", f"a file, such as {kept}", f"{checkpoint}, which is none")
    config = read_config(folder / "config.yaml")
    dataset = load_data(config) if dataset is None else dataset
    # Reading draws weights and loads a random state, neither of which is to be felt outside.
    with torch.random.fork_rng():
        state = build_state(config, dataset, torch.device("cpu"))
        state.load(checkpoint)
    prototypes: list[Tensor] = []
    assignments: list[Tensor] = []
    if state.prototypes is not None and state.prototypes.ready:
        prototypes, assignments, _ = state.prototypes.lookup(torch.arange(len(dataset.train_images)))
    return Run(
        path=folder,
        config=config,
        dataset=dataset,
        method=state.method.eval(),
        views=build_views(config, dataset),
        boxes=state.boxes.boxes,
        prototypes=prototypes,
        assignments=assignments,
        log=read_log(folder),
        result=read_result(folder),
    )


def _checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoints by epoch; a file of the user's beside them, as epoch-0002-backup.pt, is none."""
    named = [path for path in (folder / "checkpoints").glob("epoch-*.pt") if CHECKPOINT.fullmatch(path.name)]
    return sorted(named, key=lambda path: int(path.stem.removeprefix("epoch-")))
