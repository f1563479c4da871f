"""Losses on several processes against one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastproto.losses import InfoNCELoss, NTXentLoss, ProtoNCELoss
from fastproto.testing import assert_matches_single_process


def rows(n: int, d: int) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, requires_grad=True)


class EveryNTXent(nn.Module):
    """Plain, without false negatives, and twice with a bank: the second step sees what the first has gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.in_batch = NTXentLoss(0.2, gather_distributed=True)
        self.with_bank = NTXentLoss(0.2, memory_bank_size=(10, 8), gather_distributed=True)

    def forward(self, out0: Tensor, out1: Tensor, assignments: Tensor) -> Tensor:
        in_batch = self.in_batch(out0, out1) + 2 * self.in_batch(out0, out1, assignments)
        return in_batch + self.with_bank(out0, out1) + 2 * self.with_bank(out0, out1)


class EveryProtoNCE(nn.Module):
    """Exact, and with negatives that rank 0 draws: the others have another seed."""

    def forward(self, *inputs: Tensor) -> Tensor:
        torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
        exact, sampled = (ProtoNCELoss(r, gather_distributed=True)(*inputs) for r in (None, 5))
        return exact + 2 * sampled


def test_nt_xent_on_three_processes() -> None:
    assignments = torch.tensor([0, 1, -1, 0, 1, -1])
    assert_matches_single_process(EveryNTXent(), [rows(6, 8), rows(6, 8), assignments], world_size=3)


def test_proto_nce_with_uneven_ignored_rows() -> None:
    assignments = torch.tensor([0, 3, 19, -1, -1, 3, -1, -1])  # three rows count on rank 0, one on rank 1
    prototypes, phi = nn.Parameter(torch.randn(20, 4).double()), nn.Parameter(torch.rand(20).double() + 0.2)
    assert_matches_single_process(EveryProtoNCE(), (rows(8, 4), prototypes, assignments, phi))


def test_without_gathering_the_batches_are_apart() -> None:
    with pytest.raises(AssertionError, match="loss: Scalars are not close"):
        assert_matches_single_process(NTXentLoss(0.2), (rows(6, 8), rows(6, 8)))


def test_one_process_gathers_nothing() -> None:
    out0, out1 = rows(6, 8), rows(6, 8)
    assert torch.equal(NTXentLoss(gather_distributed=True)(out0, out1), NTXentLoss()(out0, out1))
    bank, gathered_bank = (NTXentLoss(memory_bank_size=(8, 8), gather_distributed=flag) for flag in (False, True))
    gathered_bank.load_state_dict(bank.state_dict())
    assert torch.equal(gathered_bank(out0, out1), bank(out0, out1))
    assert torch.equal(gathered_bank.bank, bank.bank)
    labels = torch.tensor([0, 1, -1, 0, 1, -1])
    gathered, plain = ProtoNCELoss(gather_distributed=True), ProtoNCELoss()
    assert torch.equal(gathered(out0, out1, labels, 0.2), plain(out0, out1, labels, 0.2))


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"inputs\[0\] expected rows divisible by 2, got float64 \(3, 4\)"):
        assert_matches_single_process(InfoNCELoss(), (rows(3, 4), rows(3, 4)))
    with pytest.raises(TypeError, match="inputs expected a list or tuple"):
        assert_matches_single_process(InfoNCELoss(), rows(3, 4))
