"""Checks for code that trains on several processes."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from fastproto._check import expect, expect_type

# "loss", one gradient per input and parameter that asks for one, and the buffers as the call left them
Result = dict[str, Tensor]
BUFFER = "buffer "
OP = "assert_matches_single_process"


def assert_matches_single_process(
    loss_fn: Callable[..., Tensor],
    inputs: Sequence[Any],
    world_size: int = 2,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-7,
) -> None:
    """Asserts that a loss on several processes, each with its part of the batch, is the loss of one with all of it.

    Starts ``world_size`` gloo processes on this machine. Averaged over ranks, as DDP does it, the loss and its
    gradients to inputs and parameters must equal those of one process. The buffers of a module, such as a memory bank,
    must be the same on every rank, and as in one process.

    Args:
        loss_fn: a module or function that can be pickled; it is called with ``inputs`` and returns a scalar. The
            parameters of a module are replicated.
        inputs: tensors, at least one, which are split by rows over the ranks; ``nn.Parameter``s, which are replicated;
            lists, tuples and dicts of these; the rest is passed as it is. Gradients are compared for those that
            require one.
        world_size: number of processes; it divides the number of rows.
        rtol, atol: tolerances of torch.testing.assert_close.

    Raises:
        AssertionError: loss, a gradient or a buffer differs, is NaN, or is not everywhere; the message names it.
        ValueError: no tensor to split, rows that do not divide by ``world_size``, or that is below 1; the loss is no
            scalar.
        TypeError: ``inputs`` is a tensor and not a sequence of them, or the loss is not a tensor.
        torch.multiprocessing.ProcessRaisedException: with what ``loss_fn`` raised on the first rank that failed.

    Random numbers start from one seed in every process, so that all draw the same.

    Example:
        >>> from fastproto.losses import NTXentLoss
        >>> out0, out1 = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
        >>> assert_matches_single_process(NTXentLoss(gather_distributed=True), (out0, out1))

        In a script, call it under ``if __name__ == "__main__":``, as the processes import the script again.
    """
    expect_type(inputs, (list, tuple), OP, "inputs", "a list or tuple")
    expect_type(world_size, int, OP, "world_size", "an int of at least 1")
    expect(world_size >= 1, OP, "world_size", "an int of at least 1", world_size)
    split = {name: value for name, value in _tensors(inputs).items() if _is_split(value)}
    expect(len(split) > 0, OP, "inputs", "at least one tensor to split over the ranks", inputs)
    for name, value in split.items():
        fits = value.dim() > 0 and value.shape[0] % world_size == 0
        expect(fits, OP, name, f"rows divisible by {world_size}", value)
    with torch.random.fork_rng(devices=[]):
        expected = _loss_and_gradients(loss_fn, _leaves(inputs))
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank_main, (world_size, folder, loss_fn, _leaves(inputs)), nprocs=world_size)
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world_size)]
    for rank, found in enumerate(ranks):
        for name in sorted(expected.keys() ^ found.keys()):
            places = ["in one process", f"on rank {rank}"]
            here, there = places if name in expected else reversed(places)
            raise AssertionError(f"{name}: {here}, but not {there}")
    compare = partial(torch.testing.assert_close, rtol=rtol, atol=atol)
    for name, value in expected.items():
        parts = [rank[name] for rank in ranks]
        if name.startswith(BUFFER):
            for rank, part in enumerate(parts):
                compare(part, value, msg=partial("{} on rank {}: {}".format, name, rank))
            continue
        # A row has its gradient on one rank; the mean over ranks, which DDP takes, divides that by their number.
        actual = torch.cat(parts) / world_size if name in split else torch.stack(parts).mean(0)
        compare(actual, value, msg=partial("{}: {}".format, name))


def _is_split(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _tensors(value: Any, name: str = "inputs") -> dict[str, Tensor]:
    """The tensors of an input, by name."""
    if isinstance(value, (list, tuple, dict)):
        places = value.items() if isinstance(value, dict) else enumerate(value)
        parts = (_tensors(part, f"{name}[{place!r}]") for place, part in places)
        return {name: tensor for part in parts for name, tensor in part.items()}
    return {name: value} if isinstance(value, Tensor) else {}


def _leaves(value: Any, rank: int = 0, world_size: int = 1) -> Any:
    """One rank's own copy of an input."""
    if isinstance(value, dict):
        return {key: _leaves(part, rank, world_size) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_leaves(part, rank, world_size) for part in value]
    if not _is_split(value):
        return copy.deepcopy(value)
    return value.detach().tensor_split(world_size)[rank].clone().requires_grad_(value.requires_grad)


def _loss_and_gradients(loss_fn: Callable[..., Tensor], inputs: Sequence[Any]) -> Result:
    loss_fn = copy.deepcopy(loss_fn)
    torch.manual_seed(0)
    loss = loss_fn(*inputs)
    expect_type(loss, Tensor, OP, "loss", "a scalar tensor")
    expect(loss.numel() == 1, OP, "loss", "a scalar tensor", loss)
    leaves = _tensors(inputs)
    if isinstance(loss_fn, nn.Module):
        leaves |= dict(loss_fn.named_parameters())
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True) if leaves else ()
    buffers = loss_fn.named_buffers() if isinstance(loss_fn, nn.Module) else ()
    after = {BUFFER + name: buffer.clone() for name, buffer in buffers}
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True)), **after}


def _rank_main(rank: int, world_size: int, folder: str, loss_fn: Callable[..., Tensor], inputs: Sequence[Any]) -> None:
    # A rank that fails leaves the other waiting: not for longer than this.
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout, rank=rank, world_size=world_size)
    try:
        torch.set_num_threads(1)
        # Tensors are handed to the ranks in shared memory: a buffer that one updates would change under the others.
        torch.save(_loss_and_gradients(loss_fn, _leaves(inputs, rank, world_size)), Path(folder) / f"{rank}.pt")
    except Exception:
        # The connections of the others break with it: only the first to fail is reported.
        try:
            (Path(folder) / "failed").touch(exist_ok=False)
        except FileExistsError:
            return
        raise
    finally:
        dist.destroy_process_group()
