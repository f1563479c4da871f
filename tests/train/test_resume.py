"""What a run that was killed, wherever that was, comes back to when it goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from train._files import write_image
from train._runs import stop_after

from fastproto import cli
from fastproto.train import loop
from fastproto.train.build import build_state, load_data
from fastproto.train.checkpoint import is_run, read_checkpoint, start_folder
from fastproto.train.config import Config, EvaluationConfig, read_config
from fastproto.train.data import Dataset
from fastproto.train.files import read_log


class Killed(BaseException):
    pass


@pytest.fixture
def config(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run in which every epoch is the best so far."""
    scores = count()
    monkeypatch.setattr(loop, "evaluate", lambda *args, **options: {"knn20": next(scores) / 100, "knn200": 0.1})
    return replace(tiny_config, method="simclr", crop="random", evaluation=EvaluationConfig(knn_interval=1))


def killed(at: str, call: int, folder: Path, config: Config, dataset: Dataset) -> None:
    """Trains until the so many-th call of a function of the loop."""
    calls, function = count(1), getattr(loop, at)

    def kill(*args: object) -> object:
        if next(calls) == call:
            raise Killed
        return function(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, at, kill)
        with pytest.raises(Killed):
            loop.train(config, dataset, folder)


@pytest.mark.parametrize("at", ["keep_best", "write_log"])
def test_what_follows_the_last_checkpoint_is_made_up_for(
    tmp_path: Path, config: Config, tiny_data: Dataset, at: str
) -> None:
    killed(at, 2, tmp_path, config, tiny_data)
    assert [row["epoch"] for row in read_log(tmp_path)] == [1]
    loop.train(config, tiny_data, tmp_path, resume=True)
    assert [row["epoch"] for row in read_log(tmp_path)] == [1, 2]
    assert read_checkpoint(tmp_path / "checkpoints" / "best.pt")["epoch"] == 2


def test_the_best_checkpoint_is_no_state_within_an_epoch(tmp_path: Path, config: Config, tiny_data: Dataset) -> None:
    # The state after the third step of four takes the file of the first epoch's end.
    with pytest.raises(loop.Interrupted):
        loop.train(config, tiny_data, tmp_path, stop=stop_after(3))
    with pytest.raises(loop.Interrupted):
        loop.train(config, tiny_data, tmp_path, resume=True, stop=stop_after(1))
    best = read_checkpoint(tmp_path / "checkpoints" / "best.pt")
    assert (best["epoch"], best["step"]) == (1, 0)


def test_a_run_killed_before_its_first_checkpoint_begins(tmp_path: Path, tiny_config: Config, made: Dataset) -> None:
    config = replace(tiny_config, method="simclr", crop="random", epochs=1, seed=3)
    start_folder(tmp_path, config)
    assert cli.main(["train", "--out", str(tmp_path), "--resume"]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["config"]["seed"] == 3
    assert [row["epoch"] for row in read_log(tmp_path)] == [1]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.rstrip("\n")


def test_a_checkpoint_of_something_else_is_refused_by_name(
    tmp_path: Path, tiny_config: Config, made: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    def begin(name: str, config: Config, dataset: Dataset) -> Path:
        start_folder(tmp_path / name, config)
        return build_state(config, dataset, torch.device("cpu")).save(tmp_path / name)

    base = replace(tiny_config, method="simclr")
    begin("run", base, made)
    wider = replace(base, encoder=replace(base.encoder, width=16))
    others = {
        "expected method simclr, got moco": begin("other", replace(base, method="moco"), made),
        "expected data digits, got cifar10": begin("data", replace(base, data="cifar10"), made),
        "does not fit the run's ": begin("wide", wider, made),
        "expected what a training writes, got another file of torch's": tmp_path / "weights.pt",
    }
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    for message, path in others.items():
        for command in (["eval"], ["export", "--to", "safetensors"]):
            line = refused(capsys, *command, tmp_path / "run", "--checkpoint", path)
            assert line.startswith(f"fastproto {command[0]}: checkpoint: {path} {message}")
            assert len(line) < 600

    path = begin("fewer", base, made.limited(39))
    for command in (["eval"], ["report"], ["train", "--resume", "--out"]):
        line = refused(capsys, *command, tmp_path / "fewer")
        assert line.endswith(f"checkpoint: {path} expected number of training images 40, got 39")
    # A checkpoint from before this was kept says it in torch's words.
    saved = read_checkpoint(path)
    del saved["origin"]
    torch.save(saved, path)
    assert f"{path} does not fit the run's boxes: size mismatch" in refused(capsys, "eval", tmp_path / "fewer")
    saved = read_checkpoint(begin("run", base, made))
    del saved["origin"]
    torch.save(saved, path)
    assert cli.main(["eval", str(tmp_path / "fewer"), "--knn"]) == 0


def test_where_the_data_lie_now_is_remembered(tmp_path: Path, tiny_config: Config, tiny_data: Dataset) -> None:
    with pytest.raises(loop.Interrupted):
        loop.train(tiny_config, tiny_data, tmp_path, stop=stop_after(1))
    moved = replace(tiny_config, data_root="/elsewhere", keep=3)
    loop.train(moved, tiny_data, tmp_path, resume=True)
    assert read_config(tmp_path / "config.yaml") == moved
    assert is_run(tmp_path)


def test_a_folder_of_other_images_is_refused(tmp_path: Path, tiny_config: Config) -> None:
    images = tmp_path / "images"
    for number in range(20):
        write_image(images / "ab"[number % 2] / f"{number}.png", 8, 8, seed=number)
    config = replace(tiny_config, method="simclr", data=f"imagefolder:{images}", batch_size=4, image_size=16, workers=0)

    def load(path: Path) -> None:
        build_state(config, load_data(config), torch.device("cpu")).load(path)

    path = build_state(config, load_data(config), torch.device("cpu")).save(tmp_path)
    images = images.rename(tmp_path / "moved")
    config = replace(config, data=f"imagefolder:{images}")
    load(path)
    (images / "a" / "0.png").rename(images / "b" / "0.png")
    (images / "b" / "1.png").rename(images / "a" / "1.png")
    with pytest.raises(ValueError, match=r"digest of .* of the training images \w{16}, got \w{16}$"):
        load(path)
