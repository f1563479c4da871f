"""Signs of collapse, once per epoch: numbers that a falling loss does not show.

Each function takes features that are there anyway or cost one small batch, and looks at no more than a few thousand of
them. ``MONITORS`` says what every number means; its keys are columns of log.csv.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastproto._check import FLOATS, INTEGERS, expect, expect_tensor

# Rows and prototypes that are looked at, spread evenly over all there are.
ROWS, PROTOTYPES = 4096, 1024

MONITORS = {
    "embedding_std": "Deviation of the embeddings: 1 where they fill the sphere evenly, 0 where all are one point.",
    "effective_rank": "Dimensions that the embeddings use, at most the size of the embedding; 1 is collapse.",
    "prototype_perplexity": "Prototypes in use: K where all are as probable, 1 where one takes every image.",
    "prototype_min": "Mean probability of the rarest prototype times K; 0 where no image is near it.",
    "prototype_max": "Mean probability of the commonest prototype times K; 1 where all are as common.",
    "prototype_spread": "Distance to the own prototype over that between prototypes; small is coagulation.",
}


@torch.no_grad()
def embedding_monitors(
    embeddings: Tensor,  # (N, D) float
) -> dict[str, float]:
    """Spread and rank of embeddings, made unit rows z first.

    ``embedding_std`` is the mean over the D dimensions of the standard deviation, times sqrt(D): 1 for rows that are
    uniform on the sphere, 0 for rows that are all the same. ``effective_rank`` is exp(-sum p log p) over the singular
    values of z divided by their sum, from 1 to min(N, D).

    Args:
        embeddings: (N, D), N at least 1. Both are computed in float64 on the CPU.

    Raises:
        TypeError: embeddings that are not a float tensor.
        ValueError: no rows, or more than two dimensions.

    Example:
        >>> embedding_monitors(torch.eye(4))
        {'embedding_std': 0.866..., 'effective_rank': 4.0}

    Source: Chen and He, Exploring Simple Siamese Representation Learning, arXiv 2011.10566, 4.1 (the deviation); Roy
    and Vetterli, The effective rank, EUSIPCO 2007.
    """
    expect_tensor(embeddings, "embedding_monitors", "embeddings", ("N", "D"), FLOATS)
    expect(len(embeddings) > 0, "embedding_monitors", "embeddings", "at least one row", embeddings)
    unit = F.normalize(embeddings.double().cpu(), dim=1)
    deviation = unit.std(0, correction=0).mean() * unit.shape[1] ** 0.5
    share = torch.linalg.svdvals(unit)
    return {"embedding_std": float(deviation), "effective_rank": float(_perplexity(share / share.sum()))}


@torch.no_grad()
def prototype_monitors(
    features: Tensor,  # (N, D) float
    prototypes: Tensor,  # (K, D) float
    assignments: Tensor,  # (N,) int
    concentration: Tensor,  # (K,) float
) -> dict[str, float]:
    """How evenly the prototypes are used, and how far apart they are beside the images around them.

    With the probabilities p_ik = softmax_k(<z_i, c_k> / phi_k) of ProtoNCE and their mean p_k over the rows,
    ``prototype_min`` and ``prototype_max`` are the extremes of K p_k and ``prototype_perplexity`` is
    exp(-sum p_k log p_k). ``prototype_spread`` is the mean distance from a row to its own prototype over the mean
    distance between two prototypes, and is left out where K is 1. Of many rows 4096 are taken and of many prototypes
    1024 for the distances between them, spread evenly. Never in memory: the (N, K) probabilities.

    Args:
        features: (N, D) unit rows, as they were clustered.
        prototypes: (K, D) unit rows.
        assignments: (N,) prototype of every row.
        concentration: (K,) phi.

    Raises:
        TypeError: tensors of another dtype.
        ValueError: no rows, or shapes that do not fit.

    Example:
        >>> found = prototype_monitors(torch.eye(3), torch.eye(3), torch.arange(3), torch.full((3,), 0.1))
        >>> round(found["prototype_perplexity"], 3), found["prototype_spread"]
        (3.0, 0.0)

    Source: Li et al., Prototypical Contrastive Learning, arXiv 2005.04966, 3.3 (the probabilities); Mo et al.,
    Rethinking Prototypical Contrastive Learning, arXiv 2210.10194 (coagulation).
    """
    op = "prototype_monitors"
    expect_tensor(features, op, "features", ("N", "D"), FLOATS)
    expect(len(features) > 0, op, "features", "at least one row", features)
    device, (count, dim) = features.device, features.shape
    expect_tensor(prototypes, op, "prototypes", ("K", dim), FLOATS, device)
    expect_tensor(assignments, op, "assignments", (count,), INTEGERS, device)
    expect_tensor(concentration, op, "concentration", (len(prototypes),), FLOATS, device)
    rows = _spread(count, ROWS, device)
    z, centers, own = features[rows].float(), prototypes.float(), assignments[rows]
    sums = [((part @ centers.T) / concentration).softmax(1).double().sum(0) for part in z.split(512)]
    mean = torch.stack(sums).sum(0) / len(z)
    found = {
        "prototype_perplexity": float(_perplexity(mean)),
        "prototype_min": float(mean.min()) * len(centers),
        "prototype_max": float(mean.max()) * len(centers),
    }
    if len(centers) > 1:
        some = centers[_spread(len(centers), PROTOTYPES, device)].double()
        between = torch.cdist(some, some).sum() / (len(some) * (len(some) - 1))
        within = (z.double() - centers[own].double()).norm(dim=1).mean()
        found["prototype_spread"] = float(within / between)
    return found


def _perplexity(share: Tensor) -> Tensor:
    """exp of the entropy of shares that sum to 1; 0 log 0 is 0."""
    return torch.special.entr(share).sum().exp()


def _spread(count: int, most: int, device: torch.device) -> Tensor:
    """At most so many of the numbers 0…count - 1, evenly spread."""
    kept = min(count, most)
    return torch.arange(kept, device=device) * count // kept
