"""fastproto eval and fastproto report of several runs: what is printed, what is kept, what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastproto import cli
from fastproto.train import checkpoint, data, evaluate, loop, report
from fastproto.train.config import Config, EvaluationConfig
from fastproto.train.data import Dataset
from fastproto.train.probes import LEARNING_RATES, linear_sgd
from fastproto.train.run import load_run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_config: Config, tiny_data: Dataset) -> Path:
    monkeypatch.setattr(data, "load", lambda *args, **options: tiny_data)
    monkeypatch.setattr(evaluate, "linear_sgd", partial(linear_sgd, steps=20))
    loop.train(tiny_config, tiny_data, tmp_path / "run")
    return tmp_path / "run"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    assert cli.main(["eval", *arguments]) == 0
    return {line[:16].strip(): line[16:].strip() for line in capsys.readouterr().out.splitlines()}


def kept(run: Path) -> dict:
    return json.loads((run / "evaluation.json").read_text())


def test_accuracies_are_kept_beside_those_before(
    run: Path, tiny_data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    after = json.loads((run / "result.json").read_text())["after"]
    lines = printed(capsys, str(run), "--knn")
    assert list(lines) == ["kNN, k = 20", "kNN, k = 200"]
    assert lines["kNN, k = 20"] == f"{100 * after['knn20']:.1f}%"
    assert kept(run) == {"epoch-0002": {"labels 1": {name: after[name] for name in ("knn20", "knn200")}}}
    assert list(printed(capsys, str(run), "--linear")) == ["linear probe"]
    assert kept(run) == {"epoch-0002": {"labels 1": after}}

    lines = printed(capsys, str(run), "--linear-sgd", "--labels", "0.2")
    encoder = load_run(run).method.encoder
    expected = evaluate.evaluate(encoder, tiny_data, metrics=("linear_sgd",), labels=0.2)
    assert kept(run) == {"epoch-0002": {"labels 1": after, "labels 0.2": expected}}
    assert list(lines) == ["linear, SGD", *(f"lr {rate:g}" for rate in LEARNING_RATES)]
    assert list(lines.values()) == [f"{100 * accuracy:.1f}%" for accuracy in expected.values()]
    assert lines["linear, SGD"] == f"{100 * max(expected.values()):.1f}%"

    # Another checkpoint has its own scores, whoever made it.
    (run / "checkpoints" / "epoch-0002.pt").rename(run.parent / "old.pt")
    for path, key in ((run / "checkpoints" / "epoch-0001.pt", "epoch-0001"), (run.parent / "old.pt", None)):
        before = kept(run)
        found = printed(capsys, str(run), "--checkpoint", str(path))
        assert list(found) == ["kNN, k = 20", "kNN, k = 200", "linear probe"]
        scores = kept(run)[key or str(path)]["labels 1"]
        assert kept(run) == before | {key or str(path): {"labels 1": scores}}
        assert [f"{100 * score:.1f}%" for score in scores.values()] == list(found.values())
    assert scores == after


def test_what_eval_refuses_it_refuses_before_it_measures(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*args: object, **options: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(evaluate, "evaluate", measured)
    (run / "damaged.pt").write_bytes(b"no checkpoint")
    known = f"{run}/checkpoints/epoch-0001.pt, {run}/checkpoints/epoch-0002.pt"
    for arguments, message in (
        (["--labels", "0"], "fastproto eval: --labels expected a share above 0, at most 1, got float 0.0"),
        (["--labels", "1.5"], "fastproto eval: --labels expected a share above 0, at most 1, got float 1.5"),
        (["--labels", "few"], "argument --labels: invalid float value: 'few'"),
        (["--checkpoint", "nope"], f"checkpoint expected a file, such as {known}, got nope, which is not one"),
        (["--checkpoint", str(run)], f"checkpoint expected a file, such as {known}, got {run}, which is not one"),
        (["--checkpoint", str(run / "damaged.pt")], f"checkpoint: {run / 'damaged.pt'} is damaged"),
    ):
        assert cli.main(["eval", str(run), *arguments]) == 2
        assert message in one_line(capsys)
    assert cli.main(["eval", str(run.parent), "--checkpoint", str(run / "damaged.pt")]) == 2
    assert f"run: folder expected one that holds a run, got {run.parent}" in one_line(capsys)
    for text, message in (
        ("{", "evaluation.json expected JSON, got"),
        ("[]", "evaluation.json expected accuracies by checkpoint and share of the labels, got list"),
        ('{"epoch-0002": 3}', "accuracies by checkpoint and share of the labels, got something else"),
        ('{"epoch-0002": {"labels 1": {"knn20": null}}}', "labels, got something else"),
    ):
        (run / "evaluation.json").write_text(text)
        assert cli.main(["eval", str(run)]) == 2
        assert message in one_line(capsys)
        assert (run / "evaluation.json").read_text() == text


def test_an_image_that_does_not_decode_on_the_way_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*args: object, **options: object) -> None:
        raise data.BrokenImage("data: expected images that decode, got test/a/1.png")

    monkeypatch.setattr(evaluate, "evaluate", measured)
    assert cli.main(["eval", str(run)]) == 2
    assert one_line(capsys) == "fastproto eval: data: expected images that decode, got test/a/1.png\n"
    assert not (run / "evaluation.json").exists()


def test_evaluations_beside_each_other_keep_each_other_s_results(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another ends while this one measures, and a checkpoint goes as a training writes new ones."""
    measure = evaluate.evaluate

    def slowly(*args: Any, **options: Any) -> dict[str, float]:
        monkeypatch.setattr(evaluate, "evaluate", measure)
        assert cli.main(["eval", str(run), "--linear"]) == 0
        (run / "checkpoints" / "epoch-0002.pt").unlink()
        return measure(*args, **options)

    monkeypatch.setattr(evaluate, "evaluate", slowly)
    printed(capsys, str(run), "--knn")
    after = json.loads((run / "result.json").read_text())["after"]
    assert kept(run) == {"epoch-0002": {"labels 1": after}}


