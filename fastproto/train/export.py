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
from fastproto.train.build import Run, load_run
from fastproto.train.encoders import RESNET_WIDTH, RESNETS, TIMM, has_small_stem
from fastproto.train.files import write_text, write_whole

CARD = "README.md"


def export(run: Path | str, to: str) -> Path:
    """Writes the encoder at the run's last checkpoint, and a model card beside it that says how to load it.

    Args:
        run: folder of the run; its data have to be where they were.
        to: ``"torchvision"``: a state dict in the names of torchvision's ResNet without ``fc``, export/torchvision.pt;
            ``"timm"``: one in timm's names without a head, export/timm.safetensors;
            ``"safetensors"``: one in the names of ``build_encoder``'s encoders, export/encoder.safetensors;
            ``"onnx"``: the graph of images (N, 3, H, W) to features (N, C), export/encoder.onnx.

    Returns:
        The file. It and the card replace what an earlier export of the same kind left.

    Raises:
        ValueError: another ``to``, an encoder that the other library does not have, no run.
        ModuleNotFoundError: for "onnx", without the packages of the extra [export].
    """
    expect(to in WRITERS, "export", "to", f"one of {', '.join(WRITERS)}", to)
    loaded = load_run(run)
    name, write = WRITERS[to]
    folder = loaded.path / "export"
    content = write(loaded)
    folder.mkdir(exist_ok=True)
    write_whole(folder / name, content)
    present = [kind for kind, (file, _) in WRITERS.items() if (folder / file).is_file()]
    write_text(folder / CARD, card(loaded, present))
    return folder / name


Content = Callable[[BinaryIO], object]


def _torchvision(run: Run) -> Content:
    name = run.config.encoder.name
    expect(name in RESNETS, "export", "to", f"timm, safetensors or onnx: torchvision has no {name}", "torchvision")
    _expect_full_width(run, "torchvision")
    weights = _weights(run, "trunk.")
    return lambda file: torch.save(weights, file)


def _timm(run: Run) -> Content:
    name = run.config.encoder.name
    known = name in RESNETS or name.startswith(TIMM)
    expect(known, "export", "to", f"safetensors or onnx: timm has no {name}", "timm")
    _expect_full_width(run, "timm")
    # timm's ResNets have torchvision's names.
    return _safetensors_of(_weights(run, "trunk." if name in RESNETS else "trunk.network."))


def _expect_full_width(run: Run, to: str) -> None:
    width = run.config.encoder.width
    wanted = f"safetensors or onnx: {to} has no {run.config.encoder.name} of width {width}"
    expect(width in (None, RESNET_WIDTH), "export", "to", wanted, to)


def _safetensors(run: Run) -> Content:
    return _safetensors_of(_weights(run, ""))


def _safetensors_of(weights: dict[str, Tensor]) -> Content:
    from safetensors.torch import save

    return lambda file: file.write(save(weights, {"format": "pt", "producer": f"fastproto {fastproto.__version__}"}))


def _onnx(run: Run) -> Content:
    # The exporter needs both, and says so only after its tracing.
    for package in ("onnx", "onnxscript"):
        importlib.import_module(package)
    encoder = run.method.encoder
    # A batch of two: the exporter takes a dimension of one for a constant.
    images = torch.zeros(2, 3, *_image_size(run))
    program = torch.onnx.export(
        encoder,
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


def _weights(run: Run, prefix: str) -> dict[str, Tensor]:
    """The encoder's tensors under a prefix, without it, in the default layout."""
    weights = run.method.encoder.state_dict()
    return {
        name.removeprefix(prefix): tensor.contiguous() for name, tensor in weights.items() if name.startswith(prefix)
    }


def _image_size(run: Run) -> tuple[int, int]:
    return run.dataset.train_images.shape[2], run.dataset.train_images.shape[3]


WRITERS: dict[str, tuple[str, Callable[[Run], Content]]] = {
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

network = timm.create_model("$timm", num_classes=0, global_pool=""$options)
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


def card(run: Run, kinds: list[str]) -> str:
    """The model card, in Markdown with the header that model hubs read."""
    config, data = run.config, run.dataset
    name, (height, across) = config.encoder.name, _image_size(run)
    size = config.views.size or height
    small = has_small_stem(name, size, config.encoder.stem)
    options = getattr(run.method.encoder.trunk, "options", {})
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
        f"| {metric} | {100 * run.result['before'][metric]:.1f} % | {100 * score:.1f} % |"
        for metric, score in run.result.get("after", {}).items()
        if metric in run.result.get("before", {})
    ]
    table = ["| on the test images | random weights | these weights |", "| --- | --- | --- |", *scores]
    lines = [
        "---",
        "library_name: fastproto",
        "tags: [self-supervised, contrastive, image-feature-extraction]",
        "---",
        "",
        f"# {name}, trained without labels by {config.method} on {data.name}",
        "",
        f"{len(run.log)} of {config.epochs} epochs, batches of {config.batch_size}, {config.crop} crops, seed "
        f"{config.seed}; fastproto {fastproto.__version__}. All settings: `config.yaml` of the run.",
        "",
        *(table if scores else ["The run has not ended: nothing is known of its accuracy."]),
        "",
        "## Input and output",
        "",
        f"RGB images (N, 3, {height}, {across}), divided by 255, minus the mean {_numbers(data.mean)}, divided by "
        f"{_numbers(data.std)}. Features are the mean over space of the last feature map: (N, "
        f"{run.method.encoder.num_features}).",
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
