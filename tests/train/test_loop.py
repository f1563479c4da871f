"""The loop: that all pairs train, what a run leaves, and that an interruption changes no bit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor
from train._runs import at_the_end, stop_after

from fastproto.cluster import PrototypeBank
from fastproto.losses import _gather
from fastproto.train import loop
from fastproto.train.build import build_state, build_views
from fastproto.train.checkpoint import State, read_checkpoint
from fastproto.train.clock import PHASES
from fastproto.train.config import (
    Config,
    EvaluationConfig,
    LossConfig,
    OptimizerConfig,
    plain,
)
from fastproto.train.data import Dataset
from fastproto.train.evaluate import evaluate
from fastproto.train.files import read_log
from fastproto.train.methods import METHODS
from fastproto.views import SIMC_BOX, localize

CPU = torch.device("cpu")


def tensors(state: State) -> dict[str, Tensor]:
    parts = {
        name: getattr(state, name) for name in ("method", "boxes", "prototypes") if getattr(state, name) is not None
    }
    found = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    return found


def numbers(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """The log without what depends on the machine."""
    return [{name: value for name, value in row.items() if name.startswith(("epoch", "lr", "loss"))} for row in log]


@pytest.mark.usefixtures("no_evaluation")
@pytest.mark.parametrize("crop", ["random", "contrastive", "simc"])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_trains_with_every_crop(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset, method: str, crop: str
) -> None:
    config = replace(tiny_config, method=method, crop=crop)  # type: ignore[arg-type]
    loop.train(config, tiny_data, tmp_path)
    start, end = build_state(config, tiny_data, CPU), at_the_end(tmp_path, config, tiny_data)
    for name, parameter in end.method.encoder.named_parameters():
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, start.method.encoder.get_parameter(name)), name
    # Two epochs of two steps, each on two views.
    assert end.method.encoder.trunk[1].num_batches_tracked == 8
    terms = {name: ["contrast"] for name in ("simclr", "moco", "byol", "simsiam")} | {
        "pcl": ["contrast", "prototype"],
        "spcl": ["contrast", "metric", "prototype"],
        "pauc": ["contrast", "prototype", "align", "uniform", "correlation"],
    }
    first, second = ([name.removeprefix("loss/") for name in row if name.startswith("loss/")] for row in end.log)
    # Without prototypes there are no terms of them. A method that is not named here has none.
    assert first == (["contrast"] if method in terms else second)
    assert second == terms.get(method, second)
    first, second = end.log
    assert all(math.isfinite(value) for value in second.values())
    box = torch.tensor(SIMC_BOX if crop == "simc" else (0.0, 0.0, 1.0, 1.0))
    assert (end.boxes.boxes == box).all() == (crop != "contrastive")
    if end.prototypes is not None:
        assert end.prototypes.num_updates == 1
        assert end.prototypes.assignments_0.unique().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("no_evaluation")
@pytest.mark.parametrize(
    ("method", "optimizer"), [("pauc", "sgd"), ("spcl", "sgd"), ("spcl", "adamw"), ("byol", "adamw")]
)
def test_an_interrupted_run_ends_with_the_same_bits(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset, method: str, optimizer: str
) -> None:
    settings = OptimizerConfig(name=optimizer, lr=0.01, warmup=0.5)  # type: ignore[arg-type]
    config = replace(tiny_config, method=method, epochs=3, optimizer=settings)  # type: ignore[arg-type]
    loop.train(config, tiny_data, tmp_path / "whole")
    whole = at_the_end(tmp_path / "whole", config, tiny_data)
    # Six steps in all: in the middle of an epoch, after its last step, and before the last evaluation.
    for stops in ((1,), (4,), (3, 1, 1), (6,), (7,)):
        folder = tmp_path / "-".join(map(str, stops))
        for attempt, steps in enumerate(stops):
            with pytest.raises(loop.Interrupted):
                loop.train(config, tiny_data, folder, resume=attempt > 0, stop=stop_after(steps))
            torch.rand(3)
        loop.train(config, tiny_data, folder, resume=True)
        resumed = at_the_end(folder, config, tiny_data)
        expected, actual = tensors(whole), tensors(resumed)
        assert expected.keys() == actual.keys()
        assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []
        assert numbers(resumed.log) == numbers(whole.log) == numbers(read_log_without_gaps(folder))


def read_log_without_gaps(folder: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if not math.isnan(value)} for row in read_log(folder)]


@pytest.mark.usefixtures("no_evaluation")
def test_a_run_killed_between_checkpoints_goes_on_from_the_last(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset
) -> None:
    class Killed(BaseException):
        pass

    def kill() -> bool:
        if next(asked) == 3:
            raise Killed
        return False

    asked = iter(range(1, 1000))
    with pytest.raises(Killed):
        loop.train(tiny_config, tiny_data, tmp_path / "killed", stop=kill)
    loop.train(tiny_config, tiny_data, tmp_path / "killed", resume=True)
    loop.train(tiny_config, tiny_data, tmp_path / "whole")
    states = [at_the_end(tmp_path / name, tiny_config, tiny_data) for name in ("killed", "whole")]
    expected, actual = map(tensors, states)
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


def test_a_run_leaves_its_folder_complete(tmp_path: Path, tiny_config: Config, tiny_data: Dataset) -> None:
    config = replace(tiny_config, seed=11)
    result = loop.train(config, tiny_data, tmp_path)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch-0001.pt", "epoch-0002.pt"]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    end = at_the_end(tmp_path, config, tiny_data)
    assert result["before"] == evaluate(build_state(config, tiny_data, CPU).method.eval().encoder, tiny_data)
    assert result["after"] == evaluate(end.method.eval().encoder, tiny_data)
    assert result["before"] == end.before
    assert result["config"] == plain(config)
    assert set(result["versions"]) == {"fastproto", "torch", "numpy", "python"}

    log = read_log(tmp_path)
    assert [row["epoch"] for row in log] == [1, 2]
    for row in log:
        terms = [value for name, value in row.items() if name.startswith("loss/") and not math.isnan(value)]
        assert row["loss"] == pytest.approx(sum(terms))
        busy = sum(row[f"time/{phase}"] for phase in ("views", "forward", "loss", "backward"))
        assert row["images_per_s"] == pytest.approx(2 * 16 / busy)
        assert row["data_wait"] == pytest.approx(row["time/views"] / busy)
        assert all(row[f"time/{phase}"] > 0 for phase in PHASES if phase != "evaluation")
    assert log[0]["time/evaluation"] > 0
    for phase in PHASES:
        assert result["time_s"][phase] >= sum(row[f"time/{phase}"] for row in log)
    assert result["time_s"]["evaluation"] > log[0]["time/evaluation"]


def test_a_finished_run_is_only_evaluated_again(
    tmp_path: Path, no_evaluation: dict[str, float], tiny_config: Config, tiny_data: Dataset
) -> None:
    loop.train(tiny_config, tiny_data, tmp_path)
    before = tensors(at_the_end(tmp_path, tiny_config, tiny_data))
    (tmp_path / "result.json").unlink()
    loop.train(tiny_config, tiny_data, tmp_path, resume=True)
    after = tensors(at_the_end(tmp_path, tiny_config, tiny_data))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "result.json").read_text())["after"] == no_evaluation


@pytest.mark.usefixtures("no_evaluation")
def test_mixed_precision_keeps_its_weights_in_float32(tmp_path: Path, tiny_config: Config, tiny_data: Dataset) -> None:
    weights, losses = [], []
    for precision in ("32-true", "bf16-mixed"):
        config = replace(tiny_config, method="simclr", precision=precision)  # type: ignore[arg-type]
        loop.train(config, tiny_data, tmp_path / precision)
        end = at_the_end(tmp_path / precision, config, tiny_data)
        weights.append(torch.cat([parameter.flatten() for parameter in end.method.encoder.parameters()]))
        losses.append(end.log[0]["loss"])
    assert weights[1].dtype == torch.float32
    assert not torch.equal(*weights)
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.usefixtures("no_evaluation")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_all_images_are_embedded_as_in_training_and_clustered_in_float32(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    lowered: dict[str, set[bool]] = {"embed_all": set(), "update": set()}

    def watch(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: object, **options: object) -> object:
            lowered[name].add(torch.is_autocast_enabled("cpu"))
            return original(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(loop, "embed_all"), watch(PrototypeBank, "update")
    config = replace(tiny_config, method="pcl", crop="contrastive", precision=precision)  # type: ignore[arg-type]
    loop.train(config, tiny_data, tmp_path)
    assert lowered == {"embed_all": {precision == "bf16-mixed"}, "update": {False}}


@pytest.mark.parametrize("method", ["byol", "moco"])
@pytest.mark.usefixtures("no_evaluation")
def test_a_batch_in_parts_is_the_mean_of_its_parts(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset, method: str
) -> None:
    config = replace(tiny_config, method=method, crop="random", epochs=1, batch_size=16, accumulate=2)
    with pytest.raises(loop.Interrupted):
        loop.train(config, tiny_data, tmp_path / "parts", stop=stop_after(1))
    found = at_the_end(tmp_path / "parts", config, tiny_data)

    state = build_state(config, tiny_data, CPU)
    views, order = build_views(config, tiny_data), np.random.default_rng((config.seed, 0)).permutation(40)[:16]
    state.method.train()
    totals: dict[str, float] = {}
    for ids in torch.from_numpy(order).split(8):
        terms = state.method(views(tiny_data.train_images[ids], ids))
        sum(terms.values()).div(2).backward()
        for name, term in terms.items():
            totals[name] = totals.get(name, 0.0) + term.item() / 2
    for group in state.optimizer.param_groups:
        group["lr"] = loop.learning_rate(config.optimizer, 0.25, 1)
    state.optimizer.step()
    state.method.after_step(0.5)
    assert {name: float(total) for name, total in found.sums.items()} == pytest.approx(totals, rel=1e-6)
    expected = state.method.state_dict()
    for name, tensor in found.method.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    if method == "moco":
        assert (found.method.queue[:16] == expected["queue"][:16]).all()


@pytest.mark.usefixtures("no_evaluation")
def test_processes_meet_once_a_step(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch in parts DDP exchanges the gradients of the last, and decides that in its forward pass."""
    apart, seen = [False], []

    @contextmanager
    def no_sync(fabric: Fabric, module: object, enabled: bool = True) -> Iterator[None]:
        apart.append(enabled)
        yield
        apart.pop()

    forward = METHODS["simclr"].forward
    monkeypatch.setattr(Fabric, "no_backward_sync", no_sync)
    monkeypatch.setattr(METHODS["simclr"], "forward", lambda *args: seen.append(apart[-1]) or forward(*args))
    config = replace(tiny_config, method="simclr", crop="random", epochs=1, accumulate=4)
    loop.train(config, tiny_data, tmp_path)
    assert seen == [True, True, True, False] * 2


