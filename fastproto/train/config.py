"""Every setting of a training run, once: these dataclasses are the command line, the recipes and config.yaml."""

from __future__ import annotations

import glob
import math
import re
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from fastproto._check import expect

# One file per method. They import this one, so that only their names are looked at here.
METHOD_NAMES = sorted(path.stem for path in (Path(__file__).parent / "methods").glob("[!_]*.py"))
MethodName = Literal[tuple(METHOD_NAMES)]  # type: ignore[valid-type]
CropName = Literal["random", "contrastive", "simc"]

# Where a run computes, where its data lies, what it keeps and how it is watched may change between a run and its
# continuation, and nothing else.
MACHINE = ("device", "data_root", "workers", "strict", "compile", "keep", "wandb", "evaluation.knn_interval")


@dataclass(frozen=True)
class EncoderConfig:
    """The backbone.

    Args:
        name: resnet-tiny, made for small images on a CPU; torchvision's resnet18, 34, 50, 101 or 152; or timm/NAME.
        width: channels of the first stage, at least 8; null: 32 for resnet-tiny, 64 for torchvision's networks. timm's
            have their own.
        stem: of torchvision's networks: small keeps the resolution (3x3, no pooling), large is torchvision's (7x7 and
            pooling); auto: small for views up to 64 px.
        zero_init: of torchvision's networks: the last normalisation of each residual branch starts at 0.
    """

    name: str = "resnet18"
    width: int | None = None
    stem: Literal["auto", "small", "large"] = "auto"
    zero_init: bool = False

    def __post_init__(self) -> None:
        if self.width is not None:
            _expect_at_least(8, "encoder", width=self.width)


@dataclass(frozen=True)
class HeadConfig:
    """Projection head, and predictor for byol and simsiam.

    Args:
        hidden: units of the hidden layer.
        dim: size D of the embedding.
        layers: of the projection head.
        last_norm: the embedding is normalised over the batch, as in MoCo v3 (moco, pcl, pauc).
    """

    hidden: int = 512
    dim: int = 128
    layers: int = 2
    last_norm: bool = True

    def __post_init__(self) -> None:
        _expect_at_least(1, "head", hidden=self.hidden, dim=self.dim, layers=self.layers)


@dataclass(frozen=True)
class ViewConfig:
    """The two views of an image, and the boxes that guide their crops.

    Args:
        size: side of a view in pixels; null: the height of the data's images.
        scale: least and greatest share of the image's area in a crop.
        ratio: least and greatest aspect ratio of a crop.
        alpha: of the Beta distribution that places guided crops: 1 uniform, less than 1 suppresses the centre. Until
            there are boxes, crops are uniform.
        augment: what follows the crop: colours as in SimCLR or MoCo v2, or "none".
        jitter: strengths of brightness, contrast, saturation and hue.
        blur: probability of Gaussian blur, one number or one for each view; null: 0.5 for moco, and for simclr above
            64 px.
        solarize: probability of solarisation, one number or one for each view.
        box_threshold: share of the heat above which a pixel belongs to the box.
        box_warmup: epochs before the first boxes are found (--crop contrastive).
        box_interval: epochs from then on until they are found again.
    """

    size: int | None = None
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    alpha: float = 0.6
    augment: Literal["simclr", "moco", "none"] = "simclr"
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    blur: float | tuple[float, float] | None = None
    solarize: float | tuple[float, float] = 0.0
    box_threshold: float = 0.1
    box_warmup: int = 40
    box_interval: int = 40

    def __post_init__(self) -> None:
        if self.size is not None:
            _expect_at_least(1, "views", size=self.size)
        threshold = self.box_threshold
        expect(0 <= threshold < 1, "views", "box_threshold", "a number from 0 to below 1", threshold)
        _expect_at_least(1, "views", box_interval=self.box_interval)
        _expect_at_least(0, "views", box_warmup=self.box_warmup)


