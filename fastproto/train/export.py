"""A run's encoder for use elsewhere: RUN/export/ with the weights in other libraries' names, and a model card."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import BinaryIO

import torch
from torch import Tensor

import fastproto
from fastproto._check import expect
from fastproto.train.checkpoint import CARD, CARD_HEAD, is_foreign_card
from fastproto.train.encoders import RESNET_WIDTH, RESNETS, TIMM, has_small_stem
from fastproto.train.files import write_text, write_whole
from fastproto.train.run import Trained, load_trained


def export(run: Path | str, to: str, checkpoint: Path | None = None) -> Path:
    """Writes a run's encoder, and a model card beside it that says how to load it. The run's data are not needed.

    Args:
        run: folder of the run.
        to: ``"torchvision"``: a state dict in the names of torchvision's ResNet without ``fc``, export/torchvision.pt;
            ``"timm"``: one in timm's names without a head, export/timm.safetensors;
            ``"safetensors"``: one in the names of ``build_encoder``'s encoders, export/encoder.safetensors;
            ``"onnx"``: the graph of images (N, 3, H, W) to features (N, C), export/encoder.onnx.
        checkpoint: which of the run's; None: the last.

    Returns:
        The file. It and the card replace what an earlier export of the same kind left.

    Raises:
        ValueError: another ``to``, an encoder that the other library does not have, no run, no such checkpoint.
        ModuleNotFoundError: for "onnx", without the packages of the extra [export].
    """
    expect(to in WRITERS, "export", "to", f"one of {', '.join(WRITERS)}", to)
    loaded = load_trained(run, checkpoint)
    name, write = WRITERS[to]
    folder = loaded.path / "export"
    ours = not is_foreign_card(folder / CARD)
    expect(ours, "export", "run", "one whose export holds no page of another's", str(folder / CARD))
    content = write(loaded)
    folder.mkdir(exist_ok=True)
    write_whole(folder / name, content)
    present = [kind for kind, (file, _) in WRITERS.items() if (folder / file).is_file()]
    write_text(folder / CARD, card(loaded, present))
    return folder / name


Content = Callable[[BinaryIO], object]


def _torchvision(run: Trained) -> Content:
    name = run.config.encoder.name
    others = "timm, safetensors or onnx" if name.startswith(TIMM) else "safetensors or onnx"
    expect(name in RESNETS, "export", "to", f"{others}: torchvision has no {name}", "torchvision")
    _expect_full_width(run, "torchvision")
    weights = _weights(run, "trunk.")
    return lambda file: torch.save(weights, file)


def _timm(run: Trained) -> Content:
    name = run.config.encoder.name
    known = name in RESNETS or name.startswith(TIMM)
    expect(known, "export", "to", f"safetensors or onnx: timm has no {name}", "timm")
    _expect_full_width(run, "timm")
    # timm's ResNets have torchvision's names.
    return _safetensors_of(_weights(run, "trunk." if name in RESNETS else "trunk.network."))


def _expect_full_width(run: Trained, to: str) -> None:
    width = run.config.encoder.width
    wanted = f"safetensors or onnx: {to} has no {run.config.encoder.name} of width {width}"
    expect(width in (None, RESNET_WIDTH), "export", "to", wanted, to)


def _safetensors(run: Trained) -> Content:
    return _safetensors_of(_weights(run, ""))


def _safetensors_of(weights: dict[str, Tensor]) -> Content:
    from safetensors.torch import save

    return lambda file: file.write(save(weights, {"format": "pt", "producer": f"fastproto {fastproto.__version__}"}))


def _onnx(run: Trained) -> Content:
    # The exporter needs both, and says so only after its tracing.
    for package in ("onnx", "onnxscript"):
        importlib.import_module(package)
    # A batch of two: the exporter takes a dimension of one for a constant.
    images = torch.zeros(2, 3, *run.size)
    program = torch.onnx.export(
        run.encoder,
        (images,),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: "N"},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    graph = program.model_proto.SerializeToString()
    return lambda file: file.write(graph)


def _weights(run: Trained, prefix: str) -> dict[str, Tensor]:
    """The encoder's tensors under a prefix, without it, in the default layout."""
    weights = run.encoder.state_dict()
    return {
        name.removeprefix(prefix): tensor.contiguous() for name, tensor in weights.items() if name.startswith(prefix)
    }


