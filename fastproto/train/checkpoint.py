"""What a run carries from step to step, what it leaves on disk, and how checkpoints are found again.

A run's folder holds config.yaml, log.csv, TensorBoard events, checkpoints/epoch-NNNN.pt (NNNN complete epochs) and,
where neighbours are asked on the way, checkpoints/best.pt; and at its end result.json and report.html.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastproto._check import LONGEST, expect
from fastproto.cluster import PrototypeBank
from fastproto.train.config import Config, difference, read_config, to_yaml
from fastproto.train.files import write_text, write_whole
from fastproto.train.lock import is_locked
from fastproto.train.methods import Method
from fastproto.views import BoxBank

log = logging.getLogger("fastproto")

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
# The card that export writes, and what it begins with: another README is not ours to overwrite.
CARD = "README.md"
CARD_HEAD = """---
library_name: fastproto
tags: [self-supervised, contrastive, image-feature-extraction]
---
"""
# The run's files in folders where a user may keep others; one that is being written is .NAME.RANDOM.part.
INSIDE = {
    "export": r"README\.md|torchvision\.pt|timm\.safetensors|encoder\.safetensors|encoder\.onnx",
    "checkpoints": r"epoch-[0-9]{4,}\.pt|best\.pt|best\.part",
}
PART = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part")
CHECKPOINT = re.compile(r"epoch-[0-9]{4,}\.pt")
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
    inputs: dict[str, Any] = field(default_factory=dict)  # what the encoder takes: "data", "size", "mean" and "std"

    def save(self, folder: Path, keep: int = 2) -> Path:
        """Writes a checkpoint, whole or not at all, and removes all but the last ``keep``."""
        parts = {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}
        values = {name: getattr(self, name) for name in VALUES}
        random = {"cpu": torch.get_rng_state()}
        more = {"random": random, "origin": self.origin, "inputs": self.inputs}
        if torch.cuda.is_initialized():
            random["cuda"] = torch.cuda.get_rng_state()
        saved = {name: part.state_dict() for name, part in parts.items()}
        path = folder / "checkpoints" / f"epoch-{self.epoch:04d}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: torch.save(saved | values | more, file))
        for old in _checkpoints(folder)[:-keep]:
            old.unlink()
        return path

    def load(self, path: Path, saved: Mapping[str, Any] | None = None) -> None:
        """Takes over what a checkpoint holds, random state included; ``saved`` if it has been read.

        Raises:
            ValueError: what ``read_checkpoint`` raises; a checkpoint of another method, encoder or data set.
            OSError: the file cannot be read.
        """
        saved = read_checkpoint(path) if saved is None else saved
        expect_origin(path, saved, self.origin)
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


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run of ours."""
    config = folder / "config.yaml"
    return config.is_file() and config.read_text(errors="replace").startswith(MARK)


def latest_checkpoint(folder: Path) -> Path:
    """The checkpoint that ``read_latest`` reads."""
    return read_latest(folder)[0]


def read_latest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of the most epochs that can be read, and what it holds. A damaged one after it stays; a warning.

    Raises:
        ValueError: the folder holds no run, or none with a checkpoint, or all are damaged.
    """
    expect(is_run(folder), "run", "folder", "one that holds a run", str(folder))
    gone: set[Path] = set()
    checkpoints: list[Path] = []
    while True:
        checkpoints = checkpoints or [path for path in _checkpoints(folder) if path not in gone]
        expect(bool(checkpoints), "run", "folder", "a run with a checkpoint", f"{folder}, which has none")
        newest = checkpoints.pop()
        try:
            return newest, read_checkpoint(newest)
        except FileNotFoundError:
            # A training has removed it, and written another; or it is a link to what is not there.
            gone.add(newest)
            checkpoints = []
        except ValueError as error:
            if not checkpoints:
                raise
            log.warning("%s; taking %s", error, checkpoints[-1])


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
            # torch.load takes tensors without a look at their checksums.
            spoilt = zipfile.ZipFile(file).testzip()
            file.seek(0)
            saved = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # by where it is cut or spoilt it fails in most ways there are, OSError among them
            raise ValueError(f"checkpoint: {path} is damaged") from error
    expect(spoilt is None, "checkpoint", str(path), "what was written", f"something else in {spoilt}: it is damaged")
    ours = isinstance(saved, dict) and saved.keys() >= {"method", "optimizer", "boxes", "epoch", "random"}
    expect(ours, "checkpoint", str(path), "what a training writes", "another file of torch's")
    return saved


def expect_origin(path: Path, saved: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Raises ValueError where a checkpoint is of something else."""
    for name, wanted in origin.items():
        # Checkpoints did not always say it.
        found = saved.get("origin", {}).get(name, wanted)
        expect(found == wanted, "checkpoint", str(path), f"{name} {wanted}", str(found))


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
        # Nothing is done where both are names of one file already.
        part.unlink(missing_ok=True)


def check_folder(folder: Path, config: Config, *, resume: bool, overwrite: bool) -> Path | None:
    """Refuses a folder that training must not write into; else says where it goes on, if at all. Writes nothing itself.

    Raises:
        ValueError: both flags; a folder that another training writes, or that holds something else than a run, or a
            run without either flag, or that cannot be made; with ``resume`` no run, one of another configuration, or a
            damaged checkpoint.
    """
    expect(not (resume and overwrite), "train", "--resume and --overwrite", "one of them", "both")
    expect(not is_locked(folder), "train", "--out", "a folder that no training writes now", f"{folder}: one does")
    # A link to nothing is something.
    occupied = os.path.lexists(folder) and (not folder.is_dir() or not all(map(_is_part, folder.iterdir())))
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
    _remove_parts(folder)
    if is_run(folder):
        for path in (path for pattern in FILES for path in folder.glob(pattern)):
            if path.name in INSIDE and path.is_dir():
                _empty(path, INSIDE[path.name])
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(folder, config)


def continue_folder(folder: Path, config: Config) -> None:
    """Removes what killed processes left of the run's files, and writes its configuration anew.

    Its data may lie elsewhere by then, and what reads the run looks for them there.
    """
    _remove_parts(folder)
    _write_config(folder, config)


def _write_config(folder: Path, config: Config) -> None:
    write_text(folder / "config.yaml", f"{MARK}\n{to_yaml(config)}")


def is_foreign_card(path: Path) -> bool:
    """Whether it is a README that no export wrote."""
    return path.name == CARD and path.exists() and not path.read_text(errors="replace").startswith(CARD_HEAD)


def _empty(folder: Path, names: str) -> None:
    """Removes the files of these names, a pattern, and the folder if nothing is left; a link to one stays."""
    for path in folder.iterdir():
        if re.fullmatch(names, path.name) and not is_foreign_card(path):
            path.unlink()
    if not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def _remove_parts(folder: Path) -> None:
    """Removes what killed processes left of the run's files."""
    for path in (path for place in (folder, *(folder / name for name in INSIDE)) for path in place.glob(".*.part")):
        if _is_part(path):
            path.unlink(missing_ok=True)


def _is_part(path: Path) -> bool:
    """Whether it has the name of a part of one of the run's files."""
    named = PART.fullmatch(path.name)
    inside = INSIDE.get(path.parent.name, "")
    return named is not None and (named[1] in FILES or re.fullmatch(inside, named[1]) is not None)


def _checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoints by epoch; a file of the user's beside them, as epoch-0002-backup.pt, is none."""
    named = [path for path in (folder / "checkpoints").glob("epoch-*.pt") if CHECKPOINT.fullmatch(path.name)]
    return sorted(named, key=lambda path: int(path.stem.removeprefix("epoch-")))