@pytest.mark.usefixtures("no_evaluation")
def test_a_compiled_encoder_trains_as_another(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, compile = [], torch.compile

    def traced_only(module: object, **options: object) -> object:
        compiled.append(module)
        return compile(module, backend="eager")

    monkeypatch.setattr(torch, "compile", traced_only)
    config = replace(tiny_config, method="byol", crop="random", epochs=1)
    states = []
    for flag in (False, True):
        loop.train(replace(config, compile=flag), tiny_data, tmp_path / str(flag))
        states.append(at_the_end(tmp_path / str(flag), config, tiny_data))
    assert len(compiled) == 2  # the encoder and its target
    for name, tensor in states[0].method.state_dict().items():
        torch.testing.assert_close(states[1].method.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.usefixtures("no_evaluation")
def test_simsiams_predictor_keeps_its_learning_rate(tmp_path: Path, tiny_config: Config, tiny_data: Dataset) -> None:
    config = replace(tiny_config, method="simsiam", crop="random", epochs=2)
    with pytest.raises(loop.Interrupted):
        loop.train(config, tiny_data, tmp_path, stop=stop_after(3))
    groups = at_the_end(tmp_path, config, tiny_data).optimizer.param_groups
    rates = {(group["constant"], group["lr"]) for group in groups}
    assert rates == {(True, 0.05), (False, loop.learning_rate(config.optimizer, 1.25, 2))}


def test_the_best_checkpoint_stays(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.1, 0.2, 0.4, 0.3, 0.4, 0.2, 0.5])
    monkeypatch.setattr(loop, "evaluate", lambda *args, **options: {"knn20": next(scores), "knn200": 0.1})
    config = replace(tiny_config, method="simclr", crop="random", epochs=5, evaluation=EvaluationConfig(knn_interval=1))
    loop.train(config, tiny_data, tmp_path)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"best.pt", "epoch-0004.pt", "epoch-0005.pt"}
    assert read_checkpoint(tmp_path / "checkpoints" / "best.pt")["epoch"] == 2


