"""Losses on several processes against one process with the whole batch."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException

from fastproto.cluster import PrototypeBank
from fastproto.losses import (
    AlignmentLoss,
    InfoNCELoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    PAUCLoss,
    ProtoNCELoss,
    SPCLLoss,
)
from fastproto.losses._gather import gather_rows
from fastproto.testing import assert_matches_single_process

N, K, D, C = 12, 20, 4, 5


def rows(n: int, d: int) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, requires_grad=True)


class Everything(nn.Module):
    """All that gathers or has no need to, in one call, since processes take seconds to start.

    What the parts keep, banks and queues, is compared as buffers.
    """

    def __init__(self, method: nn.Module | None) -> None:
        super().__init__()
        self.spcl = SPCLLoss(C, K, 0.3, 1.0, 2.0, 0.5, gather_distributed=True).double()
        self.method = method

    def forward(self, out0: Tensor, out1: Tensor, h0: Tensor, h1: Tensor, labels: Tensor, sets: list[Tensor]) -> Tensor:
        rank = dist.get_rank() if dist.is_initialized() else 0
        torch.manual_seed(rank)  # what is drawn at random has to come from the first rank
        self.spcl.reset_prototypes()
        in_batch = NTXentLoss(0.2, gather_distributed=True)
        loss = in_batch(out0, out1) + 2 * in_batch(out0, out1, labels)

        # Every second prototype is in the batch of all ranks, few are in that of one.
        pauc = PAUCLoss(correlation_weight=0.1, gather_distributed=True)
        loss = loss + pauc(out0, out1, sets[0], labels, sets[1], queue=sets[0])

        # The second step sees what the first has gathered, and goes past the end of the bank.
        sizes: list = [(N + 4, D), N + 1]
        self.banks = nn.ModuleList(NTXentLoss(0.2, size, gather_distributed=True) for size in sizes)
        for bank in self.banks:
            loss = loss + bank(out0, out1) + 2 * bank(out1, out0)
            state = bank.state_dict()
            bank.load_state_dict(state | {"bank": torch.randn_like(state["bank"])})  # each rank another
            loss = loss + bank(out0, out1)

        exact, sampled = (ProtoNCELoss(r, gather_distributed=True) for r in (None, 5))
        loss = loss + exact(out0, sets[0], labels, sets[1]) + 2 * sampled(out0, sets[0], labels, sets[1])
        self.prototypes = PrototypeBank(N, D, (3, 5), n_iter=3, process_group=dist.group.WORLD)
        self.prototypes.update(out0)
        ids = rank * len(out1) + torch.arange(len(out1))
        loss = loss + exact(out1, *self.prototypes.lookup(ids))

        # Row by row, so that there is nothing to gather.
        loss = loss + InfoNCELoss()(out0, out1, sets[0]) + NegativeCosineSimilarity()(out0, out1)
        loss = loss + AlignmentLoss()(out0, out1)

        if self.method is not None:
            # As the trainer deals them out: two parts of a batch, each row by row to the ranks.
            parts = gather_rows(out1.detach().float()).view(2, -1, D)
            self.method._keys = list(parts[:, rank :: dist.get_world_size() if dist.is_initialized() else 1])
            self.method.after_step(0.5)
        return loss + self.spcl(out0, out1, h0, h1, labels)


def moco() -> nn.Module:
    """The trainer's method with a queue. Imported here: the trainer takes longer to import than the test to run."""
    from fastproto.train.config import Config, HeadConfig, TargetConfig
    from fastproto.train.encoders import build_encoder
    from fastproto.train.methods.moco import MoCo

    config = Config(head=HeadConfig(16, D), target=TargetConfig(queue=N - 3))
    return MoCo(config, build_encoder("resnet-tiny", image_size=16, width=8))


@pytest.mark.parametrize("world_size", [2, 3])
def test_everything_that_gathers(world_size: int) -> None:
    # On the first rank all rows count, on the last none or few do.
    labels = torch.tensor([0, 3, 19, 3, 0, 7, -1, 3, -1, -1, -1, -1])
    prototypes, phi = nn.Parameter(torch.randn(K, D).double()), nn.Parameter(torch.rand(K).double() + 0.2)
    inputs = [rows(N, D), rows(N, D), rows(N, C), rows(N, C), labels, [prototypes, phi]]
    assert_matches_single_process(Everything(moco() if world_size == 2 else None), inputs, world_size)


