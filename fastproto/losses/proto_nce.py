"""ProtoNCE: rows against prototypes, each with a concentration of its own (PCL)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastproto._check import (
    FLOATS,
    INTEGERS,
    NUMBERS,
    describe,
    expect,
    expect_flags,
    expect_ignore_index,
    expect_index,
    expect_tensor,
    expect_type,
    is_integer,
    reads_data,
    without_ignored,
)
from fastproto.losses._common import ContrastStats, expect_reduction, inverse, widest
from fastproto.losses._gather import from_first_rank, gather_rows, rank_and_world, sum_over_ranks
from fastproto.ops.contrast import Contrast, contrast_unchecked
from fastproto.ops.contrast_sets import contrast_sets

LEAST = 1e-8  # concentration, as the least temperature of the others: 1 / φ must be a float32

# One prototype set, or one entry per set.
Tensors = Tensor | Sequence[Tensor]
Concentrations = float | Tensor | Sequence[float | Tensor]


def proto_nce(
    features: Tensor,  # (N, D) float
    prototypes: Tensors,  # (K, D) float
    assignments: Tensors,  # (N,) int
    concentration: Concentrations = 0.1,  # (K,) float
    *,
    bias: Tensors | None = None,  # (K,) float
    normalize: bool = True,
    num_negatives: int | None = None,
    generator: torch.Generator | None = None,
    gather_distributed: bool = False,
    ignore_index: int = -1,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | Any:  # Any: a pair with return_stats; a union would have every caller narrow it
    """Softmax cross-entropy of features against prototypes.

        L_i = log Σ_j exp(<v_i, c_j> / φ_j + b_j) - <v_i, c_y> / φ_y - b_y,  y the prototype of row i

    Args:
        features: (N, D), float16, bfloat16, float32 or float64, as are all that follow but the assignments.
        prototypes: (K, D), frozen or with a gradient.
        assignments: the prototype of each row (N,) int64 or int32, or ``ignore_index``.
        concentration: φ of at least 1e-8, one number or (K,), with a gradient where it asks for one.
        bias: b (K,), with a gradient where it asks for one.
        normalize: scale the rows of features and prototypes to length 1.
        num_negatives: r, to sum only over the batch's distinct positives and r other prototypes, or as many as there
            are, drawn uniformly without replacement in each call; None sums over all K. The authors' code has a
            positive in the sum once for every row of the batch that it belongs to, and the row's own so often too.
        generator: draws the negatives; on the features' device. By default torch's own, or where compiled the
            compiler's.
        gather_distributed: the mean is over the counted rows of all ranks and the positives are those of all ranks, so
            DDP's mean of the gradients equals one process on the whole batch; negatives are drawn on rank 0, and with
            them every rank has the same N. "sum" and "none" are of the local rows.
        ignore_index: the assignment of rows that do not count.
        reduction: "mean" over the rows that count, "sum", or "none" for the rows (N,), 0 where ignored.
        return_stats: also return ContrastStats(lse, entropy, top1, positive_logit), each (N,).

    ``prototypes``, ``assignments`` and ``concentration`` (and ``bias``) may be sequences, one entry per prototype set;
    one number as concentration then holds for all sets. The loss is the mean over sets, the stats are a list.

    Returns:
        The loss, at least float32; 0 where no row counts. With ``return_stats`` the pair (loss, stats).

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: shapes, devices or numbers of sets do not fit, an assignment is out of range, φ is below 1e-8 or
            infinite (tensors are read on the CPU, on CUDA with ``fastproto.set_debug(True)``), or an unknown reduction.

    Memory: grows with (N + K) · D, with negatives (N + r) · D in place of K · D; frozen prototypes get no gradient and
    nothing of their size is computed for one. The (N, K) logits exist in the reference backend only,
    which float64 takes everywhere.

    Example:
        >>> features, prototypes = torch.eye(2), torch.eye(2)
        >>> proto_nce(features, prototypes, torch.tensor([0, 1]), torch.tensor([0.5, 1.0]))
        tensor(0.2201)
        >>> loss, stats = proto_nce(features, prototypes, torch.tensor([0, -1]), return_stats=True)
        >>> stats.top1
        tensor([ 0, -1])

    Source: PCL, arXiv 2005.04966, Eq. 11.
    """
    expect_tensor(features, "proto_nce", "features", ("N", "D"))
    expect_reduction(reduction, "proto_nce")
    expect_flags("proto_nce", normalize=normalize, gather_distributed=gather_distributed)
    normalize = bool(normalize)
    _expect_num_negatives(num_negatives, "proto_nce")
    expect_type(generator, (torch.Generator, type(None)), "proto_nce", "generator", "a torch.Generator or None")
    sets = _sets(prototypes, assignments, concentration, bias)
    counts = [_expect_set(features, keys, labels, phi, b, ignore_index) for keys, labels, phi, b in sets]
    if len(sets) > 1 and num_negatives is None and not return_stats:
        return _contrast_of_sets(features, sets, normalize, gather_distributed, ignore_index, reduction)
    losses, stats = [], []
    for (keys, labels, phi, b), count in zip(sets, counts, strict=True):
        targets = without_ignored(labels, ignore_index)
        divisor: float | Tensor | None = None
        if reduction == "mean" and count is not None and not gather_distributed:
            divisor = max(count, 1)
        elif reduction == "mean":
            divisor = _divisor(targets, gather_distributed)
        if num_negatives is None:
            scale = inverse(phi, features, keys)
            loss, *rest = contrast_unchecked(
                features, keys, targets, scale, b, normalize=normalize, divisor=divisor, stats=return_stats
            )
        else:
            batch = gather_rows(targets) if gather_distributed else targets
            sample = _sample_keys(batch, keys.shape[0], num_negatives, generator, gather_distributed)
            options = (normalize, divisor, return_stats)
            loss, *rest = _contrast_sample(features, keys, targets, phi, b, *options, *sample)
        losses.append(loss.sum() if reduction == "sum" else loss)
        if return_stats:
            of_rows = ContrastStats(*rest)
            top1 = of_rows.top1 if ignore_index == -1 else torch.where(targets < 0, ignore_index, of_rows.top1)
            stats.append(of_rows._replace(top1=top1))
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean(0)
    if not return_stats:
        return loss
    return loss, stats if isinstance(prototypes, (list, tuple)) else stats[0]


def _sets(prototypes: Any, assignments: Any, concentration: Any, bias: Any) -> list[tuple[Any, ...]]:
    """One (prototypes, assignments, concentration, bias) per set."""
    if not isinstance(prototypes, (list, tuple)):
        return [(prototypes, assignments, concentration, bias)]
    count = len(prototypes)
    expect(count > 0, "proto_nce", "prototypes", "a tensor or at least one", prototypes)
    expect_type(assignments, (list, tuple), "proto_nce", "assignments", f"a list of {count} tensors")
    if isinstance(concentration, NUMBERS):
        concentration = [concentration] * count
    expect_type(concentration, (list, tuple), "proto_nce", "concentration", f"a number or a list of {count}")
    bias = [None] * count if bias is None else bias
    expect_type(bias, (list, tuple), "proto_nce", "bias", f"None or a list of {count} tensors")
    for name, value in (("assignments", assignments), ("concentration", concentration), ("bias", bias)):
        expect(len(value) == count, "proto_nce", name, f"{count} entries, one per prototype set", f"{len(value)}")
    return list(zip(prototypes, assignments, concentration, bias, strict=True))


def _expect_set(features: Tensor, keys: Any, labels: Any, phi: Any, bias: Any, ignore_index: int) -> int | None:
    """Returns how many rows count, where the check has counted them."""
    device = features.device
    expect_tensor(keys, "proto_nce", "prototypes", ("K", features.shape[1]), FLOATS, device)
    k = keys.shape[0]
    expect(k > 0, "proto_nce", "prototypes", "at least one row", keys)
    expect_tensor(labels, "proto_nce", "assignments", (features.shape[0],), INTEGERS, device)
    count = expect_index(labels, "proto_nce", "assignments", k, ignore_index)
    if bias is not None:
        expect_tensor(bias, "proto_nce", "bias", (k,), FLOATS, device)
    if isinstance(phi, Tensor):
        expect_tensor(phi, "proto_nce", "concentration", (k,), FLOATS, device)
        if reads_data(phi):
            low, high = (float(end) for end in phi.detach().aminmax())
            # Of float32 the number nearest to it is a little less.
            good = low * (1 + 1e-6) >= LEAST and high < math.inf
            expect(good, "proto_nce", "concentration", f"at least {LEAST}, finite", f"values from {low} to {high}")
    else:
        expect_type(phi, NUMBERS, "proto_nce", "concentration", "a number or a (K,) tensor")
        expect(LEAST <= phi < math.inf, "proto_nce", "concentration", f"at least {LEAST}, finite", phi)
    return count


def _expect_num_negatives(num_negatives: int | None, op: str) -> None:
    fits = num_negatives is None or (is_integer(num_negatives) and 0 <= num_negatives < 2**63)
    expect(fits, op, "num_negatives", "None or an integer of at least 0 and 63 bits", describe(num_negatives))


def _contrast_of_sets(
    features: Tensor,
    sets: list[tuple[Any, ...]],
    normalize: bool,
    gather_distributed: bool,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The mean over the sets, from one pass: what is small is concatenated, the prototypes are not."""
    prototypes, labels, concentrations, biases = zip(*sets, strict=True)
    targets = without_ignored(torch.stack([one.long() for one in labels]), ignore_index)
    divisor = _divisor(targets, gather_distributed) if reduction == "mean" else None
    scale = _concatenated(concentrations, features, prototypes).reciprocal()
    has_bias = any(b is not None for b in biases)
    bias = _concatenated([0.0 if b is None else b for b in biases], features, prototypes) if has_bias else None
    loss = contrast_sets(features, prototypes, targets, scale, bias, normalize=normalize, divisor=divisor)
    return (loss.sum(1) if reduction == "sum" else loss).mean(0)


