"""What a run leaves on disk: whole or not at all, only its own, and all of it comes back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from torch import Tensor, nn

from fastproto.train import checkpoint, data
from fastproto.train.config import (
    Config,
    EncoderConfig,
    OptimizerConfig,
    PrototypeConfig,
    ViewConfig,
    plain,
    read_config,
)
from fastproto.train.data import Dataset
from fastproto.views import SIMC_BOX

CPU = torch.device("cpu")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tiny_data: Dataset) -> Dataset:
    """Every data set there is."""
    monkeypatch.setattr(data, "load", lambda name, root=None, **options: tiny_data)
    return tiny_data


def stepped(config: Config, dataset: Dataset) -> checkpoint.State:
    """A state with everything in it changed from how it began."""
    state = checkpoint.build_state(config, dataset, CPU)
    sum(parameter.square().sum() for parameter in state.method.parameters() if parameter.requires_grad).backward()
    state.optimizer.step()
    state.boxes.update(torch.arange(3), torch.tensor([[0.1, 0.2, 0.8, 0.9]] * 3))
    if state.prototypes is not None:
        state.prototypes.update(torch.randn(len(dataset.train_images), state.method.cluster_dim))
    state.epoch, state.step = 3, 2
    state.sums, state.seconds = {"contrast": torch.tensor(1.5, dtype=torch.float64)}, {"views": 0.25}
    state.before, state.log = {"knn20": 0.5}, [{"epoch": 1, "loss": 2.5}]
    return state


def everything(state: checkpoint.State) -> dict[str, Tensor]:
    parts = {
        name: getattr(state, name) for name in ("method", "boxes", "prototypes") if getattr(state, name) is not None
    }
    tensors = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    return tensors


@pytest.mark.parametrize("method", ["simclr", "byol", "spcl", "pauc"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_a_checkpoint_brings_everything_back(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset, method: str, optimizer: str
) -> None:
    config = replace(tiny_config, method=method, optimizer=OptimizerConfig(name=optimizer))  # type: ignore[arg-type]
    saved = stepped(config, tiny_data)
    path = saved.save(tmp_path)
    assert path == tmp_path / "checkpoints" / "epoch-0003.pt"
    expected = torch.rand(4)
    loaded = checkpoint.build_state(config, tiny_data, CPU)
    loaded.load(path)
    torch.testing.assert_close(torch.rand(4), expected, rtol=0, atol=0)
    before, after = everything(saved), everything(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("epoch", "step", "sums", "seconds", "before", "log"):
        assert getattr(saved, name) == getattr(loaded, name)


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "values.pt"
    checkpoint.write_whole(path, lambda file: torch.save({"value": 1}, file))

    def break_off(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_whole(path, break_off)
    assert torch.load(path, weights_only=True) == {"value": 1}


def test_the_last_checkpoints_are_kept(tmp_path: Path, tiny_config: Config, tiny_data: Dataset) -> None:
    state = checkpoint.build_state(tiny_config, tiny_data, CPU)
    (tmp_path / "config.yaml").write_text(checkpoint.MARK)
    for epoch in (0, 9998, 9999, 10000):
        state.epoch = epoch
        state.save(tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["epoch-10000.pt", "epoch-9999.pt"]
    assert checkpoint.latest_checkpoint(tmp_path).name == "epoch-10000.pt"
    for epoch in (10001, 10002):
        state.epoch = epoch
        state.save(tmp_path, keep=3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["epoch-10000.pt", "epoch-10001.pt", "epoch-10002.pt"]


def test_the_state_begins_the_same_for_the_same_seed(tiny_config: Config, tiny_data: Dataset) -> None:
    first, again, other = (
        everything(checkpoint.build_state(replace(tiny_config, seed=seed), tiny_data, CPU)) for seed in (5, 5, 6)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["method.queue"], other["method.queue"])


@pytest.mark.parametrize(("crop", "box"), [("random", (0, 0, 1, 1)), ("contrastive", (0, 0, 1, 1)), ("simc", SIMC_BOX)])
def test_boxes_begin_as_the_crop_asks(tiny_config: Config, tiny_data: Dataset, crop: str, box: tuple) -> None:
    state = checkpoint.build_state(replace(tiny_config, crop=crop), tiny_data, CPU)  # type: ignore[arg-type]
    assert torch.equal(state.boxes.boxes, torch.tensor([box] * 40, dtype=torch.float32))


def test_views_are_the_configured_ones(tiny_config: Config, tiny_data: Dataset) -> None:
    views = ViewConfig(
        size=None, scale=(0.3, 0.7), ratio=(0.5, 2.0), alpha=0.3, augment="moco", jitter=(0.1, 0.2, 0.3, 0.4)
    )
    guided = checkpoint.build_views(replace(tiny_config, views=views, seed=7), tiny_data)
    assert (guided.size, guided.scale, guided.ratio, guided.alpha) == ((20, 20), (0.3, 0.7), (0.5, 2.0), 0.3)
    assert (guided.augment, guided.jitter, guided.seed, guided.views) == ("moco", (0.1, 0.2, 0.3, 0.4), 7, 2)
    assert (guided.mean, guided.std) == (tiny_data.mean, tiny_data.std)
    # A plain random crop is uniform.
    assert checkpoint.build_views(replace(tiny_config, views=views, crop="random"), tiny_data).alpha == 1.0
    assert checkpoint.build_views(tiny_config, tiny_data).size == (16, 16)


def test_only_matrices_and_kernels_are_decayed() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    module[2].weight.requires_grad_(False)
    config = OptimizerConfig(name="sgd", lr=0.3, momentum=0.8, weight_decay=0.1)
    decayed, rest = checkpoint.build_optimizer(config, module).param_groups
    assert [id(parameter) for parameter in decayed["params"]] == [id(module[0].weight)]
    assert {id(parameter) for parameter in rest["params"]} == {
        id(parameter) for parameter in (module[0].bias, module[1].weight, module[1].bias, module[2].bias)
    }
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert (decayed["lr"], decayed["momentum"]) == (0.3, 0.8)
    adamw = checkpoint.build_optimizer(replace(config, name="adamw"), module)
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["lr"] == 0.3


def test_a_clustering_begins_where_it_is_asked_to(tiny_config: Config, tiny_data: Dataset) -> None:
    found = []
    for warm_start in (False, True):
        config = replace(tiny_config, prototypes=PrototypeConfig(num=(5,), n_iter=1, warm_start=warm_start))
        bank = checkpoint.build_state(config, tiny_data, CPU).prototypes
        features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            bank.update(features)
        found.append(float((features - bank.prototypes_0[bank.assignments_0]).square().sum()))
    # One iteration from new centres each time, or three in a row.
    assert found[1] < found[0]


def test_simsiams_predictor_has_groups_of_its_own(tiny_config: Config, tiny_data: Dataset) -> None:
    config = replace(tiny_config, method="simsiam", optimizer=OptimizerConfig(weight_decay=0.1))
    state = checkpoint.build_state(config, tiny_data, CPU)
    names = {id(parameter): name for name, parameter in state.method.named_parameters()}
    seen = {}
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            seen[names.pop(id(parameter))] = group["constant"], group["weight_decay"], parameter.ndim
    assert not names
    for name, (constant, decay, ndim) in seen.items():
        assert constant == name.startswith("predictor.")
        assert decay == (0.1 if ndim > 1 else 0)


def test_lars_scales_the_steps_of_matrices_and_kernels_by_their_norms() -> None:
    module = nn.Linear(4, 2)
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    upstream = torch.randn_like(weight)
    lars = checkpoint.build_optimizer(OptimizerConfig("lars", lr=0.3, momentum=0.0, weight_decay=0.1), module)
    ((module.weight * upstream).sum() + module.bias.sum()).backward()
    lars.step()
    # You et al., Large Batch Training of Convolutional Networks, arXiv 1708.03888, algorithm 1.
    trust = 0.001 * weight.norm() / (upstream.norm() + 0.1 * weight.norm())
    torch.testing.assert_close(module.weight.detach(), weight - 0.3 * trust * (upstream + 0.1 * weight))
    torch.testing.assert_close(module.bias.detach(), bias - 0.3)


def test_a_limit_takes_images_evenly_over_the_classes(tiny_config: Config, made: Dataset) -> None:
    limited = checkpoint.load_data(replace(tiny_config, limit=16))
    kept = [40 * i // 16 for i in range(16)]
    assert torch.equal(limited.train_images, made.train_images[kept])
    assert torch.equal(limited.train_labels, made.train_labels[kept])
    assert torch.equal(limited.test_images, made.test_images)
    assert checkpoint.load_data(tiny_config) is made


def test_data_is_loaded_as_configured(
    monkeypatch: pytest.MonkeyPatch, tiny_config: Config, tiny_data: Dataset
) -> None:
    asked = []
    monkeypatch.setattr(data, "load", lambda *args, **options: asked.append((args, options)) or tiny_data)
    checkpoint.load_data(tiny_config)
    options = {"image_size": 48, "class_list": "list.txt", "resident": False, "workers": 3, "strict": True}
    config = replace(tiny_config, data="imagenet", data_root="/data/sets", test_shards="x.tar", **options)
    checkpoint.load_data(config)
    plain = dict.fromkeys(("image_size", "class_list", "test_shards", "resident"))
    (first, first_options), second = asked
    assert first == ("digits", None)
    assert first_options.pop("workers") >= 1
    assert first_options == plain | {"strict": False}
    options |= {"class_list": Path("list.txt"), "test_shards": "x.tar"}
    assert second == (("imagenet", Path("/data/sets")), options)


def test_processes_that_train_leave_each_other_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.os, "sched_getaffinity", lambda pid: set(range(24)), raising=False)
    assert [checkpoint.default_workers(devices) for devices in (1, 2, 4, 24, 48)] == [16, 11, 5, 1, 1]


def test_a_limit_that_leaves_no_label_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_config: Config, tiny_data: Dataset
) -> None:
    labels = torch.full((40,), -1)
    labels[1] = 0
    monkeypatch.setattr(data, "load", lambda *args, **options: replace(tiny_data, train_labels=labels))
    assert checkpoint.load_data(replace(tiny_config, limit=39)).train_labels.max() == 0
    with pytest.raises(ValueError, match=r"config: limit expected so many that some have a label, .*, got int 20"):
        checkpoint.load_data(replace(tiny_config, limit=20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 41}, "config: limit expected at most the 40 training images, got int 41"),
        ({"batch_size": 41}, "config: batch_size expected at most the 40 training images, got int 41"),
    ],
)
def test_more_than_there_are_images_is_refused(tiny_config: Config, made: Dataset, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.load_data(replace(tiny_config, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "spcl", "prototypes": PrototypeConfig(num=(5, 3))},
            "spcl: prototypes.num expected one prototype set",
        ),
        ({"views": ViewConfig(scale=(0.9, 0.1))}, "ContrastiveCrop: scale expected"),
        (
            {"encoder": EncoderConfig("timm/vit_tiny_patch16_224")},
            r"encoder: timm/vit_tiny_patch16_224 does not take images of \(20, 20\)",
        ),
        ({"prototypes": PrototypeConfig(num=(5,), temperature=-1.0)}, "PrototypeBank: temperature expected above 0"),
        (
            {"prototypes": PrototypeConfig(num=(5, 41))},
            r"PrototypeBank: num_prototypes expected 1 ... .* 40, got int 41",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(tiny_config: Config, tiny_data: Dataset, changes: dict, message: str) -> None:
    random = torch.get_rng_state()
    checkpoint.check_buildable(tiny_config, tiny_data)
    with pytest.raises(ValueError, match=message):
        checkpoint.check_buildable(replace(tiny_config, **changes), tiny_data)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_device_that_is_not_there_is_refused(tiny_config: Config, tiny_data: Dataset) -> None:
    with pytest.raises(ValueError, match="config: device expected cpu: no GPU is here, got cuda"):
        checkpoint.check_buildable(replace(tiny_config, device="cuda"), tiny_data)


def test_a_folder_is_taken_only_as_it_should(tmp_path: Path, tiny_config: Config, tiny_data: Dataset) -> None:
    def check(folder: Path, config: Config = tiny_config, resume: bool = False, overwrite: bool = False) -> None:
        checkpoint.check_folder(folder, config, resume=resume, overwrite=overwrite)

    run, other = tmp_path / "run", tmp_path / "other"
    check(run)
    with pytest.raises(ValueError, match=r"run: folder expected one that holds a run, got .*run"):
        check(run, resume=True)
    assert not run.exists()

    other.mkdir()
    check(other)
    check(other, overwrite=True)
    (other / "config.yaml").write_text("method: pauc\n")
    for overwrite in (False, True):
        with pytest.raises(
            ValueError, match=r"--out expected a new or empty folder, got .*other, which holds something else"
        ):
            check(other, overwrite=overwrite)
    with pytest.raises(ValueError, match="which holds something else"):
        check(other / "config.yaml", overwrite=True)
    with pytest.raises(ValueError, match=r"one that holds a run, got .*other"):
        check(other, resume=True)

    checkpoint.start_folder(run, tiny_config)
    with pytest.raises(ValueError, match=r"run: folder expected a run with a checkpoint, got .*run, which has none"):
        check(run, resume=True)
    stepped(tiny_config, tiny_data).save(run)
    check(run, resume=True)
    check(run, overwrite=True)
    with pytest.raises(ValueError, match="which holds a run: go on with --resume or start anew with --overwrite"):
        check(run)
    with pytest.raises(ValueError, match="--resume and --overwrite expected one of them, got both"):
        check(run, resume=True, overwrite=True)
    with pytest.raises(ValueError, match="--resume expected the configuration of the run, got another: seed 0, now 1"):
        check(run, replace(tiny_config, seed=1), resume=True)
    check(run, replace(tiny_config, device="auto"), resume=True)


def test_starting_anew_removes_the_run_and_nothing_else(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset
) -> None:
    checkpoint.start_folder(tmp_path, tiny_config)
    stepped(tiny_config, tiny_data).save(tmp_path)
    for name in ("log.csv", "result.json", "report.html", "events.out.tfevents.1.host", "notes.txt"):
        (tmp_path / name).write_text("old")
    checkpoint.start_folder(tmp_path, replace(tiny_config, seed=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "notes.txt"]
    assert read_config(tmp_path / "config.yaml") == replace(tiny_config, seed=3)


def test_the_log_comes_back_with_gaps(tmp_path: Path) -> None:
    assert checkpoint.read_log(tmp_path) == []
    log = [
        {"epoch": 1, "loss": 0.1 + 0.2, "time/views": 1.0},
        {"epoch": 2, "loss": 2.0, "loss/align": 3.0, "time/views": 1.5},
    ]
    checkpoint.write_log(tmp_path, log)
    first, second = checkpoint.read_log(tmp_path)
    assert second == log[1]
    assert math.isnan(first.pop("loss/align"))
    assert first == log[0]
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == "epoch,loss,loss/align,time/views"


@pytest.mark.parametrize("method", ["simclr", "pauc"])
def test_a_run_is_read_back(tmp_path: Path, tiny_config: Config, made: Dataset, method: str) -> None:
    config = replace(tiny_config, method=method, crop="simc")  # type: ignore[arg-type]
    checkpoint.start_folder(tmp_path, config)
    state = stepped(config, made)
    state.save(tmp_path)
    checkpoint.write_log(tmp_path, state.log)
    random = torch.get_rng_state()
    run = checkpoint.load_run(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), random)
    assert (run.path, run.config, run.log, run.result) == (tmp_path, config, state.log, {})
    assert run.dataset is made
    assert not run.method.training
    weights = run.method.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in state.method.state_dict().items())
    assert torch.equal(run.boxes, state.boxes.boxes)
    assert run.views.size == (16, 16)
    if method == "simclr":
        assert (run.prototypes, run.assignments) == ([], [])
    else:
        assert torch.equal(run.prototypes[0], state.prototypes.prototypes_0)
        assert torch.equal(run.assignments[0], state.prototypes.assignments_0)
    (tmp_path / "result.json").write_text(json.dumps({"config": plain(config)}))
    assert checkpoint.load_run(tmp_path).result == {"config": plain(config)}


def test_a_run_before_its_first_clustering_has_no_prototypes(
    tmp_path: Path, tiny_config: Config, made: Dataset
) -> None:
    checkpoint.start_folder(tmp_path, tiny_config)
    checkpoint.build_state(tiny_config, made, CPU).save(tmp_path)
    run = checkpoint.load_run(tmp_path)
    assert (run.prototypes, run.assignments) == ([], [])


def test_no_run_is_refused(tmp_path: Path, tiny_config: Config) -> None:
    with pytest.raises(ValueError, match=r"run: folder expected one that holds a run, got .*nowhere"):
        checkpoint.load_run(tmp_path / "nowhere")
    checkpoint.start_folder(tmp_path, tiny_config)
    with pytest.raises(ValueError, match=r"run: folder expected a run with a checkpoint, got .*, which has none"):
        checkpoint.load_run(tmp_path)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset
) -> None:
    checkpoint.start_folder(tmp_path, tiny_config)
    state = stepped(tiny_config, tiny_data)
    older = state.save(tmp_path)
    state.epoch += 1
    newer = state.save(tmp_path)
    whole = newer.read_bytes()
    for length in (0, 1000, len(whole) // 2, len(whole) - 1):
        newer.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match=rf"checkpoint: {newer} is damaged; taking {older}"):
            assert checkpoint.latest_checkpoint(tmp_path) == older
        assert newer.read_bytes() == whole[:length]
    newer.write_bytes(whole)
    assert checkpoint.latest_checkpoint(tmp_path) == newer
    for path in (older, newer):
        path.write_bytes(whole[:1000])
    refused = pytest.raises(ValueError, match=rf"checkpoint: {older} is damaged$")
    with pytest.warns(UserWarning, match="damaged"), refused:
        checkpoint.check_folder(tmp_path, tiny_config, resume=True, overwrite=False)


def test_the_mark_of_a_run_is_removed_last() -> None:
    assert checkpoint.FILES[-1] == "config.yaml"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, tiny_config: Config) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out expected a folder that can be written, got .*file is none"):
        checkpoint.check_folder(tmp_path / "file" / "run", tiny_config, resume=False, overwrite=False)