class Apart(nn.Module):
    """Nothing is gathered: neither the batch nor the bank."""

    def __init__(self, fails: str) -> None:
        super().__init__()
        self.fails = fails
        self.bank = NTXentLoss(0.2, (8, D))

    def forward(self, views: dict[str, Tensor]) -> Tensor:
        out0, out1 = views["out0"], views["out1"]
        if dist.is_initialized():
            with pytest.raises(ValueError, match=r"gather_distributed: the batch expected as many rows on every rank"):
                gather_rows(out0[dist.get_rank() :])
            for other in (out0[:, 1:], out0.float(), out0.long(), out0[:, 0]):
                with pytest.raises(ValueError, match="the batch expected rows of one shape and dtype on every rank"):
                    gather_rows(out0 if dist.get_rank() == 0 else other)
        if self.fails == "loss":
            return NTXentLoss(0.2)(out0, out1)
        self.bank(out0, out1)
        return (out0 * out1).sum(1).mean()


@pytest.mark.parametrize(
    ("fails", "message"),
    [("loss", "loss: Scalars are not close"), ("bank", "buffer bank.bank on rank 0: Tensor-likes are not close")],
)
def test_without_gathering_the_batches_are_apart(fails: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_matches_single_process(Apart(fails), ({"out0": rows(6, D), "out1": rows(6, D)},))


class Slow(Exception):
    """Takes longer to print than the other rank to fail, whose connection is closed by then."""

    def __str__(self) -> str:
        time.sleep(1)
        return "refused"


class Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == ("ranks" if dist.is_initialized() else "one"):
            self.register_buffer("extra", torch.ones(2))
        if self.kind == "raises" and dist.is_initialized():
            if dist.get_rank() == 1:
                raise Slow
            dist.barrier()
        return x.mean()


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("ranks", AssertionError, "^buffer extra: on rank 0, but not in one process$"),
        ("one", AssertionError, "^buffer extra: in one process, but not on rank 0$"),
        ("raises", ProcessRaisedException, "Slow: refused"),
    ],
)
def test_what_only_some_processes_have_or_raise_is_told(kind: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        assert_matches_single_process(Odd(kind), (torch.rand(2),))  # with no gradient to compare


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
    spcl, gathered_spcl = (SPCLLoss(8, 2, gather_distributed=flag).double() for flag in (False, True))
    gathered_spcl.load_state_dict(spcl.state_dict())
    assert torch.equal(gathered_spcl(out0, out1, out0, out1, labels), spcl(out0, out1, out0, out1, labels))


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"inputs\[0\] expected rows divisible by 2, got float64 \(3, 4\)"):
        assert_matches_single_process(InfoNCELoss(), (rows(3, 4), rows(3, 4)))
    with pytest.raises(ValueError, match=r"inputs\[1\]\[0\] expected rows divisible by 2, got float64 \(3, 4\)"):
        assert_matches_single_process(InfoNCELoss(), (rows(4, 4), [rows(3, 4)]))
    with pytest.raises(ValueError, match=r"inputs\[0\]\['key'\] expected rows divisible by 2, got float64 \(3, 4\)"):
        assert_matches_single_process(InfoNCELoss(), ({"key": rows(3, 4)},))
    with pytest.raises(ValueError, match="inputs expected at least one tensor to split over the ranks, got list"):
        assert_matches_single_process(InfoNCELoss(), [nn.Parameter(rows(4, 4))])
    with pytest.raises(TypeError, match="inputs expected a list or tuple"):
        assert_matches_single_process(InfoNCELoss(), rows(3, 4))
    with pytest.raises(ValueError, match="world_size expected an int of at least 1, got int 0"):
        assert_matches_single_process(InfoNCELoss(), (rows(4, 4), rows(4, 4)), 0)
    with pytest.raises(TypeError, match=r"loss expected a scalar tensor, got float 0\.5"):
        assert_matches_single_process(half, (rows(4, 4),))
    with pytest.raises(ValueError, match=r"loss expected a scalar tensor, got float64 \(4,\)"):
        assert_matches_single_process(torch.squeeze, (rows(4, 1),))


def half(x: Tensor) -> float:
    return 0.5
