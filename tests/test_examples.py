"""The scripts in examples/ run, at a fraction of their size, and learn."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import lightly.loss
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shrink(monkeypatch: pytest.MonkeyPatch, example: ModuleType, **sizes: object) -> None:
    for name, size in sizes.items():
        monkeypatch.setattr(example, name, size)


def test_lightly_simclr_is_what_it_is_with_lightly_s_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("lightly_simclr")
    shrink(monkeypatch, example, IMAGES=16, SIDE=16, EPOCHS=1, BATCH=8, WORKERS=0)
    ours = example.main()
    monkeypatch.setattr(example, "NTXentLoss", lightly.loss.NTXentLoss)
    theirs = example.main()
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_plain_loop_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("plain_loop")
    shrink(monkeypatch, example, IMAGES=128, EPOCHS=4, BATCH=64, PROTOTYPES=(5, 9))
    losses = example.main()
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.filterwarnings("ignore")  # Lightning's own, of its dependencies and of the number of workers
def test_lightning_proto_nce_learns_on_two_processes_as_on_one() -> None:
    """In batches of all images, which two processes share, so that both runs take the same steps."""
    options = ["--accelerator", "cpu", "--epochs", "4", "--images", "128", "--batch-size", "128"]
    one = load("lightning_proto_nce").main(options)
    assert len(one) == 4
    assert one[-1] < one[0] - 0.2
    command = [sys.executable, str(EXAMPLES / "lightning_proto_nce.py"), "--devices", "2", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    two = [float(loss) for loss in re.findall(r"^epoch \d: loss (\S+)$", done.stdout, re.MULTILINE)]
    assert two == pytest.approx(one, rel=1e-4)