def _concatenated(values: Sequence[float | Tensor], features: Tensor, prototypes: Sequence[Tensor]) -> Tensor:
    """(ΣK,) from a number or (K,) for each set, at least as wide as features and prototypes."""
    dtype, parts = widest(features, *prototypes), []
    for value, keys in zip(values, prototypes, strict=True):
        if not isinstance(value, Tensor):
            value = torch.full((len(keys),), float(value), dtype=dtype, device=keys.device)
        parts.append(value.to(torch.promote_types(value.dtype, dtype)))
    return torch.cat(parts)


def _sample_keys(
    targets: Tensor, k: int, num_negatives: int, generator: torch.Generator | None, same_on_all_ranks: bool
) -> tuple[Tensor, Tensor]:
    """The keys of one step: distinct positives, then drawn negatives. Shapes do not depend on the data.

    Returns their indices, min(K, N + r) of them, and a bias that is -inf on those past the P positives and r negatives.
    """
    # float64: in float32 some of 100 000 keys would draw the same number, and topk would choose between them.
    options: dict[str, Any] = {"dtype": torch.float64, "device": targets.device}
    if generator is not None:  # else without the keyword: with it the compiler takes no K that changes
        options["generator"] = generator
    priority = torch.rand(k, **options)
    if same_on_all_ranks:
        priority = from_first_rank(priority)
    ignored_to_end = torch.where(targets < 0, k, targets)
    is_positive = priority.new_zeros(k + 1).index_fill(0, ignored_to_end, 1)[:k]
    kept = (priority + is_positive).topk(min(k, targets.shape[0] + num_negatives)).indices
    # Where all rows are ignored and r is 0 one key stays: a softmax over nothing is NaN, and so is its gradient.
    wanted = (is_positive.sum() + num_negatives).clamp(min=1)
    surplus = torch.arange(kept.shape[0], device=kept.device) >= wanted
    return kept, torch.zeros(kept.shape, dtype=torch.float32, device=kept.device).masked_fill(surplus, -torch.inf)


