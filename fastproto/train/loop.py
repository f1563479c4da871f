"""The training loop, read from top to bottom: boxes and prototypes at their epochs, then views, loss, step."""

from __future__ import annotations

import atexit
import gc
import json
import logging
import math
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import fastproto
from fastproto import _settings
from fastproto.losses._gather import from_first_rank, gather_dealt_rows, rank_and_world, sum_over_ranks
from fastproto.train.build import build_state, build_views
from fastproto.train.checkpoint import State, continue_folder, keep_best, resume_point, start_folder
from fastproto.train.clock import PHASES, Clock
from fastproto.train.config import Config, OptimizerConfig, plain
from fastproto.train.data import Dataset, batches
from fastproto.train.encoders import Encoder
from fastproto.train.evaluate import KNN, embed, evaluate
from fastproto.train.files import write_log, write_text
from fastproto.train.lock import locked
from fastproto.train.methods import METHODS, Method, Prototypes
from fastproto.train.monitors import embedding_monitors, prototype_monitors
from fastproto.views import localize

log = logging.getLogger("fastproto")

# Images at most whose embeddings are watched for signs of collapse.
WATCHED = 512


class Interrupted(Exception):
    """Training stopped because it was asked to; a checkpoint holds all that was done."""


def train(
    config: Config, dataset: Dataset, folder: Path, *, resume: bool = False, stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Trains, evaluates before and after, and leaves a run in ``folder``.

    On a CPU the same configuration gives the same bits, interrupted and resumed or not.

    Args:
        config: all settings.
        dataset: what ``load_data`` gives for this configuration; resident training images are kept on the device.
        folder: where the run is kept; ``check_folder`` says whether it may be written.
        resume: go on from the folder's last checkpoint instead of removing the run that it holds.
        stop: asked after every step; once it says True, the state is saved and training ends.

    Returns:
        What result.json holds: accuracies "before", "after" and "best", seconds "time_s" by phase, "config",
        "versions".

    Raises:
        Interrupted: ``stop`` said so.
        FloatingPointError: the loss is no longer finite.
        BrokenImage: a file that does not decode, where the configuration is strict.
        BlockingIOError: another training writes the folder.
        ValueError: to resume, a checkpoint that is damaged, or of another method, encoder or data set.
    """
    idle = METHODS[config.method].idle_parts
    strategy = DDPStrategy(find_unused_parameters=idle) if config.devices > 1 else "auto"
    device_type = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    local = _settings.torchrun_local_world or config.devices
    fabric = Fabric(
        accelerator=device_type,
        strategy=strategy,
        devices=local,
        num_nodes=config.devices // local,
        precision=config.precision,
    )
    joined_before = dist.is_initialized()
    fabric.launch()
    if dist.is_initialized() and not joined_before:
        atexit.register(leave_processes)
    # By now all processes have seen that no training holds the folder.
    with locked(folder) if fabric.is_global_zero else nullcontext():
        return run_epochs(fabric, config, dataset, folder, resume=resume, stop=stop)


def run_epochs(
    fabric: Fabric, config: Config, dataset: Dataset, folder: Path, *, resume: bool, stop: Callable[[], bool]
) -> dict[str, Any]:
    """What ``train`` does in each of its processes."""
    device, (rank, world) = fabric.device, rank_and_world()
    state = build_state(config, dataset, device)
    path = resume_point(folder) if resume else None
    if path is not None:
        state.load(path)
    if rank == 0:
        (continue_folder if resume else start_folder)(folder, config)
        if path is None:
            state.save(folder, config.keep)
        else:
            # A run that was killed may have left nothing after its checkpoint.
            keep_up(path, folder, state)
    method, boxes, prototypes = state.method, state.boxes, state.prototypes
    if config.compile:
        for encoder in (part for part in method.modules() if isinstance(part, Encoder)):
            encoder.compile()
    if rank == 0:
        warn_of_what_never_begins(config, method)
    module, optimizer = fabric.setup(method, state.optimizer)
    views = build_views(config, dataset)
    images = dataset.train_images.to(device)
    steps = len(images) // config.batch_size
    clock = Clock(device)
    clock.add(state.seconds)
    if not state.before:
        clock.start("evaluation")
        state.before = evaluate(method.eval().encoder, dataset, device=device)

    board = SummaryWriter(str(folder), purge_step=state.epoch + 1) if rank == 0 else None
    bar = tqdm(
        total=config.epochs * steps * config.batch_size,
        initial=(state.epoch * steps + state.step) * config.batch_size,
        unit="img",
        unit_scale=True,
        disable=None if rank == 0 else True,
    )
    online = start_wandb(config, folder) if config.wandb and rank == 0 else None
    with board or nullcontext(), online or nullcontext(), bar:
        for epoch in range(state.epoch, config.epochs):
            if state.step == 0:
                clock.start("clustering")
                method.eval()
                if locates(config, epoch):
                    with fabric.autocast():
                        found = find_boxes(config, method, dataset, device)
                    boxes.update(torch.arange(len(images), device=device), found)
                if prototypes is not None and clusters(config, epoch):
                    with fabric.autocast():  # the forward pass of all images; clustering is of float32
                        features = embed_all(method.embed, dataset, device)
                    features = method.cluster_space(features)
                    prototypes.update(features)
                    of_images = prototypes.lookup(torch.arange(len(images), device=device))
                    state.clustering = prototype_monitors(features, *(first for first, *_ in of_images))
                    for parameter in method.after_clustering():
                        state.optimizer.state.pop(parameter, None)
            method.train()
            views.alpha = crop_alpha(config, epoch)
            clustered = prototypes if prototypes is not None and prototypes.ready else None
            order = torch.from_numpy(np.random.default_rng((config.seed, epoch)).permutation(len(images))).to(device)
            shares = order[: steps * config.batch_size].view(steps, config.accumulate, -1)[:, :, rank::world]
            arriving = batches(images, shares[state.step :].flatten(0, 1), device)

            for step in range(state.step, steps):
                for part, ids in enumerate(shares[step]):
                    clock.start("views")
                    pair = views(next(arriving), ids, boxes.lookup(ids), epoch)
                    # DDP decides in the forward pass whether the backward one meets the other processes.
                    with fabric.no_backward_sync(module, enabled=part + 1 < config.accumulate):
                        clock.start("forward")
                        terms = module(pair, clustered and Prototypes(*clustered.lookup(ids)), clock)
                        clock.start("backward")
                        fabric.backward(torch.stack(list(terms.values())).sum() / config.accumulate)
                    for name, term in terms.items():
                        state.sums[name] = state.sums.get(name, 0) + term.detach().double() / config.accumulate
                state.step = step + 1
                done = epoch + state.step / steps
                rate = learning_rate(config.optimizer, epoch + (step + 0.5) / steps, config.epochs)
                for group in optimizer.param_groups:
                    group["lr"] = config.optimizer.lr if group["constant"] else rate
                optimizer.step()
                optimizer.zero_grad()
                method.after_step(done / config.epochs)
                clock.stop()
                bar.update(config.batch_size)
                if asked_anywhere(stop, device):
                    state.seconds, state.sums = clock.take(), mean_over_ranks(state.sums)
                    if rank == 0:
                        state.save(folder, config.keep)
                    raise Interrupted

            # Statistics of batches that no process shares: from here on all have those that a checkpoint keeps.
            for buffer in method.buffers():
                from_first_rank(buffer)
            state.seconds, state.sums = clock.take(), mean_over_ranks(state.sums)
            row = log_row(config, state, steps, dataset.skipped)
            if not math.isfinite(row["loss"]):
                terms = ", ".join(f"{name} {value:.3g}" for name, value in row.items() if name.startswith("loss"))
                raise FloatingPointError(f"diverged in epoch {epoch + 1}: {terms}")
            clock.start("evaluation")
            row |= watch(config, state, dataset, device)
            row["time/evaluation"] += clock.take()["evaluation"]
            state.log.append(row)
            state.epoch, state.step, state.sums, state.seconds = epoch + 1, 0, {}, {}
            summary = f"epoch {epoch + 1}, loss {row['loss']:.3f}, data {row['data_wait']:.0%}"
            bar.set_postfix_str(summary)
            if rank == 0 and bar.disable:  # no terminal: a line an epoch for whatever keeps them
                tqdm.write(f"{summary}, {row['images_per_s']:.0f} img/s", file=sys.stderr)
            if board is not None:
                keep_up(state.save(folder, config.keep), folder, state)
                for name, value in row.items():
                    board.add_scalar(name, value, epoch + 1)
            if online is not None:
                online.log(row, step=epoch + 1)

    # Asked while the last epoch was saved.
    if asked_anywhere(stop, device):
        raise Interrupted
    clock.start("evaluation")
    after = evaluate(method.eval().encoder, dataset, device=device)
    last = clock.take()
    result = {
        "before": state.before,
        "after": after,
        "best": best_scores([*state.log, {"epoch": config.epochs, **after}]),
        "time_s": {phase: last[phase] + sum(row[f"time/{phase}"] for row in state.log) for phase in PHASES},
        "config": plain(config),
        "versions": {
            "fastproto": fastproto.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    if rank == 0:
        write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def warn_of_what_never_begins(config: Config, method: Method) -> None:
    """Says which parts of the settings have no effect in as few epochs."""
    epochs = range(config.epochs)
    if config.optimizer.warmup >= config.epochs:
        rates = config.optimizer.lr * config.epochs / config.optimizer.warmup, config.optimizer.lr
        log.warning("optimizer: no end of warmup in this run: the learning rate rises to %.3g of %.3g", *rates)
    if method.clusters and not any(clusters(config, epoch) for epoch in epochs):
        warmup = config.prototypes.warmup
        log.warning("prototypes: none in this run of %d epochs: they begin after %d", config.epochs, warmup)
    if config.crop == "contrastive" and not any(locates(config, epoch) for epoch in epochs):
        warmup = config.views.box_warmup
        log.warning("views: no boxes in this run of %d epochs: they begin after %d", config.epochs, warmup)


def keep_up(path: Path, folder: Path, state: State) -> None:
    """Brings best.pt and log.csv up to the state that the last checkpoint, ``path``, holds."""
    if not state.log:
        return
    # A state within the epoch that follows is not the one that was evaluated.
    at_end = state.step == 0 and "knn20" in state.log[-1]
    if at_end and best_scores(state.log)["knn20"]["epoch"] == state.epoch:
        keep_best(path)
    write_log(folder, state.log)


def leave_processes() -> None:
    """Ends the threads of Gloo: one that outlives the interpreter aborts the process if it lets go of a tensor."""
    if dist.is_initialized():
        dist.destroy_process_group()
    # They end with the last reference to the group.
    gc.collect()


def asked_anywhere(stop: Callable[[], bool], device: torch.device) -> bool:
    """Whether any process was asked to stop: all have to end after the same step."""
    asked = stop()
    if rank_and_world()[1] == 1:
        return asked
    return bool(sum_over_ranks(torch.tensor(float(asked), device=device)) > 0)


def mean_over_ranks(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms of a process are those of its share of the batch."""
    return {name: sum_over_ranks(total) / rank_and_world()[1] for name, total in sums.items()}


def locates(config: Config, epoch: int) -> bool:
    """Whether boxes are found before this epoch, counted from 0."""
    views = config.views
    return config.crop == "contrastive" and epoch >= max(views.box_warmup, 1) and epoch % views.box_interval == 0


def crop_alpha(config: Config, epoch: int) -> float:
    """What places the crops of this epoch, counted from 0: until there are boxes they are uniform, as in the authors'
    code (DDP_simclr_ccrop.py)."""
    guided = config.crop == "simc" or any(locates(config, past) for past in range(epoch + 1))
    return config.views.alpha if guided else 1.0


def clusters(config: Config, epoch: int) -> bool:
    """Whether prototypes are found before this epoch, counted from 0."""
    since = epoch - config.prototypes.warmup
    return since >= 0 and since % config.prototypes.interval == 0


def learning_rate(config: OptimizerConfig, done: float, epochs: int) -> float:
    """The learning rate once so many epochs are done: a linear rise, then a cosine down to 0.

    A step takes that of its middle, so that none, be it the first, the last or the only one, learns nothing.
    """
    if done <= config.warmup:
        return config.lr * done / config.warmup
    return config.lr * (1 + math.cos(math.pi * (done - config.warmup) / (epochs - config.warmup))) / 2


def find_boxes(config: Config, method: Method, dataset: Dataset, device: torch.device) -> Tensor:
    """A box (N, 4) for every training image, where the trained encoder's last feature map of all of it is warm."""
    size = (dataset.train_images.shape[2], dataset.train_images.shape[3])

    def find(images: Tensor) -> Tensor:
        return localize(method.encoder.feature_map(images), config.views.box_threshold, size)

    return embed_all(find, dataset, device, whole=True)


def embed_all(
    encode: Callable[[Tensor], Tensor], dataset: Dataset, device: torch.device, *, whole: bool = False
) -> Tensor:
    """What ``encode`` makes of all training images, un-augmented (N, ...); each process does its share of them."""
    rank, world = rank_and_world()
    count = len(dataset.train_images)
    # All processes have equally many: at the end some begin again with the first images.
    ids = torch.arange(-(-count // world) * world).view(-1, world)[:, rank] % count
    images, mean, std = dataset.train_images, dataset.mean, dataset.std
    return gather_dealt_rows(embed(encode, images, mean, std, ids=ids, whole=whole, device=device))[:count]


def watch(config: Config, state: State, dataset: Dataset, device: torch.device) -> dict[str, float]:
    """Signs of collapse and, every so many epochs, accuracies by nearest neighbours, at the end of an epoch.

    Draws no random number and leaves the state as it is, but for the mode of the method.
    """
    method, count, epoch = state.method.eval(), len(dataset.train_images), state.epoch + 1
    # Of few images fewer: watching is to take no hundredth of the time.
    watched = min(count, WATCHED, max(64, count // 32))
    ids = torch.arange(watched) * count // watched
    embeddings = embed(method.project, dataset.train_images, dataset.mean, dataset.std, ids=ids, device=device)
    if not embeddings.isfinite().all():
        raise FloatingPointError(f"diverged in epoch {epoch}: embeddings are not finite")
    found = embedding_monitors(embeddings) | state.clustering
    interval = config.evaluation.knn_interval
    if interval and epoch % interval == 0:
        found |= evaluate(method.encoder, dataset, metrics=KNN, device=device)
    return found


def best_scores(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Of each accuracy by nearest neighbours the highest, and the first epoch that had it."""
    best: dict[str, dict[str, float]] = {}
    for metric in KNN:
        row = max((row for row in rows if metric in row), key=lambda row: row[metric])
        best[metric] = {"accuracy": row[metric], "epoch": row["epoch"]}
    return best


def start_wandb(config: Config, folder: Path) -> Any:
    """A run of Weights & Biases; a continuation is another of the same group."""
    import wandb

    return wandb.init(project="fastproto", group=folder.name, dir=str(folder), config=plain(config))


def log_row(config: Config, state: State, steps: int, skipped: int) -> dict[str, float]:
    """What log.csv says of the epoch that has just ended."""
    terms = {f"loss/{name}": float(total) / steps for name, total in state.sums.items()}
    busy = sum(state.seconds[phase] for phase in ("views", "forward", "loss", "backward"))
    return {
        "epoch": state.epoch + 1,
        "lr": learning_rate(config.optimizer, state.epoch + 1 - 0.5 / steps, config.epochs),
        "loss": sum(terms.values()),
        **terms,
        "images_per_s": steps * config.batch_size / busy,
        "data_wait": state.seconds["views"] / busy,
        "skipped": skipped,
        **{f"time/{phase}": seconds for phase, seconds in state.seconds.items()},
    }
