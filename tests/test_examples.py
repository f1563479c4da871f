"""The scripts in examples/ run, at a fraction of their size, and learn."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("jsonargparse")

from fastproto.train.config import Config, EncoderConfig
from fastproto.train.encoders import build_encoder
from fastproto.train.export import card
from fastproto.train.run import Trained

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
    lightlys = pytest.importorskip("lightly.loss").NTXentLoss
    example = load("lightly_simclr")
    shrink(monkeypatch, example, IMAGES=16, SIDE=16, EPOCHS=1, BATCH=8, WORKERS=0)
    ours = example.main()
    monkeypatch.setattr(example, "NTXentLoss", lightlys)
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
def test_lightning_proto_nce_learns_on_two_processes_as_on_one(no_gloo_threads: dict[str, str]) -> None:
    """In batches of all images, which two processes share, so that both runs take the same steps."""
    options = ["--accelerator", "cpu", "--epochs", "4", "--images", "128", "--batch-size", "128"]
    one = load("lightning_proto_nce").main(options)
    assert len(one) == 4
    assert one[-1] < one[0] - 0.2
    command = [sys.executable, str(EXAMPLES / "lightning_proto_nce.py"), "--devices", "2", *options]
    done = subprocess.run(command, env=no_gloo_threads, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    two = [float(loss) for loss in re.findall(r"^epoch \d: loss (\S+)$", done.stdout, re.MULTILINE)]
    assert two == pytest.approx(one, rel=1e-4)


def test_detection_learns_from_an_exported_backbone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bright squares on dark noise, found by a detector whose backbone is random."""
    draw, images, objects = np.random.default_rng(0), [], []
    for index in range(8):
        pixels = draw.integers(0, 60, (64, 64, 3)).astype(np.uint8)
        top, left = draw.integers(2, 30, 2)
        pixels[top : top + 30, left : left + 30] += 180
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png"})
        objects.append({"image_id": index, "category_id": 7, "bbox": [int(left), int(top), 30, 30]})
        objects.append({"image_id": index, "category_id": 7, "bbox": [0, 0, 64, 64], "iscrowd": 1})
    annotations = tmp_path / "instances.json"
    annotations.write_text(json.dumps({"images": images, "annotations": objects, "categories": [{"id": 7}]}))
    torch.save(build_encoder("resnet18", image_size=96).trunk.state_dict(), tmp_path / "weights.pt")

    example = load("detection")
    shrink(monkeypatch, example, BATCH=4, LR=0.02)
    paths = [str(path) for path in (tmp_path / "weights.pt", tmp_path, annotations, tmp_path, annotations)]
    small = {"min_size": 64, "max_size": 64, "box_detections_per_img": 20, "box_batch_size_per_image": 32}
    small |= {f"rpn_{when}_nms_top_n_{mode}": 100 for when in ("pre", "post") for mode in ("train", "test")}
    losses, precision = example.main([*paths, "--backbone", "resnet18", "--epochs", "4"], **small)
    assert losses[-1] < 0.8 * losses[0]
    assert 0 <= precision <= 1


def test_a_category_keeps_its_label_in_a_file_of_another_order(tmp_path: Path) -> None:
    example = load("detection")
    Image.new("RGB", (20, 20)).save(tmp_path / "0.png")
    found = []
    for name, ids, seen in (("train", (7, 3), 3), ("test", (3, 7), 3), ("other", (7, 3, 9), 9)):
        objects = [{"image_id": 0, "category_id": seen, "bbox": [1, 2, 10, 10]}]
        content = {"images": [{"id": 0, "file_name": "0.png"}], "annotations": objects}
        (tmp_path / name).write_text(json.dumps(content | {"categories": [{"id": id} for id in ids]}))
        if name != "other":
            folder = example.CocoFolder(tmp_path, tmp_path / name, *(part.labels for part in found[:1]))
            found.append(folder)
            assert folder[0][1]["labels"].tolist() == [2]
    with pytest.raises(ValueError, match=r"other: expected categories of the training file, got ids \[9\]"):
        example.CocoFolder(tmp_path, tmp_path / "other", found[0].labels)


def test_detection_normalises_as_the_model_card_says(tmp_path: Path) -> None:
    example = load("detection")
    weights, mean, std = tmp_path / "torchvision.pt", (0.1, 0.25, 0.5), (0.2, 0.3, 0.125)
    assert example.mean_and_std(weights) == example.IMAGENET
    encoder = build_encoder("resnet18", image_size=96)
    run = Trained(
        tmp_path, Config(encoder=EncoderConfig("resnet18")), encoder, data="made", size=(96, 96), mean=mean, std=std,
        epoch=0, scores={},
    )  # fmt: skip
    (tmp_path / "README.md").write_text(card(run, ["torchvision"]))
    assert example.mean_and_std(weights) == (mean, std)
    torch.save(encoder.trunk.state_dict(), weights)
    normalise = example.build(weights, "resnet18", 2, image_mean=mean, image_std=std).transform.normalize
    expected = (torch.ones(3) - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(normalise(torch.ones(3, 1, 1)).flatten(), expected)


def test_average_precision_counts_each_object_once() -> None:
    example = load("detection")
    square, other = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]
    truth = {"boxes": torch.tensor([square, other]), "labels": torch.tensor([1, 1])}

    class Detector(torch.nn.Linear):
        def forward(self, images: object) -> list:
            boxes = torch.tensor([square, square, [50.0, 50.0, 60.0, 60.0], other])
            return [{"boxes": boxes, "labels": torch.ones(4).long(), "scores": torch.tensor([0.9, 0.8, 0.7, 0.6])}]

    # Precision 1 at half the recall, then 2 of 4 at all of it.
    found = example.average_precision(Detector(1, 1), [([torch.zeros(3, 64, 64)], [truth])], 1)
    assert found == pytest.approx(0.5 * 1 + 0.5 * 0.5)