def test_a_checkpoint_that_goes_gives_way_to_the_newest_there_is(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training writes new ones, and removes the old."""
    read, path = checkpoint.read_checkpoint, run / "checkpoints" / "epoch-0002.pt"

    def as_it_goes(asked: Path, *rest: Any) -> dict[str, Any]:
        if path.exists():
            path.rename(path.with_name("epoch-0003.pt"))
        return read(asked, *rest)

    monkeypatch.setattr(checkpoint, "read_checkpoint", as_it_goes)
    printed(capsys, str(run), "--knn")
    assert list(kept(run)) == ["epoch-0003"]


def test_a_damaged_file_is_named_by_the_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text, message in (
        ("result.json", '{"after": {', "expected JSON, got Expecting"),
        ("result.json", "[]", "expected the result of a training, got something else"),
        ("result.json", '{"after": {"knn20": "high"}}', "expected the result of a training, got something else"),
        ("log.csv", "epoch,loss\n1,2,3\n", "expected rows of numbers, got "),
        ("log.csv", "epoch,loss\n1,high\n", "expected rows of numbers, got could not convert"),
        ("log.csv", "epoch,loss\n1,\udcff\n", "expected rows of numbers, got 'utf-8' codec"),
    ):
        whole = (run / name).read_bytes()
        (run / name).write_text(text, errors="surrogateescape")
        for more in ([], ["--out", str(run.parent / "page.html")]):
            assert cli.main(["report", str(run), *more]) == 2
            assert one_line(capsys).startswith(f"fastproto report: run: {run / name} {message}")
        (run / name).write_bytes(whole)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_report_compares_where_there_are_several(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    assert cli.main(["report", str(run), str(run)]) == 0
    assert capsys.readouterr().out == "compare.html\n"
    assert "2 runs" in Path("compare.html").read_text()
    assert cli.main(["report", str(run), "--out", "one.html"]) == 0
    assert "1 run" in Path("one.html").read_text()
    assert not (run / "report.html").exists()
    Path("notes.txt").write_text("mine")
    capsys.readouterr()
    assert cli.main(["report", str(run), "--out", "notes.txt"]) == 2
    assert one_line(capsys).endswith("got notes.txt, which is something else\n")
    assert Path("notes.txt").read_text() == "mine"


def test_training_prints_the_best_on_the_way_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    best = {"knn20": {"accuracy": 0.75, "epoch": 1}}
    scores = {"knn20": 0.5, "linear": 0.25}
    result = {"before": scores, "after": scores, "best": best, "time_s": {"views": 1.0}}
    for interval in (1, 0):
        config = replace(tiny_config, evaluation=EvaluationConfig(interval))
        monkeypatch.setattr(cli, "prepare", lambda arguments, config=config: (config, None, tmp_path, False, None))
        monkeypatch.setattr(loop, "train", lambda *args, **options: result)
        monkeypatch.setattr(report, "write_report", lambda folder, dataset: folder)
        assert cli.main(["train"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[2] == "kNN, k = 20        50.0%   50.0%" + interval * "   75.0% after epoch 1"
        assert lines[3] == "linear probe       25.0%   25.0%"


def test_wandb_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(data, "load", lambda *args, **options: tiny_data)
    options = ["--method", "simclr", "--batch_size", "16", "--wandb", "true", "--out", str(tmp_path / "new")]
    assert cli.main(["train", *options]) == 1
    assert one_line(capsys).endswith("it comes with pip install wandb\n")
    assert not (tmp_path / "new").exists()