@dataclass(frozen=True)
class PrototypeConfig:
    """Clustering of the training set, for pcl, spcl and pauc.

    Args:
        num: prototypes K, one number per prototype set; spcl takes one set.
        warmup: epochs before the first clustering; until then the contrast is the whole loss.
        interval: epochs between two clusterings.
        n_iter: k-means iterations.
        n_init: k-means starts, of which the best is kept.
        whiten_dim: dimensions kept when spcl whitens its features by PCA; fewer where the features have fewer.
        temperature: mean of the concentrations.
        negatives: other prototypes, drawn in each step, that an image is to be told from (pcl, pauc); null: all.
        warm_start: begin a clustering with the centres of the one before; takes fewer iterations to the same objective.
    """

    num: tuple[int, ...] = (512,)
    warmup: int = 20
    interval: int = 1
    n_iter: int = 20
    n_init: int = 1
    whiten_dim: int = 256
    temperature: float = 0.2
    negatives: int | None = None
    warm_start: bool = False

    def __post_init__(self) -> None:
        expect(len(self.num) > 0 and min(self.num) > 0, "prototypes", "num", "one or more numbers >= 1", self.num)
        _expect_at_least(0, "prototypes", warmup=self.warmup)
        _expect_at_least(1, "prototypes", interval=self.interval, n_iter=self.n_iter, n_init=self.n_init)
        _expect_at_least(1, "prototypes", whiten_dim=self.whiten_dim)
        holds = 0 < self.temperature < math.inf
        expect(holds, "prototypes", "temperature", "a finite number above 0", self.temperature)
        if self.negatives is not None:
            _expect_at_least(0, "prototypes", negatives=self.negatives)


