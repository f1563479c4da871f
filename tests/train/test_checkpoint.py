"""What a run leaves on disk: whole or not at all, only its own, and all of it comes back."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from torch import Tensor

from fastproto.train import build, checkpoint, files
from fastproto.train.config import Config, OptimizerConfig, plain, read_config
from fastproto.train.data import Dataset
from fastproto.train.export import CARD, WRITERS
from fastproto.train.run import load_run

CPU = torch.device("cpu")


def stepped(config: Config, dataset: Dataset) -> checkpoint.State:
    """A state with everything in it changed from how it began."""
    state = build.build_state(config, dataset, CPU)
    sum(parameter.square().sum() for parameter in state.method.parameters() if parameter.requires_grad).backward()
    state.optimizer.step()
    state.boxes.update(torch.arange(3), torch.tensor([[0.1, 0.2, 0.8, 0.9]] * 3))
    if state.prototypes is not None:
        state.prototypes.update(torch.randn(len(dataset.train_images), state.method.cluster_dim))
    state.epoch, state.step = 3, 2
    state.sums, state.seconds = {"contrast": torch.tensor(1.5, dtype=torch.float64)}, {"views": 0.25}
    state.before, state.log = {"knn20": 0.5}, [{"epoch": 1, "loss": 2.5}]
    return state


def everything(state: checkpoint.State) -> dict[str, Tensor]:
    parts = {
        name: getattr(state, name) for name in ("method", "boxes", "prototypes") if getattr(state, name) is not None
    }
    tensors = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    return tensors


@pytest.mark.parametrize("method", ["simclr", "byol", "spcl", "pauc"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_a_checkpoint_brings_everything_back(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset, method: str, optimizer: str
) -> None:
    config = replace(tiny_config, method=method, optimizer=OptimizerConfig(name=optimizer))  # type: ignore[arg-type]
    saved = stepped(config, tiny_data)
    path = saved.save(tmp_path)
    assert path == tmp_path / "checkpoints" / "epoch-0003.pt"
    expected = torch.rand(4)
    loaded = build.build_state(config, tiny_data, CPU)
    loaded.load(path)
    torch.testing.assert_close(torch.rand(4), expected, rtol=0, atol=0)
    before, after = everything(saved), everything(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("epoch", "step", "sums", "seconds", "before", "log"):
        assert getattr(saved, name) == getattr(loaded, name)


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "values.pt"
    files.write_whole(path, lambda file: torch.save({"value": 1}, file))

    def break_off(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_whole(path, break_off)
    assert torch.load(path, weights_only=True) == {"value": 1}


def test_the_last_checkpoints_are_kept(tmp_path: Path, tiny_config: Config, tiny_data: Dataset) -> None:
    state = build.build_state(tiny_config, tiny_data, CPU)
    (tmp_path / "config.yaml").write_text(checkpoint.MARK)
    mine = [tmp_path / "checkpoints" / name for name in ("epoch-0002-backup.pt", "epoch-.pt", "epoch-1.pt")]
    mine[0].parent.mkdir()
    for path in mine:
        path.write_text("mine")
    for epoch in (0, 9998, 9999, 10000):
        state.epoch = epoch
        state.save(tmp_path)
    for path in mine:
        path.unlink()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["epoch-10000.pt", "epoch-9999.pt"]
    assert checkpoint.latest_checkpoint(tmp_path).name == "epoch-10000.pt"
    for epoch in (10001, 10002):
        state.epoch = epoch
        state.save(tmp_path, keep=3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["epoch-10000.pt", "epoch-10001.pt", "epoch-10002.pt"]


def test_the_state_begins_the_same_for_the_same_seed(tiny_config: Config, tiny_data: Dataset) -> None:
    first, again, other = (
        everything(build.build_state(replace(tiny_config, seed=seed), tiny_data, CPU)) for seed in (5, 5, 6)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["method.queue"], other["method.queue"])


def test_a_folder_is_taken_only_as_it_should(tmp_path: Path, tiny_config: Config, tiny_data: Dataset) -> None:
    def check(folder: Path, config: Config = tiny_config, resume: bool = False, overwrite: bool = False) -> None:
        checkpoint.check_folder(folder, config, resume=resume, overwrite=overwrite)

    run, other = tmp_path / "run", tmp_path / "other"
    check(run)
    with pytest.raises(ValueError, match=r"run: folder expected one that holds a run, got .*run"):
        check(run, resume=True)
    assert not run.exists()

    other.mkdir()
    check(other)
    check(other, overwrite=True)
    (other / "config.yaml").write_text("method: pauc\n")
    for overwrite in (False, True):
        with pytest.raises(
            ValueError, match=r"--out expected a new or empty folder, got .*other, which holds something else"
        ):
            check(other, overwrite=overwrite)
    with pytest.raises(ValueError, match="which holds something else"):
        check(other / "config.yaml", overwrite=True)
    with pytest.raises(ValueError, match=r"one that holds a run, got .*other"):
        check(other, resume=True)

    checkpoint.start_folder(run, tiny_config)
    check(run, resume=True)  # it was killed before its first checkpoint
    (run / "log.csv").touch()
    with pytest.raises(ValueError, match=r"run: folder expected a run with a checkpoint, got .*run, which has none"):
        check(run, resume=True)
    stepped(tiny_config, tiny_data).save(run)
    check(run, resume=True)
    check(run, overwrite=True)
    with pytest.raises(ValueError, match="which holds a run: go on with --resume or start anew with --overwrite"):
        check(run)
    with pytest.raises(ValueError, match="--resume and --overwrite expected one of them, got both"):
        check(run, resume=True, overwrite=True)
    with pytest.raises(ValueError, match="--resume expected the configuration of the run, got another: seed 0, now 1"):
        check(run, replace(tiny_config, seed=1), resume=True)
    check(run, replace(tiny_config, device="auto"), resume=True)


def test_starting_anew_removes_the_run_and_nothing_else(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset
) -> None:
    checkpoint.start_folder(tmp_path, tiny_config)
    stepped(tiny_config, tiny_data).save(tmp_path)
    for name in ("log.csv", "result.json", "report.html", "events.out.tfevents.1.host", "notes.txt"):
        (tmp_path / name).write_text("old")
    checkpoint.start_folder(tmp_path, replace(tiny_config, seed=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "notes.txt"]
    assert read_config(tmp_path / "config.yaml") == replace(tiny_config, seed=3)


def test_starting_anew_leaves_a_users_files_among_the_runs(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for names in (["export/mine.txt", "checkpoints/precious.pt", "checkpoints/epoch-0003-backup.pt"], []):
        checkpoint.start_folder(run, tiny_config)
        checkpoint.keep_best(stepped(tiny_config, tiny_data).save(run))
        (run / "export").mkdir(exist_ok=True)
        part = "0123abcd.part"
        written = ["checkpoints/best.part", f"checkpoints/.epoch-0004.pt.{part}", f"export/.timm.safetensors.{part}"]
        for name in [*names, *written, f"export/{CARD}", *(f"export/{file}" for file, _ in WRITERS.values())]:
            (run / name).write_text(checkpoint.CARD_HEAD if name.endswith(CARD) else "old")
        checkpoint.start_folder(run, tiny_config)
        assert {path.relative_to(run).as_posix() for path in run.rglob("*.*")} == {"config.yaml", *names}
        for name in names:
            (run / name).unlink()
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    (run / "export").mkdir()
    (run / "export" / CARD).write_text("# What I think of it\n")
    checkpoint.start_folder(run, tiny_config)
    assert (run / "export" / CARD).read_text() == "# What I think of it\n"
    (run / "export" / CARD).unlink()

    # Where the disk is small, checkpoints may be a link to a folder of a larger one.
    elsewhere.mkdir()
    (run / "checkpoints").symlink_to(elsewhere)
    for _ in range(2):
        stepped(tiny_config, tiny_data).save(run)
        assert [path.name for path in elsewhere.iterdir()] == ["epoch-0003.pt"]
        checkpoint.start_folder(run, tiny_config)
        assert [path.name for path in elsewhere.iterdir()] == []
        assert (run / "checkpoints").is_symlink()


def test_the_log_comes_back_with_gaps(tmp_path: Path) -> None:
    assert files.read_log(tmp_path) == []
    log = [
        {"epoch": 1, "loss": 0.1 + 0.2, "time/views": 1.0},
        {"epoch": 2, "loss": 2.0, "loss/align": 3.0, "time/views": 1.5},
    ]
    files.write_log(tmp_path, log)
    first, second = files.read_log(tmp_path)
    assert second == log[1]
    assert math.isnan(first.pop("loss/align"))
    assert first == log[0]
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == "epoch,loss,loss/align,time/views"


@pytest.mark.parametrize("method", ["simclr", "pauc"])
def test_a_run_is_read_back(tmp_path: Path, tiny_config: Config, made: Dataset, method: str) -> None:
    config = replace(tiny_config, method=method, crop="simc")  # type: ignore[arg-type]
    checkpoint.start_folder(tmp_path, config)
    state = stepped(config, made)
    state.save(tmp_path)
    files.write_log(tmp_path, state.log)
    random = torch.get_rng_state()
    run = load_run(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), random)
    assert (run.path, run.config, run.log, run.result) == (tmp_path, config, state.log, {})
    assert run.dataset is made
    assert not run.method.training
    weights = run.method.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in state.method.state_dict().items())
    assert torch.equal(run.boxes, state.boxes.boxes)
    assert run.views.size == (16, 16)
    if method == "simclr":
        assert (run.prototypes, run.assignments) == ([], [])
    else:
        assert torch.equal(run.prototypes[0], state.prototypes.prototypes_0)
        assert torch.equal(run.assignments[0], state.prototypes.assignments_0)
    (tmp_path / "result.json").write_text(json.dumps({"config": plain(config)}))
    assert load_run(tmp_path).result == {"config": plain(config)}


def test_a_run_before_its_first_clustering_has_no_prototypes(
    tmp_path: Path, tiny_config: Config, made: Dataset
) -> None:
    checkpoint.start_folder(tmp_path, tiny_config)
    build.build_state(tiny_config, made, CPU).save(tmp_path)
    run = load_run(tmp_path)
    assert (run.prototypes, run.assignments) == ([], [])


def test_no_run_is_refused(tmp_path: Path, tiny_config: Config) -> None:
    with pytest.raises(ValueError, match=r"run: folder expected one that holds a run, got .*nowhere"):
        load_run(tmp_path / "nowhere")
    checkpoint.start_folder(tmp_path, tiny_config)
    with pytest.raises(ValueError, match=r"run: folder expected a run with a checkpoint, got .*, which has none"):
        load_run(tmp_path)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.start_folder(tmp_path, tiny_config)
    state = stepped(tiny_config, tiny_data)
    older = state.save(tmp_path)
    state.epoch += 1
    newer = state.save(tmp_path)
    whole = newer.read_bytes()
    start = whole.index(b"data.pkl")
    middle = whole.index(b"\x80\x02", start) + 20  # in the pickle
    damaged = [whole[:length] for length in (0, 1000, 5000, 20_000, len(whole) // 2, len(whole) - 1)]
    damaged += [whole[:middle] + bytes(spoilt) + whole[middle + len(spoilt) :] for spoilt in (b"s" * 9, b"R" * 9)]
    for content in damaged:
        newer.write_bytes(content)
        caplog.clear()
        assert checkpoint.latest_checkpoint(tmp_path) == older
        assert caplog.messages == [f"checkpoint: {newer} is damaged; taking {older}"]
        assert newer.read_bytes() == content
    newer.write_bytes(whole)
    assert checkpoint.latest_checkpoint(tmp_path) == newer
    for path in (older, newer):
        path.write_bytes(whole[:1000])
    caplog.clear()
    with pytest.raises(ValueError, match=rf"checkpoint: {older} is damaged$"):
        checkpoint.check_folder(tmp_path, tiny_config, resume=True, overwrite=False)
    assert caplog.messages == [f"checkpoint: {newer} is damaged; taking {older}"]


def test_a_link_to_no_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset
) -> None:
    checkpoint.start_folder(tmp_path, tiny_config)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "epoch-0009.pt").symlink_to(tmp_path / "unmounted" / "epoch-0009.pt")
    with pytest.raises(ValueError, match=r"folder expected a run with a checkpoint, got .*, which has none"):
        checkpoint.latest_checkpoint(tmp_path)
    older = stepped(tiny_config, tiny_data).save(tmp_path)
    assert checkpoint.latest_checkpoint(tmp_path) == older


def test_a_checkpoint_that_cannot_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        checkpoint.read_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(IsADirectoryError):
        checkpoint.read_checkpoint(tmp_path)


@pytest.mark.parametrize("links", [True, False])
def test_the_best_checkpoint_is_linked_or_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*paths: Path) -> None:
        raise PermissionError("Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for content in (b"first", b"second"):
        path = tmp_path / "epoch-0001.pt"
        path.write_bytes(content)
        checkpoint.keep_best(path)
        assert (tmp_path / "best.pt").read_bytes() == content
        assert (tmp_path / "best.pt").samefile(path) == links
        path.unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_the_mark_of_a_run_is_removed_last() -> None:
    assert checkpoint.FILES[-1] == "config.yaml"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, tiny_config: Config) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out expected a folder that can be written, got .*file is none"):
        checkpoint.check_folder(tmp_path / "file" / "run", tiny_config, resume=False, overwrite=False)


def test_spoilt_bytes_inside_are_found(tmp_path: Path) -> None:
    path = tmp_path / "epoch-0001.pt"
    numbers = torch.arange(1000.0)
    names = ("method", "optimizer", "boxes", "epoch", "random")
    torch.save(dict.fromkeys(names, numbers), path)
    assert torch.equal(checkpoint.read_checkpoint(path)["boxes"], numbers)
    content = bytearray(path.read_bytes())
    at = content.index(numbers[500:504].numpy().tobytes())
    content[at : at + 4] = b"\x07" * 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"epoch-0001.pt expected what was written, got .*: it is damaged"):
        checkpoint.read_checkpoint(path)


def test_the_best_may_be_the_best_already(tmp_path: Path) -> None:
    path = tmp_path / "epoch-0001.pt"
    path.write_bytes(b"content")
    for _ in range(2):
        checkpoint.keep_best(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "epoch-0001.pt"]


def test_a_full_disk_is_named_and_leaves_no_part(tmp_path: Path) -> None:
    """torch's writer, stopped by a full disk, raises a RuntimeError about a position."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            files.write_whole(tmp_path / "x.pt", lambda file: torch.save(torch.zeros(100_000), file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.iterdir())
