"""The command: bad input in one line with nothing written, a whole run, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastproto
from fastproto import cli
from fastproto.train import build, loop, report
from fastproto.train.build import load_data
from fastproto.train.data import dataset
from fastproto.train.files import read_log
from fastproto.train.run import load_run

TINY = """
data: {data}
epochs: {epochs}
batch_size: 8
image_size: 16
device: cpu
encoder: {{name: resnet-tiny, width: 8}}
head: {{hidden: 16, dim: 8}}
views: {{size: 16, box_warmup: 1, box_interval: 1}}
prototypes: {{num: [3], warmup: 1, n_iter: 2}}
target: {{queue: 16}}
optimizer: {{lr: 0.05, warmup: 0.5}}
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 20 training and 6 test images of two classes."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 3)):
        for label, bright in (("dark", 0), ("light", 120)):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 120, (18, 20, 3)) + bright
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "images"


def recipe(folder: Path, images: Path, epochs: int = 2) -> str:
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(data=f"imagefolder:{images}", epochs=epochs))
    return str(path)


def test_a_run_from_the_command_line(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, loaded = tmp_path / "run", []
    monkeypatch.setattr(build, "load_data", lambda config: loaded.append(load_data(config)) or loaded[-1])
    assert cli.main(["train", recipe(tmp_path, images), "--out", str(run), "--crop", "contrastive", "--seed", "5"]) == 0
    # Once: the report is of the data that was trained on.
    assert len(loaded) == 1
    out = capsys.readouterr().out.splitlines()
    result = json.loads((run / "result.json").read_text())
    table = {line[:16].strip(): line[16:].split() for line in out}
    assert table[""] == ["before", "after", "of", "2", "epochs"]
    for name, metric in (("kNN, k = 20", "knn20"), ("kNN, k = 200", "knn200"), ("linear probe", "linear")):
        assert table[name] == [f"{100 * result[when][metric]:.1f}%" for when in ("before", "after")]
    assert out[-1].endswith(str(run / "report.html"))
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml",
        "log.csv",
        "result.json",
        "report.html",
        "checkpoints",
    }
    config = load_run(run).config
    assert (config.seed, config.crop, config.epochs, config.optimizer.lr) == (5, "contrastive", 2, 0.05)

    for chosen, lines in ((["--knn"], 2), (["--linear"], 1), (["--knn", "--linear"], 3), ([], 3)):
        assert cli.main(["eval", str(run), *chosen]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == lines
        assert all(line.split()[-1] == table[line[:16].strip()][1] for line in printed)

    (run / "report.html").unlink()
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").stat().st_size > 1000

    # A run is neither resumed otherwise nor written over unasked, and what lies beside it stays.
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = ["train", recipe(tmp_path, images), "--out", str(run), "--crop", "contrastive"]
    for more, message in (
        ([], "which holds a run: go on with --resume or start anew with --overwrite"),
        (["--resume"], "--resume expected the configuration of the run, got another: seed 5, now 0"),
    ):
        assert cli.main([*again, *more]) == 2
        assert one_line(capsys).endswith(message)
    assert cli.main(["train", "--out", str(run), "--resume", "--epochs", "3"]) == 2
    assert one_line(capsys).endswith("got another: epochs 2, now 3")
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    (run / "notes.txt").write_text("mine")
    assert cli.main([*again, "--overwrite", "--epochs", "1"]) == 0
    assert len(read_log(run)) == 1
    assert (run / "notes.txt").read_text() == "mine"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.rstrip("\n")


def test_what_a_killed_run_left_is_no_run_and_a_link_to_nothing_no_folder(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    assert cli.main(["train", recipe(tmp_path, images), "--out", str(link)]) == 2
    assert one_line(capsys).endswith(f"--out expected a new or empty folder, got {link}, which holds something else")
    run.mkdir()
    (run / ".config.yaml.0123abcd.part").write_text("epochs")
    assert cli.main(["train", recipe(tmp_path, images), "--out", str(run), "--epochs", "1"]) == 0
    assert not list(run.glob(".*"))


def test_a_report_that_cannot_be_written_is_one_line(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr(report, "write_report", full)
    run = tmp_path / "run"
    assert cli.main(["train", recipe(tmp_path, images), "--out", str(run), "--epochs", "1"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastproto train: [Errno 28] No space left on device: 'report.html'; trained, but not ")
    assert error.endswith(f"fastproto report {run}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--out", "OUT", "--method", "dino"],
            'fastproto train: "method": Expected one of .* Got value: dino',
        ),
        (
            ["train", "--out", "OUT", "--crop", "middle"],
            'fastproto train: "crop": Expected one of .* Got value: middle',
        ),
        (
            ["train", "--out", "OUT", "--data", "mnist"],
            "load: name expected digits, cifar10, cifar100, stl10, tiny-imagenet, imagenet, imagefolder:PATH or",
        ),
        (["train", "--out", "OUT", "--data", "imagefolder:NOWHERE"], "expected a folder, got NOWHERE, which is not"),
        (["train", "--out", "OUT", "--data", "imagenet"], "imagenet expected data/train/WNID/.*, got no folder"),
        (["train", "--out", "OUT", "--workers", "-1"], "config: workers expected a number >= 0, got int -1"),
        (["train", "--out", "OUT", "--epochs", "few"], '"epochs": Expected int. Got value: few'),
        (["train", "--out", "OUT", "--prototypes.num", "9"], '"prototypes.num": Expected a list, .*Got value: 9'),
        (["train", "--out", "OUT", "--batch_size", "5000"], "batch_size expected at most the 1437 training images"),
        (["train", "--out", "OUT", "--prototypes.num", "[5000]"], "prototypes.num expected at most the 1437 "),
        (["train", "--out", "OUT", "--views.scale", "[2, 1]"], "ContrastiveCrop: scale expected"),
        (["train", "--out", "OUT", "--optimiser.lr", "1"], "unrecognized arguments: --optimiser.lr"),
        (["train", "--out", "OUT", "--resume"], "folder expected one that holds a run, got OUT"),
        (["train", "--out", "OUT", "nowhere.yaml"], "recipe: expected a YAML file or one of .*, got 'nowhere.yaml'"),
        (["train", "--out", "FULL"], "^fastproto train: --out expected a new .* folder, got FULL, which holds"),
        (["train", "--out", "FULL", "--overwrite"], "got FULL, which holds something else"),
        (["train", "--out", "FULL", "--resume"], "folder expected one that holds a run, got FULL"),
        (["train"], "--out is missing: the folder of the run"),
        (["eval", "OUT"], "fastproto eval: run: folder expected one that holds a run, got OUT"),
        (["eval"], "fastproto eval: the following arguments are required: run"),
        (["report", "FULL"], "fastproto report: run: folder expected one that holds a run, got FULL"),
        (["info", "--loud"], "fastproto info: unrecognized arguments: --loud"),
        (["dance"], "fastproto: command expected one of train, eval, report, .*cluster, views, info, got 'dance'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FULL").mkdir()
    Path("FULL/notes.txt").write_text("mine")
    assert cli.main(arguments) == 2
    line = one_line(capsys)
    assert re.search(message, line), line
    assert sorted(path.as_posix() for path in Path().rglob("*")) == ["FULL", "FULL/notes.txt"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("seed: 1\nepochs:\n", "config: epochs expected a value, got null"),
        ("precision: null\n", "config: precision expected a value, got null"),
        ("optimizer: {lr: null}\n", "optimizer: lr expected a value, got null"),
        ("prototypes: {num: null}\n", "prototypes: num expected a value, got null"),
        ("method: null\n", "config: method expected a value, got null"),
        ("out: elsewhere\n", "out"),
        ("overwrite: true\n", "overwrite"),
        ("resume: true\n", "resume"),
    ],
)
def test_a_recipe_holds_settings_and_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, message: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert cli.main(["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_a_recipe_with_an_unknown_key_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("optimizer: {learning_rate: 3}\n")
    assert cli.main(["train", str(path), "--out", str(tmp_path / "run")]) == 2
    line = one_line(capsys)
    assert "recipe.yaml" in line
    assert "'learning_rate'" in line
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_utf_8_is_named(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("# réglages\nmethod: simclr\n".encode("latin-1"))
    out = ["--out", str(tmp_path / "run")]
    assert cli.main(["train", str(latin), *out]) == 2
    assert f"{latin}: expected YAML in UTF-8" in one_line(capsys)
    assert cli.main(["train", recipe(tmp_path, images), "--class_list", str(latin), *out]) == 2
    assert f"class_list expected text in UTF-8, got {latin}" in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_strict_refuses_an_image_that_does_not_decode(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "train" / "light" / "3.png").write_bytes(b"no image")
    arguments = ["train", recipe(tmp_path, images), "--strict", "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 2
    assert "train/light/3.png" in one_line(capsys)
    assert not (tmp_path / "run").exists()
    # Of many files some are decoded only on the way.
    monkeypatch.setattr(dataset, "SAMPLED", 5)
    assert cli.main([*arguments, "--resident", "false", "--workers", "0"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("fastproto train: data: expected images that decode, got ")
    assert "train/light/3.png" in captured.err
    again = f"fastproto train --out {shlex.quote(arguments[-1])} --resume"
    assert captured.err.endswith(f"; mend or remove it, then go on with: {again}\n")


def test_processes_share_a_run_on_files_of_which_one_is_broken(tmp_path: Path, images: Path) -> None:
    (images / "train" / "light" / "3.png").write_bytes(b"no image")
    run = tmp_path / "run"
    arguments = ["train", recipe(tmp_path, images), "--method", "spcl", "--devices", "2", "--resident", "false"]
    done = subprocess.run(
        [sys.executable, "-m", "fastproto", *arguments, "--out", str(run)],
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    # One of the two speaks, and both have the same prototypes.
    assert done.stdout.count("linear probe") == done.stdout.count("settings of") == 1
    assert "train/light/3.png: expected an image" in done.stderr
    assert [(row["epoch"], row["skipped"]) for row in read_log(run)] == [(1, 1), (2, 1)]
    loaded = load_run(run)
    assert loaded.config.devices == 2
    assert loaded.assignments[0].unique().tolist() == [0, 1, 2]
    assert loaded.method.encoder.trunk[1].num_batches_tracked == 8


def assert_says_how_to_go_on(error: str, folder: Path) -> None:
    *epochs, last = error.splitlines()
    assert last == f"fastproto train: interrupted; go on with: fastproto train --out {folder} --resume"
    assert all(line.startswith("epoch ") for line in epochs)


def test_ctrl_c_reaches_the_workers_too(tmp_path: Path, images: Path) -> None:
    folder = tmp_path / "stopped"
    arguments = ["train", recipe(tmp_path, images, epochs=1000), "--method", "simclr", "--out", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastproto", *arguments, "--resident", "false", "--workers", "2"],
        stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not (folder / "log.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert_says_how_to_go_on(error, folder)


def test_a_diverging_run_says_so(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", recipe(tmp_path, images), "--out", str(tmp_path / "run"), "--loss.contrast_weight", "1e39"]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("fastproto train: diverged in epoch 1: loss nan, loss/contrast nan; ")
    assert error.endswith("; try a smaller --optimizer.lr\n")


def test_ctrl_c_leaves_a_run_that_goes_on_with_the_same_bits(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", recipe(tmp_path, images, epochs=12), "--method", "pauc", "--out"]
    folder = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastproto", *arguments, str(folder)], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (folder / "log.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert_says_how_to_go_on(error, folder)
    assert not (folder / "result.json").exists()

    assert cli.main(["train", "--out", str(folder), "--resume"]) == 0
    assert cli.main([*arguments, str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    resumed, whole = (load_run(tmp_path / name).method.state_dict() for name in ("stopped", "whole"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [[row["loss"] for row in read_log(tmp_path / name)] for name in ("stopped", "whole")]
    assert losses[0] == losses[1]


def test_being_told_to_terminate_leaves_a_run_that_goes_on(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = loop.evaluate

    def terminated(*args: object, **options: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "evaluate", terminated)
    assert cli.main(["train", recipe(tmp_path, images), "--out", str(tmp_path / "run")]) == 143
    assert capsys.readouterr().err.endswith(f"go on with: fastproto train --out {tmp_path / 'run'} --resume\n")
    monkeypatch.undo()
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 0


def test_a_second_signal_ends_at_once(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate_forever(*args: object, **options: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on after two signals")

    monkeypatch.setattr(loop, "evaluate", evaluate_forever)
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["train", recipe(tmp_path, images), "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err.endswith(f"go on with: fastproto train --out {tmp_path / 'run'} --resume\n")
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 0


def test_ctrl_c_before_the_run_begins(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "prepare", interrupted)
    assert cli.main(["train", "--out", "nowhere"]) == 130
    assert one_line(capsys) == "fastproto train: interrupted"


def test_waiting_threads_soon_sleep_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for policy, before, after in ((None, None, "2000"), (None, "7", "7"), ("ACTIVE", None, None)):
        for name, value in (("OMP_WAIT_POLICY", policy), ("GOMP_SPINCOUNT", before)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        cli.main(["--help"])
        assert os.environ.get("GOMP_SPINCOUNT") == after
    # It is read when torch is loaded, which must not be before.
    code = "import sys, fastproto.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert "fastproto report RUN" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{fastproto.__version__}\n"
    assert cli.main([]) == 2
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "--optimizer.weight_decay" in out
    assert "the highest learning rate" in out


def test_info_names_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert "reference" in capsys.readouterr().out


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    for name in [name for name in sys.modules if name.startswith("fastproto.train")]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["train", "--out", "nowhere"]) == 1
    line = one_line(capsys)
    assert "jsonargparse" in line
    assert 'pip install ".[train]" in the folder of fastproto\'s source' in line


@pytest.mark.parametrize("command", [["info"], ["--help"], ["--version"]])
def test_a_reader_that_has_gone_ends_a_command_quietly(command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fastproto", *command]
    with open(writing, "w") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")
