"""NT-Xent (SimCLR): contrast within a batch, or with a memory bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproto._check import (
    INTEGERS,
    INTS,
    describe,
    expect,
    expect_flags,
    expect_index,
    expect_tensor,
    expect_type,
    has_data,
    is_integer,
)
from fastproto.losses._common import (
    expect_reduction,
    expect_temperature,
    expect_views,
    inverse_temperature,
    join_rows,
    reduce_rows,
    shown_temperature,
    unit,
)
from fastproto.losses._gather import from_first_rank, gather_rows, rank_and_world
from fastproto.losses.info_nce import against_queue
from fastproto.ops.contrast import contrast_unchecked


def nt_xent(
    out0: Tensor,  # (N, D) float
    out1: Tensor,  # (N, D) float
    assignments: Tensor | None = None,  # (N,) int
    *,
    temperature: float | Tensor = 0.5,
    gather_distributed: bool = False,
    reduction: str = "mean",
    ignore_index: int = -1,
) -> Tensor:
    """Contrasts the two views of every image with all other views in the batch.

        x = [unit(out0); unit(out1)],  L_i = log Σ_{j ∈ A(i)} exp(<x_i, x_j> / τ) - <x_i, x_{i±N}> / τ

    A(i) holds all rows but i. With ``assignments`` it also leaves out the rows whose sample shares i's prototype,
    except the other view of i: false negatives leave.

    Args:
        out0, out1: embeddings of the two views (N, D), float16, bfloat16, float32 or float64, not normalised.
        assignments: prototype of each sample (N,) int64 or int32, or ``ignore_index`` for a sample that shares none.
        temperature: τ, a number or a tensor () or (1,), with a gradient where it asks for one. A tensor costs four
            products of all pairs, as ranks gathered do; a number two, but torch.compile compiles each value anew.
        gather_distributed: candidates are the views of all ranks, anchors the local ones; DDP's mean of the gradients
            equals one process on the whole batch. Every rank has the same N.
        reduction: "mean" or "sum" over the 2N local rows, or "none" for the rows (2N,), view 0 first.
        ignore_index: the assignment of samples without a prototype.

    Returns:
        The loss, at least float32; 0 for an empty batch.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: shapes or devices do not fit, |τ| < 1e-8, an unknown reduction, a negative assignment that is not
            ``ignore_index``, or ranks with another N (data is read on the CPU, on CUDA with
            ``fastproto.set_debug(True)``).

    Memory: grows with N · D, gathered with that of all ranks. The logits of all pairs of rows exist in the reference
    backend only, which float64 takes everywhere.

    Example:
        >>> out0, out1 = torch.eye(2), torch.eye(2)
        >>> nt_xent(out0, out1, temperature=1.0)
        tensor(0.5514)

    Source: SimCLR, arXiv 2002.05709, Eq. 1.
    """
    expect_views(out0, out1, "nt_xent", ("out0", "out1"))
    n, device = out0.shape[0], out0.device
    expect_temperature(temperature, "nt_xent", signed=True, device=device)
    expect_reduction(reduction, "nt_xent")
    expect_flags("nt_xent", gather_distributed=gather_distributed)
    if assignments is not None:
        expect_tensor(assignments, "nt_xent", "assignments", (n,), INTEGERS, device)
        expect_index(assignments, "nt_xent", "assignments", None, ignore_index)

    # All is checked by now: what is refused later is refused while other ranks wait.
    features = join_rows(out0, out1)
    keys = gather_rows(features) if gather_distributed else features
    first = rank_and_world()[0] * 2 * n if gather_distributed else 0
    index = key_groups = torch.arange(keys.shape[0], device=device)
    if assignments is not None:
        prototypes = torch.cat([assignments, assignments]).long()
        if gather_distributed:
            prototypes = gather_rows(prototypes)
        # A row without a prototype is alone in a group of its own, below all prototypes.
        key_groups = torch.where(prototypes == ignore_index, -1 - index, prototypes)
    rows, groups = index, key_groups
    if keys is not features:
        rows, groups = index[first : first + 2 * n], key_groups[first : first + 2 * n]
    scale = inverse_temperature(temperature, len(keys), keys)
    symmetric = keys is features and not isinstance(scale, Tensor)
    (loss,) = contrast_unchecked(
        features,
        None if symmetric else keys,
        rows.roll(n),
        scale,
        groups=groups,
        key_groups=key_groups,
        normalize=True,
        divisor=max(2 * n, 1) if reduction == "mean" else None,
    )
    return loss.sum() if reduction == "sum" else loss


class NTXentLoss(nn.Module):
    """Contrasts the two views of every image with all other views in the batch, or with a memory bank.

        L_i = log Σ_{j ∈ A(i)} exp(<x_i, x_j> / τ) - <x_i, x_{t(i)}> / τ,  mean over i

    Without a bank, A(i) is as in :func:`fastproto.losses.functional.nt_xent`. With a bank, row i of ``out0`` sees its
    own row of ``out1`` (with a gradient, unlike in :class:`InfoNCELoss`) and the bank. The bank starts with random unit
    rows. After each use in training, where ``out0`` requires a gradient, the unit rows of ``out1`` replace its oldest
    rows; evaluation leaves it alone. A row that is NaN goes in too, and losses are NaN until it is replaced. What would
    go past the end of the bank is dropped, and the next batch starts at the front, as in lightly.

    Args:
        temperature: τ, a number, or a parameter () or (1,) that is learnt.
        memory_bank_size: 0 for none, (M, D) for a bank of M rows, or M alone: D is then taken from the first batch.
        gather_distributed: contrast with the views of all ranks; with a bank, enqueue those of all ranks.

    Attributes:
        bank: the bank (M, D), a buffer, or None. It moves to the device of ``out0``. A state without one, such as
            lightly's, leaves it as it is.
        bank_ptr: the next row to be written, a buffer (), or None.

    Shape:
        out0, out1: (N, D) float16, bfloat16, float32 or float64, not normalised. assignments: (N,) int64 or int32, only
        without a bank; -1 for none. Output: scalar of at least float32.

    Raises:
        ValueError: |τ| < 1e-8, a bad bank size, shapes or devices that do not fit, an assignment below -1, assignments
            with a bank, or ranks with another N (data is read on the CPU, on CUDA with ``fastproto.set_debug(True)``).
        TypeError: an argument is not a tensor, or of another dtype.
        RuntimeError: with a bank, recomputed by a checkpoint that is not reentrant, after it has enqueued.

    Example:
        >>> loss_fn = NTXentLoss(temperature=0.1)
        >>> out0, out1 = torch.eye(4), torch.eye(4)
        >>> loss_fn(out0, out1)
        tensor(0.0003)

    Distributed: with ``gather_distributed`` local rows are set against gathered candidates, whose gradients are summed
    over ranks, so DDP's mean of the gradients equals one process on the whole batch. The first rank's bank is given to
    all before the first step, and before the next once a state was loaded, which all ranks do or none. All enqueue the
    same rows, so they hold one bank. Every rank has the same N. Without it every rank contrasts within its own batch,
    or with a bank of its own: in a module that DDP wraps, give (M, D) and DDP ``broadcast_buffers=False``, or before
    every step it puts the first rank's bank in place of the others.

    Memory: grows with N · D, gathered with that of all ranks, and M · D. Logits exist in the reference backend only,
    which float64 takes everywhere.

    Source: SimCLR, arXiv 2002.05709, Eq. 1; the bank: MoCo, arXiv 1911.05722, section 3.2.
    """

    bank: Tensor | None
    bank_ptr: Tensor | None

    def __init__(
        self,
        temperature: float | nn.Parameter = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        expect_temperature(temperature, "NTXentLoss", signed=True)
        expect_type(memory_bank_size, (*INTS, Sequence), "NTXentLoss", "memory_bank_size", "0, M or (M, D)")
        size = tuple(memory_bank_size) if isinstance(memory_bank_size, Sequence) else (memory_bank_size,)
        valid = len(size) in (1, 2) and all(is_integer(entry) and entry >= 0 for entry in size)
        valid = valid and (size[-1] > 0 or size[0] == 0)
        expect(valid, "NTXentLoss", "memory_bank_size", "0, M or (M, D)", describe(memory_bank_size))
        expect_flags("NTXentLoss", gather_distributed=gather_distributed)
        self.temperature = temperature
        self.memory_bank_size = memory_bank_size
        self.gather_distributed = gather_distributed
        self._bank_rows = size[0]
        self._bank_is_shared = self._enqueued = False
        self.register_buffer("bank", None)
        self.register_buffer("bank_ptr", None)
        if size[0] > 0 and len(size) == 2:
            self._start_bank(size[1])

    def forward(self, out0: Tensor, out1: Tensor, assignments: Tensor | None = None) -> Tensor:
        if self._bank_rows == 0:
            return nt_xent(
                out0,
                out1,
                assignments,
                temperature=self.temperature,
                gather_distributed=self.gather_distributed,
            )
        expect_views(out0, out1, "NTXentLoss", ("out0", "out1"))
        expected = "None with a memory bank, whose rows have none"
        expect(assignments is None, "NTXentLoss", "assignments", expected, assignments)
        if self.bank is not None:
            expect_tensor(out0, "NTXentLoss", "out0", ("N", self.bank.shape[1]))
        expect_temperature(self.temperature, "NTXentLoss", signed=True, device=out0.device)
        recomputed = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if recomputed and self._enqueued:
            raise RuntimeError(
                "NTXentLoss: recomputed with a memory bank that has gone on since: leave the loss out of the "
                "checkpoint, or checkpoint with use_reentrant=True"
            )
        # All is checked by now: what is refused leaves no bank of its width.
        if self.bank is None:
            self._start_bank(out0.shape[1], out0.device)
        assert self.bank is not None
        assert self.bank_ptr is not None
        if self.bank.device != out0.device:
            self.bank, self.bank_ptr = self.bank.to(out0.device), self.bank_ptr.to(out0.device)
        training = torch.is_grad_enabled() and out0.requires_grad
        if self.gather_distributed and training:
            self._share_bank()
        (loss,) = against_queue(out0, out1, self.bank, self.temperature)
        loss = reduce_rows(loss, "mean")
        if training:
            self._enqueue(unit(out1.detach()))
        self._enqueued = training and not recomputed
        return loss

    def extra_repr(self) -> str:
        return (
            f"temperature={shown_temperature(self.temperature)}, memory_bank_size={self.memory_bank_size}, "
            f"gather_distributed={self.gather_distributed}"
        )

    def _start_bank(self, dim: int, device: torch.device | None = None) -> None:
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # else training could not write to it
                return self._start_bank(dim, device)
        self.bank = F.normalize(torch.randn(self._bank_rows, dim, device=device), dim=1)
        self.bank_ptr = torch.zeros((), dtype=torch.int64, device=device)

    def _share_bank(self) -> None:
        """Once, before the first step with a bank drawn or loaded: ranks may have different rows, and need the same."""
        if self._bank_is_shared or rank_and_world()[1] == 1:
            return
        assert self.bank is not None
        assert self.bank_ptr is not None
        from_first_rank(self.bank)
        from_first_rank(self.bank_ptr)
        self._bank_is_shared = True

    @torch.no_grad()
    def _enqueue(self, key: Tensor) -> None:
        assert self.bank is not None
        assert self.bank_ptr is not None
        batch = gather_rows(key) if self.gather_distributed else key
        # No host reads the pointer. Rows past the end wrap around, and write back what is there.
        position = self.bank_ptr + torch.arange(min(batch.shape[0], self._bank_rows), device=batch.device)
        slots = position % self._bank_rows
        rows = batch[: len(slots)].to(self.bank.dtype)
        rows = torch.where((position < self._bank_rows)[:, None], rows, self.bank[slots])
        self.bank.index_copy_(0, slots, rows)
        end = self.bank_ptr + batch.shape[0]
        self.bank_ptr.copy_(torch.where(end < self._bank_rows, end, 0))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._bank_is_shared = False  # each rank may have loaded another
        names = {prefix + name for name in ("bank", "bank_ptr")}
        saved = state_dict.get(prefix + "bank")
        if self._bank_rows > 0 and saved is not None:
            if saved.dim() != 2 or len(saved) != self._bank_rows:
                shape, wanted = tuple(saved.shape), f"({self._bank_rows}, D)"
                error_msgs.append(f"size mismatch for {prefix}bank: {shape} saved, {wanted} wanted")
                return
            pointer = state_dict.get(prefix + "bank_ptr")
            # Another shape is PyTorch's to refuse.
            row = int(pointer) if pointer is not None and pointer.shape == () and has_data(pointer) else 0
            if not 0 <= row < self._bank_rows:
                error_msgs.append(f"{prefix}bank_ptr: {row} saved, 0 to {self._bank_rows - 1} wanted")
                return
            if self.bank is None:  # one that has seen no batch takes the width of the saved one
                self._start_bank(saved.shape[1], saved.device)
        more = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *more)
        if not names & state_dict.keys():
            # Saved before the first batch, or by lightly, which does not save its bank: ours stays as it is.
            missing_keys[:] = [name for name in missing_keys if name not in names]
