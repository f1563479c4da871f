"""Renders bench/results/ as Markdown: ``python bench/report.py`` prints all, ``--readme`` writes what is whole in."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- results: written by bench/report.py -->", "<!-- end of results -->"
KEYS = {
    "work", "method", "shape", "dtype", "device", "median_ms", "spread_ms", "rounds", "ours_is_faster", "floor_ms",
    "share_of_floor", "peak_extra_mib",
}  # fmt: skip

ACCURACIES = ("knn20", "knn200", "linear")
RUN_COLUMNS = {"minutes": "{:.1f}", "clustering_minutes": "{:.1f}", "loss_ms": "{:.1f} ms", "data_wait": "{:.1%}"}

PARTS = ("draws cifar", "draws imagenet", "localize")  # of the views: the README shows the whole

EPOCH = "an epoch of MoCo"  # what methods add to it, of try_overheads.py, stands in a sentence of its own

LINE = ("suite", "work", "shape", "dtype")  # of one line of a table


def load() -> list[dict]:
    """Every row of every result file, with the file's suite, commit and versions.

    Raises:
        ValueError: a file that is not of schema 1 or a row with other keys.
    """
    rows = []
    # Not the parts of suites, SUITE.part.json.
    for path in sorted(path for path in RESULTS.glob("*/*.json") if "." not in path.stem):
        content = json.loads(path.read_text())
        if content.get("schema") != 1:
            raise ValueError(f"{path}: schema expected 1, got {content.get('schema')}")
        for row in content["rows"]:
            if set(row) != KEYS:
                raise ValueError(f"{path}: row keys differ from the schema: {sorted(set(row) ^ KEYS)}")
            of_file = {"suite": path.stem, "date": content["date"], "commit": content["commit"]}
            rows.append({**row, **of_file, "torch": content["versions"]["torch"]})
    return rows


def whole(rows: list[dict]) -> list[dict]:
    """The rows without parts of what is there as a whole."""
    return [row for row in rows if row["work"] not in (*PARTS, EPOCH)]


def on_cpu(row: dict) -> bool:
    """Whether it was measured on a CPU, whose name has its threads in it (``harness.device_name``)."""
    return " threads " in row["device"]


def markdown(rows: list[dict]) -> str:
    """A table for the CPUs and one for the GPUs, if there are any."""
    kinds = ([row for row in rows if on_cpu(row)], [row for row in rows if not on_cpu(row)])
    return "\n\n".join(_table(kind) for kind in kinds if kind)


def _table(rows: list[dict]) -> str:
    """A line per piece of work: the best other, and per machine our time and how often it goes into the other's."""
    devices = list(dict.fromkeys(row["device"] for row in rows))
    lines = [
        f"| work | beside | {' | '.join(devices)} | extra memory: ours, other |",
        "| --- | --- |" + " --- |" * (len(devices) + 1),
    ]
    for line in dict.fromkeys(tuple(row[key] for key in LINE) for row in rows):
        cells, bests, memory = [], [], ""
        for device in devices:
            mine = [row for row in rows if tuple(row[key] for key in LINE) == line and row["device"] == device]
            others = [row for row in mine if not row["method"].startswith("fastproto")]
            if not others:
                cells.append(""), bests.append("")
                continue
            ours, best = mine[0], min(others, key=lambda row: row["median_ms"])
            cells.append(f"{_short(ours['median_ms'])} ms, {best['median_ms'] / ours['median_ms']:.1f}×")
            bests.append(best["method"])
            memory = f"{ours['peak_extra_mib']:.0f}, {best['peak_extra_mib']:.0f} MiB"
        if memory:  # else ours beside ours
            usual = statistics.mode(filter(None, bests))
            named = zip(cells, bests, strict=True)
            cells = [f"{cell} {best}" if best not in ("", usual) else cell for cell, best in named]
            lines.append(f"| {', '.join(line[1:])} | {usual} | {' | '.join(cells)} | {memory} |")
    commits = []
    for device in devices:
        suites: dict[str, dict[str, None]] = {}
        for row in rows:
            if row["device"] == device:
                suites.setdefault(f"commit {row['commit']}", {})[row["suite"]] = None
        places = (f"{at} ({', '.join(of)})" for at, of in suites.items())
        commits.append(f"{device}: {', '.join(places)}")
    versions = ", ".join(dict.fromkeys(row["torch"] for row in rows))
    explained = "2.0×: in half the time of the fastest alternative: the one in the column “beside”, or the one named."
    return "\n".join([*lines, "", f"{explained} Measured with torch {versions} on {'; '.join(commits)}."])


