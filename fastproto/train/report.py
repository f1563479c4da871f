"""A run as one page: RUN/report.html, self-contained, with what was learnt, on what, from which views, in what time.

``write_report`` reads the run and computes what is shown; every other function turns data into a piece of HTML, empty
where there is nothing to show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastproto
from fastproto.cluster import concentration
from fastproto.train.clock import PHASES
from fastproto.train.config import Config, plain
from fastproto.train.data import Dataset, Images, batches
from fastproto.train.evaluate import KNN, embed, read_evaluations
from fastproto.train.files import write_text
from fastproto.train.monitors import MONITORS
from fastproto.train.plots import Line, curve, duration, percent, picture, point_map, share_bar
from fastproto.train.run import Run, load_run
from fastproto.views import sample_crops

SCORES = {"knn20": "kNN, k = 20", "knn200": "kNN, k = 200", "linear": "Linear probe", "linear_sgd": "Linear, SGD"}
METHODS = {
    "simclr": "SimCLR",
    "moco": "MoCo",
    "byol": "BYOL",
    "simsiam": "SimSiam",
    "pcl": "PCL",
    "spcl": "SPCL",
    "pauc": "PAUC",
}
FOOTER = f"<footer>fastproto {escape(fastproto.__version__)}, torch {escape(torch.__version__)}</footer>"
VIEWED_IMAGES = 8
MOST_SHOWN = 512  # pixels of a side
PROTOTYPES = 24
NEAREST = 8
MAPPED_IMAGES = 1000


def write_report(run: Path, dataset: Dataset | None = None) -> Path:
    """Writes RUN/report.html and returns its path. A run that has not ended is shown as far as it has come.

    ``dataset`` is the run's, where it has been loaded already.

    Raises:
        ValueError: ``run`` is no folder of a run.
    """
    loaded = load_run(run, dataset=dataset)
    path = Path(run) / "report.html"
    write_text(path, page(loaded))
    return path


def page(run: Run) -> str:
    """The whole page of a ``fastproto.train.run.Run``."""
    config, data = run.config, run.dataset
    run.method.to(device_of(run))
    method = METHODS.get(config.method) or config.method
    mapped = torch.linspace(0, len(data.test_labels) - 1, min(MAPPED_IMAGES, len(data.test_labels))).long()
    features = embed(run.method.encoder, data.test_images[mapped], data.mean, data.std, device=device_of(run)).cpu()
    result = run.result
    best = result.get("best", {}) if any(key in row for row in run.log for key in KNN) else {}
    left = [accuracy(result.get("before", {}), result.get("after", {}), best), times(result, run.log)]
    right = [embedding_map(features, data.test_labels[mapped], data.classes)]
    body = [
        heading(run, method),
        f'<div class="pair"><div>{"".join(left)}</div>{"".join(right)}</div>',
        evaluated(read_evaluations(run.path)),
        training(run.log),
        health(run.log),
        views(run),
        gallery(run),
        settings(config),
    ]
    return whole_page(f"{method} on {data_name(data.name)}", body)


def whole_page(title: str, parts: Sequence[str]) -> str:
    """A page of its own from pieces of HTML, some of which may be empty."""
    template = Template(Path(__file__).with_name("report.html.in").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join([*filter(None, parts), FOOTER]), nearest=NEAREST)


def device_of(run: Run) -> torch.device:
    """Where the report's features are computed: where the run was, if that is here."""
    return torch.device("cuda" if run.config.device != "cpu" and torch.cuda.is_available() else "cpu")


def data_name(name: str) -> str:
    """A data set's name; of a folder of images only the last part of its path."""
    return Path(name.removeprefix("imagefolder:")).name if name.startswith("imagefolder:") else name


def section(title: str, about: str, content: str) -> str:
    """One card of the page; empty without content. ``title`` and ``about`` are HTML."""
    return f"<section><h2>{title}</h2><p>{about}</p>{content}</section>" if content else ""


def heading(run: Run, method: str) -> str:
    """Method and data in large, the size of the run beneath."""
    config, data = run.config, run.dataset
    seconds = total_time(run.result, run.log)
    facts = [
        f"{config.crop} crop",
        config.encoder.name,
        f"{len(run.log)} of {config.epochs} epochs",
        f"{len(data.train_labels)} training and {len(data.test_labels)} test images in {len(data.classes)} classes",
        *([duration(seconds)] if seconds else []),
    ]
    return (
        f"<header><h1>{escape(method)} <span>on {escape(data_name(data.name))}</span></h1>"
        f"<p>{' · '.join(escape(fact) for fact in facts)}</p></header>"
    )


