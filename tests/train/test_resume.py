"""What a run that was killed, wherever that was, comes back to when it goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from train._runs import stop_after

from fastproto import cli
from fastproto.train import loop
from fastproto.train.checkpoint import read_checkpoint, read_log, start_folder
from fastproto.train.config import Config, EvaluationConfig
from fastproto.train.data import Dataset


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
