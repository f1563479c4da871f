"""What is measured while a run goes on: that it is right, that it changes nothing, and where it is written."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from train._runs import at_the_end, stop_after

from fastproto.train import checkpoint, loop
from fastproto.train.build import build_state, check_buildable
from fastproto.train.checkpoint import State
from fastproto.train.config import Config, EvaluationConfig, difference
from fastproto.train.data import Dataset
from fastproto.train.evaluate import KNN, embed, evaluate
from fastproto.train.files import read_log
from fastproto.train.monitors import MONITORS, embedding_monitors, prototype_monitors

CPU = torch.device("cpu")
EMBEDDING = ["embedding_std", "effective_rank"]
WATCHED = [*MONITORS, *KNN]


@pytest.fixture
def watched_config(tiny_config: Config) -> Config:
    return replace(tiny_config, method="pcl", epochs=3, evaluation=EvaluationConfig(knn_interval=2))


def tensors(state: State) -> dict[str, Tensor]:
    found = state.method.state_dict() | state.boxes.state_dict()
    return found | (state.prototypes.state_dict() if state.prototypes else {})


def watched(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: row[name] for name in WATCHED if name in row} for row in log]


def test_a_watched_run_is_the_same_run(tmp_path: Path, watched_config: Config, tiny_data: Dataset) -> None:
    ends = []
    for interval in (0, 1):
        config = replace(watched_config, evaluation=EvaluationConfig(knn_interval=interval))
        loop.train(config, tiny_data, tmp_path / str(interval))
        ends.append(at_the_end(tmp_path / str(interval), config, tiny_data))
    without, with_knn = map(tensors, ends)
    assert [name for name in without if not torch.equal(without[name], with_knn[name])] == []
    assert [row["loss"] for row in ends[0].log] == [row["loss"] for row in ends[1].log]
    assert all(name not in row for row in ends[0].log for name in KNN)


def test_the_log_holds_what_was_watched(tmp_path: Path, watched_config: Config, tiny_data: Dataset) -> None:
    result = loop.train(watched_config, tiny_data, tmp_path)
    log = read_log(tmp_path)
    end = at_the_end(tmp_path, watched_config, tiny_data)
    # Prototypes are found before the second epoch and the third, neighbours asked after the second.
    known = [[name for name in WATCHED if not math.isnan(row[name])] for row in log]
    assert known == [EMBEDDING, WATCHED, list(MONITORS)]
    board = EventAccumulator(str(tmp_path)).Reload()
    for name in WATCHED:
        events = [(event.step, event.value) for event in board.Scalars(name)]
        rows = [(int(row["epoch"]), row[name]) for row in log if not math.isnan(row[name])]
        assert events == [(step, pytest.approx(value)) for step, value in rows]

    method = end.method.eval()
    embeddings = embed(method.project, tiny_data.train_images, tiny_data.mean, tiny_data.std)
    assert embeddings.shape == (40, 8)
    expected = embedding_monitors(embeddings)
    assert {name: log[2][name] for name in EMBEDDING} == pytest.approx(expected)
    assert {name: end.log[1][name] for name in KNN} == {name: log[1][name] for name in KNN}

    scores = [(row["epoch"], row) for row in log if not math.isnan(row["knn20"])] + [(3, result["after"])]
    for name in KNN:
        best = max(row[name] for _, row in scores)
        first = next(epoch for epoch, row in scores if row[name] == best)
        assert result["best"][name] == {"accuracy": best, "epoch": first}
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_neighbours_and_clusters_are_those_of_their_epoch(
    tmp_path: Path, watched_config: Config, tiny_data: Dataset
) -> None:
    with pytest.raises(loop.Interrupted):
        loop.train(watched_config, tiny_data, tmp_path, stop=stop_after(2))
    method = at_the_end(tmp_path, watched_config, tiny_data).method.eval()
    features = embed(method.embed, tiny_data.train_images, tiny_data.mean, tiny_data.std)
    with pytest.raises(loop.Interrupted):
        loop.train(watched_config, tiny_data, tmp_path, resume=True, stop=stop_after(2))
    state = at_the_end(tmp_path, watched_config, tiny_data)
    assert state.prototypes is not None
    found = state.prototypes.lookup(torch.arange(40))
    expected = prototype_monitors(features, *(first for first, *_ in found))
    assert state.clustering == pytest.approx(expected, rel=1e-4)
    encoder = state.method.eval().encoder
    loop.train(watched_config, tiny_data, tmp_path, resume=True)
    row = at_the_end(tmp_path, watched_config, tiny_data).log[1]
    assert {name: row[name] for name in state.clustering} == state.clustering
    assert {name: row[name] for name in KNN} == evaluate(encoder, tiny_data, metrics=KNN)


def test_an_interrupted_run_watches_the_same(tmp_path: Path, watched_config: Config, tiny_data: Dataset) -> None:
    loop.train(watched_config, tiny_data, tmp_path / "whole")
    expected = watched(at_the_end(tmp_path / "whole", watched_config, tiny_data).log)
    assert [len(row) for row in expected] == [2, 8, 6]
    for stops in ((3, 1), (4,), (6,)):
        folder = tmp_path / "-".join(map(str, stops))
        for attempt, steps in enumerate(stops):
            with pytest.raises(loop.Interrupted):
                loop.train(watched_config, tiny_data, folder, resume=attempt > 0, stop=stop_after(steps))
        loop.train(watched_config, tiny_data, folder, resume=True)
        assert watched(at_the_end(folder, watched_config, tiny_data).log) == expected


def test_of_few_images_few_are_watched(
    monkeypatch: pytest.MonkeyPatch, tiny_config: Config, tiny_data: Dataset
) -> None:
    seen: list[Tensor] = []
    rows = torch.ones(1, 1)
    monkeypatch.setattr(loop, "embed", lambda *args, ids, **options: seen.append(ids) or rows)
    state = build_state(tiny_config, tiny_data, CPU)
    for count, most, expected in ((40, 512, 40), (4000, 512, 125), (20000, 512, 512), (20000, 100, 100)):
        images = torch.arange(count).view(count, 1, 1, 1)
        monkeypatch.setattr(loop, "WATCHED", most)
        loop.watch(tiny_config, state, replace(tiny_data, train_images=images), CPU)
        assert seen[-1].tolist() == [i * count // expected for i in range(expected)]


def test_how_a_run_is_watched_may_change_and_never_means_less_than_never(watched_config: Config) -> None:
    assert difference(watched_config, replace(watched_config, evaluation=EvaluationConfig(), wandb=True)) == ""
    with pytest.raises(ValueError, match="evaluation: knn_interval expected a number >= 0, got int -1"):
        EvaluationConfig(knn_interval=-1)


def test_embeddings_that_are_not_finite_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: Config, tiny_data: Dataset
) -> None:
    project = loop.Method.project
    monkeypatch.setattr(loop.Method, "project", lambda self, images: project(self, images) / 0)
    with pytest.raises(FloatingPointError, match=r"^diverged in epoch 1: embeddings are not finite$"):
        loop.train(tiny_config, tiny_data, tmp_path)


def test_a_run_begun_before_there_were_monitors_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched_config: Config, tiny_data: Dataset
) -> None:
    monkeypatch.setattr(checkpoint, "VALUES", tuple(name for name in checkpoint.VALUES if name != "clustering"))
    with pytest.raises(loop.Interrupted):
        loop.train(watched_config, tiny_data, tmp_path, stop=stop_after(3))
    monkeypatch.undo()
    loop.train(watched_config, tiny_data, tmp_path, resume=True)
    assert [list(row) for row in watched(at_the_end(tmp_path, watched_config, tiny_data).log)] == [
        EMBEDDING,
        [*EMBEDDING, *KNN],
        list(MONITORS),
    ]


class FakeWandb:
    """What the loop uses of wandb."""

    def __init__(self) -> None:
        self.options: list[dict] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.ended = 0

    def init(self, **options: object) -> FakeWandb:
        self.options.append(options)
        return self

    def log(self, row: dict[str, float], step: int) -> None:
        self.rows.append((step, dict(row)))

    def __enter__(self) -> FakeWandb:
        return self

    def __exit__(self, *error: object) -> None:
        self.ended += 1


def test_weights_and_biases_hears_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched_config: Config, tiny_data: Dataset
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fake.init))
    config = replace(watched_config, wandb=True)
    with pytest.raises(loop.Interrupted):
        loop.train(config, tiny_data, tmp_path, stop=stop_after(3))
    loop.train(config, tiny_data, tmp_path, resume=True)
    assert fake.rows == [(row["epoch"], row) for row in at_the_end(tmp_path, config, tiny_data).log]
    assert fake.ended == 2
    assert fake.options[0]["group"] == tmp_path.name
    assert fake.options[0]["dir"] == str(tmp_path)
    assert fake.options[0]["config"]["optimizer"]["lr"] == 0.05


def test_without_being_asked_for_wandb_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: Config, tiny_data: Dataset
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    loop.train(replace(tiny_config, epochs=1), tiny_data, tmp_path)
    with pytest.raises(ModuleNotFoundError, match="wandb"):
        check_buildable(replace(tiny_config, wandb=True), tiny_data)
