"""Batch normalisation over the batch of all processes: torch's on GPUs, plain sums elsewhere, where torch has none."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastproto.losses._gather import rank_and_world, sum_over_ranks

Module = TypeVar("Module", bound=nn.Module)


class SumBatchNorm(_BatchNorm):
    """Batch normalisation of (N, C, ...) over all processes, which have equally many rows, by sums over them.

    Source:
        Ioffe and Szegedy, Batch Normalization, arXiv 1502.03167, algorithm 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        world = rank_and_world()[1]
        if world == 1 or not self.training:
            return super().forward(input)
        # Autocast hands over half precision: too coarse for sums, and not what the running statistics are of.
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [dim for dim in range(input.ndim) if dim != 1]
        count = world * input.numel() // input.shape[1]
        mean = _SumOverRanks.apply(wide.sum(dims, keepdim=True)) / count
        centred = wide - mean
        variance = _SumOverRanks.apply(centred.square().sum(dims, keepdim=True)) / count
        self._follow(mean.detach().flatten(), variance.detach().flatten() * count / (count - 1))
        out = centred * (variance + self.eps).rsqrt()
        if self.weight is not None:
            columns = (1, -1, *(1 for _ in dims[1:]))
            out = out * self.weight.view(columns) + self.bias.view(columns)
        return out.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Takes any."""

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics, if there are any, towards those of a batch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def synchronise(module: Module, device: torch.device) -> Module:
    """The module with every batch normalisation in it over all processes; on a CPU torch's classes and timm's."""
    from timm.layers import BatchNormAct2d, convert_sync_batchnorm

    if device.type != "cpu":
        return convert_sync_batchnorm(module)
    for norm in module.modules():
        if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d):
            norm.__class__ = SumBatchNorm
        elif type(norm) is BatchNormAct2d:
            norm.__class__ = SumBatchNormAct  # type: ignore[assignment]
    return module


class SumBatchNormAct(SumBatchNorm):
    """timm's, which an activation follows."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks of a value whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        return sum_over_ranks(value)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total
