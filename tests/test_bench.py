"""The results that are published: they load by the schema, and the README shows what they say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import harness
import pytest
import report
from harness import Suite, Work


def test_results_load_and_stand_in_the_readme() -> None:
    rows = report.load()
    assert rows
    assert report.markdown(report.whole(rows)) in report.README.read_text()
    assert f"{report.runs_markdown()} {report.overheads_markdown(rows)}" in report.README.read_text()


def test_what_methods_add_to_an_epoch_stands_in_a_sentence() -> None:
    of = {"work": report.EPOCH, "shape": "9 x 3"}
    rows = [row("x 2 threads avx2", name, ms, ours_is_faster=ms, **of) for name, ms in (("moco", 1), ("pcl", 1.25))]
    assert report.overheads_markdown(rows) == "Beside an epoch of MoCo (9 x 3, x 2 threads avx2): pcl +25.00%."
    assert report.whole(rows) == []


def row(device: str, method: str, ms: float, **options: object) -> dict:
    made = {"suite": "s", "work": "w", "shape": "2 x 3", "dtype": "float32", "torch": "2", "commit": "abc"}
    return {**made, "device": device, "method": method, "median_ms": ms, "peak_extra_mib": ms, **options}


def test_machines_stand_beside_each_other_with_their_best_peer() -> None:
    fast, slow = "x 2 threads avx512", "x 2 threads avx2"
    rows = [row(fast, "fastproto", 2), row(fast, "a", 5), row(fast, "b", 3)]
    rows += [row(slow, "fastproto", 4), row(slow, "a", 8), row(slow, "fastproto", 1, work="ours beside ours")]
    gpu = [row("G1", "fastproto", 1, commit="def"), row("G1", "a", 9, commit="def")]
    table, *others = report.markdown(rows + gpu).split("\n\n| work")
    assert f"| work | beside | {fast} | {slow} | extra memory: ours, other |" in table
    assert "| w, 2 x 3, float32 | b | 2.00 ms, 1.5× | 4.00 ms, 2.0× a | 4, 8 MiB |" in table
    assert "ours beside ours" not in table
    assert f"Measured with torch 2 on {fast}: commit abc (s); {slow}: commit abc (s)." in table
    assert len(others) == 1 and "1.00 ms, 9.0×" in others[0]
    assert report.whole([*rows, row(fast, "a", 1, work=report.PARTS[0])]) == rows


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Measures no ceilings, and writes where nobody looks."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "_measured", {("cpu", "bandwidth"): 1.0, ("cpu", "flops"): 1.0})
    return Suite("made")


def written(folder: Path) -> dict[str, list[str]]:
    """The methods in each result file."""
    files = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/made.json")}
    return {name: [row["method"] for row in content["rows"]] for name, content in files.items()}


def test_a_peer_that_fails_costs_its_own_figure(suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def fails() -> None:
        raise RuntimeError("out of memory\nat some length")

    work = Work("w", "1", "float32", "cpu")
    suite.compare(work, {"fastproto": int, "fails": fails, "other": int}, seconds=0)
    ((_, methods),) = written(tmp_path).items()
    assert methods == ["fastproto", "other"]
    assert "fails                       is left out: RuntimeError: out of memory\n" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="out of memory"):
        suite.compare(work, {"fastproto": fails, "other": int}, seconds=0)


def test_a_peer_that_cannot_be_imported_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "of_another_torch.py").write_text("raise RuntimeError('an API that changed')")
    monkeypatch.syspath_prepend(tmp_path)
    assert harness.peer("not_installed_here", "x") is None
    assert capsys.readouterr().out == ""
    assert harness.peer("of_another_torch", "x") is None
    assert "of_another_torch is left out: RuntimeError: an API that changed" in capsys.readouterr().out
    assert harness.peer("json", "dumps") is json.dumps


def test_rows_of_two_devices_are_two_files(suite: Suite, tmp_path: Path) -> None:
    suite.compare(Work("w", "1", "float32", "cpu"), {"fastproto": int}, seconds=0)
    suite.rows.append(replace(suite.rows[0], device="NVIDIA H200", method="there"))
    assert tmp_path / "nvidia-h200" / "made.json" in suite.write()
    (here,) = set(written(tmp_path)) - {"nvidia-h200"}
    assert written(tmp_path) == {here: ["fastproto"], "nvidia-h200": ["there"]}


def test_a_part_of_a_suite_takes_the_place_of_no_other_work(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in ("first", "second"):
        suite.compare(Work(work, "1", "float32", "cpu"), {"fastproto": int}, seconds=0)
    (file,) = suite.write()
    whole = json.loads(file.read_text())
    suite.rows = []
    suite.compare(Work("second", "1", "float32", "cpu"), {"fastproto": int}, seconds=0)
    # At the same commit the rest stays.
    again = json.loads(file.read_text())
    assert again["rows"][0] == whole["rows"][0]
    assert [row["work"] for row in again["rows"]] == ["first", "second"]
    monkeypatch.setattr(harness, "commit", lambda: "a later one")
    (part,) = suite.write()
    assert part.name == "made.part.json"
    assert json.loads(file.read_text()) == again
    # Part after part, in sessions of their own.
    suite.rows = []
    suite.compare(Work("first", "1", "float32", "cpu"), {"fastproto": int}, seconds=0)
    found = json.loads(file.read_text())
    assert (found["commit"], [row["work"] for row in found["rows"]]) == ("a later one", ["second", "first"])
    assert not part.exists()


def test_the_commit_is_known_with_git_or_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.delenv("FASTPROTO_COMMIT", raising=False)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    assert harness.commit() == "unknown"
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: (_ for _ in ()).throw(FileNotFoundError))
    assert harness.commit() == "unknown"
    monkeypatch.setenv("FASTPROTO_COMMIT", "abc1234")
    assert harness.commit() == "abc1234"
    assert capfd.readouterr() == ("", "")


def test_runs_are_trained_in_slices_and_averaged_over_seeds(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    import table as runs_table

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    small = ["--limit", "32", "--batch_size", "16", "--epochs", "2", "--device", "cpu", "--encoder.name", "resnet-tiny"]
    small += ["--encoder.width", "8", "--head.hidden", "8", "--views.size", "16", "--methods", "simclr", "pcl"]
    small += ["--prototypes.num", "[3]", "--prototypes.warmup", "1", "--target.queue", "16"]
    command = ["table.py", "digits", "--out", str(tmp_path / "runs"), "--crops", "random", "--seeds", "0", "1", *small]
    for minutes in (0.0, 9.0, 9.0):
        monkeypatch.setattr(sys, "argv", [*command, "--minutes", str(minutes)])
        runs_table.main()
    (path,) = tmp_path.glob("*/runs/digits.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [("simclr", 0), ("pcl", 0), ("simclr", 1), ("pcl", 1)]
    values = [100 * row["after/knn20"] for row in rows if row["method"] == "pcl"]
    mean, deviation = sum(values) / 2, abs(values[0] - values[1]) / math.sqrt(2)
    table = report.runs_markdown()
    assert f"| pcl | 2 | {mean:.1f} ± {deviation:.1f} |" in table
    assert "resnet-tiny of width 8 at 16²" in table
    memory = json.loads(path.read_text())["loss_mib"]
    assert list(memory) == ["simclr", "pcl"] and f" | {memory['pcl']:.0f} MiB | " in table
    monkeypatch.setattr(sys, "argv", [*command, "--optimizer.lr", "0.5"])
    with pytest.raises(SystemExit):
        runs_table.main()


def test_rows_of_another_schema_are_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "cpu").mkdir()
    file = tmp_path / "cpu" / "op.json"
    file.write_text('{"schema": 2, "rows": []}')
    with pytest.raises(ValueError, match="schema expected 1, got 2"):
        report.load()
    file.write_text('{"schema": 1, "rows": [{"work": "x"}]}')
    with pytest.raises(ValueError, match="keys differ from the schema"):
        report.load()
