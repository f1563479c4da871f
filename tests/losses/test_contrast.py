"""NT-Xent and InfoNCE against loops in float64, and NT-Xent against lightly."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastproto.losses import InfoNCELoss, NTXentLoss
from fastproto.losses.functional import info_nce, nt_xent


def views(n: int, d: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, dtype=dtype, requires_grad=True), torch.randn(n, d, dtype=dtype, requires_grad=True)


def oracle_nt_xent(out0: Tensor, out1: Tensor, temperature: float, assignments: list[int] | None) -> np.ndarray:
    x = torch.cat([out0, out1]).detach().double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    n = len(out0)
    losses = []
    for i in range(2 * n):
        positive = (i + n) % (2 * n)
        total = 0.0
        for j in range(2 * n):
            shares = assignments is not None and assignments[i % n] != -1 and assignments[i % n] == assignments[j % n]
            if j == positive or (j != i and not shares):
                total += math.exp(x[i] @ x[j] / temperature)
        losses.append(math.log(total) - x[i] @ x[positive] / temperature)
    return np.array(losses)


def oracle_info_nce(query: Tensor, key: Tensor, queue: Tensor | None, temperature: float) -> np.ndarray:
    q, k = (
        x.detach().double().numpy() / np.linalg.norm(x.detach().numpy(), axis=1, keepdims=True) for x in (query, key)
    )
    losses = []
    for i in range(len(q)):
        others = [k[j] for j in range(len(k)) if j != i] if queue is None else list(queue.double().numpy())
        logits = [q[i] @ k[i] / temperature] + [q[i] @ y / np.linalg.norm(y) / temperature for y in others]
        losses.append(math.log(sum(math.exp(s) for s in logits)) - logits[0])
    return np.array(losses)


@pytest.mark.parametrize(("n", "d"), [(1, 24), (2, 1), (33, 130)])
@pytest.mark.parametrize("grouped", [False, True])
def test_nt_xent_is_its_formula(n: int, d: int, grouped: bool) -> None:
    out0, out1 = views(n, d)
    assignments = torch.randint(-1, 4, (n,)) if grouped else None
    expected = oracle_nt_xent(out0, out1, 0.3, assignments.tolist() if assignments is not None else None)
    for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.mean())):
        loss = nt_xent(out0, out1, assignments, temperature=0.3, reduction=reduction)
        torch.testing.assert_close(loss, torch.as_tensor(value))


def test_nt_xent_leaves_the_negatives_of_unassigned_rows() -> None:
    out0, out1 = views(5, 8)
    without = nt_xent(out0, out1, reduction="none")
    torch.testing.assert_close(nt_xent(out0, out1, torch.full((5,), -1), reduction="none"), without)
    torch.testing.assert_close(nt_xent(out0, out1, torch.arange(5), reduction="none"), without)
    torch.testing.assert_close(nt_xent(out0, out1, torch.full((5,), 3), reduction="none"), torch.zeros_like(without))
    torch.testing.assert_close(nt_xent(out0, out1, torch.full((5,), 3), reduction="none", ignore_index=3), without)


@pytest.mark.parametrize("grouped", [False, True])
def test_nt_xent_gradient(grouped: bool) -> None:
    out0, out1 = views(4, 3)
    assignments = torch.tensor([0, -1, 0, 2]) if grouped else None
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, assignments, reduction="none"), (out0, out1))


@pytest.mark.parametrize("name", ["nt_xent", "nt_xent grouped", "info_nce", "info_nce queue", "bank"])
@pytest.mark.parametrize("sign", [1, -1])
def test_temperature_is_learnt(name: str, sign: int) -> None:
    out0, out1 = views(4, 3)
    temperature = torch.tensor(0.4 * sign, dtype=torch.float64, requires_grad=True)
    queue = torch.randn(5, 3, dtype=torch.float64)
    bank = NTXentLoss(memory_bank_size=(5, 3)).double().eval()

    def with_bank(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
        bank.temperature, bank.bank = t, queue.clone()
        return bank(a, b)

    call, wanted = {
        "nt_xent": (lambda a, b, t: nt_xent(a, b, temperature=t, reduction="none"), (out0, out1, temperature)),
        "nt_xent grouped": (
            lambda a, b, t: nt_xent(a, b, torch.tensor([0, -1, 0, 2]), temperature=t), (out0, out1, temperature)
        ),
        "info_nce": (lambda a, b, t: info_nce(a, b.detach(), temperature=t), (out0, temperature)),
        "info_nce queue": (lambda a, b, t: info_nce(a, b.detach(), queue, temperature=t), (out0, temperature)),
        "bank": (with_bank, (out0, out1, temperature)),
    }[name]  # fmt: skip
    if sign < 0 and name.startswith("info"):
        with pytest.raises(ValueError, match="temperature expected at least"):
            call(out0, out1, temperature)
        return
    torch.testing.assert_close(call(out0, out1, temperature), call(out0, out1, 0.4 * sign))
    if len(wanted) == 2:
        assert torch.autograd.gradcheck(lambda a, t: call(a, out1, t), wanted)
    else:
        assert torch.autograd.gradcheck(call, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bank", [0, (40, 16)])
def test_a_learnt_temperature_takes_lightlys_steps(dtype: torch.dtype, bank: int | tuple[int, int]) -> None:
    lightlys = pytest.importorskip("lightly.loss").NTXentLoss
    out0, out1 = views(12, 16, dtype)
    torch.manual_seed(3)
    theirs = lightlys(torch.nn.Parameter(torch.tensor(0.2)), memory_bank_size=bank)
    torch.manual_seed(3)
    ours = NTXentLoss(torch.nn.Parameter(torch.tensor(0.2)), memory_bank_size=bank)
    assert dict(ours.named_parameters()).keys() == {"temperature"}
    assert "temperature=learnt, " in repr(ours)
    losses = ours(out0, out1), theirs(out0.float(), out1.float())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(x, (out0, y.temperature)) for x, y in zip(losses, (ours, theirs), strict=True)]
    for a, b in zip(*gradients, strict=True):
        # Products in half precision round the weights: their error is of the largest gradient, not of each.
        atol = 1e-6 if dtype == torch.float32 else 5e-3 * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=atol)


@pytest.mark.parametrize("queue_rows", [None, 0, 1, 507])
def test_info_nce_is_its_formula(queue_rows: int | None) -> None:
    query, key = views(33, 24)
    queue = None if queue_rows is None else torch.randn(queue_rows, 24, dtype=torch.float64)
    expected = oracle_info_nce(query, key, queue, 0.2)
    for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.mean())):
        loss = info_nce(query, key, queue, reduction=reduction)
        torch.testing.assert_close(loss, torch.as_tensor(value))
    torch.testing.assert_close(InfoNCELoss()(query, key, queue), torch.tensor(expected.mean()))


@pytest.mark.parametrize("with_queue", [False, True])
def test_info_nce_sends_no_gradient_to_keys_and_queue(with_queue: bool) -> None:
    query, key = views(4, 3)
    queue = torch.randn(5, 3, dtype=torch.float64, requires_grad=True) if with_queue else None
    assert torch.autograd.gradcheck(lambda q: info_nce(q, key, queue, reduction="none"), (query,))
    info_nce(query, key, queue).backward()
    assert query.grad is not None
    assert key.grad is None
    assert queue is None or queue.grad is None


@pytest.mark.parametrize("temperature", [0.5, 0.07, -0.5])
@pytest.mark.parametrize(("n", "d"), [(1, 16), (64, 128)])
def test_replacing_lightly_changes_nothing(temperature: float, n: int, d: int) -> None:
    lightlys = pytest.importorskip("lightly.loss").NTXentLoss
    out0, out1 = views(n, d, torch.float32)
    theirs = lightlys(temperature)(out0, out1)
    ours = NTXentLoss(temperature)(out0, out1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(ours, (out0, out1)), torch.autograd.grad(theirs, (out0, out1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_replacing_lightly_with_a_bank_changes_nothing() -> None:
    lightlys = pytest.importorskip("lightly.loss").NTXentLoss
    torch.manual_seed(3)
    theirs = lightlys(0.1, memory_bank_size=(40, 16))
    torch.manual_seed(3)
    ours = NTXentLoss(0.1, memory_bank_size=(40, 16))
    batches = [12, 12, 12, 12, 16, 50, 1, 39, 40]  # through the end, exactly to it, and more than the bank
    for step, n in enumerate(batches):
        torch.testing.assert_close(ours.bank, theirs.memory_bank.bank, msg=f"step {step}")
        assert int(ours.bank_ptr) == int(theirs.memory_bank.bank_ptr)
        out0, out1 = views(n, 16, torch.float32)
        loss, expected = ours(out0, out1), theirs(out0, out1)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        grads = torch.autograd.grad(loss, (out0, out1)), torch.autograd.grad(expected, (out0, out1))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_bank_is_left_alone_in_evaluation() -> None:
    loss_fn = NTXentLoss(memory_bank_size=(8, 4))
    before = loss_fn.bank.clone()
    out0, out1 = views(3, 4, torch.float32)
    with torch.no_grad():
        loss_fn(out0, out1)
    loss_fn(out0.detach(), out1)
    assert torch.equal(loss_fn.bank, before)
    loss_fn(out0, out1)
    assert not torch.equal(loss_fn.bank, before)


def test_bank_of_rows_alone_takes_the_first_batch_dimension() -> None:
    loss_fn = NTXentLoss(memory_bank_size=8)
    out0, out1 = views(3, 4, torch.float32)
    loss_fn(out0, out1)
    assert loss_fn.bank.shape == (8, 4)
    torch.testing.assert_close(loss_fn.bank.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(loss_fn.bank[:3], torch.nn.functional.normalize(out1.detach(), dim=1))


@pytest.mark.parametrize("size", [8, (8, 4)])
def test_bank_is_saved(size: int | tuple[int, int]) -> None:
    saved, loaded = NTXentLoss(memory_bank_size=size), NTXentLoss(memory_bank_size=size)
    saved(*views(3, 4, torch.float32))
    loaded.load_state_dict(saved.state_dict())
    out0, out1 = views(6, 4, torch.float32)
    assert torch.equal(saved(out0, out1), loaded(out0, out1))
    assert torch.equal(saved.bank, loaded.bank)
    assert int(loaded.bank_ptr) == 0
    assert not NTXentLoss().state_dict()


@pytest.mark.parametrize("size", [0, (0,), (0, 4)])
def test_no_bank(size: int | tuple[int, ...]) -> None:
    out0, out1 = views(3, 4)
    assert torch.equal(NTXentLoss(memory_bank_size=size)(out0, out1), NTXentLoss()(out0, out1))


@pytest.mark.parametrize("loss_fn", [NTXentLoss(), NTXentLoss(memory_bank_size=(5, 4)), InfoNCELoss()])
def test_empty_batch_is_zero_with_zero_gradient(loss_fn: torch.nn.Module) -> None:
    out0, out1 = views(0, 4, torch.float32)
    loss = copy.deepcopy(loss_fn)(out0, out1)
    assert loss.item() == 0
    loss.backward()
    assert out0.grad.shape == (0, 4)


def test_nan_shows() -> None:
    out0, out1 = views(3, 4)
    out0.data[1, 2] = float("nan")
    assert nt_xent(out0, out1).isnan()
    assert info_nce(out0, out1).isnan()


def test_strides_do_not_matter() -> None:
    out0, out1 = views(6, 5)
    loose0 = torch.stack([out0, out0], 2)[..., 0]
    loose1 = out1.T.contiguous().T
    assert not loose0.is_contiguous()
    torch.testing.assert_close(nt_xent(loose0, loose1), nt_xent(out0, out1))
    row = torch.randn(1, 5, dtype=torch.float64)
    torch.testing.assert_close(info_nce(out0, row.expand(6, 5)), info_nce(out0, row.repeat(6, 1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_as_exact_as_plain_pytorch(dtype: torch.dtype) -> None:
    out0, out1 = (x.detach().to(dtype).requires_grad_() for x in views(64, 96))
    loss = nt_xent(out0, out1, temperature=0.1)
    expected = nt_xent(out0.double(), out1.double(), temperature=0.1)

    x = torch.nn.functional.normalize(torch.cat([out0, out1]), dim=1)
    logits = (x @ x.T / 0.1).fill_diagonal_(-math.inf)
    plain = torch.nn.functional.cross_entropy(logits, torch.arange(128).roll(64))
    assert loss.dtype == torch.float32
    assert (loss - expected).abs() <= 2 * (plain - expected).abs() + 1e-6
    for ours, eager, exact in zip(
        *(torch.autograd.grad(v, (out0, out1)) for v in (loss, plain, expected)), strict=True
    ):
        assert ours.dtype == dtype
        error, eager_error = ((grad.double() - exact.double()).abs().max() for grad in (ours, eager))
        assert error <= 2 * eager_error + 1e-6


def test_autocast_does_not_lower_the_loss() -> None:
    out0, out1 = views(16, 24, torch.float32)
    expected = nt_xent(out0, out1), info_nce(out0, out1, out1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nt_xent(out0, out1), expected[0])
        assert torch.equal(info_nce(out0, out1, out1), expected[1])


@pytest.mark.parametrize(
    ("loss_fn", "extra"),
    [
        (NTXentLoss(), ()),
        (NTXentLoss(), (torch.tensor([0, 1, 0, -1]),)),
        (NTXentLoss(memory_bank_size=(6, 3)), ()),
        (NTXentLoss(memory_bank_size=6), ()),
        (InfoNCELoss(), ()),
        (InfoNCELoss(), (torch.randn(7, 3),)),
        (NTXentLoss(torch.nn.Parameter(torch.tensor(0.3))), ()),
        (InfoNCELoss(torch.nn.Parameter(torch.tensor(0.3))), (torch.randn(7, 3),)),
    ],
)
def test_compiles_as_one_graph(loss_fn: torch.nn.Module, extra: tuple[Tensor, ...]) -> None:
    out0, out1 = views(4, 3, torch.float32)
    compiled = torch.compile(copy.deepcopy(loss_fn), fullgraph=True, backend="aot_eager")
    eager = copy.deepcopy(loss_fn)
    for _ in range(2):
        torch.manual_seed(0)  # for a bank that starts with the first batch
        actual = compiled(out0, out1, *extra)
        torch.manual_seed(0)
        torch.testing.assert_close(actual, eager(out0, out1, *extra))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: nt_xent(x, x[:2]), ValueError, r"nt_xent: out1 expected \(4, 3\) on cpu, got float32 \(2, 3\)"),
        (lambda x: nt_xent(x[0], x), ValueError, r"nt_xent: out0 expected \(N, D\), got float32 \(3,\)"),
        (lambda x: nt_xent(x.long(), x), TypeError, r"nt_xent: out0 expected a float32 or .* got int64 \(4, 3\)"),
        (lambda x: nt_xent(x, None), TypeError, "nt_xent: out1 expected a float32 .* got NoneType None"),
        (lambda x: nt_xent(x, x, x[:, 0]), TypeError, r"nt_xent: assignments expected an int64 or int32 tensor"),
        (lambda x: nt_xent(x, x, torch.tensor([0, 1, -2, 0])), ValueError, "expected -1 or at least 0, got .*-2 to 1"),
        (lambda x: nt_xent(x, x, temperature=1e-9), ValueError, "nt_xent: temperature expected a magnitude"),
        (lambda x: nt_xent(x, x, temperature="a"), TypeError, "nt_xent: temperature expected a number .*, got str 'a'"),
        (lambda x: nt_xent(x, x, temperature=x[0]), ValueError, r"expected a number or a tensor \(\) or \(1,\), got"),
        (lambda x: nt_xent(x, x, temperature=torch.tensor(1)), TypeError, "temperature expected .*, got int64"),
        (lambda x: nt_xent(x, x, temperature=torch.tensor(0.0)), ValueError, "temperature expected a magnitude"),
        (lambda x: info_nce(x, x, temperature=torch.tensor(-1.0)), ValueError, "temperature expected at least 1e-8"),
        (lambda x: nt_xent(x, x, reduction="max"), ValueError, "nt_xent: reduction expected .*, got 'max'"),
        (lambda x: info_nce(x, x, x[:, :2]), ValueError, r"info_nce: queue expected \(M, 3\) on cpu, got"),
        (lambda x: info_nce(x, x[:, :2]), ValueError, r"info_nce: key expected \(4, 3\) on cpu, got float32 \(4, 2\)"),
        (lambda x: info_nce(x, x, reduction=""), ValueError, "info_nce: reduction expected"),
        (lambda x: NTXentLoss(0.0), ValueError, "NTXentLoss: temperature expected a magnitude"),
        (lambda x: InfoNCELoss(0.0), ValueError, "InfoNCELoss: temperature expected at least 1e-8"),
        (lambda x: InfoNCELoss(torch.tensor(0.5)), TypeError, "temperature expected a number or a parameter"),
        (lambda x: InfoNCELoss("0.5"), TypeError, "temperature expected a number or a parameter"),
        (lambda x: NTXentLoss(memory_bank_size=-1), ValueError, r"expected 0, M or \(M, D\), got int -1"),
        (lambda x: NTXentLoss(memory_bank_size=1.5), TypeError, r"expected 0, M or \(M, D\), got float 1.5"),
        (lambda x: NTXentLoss(memory_bank_size=(4, 0)), ValueError, r"memory_bank_size expected 0, M or \(M, D\)"),
        (lambda x: NTXentLoss(memory_bank_size=(4, 3))(x, x, torch.arange(4)), ValueError, "assignments expected None"),
        (lambda x: NTXentLoss(memory_bank_size=(4, 2))(x, x), ValueError, r"NTXentLoss: out0 expected \(N, 2\), got"),
        (lambda x: nt_xent(x, x, x[:, 0].long(), ignore_index=1.5), TypeError, "ignore_index expected an int, got"),
        (lambda x: nt_xent(x, x, x[:, 0].long(), ignore_index=None), TypeError, "ignore_index expected an int, got"),
        (lambda x: nt_xent(x, x, gather_distributed="no"), ValueError, "gather_distributed expected True or False"),
        (lambda x: NTXentLoss(memory_bank_size="12"), ValueError, r"expected 0, M or \(M, D\), got str '12'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(4, 3))


def test_nt_xent_is_refused_before_ranks_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastproto.losses.nt_xent.gather_rows", lambda rows: pytest.fail("gathered"))
    for bad in (torch.tensor([0, -2]), torch.tensor([0]), torch.zeros(2)):
        with pytest.raises((TypeError, ValueError), match="nt_xent: assignments expected"):
            nt_xent(torch.eye(2), torch.eye(2), bad, gather_distributed=True)


def test_a_refused_batch_leaves_no_bank_of_its_width() -> None:
    loss_fn = NTXentLoss(0.2, memory_bank_size=8)
    loss_fn.temperature = 0
    with pytest.raises(ValueError, match="temperature"):
        loss_fn(torch.randn(4, 3), torch.randn(4, 3))
    assert loss_fn.bank is None


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"bank": torch.ones(8)}, r"bank: \(8,\) saved, \(8, D\) wanted"),
        ({"bank": torch.tensor(1.0)}, r"bank: \(\) saved, \(8, D\) wanted"),
        ({"bank": torch.ones(8, 3), "bank_ptr": torch.tensor(99)}, "bank_ptr: 99 saved, 0 to 7 wanted"),
    ],
)
def test_a_bad_saved_bank_is_refused(state: dict[str, Tensor], message: str) -> None:
    loss_fn = NTXentLoss(0.2, memory_bank_size=8)
    with pytest.raises(RuntimeError, match=message):
        loss_fn.load_state_dict({"bank_ptr": torch.tensor(0)} | state)
    assert loss_fn.bank is None


def test_a_bank_is_loaded_without_reading_what_is_not_there() -> None:
    with FakeTensorMode():
        loss_fn = NTXentLoss(0.2, memory_bank_size=(8, 3))
        loss_fn.load_state_dict(NTXentLoss(0.2, memory_bank_size=(8, 3)).state_dict())


def test_bank_started_in_inference_mode_can_be_trained_with() -> None:
    loss_fn = NTXentLoss(memory_bank_size=8)
    out0, out1 = torch.randn(2, 4, 3)
    with torch.inference_mode():
        loss_fn(out0, out1)
    loss_fn(out0.clone().requires_grad_(), out1).backward()
    torch.testing.assert_close(loss_fn.bank[:4], F.normalize(out1, dim=1))


@pytest.mark.parametrize("saved", [4, 16])
@pytest.mark.parametrize("started", [False, True])
def test_bank_of_another_size_is_not_loaded(saved: int, started: bool) -> None:
    other, loss_fn = NTXentLoss(memory_bank_size=(saved, 3)), NTXentLoss(memory_bank_size=(8, 3) if started else 8)
    with pytest.raises(RuntimeError, match=rf"size mismatch for bank: \({saved}, 3\) saved, \(8, D\) wanted"):
        loss_fn.load_state_dict(other.state_dict())


def test_bank_stays_where_a_state_has_none() -> None:
    """That of a loss that has seen no batch, or of lightly's, which does not save its bank."""
    loss_fn = NTXentLoss(memory_bank_size=(8, 3))
    before = loss_fn.bank.clone()
    for state in (NTXentLoss(memory_bank_size=8).state_dict(), {}):
        loss_fn.load_state_dict(state)
        assert torch.equal(loss_fn.bank, before)
    with pytest.raises(RuntimeError, match=r'Missing key.*"bank_ptr"'):
        loss_fn.load_state_dict({"bank": before})