def _contrast_sample(
    features: Tensor,
    keys: Tensor,
    targets: Tensor,
    phi: float | Tensor,
    bias: Tensor | None,
    normalize: bool,
    divisor: float | Tensor | None,
    stats: bool,
    kept: Tensor,
    kept_bias: Tensor,
) -> tuple[Tensor, ...]:
    """The contrast with the kept keys only; ``top1`` counts in all keys."""
    position = torch.zeros(keys.shape[0], dtype=torch.int64, device=kept.device)
    position = position.scatter(0, kept, torch.arange(kept.shape[0], device=kept.device))
    kept_targets = torch.where(targets < 0, -1, position[targets.clamp(min=0)])
    scale = inverse(phi[kept] if isinstance(phi, Tensor) else phi, features, keys)
    bias = kept_bias if bias is None else bias[kept] + kept_bias
    out = contrast_unchecked(
        features, keys[kept], kept_targets, scale, bias, normalize=normalize, divisor=divisor, stats=stats
    )
    if not stats:
        return out
    rows = Contrast(*out)
    return rows._replace(top1=torch.where(targets < 0, -1, kept[rows.top1.clamp(min=0)]))


def _divisor(targets: Tensor, gather_distributed: bool) -> Tensor:
    """How many rows a set's mean is over, of all ranks per rank where they are gathered; 1 where none counts."""
    counted = (targets >= 0).sum(-1)
    if gather_distributed:
        return sum_over_ranks(counted).clamp(min=1) / rank_and_world()[1]
    return counted.clamp(min=1)


