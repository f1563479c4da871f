"""The report: each piece against what it was given, the whole page well-formed and self-contained, and a real run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from train._files import write_image

from fastproto.train import report
from fastproto.train.build import load_data
from fastproto.train.config import Config, EncoderConfig, PrototypeConfig
from fastproto.train.data import Dataset, Streamed
from fastproto.train.data.folders import FolderFiles
from fastproto.train.evaluate import add_evaluation, embed
from fastproto.train.loop import train
from fastproto.train.monitors import MONITORS
from fastproto.train.plots import data_url
from fastproto.views import ContrastiveCrop, sample_crops
from fastproto.views.files import read_image

NAN = math.nan
LOG = [
    {"epoch": 1.0, "lr": 0.1, "loss": 5.0, "loss/contrast": 5.0, "loss/prototype": NAN, "images_per_s": 900.0}
    | {"data_wait": 0.0, "time/views": 1.0, "time/forward": 2.0, "time/loss": 0.5},
    {"epoch": 2.0, "lr": 0.05, "loss": 6.5, "loss/contrast": 4.0, "loss/prototype": 2.5, "images_per_s": 950.0}
    | {"data_wait": 0.0, "time/views": 1.0, "time/forward": 3.0, "time/loss": 0.5},
]
RESULT = {
    "before": {"knn20": 0.25, "knn200": 0.2, "linear": 0.5},
    "after": {"knn20": 0.75, "knn200": 0.1, "linear": 0.9},
    "time_s": {"views": 4.0, "forward": 10.0, "loss": 2.0, "backward": 20.0, "clustering": 3.0, "evaluation": 1.0},
}


class FakeMethod(nn.Module):
    """An encoder of pixel means, clustered in another space than the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten()).eval()

    def embed(self, images: Tensor) -> Tensor:
        return self.encoder(images)[:, ::2]

    def cluster_space(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(features - features.mean(0), dim=1)


@pytest.fixture
def run(tmp_path: Path) -> SimpleNamespace:
    images = torch.randint(0, 256, (60, 3, 12, 16), dtype=torch.uint8)
    labels = torch.arange(60) % 3
    data = Dataset(
        "made", images[:40], labels[:40], images[40:], labels[40:], ("ant", "<bee>", "cat"), (0.4, 0.5, 0.6), (0.2,) * 3
    )
    low = torch.rand(40, 2) / 2
    return SimpleNamespace(
        path=tmp_path,
        config=Config(method="pcl", epochs=2, device="cpu", prototypes=PrototypeConfig(num=(6, 9))),
        dataset=data,
        method=FakeMethod().eval(),
        views=ContrastiveCrop((10, 8), augment="none", mean=data.mean, std=data.std, seed=3),
        boxes=torch.cat([low, low + 0.5], 1),
        prototypes=[torch.randn(6, 24), torch.randn(9, 24)],
        assignments=[torch.arange(40) % 6, torch.arange(40) % 9],
        log=LOG,
        result=RESULT,
    )


class Strict(HTMLParser):
    """Fails on tags that are not closed in order; remembers headings, tags and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_page_is_well_formed_complete_and_alone(run: SimpleNamespace) -> None:
    html = report.page(run)
    parsed = Strict(html)
    assert parsed.headings == ["Accuracy", "Time", "Embedding", "Training", "Views", "Prototypes", "Settings"]
    assert "<title>PCL on made</title>" in html
    assert "2 of 2 epochs" in html
    assert "$" not in html
    assert "<bee>" not in html
    # Nothing is fetched: every reference holds its data.
    references = [value for _, key, value in parsed.attributes if key in ("href", "src", "srcset", "data", "action")]
    assert references
    assert all(value.startswith("data:image/") for value in references)
    assert not re.search(r"url\(|@import|https?:|<script|<link", html)


def test_page_has_no_gallery_without_prototypes_and_no_scores_before_the_end(run: SimpleNamespace) -> None:
    run.prototypes, run.assignments, run.result, run.log = [], [], {}, []
    run.boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(40, 4)
    html = report.page(run)
    assert Strict(html).headings == ["Embedding", "Views", "Settings"]
    assert "0 of 2 epochs" in html


@pytest.mark.gpu
def test_page_on_a_gpu(run: SimpleNamespace) -> None:
    run.config = dataclasses.replace(run.config, device="auto")
    assert "Prototypes" in Strict(report.page(run)).headings


def test_write_report_replaces_the_page_whole_or_not_at_all(
    run: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "load_run", lambda folder, dataset: run)
    path = report.write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    path.write_text("the page before")
    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(tmp_path)
    monkeypatch.undo()
    assert path.read_text() == "the page before"


def disk_is_full(file: int) -> None:
    raise OSError("disk full")


def test_write_report_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        report.write_report(tmp_path)


def test_accuracy_shows_before_after_and_points() -> None:
    html = report.accuracy(RESULT["before"], RESULT["after"])
    cells = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row)[:4] for row in html.split("<tr>")[2:]]
    assert [[cell.replace("\u202f", " ") for cell in row] for row in cells] == [
        ["kNN, k = 20", "25.0 %", "75.0 %", "+50.0"],
        ["kNN, k = 200", "20.0 %", "10.0 %", "-10.0"],
        ["Linear probe", "50.0 %", "90.0 %", "+40.0"],
    ]
    assert 'left:10.00%;width:10.00%"></b><i style="left:20.00%"></i><i class="after" style="left:10.00%">' in html
    assert "<th>x&amp;y</th>" in report.accuracy({"x&y": 0.1}, {"x&y": 0.2}).replace(' scope="row"', "")
    assert report.accuracy({}, {}) == ""
    assert report.accuracy({"knn20": 0.1}, {}) == ""


def test_accuracy_shows_the_best_on_the_way_where_it_was_asked_for(run: SimpleNamespace) -> None:
    best = {"knn20": {"accuracy": 0.8, "epoch": 30.0}, "knn200": {"accuracy": 0.1, "epoch": 1}}
    html = report.accuracy(RESULT["before"], RESULT["after"], best)
    assert "<th>best, epoch</th>" in html
    rows = [re.findall(r"<td>([^<]*)</td>", row)[-1].replace("\u202f", " ") for row in html.split("<tr>")[2:]]
    assert rows == ["80.0 %, 30", "10.0 %, 1", ""]
    # A result always has a best; without rows of the log to choose from it says nothing.
    run.result = RESULT | {"best": best}
    assert "best, epoch" not in report.page(run)
    run.log = [*LOG[:1], LOG[1] | {"knn20": 0.8, "knn200": 0.1}]
    html = report.page(run)
    assert "best, epoch" in html
    assert "<figcaption>kNN, k = 20 <b>0.8</b>" in html


def test_evaluations_have_a_row_each(run: SimpleNamespace) -> None:
    known = {
        "epoch-0050": {"labels 1": {"knn20": 0.5, "linear": 0.625}, "labels 0.01": {"linear": 0.25}},
        "/other/<run>/best.pt": {"labels 1": {"linear_sgd": 0.75, "linear_sgd/0.1": 0.7}},
    }
    (run.path / "evaluation.json").write_text(json.dumps(known))
    (run.path / "config.yaml").touch()
    add_evaluation(run.path, "epoch-0050", 0.1, {"linear": 0.5})
    html = report.page(run).split("<h2>Evaluations</h2>")[1].split("</section>")[0]
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in html.split("<tr>")[1:]]
    assert [[cell.replace("\u202f", " ") for cell in row] for row in rows] == [
        ["", "labels", "kNN, k = 20", "Linear probe", "Linear, SGD"],
        ["epoch-0050", "100.0 %", "50.0 %", "62.5 %", ""],
        ["epoch-0050", "1.0 %", "", "25.0 %", ""],
        ["epoch-0050", "10.0 %", "", "50.0 %", ""],
        ["best.pt", "100.0 %", "", "", "75.0 %"],
    ]
    assert report.evaluated({}) == ""


def test_health_draws_and_explains_every_monitor() -> None:
    names = list(MONITORS)
    log = [{"epoch": 1.0, names[0]: 0.5}, {"epoch": 2.0, names[0]: 0.75, names[-1]: 2.0}]
    html = report.health(log)
    captions = re.findall(r"<figcaption>(.*?) <b>(.*?)</b>", html)
    assert captions == [(names[0].replace("_", " "), "0.75"), (names[-1].replace("_", " "), "2")]
    assert re.findall(r"<p>([^<]*)</p></figure>", html) == [MONITORS[names[0]], MONITORS[names[-1]]]
    assert report.health(LOG) == report.health([]) == ""


def test_phase_times_are_the_result_or_the_epochs_so_far() -> None:
    assert report.phase_times(RESULT, LOG) == list(RESULT["time_s"].items())
    assert report.phase_times({}, LOG) == [("views", 2.0), ("forward", 5.0), ("loss", 1.0)]
    assert report.phase_times({"time_s": {"other": 1.0, "loss": 2.0}}, []) == [("loss", 2.0), ("other", 1.0)]
    assert report.total_time({}, LOG) == 8.0
    assert "8.00\u202fs in all" in report.times({}, LOG)
    assert report.times({}, []) == ""


def test_training_draws_every_term() -> None:
    html = report.training(LOG)
    captions = re.findall(r"<figcaption>(.*?) <b>(.*?)</b>", html)
    assert captions == [
        ("loss", "6.5"),
        ("contrast", "4"),
        ("prototype", "2.5"),
        ("learning rate", "0.05"),
        ("images per second", "950"),
    ]
    prototype = html.split("<figcaption>prototype")[1].split("</figure>")[0]
    assert re.findall(r"<title>(.*?)</title>", prototype) == ["epoch 2: 2.5"]
    assert report.training([]) == ""
    single = [{key: value for key, value in row.items() if key != "loss/prototype"} for row in LOG]
    captions = re.findall(r"<figcaption>(.*?) <b>", report.training(single))
    assert captions == ["loss", "learning rate", "images per second"]


def test_views_are_those_of_the_trainer(run: SimpleNamespace) -> None:
    html = report.views(run)
    ids = torch.linspace(0, 39, report.VIEWED_IMAGES).long()
    crops = sample_crops(ids, (12, 16), boxes=run.boxes[ids], seed=3, epoch=1)
    drawn = [
        [float(number) for number in re.findall(r'="([-\d.e]+)"', rectangle)]
        for rectangle in re.findall(r'<rect class="view\d" (.*?)/>', html)
    ]
    expected = torch.stack(crops.chunk(2), dim=1).flatten(0, 1)[:, [1, 0, 3, 2]]
    assert drawn == expected.tolist()
    made = run.views(run.dataset.train_images[ids], ids, boxes=run.boxes[ids], epoch=1)
    first, second = (report.denormalise(view, run.dataset.mean, run.dataset.std) for view in made)
    pictures = [[run.dataset.train_images[index], first[i], second[i]] for i, index in enumerate(ids.tolist())]
    assert re.findall(r'href="(.*?)"', html) == [data_url(image) for row in pictures for image in row]


def test_views_of_a_streamed_set_are_of_whole_images(run: SimpleNamespace, tmp_path: Path) -> None:
    sizes = [(30, 16), (12, 50), (700, 520), (20, 20)]
    for number, size in enumerate(sizes):
        write_image(tmp_path / "a" / f"{number}.png", *size, seed=number)
    names = np.array([f"a/{number}.png".encode() for number in range(len(sizes))])
    streamed = Streamed(FolderFiles(tmp_path, names), 12)
    run.dataset = dataclasses.replace(run.dataset, train_images=streamed, train_labels=torch.zeros(4).long())
    html = report.views(run)
    whole = [read_image(tmp_path / "a" / f"{number}.png") for number in range(len(sizes))]
    ids = torch.arange(len(sizes))
    first, second = run.views(whole, ids, boxes=run.boxes[ids], epoch=1)
    made = [report.denormalise(view, run.dataset.mean, run.dataset.std) for view in (first, second)]
    shown = [image[:, ::2, ::2] if len(image[0]) == 700 else image for image in whole]
    expected = [image for i, image in enumerate(shown) for image in (image, made[0][i], made[1][i])]
    assert re.findall(r'href="(.*?)"', html) == [data_url(image) for image in expected]
    h0, w0, h1, w1 = run.boxes[2].tolist()
    box = re.findall(r'<rect class="box" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"/>', html)[2]
    drawn = [w0 * 260, h0 * 350, (w1 - w0) * 260, (h1 - h0) * 350]
    assert [float(number) for number in box] == pytest.approx(drawn, rel=1e-4)


def test_view_figure_draws_the_box() -> None:
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    html = report.view_figure(image, torch.tensor([0.25, 0.5, 0.75, 1.0]), [torch.tensor([1, 2, 3, 4])], [image])
    assert '<rect class="box" x="20" y="5" width="20" height="10"/>' in html
    assert '<rect class="view0" x="2" y="1" width="4" height="3"/>' in html


def test_gallery_shows_the_first_set_from_tight_to_loose(run: SimpleNamespace) -> None:
    html = report.gallery(run)
    data = run.dataset
    features = run.method.cluster_space(embed(run.method.embed, data.train_images, data.mean, data.std))
    found = report.clusters(features, run.assignments[0], 6, data.train_labels, data.classes, 0.2)
    assert "6 of the 6 prototypes of the first set" in html
    shown = [data.train_images[i] for cluster in found for i in cluster.nearest]
    assert re.findall(r'href="(.*?)"', html) == [data_url(image) for image in shown]
    assert re.findall(r"φ ([\d.]+)</b>", html) == [f"{cluster.concentration:.3f}" for cluster in found]
    run.prototypes, run.assignments = run.prototypes[:1], run.assignments[:1]
    assert "6 of the 6 prototypes, the tightest" in report.gallery(run)


def test_gallery_shows_some_of_many_and_nothing_of_none(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PROTOTYPES", 3)
    html = report.gallery(run)
    assert html.count("<figure>") == 3
    assert "3 of the 6" in html
    run.assignments = [torch.full((40,), -1)]
    assert report.gallery(run) == ""


def test_settings_show_every_setting() -> None:
    html = report.settings(Config(limit=None, views=dataclasses.replace(Config().views, scale=(0.25, 1 / 3))))
    shown = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    for key, value in dataclasses.asdict(Config()).items():
        assert all(name in shown for name in (value if isinstance(value, dict) else [key]))
    assert shown["limit"] == "none"
    assert shown["scale"] == "0.25, 0.333333"
    assert "<h3>optimizer</h3>" in html


@pytest.mark.parametrize(
    ("name", "shown"), [("digits", "digits"), ("imagefolder:/a/b c", "b c"), ("imagefolder:birds/", "birds")]
)
def test_data_name(name: str, shown: str) -> None:
    assert report.data_name(name) == shown


def test_denormalise_is_the_way_back_and_clips() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    images = torch.randint(0, 256, (4, 3, 5, 7), dtype=torch.uint8)
    views = [(images[:, c].double() / 255 - mean[c]) / std[c] for c in range(3)]
    assert torch.equal(report.denormalise(torch.stack(views, 1), mean, std), images)
    wild = torch.tensor([[[[-9.0]], [[0.0]], [[9.0]]]])
    assert report.denormalise(wild, (0.5, 0.2, 0.5), (0.2,) * 3).flatten().tolist() == [0, 51, 255]


def test_report_of_a_real_run(tmp_path: Path) -> None:
    for i in range(50):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    config = Config(
        method="pcl",
        data=f"imagefolder:{tmp_path / 'images'}",
        image_size=16,
        epochs=2,
        batch_size=20,
        device="cpu",
        encoder=EncoderConfig("resnet-tiny", width=8),
        prototypes=PrototypeConfig(num=(8,), warmup=1, n_iter=3),
    )
    train(config, load_data(config), tmp_path / "run")
    html = report.write_report(tmp_path / "run").read_text(encoding="utf-8")
    parsed = Strict(html)
    parts = ["Accuracy", "Time", "Embedding", "Training", "Health", "Views", "Prototypes", "Settings"]
    assert parsed.headings == parts
    assert all(f"<p>{about}</p>" in html for about in MONITORS.values())
    assert "40 training and 10 test images in 2 classes" in html
