"""Data that are downloaded: once however many processes ask, again where that was cut short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from train import _downloads

from fastproto.train.data import load

FOUND = "[0, 2, 1] [1, 0] [7]"


def test_one_process_downloads_and_the_others_wait(tmp_path: Path) -> None:
    root = tmp_path / "new" / "data"
    command = [sys.executable, _downloads.__file__, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [FOUND] * 3
    assert (root / "downloads").read_text() == "once\n"
    assert sorted(path.name for path in root.iterdir()) == ["cifar-10-batches-py", "downloads"]


def test_a_download_that_was_cut_short_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _downloads.without_network(monkeypatch.setattr)
    full = _downloads.time.sleep

    def stopped(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_downloads.time, "sleep", stopped)
    with pytest.raises(KeyboardInterrupt):
        load("cifar10", tmp_path)
    monkeypatch.setattr(_downloads.time, "sleep", full)
    assert load("cifar10", tmp_path).train_labels.tolist() == [0, 2, 1]
    assert (tmp_path / "downloads").read_text() == "once\n" * 2
    assert load("cifar10", tmp_path).test_labels.tolist() == [1, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar-10-batches-py", "downloads"]


def test_a_download_that_got_nothing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _downloads.without_network(monkeypatch.setattr)

    def refused(self: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(_downloads.CIFAR10, "download", refused)
    with pytest.raises(ValueError, match="could not be downloaded: no network"):
        load("cifar10", tmp_path)
    assert not list(tmp_path.glob(".*"))
