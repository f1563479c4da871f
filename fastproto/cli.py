"""fastproto: self-supervised learning with prototypes.

  fastproto train [RECIPE] --out RUN [options]    train an encoder without labels, evaluate it before and after
  fastproto eval RUN [--knn] [--linear] [...]     evaluate the encoder of a run, add to RUN/evaluation.json
  fastproto report RUN... [--out PAGE]            write RUN/report.html, or one page that compares several runs
  fastproto export RUN --to FORMAT                write the encoder to RUN/export: torchvision, timm, onnx, safetensors
  fastproto cluster EMBEDDINGS --k K --out DIR    k-means of the rows of a .npy, .npz, .parquet or .safetensors file
  fastproto views IMAGE... --out PICTURE          boxes, crops and augmented views of images in one picture
  fastproto info                                  versions, devices, and which backend runs each operation
  fastproto --version

RECIPE is a YAML file, or the name of one that comes with the package; without it the packaged recipe for the method
and the data is taken, where there is one. Options override it: fastproto train --help lists them.

  fastproto train --method pauc --crop contrastive --data digits --out runs/demo
"""

from __future__ import annotations

import argparse
import io
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from fastproto import __version__
from fastproto._signals import StopRequest, Terminated, sigterm_as_ctrl_c

if TYPE_CHECKING:
    from fastproto.train.config import Config
    from fastproto.train.data import Dataset

# What a command needs is imported by it: `fastproto info` runs without the trainer's packages.

