"""Losses on two processes against one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastproto.losses import InfoNCELoss, NTXentLoss, ProtoNCELoss
from fastproto.testing import assert_matches_single_process


def rows(n: int, d: int) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, requires_grad=True)


def test_nt_xent() -> None:
    assert_matches_single_process(NTXentLoss(0.2, gather_distributed=True), (rows(6, 8), rows(6, 8)))


def test_nt_xent_with_assignments_on_three_processes() -> None:
    assignments = torch.tensor([0, 1, -1, 0, 1, -1])
    loss_fn = NTXentLoss(0.2, gather_distributed=True)
    assert_matches_single_process(loss_fn, [rows(6, 8), rows(6, 8), assignments], world_size=3)


def test_without_gathering_the_batches_are_apart() -> None:
    with pytest.raises(AssertionError, match="loss: Scalars are not close"):
        assert_matches_single_process(NTXentLoss(0.2), (rows(6, 8), rows(6, 8)))


@pytest.mark.parametrize("num_negatives", [None, 5])
def test_proto_nce_with_uneven_ignored_rows(num_negatives: int | None) -> None:
    # Rank 0 has three counted rows, rank 1 has one. The draws of rank 0 are those of one process seeded alike.
    assignments = torch.tensor([0, 3, 19, -1, -1, 3, -1, -1])
    prototypes, phi = nn.Parameter(torch.randn(20, 4).double()), nn.Parameter(torch.rand(20).double() + 0.2)
    loss_fn = SeededProtoNCE(num_negatives, gather_distributed=True)
    assert_matches_single_process(loss_fn, (rows(8, 4), prototypes, assignments, phi))


class SeededProtoNCE(ProtoNCELoss):
    def forward(self, *inputs: Tensor) -> Tensor:
        torch.manual_seed(int(inputs[2].sum() >= 0))
        return super().forward(*inputs)


def test_one_process_gathers_nothing() -> None:
    out0, out1 = rows(6, 8), rows(6, 8)
    assert torch.equal(NTXentLoss(gather_distributed=True)(out0, out1), NTXentLoss()(out0, out1))
    bank, gathered_bank = (NTXentLoss(memory_bank_size=(8, 8), gather_distributed=flag) for flag in (False, True))
    gathered_bank.load_state_dict(bank.state_dict())
    assert torch.equal(gathered_bank(out0, out1), bank(out0, out1))
    assert torch.equal(gathered_bank.bank, bank.bank)
    labels = torch.tensor([0, 1, -1, 0, 1, -1])
    sharded, plain = ProtoNCELoss(gather_distributed=True), ProtoNCELoss()
    assert torch.equal(sharded(out0, out1, labels, 0.2), plain(out0, out1, labels, 0.2))


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"inputs\[0\] expected rows divisible by 2, got float64 \(3, 4\)"):
        assert_matches_single_process(InfoNCELoss(), (rows(3, 4), rows(3, 4)))
    with pytest.raises(TypeError, match="inputs expected a list or tuple"):
        assert_matches_single_process(InfoNCELoss(), rows(3, 4))