@pytest.mark.usefixtures("no_evaluation")
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, tiny_config: Config, tiny_data: Dataset) -> None:
    config = replace(tiny_config, method="simclr", loss=LossConfig(contrast_weight=1e300))
    with pytest.raises(FloatingPointError, match=r"^diverged in epoch 1: loss (inf|nan), loss/contrast (inf|nan)$"):
        loop.train(config, tiny_data, tmp_path)


@pytest.mark.usefixtures("no_evaluation")
def test_boxes_are_found_by_the_trained_encoder_on_whole_images(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset
) -> None:
    config = replace(
        tiny_config, views=replace(tiny_config.views, box_warmup=1, box_interval=2, box_threshold=0.3), epochs=3
    )
    with pytest.raises(loop.Interrupted):
        loop.train(config, tiny_data, tmp_path, stop=stop_after(3))
    assert (at_the_end(tmp_path, config, tiny_data).boxes.boxes == torch.tensor([0.0, 0.0, 1.0, 1.0])).all()
    with pytest.raises(loop.Interrupted):
        loop.train(config, tiny_data, tmp_path, resume=True, stop=stop_after(1))
    encoder = at_the_end(tmp_path, config, tiny_data).method.encoder.eval()
    with pytest.raises(loop.Interrupted):
        loop.train(config, tiny_data, tmp_path, resume=True, stop=stop_after(1))
    found = at_the_end(tmp_path, config, tiny_data).boxes.boxes
    images = (tiny_data.train_images.float() / 255 - 0.3) / 0.25
    with torch.no_grad():
        expected = localize(encoder.feature_map(images), 0.3, (20, 20))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.051)
    assert (found - expected).abs().mean() < 1e-3


