"""What the losses share: unit rows, reductions, and the checks of arguments that several of them take."""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproto._check import FLOATS, NUMBERS, expect, expect_tensor, expect_type, reads_data


class ContrastStats(NamedTuple):
    """What ``return_stats`` adds, each (N,), on the device and without a gradient; see ops.contrast.contrast."""

    lse: Tensor
    entropy: Tensor
    top1: Tensor
    positive_logit: Tensor


def widen(x: Tensor) -> Tensor:
    """At least float32: where sums and norms of half precision inputs are taken."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1; a zero row stays zero."""
    return F.normalize(widen(x), dim=1)


def join_rows(x0: Tensor, x1: Tensor) -> Tensor:
    """The rows of both. Outside of autocast, whose concatenation refuses half precision of the other kind."""
    if x0.dtype == x1.dtype == torch.float32:
        return torch.cat([x0, x1])
    with without_autocast(x0):
        return torch.cat([x0, x1])


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off, where the tensor's device knows it."""
    known = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if known else nullcontext()


def reduce_rows(loss: Tensor, reduction: str, counted: Tensor | None = None) -> Tensor:
    """The mean over the rows that count (0 where none does), the sum, or the rows themselves.

    ``counted`` is how many rows the mean is over, a tensor or by default all.
    """
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (max(loss.shape[0], 1) if counted is None else counted.clamp(min=1))


def expect_reduction(reduction: str, op: str) -> None:
    expect(reduction in ("mean", "sum", "none"), op, "reduction", '"mean", "sum" or "none"', repr(reduction))


def expect_temperature(
    temperature: float | Tensor, op: str, *, signed: bool = False, device: torch.device | None = None
) -> None:
    """A number or a tensor () or (1,) of at least 1e-8; with ``signed`` its magnitude, as lightly wants it.

    Without a device it is a module's, whose tensor has to be a parameter, to go where the module goes.
    """
    wanted = "a number or a parameter () or (1,)" if device is None else "a number or a tensor () or (1,)"
    if isinstance(temperature, Tensor):
        if device is None:
            expect_type(temperature, nn.Parameter, op, "temperature", wanted)
        # (1,) too: FSDP2 shards no parameter ().
        expect(temperature.shape in ((), (1,)), op, "temperature", wanted, temperature)
        expect_tensor(temperature, op, "temperature", tuple(temperature.shape), FLOATS, device)
        if not reads_data(temperature):
            return
        temperature = temperature.item()
    expect_type(temperature, NUMBERS, op, "temperature", wanted)
    size, expected = (abs(temperature), "a magnitude of at least 1e-8") if signed else (temperature, "at least 1e-8")
    expect(1e-8 <= size < math.inf, op, "temperature", f"{expected}, finite", temperature)


def widest(*tensors: Tensor) -> torch.dtype:
    """The dtype for what is computed of these: at least float32, and float64 where one of them is."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)


def inverse(divisor: float | Tensor, *beside: Tensor) -> float | Tensor:
    """1 / τ or 1 / φ; of a tensor in the widest dtype of it and of the rows and keys beside it."""
    if not isinstance(divisor, Tensor):
        return 1 / float(divisor)
    return divisor.to(widest(divisor, *beside)).reciprocal()


def inverse_temperature(temperature: float | Tensor, keys: int, *beside: Tensor) -> float | Tensor:
    """1 / τ as the scale of so many keys: one number for all, or of a tensor, whose value none waits for, of each."""
    scale = inverse(temperature, *beside)
    return scale.expand(keys) if isinstance(scale, Tensor) else scale


def shown_temperature(temperature: float | Tensor) -> str:
    return "learnt" if isinstance(temperature, Tensor) else str(temperature)


def expect_weights(op: str, **weights: Any) -> None:
    for argument, weight in weights.items():
        expect_type(weight, NUMBERS, op, argument, "a finite number")
        expect(math.isfinite(weight), op, argument, "a finite number", weight)


def expect_views(x0: Tensor, x1: Tensor, op: str, names: tuple[str, str]) -> None:
    """Two (N, D) tensors of one shape on one device."""
    expect_tensor(x0, op, names[0], ("N", "D"))
    expect_tensor(x1, op, names[1], tuple(x0.shape), FLOATS, x0.device)