FAILED, REFUSED, SIGNALLED = 1, 2, 128
SIGPIPE = 13  # not in Windows' signals
METRICS = {
    "knn20": "kNN, k = 20",
    "knn200": "kNN, k = 200",
    "linear": "linear probe",
    "linear_sgd": "linear, SGD",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 1 for a loss that diverged, 2 for bad input, 130 after Ctrl-C, 143
    after SIGTERM, 141 where nobody reads the output any more.
    """
    # OpenMP reads it when torch is loaded: a waiting thread spins for some microseconds, then sleeps. Without spinning
    # an idle machine is 1.6 times slower; with libgomp's own 300 000 turns two runs on two cores are 6 times slower.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # The name of a file may hold what a terminal cannot show: it is escaped, as in errors.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    commands = {
        "train": train,
        "eval": evaluate,
        "report": report,
        "export": export,
        "cluster": cluster,
        "views": views,
        "info": info,
    }
    if command not in commands and command not in ("", "-h", "--help", "--version"):
        return fail("fastproto", f"command expected one of {', '.join(commands)}, got {command!r}")
    try:
        if command in commands:
            with sigterm_as_ctrl_c():
                code = commands[command](rest[:-1])
        else:
            print(__version__ if command == "--version" else __doc__.strip())
            code = 0 if command else REFUSED
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output has gone, as `head` does; what is left of it is for nobody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SIGNALLED + SIGPIPE
    except KeyboardInterrupt as error:
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        return fail(f"fastproto {command}", "interrupted", SIGNALLED + number)
    except ModuleNotFoundError as error:
        # A run that `views` reads needs what the trainer does.
        missing = str(error.name).split(".")[0]
        own = command == "cluster" or (command == "views" and missing in ("PIL", "matplotlib"))
        extra = "export" if missing in ("onnx", "onnxscript") else command if own else "train"
        # Not by the project's name: that of the package index is another one.
        ours = f'".[{extra}]" in the folder of fastproto\'s source'
        package = {"faiss": "faiss-cpu", "wandb": "wandb"}.get(missing, ours)
        return fail(f"fastproto {command}", f"{error}: it comes with pip install {package}", FAILED)


def train(arguments: Sequence[str]) -> int:
    """``fastproto train``: refuses bad input before anything is written, trains, prints the accuracies."""
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    from fastproto.train.data import BrokenImage
    from fastproto.train.loop import Interrupted
    from fastproto.train.loop import train as run_loop
    from fastproto.train.report import write_report

    try:
        config, dataset, folder, resume, recipe = prepare(arguments)
    except (ValueError, OSError) as error:
        return fail("fastproto train", error)
    # Several processes run all of this; one speaks.
    first = getattr(rank_zero_only, "rank", 0) == 0
    if first:
        print(f"{config.method} on {config.data}, settings of {recipe or 'no recipe'}")
    hint = f"go on with: fastproto train --out {shlex.quote(str(folder))} --resume"
    with StopRequest() as stop:
        try:
            result = run_loop(config, dataset, folder, resume=resume, stop=stop)
        except (Interrupted, KeyboardInterrupt):
            code = SIGNALLED + stop.signal
            return fail("fastproto train", f"interrupted; {hint}", code) if first else code
        except BrokenImage as error:
            # Files are too many to decode them all before the run: this one was met on the way.
            return fail("fastproto train", f"{error}; mend or remove it, then {hint}", FAILED)
        except FloatingPointError as error:
            return fail("fastproto train", f"{error}; try a smaller --optimizer.lr", FAILED)
        except BlockingIOError as error:
            return fail("fastproto train", error)
        except OSError as error:
            return fail("fastproto train", f"{error}; {hint}", FAILED)
    if not first:
        return 0
    print(f"{'':16}{'before':>8}{'after':>8}   of {config.epochs} epochs")
    for metric in result["after"]:
        values = (result[when][metric] for when in ("before", "after"))
        best = result["best"].get(metric) if config.evaluation.knn_interval else None
        also = f"   {100 * best['accuracy']:.1f}% after epoch {best['epoch']:g}" if best else ""
        print(f"{METRICS[metric]:16}" + "".join(f"{100 * value:7.1f}%" for value in values) + also)
    try:
        page = write_report(folder, dataset)
    except (ValueError, OSError) as error:
        again = f"fastproto report {shlex.quote(str(folder))}"
        return fail("fastproto train", f"{error}; trained, but not reported: {again}", FAILED)
    print(f"{sum(result['time_s'].values()):.0f} s; {page}")
    return 0


class Plan(NamedTuple):
    """What training starts from."""

    config: Config
    dataset: Dataset
    folder: Path
    resume: bool
    recipe: Path | None


def prepare(arguments: Sequence[str]) -> Plan:
    """What the command line, a recipe or the run to resume ask for, and the data. Writes nothing.

    Raises:
        ValueError: anything that training could not start with.
        OSError: a file that cannot be read.
    """
    from fastproto import _settings
    from fastproto._check import expect
    from fastproto.train import build, checkpoint, recipes
    from fastproto.train import config as settings

    parser = settings.config_parser("fastproto train")
    parser.add_argument("recipe", nargs="?", help="YAML file, or name of a packaged recipe")
    parser.add_argument("--out", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, by its own configuration")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    given = settings.parse(parser, arguments)
    if not given.out:
        raise ValueError("--out is missing: the folder of the run")
    folder = Path(given.out)
    if given.recipe is not None:
        defaults: Path | None = recipes.find_recipe(given.recipe)
    elif given.resume:
        checkpoint.resume_point(folder)
        defaults = folder / "config.yaml"
    else:
        defaults = recipes.default_recipe(given.method, given.data)
    # A file holds settings, and not what a command does with a folder.
    settings.parse(settings.config_parser("fastproto train"), [], defaults)
    config = settings.resolve(parser, settings.parse(parser, arguments, defaults))
    if _settings.torchrun_world:
        asked = config.devices in (1, _settings.torchrun_world)
        expect(asked, "config", "devices", f"{_settings.torchrun_world}, started by torchrun", config.devices)
        config = replace(config, devices=_settings.torchrun_world)
    start = checkpoint.check_folder(folder, config, resume=given.resume, overwrite=given.overwrite)
    dataset = build.load_data(config)
    build.check_buildable(config, dataset, start)
    return Plan(config, dataset, folder, given.resume, defaults)


def evaluate(arguments: Sequence[str]) -> int:
    """``fastproto eval``: the accuracies of a run's encoder, printed and added to RUN/evaluation.json."""
    import torch

    from fastproto._check import expect
    from fastproto.train.evaluate import KNN, Metric, add_evaluation, read_evaluations
    from fastproto.train.evaluate import evaluate as measure
    from fastproto.train.run import is_own, load_run

    about = "Evaluate the encoder of a run. Without --knn, --linear and --linear-sgd the first two."
    parser = Parser("fastproto eval", description=about)
    add = parser.add_argument
    add("run", type=Path, help="folder of the run")
    add("--knn", action="store_true", help="weighted nearest neighbours, k = 20 and 200")
    add("--linear", action="store_true", help="linear probe: logistic regression, by L-BFGS in at most 200 iterations")
    add("--linear-sgd", action="store_true", help="linear probe by stochastic gradient descent, 13 learning rates")
    add("--labels", type=float, default=1.0, metavar="SHARE", help="of the training images; default all have theirs")
    add("--checkpoint", type=Path, metavar="PATH", help="default the last one")
    try:
        given = parser.parse_args(arguments)
        expect(0 < given.labels <= 1, "eval", "--labels", "a share above 0, at most 1", given.labels)
        run = load_run(given.run, given.checkpoint)
        read_evaluations(given.run)  # damaged, it is refused before anything is measured
        unasked = not (given.knn or given.linear or given.linear_sgd)
        metrics: list[Metric] = [*KNN] if given.knn or unasked else []
        metrics += ["linear"] if given.linear or unasked else []
        metrics += ["linear_sgd"] if given.linear_sgd else []
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder = run.method.encoder.to(device)
        found = measure(encoder, run.dataset, metrics=metrics, labels=given.labels, device=device)
        for metric, accuracy in found.items():
            name, _, rate = metric.partition("/")
            print(f"{f'  lr {rate}' if rate else METRICS[name]:16}{100 * accuracy:7.1f}%")
        name = run.checkpoint.stem if is_own(given.run, run.checkpoint) else str(run.checkpoint)
        add_evaluation(given.run, name, given.labels, found)
    except (ValueError, OSError) as error:
        return fail("fastproto eval", error)
    return 0


def report(arguments: Sequence[str]) -> int:
    """``fastproto report``: writes RUN/report.html, or a page that compares runs."""
    from fastproto.train.compare import write_comparison
    from fastproto.train.report import write_report

    about = "Write RUN/report.html; of several runs, or with --out, a page that compares them."
    parser = Parser("fastproto report", description=about)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, metavar="PAGE", help="default compare.html, here")
    try:
        given = parser.parse_args(arguments)
        if len(given.runs) == 1 and given.out is None:
            print(write_report(*given.runs))
        else:
            print(write_comparison(given.runs, given.out or Path("compare.html")))
    except (ValueError, OSError) as error:
        return fail("fastproto report", error)
    return 0


