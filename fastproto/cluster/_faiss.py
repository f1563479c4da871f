"""The same iteration by an installed faiss: on the GPU of the rows where it has one, else on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastproto.cluster._lloyd import Iteration, Step
from fastproto.cluster._rows import Rows

MOST = torch.finfo(torch.float32).max


def faiss_lloyd(rows: Rows, spherical: bool, op: str) -> Step:
    """Mean of the nearest rows, empty clusters split, by faiss, which holds all rows in memory as float32.

    Raises ValueError where squared distances may be more than float32 holds: faiss would end the process.
    """
    import faiss

    x = np.empty((rows.local, rows.dim), dtype=np.float32)
    longest = torch.zeros((), dtype=torch.float64, device=rows.device)
    for here, chunk, _ in rows.chunks():
        longest = torch.maximum(longest, torch.linalg.vector_norm(chunk, dim=1, dtype=torch.float64).max())
        x[here] = chunk.float().cpu().numpy()
    weights = None
    if rows.weights is not None:
        weights = (rows.weights * (rows.total / rows.weights.sum())).float().cpu().numpy()
    on_gpu = rows.device.type == "cuda" and faiss.get_num_gpus() > 0

    def step(centers: Tensor) -> Iteration:
        reach = longest + torch.linalg.vector_norm(centers, dim=1, dtype=torch.float64).max()
        if not reach.square() < MOST:
            rows.refuse(op)
        limits = {"min_points_per_centroid": 1, "max_points_per_centroid": rows.total}
        kmeans = faiss.Kmeans(rows.dim, len(centers), niter=1, spherical=spherical, **limits)
        if on_gpu:
            kmeans.index = _on_gpu(faiss, kmeans.index, rows.device)
        objective = kmeans.train(x, weights=weights, init_centroids=centers.float().cpu().numpy())
        moved = torch.from_numpy(kmeans.centroids).to(centers)
        return Iteration(moved, centers.new_tensor(objective, dtype=torch.float64), moved.new_ones(len(moved)))

    return step


def _on_gpu(faiss: Any, index: Any, device: torch.device) -> Any:
    number = torch.cuda.current_device() if device.index is None else device.index
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), number, index)