WRITERS: dict[str, tuple[str, Callable[[Trained], Content]]] = {
    "torchvision": ("torchvision.pt", _torchvision),
    "timm": ("timm.safetensors", _timm),
    "safetensors": ("encoder.safetensors", _safetensors),
    "onnx": ("encoder.onnx", _onnx),
}

# How each file is loaded, as Python that runs in the folder of the export.
LOADERS = {
    "torchvision": """import torch, torchvision

network = torchvision.models.$name()
${stem}network.fc = torch.nn.Identity()
network.load_state_dict(torch.load("torchvision.pt"))""",
    "timm": """import timm, torch
from safetensors.torch import load_file

network = timm.create_model("$timm", num_classes=0$options)
${stem}network.load_state_dict(load_file("timm.safetensors"))
# network.forward_features(images) is the last feature map; network(images) may put untrained layers behind it""",
    "safetensors": """from fastproto.train.encoders import build_encoder
from safetensors.torch import load_file

network = build_encoder("$name", image_size=$size, width=$width, stem="$small")
network.load_state_dict(load_file("encoder.safetensors"))""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("encoder.onnx")
(features,) = session.run(None, {"images": images})      # NumPy float32 (N, 3, $height, $across)""",
}

SMALL_STEM = """network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
network.maxpool = torch.nn.Identity()
"""


def card(run: Trained, kinds: list[str]) -> str:
    """The model card, in Markdown with the header that model hubs read."""
    config = run.config
    name, (height, across) = config.encoder.name, run.size
    size = config.views.size or height
    small = has_small_stem(name, size, config.encoder.stem)
    options = getattr(run.encoder.trunk, "options", {"global_pool": ""})
    fields = {
        "name": name,
        "timm": name.removeprefix(TIMM),
        "options": "".join(f", {key}={value!r}" for key, value in options.items()),
        "stem": SMALL_STEM if small else "",
        "size": size,
        "small": config.encoder.stem,
        "width": config.encoder.width,
        "height": height,
        "across": across,
    }
    loaders = [f"```python\n{Template(LOADERS[kind]).substitute(fields)}\n```" for kind in kinds]
    scores = [
        f"| {metric} | {100 * before:.1f} % | {100 * after:.1f} % |" for metric, (before, after) in run.scores.items()
    ]
    table = ["| on the test images | random weights | these weights |", "| --- | --- | --- |", *scores]
    lines = [
        CARD_HEAD,
        f"# {name}, trained without labels by {config.method} on {run.data}",
        "",
        f"{run.epoch} of {config.epochs} epochs, batches of {config.batch_size}, {config.crop} crops, seed "
        f"{config.seed}; fastproto {fastproto.__version__}. All settings: `config.yaml` of the run.",
        "",
        *(table if scores else ["Nothing is known of the accuracy of these weights."]),
        "",
        "## Input and output",
        "",
        f"RGB images (N, 3, {height}, {across}), divided by 255, minus the mean {_numbers(run.mean)}, divided by "
        f"{_numbers(run.std)}. Features are the mean over space of the last feature map: (N, "
        f"{run.encoder.num_features}).",
        "",
        "## Loading",
        "",
        "\n\n".join(loaders),
        "",
        "## Limits",
        "",
        "The features were learnt from these images alone and carry their biases; nothing was tuned or tested for "
        "decisions about people.",
        "",
    ]
    return "\n".join(lines)


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.6f}" for value in values) + ")"