def accuracy(
    before: Mapping[str, float], after: Mapping[str, float], best: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """The scores of the untrained and of the trained encoder, one row each, and the best on the way where known."""
    rows = ""
    for key in [*SCORES, *sorted(after.keys() - SCORES.keys())]:
        if key in before and key in after:
            low, high = sorted((before[key], after[key]))
            track = (
                f'<div><b style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></b>'
                f'<i style="left:{100 * before[key]:.2f}%"></i>'
                f'<i class="after" style="left:{100 * after[key]:.2f}%"></i></div>'
            )
            highest = f"<td>{_best(best[key])}</td>" if best and key in best else "<td></td>" if best else ""
            rows += (
                f'<tr><th scope="row">{escape(SCORES.get(key, key))}</th><td>{percent(before[key])}</td>'
                f'<td class="strong">{percent(after[key])}</td><td>{100 * (after[key] - before[key]):+.1f}</td>'
                f'{highest}<td class="track">{track}</td></tr>'
            )
    column_of_best = "<th>best, epoch</th>" if best else ""
    head = f"<thead><tr><th></th><th>before</th><th>after</th><th>points</th>{column_of_best}<th></th></tr></thead>"
    about = (
        "Test images classified from frozen features: by the nearest training images, and by logistic regression. "
        "Before training and after."
    )
    return section("Accuracy", about, rows and f"<table>{head}{rows}</table>")


def _best(score: Mapping[str, float]) -> str:
    return f"{percent(score['accuracy'])}, {score['epoch']:g}"


def evaluated(known: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """What ``fastproto eval`` found, a row for each checkpoint and share of the labels."""
    found = {(checkpoint, share): scores for checkpoint, shares in known.items() for share, scores in shares.items()}
    shown = [key for key in SCORES if any(key in scores for scores in found.values())]
    rows = ""
    for (checkpoint, share), scores in found.items():
        part = percent(float(share.removeprefix("labels ")))
        values = "".join(f"<td>{percent(scores[key]) if key in scores else ''}</td>" for key in shown)
        rows += f'<tr><th scope="row">{escape(Path(checkpoint).name)}</th><td>{part}</td>{values}</tr>'
    head = "".join(f"<th>{SCORES[key]}</th>" for key in shown)
    about = "By fastproto eval: checkpoints, and training images with a label, equally many of each class."
    table = f"<table><thead><tr><th></th><th>labels</th>{head}</tr></thead>{rows}</table>"
    return section("Evaluations", about, rows and table)


def phase_times(result: Mapping[str, Any], log: Sequence[Mapping[str, float]]) -> list[tuple[str, float]]:
    """Seconds by phase, the known phases first; of a run that has not ended, those of its epochs so far."""
    seconds = dict(result.get("time_s", {}))
    if not seconds:
        for row in log:
            for key, value in row.items():
                if key.startswith("time/"):
                    name = key.removeprefix("time/")
                    seconds[name] = seconds.get(name, 0.0) + value
    return [(name, seconds[name]) for name in [*PHASES, *sorted(seconds.keys() - set(PHASES))] if name in seconds]


def total_time(result: Mapping[str, Any], log: Sequence[Mapping[str, float]]) -> float:
    """Seconds of all phases."""
    return math.fsum(seconds for _, seconds in phase_times(result, log))


def times(result: Mapping[str, Any], log: Sequence[Mapping[str, float]]) -> str:
    """Where the time went."""
    parts = phase_times(result, log)
    total = total_time(result, log)
    return section("Time", f"{duration(total)} in all.", share_bar(parts)) if total > 0 else ""


def training(log: Sequence[Mapping[str, float]]) -> str:
    """The loss, its terms where it has several, learning rate and speed, one small plot each."""
    names = {"loss": "loss"}
    terms = {key: key.removeprefix("loss/") for row in log for key in row if key.startswith("loss/")}
    names |= terms if len(terms) > 1 else {}
    names |= {"lr": "learning rate", "images_per_s": "images per second"}
    start = int(log[0].get("epoch", 0)) if log else 0
    names |= {key: SCORES[key] for key in KNN}
    plots = "".join(
        curve(column(log, key), title=title, start=start, joined=key in KNN) for key, title in names.items()
    )
    return section("Training", "By epoch, with the last value.", plots and f'<div class="curves">{plots}</div>')


def column(log: Sequence[Mapping[str, float]], key: str) -> list[Line]:
    """One column of the log as the only line of a plot."""
    return [Line("", [row.get(key, math.nan) for row in log])]


def health(log: Sequence[Mapping[str, float]]) -> str:
    """The monitors of collapse, one small plot each, with a line that says how to read it."""
    start = int(log[0].get("epoch", 0)) if log else 0
    plots = "".join(
        curve(column(log, key), title=key.replace("_", " "), start=start, note=about)
        for key, about in MONITORS.items()
    )
    about = "Signs of collapse, which a falling loss does not show; prototypes are those of the last clustering."
    return section("Health", about, plots and f'<div class="curves">{plots}</div>')


def views(run: Run) -> str:
    """Some training images with box and crops drawn in, each beside the two views that the trainer made of them."""
    data, crop = run.dataset, run.views
    count = min(VIEWED_IMAGES, len(data.train_images))
    ids = torch.linspace(0, len(data.train_images) - 1, count).long()
    # As the trainer has them: of a streamed set whole.
    images: Any = next(batches(data.train_images, [ids], torch.device("cpu")))
    boxes, epoch = run.boxes[ids], max(len(run.log) - 1, 0)
    crops = sample_crops(
        ids,
        torch.tensor([image.shape[1:] for image in images]),
        boxes=boxes,
        scale=crop.scale,
        ratio=crop.ratio,
        alpha=crop.alpha,
        views=2,
        seed=crop.seed,
        epoch=epoch,
    )
    made = [denormalise(view, data.mean, data.std) for view in crop(images, ids, boxes=boxes, epoch=epoch)]
    figures = "".join(
        view_figure(images[i], boxes[i], [crops[i], crops[count + i]], [view[i] for view in made]) for i in range(count)
    )
    about = (
        "Training images with the two crops of the last epoch, and the views that came of them. "
        '<span class="key"><i class="box"></i>box for the centres<i class="view0"></i>first crop'
        '<i class="view1"></i>second crop</span>'
    )
    return section("Views", about, f'<div class="views">{figures}</div>')


def view_figure(image: Tensor, box: Tensor, crops: Sequence[Tensor], made: Sequence[Tensor]) -> str:
    """One image (3, H, W) with its box in fractions and its crops in pixels, and the views (3, h, w) beside it."""
    share = max(1, *(-(-side // MOST_SHOWN) for side in image.shape[1:]))
    image = image[:, ::share, ::share]
    height, width = image.shape[1:]
    h0, w0, h1, w1 = box.tolist()
    rectangles: list[tuple[str, Sequence[float]]] = [
        (f"view{i}", [side / share for side in crop.tolist()]) for i, crop in enumerate(crops)
    ]
    rectangles.append(("box", (h0 * height, w0 * width, (h1 - h0) * height, (w1 - w0) * width)))
    beside = "".join(f'<div class="under{i}">{picture(view)}</div>' for i, view in enumerate(made))
    return f"<figure>{picture(image, rectangles=rectangles)}{beside}</figure>"


def denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised views (N, 3, h, w) back as uint8."""
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return ((images.float().cpu() * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)


class Cluster(NamedTuple):
    """What the gallery shows of a prototype."""

    nearest: list[int]  # training images, the nearest first
    size: int
    concentration: float
    majority: str  # the most frequent class
    share: float  # of the members with a label in that class


def clusters(
    features: Tensor,  # (N, D) float
    assignments: Tensor,  # (N,) int64, -1 = none
    num_prototypes: int,
    labels: Tensor,  # (N,) int64
    classes: Sequence[str],
    temperature: float,
) -> list[Cluster]:
    """The clusters that have members, the tightest first.

    Centres are the members' means in the features of now: since the last clustering the encoder has moved on, and
    prototypes of then lie in no place of the space of now.
    """
    kept = assignments >= 0
    rows = torch.arange(len(features))[kept]
    features, assignments, labels = features[kept].double(), assignments[kept], labels[kept]
    counts = torch.bincount(assignments, minlength=num_prototypes)
    sums = features.new_zeros(num_prototypes, features.shape[1]).index_add_(0, assignments, features)
    centers = sums / counts.clamp(min=1)[:, None]
    distance = (features - centers[assignments]).norm(dim=1)
    phi = concentration(features, assignments, centers, temperature)
    found = []
    for k in phi.argsort(stable=True).tolist():
        members = (assignments == k).nonzero()[:, 0]
        if len(members) == 0:
            continue
        nearest = members[distance[members].argsort(stable=True)[:NEAREST]]
        known = labels[members][labels[members] >= 0]
        of_class = torch.bincount(known, minlength=len(classes))
        majority = int(of_class.argmax())
        share = int(of_class[majority]) / max(1, len(known))
        found.append(Cluster(rows[nearest].tolist(), len(members), float(phi[k]), classes[majority], share))
    return found


def gallery(run: Run) -> str:
    """Some prototypes by the training images nearest to them, from the tightest to the loosest."""
    if not run.prototypes:
        return ""
    data, method = run.dataset, run.method
    with torch.no_grad():
        features = embed(method.embed, data.train_images, data.mean, data.std, device=device_of(run))
        features = method.cluster_space(features).cpu()
    assignments, number = run.assignments[0], len(run.prototypes[0])
    found = clusters(
        features, assignments, number, data.train_labels, data.classes, run.config.prototypes.temperature
    )
    picked = [found[i] for i in torch.linspace(0, len(found) - 1, min(PROTOTYPES, len(found))).long().tolist()]
    figures = "".join(cluster_figure(cluster, data.train_images) for cluster in picked)
    about = (
        f"{len(picked)} of the {number} prototypes{' of the first set' if len(run.prototypes) > 1 else ''}, "
        f"the tightest first, by the training images nearest to them. Beneath: concentration φ, number of images, "
        "share of the most frequent class. Training saw no class."
    )
    return section("Prototypes", about, figures and f'<div class="gallery">{figures}</div>')


def cluster_figure(cluster: Cluster, images: Images) -> str:
    """The images nearest to one prototype in a row, its numbers beneath."""
    row = "".join(picture(images[i]) for i in cluster.nearest)
    noun = "image" if cluster.size == 1 else "images"
    return (
        f'<figure><div class="nearest">{row}</div><figcaption><b>φ {cluster.concentration:.3f}</b> · '
        f"{cluster.size} {noun} · {percent(cluster.share)} “{escape(cluster.majority)}”</figcaption></figure>"
    )


def embedding_map(features: Tensor, labels: Tensor, classes: Sequence[str]) -> str:
    """Features (N, C) of test images in the plane, coloured by class."""
    about = f"{len(features)} test images by t-SNE of their features; colours are classes, which training never saw."
    return section("Embedding", about, point_map(plane(features), labels, classes))


def plane(features: Tensor) -> Tensor:
    """(N, C) to (N, 2): t-SNE begun at the two principal components, or these alone where there are few points."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    centred = unit - unit.mean(0)
    u, s, _ = torch.linalg.svd(torch.cat([centred, centred.new_zeros(len(centred), 2)], dim=1), full_matrices=False)
    components = torch.zeros(len(features), 2, dtype=torch.float64)
    components[:, : len(s)] = (u * s)[:, :2]
    spread = components.std() if len(features) > 1 else components.new_zeros(())
    if len(features) < 10 or spread < 1e-9:
        return components
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    start = (components / spread * 1e-4).float().numpy()
    return torch.from_numpy(TSNE(perplexity=perplexity, init=start, random_state=0).fit_transform(unit.float().numpy()))


def settings(config: Config) -> str:
    """The resolved configuration, group by group."""
    groups: dict[str, dict[str, Any]] = {"run": {}}
    for key, value in plain(config).items():
        if isinstance(value, dict):
            groups[key] = value
        else:
            groups["run"][key] = value
    lists = "".join(
        f"<div><h3>{escape(group)}</h3><dl>"
        + "".join(f"<dt>{escape(key)}</dt><dd>{escape(shown(value))}</dd>" for key, value in values.items())
        + "</dl></div>"
        for group, values in groups.items()
    )
    return section("Settings", "As config.yaml has them.", f'<div class="settings">{lists}</div>')


def shown(value: Any) -> str:
    """A setting as a person reads it."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(shown(entry) for entry in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
