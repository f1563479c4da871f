"""The page of several runs: who belongs together, every number against its definition, no run touched."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from fastproto.train import compare
from fastproto.train.checkpoint import start_folder
from fastproto.train.clock import PHASES
from fastproto.train.compare import grouped, read_summary, write_comparison
from fastproto.train.config import Config, EvaluationConfig, OptimizerConfig
from fastproto.train.files import write_log

NAN = math.nan


def make_run(folder: Path, config: Config, score: float, *, done: int | None = None, knn: bool = False) -> Path:
    """A run as training leaves it, without networks: accuracies around ``score``, two steps of 16 images an epoch."""
    start_folder(folder, config)
    log = []
    for epoch in range(1, (config.epochs if done is None else done) + 1):
        times = {"views": 0.5, "forward": 1.0, "loss": 0.02 * epoch, "backward": 2.0}
        busy = sum(times.values())
        row = {"epoch": epoch, "loss": score + 1 / epoch, "images_per_s": 32 / busy, "data_wait": 0.5 / busy}
        row |= {f"time/{phase}": times.get(phase, 3.0) for phase in PHASES} | {"effective_rank": 2.0 * epoch}
        if knn and epoch % 2 == 0:
            row |= {"knn20": score + 0.1 / epoch, "knn200": score}
        log.append(row)
    write_log(folder, log)
    if done is None:
        result = {
            "before": {"knn20": 0.1, "knn200": 0.1, "linear": 0.2},
            "after": {"knn20": score, "knn200": score - 0.05, "linear": score + 0.1},
            "time_s": dict.fromkeys(PHASES, 90.0),
        }
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def config() -> Config:
    return Config(method="pcl", crop="random", epochs=4, batch_size=16)


@pytest.fixture
def folders(tmp_path: Path, config: Config) -> list[Path]:
    """Three seeds of one setting, one with another learning rate, one that has not ended."""
    slower = replace(config, optimizer=OptimizerConfig(lr=0.01), device="cpu")
    return [
        make_run(tmp_path / "b2", replace(config, seed=2), 0.6, knn=True),
        make_run(tmp_path / "slow", slower, 0.5),
        make_run(tmp_path / "b0", config, 0.7, knn=True),
        make_run(tmp_path / "b1", replace(config, seed=1, device="cpu", evaluation=EvaluationConfig(2)), 0.5, knn=True),
        make_run(tmp_path / "<half>", replace(config, method="simclr", data="imagefolder:/x/birds"), 0.4, done=3),
    ]


def cells(html: str) -> dict[str, list[str]]:
    """The cells of every row by its first."""
    found = {}
    for row in re.findall(r"<tr.*?</tr>", html):
        texts = re.findall(r"<t[hd].*?</t[hd]>", row)
        name, *rest = [re.sub(r"<small>[^±]*?</small>|<.*?>", "", text) for text in texts]
        found[name] = rest
    return found


def card(html: str, title: str) -> str:
    return html.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


def test_runs_that_differ_in_the_seed_belong_together(folders: list[Path]) -> None:
    runs = grouped([read_summary(folder) for folder in folders])
    assert [(run.name, run.group) for run in runs] == [("b0", 0), ("b1", 0), ("b2", 0), ("slow", 1), ("<half>", 2)]


def test_the_table_of_accuracies(tmp_path: Path, folders: list[Path]) -> None:
    html = write_comparison(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    table = cells(card(html, "Accuracy"))
    assert list(table) == ["", "b0", "b1", "b2", "mean ± sd of 3", "slow", "&lt;half&gt;"]
    assert table["b1"][:5] == ["PCL", "random", "digits", "1", "4"]
    assert table["b1"][5:] == ["10.0", "50.0", "55.0", "10.0", "45.0", "50.0", "20.0", "60.0"]
    assert table["slow"][5:] == ["10.0", "50.0", "", "10.0", "45.0", "", "20.0", "60.0"]
    assert table["&lt;half&gt;"] == ["SimCLR", "random", "birds", "0", "3 of 4", *[""] * 8]
    deviation = statistics.stdev([50, 60, 70])
    mean = table["mean ± sd of 3"]
    assert mean[5:7] == ["10.0± 0.0", f"60.0± {deviation:.1f}"]
    assert mean[11:] == ["20.0± 0.0", f"70.0± {deviation:.1f}"]
    # What tells two settings apart is said beneath the name; seed and device do not.
    assert re.findall(r"<small>([^±]*?)</small>", card(html, "Accuracy")) == ["optimizer.lr 0.06"] * 3 + [
        "optimizer.lr 0.01",
        "optimizer.lr 0.06",
    ]


def test_the_table_of_costs(tmp_path: Path, folders: list[Path]) -> None:
    html = write_comparison(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    table = cells(card(html, "Cost"))
    assert not re.search(r"<small>[^±]", card(html, "Cost"))
    assert table[""] == [column.title for column in compare.COSTS]
    # Two steps an epoch; the loss took 20, 40, 60, 80 ms, of which the median is 50.
    wait = statistics.median([0.5 / (3.5 + 0.02 * epoch) for epoch in (1, 2, 3, 4)])
    speed = statistics.median([32 / (3.5 + 0.02 * epoch) for epoch in (1, 2, 3, 4)])
    assert table["b0"] == ["9.0", "1.50", "25.0", "250.0", f"{speed:.0f}", f"{100 * wait:.1f}"]
    # One that has not ended: three epochs of 3.5 + 0.02 e + 2 x 3 seconds.
    assert table["&lt;half&gt;"][:3] == [f"{(3 * 9.5 + 0.12) / 60:.1f}", f"{9 / 60:.2f}", "20.0"]


def test_curves_lie_over_one_another(tmp_path: Path, folders: list[Path]) -> None:
    html = card(write_comparison(folders, tmp_path / "page.html").read_text(encoding="utf-8"), "Curves")
    assert re.findall(r"<figcaption>(.*?)</figcaption>", html) == [
        "loss",
        "kNN, k = 20",
        "kNN, k = 200",
        "effective rank",
        "images per second",
    ]
    legend = re.findall(r'<li><i class="(c\d)"></i>(.*?)</li>', html)
    assert legend == [
        ("c0", "PCL · random, optimizer.lr 0.06"),
        ("c1", "PCL · random, optimizer.lr 0.01"),
        ("c2", "SimCLR · random, optimizer.lr 0.06"),
    ]
    loss, knn = html.split("</figure>")[:2]
    assert re.findall(r'<g class="(c\d)"><path', loss) == ["c0", "c0", "c0", "c1", "c2"]
    told = re.findall(r"<title>(.*?)</title>", loss, re.DOTALL)
    assert told[0] == "epoch 1\nb0: 1.7\nb1: 1.5\nb2: 1.6\nslow: 1.5\n&lt;half&gt;: 1.4"
    assert told[3] == "epoch 4\nb0: 0.95\nb1: 0.75\nb2: 0.85\nslow: 0.75"
    # Asked for in every second epoch, drawn as one line.
    assert re.findall(r"<title>(.*?)</title>", knn, re.DOTALL)[0] == "epoch 2\nb0: 0.75\nb1: 0.55\nb2: 0.65"
    assert knn.count('class="line"') == 3


def test_runs_alike_have_no_small_print_and_one_run_no_mean(tmp_path: Path, config: Config) -> None:
    runs = [make_run(tmp_path / str(seed), replace(config, seed=seed), 0.5) for seed in (0, 1)]
    html = write_comparison(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"<small>[^±]", html)
    assert "2 runs <span>of 1 setting<" in html
    assert "best" not in cells(card(html, "Accuracy"))[""]
    html = write_comparison(runs[:1], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "1 run <span>of 1 setting<" in html
    assert "±" not in html


def test_folders_of_one_name_are_told_apart(tmp_path: Path, config: Config) -> None:
    runs = [make_run(tmp_path / place / "run", replace(config, method=place), 0.5) for place in ("byol", "moco")]  # type: ignore[arg-type]
    html = write_comparison(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert list(cells(card(html, "Cost"))) == ["", *map(str, runs)]


def test_a_run_that_has_just_begun(tmp_path: Path, config: Config) -> None:
    folder = make_run(tmp_path / "new", config, 0.5, done=0)
    html = write_comparison([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h2>" not in html
    assert "nan" not in html


def test_the_page_stands_alone_and_replaces_only_its_like(tmp_path: Path, folders: list[Path]) -> None:
    path = tmp_path / "page.html"
    before = {file: file.read_bytes() for folder in folders for file in folder.iterdir()}
    first = write_comparison(folders, path).read_bytes()
    assert write_comparison(folders, tmp_path / "new" / "folder" / "page.html").read_bytes() == first
    assert write_comparison(folders, path).read_bytes() == first
    assert before == {file: file.read_bytes() for folder in folders for file in folder.iterdir()}
    assert not re.search(rb"url\(|@import|https?:|<script|<link|\$|<half>", first)
    for other in (tmp_path / "mine.html", tmp_path):
        if other != tmp_path:
            other.write_text("<!doctype html>my page")
        with pytest.raises(ValueError, match=rf"report: --out expected a new file, or an earlier page, got {other}"):
            write_comparison(folders, other)
    assert (tmp_path / "mine.html").read_text() == "<!doctype html>my page"
    with pytest.raises(ValueError, match="report: folder expected one that holds a run"):
        write_comparison([*folders, tmp_path / "nowhere"], path)
    with pytest.raises(ValueError, match="report: runs expected at least one, got none"):
        write_comparison([], path)