@dataclass(frozen=True)
class TargetConfig:
    """The momentum branch, for moco, byol, pcl and pauc.

    Args:
        momentum: share of its own weights that the target keeps at a step.
        momentum_end: the same at the last step, reached along a cosine.
        queue: past keys M that serve as negatives (not byol).
        symmetric: each view is the query once and the key once, in two passes more; or, as in MoCo v2 and PCL, the
            first is the query and the second the key (not byol).
    """

    momentum: float = 0.99
    momentum_end: float = 0.99
    queue: int = 4096
    symmetric: bool = True

    def __post_init__(self) -> None:
        for name in ("momentum", "momentum_end"):
            expect(0 <= getattr(self, name) <= 1, "target", name, "a number from 0 to 1", getattr(self, name))
        _expect_at_least(1, "target", queue=self.queue)


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms; a method takes those it has.

    Args:
        temperature: of the contrast; null: the paper's, 0.5 for simclr and spcl, 0.2 for moco, pcl and pauc.
        contrast_weight: of NT-Xent or InfoNCE.
        prototype_weight: of ProtoNCE (pcl, pauc) or the prototype cross-entropy (spcl).
        metric_weight: of the siamese metric (spcl).
        align_weight: of the alignment of batch prototypes (pauc).
        uniform_weight: of the uniformity of batch prototypes (pauc).
        correlation_weight: of the correlation of batch prototypes (pauc); "cross" is a sum over head.dim dimensions.
        correlation: its form: "cross" between the two views, or "covariance" within each (pauc).
    """

    temperature: float | None = None
    contrast_weight: float = 1.0
    prototype_weight: float = 1.0
    metric_weight: float = 1.0
    align_weight: float = 1.0
    uniform_weight: float = 1.0
    correlation_weight: float = 0.01
    correlation: Literal["cross", "covariance"] = "cross"

    def __post_init__(self) -> None:
        holds = self.temperature is None or 0 < self.temperature < math.inf
        expect(holds, "loss", "temperature", "a finite number above 0, or null", self.temperature)
        weights = {name: value for name, value in vars(self).items() if name.endswith("_weight")}
        _expect_at_least(0, "loss", **weights)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser, and a learning rate that rises linearly and falls along a cosine to 0.

    Args:
        name: sgd with momentum, adamw, or lars: sgd whose step is scaled layer by layer, for large batches.
        lr: the highest learning rate.
        momentum: of sgd and lars.
        weight_decay: of weight matrices and kernels; biases and norms are not decayed.
        warmup: epochs until the learning rate is reached.
    """

    name: Literal["sgd", "adamw", "lars"] = "sgd"
    lr: float = 0.06
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 10.0

    def __post_init__(self) -> None:
        _expect_at_least(0, "optimizer", lr=self.lr, weight_decay=self.weight_decay, warmup=self.warmup)
        expect(0 <= self.momentum < 1, "optimizer", "momentum", "a number from 0 to below 1", self.momentum)


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on the way; before and after training everything is.

    Args:
        knn_interval: epochs between two classifications of the test images by nearest neighbours; 0: none.
    """

    knn_interval: int = 0

    def __post_init__(self) -> None:
        _expect_at_least(0, "evaluation", knn_interval=self.knn_interval)


@dataclass(frozen=True)
class Config:
    """A training run.

    Args:
        method: what is learnt from two views.
        crop: random crops, crops guided by boxes found on the way, or by one central box.
        data: digits, cifar10, cifar100, stl10, tiny-imagenet, imagenet, imagefolder:PATH or shards:PATTERN.
        data_root: folder that holds the data set's files; null: ./data.
        image_size: side of the squares that images in files are brought to, to be kept in memory, evaluated and
            clustered; null: 64 for tiny-imagenet, 224 for imagenet, else 96.
        class_list: file of the class folders to take, one a line, such as ImageNet-100's; null: all.
        test_shards: pattern of the shards for testing; null: every fifth image that has a label.
        resident: keep the squares of images in files in memory (true), or decode the files in every epoch, each at its
            own size (false); null: in memory where they take no more than 4 GiB.
        workers: processes that decode; null: the cores that are left, at most 16.
        strict: refuse a file that does not decode; otherwise it is skipped, named, and counted in the log.
        gpu_decode: the GPU decodes the JPEG files of every epoch, to slightly other colours than the processes would.
        limit: train on so many images, spread evenly over the training set; null: on all.
        epochs: passes over the training images.
        batch_size: images in a step; what is left over at the end of an epoch waits for the next.
        accumulate: parts of a batch, one after the other, whose gradients are added up; each part is contrasted and
            normalised by itself.
        seed: of weights, order, views and clustering.
        device: cpu, cuda, or auto: cuda where there is one.
        devices: processes that share every batch; under torchrun those that it starts.
        sync_norm: with several processes, batch normalisation over the whole batch.
        precision: of the network; weights stay in float32.
        compile: torch.compile the encoder; its first steps take minutes.
        keep: checkpoints that stay, the last ones; at least 2, in case that writing one goes wrong.
        wandb: log to Weights & Biases too.
        encoder: the backbone.
        head: the heads on it.
        views: crops and colours.
        prototypes: clustering.
        target: the momentum branch.
        loss: temperature and weights.
        optimizer: optimiser and learning rate.
        evaluation: on the way.
    """

    method: MethodName = "pauc"  # type: ignore[valid-type]
    crop: CropName = "contrastive"
    data: str = "digits"
    data_root: str | None = None
    image_size: int | None = None
    class_list: str | None = None
    test_shards: str | None = None
    resident: bool | None = None
    workers: int | None = None
    strict: bool = False
    gpu_decode: bool = False
    limit: int | None = None
    epochs: int = 200
    batch_size: int = 256
    accumulate: int = 1
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    sync_norm: bool = True
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    compile: bool = False
    keep: int = 2
    wandb: bool = False
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    prototypes: PrototypeConfig = field(default_factory=PrototypeConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        _expect_at_least(1, "config", epochs=self.epochs, devices=self.devices)
        _expect_at_least(2, "config", keep=self.keep)
        expect(0 <= self.seed < 2**63, "config", "seed", f"0 to {2**63 - 1}", self.seed)
        if self.image_size is not None:
            _expect_at_least(1, "config", image_size=self.image_size)
        if self.workers is not None:
            _expect_at_least(0, "config", workers=self.workers)
        _expect_at_least(1, "config", accumulate=self.accumulate)
        # One image has no other to be contrasted with, and batch normalisation no variance.
        parts = self.devices * self.accumulate
        _expect_at_least(2 * parts, "config", batch_size=self.batch_size)
        multiple = f"a multiple of devices x accumulate = {parts}"
        expect(self.batch_size % parts == 0, "config", "batch_size", multiple, self.batch_size)
        if self.limit is not None:
            _expect_at_least(self.batch_size, "config", limit=self.limit)


def config_parser(prog: str = "fastproto train") -> ArgumentParser:
    """The command-line options of a ``Config``; ``resolve`` reads what they parse."""
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(Config, None, skip={"strict"})
    parser.add_argument("--strict", action="store_true", help="refuse a file that does not decode (default: skip it)")
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str], defaults: Path | None = None) -> Namespace:
    """What the arguments say; where they say nothing, the YAML file ``defaults``; where that says nothing, ``Config``.

    Raises:
        ValueError: an argument or an entry of the file that is unknown or has the wrong type, in one line.
    """
    # As it is: jsonargparse takes them for patterns, and a ~ for a home.
    parser.default_config_files = [] if defaults is None else [glob.escape(str(defaults.absolute()))]
    try:
        return parser.parse_args(list(arguments))
    except ArgumentError as error:
        message = re.sub(r"\s*\n\s*", " ", str(error)).replace("Parser key ", "").replace("a typing.Literal", "one of ")
        message = re.sub(r"a <class '(\w+)'>", r"\1", message).replace("Expected tuple", "Expected a list, [A, ...]")
        raise ValueError(f"{defaults}: {message}" if defaults else message) from error
    except UnicodeDecodeError as error:  # it is a ValueError that names no file
        raise ValueError(f"{defaults}: expected YAML in UTF-8, got another file: {error}") from error


def resolve(parser: ArgumentParser, parsed: Namespace) -> Config:
    """The configuration among what ``parse`` returned.

    Raises:
        ValueError: a setting out of its range.
    """
    _expect_given(parsed, Config, "config")
    expect(isinstance(parsed["strict"], bool), "config", "strict", "true or false", repr(parsed["strict"]))
    for setting in fields(Config):
        if isinstance(setting.default_factory, type) and is_dataclass(setting.default_factory):
            group = parsed[setting.name]
            expect(isinstance(group, Namespace), "config", setting.name, "settings by name", group)
            _expect_given(group, setting.default_factory, setting.name)
    parsed = parser.instantiate(parsed)
    return Config(**{setting.name: parsed[setting.name] for setting in fields(Config)})


def _expect_given(parsed: Namespace, settings: type, group: str) -> None:
    """Refuses a null where a value has to be: a file of defaults is not held to the types of its nulls."""
    for name, hint in get_type_hints(settings).items():
        expect(parsed[name] is not None or type(None) in get_args(hint), group, name, "a value", "null")


def read_config(path: Path) -> Config:
    """The configuration in a YAML file.

    Raises:
        ValueError: an entry that is unknown, of the wrong type or out of its range.
    """
    parser = config_parser()
    return resolve(parser, parse(parser, [], path))


def to_yaml(config: Config) -> str:
    """The configuration as ``read_config`` reads it."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def plain(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts of numbers, strings and lists."""
    return {
        name: {key: list(entry) if isinstance(entry, tuple) else entry for key, entry in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in asdict(config).items()
    }


def difference(before: Config, now: Config) -> str:
    """The first setting in which two configurations differ, as ``name: before, now``; empty where a run may go on."""
    others = flat(now)
    # Folders and shards may be moved, with what belongs to them; a checkpoint knows what was in them.
    moved = before.data != now.data and before.data.partition(":")[0] == now.data.partition(":")[0]
    free = (*MACHINE, "data", "class_list", "test_shards") if moved else MACHINE
    for name, value in flat(before).items():
        if value != others[name] and name not in free:
            return f"{name} {value!r}, now {others[name]!r}"
    return ""


def flat(config: Config) -> dict[str, Any]:
    """The configuration with one entry per setting, ``group.name`` or ``name``."""
    return dict(_settings(plain(config)))


def _settings(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _expect_at_least(least: float, group: str, **settings: float) -> None:
    for name, value in settings.items():
        number = "a finite number" if isinstance(value, float) else "a number"
        expect(least <= value < math.inf, group, name, f"{number} >= {least}", value)