@pytest.mark.usefixtures("no_evaluation")
@pytest.mark.parametrize("method", ["pcl", "spcl"])
def test_prototypes_are_clusters_of_the_whole_training_set(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset, method: str
) -> None:
    config = replace(tiny_config, method=method, seed=4)  # type: ignore[arg-type]
    with pytest.raises(loop.Interrupted):
        loop.train(config, tiny_data, tmp_path, stop=stop_after(2))
    state = at_the_end(tmp_path, config, tiny_data)
    assert state.prototypes is not None
    assert not state.prototypes.ready
    method_then = state.method.eval()
    with pytest.raises(loop.Interrupted):
        loop.train(config, tiny_data, tmp_path, resume=True, stop=stop_after(1))
    found = at_the_end(tmp_path, config, tiny_data).prototypes
    assert found is not None
    images = (tiny_data.train_images.float() / 255 - 0.3) / 0.25
    with torch.no_grad():
        features = method_then.cluster_space(method_then.embed(images))
    bank = PrototypeBank(40, method_then.cluster_dim, 5, temperature=0.2, n_iter=3, n_init=1, seed=4)
    bank.update(features)
    assert torch.equal(found.assignments_0, bank.assignments_0)
    torch.testing.assert_close(found.prototypes_0, bank.prototypes_0, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.concentration_0, bank.concentration_0, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("no_evaluation")
@pytest.mark.parametrize("warmup", [0.0, 1.0, 5.0])
def test_a_run_of_one_step_learns(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset, caplog: pytest.LogCaptureFixture, warmup: float
) -> None:
    optimizer = OptimizerConfig(lr=0.05, warmup=warmup)
    config = replace(tiny_config, method="simclr", crop="random", epochs=1, batch_size=40, optimizer=optimizer)
    loop.train(config, tiny_data, tmp_path)
    (row,), state = read_log(tmp_path), at_the_end(tmp_path, config, tiny_data)
    rate = 0.05 * 0.5 / max(warmup, 1)
    assert [row["lr"], *(group["lr"] for group in state.optimizer.param_groups)] == pytest.approx([rate] * 3)
    start = build_state(config, tiny_data, CPU).method.encoder
    assert not torch.equal(next(state.method.encoder.parameters()), next(start.parameters()))
    warned = f"optimizer: no end of warmup in this run: the learning rate rises to {2 * rate:g} of 0.05"
    assert [record.getMessage() for record in caplog.records] == ([warned] if warmup else [])


def test_embedding_keeps_the_order_of_the_images(tiny_data: Dataset) -> None:
    rows = loop.embed_all(lambda images: images.flatten(1)[:, :3], tiny_data, CPU)
    expected = (tiny_data.train_images.flatten(1)[:, :3].double() / 255 - 0.3) / 0.25
    torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_embed_their_shares_in_the_order_of_the_images(
    monkeypatch: pytest.MonkeyPatch, tiny_data: Dataset, world: int
) -> None:
    def encode(images: Tensor) -> Tensor:
        return images.flatten(1)[:, :3]

    whole = loop.embed_all(encode, tiny_data, CPU)
    shares: list[Tensor] = []
    monkeypatch.setattr(_gather, "gather_rows", lambda rows: shares.append(rows) or rows.repeat(world, 1))
    for rank in range(world):
        for module in (loop, _gather):
            monkeypatch.setattr(module, "rank_and_world", lambda rank=rank: (rank, world))
        loop.embed_all(encode, tiny_data, CPU)
    # Equally many in every process.
    assert {len(share) for share in shares} == {-(-40 // world)}
    monkeypatch.setattr(_gather, "gather_rows", lambda rows: torch.cat(shares))
    torch.testing.assert_close(loop.embed_all(encode, tiny_data, CPU), whole)


@pytest.mark.parametrize("others", [0.0, 1.0])
def test_all_processes_stop_when_one_is_asked_to(monkeypatch: pytest.MonkeyPatch, others: float) -> None:
    assert loop.asked_anywhere(lambda: True, CPU)
    assert not loop.asked_anywhere(lambda: False, CPU)
    monkeypatch.setattr(loop, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(loop, "sum_over_ranks", lambda asked: asked + others)
    assert loop.asked_anywhere(lambda: True, CPU)
    assert loop.asked_anywhere(lambda: False, CPU) == (others > 0)