def test_bank_follows_its_input_to_another_device() -> None:
    loss_fn = NTXentLoss(memory_bank_size=(8, 3))
    loss_fn(torch.randn(4, 3, device="meta"), torch.randn(4, 3, device="meta"))
    assert loss_fn.bank.device.type == loss_fn.bank_ptr.device.type == "meta"


@pytest.mark.parametrize("with_queue", [False, True])
def test_info_nce_says_which_key_was_nearest(with_queue: bool) -> None:
    torch.manual_seed(0)
    query, key, queue = (torch.randn(n, 7, dtype=torch.float64) for n in (9, 9, 30))
    query.requires_grad_()
    scores = F.normalize(query.detach(), dim=1) @ F.normalize(torch.cat([key, queue]), dim=1).T / 0.3
    others = torch.eye(9, dtype=torch.bool).logical_not() if with_queue else torch.zeros(9, 9, dtype=torch.bool)
    scores[:, :9].masked_fill_(others, -torch.inf)
    scores = scores if with_queue else scores[:, :9]
    arguments = (query, key, queue if with_queue else None)
    loss, stats = info_nce(*arguments, temperature=0.3, return_stats=True)
    torch.testing.assert_close(loss, info_nce(*arguments, temperature=0.3))
    assert torch.equal(stats.top1, scores.argmax(1))
    torch.testing.assert_close(stats.positive_logit, scores.diagonal())
    torch.testing.assert_close(stats.lse, scores.logsumexp(1))
    torch.testing.assert_close(stats.entropy, torch.distributions.Categorical(logits=scores).entropy())
    loss.backward()
    assert query.grad is not None
