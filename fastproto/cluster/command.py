"""What ``fastproto cluster`` does: rows from a file into clusters, into a folder that is there whole or not at all.

The folder holds centers.npy (K, D), labels.npy (N,) int64, concentration.npy (K,), summary.json and clusters.png.
Arrays are .npy, which numpy alone reads and maps, and which ``--init`` and the command itself take.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastproto
from fastproto._check import expect
from fastproto.cluster import picture
from fastproto.cluster._rows import CHUNK_BYTES
from fastproto.cluster.files import read_matrix
from fastproto.cluster.init import given_centers
from fastproto.cluster.kmeans import KMeans

STARTS = ("random", "k-means++")
SUMMARY = "summary.json"
FILES = ("centers.npy", "labels.npy", "concentration.npy", "clusters.png", SUMMARY)
PART = ".fastproto-cluster-*.part"  # what a run writes before it is all there, and leaves behind where it is killed
LISTED = 10


def cluster_file(
    path: Path,
    folder: Path,
    *,
    key: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Clusters the rows of a file, writes the folder at the very end, and returns what its summary.json says.

    Args:
        path, key: see ``read_matrix``.
        folder: new or empty, or with ``overwrite`` one that an earlier call wrote.
        progress: shows a bar.
        options: of ``KMeans``; ``init`` may also name a file of centres, ``device`` None is a GPU where there is one.

    Raises:
        ValueError: input, options or folder that this cannot work with, or an input that would be replaced. Nothing is
            written.
        OSError: the results cannot be written. Nothing is left behind.
    """
    check_folder(folder, overwrite)
    start = options.get("init", STARTS[0])
    inputs = {"embeddings": path} | ({} if start in STARTS else {"--init": Path(start)})
    for argument, read in inputs.items():
        replaced = any(_is_same(read, folder / name) for name in FILES)
        expect(not replaced, "cluster", argument, f"another file than those replaced in {folder}", str(read))
    x = read_matrix(path, key)
    settings = options | {"device": _device(options.get("device"), options.get("engine"))}
    # A mapped array is read in pieces too, so that of a file no more than one piece is in memory.
    chunk_rows = max(1, CHUNK_BYTES // max(1, x.shape[1] * x.dtype.itemsize))
    if settings.get("init", STARTS[0]) not in STARTS:
        settings["init"] = _centers(settings["init"], settings["n_clusters"], x.shape[1])
    began = time.perf_counter()
    try:
        kmeans = KMeans(**settings, chunk_rows=chunk_rows, progress=progress).fit(x)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    seconds = time.perf_counter() - began
    summary = {
        "fastproto": fastproto.__version__,
        "file": str(path),
        "key": key,
        "rows": x.shape[0],
        "dim": x.shape[1],
        "seconds": seconds,
        "options": options | {"device": settings["device"]},
        **summarise(kmeans),
    }
    write(folder, kmeans, summary)
    return summary


def summarise(kmeans: KMeans) -> dict[str, Any]:
    """The clustering in numbers, as JSON has them."""
    counts, phi = kmeans.counts_.cpu(), kmeans.concentration_.cpu()
    order = counts.argsort(descending=True, stable=True).tolist()
    rows, most = int(counts.sum()), kmeans.max_points_per_cluster
    return {
        "clusters": len(counts),
        "training_rows": rows if most is None else min(rows, len(counts) * most),
        "iterations": kmeans.n_iter_,
        "objective": kmeans.history_,
        "inertia": kmeans.inertia_,
        "sizes": {"min": int(counts.min()), "median": float(np.median(counts)), "max": int(counts.max())},
        "empty": int((counts == 0).sum()),
        "largest": _listed(order[:LISTED], counts, phi),
        "smallest": _listed(counts.argsort(stable=True)[:LISTED].tolist(), counts, phi),
    }


def _listed(clusters: Sequence[int], counts: Tensor, phi: Tensor) -> list[dict[str, float]]:
    return [{"cluster": k, "size": int(counts[k]), "concentration": float(phi[k])} for k in clusters]


def describe(summary: dict[str, Any], folder: Path) -> str:
    """The summary in a few lines for people."""
    sizes, history, iterations = summary["sizes"], summary["objective"], summary["iterations"]
    rows, trained = summary["rows"], summary["training_rows"]
    of = f" of {trained} rows drawn for training" if trained < rows else ""
    lines = {
        "rows": f"{rows} x {summary['dim']}, K = {summary['clusters']}, {summary['seconds']:.1f} s",
        "objective": f"{history[0]:.6g} to {history[-1]:.6g} in {iterations} iteration{'s'[: iterations > 1]}{of}",
        "sizes": f"{sizes['min']} to {sizes['max']}, median {sizes['median']:g}, {summary['empty']} empty",
        "written": f"{folder}{os.sep} centers.npy, labels.npy, concentration.npy, {SUMMARY}, clusters.png",
    }
    return "\n".join(f"{name:12}{line}" for name, line in lines.items())


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that the results must not go to. Writes nothing itself.

    Raises:
        ValueError: it holds something else than a clustering, or one and ``overwrite`` is not set; it cannot be made.
    """
    if os.path.lexists(folder) and (not folder.is_dir() or not all(path.match(PART) for path in folder.iterdir())):
        wanted = "a new or empty folder"
        expect(_is_clustering(folder), "cluster", "--out", wanted, f"{folder}, which holds something else")
        held = "which holds a clustering: replace it with --overwrite"
        expect(overwrite, "cluster", "--out", wanted, f"{folder}, {held}")
    there = _existing(folder)
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    expect(writable, "cluster", "--out", "a folder that can be written", f"{folder}: {there} is none")


def _is_same(path: Path, other: Path) -> bool:
    """Whether both are there and lead to one file."""
    try:
        return path.samefile(other)
    except OSError:
        return False


def _is_clustering(folder: Path) -> bool:
    try:
        return "fastproto" in json.loads((folder / SUMMARY).read_text())
    except (OSError, ValueError, TypeError):
        return False


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def write(folder: Path, kmeans: KMeans, summary: dict[str, Any]) -> None:
    """Writes all files beside their place, then moves them there: into a folder that is there last the summary."""
    there = _existing(folder)
    part = there / PART.replace("*", str(os.getpid()))
    try:
        part.mkdir(exist_ok=True)
        arrays = {"centers": kmeans.cluster_centers_, "labels": kmeans.labels_, "concentration": kmeans.concentration_}
        centers, labels, phi = (value.cpu().numpy() for value in arrays.values())
        for name, values in zip(arrays, (centers, labels, phi), strict=True):
            _save(part / f"{name}.npy", values)
        with open(part / "clusters.png", "wb") as file:
            picture.draw(file, centers, kmeans.counts_.cpu().numpy(), phi, kmeans.history_)
        (part / SUMMARY).write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
        if there == folder.absolute():
            for path in sorted(part.iterdir(), key=lambda path: path.name == SUMMARY):
                os.replace(path, folder / path.name)
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _save(path: Path, values: np.ndarray) -> None:
    try:
        np.save(path, values)
    except OSError as error:
        if error.filename:
            raise
        # On a full disk numpy says how many numbers it wrote, and no more.
        raise OSError(f"cannot write {path}: {error}") from error


def _centers(name: str, count: int, dim: int) -> Tensor:
    path = Path(name)
    expect(bool(path.suffix), "cluster", "--init", f"{', '.join(STARTS)} or a file of centres", name)
    return given_centers(read_matrix(path), str(path), count, dim, "--init")


def _device(name: str | None, engine: str | None) -> str:
    """The device to compute on. faiss is run on the CPU."""
    if name is None:
        return "cuda" if torch.cuda.is_available() and engine != "faiss" else "cpu"
    wanted = "cpu or a GPU that is there"
    try:
        device = torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cluster: --device expected {wanted}, got {name}: {error}") from error
    expect(device.type in ("cpu", "cuda"), "cluster", "--device", wanted, name)
    return str(device)
