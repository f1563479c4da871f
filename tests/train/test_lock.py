"""One training at a time in a folder, and no lock that outlives it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from fastproto import cli
from fastproto.train.config import Config
from fastproto.train.data import Dataset
from fastproto.train.lock import is_locked, locked
from fastproto.train.loop import train

fork = multiprocessing.get_context("fork")


def hold_and_fork(folder: Path, told: multiprocessing.connection.Connection) -> None:
    """Holds the folder, and has a child that goes on living."""
    with locked(folder):
        child = os.fork()
        if child == 0:
            signal.pause()
        told.send(child)
        signal.pause()


def test_a_folder_that_another_process_trains_in_is_refused_and_untouched(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    hears, told = fork.Pipe(duplex=False)
    holder = fork.Process(target=hold_and_fork, args=(folder, told))
    holder.start()
    child = hears.recv()
    try:
        assert is_locked(folder)
        assert cli.main(["train", "--data", "digits", "--out", str(folder)]) == 2
        line = capsys.readouterr().err
        assert line == f"fastproto train: --out expected a folder that no training writes now, got {folder}: one does\n"
        with pytest.raises(BlockingIOError, match="another training writes it"):
            train(tiny_config, tiny_data, folder)
        assert not any(folder.iterdir())
        holder.kill()
        holder.join()
        # The child lives.
        os.kill(child, 0)
        assert not is_locked(folder)
        with locked(folder):
            pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_a_folder_is_let_go_at_the_end_and_after_an_error(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "nowhere")
    with suppress(KeyError), locked(tmp_path):
        assert is_locked(tmp_path)
        raise KeyError
    assert not is_locked(tmp_path)