def _short(value: float) -> str:
    """To three digits, or all before the point."""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"


def overheads_markdown(rows: list[dict]) -> str:
    """What prototypes and boxes add to an epoch of MoCo, on every device where it was measured."""
    sentences = []
    of_epoch = [row for row in rows if row["work"] == EPOCH]
    for device, shape in dict.fromkeys((row["device"], row["shape"]) for row in of_epoch):
        more = (row for row in of_epoch if (row["device"], row["shape"]) == (device, shape) and row["method"] != "moco")
        parts = ", ".join(f"{row['method']} {row['ours_is_faster'] - 1:+.2%}" for row in more)
        sentences.append(f"Beside {EPOCH} ({shape}, {device}): {parts}.")
    return " ".join(sentences)


def runs_markdown() -> str:
    """One table for each data set on which the methods were trained: means and deviations over the seeds, by crop."""
    tables = []
    for path in sorted(RESULTS.glob("*/runs/*.json")):
        found = json.loads(path.read_text())
        settings, rows = found["settings"], found["rows"]
        crops = list(dict.fromkeys(row["crop"] for row in rows))
        lines = [
            f"{settings['data']}, {settings['limit'] or 'all'} images, {_network(settings)}, "
            f"{settings['epochs']} epochs in batches of {settings['batch_size']}, one set of settings: methods beside "
            "each other, not beside a paper's figures. Accuracy in % after the last epoch, mean ± deviation over "
            f"seeds; crops: {', '.join(crops)}.",
            "",
            "| method | seeds | kNN 20 | kNN 200 | linear | minutes | clustering | loss, a step | its memory "
            "| data wait |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for method in dict.fromkeys(row["method"] for row in rows):
            by_crop = [[row for row in rows if (row["method"], row["crop"]) == (method, crop)] for crop in crops]
            by_crop = [mine for mine in by_crop if mine]
            cells = [method, ", ".join(dict.fromkeys(str(len(mine)) for mine in by_crop))]
            for name in ACCURACIES:
                scores = ([100 * row[f"after/{name}"] for row in mine] for mine in by_crop)
                cells.append(", ".join(map(_mean_and_deviation, scores)))
            for name, form in RUN_COLUMNS.items():
                cells.append(", ".join(form.format(statistics.mean(row[name] for row in mine)) for mine in by_crop))
            cells.insert(-1, f"{found['loss_mib'][method]:.0f} MiB" if method in found.get("loss_mib", {}) else "")
            lines.append(f"| {' | '.join(cells)} |")
        drawn = {row["seed"]: row for row in rows}.values()  # a seed's weights are the same for all
        start = [_mean_and_deviation([100 * row[f"before/{name}"] for row in drawn]) for name in ACCURACIES]
        lines.append(f"| {' | '.join(['random weights', str(len(drawn)), *start, *[''] * (len(RUN_COLUMNS) + 1)])} |")
        commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
        lines += ["", f"Trained on {found['device']}, torch {found['versions']['torch']}, commit {commits}."]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _network(settings: dict) -> str:
    width, side = settings["encoder.width"], settings["views.size"] or settings["image_size"]
    return settings["encoder.name"] + f" of width {width}" * bool(width) + f" at {side}²" * bool(side)


def _mean_and_deviation(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    readme = parser.parse_args().readme
    rows = load()
    trained = " ".join(filter(None, [runs_markdown(), overheads_markdown(rows)]))
    table = "\n\n".join(filter(None, [markdown(whole(rows) if readme else rows), trained]))
    if not readme:
        print(table)
        return
    text = README.read_text()
    head, rest = text.split(BEGIN)
    README.write_text(f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
