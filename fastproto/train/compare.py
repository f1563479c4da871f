"""Several runs on one page: what they reached, what they cost, and their curves over one another.

Reads settings, logs and results only: neither the data nor the networks have to be there. Runs that differ in nothing
but the seed share a colour, and have a row for the mean and the standard deviation over them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from fastproto._check import expect
from fastproto.train.checkpoint import is_run
from fastproto.train.config import MACHINE, Config, flat, read_config
from fastproto.train.evaluate import KNN
from fastproto.train.files import read_log, read_result, write_text
from fastproto.train.monitors import MONITORS
from fastproto.train.plots import Line, curve, legend, paint
from fastproto.train.report import METHODS, SCORES, data_name, phase_times, section, shown, total_time, whole_page

BUSY = ("views", "forward", "loss", "backward")
SETTINGS = ("method", "crop", "data", "seed", "epochs")


class Summary(NamedTuple):
    """What a run's folder says without its data."""

    name: str  # of its folder
    config: Config
    log: list[dict[str, float]]
    result: dict[str, Any]
    group: int = 0  # the same number for runs that differ in nothing but the seed


class Column(NamedTuple):
    """A number of a run, and how it is written."""

    title: str
    value: Callable[[Summary], float]  # NaN where the run does not say
    digits: int = 1


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Writes a page that compares runs, in a folder that it makes where there is none, and returns its path.

    Runs that have not ended are shown as far as they came.

    Raises:
        ValueError: a folder that is no run, or none at all; ``path`` holds something else than a page of ours.
    """
    expect(len(folders) > 0, "report", "runs", "at least one", "none")
    if path.exists():
        ours = path.is_file() and 'name="generator" content="fastproto"' in path.read_text(errors="replace")[:1000]
        expect(ours, "report", "--out", "a new file, or an earlier page", f"{path}, which is something else")
    runs = [read_summary(Path(folder)) for folder in folders]
    names = [run.name for run in runs]
    # Two folders of one name are told apart by their paths.
    runs = [
        run._replace(name=str(folder)) if names.count(run.name) > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page(grouped(runs)))
    return path


def read_summary(folder: Path) -> Summary:
    """Settings, log and result of a run.

    Raises:
        ValueError: the folder holds no run, or a damaged one.
    """
    expect(is_run(folder), "report", "folder", "one that holds a run", str(folder))
    config = read_config(folder / "config.yaml")
    return Summary(folder.resolve().name, config, read_log(folder), read_result(folder))


def grouped(runs: Sequence[Summary]) -> list[Summary]:
    """The runs by group, groups in the order of their first run, and within one by seed."""
    keys: list[dict[str, Any]] = []
    found = []
    for run in runs:
        key = {name: value for name, value in flat(run.config).items() if name not in ("seed", *MACHINE)}
        if key not in keys:
            keys.append(key)
        found.append(run._replace(group=keys.index(key)))
    return sorted(found, key=lambda run: (run.group, run.config.seed))


def page(runs: Sequence[Summary]) -> str:
    """The whole page, of runs in the order of ``grouped``."""
    differing = differences(runs)
    groups = [next(group) for _, group in groupby(runs, key=lambda run: run.group)]
    names = [", ".join([name_of(run.config), *differing[run.group]]) for run in groups]
    noun, kinds = ("run" if len(runs) == 1 else "runs"), ("setting" if len(groups) == 1 else "settings")
    data = " · ".join(dict.fromkeys(escape(data_name(run.config.data)) for run in runs))
    of = f"<span>of {len(groups)} {kinds}</span>"
    heading = f"<header><h1>{len(runs)} {noun} {of}</h1><p>{data}</p></header>"
    about = (
        "Test images classified from frozen features, in per cent: of the untrained encoder, after the last epoch, and "
        "the best on the way, where that was asked for. Runs of one colour differ in nothing but the seed."
    )
    cost = "Loss, views and clustering are of training; the wait is the share of a step in which views are made."
    accuracies = table(runs, differing, SETTINGS, [(title, scores(key)) for key, title in SCORES.items()])
    costs = table(runs, differing, (), [("", COSTS)])
    return whole_page(
        f"{len(runs)} {noun}",
        [
            heading,
            section("Accuracy", about, accuracies),
            section("Cost", cost, costs),
            section("Curves", "By epoch.", curves(runs, names)),
        ],
    )


def name_of(config: Config) -> str:
    """Method and crop, as a legend has them."""
    return f"{METHODS.get(config.method, config.method)} · {config.crop}"


def differences(runs: Sequence[Summary]) -> list[list[str]]:
    """For each group its settings without a column in which not all groups agree, as ``name value``."""
    settings = {run.group: flat(run.config) for run in runs}
    names = [
        name
        for name in settings[0]
        if name not in (*SETTINGS, *MACHINE) and any(values[name] != settings[0][name] for values in settings.values())
    ]
    return [[f"{name} {shown(settings[group][name])}" for name in names] for group in sorted(settings)]


def scores(key: str) -> list[Column]:
    """Before, last and best of one accuracy; no best where it is not measured on the way."""
    columns = [
        Column("before", lambda run: 100 * run.result.get("before", {}).get(key, math.nan)),
        Column("last", lambda run: 100 * run.result.get("after", {}).get(key, math.nan)),
    ]
    return [*columns, Column("best", lambda run: 100 * best(run, key))] if key in KNN else columns


def best(run: Summary, key: str) -> float:
    """The highest accuracy of a run that was measured on the way; NaN for one that was not."""
    known = [row[key] for row in run.log if not math.isnan(row.get(key, math.nan))]
    return max([*known, run.result.get("after", {}).get(key, 0.0)]) if known else math.nan


def clustering(run: Summary) -> float:
    """Minutes that clustering took."""
    return dict(phase_times(run.result, run.log)).get("clustering", math.nan) / 60


def per_step(run: Summary, phase: str) -> float:
    """Milliseconds of a phase in a step, the median over the epochs."""
    found = []
    for row in run.log:
        busy = math.fsum(row.get(f"time/{name}", math.nan) for name in BUSY)
        steps = round(row["images_per_s"] * busy / run.config.batch_size) if busy > 0 else 0
        if steps:
            found.append(1000 * row[f"time/{phase}"] / steps)
    return statistics.median(found) if found else math.nan


def middle(run: Summary, key: str) -> float:
    """The median of a column of the log."""
    return statistics.median([row[key] for row in run.log]) if run.log else math.nan


COSTS = [
    Column("minutes", lambda run: total_time(run.result, run.log) / 60 or math.nan),
    Column("clustering, min", clustering, 2),
    Column("loss, ms a step", lambda run: per_step(run, "loss")),
    Column("views, ms a step", lambda run: per_step(run, "views")),
    Column("images per s", lambda run: middle(run, "images_per_s"), 0),
    Column("data wait, %", lambda run: 100 * middle(run, "data_wait")),
]


def table(
    runs: Sequence[Summary],
    differing: Sequence[Sequence[str]],
    names: Sequence[str],
    parts: Sequence[tuple[str, Sequence[Column]]],
) -> str:
    """One row per run, and one per group of several: mean ± standard deviation. Columns that no run has stay away."""
    kept = [(title, [column for column in columns if known(column, runs)]) for title, columns in parts]
    kept = [(title, columns) for title, columns in kept if columns]
    columns = [column for _, columns in kept for column in columns]
    if not columns:
        return ""
    above = "".join(f'<th colspan="{len(part)}">{escape(title)}</th>' for title, part in kept)
    above = f'<tr><th colspan="{len(names) + 1}"></th>{above}</tr>' if any(title for title, _ in kept) else ""
    head = "".join(f"<th{aligned(name)}>{name}</th>" for name in names)
    head += "".join(f"<th>{escape(column.title)}</th>" for column in columns)
    count, blank = len({run.group for run in runs}), "<td></td>" * len(names)
    rows = ""
    for group, members in ((group, list(members)) for group, members in groupby(runs, key=lambda run: run.group)):
        colour, also = paint(group, count), escape(", ".join(differing[group]))
        for run in members:
            cells = zip(names, (setting(run, name) for name in names), strict=True)
            rows += (
                f'<tr><th scope="row"><i {colour}></i>{escape(run.name)}'
                f"{f'<small>{also}</small>' if also and names else ''}</th>"
                + "".join(f"<td{aligned(name)}>{escape(cell)}</td>" for name, cell in cells)
                + "".join(f"<td>{number(column.value(run), column.digits)}</td>" for column in columns)
                + "</tr>"
            )
        if len(members) > 1:
            means = "".join(f"<td>{mean_and_deviation(column, members)}</td>" for column in columns)
            title = f"mean ± sd of {len(members)}"
            rows += f'<tr class="mean"><th scope="row"><i {colour}></i>{title}</th>{blank}{means}</tr>'
    return f'<div class="runs"><table><thead>{above}<tr><th></th>{head}</tr></thead>{rows}</table></div>'


def setting(run: Summary, name: str) -> str:
    """A setting as a cell of the table; of a run that has not ended also how far it came."""
    value, done = getattr(run.config, name), len(run.log)
    if name == "epochs" and done < value:
        return f"{done} of {value}"
    return {"method": METHODS.get(value, value), "data": data_name(str(value))}.get(name, str(value))


def aligned(name: str) -> str:
    """The attribute of cells that hold words."""
    return ' class="text"' if name in ("method", "crop", "data") else ""


def known(column: Column, runs: Sequence[Summary]) -> list[float]:
    """The numbers of those runs that have one."""
    return [value for value in map(column.value, runs) if not math.isnan(value)]


def number(value: float, digits: int) -> str:
    """A number with so many digits after the point; nothing for NaN."""
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def mean_and_deviation(column: Column, runs: Sequence[Summary]) -> str:
    """Mean ± sample standard deviation over the runs that have the number, if two have it."""
    values = known(column, runs)
    if len(values) < 2:
        return ""
    deviation = statistics.stdev(values)
    return f"{number(statistics.fmean(values), column.digits)}<small>± {number(deviation, column.digits)}</small>"


def curves(runs: Sequence[Summary], names: Sequence[str]) -> str:
    """What the logs have in common, one plot each, in the colours of the groups."""
    titles = {"loss": "loss"} | {key: SCORES[key] for key in KNN}
    titles |= {key: key.replace("_", " ") for key in MONITORS} | {"images_per_s": "images per second"}
    plots = "".join(
        curve(
            [Line(run.name, [row.get(key, math.nan) for row in run.log], run.group) for run in runs],
            title=title,
            start=1,
            joined=key in KNN,
            colours=len(names),
        )
        for key, title in titles.items()
    )
    return plots and f'{legend(names)}<div class="curves">{plots}</div>'
