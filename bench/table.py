"""Every method with every crop on one data set and one recipe, seed by seed, in slices that can be resumed.

    python bench/table.py imagefolder:PATH --minutes 9 --seeds 0 1 2 --epochs 20 --limit 2048 --encoder.width 16
    bench/gpu.sh train imagefolder:PATH --epochs 200 ...

Options that are not its own are those of ``fastproto train``, for all runs alike. When the minutes are over the run at
hand leaves a checkpoint in --out, and the same command goes on from there; runs that have ended are rows of
bench/results/MACHINE/runs/NAME.json and are not repeated. After the last one the memory of each loss is measured.
``python bench/report.py --readme`` writes means over seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from harness import commit, device_name, environment, peak_extra_mib, results_of

from fastproto.train.build import build_state, load_data
from fastproto.train.checkpoint import is_run
from fastproto.train.config import MACHINE, METHOD_NAMES, Config, config_parser, flat, parse, resolve
from fastproto.train.data import Dataset
from fastproto.train.loop import Interrupted, train
from fastproto.train.methods._base import Prototypes

VARIED = ("method", "crop", "seed")
PER_STEP = ("views", "forward", "loss", "backward")


def row(config: Config, result: dict[str, Any], steps: int) -> dict[str, Any]:
    """What the table says of a run that has ended."""
    seconds = result["time_s"]
    busy = sum(seconds[phase] for phase in PER_STEP)
    return {
        "method": config.method,
        "crop": config.crop,
        "seed": config.seed,
        "commit": commit(),
        **{f"before/{name}": score for name, score in result["before"].items()},
        **{f"after/{name}": score for name, score in result["after"].items()},
        "minutes": sum(seconds.values()) / 60,
        "clustering_minutes": seconds["clustering"] / 60,
        "loss_ms": 1e3 * seconds["loss"] / steps,
        "data_wait": seconds["views"] / busy,
    }


def loss_mib(config: Config, dataset: Dataset, device: str) -> float:
    """What the loss alone adds to the memory in use, in a step of a batch whose prototypes are known."""
    state = build_state(config, dataset, torch.device(device))
    side = config.views.size or dataset.train_images.shape[2]
    outputs = state.method.outputs((torch.randn(config.batch_size, 3, side, side, device=device),) * 2)
    known = None
    if state.prototypes is not None:
        sets = state.prototypes.num_prototypes
        centers = [torch.randn(k, state.method.cluster_dim, device=device) for k in sets]
        ids = [torch.randint(k, (config.batch_size,), device=device) for k in sets]
        known = Prototypes(centers, ids, [torch.full((k,), 0.2, device=device) for k in sets])
    state.method.terms(outputs, known)
    return peak_extra_mib(lambda: state.method.terms(outputs, known), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", help="as for fastproto train")
    add("--name", help="of the result file; the data's last part by default")
    add("--out", type=Path, default=Path("runs/table"), help="where unfinished runs wait")
    add("--minutes", type=float, default=9.0)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--methods", nargs="+", default=METHOD_NAMES)
    add("--crops", nargs="+", default=["random", "contrastive"])
    options, rest = parser.parse_known_args()
    deadline = time.monotonic() + 60 * options.minutes
    settings = config_parser()
    try:
        base = parse(settings, ["--data", options.data, *rest])
    except ValueError as error:
        parser.error(str(error))
    name = options.name or Path(options.data.partition(":")[2] or options.data).name
    dataset = load_data(resolve(settings, base))
    device = "cuda" if torch.cuda.is_available() and base.device != "cpu" else "cpu"
    path = results_of(device_name(device)) / "runs" / f"{name}.json"
    common = {key: value for key, value in flat(resolve(settings, base)).items() if key not in (*VARIED, *MACHINE)}
    common["data"] = name
    found = json.loads(path.read_text()) if path.is_file() else {"settings": common, "rows": []}
    differing = [key for key, value in json.loads(json.dumps(common)).items() if found["settings"].get(key) != value]
    if differing:
        parser.error(f"{path} holds runs of other settings: {', '.join(differing)}; take another --name")
    ended = {(done["method"], done["crop"], done["seed"]) for done in found["rows"]}
    for seed in options.seeds:
        for method in options.methods:
            for crop in options.crops:
                if (method, crop, seed) in ended:
                    continue
                chosen = ["--method", method, "--crop", crop, "--seed", str(seed)]
                config = resolve(settings, parse(settings, ["--data", options.data, *rest, *chosen]))
                folder = options.out / name / f"{method}-{crop}-{seed}"
                try:
                    result = train(
                        config, dataset, folder, resume=is_run(folder), stop=lambda: time.monotonic() > deadline
                    )
                except Interrupted:
                    print("time is over; the same command goes on")
                    return
                steps = config.epochs * (len(dataset.train_images) // config.batch_size)
                found |= environment() | {"device": device_name(device)}
                found["rows"].append(row(config, result, steps))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(found, indent=1) + "\n")
                print(json.dumps(found["rows"][-1]))
    for method in options.methods:
        config = resolve(settings, parse(settings, ["--data", options.data, *rest, "--method", method]))
        found.setdefault("loss_mib", {})[method] = loss_mib(config, dataset, device)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"all runs have ended: {path}")


if __name__ == "__main__":
    main()
