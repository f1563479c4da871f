"""Faster R-CNN with FPN from an exported backbone, fine-tuned on a folder in COCO's format.

    fastproto export runs/mine --to torchvision
    python examples/detection.py runs/mine/export/torchvision.pt --backbone resnet50 --epochs 12 \\
        coco/train2017 coco/annotations/instances_train2017.json \\
        coco/val2017 coco/annotations/instances_val2017.json

Prints the mean loss of every epoch, and average precision at IoU 0.5 on the second folder. For COCO's own table of
figures give the predictions to pycocotools. The backbone needs torchvision's stem: train it on views above 64 pixels.
Images are normalised as the model card beside the weights says, without one as ImageNet's; categories go by their ids.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import box_iou

from fastproto.views.files import read_image

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH, LR, WEIGHT_DECAY = 4, 0.02 / 16 * 4, 1e-4


class CocoFolder(Dataset):
    """Images with their boxes (x0, y0, x1, y1) and labels 1, 2, ...; crowds and empty boxes are left out.

    ``labels`` are those of the categories' ids in training, whose file may list them in another order; None: its own.
    """

    def __init__(self, images: Path, annotations: Path, labels: dict[int, int] | None = None) -> None:
        content = json.loads(annotations.read_text())
        self.labels = labels or {category["id"]: i + 1 for i, category in enumerate(content["categories"])}
        unknown = {found["category_id"] for found in content["annotations"]} - self.labels.keys()
        if unknown:
            raise ValueError(f"{annotations}: expected categories of the training file, got ids {sorted(unknown)}")
        self.objects = defaultdict(list)
        for found in content["annotations"]:
            x, y, width, height = found["bbox"]
            if not found.get("iscrowd") and width >= 1 and height >= 1:
                label = self.labels[found["category_id"]]
                self.objects[found["image_id"]].append(((x, y, x + width, y + height), label))
        self.images = [(images / image["file_name"], image["id"]) for image in content["images"]]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        path, image_id = self.images[index]
        boxes = torch.tensor([box for box, _ in self.objects[image_id]], dtype=torch.float32).view(-1, 4)
        labels = torch.tensor([label for _, label in self.objects[image_id]], dtype=torch.int64)
        return read_image(path) / 255, {"boxes": boxes, "labels": labels}


def list_of_each(rows: list[tuple]) -> list[tuple]:
    """Images and targets of a batch, each of its own size."""
    return list(zip(*rows, strict=True))


def mean_and_std(weights: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the backbone's images were normalised with, as the model card beside it says; ImageNet's without a card."""
    card, numbers = weights.with_name("README.md"), r"\(([-\d., ]+)\)"
    text = card.read_text() if card.is_file() else ""
    found = re.search(f"minus the mean {numbers}, divided by {numbers}", text)
    if found is None:
        return IMAGENET
    mean, std = (tuple(map(float, group.split(","))) for group in found.groups())
    return mean, std


def build(weights: Path, backbone: str, classes: int, **options: Any) -> FasterRCNN:
    """All layers of the backbone are trained, its batch normalisations are frozen, as in torchvision's recipes."""
    fpn = resnet_fpn_backbone(backbone_name=backbone, weights=None, trainable_layers=5)
    missing, unexpected = fpn.body.load_state_dict(torch.load(weights), strict=False)
    assert not missing and all("num_batches_tracked" in name for name in unexpected), (missing, unexpected)
    return FasterRCNN(fpn, classes + 1, **options)


@torch.no_grad()
def average_precision(model: FasterRCNN, loader: DataLoader, classes: int) -> float:
    """Mean over classes of the area under precision over recall, for boxes that overlap by at least half."""
    model.eval()
    device = next(model.parameters()).device
    hits: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    counts = torch.zeros(classes + 1)
    for images, targets in loader:
        for found, target in zip(model([image.to(device) for image in images]), targets, strict=True):
            counts += target["labels"].bincount(minlength=classes + 1)
            free = torch.ones(len(target["labels"]), dtype=torch.bool)
            order = found["scores"].argsort(descending=True)
            ordered = (found[key][order].cpu() for key in ("boxes", "labels", "scores"))
            for box, label, score in zip(*ordered, strict=True):
                overlap = box_iou(box[None], target["boxes"])[0] * (free & (target["labels"] == label))
                hit = len(overlap) > 0 and float(overlap.max()) >= 0.5
                if hit:
                    free[overlap.argmax()] = False
                hits[int(label)].append((float(score), hit))
    precisions = []
    for label in (counts[1:] > 0).nonzero().flatten() + 1:
        ordered = [hit for _, hit in sorted(hits[int(label)], key=lambda found: -found[0])]
        right = torch.tensor(ordered, dtype=torch.float64).cumsum(0)
        precision = right / torch.arange(1, len(right) + 1)
        best_from_here = precision.flip(0).cummax(0).values.flip(0) if len(right) else precision
        gained = torch.tensor(ordered, dtype=torch.float64) / counts[label]
        precisions.append(float((best_from_here * gained).sum()))
    return sum(precisions) / max(1, len(precisions))


def main(arguments: list[str] | None = None, **options: Any) -> tuple[list[float], float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "train_images", "train_annotations", "test_images", "test_annotations"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--epochs", type=int, default=12)
    for name in ("--image_mean", "--image_std"):
        parser.add_argument(name, type=float, nargs=3, help="default: the model card's")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = CocoFolder(given.train_images, given.train_annotations)
    test = CocoFolder(given.test_images, given.test_annotations, train.labels)
    mean, std = mean_and_std(given.weights)
    options |= {"image_mean": given.image_mean or mean, "image_std": given.image_std or std}
    print(f"images: minus {options['image_mean']}, divided by {options['image_std']}")
    model = build(given.weights, given.backbone, len(train.labels), **options).to(device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=WEIGHT_DECAY)
    loaders = [DataLoader(part, BATCH, shuffle=part is train, collate_fn=list_of_each) for part in (train, test)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, max(1, given.epochs * len(loaders[0])))
    losses = []
    for epoch in range(given.epochs):
        model.train()
        total = 0.0
        for images, targets in loaders[0]:
            targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
            loss = torch.stack(list(model([image.to(device) for image in images], targets).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        losses.append(total / len(loaders[0]))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
    precision = average_precision(model, loaders[1], len(train.labels))
    print(f"average precision at IoU 0.5: {precision:.3f}")
    return losses, precision


if __name__ == "__main__":
    main()