def export(arguments: Sequence[str]) -> int:
    """``fastproto export``: writes the encoder and its model card into RUN/export."""
    from fastproto.train.export import WRITERS
    from fastproto.train.export import export as write

    parser = Parser("fastproto export", description="Write the encoder of a run, and a model card, into RUN/export.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--to", required=True, choices=tuple(WRITERS), help="for which library, or format")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="default the last one")
    try:
        given = parser.parse_args(arguments)
        print(write(given.run, given.to, given.checkpoint))
    except (ValueError, OSError) as error:
        return fail("fastproto export", error)
    return 0


def cluster(arguments: Sequence[str]) -> int:
    """``fastproto cluster``: refuses bad input before anything is computed, clusters, prints what came of it."""
    from fastproto.cluster.command import cluster_file, describe

    about = "Cluster the rows of a file by k-means. DIR gets centres, labels, concentrations, a summary and a picture."
    parser = Parser("fastproto cluster", description=about)
    add, whole, count, share = parser.add_argument, at_least(int, 0), at_least(int, 1), at_least(float, 0)
    add("embeddings", type=Path, help="float rows (N, D): .npy, .npz, .safetensors or .parquet (a column of lists)")
    add("--k", type=count, required=True, dest="n_clusters", metavar="K", help="number of clusters")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results, new or empty")
    add("--overwrite", action="store_true", help="replace the clustering in DIR")
    add("--key", "--column", metavar="NAME", help="array, tensor or column of the file, where it has several")
    add("--iterations", type=count, default=20, dest="n_iter", metavar="N", help="at most; default %(default)s")
    add("--init", default="random", metavar="START", help="random (default), k-means++, or a file of K centres")
    add("--n-init", type=count, default=1, metavar="N", help="starts, of which the best is kept; default %(default)s")
    add("--spherical", action="store_true", help="largest inner product, centres of length 1")
    add("--tol", type=share, default=0.0, metavar="SHARE", help="end once the objective changes by no more than this")
    add("--max-points-per-cluster", type=count, metavar="N", help="train on so many rows per cluster; default all rows")
    add("--seed", type=whole, default=0, metavar="N", help="of everything drawn; default %(default)s")
    add("--engine", choices=("fastproto", "faiss"), default="fastproto", help="default %(default)s")
    add("--device", help="cpu, cuda or cuda:N; default a GPU where there is one")
    try:
        given = vars(parser.parse_args(arguments))
        path, folder = given.pop("embeddings"), given.pop("out")
        summary = cluster_file(path, folder, progress=sys.stderr.isatty(), **given)
    except ValueError as error:
        return fail("fastproto cluster", error)
    except OSError as error:
        return fail("fastproto cluster", error, FAILED)
    print(describe(summary, folder))
    return 0


