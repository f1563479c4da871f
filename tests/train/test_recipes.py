"""The packaged recipes for each method and data set: complete, sourced, in step with one another, and buildable."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from fastproto.train.build import build_state, build_views
from fastproto.train.config import Config, read_config
from fastproto.train.data import Dataset
from fastproto.train.methods import Prototypes
from fastproto.train.recipes import RECIPES, default_recipe, find_recipe

# Training images and their side.
DATA = {"cifar10": (50_000, 32), "stl10": (105_000, 96), "tiny-imagenet": (100_000, 64), "imagenet": (1_281_167, 224)}
ARXIV = {
    "simclr": "2002.05709",
    "moco": "2003.04297",
    "byol": "2006.07733",
    "simsiam": "2011.10566",
    "pcl": "2005.04966",
    "spcl": "2208.08819",
    "pauc": "2210.10194",
}
METHODS = tuple(ARXIV)
NAMES = [f"{method}_{data}" for method in METHODS for data in DATA]


@cache
def config_of(name: str) -> Config:
    return read_config(find_recipe(name))


def head_of(name: str) -> str:
    """The comment that a recipe begins with, as one line."""
    comment = find_recipe(name).read_text().split("\nmethod:")[0]
    return " ".join(line.removeprefix("# ") for line in comment.splitlines())


def repositories(name: str) -> list[str]:
    """The files that a recipe's values are from, or those of the recipes that it says it takes them from."""
    others = [other for other in re.findall(r"\b[a-z]+_[a-z0-9-]+\b", head_of(name)) if other in NAMES]
    own = re.findall(r"repository ([\w-]+/[\w-]+, [\w/.-]+)", head_of(name))
    return own or [file for other in others for file in repositories(other)]


def data_of(config: Config, device: str = "cpu") -> Dataset:
    """A data set of the real size whose images are all one and the same in memory."""
    count, size = DATA[config.data]
    images = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device).expand(count, -1, -1, -1)
    labels = torch.zeros(1, dtype=torch.int64).expand(count)
    return Dataset(config.data, images, labels, images[:1], labels[:1], ("a",), (0.5,) * 3, (0.25,) * 3)


def test_there_is_one_for_each_method_and_data_set() -> None:
    assert {path.stem for path in RECIPES.glob("*_*.yaml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_found_and_names_its_sources(name: str) -> None:
    method, data = name.split("_")
    path = find_recipe(name)
    assert path == default_recipe(method, data) == RECIPES / f"{name}.yaml"
    assert f"(arXiv {ARXIV[method]})" in head_of(name)
    assert repositories(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_schedules_of_a_recipe_lie_within_it(name: str) -> None:
    config = config_of(name)
    assert config.crop == "random"
    # ContrastiveCrop's schedule (arXiv 2202.03278): 100 and 100 of 500 epochs, 20 and 20 of 100.
    assert config.views.box_warmup == config.views.box_interval == config.epochs / 5
    assert config.views.alpha == (0.6 if config.data == "imagenet" else 0.1)
    assert config.optimizer.warmup < config.epochs
    assert config.prototypes.warmup < config.epochs
    count, _ = DATA[config.data]
    assert max(config.prototypes.num) * 10 <= count
    if config.method in ("moco", "pcl", "pauc"):
        assert config.target.queue % config.batch_size == 0


@pytest.mark.parametrize("data", ["stl10", "tiny-imagenet"])
@pytest.mark.parametrize("method", METHODS)
def test_the_small_data_sets_share_all_values_but_the_numbers_of_prototypes(method: str, data: str) -> None:
    cifar, other = config_of(f"{method}_cifar10"), config_of(f"{method}_{data}")
    # STL-10's larger images are treated as the small ones.
    assert (data == "stl10") == (other.encoder.stem == "small") == (other.views.blur == 0)
    alike = {"encoder": cifar.encoder, "views": replace(other.views, blur=None)}
    assert replace(other, data="cifar10", prototypes=cifar.prototypes, **alike) == cifar
    # As many images to a prototype, within a tenth.
    ratio = DATA[data][0] / DATA["cifar10"][0] if method in ("pcl", "pauc") else 1
    expected = [ratio * number for number in cifar.prototypes.num]
    assert replace(other.prototypes, num=cifar.prototypes.num) == cifar.prototypes
    assert list(other.prototypes.num) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("data", DATA)
def test_pauc_takes_all_from_pcl(data: str) -> None:
    assert replace(config_of(f"pauc_{data}"), method="pcl") == config_of(f"pcl_{data}")


# The other small data sets build what CIFAR-10 does.
@pytest.mark.parametrize("data", ["cifar10", "imagenet"])
@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_builds_what_it_says(method: str, data: str) -> None:
    config = config_of(f"{method}_{data}")
    meta = torch.device("meta")
    with meta:
        state = build_state(config, data_of(config, "meta"), meta)
    assert state.method.encoder.num_features == (2048 if config.data == "imagenet" else 512)
    assert type(state.optimizer).__name__.lower() == config.optimizer.name
    groups = state.optimizer.param_groups
    assert {group["lr"] for group in groups} == {config.optimizer.lr}
    if config.optimizer.name == "lars":
        plain = [group for group in groups if group["constant"]]
        assert not any(group["momentum"] or group["always_adapt"] for group in plain)
    zero = method == "simsiam" or (data == "imagenet" and method in ("simclr", "byol"))
    assert config.encoder.zero_init == zero
    assert {group["weight_decay"] for group in groups} == {config.optimizer.weight_decay, 0}
    assert any(group["constant"] for group in groups) == (method in ("simsiam", "spcl"))
    if state.prototypes is not None:
        shapes = [tuple(getattr(state.prototypes, f"prototypes_{g}").shape) for g in range(len(config.prototypes.num))]
        dim = config.prototypes.whiten_dim if config.method == "spcl" else config.head.dim
        assert shapes == [(number, dim) for number in config.prototypes.num]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_makes_views_of_the_size_of_the_images(name: str) -> None:
    config = replace(config_of(name), crop="contrastive")
    size = DATA[config.data][1]
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0.2, 0.2, 0.8, 0.8]]).expand(2, 4)
    views = build_views(config, data_of(config))(images, torch.tensor([3, 1]), boxes, 4)
    assert [tuple(view.shape) for view in views] == [(2, 3, size, size)] * 2
    assert all(view.isfinite().all() for view in views)
    assert not torch.equal(*views)


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_takes_a_step(method: str) -> None:
    config = config_of(f"{method}_cifar10")
    torch.manual_seed(0)
    state = build_state(config, data_of(config), torch.device("cpu"))
    prototypes = None
    if state.prototypes is not None:
        centers = [F.normalize(torch.randn(number, state.prototypes.dim), dim=1) for number in config.prototypes.num]
        assignments = [torch.tensor([0, number - 1, 0, 1]) for number in config.prototypes.num]
        prototypes = Prototypes(centers, assignments, [torch.full((len(rows),), 0.2) for rows in centers])
    before = [parameter.detach().clone() for parameter in state.method.encoder.parameters()]
    terms = state.method.train()((torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)), prototypes)
    torch.stack(list(terms.values())).sum().backward()
    state.optimizer.step()
    state.method.after_step(0.5)
    assert all(term.isfinite() for term in terms.values())
    after = list(state.method.encoder.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