class ProtoNCELoss(nn.Module):
    """Softmax cross-entropy of features against prototypes with one concentration φ each.

        L_i = log Σ_j exp(<v_i, c_j> / φ_j) - <v_i, c_y> / φ_y,  mean over rows with a prototype y, mean over sets

    Features and prototypes are scaled to length 1 inside. Several prototype sets are given as one list per argument.

    Args:
        num_negatives: r, to sum only over the batch's distinct positives and r other prototypes, drawn anew in each
            call, see :func:`fastproto.losses.functional.proto_nce`; None sums over all K.
        gather_distributed: mean and positives over all ranks.
        ignore_index: the assignment of rows that do not count.

    Shape:
        features: (N, D). prototypes: (K, D). concentration: a number or (K,). All float16, bfloat16, float32 or
        float64. assignments: (N,) int64 or int32. Output: scalar of at least float32.

    Raises:
        ValueError: shapes, devices or numbers of sets do not fit, an assignment is out of range, or φ is below 1e-8 or
            infinite (tensors are read on the CPU, on CUDA with ``fastproto.set_debug(True)``).
        TypeError: an argument is not a tensor, or of another dtype.

    Example:
        >>> loss_fn = ProtoNCELoss()
        >>> features, coarse, fine = torch.eye(3), torch.eye(3)[:2], torch.eye(3)
        >>> loss_fn(features, fine, torch.tensor([0, 1, 2]), torch.full((3,), 0.5))
        tensor(0.2395)
        >>> loss_fn(features, [coarse, fine], [torch.tensor([0, 1, -1]), torch.tensor([0, 1, 2])], [0.5, 0.5])
        tensor(0.1832)

    Distributed: with ``gather_distributed`` the mean is over the rows that count on all ranks, however they are spread,
    and negatives are drawn on the first rank, so DDP's mean of the gradients equals one process on the whole batch.
    Prototypes are the same on every rank; with ``num_negatives`` N is, too. Without it the mean is that of a rank's own
    rows.

    Memory: grows with (N + K) · D. The (N, K) logits exist in the reference backend only, which float64 takes
    everywhere.

    Source: PCL, arXiv 2005.04966, Eq. 11.
    """

    def __init__(
        self, num_negatives: int | None = None, gather_distributed: bool = False, ignore_index: int = -1
    ) -> None:
        super().__init__()
        _expect_num_negatives(num_negatives, "ProtoNCELoss")
        expect_flags("ProtoNCELoss", gather_distributed=gather_distributed)
        expect_ignore_index(ignore_index, "ProtoNCELoss")
        self.num_negatives, self.gather_distributed = num_negatives, gather_distributed
        self.ignore_index = ignore_index

    def forward(
        self,
        features: Tensor,
        prototypes: Tensors,
        assignments: Tensors,
        concentration: Concentrations,
    ) -> Tensor:
        return proto_nce(
            features,
            prototypes,
            assignments,
            concentration,
            num_negatives=self.num_negatives,
            gather_distributed=self.gather_distributed,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        names = "num_negatives gather_distributed ignore_index"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names.split())