def views(arguments: Sequence[str]) -> int:
    """``fastproto views``: refuses bad input before anything is drawn, draws, prints the boxes."""
    from fastproto.views.boxes import SIMC_BOX
    from fastproto.views.command import check_out, describe, preview, read_images

    parser = Parser("fastproto views", description="Draw boxes, crops and augmented views of images.")
    add, whole, count = parser.add_argument, at_least(int, 0), at_least(int, 1)
    add("images", nargs="+", type=Path, metavar="IMAGE", help="any that Pillow reads; the n-th is sample n, from 0")
    add("--out", type=Path, required=True, metavar="PICTURE", help="a new .png, .jpg, .pdf or .svg")
    add("--overwrite", action="store_true", help="replace the picture")
    box = parser.add_mutually_exclusive_group()
    sides = ("H0", "W0", "H1", "W1")
    box.add_argument("--box", nargs=4, type=float, metavar=sides, help="in shares of the sides; default 0 0 1 1")
    box.add_argument("--simc", action="store_const", const=SIMC_BOX, dest="box", help="SimCCrop's box, the middle half")
    box.add_argument(
        "--run", metavar="RUN", help="boxes by the encoder of a run, whose options of views are the defaults"
    )
    add("--scale", nargs=2, type=float, metavar=("LOW", "HIGH"), help="share of the area in a crop; default 0.2 1")
    add("--ratio", nargs=2, type=float, metavar=("LOW", "HIGH"), help="width / height of a crop; default 0.75 1.333")
    add("--alpha", type=float, help="below 1 crops avoid the middle of the box; default 0.6")
    add("--augment", choices=("simclr", "moco", "none"), help="change of the colours; default simclr")
    add("--size", type=count, metavar="PIXELS", help="side of the views; default 224")
    add("--views", type=count, metavar="N", help="views of an image in each of three epochs; default 2")
    add("--seed", type=whole, metavar="N", help="key of all draws; default 0")
    add("--epoch", type=whole, default=0, metavar="N", help="the first that is drawn; default %(default)s")
    try:
        given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
        paths, out, run = given.pop("images"), given.pop("out"), given.pop("run", None)
        check_out(out, paths, given.pop("overwrite"))
        images = read_images(paths)
        defaults = {"size": 224} if run is None else views_of_run(run, given)
        boxes = preview(paths, images, out, **defaults | given)
    except ValueError as error:
        return fail("fastproto views", error)
    except OSError as error:
        return fail("fastproto views", error, FAILED)
    print(describe(paths, images, boxes, out))
    return 0


def views_of_run(folder: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """How a run finds boxes and makes views, as options of ``preview`` beside those that are given."""
    from fastproto.train.build import view_options
    from fastproto.train.run import load_trained
    from fastproto.views.command import Locator

    run = load_trained(folder)  # its data may be gone
    options = view_options(run.config, run.size[0])
    chosen, count = run.config.views, given.get("views", 2)
    # Without colours there is neither; of other views than the run's two, each second one is like the first.
    for name in ("blur", "solarize") if given.get("augment") != "none" else ():
        p = getattr(chosen, name)
        options[name] = (tuple(p) * count)[:count] if isinstance(p, Sequence) else p
    locate = Locator(run.encoder.feature_map, run.size, run.mean, run.std, chosen.box_threshold)
    return options | {"locate": locate}


def info(arguments: Sequence[str]) -> int:
    """``fastproto info``."""
    from fastproto.info import print_info

    try:
        Parser("fastproto info", description="Versions, devices and backends.").parse_args(arguments)
    except ValueError as error:
        return fail("fastproto info", error)
    print_info()
    return 0


class Parser(argparse.ArgumentParser):
    """One that raises ValueError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def at_least(kind: type[int] | type[float], low: int) -> Callable[[str], float]:
    """What reads an option that is a number of at least ``low``."""

    def read(text: str) -> float:
        name = "an integer" if kind is int else "a number"
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not value >= low or math.isinf(value):
            raise argparse.ArgumentTypeError(f"expected {name} of at least {low}, got {text!r}")
        return value

    return read


def fail(command: str, error: object, code: int = REFUSED) -> int:
    """One line on standard error, without the command's name where the error begins with it; returns the exit code."""
    if isinstance(error, BrokenPipeError):  # nobody reads on: for main to end quietly
        raise error
    line = " ".join(str(error).split()).removeprefix(f"{command.split()[-1]}: ")
    print(f"{command}: {line}", file=sys.stderr)
    return code
