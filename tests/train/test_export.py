"""Exports: what the card says loads them does, and gives the encoder's features."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastproto import cli
from fastproto.train import build, checkpoint, data
from fastproto.train.config import Config, EncoderConfig, ViewConfig
from fastproto.train.data import Dataset
from fastproto.train.export import CARD, WRITERS, export
from fastproto.train.run import Run, load_run

CPU = torch.device("cpu")


@pytest.fixture
def make_run(tmp_path: Path, tiny_config: Config, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch):
    def make(encoder: str, width: int | None = None, side: int = 20) -> Run:
        def grown(images: Tensor) -> Tensor:
            return nn.functional.interpolate(images.float(), side).byte()

        images = {name: grown(getattr(tiny_data, name)) for name in ("train_images", "test_images")}
        monkeypatch.setattr(data, "load", lambda *args, **options: replace(tiny_data, **images))
        config = replace(
            tiny_config, encoder=EncoderConfig(encoder, width), views=ViewConfig(size=side), method="simclr", seed=3
        )
        checkpoint.start_folder(tmp_path, config)
        state = build.build_state(config, data.load("made"), CPU)
        for norm in (module for module in state.method.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_mean.uniform_(-0.1, 0.1)
        state.save(tmp_path)
        return load_run(tmp_path)

    return make


def load_as_the_card_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / CARD).read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code, names)
    return names["network"].eval()


@pytest.mark.parametrize(
    ("to", "encoder", "width", "side"),
    [
        ("torchvision", "resnet18", None, 20),
        ("torchvision", "resnet18", 64, 80),
        ("timm", "resnet18", None, 20),
        ("timm", "timm/vit_tiny_patch16_224", None, 32),
        ("timm", "timm/convnext_atto", None, 32),
        ("safetensors", "resnet-tiny", 8, 20),
        ("safetensors", "resnet18", 12, 20),
    ],
)
def test_what_the_card_says_loads_the_same_features(
    make_run, monkeypatch: pytest.MonkeyPatch, to: str, encoder: str, width: int | None, side: int
) -> None:
    run = make_run(encoder, width, side)
    path = export(run.path, to)
    assert path == run.path / "export" / WRITERS[to][0]
    network = load_as_the_card_says(path.parent, monkeypatch)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = run.method.encoder.feature_map(images)
        if to == "safetensors":
            found = network.feature_map(images)
        elif to == "timm":
            found = network.forward_features(images)
            if found.ndim == 3:
                found = found[:, 1:].transpose(1, 2).unflatten(2, expected.shape[2:])
        else:
            found, expected = network(images), expected.mean((2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # torch 2.11's own
def test_onnx_gives_the_features_of_any_number_of_images(make_run) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    run = make_run("resnet-tiny", 8)
    model = onnx.load(export(run.path, "onnx"))
    onnx.checker.check_model(model)
    images = torch.randn(3, 3, 20, 20)
    (found,) = ReferenceEvaluator(model).run(None, {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), run.method.encoder(images))


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(
    make_run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    run = make_run("resnet-tiny", 8)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["export", str(run.path), "--to", "onnx"]) == 1
    line = capsys.readouterr().err
    assert package in line
    assert line.endswith('it comes with pip install ".[export]" in the folder of fastproto\'s source\n')
    assert not (run.path / "export").exists()


def test_the_card_knows_all_files_the_scores_and_the_pixels(make_run) -> None:
    run = make_run("resnet18")
    assert "Nothing is known of the accuracy" in export(run.path, "torchvision").with_name(CARD).read_text()
    state = build.build_state(run.config, run.dataset, CPU)
    state.before, state.epoch = {"knn20": 0.25, "linear": 0.3}, run.config.epochs
    state.save(run.path)
    (run.path / "result.json").write_text('{"before": {"knn20": 0.25}, "after": {"knn20": 0.5}}')
    text = export(run.path, "safetensors").with_name(CARD).read_text()
    assert "| knn20 | 25.0 % | 50.0 % |" in text
    assert "resnet18, trained without labels by simclr on made" in text
    assert "minus the mean (0.300000, 0.300000, 0.300000), divided by (0.250000, 0.250000, 0.250000)" in text
    assert "(N, 512)" in text
    files = ("torchvision.pt", "encoder.safetensors", "timm.safetensors")
    assert [name in text for name in files] == [True, True, False]


def test_another_checkpoint_has_its_own_weights_and_scores_and_no_data_are_read(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run("resnet-tiny", 8)
    state = build.build_state(run.config, run.dataset, CPU)
    state.method.encoder.trunk[1].bias.data.fill_(0.5)
    state.before, state.epoch, state.log = {"knn20": 0.25}, 1, [{"epoch": 1.0, "knn20": 0.375, "loss": 2.0}]
    best = state.save(run.path, keep=3)
    state.method.encoder.trunk[1].bias.data.fill_(0.75)
    state.epoch, state.step = 2, 1
    state.save(run.path, keep=3)
    monkeypatch.setattr(data, "load", lambda *args, **options: pytest.fail("the data are gone"))
    found = {}
    for options in ([], ["--checkpoint", str(best)]):
        assert cli.main(["export", str(run.path), "--to", "safetensors", *options]) == 0
        path = Path(capsys.readouterr().out.strip())
        found[bool(options)] = load_file(path)["trunk.1.bias"], path.with_name(CARD).read_text()
    assert [float(found[which][0].mean()) for which in (False, True)] == [0.75, 0.5]
    assert "Nothing is known of the accuracy of these weights." in found[False][1]
    assert "| knn20 | 25.0 % | 37.5 % |" in found[True][1]
    # Of another run at its end: what this one's result says is not said of it.
    state.epoch, state.step, state.log = run.config.epochs, 0, [{"epoch": 9.0, "knn20": 0.5, "loss": 2.0}]
    (run.path / "result.json").write_text('{"after": {"knn20": 0.75}}')
    for folder, score in ((run.path, 75), (tmp_path / "other", 50)):
        folder.mkdir(exist_ok=True)
        path = state.save(folder, keep=3)
        assert cli.main(["export", str(run.path), "--to", "safetensors", "--checkpoint", str(path)]) == 0
        text = Path(capsys.readouterr().out.strip()).with_name(CARD).read_text()
        assert f"| knn20 | 25.0 % | {score}.0 % |" in text
    assert cli.main(["export", str(run.path), "--to", "safetensors", "--checkpoint", "elsewhere.pt"]) == 2
    assert "checkpoint expected a file, such as" in capsys.readouterr().err


def test_bad_input_is_refused_and_leaves_nothing(make_run, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("resnet-tiny", 8)
    for to, message in (
        ("torchvision", "to expected safetensors or onnx: torchvision has no resnet-tiny"),
        ("timm", "to expected safetensors or onnx: timm has no resnet-tiny"),
        ("keras", "argument --to: invalid choice: 'keras'"),
    ):
        assert cli.main(["export", str(run.path), "--to", to]) == 2
        assert capsys.readouterr().err.startswith(f"fastproto export: {message}")
    assert not (run.path / "export").exists()
    (run.path / "export").mkdir()
    (run.path / "export" / CARD).write_text("# What I think of it\n")
    with pytest.raises(ValueError, match="export: run expected one whose export holds no page of another's"):
        export(run.path, "safetensors")
    assert [path.name for path in (run.path / "export").iterdir()] == [CARD]
    (run.path / "export" / CARD).unlink()
    narrow = make_run("resnet18", 16)
    with pytest.raises(ValueError, match="torchvision has no resnet18 of width 16"):
        export(narrow.path, "torchvision")
    with pytest.raises(ValueError, match="export: to expected one of torchvision, timm, safetensors, onnx, got keras"):
        export(narrow.path, "keras")
