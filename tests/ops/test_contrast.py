"""The contrast op against loops in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastproto
from fastproto import _native
from fastproto._check import expect_index
from fastproto.ops.contrast import Contrast, contrast

SHAPES = [(1, 1, 24), (33, 507, 130), (1, 507, 96), (33, 1, 1), (5, 7, 24)]


def problem(n: int, k: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Features, keys and targets with duplicates and ignored rows, and every option."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(-1, k, (n,), generator=generator)
    return {
        "features": torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(),
        "keys": torch.randn(k, d, generator=generator, dtype=torch.float64).div(d**0.5).to(dtype).requires_grad_(),
        "targets": targets,
        "scale": torch.rand(k, generator=generator, dtype=torch.float64).add(0.5).to(dtype).requires_grad_(),
        "bias": torch.randn(k, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(),
        "groups": torch.randint(0, 3, (n,), generator=generator),
        "key_groups": torch.randint(0, 3, (k,), generator=generator),
    }


def oracle(
    features: Tensor,
    keys: Tensor,
    targets: Tensor,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    ignore_index: int = -1,
) -> tuple[Contrast, dict[str, np.ndarray]]:
    """Values by the formula, and the gradients of the summed loss, from dL_i/ds_ij = p_ij - 1[j = t]."""
    x, y = (v.detach().double().numpy() for v in (features, keys))
    (n, d), k = x.shape, len(y)
    a = np.broadcast_to(np.asarray(scale.detach() if isinstance(scale, Tensor) else scale, dtype=np.float64), (k,))
    b = np.zeros(k) if bias is None else bias.detach().double().numpy()
    out: list[list[float]] = []
    grads = {"features": np.zeros((n, d)), "keys": np.zeros((k, d)), "scale": np.zeros(k), "bias": np.zeros(k)}
    for i, t in enumerate(targets.tolist()):
        if t == ignore_index:
            out.append([0, 0, 0, ignore_index, 0])
            continue
        seen = [j for j in range(k) if j == t or groups is None or groups[i] != key_groups[j]]
        s = {j: float(x[i] @ y[j] * a[j] + b[j]) for j in seen}
        top = max(s.values())
        lse = top + math.log(sum(math.exp(v - top) for v in s.values()))
        p = {j: math.exp(v - lse) for j, v in s.items()}
        entropy = -sum(v * math.log(v) for v in p.values() if v > 0)
        out.append([lse - s[t], lse, entropy, next(j for j in seen if s[j] == top), s[t]])
        for j in seen:
            g = p[j] - (j == t)
            grads["features"][i] += g * a[j] * y[j]
            grads["keys"][j] += g * a[j] * x[i]
            grads["scale"][j] += g * (x[i] @ y[j])
            grads["bias"][j] += g
    columns = np.array(out, dtype=np.float64).reshape(n, 5).T
    return Contrast(*(torch.tensor(c) for c in columns)), grads


def check(arguments: dict[str, Any]) -> None:
    rows = contrast(**arguments)
    expected, gradients = oracle(**arguments)
    for name, value in rows._asdict().items():
        torch.testing.assert_close(
            value.double(), getattr(expected, name), msg=lambda text, name=name: f"{name}: {text}"
        )
    assert rows.top1.dtype == torch.int64
    leaves = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad}
    actual = torch.autograd.grad(rows.loss.sum(), list(leaves.values()))
    for name, value in zip(leaves, actual, strict=True):
        torch.testing.assert_close(value, torch.tensor(gradients[name]), msg=lambda text, name=name: f"d{name}: {text}")


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, int, int]) -> None:
    arguments = problem(*shape)
    check(arguments)
    check({name: arguments[name] for name in ("features", "keys", "targets")})
    check({**arguments, "scale": 2.5, "bias": None})


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 6), k=st.integers(1, 9), d=st.integers(1, 5), seed=st.integers(0, 2**32 - 1), grouped=st.booleans()
)
def test_any_small_shape(n: int, k: int, d: int, seed: int, grouped: bool) -> None:
    arguments = problem(n, k, d, seed)
    check(arguments if grouped else {**arguments, "groups": None, "key_groups": None})


def test_random_upstream_gradients() -> None:
    arguments = problem(5, 7, 3)
    names = ("features", "keys", "scale", "bias")
    rest = {name: value for name, value in arguments.items() if name not in names}
    assert torch.autograd.gradcheck(
        lambda *leaves: contrast(**dict(zip(names, leaves, strict=True)), **rest).loss,
        tuple(arguments[name] for name in names),
    )


def test_only_the_loss_and_only_what_asks_has_a_gradient() -> None:
    arguments = problem(5, 7, 3)
    arguments["keys"].requires_grad_(False)
    rows = contrast(**arguments)
    assert rows.loss.requires_grad
    assert not any(value.requires_grad for value in rows[1:])
    rows.loss.sum().backward()
    assert arguments["keys"].grad is None
    frozen = {name: value.detach() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    assert not contrast(**frozen).loss.requires_grad


class NoGradient(torch.autograd.Function):
    """x, and no upstream gradient for what made it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_no_upstream_gradient_gives_none() -> None:
    arguments = problem(5, 7, 3)
    leaves = [arguments[name] for name in ("features", "keys", "scale", "bias")]
    loss = NoGradient.apply(contrast(**arguments).loss).sum()
    assert torch.autograd.grad(loss, leaves, allow_unused=True) == (None,) * 4


@pytest.mark.parametrize("divisor", [None, 5.0, torch.tensor(5.0)])
def test_a_second_backward_pass_gives_the_same_and_a_second_derivative_is_refused(divisor: float | None) -> None:
    arguments = problem(5, 7, 3)
    leaves = [arguments[name] for name in ("features", "keys", "scale", "bias")]
    loss = contrast(**arguments, divisor=divisor).loss.square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(map(torch.equal, first, again))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again[0].sum().backward()


@pytest.mark.parametrize("name", ["features", "keys", "scale", "bias"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_second_derivative_is_refused_however_it_is_asked_for(name: str, normalize: bool) -> None:
    """Asked for one leaf alone autograd leaves out what does not lead there: the refusal has to."""
    arguments = {k: v.detach() if isinstance(v, Tensor) else v for k, v in problem(5, 7, 3).items()}
    leaf = arguments[name].requires_grad_()
    arguments[name] = leaf.tanh() if name in ("features", "keys") else leaf * 1
    loss = contrast(**arguments, normalize=normalize).loss.sum()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(gradient.square().sum(), leaf)


def test_the_target_is_seen_in_its_own_group() -> None:
    features, keys = torch.randn(4, 3), torch.randn(6, 3)
    everyone = {"groups": torch.zeros(4, dtype=torch.int32), "key_groups": torch.zeros(6, dtype=torch.int32)}
    rows = contrast(features, keys, torch.tensor([0, 5, 2, 2], dtype=torch.int32), **everyone)
    assert torch.equal(rows.loss, torch.zeros(4))
    assert torch.equal(rows.entropy, torch.zeros(4))
    assert torch.equal(rows.top1, torch.tensor([0, 5, 2, 2]))
    assert torch.equal(rows.lse, rows.positive_logit)


def test_a_bias_of_minus_infinity_hides_a_key() -> None:
    arguments = problem(9, 7, 4) | {"groups": None, "key_groups": None}
    arguments["targets"] = arguments["targets"].clamp(max=4)
    hidden = torch.tensor([0.0, 0, 0, 0, 0, -math.inf, -math.inf], dtype=torch.float64)
    full = contrast(**{**arguments, "bias": hidden})
    fewer = {name: arguments[name][:5] for name in ("keys", "scale")}
    short = contrast(arguments["features"], fewer["keys"], arguments["targets"], scale=fewer["scale"])
    for name in Contrast._fields:
        torch.testing.assert_close(getattr(full, name), getattr(short, name))
    for gradient in torch.autograd.grad(full.loss.sum(), [arguments["keys"], arguments["scale"]]):
        assert torch.equal(gradient[5:], torch.zeros_like(gradient[5:]))


@pytest.mark.parametrize("ignore_index", [-1, -100, 2])
def test_ignored_rows_give_nothing_even_if_nan(ignore_index: int) -> None:
    arguments = problem(6, 5, 3)
    arguments["targets"] = torch.tensor([0, ignore_index, 4, 1, ignore_index, 0])
    arguments["features"].data[1] = float("nan")
    check({**arguments, "ignore_index": ignore_index})
    loss = contrast(**{**arguments, "targets": torch.full((6,), ignore_index)}, ignore_index=ignore_index).loss
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(arguments["keys"].grad, torch.zeros_like(arguments["keys"]))
    assert torch.equal(arguments["features"].grad, torch.zeros_like(arguments["features"]))


def test_nan_in_a_row_shows_in_that_row() -> None:
    features, keys = torch.randn(3, 4), torch.randn(5, 4)
    features[1, 0] = float("nan")
    rows = contrast(features, keys, torch.tensor([0, 1, 2]))
    assert rows.loss.isnan().tolist() == [False, True, False]


def test_ties_go_to_the_lowest_index() -> None:
    keys = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert contrast(torch.tensor([[1.0, 0.0]]), keys, torch.tensor([2])).top1.tolist() == [1]


@pytest.mark.parametrize("k", [0, 5])
def test_empty_batch(k: int) -> None:
    features, keys = torch.zeros(0, 3, requires_grad=True), torch.randn(k, 3, requires_grad=True)
    rows = contrast(features, keys, torch.zeros(0, dtype=torch.int64))
    assert all(value.shape == (0,) for value in rows)
    rows.loss.sum().backward()
    assert torch.equal(features.grad, torch.zeros(0, 3))
    assert torch.equal(keys.grad, torch.zeros(k, 3))


def test_strides_do_not_matter() -> None:
    arguments = problem(33, 17, 24)
    loose = {
        name: torch.stack([value.detach(), value.detach()], -1)[..., 1] if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    assert not any(value.is_contiguous() for value in loose.values())
    for a, b in zip(contrast(**loose), contrast(**arguments), strict=True):
        torch.testing.assert_close(a, b.detach())
    expanded = contrast(torch.ones(1, 24).expand(4, 24), torch.ones(1, 24).expand(3, 24), torch.zeros(4).long())
    torch.testing.assert_close(expanded.loss, torch.full((4,), math.log(3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_as_exact_as_plain_pytorch(dtype: torch.dtype) -> None:
    arguments = problem(33, 507, 130, dtype=dtype)
    arguments = {name: arguments[name] for name in ("features", "keys", "targets")}
    leaves = [arguments["features"], arguments["keys"]]
    rows = contrast(**arguments, scale=4.0)
    expected, gradients = oracle(**arguments, scale=4.0)
    plain = torch.nn.functional.cross_entropy(
        leaves[0] @ leaves[1].T * 4.0, arguments["targets"], ignore_index=-1, reduction="none"
    )
    assert rows.loss.dtype == torch.float32

    def error(value: Tensor, exact: Tensor) -> float:
        return (value.detach().double() - exact).abs().max().item()

    assert error(rows.loss, expected.loss) <= 2 * error(plain, expected.loss) + 1e-6
    upstream = torch.ones(33)
    ours = torch.autograd.grad(rows.loss, leaves, upstream)
    theirs = torch.autograd.grad(plain, leaves, upstream.to(plain.dtype))
    for a, b, name in zip(ours, theirs, ("features", "keys"), strict=True):
        exact = torch.tensor(gradients[name])
        assert a.dtype == dtype
        assert error(a, exact) <= 2 * error(b, exact) + 1e-6


def test_a_small_loss_keeps_its_digits() -> None:
    loss = contrast(torch.tensor([[1.0, 0.0]]), torch.eye(2), torch.tensor([0]), scale=8.0).loss
    torch.testing.assert_close(loss, torch.tensor([math.log1p(math.exp(-8))], dtype=torch.float32), rtol=1e-3, atol=0)


def test_dtypes_mix_and_autocast_does_not_lower() -> None:
    features, keys, targets = torch.randn(4, 8), torch.randn(5, 8), torch.tensor([0, 1, 2, 3])
    assert contrast(features.half(), keys, targets).loss.dtype == torch.float32
    assert contrast(features.half(), keys.bfloat16(), targets).loss.dtype == torch.float32
    assert contrast(features, keys.double(), targets).loss.dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = contrast(features, keys, targets).loss
    assert torch.equal(lowered, contrast(features, keys, targets).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_lower_the_reference_either(dtype: torch.dtype) -> None:
    arguments = problem(40, 30, 300, dtype=torch.float32)
    leaves = [arguments[name] for name in ("features", "keys", "scale", "bias")]
    with fastproto.backend("reference"):
        loss = contrast(**arguments).loss
        plain = torch.autograd.grad(loss.sum(), leaves)
        with torch.autocast("cpu", dtype=dtype):
            lowered = contrast(**arguments).loss
            gradients = torch.autograd.grad(lowered.sum(), leaves)
    assert torch.equal(lowered, loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain, strict=True))


def test_the_same_bits_every_run() -> None:
    arguments = problem(33, 507, 130, dtype=torch.float32)
    leaves = [arguments[name] for name in ("features", "keys", "scale", "bias")]

    def run() -> list[Tensor]:
        rows = contrast(**arguments)
        return [*rows, *torch.autograd.grad(rows.loss.sum(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_compiles_as_one_graph() -> None:
    arguments = problem(6, 5, 3)
    compiled = torch.compile(contrast, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(**arguments), contrast(**arguments)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    leaves = [arguments[name] for name in ("features", "keys", "scale", "bias")]
    gradients = (torch.autograd.grad(rows.loss.sum(), leaves) for rows in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_reference_can_be_forced_and_others_say_why_not() -> None:
    arguments = problem(3, 4, 2)
    with fastproto.backend("reference"):
        contrast(**arguments)
    with fastproto.backend("cuda"), pytest.raises(RuntimeError, match="contrast_fwd: backend 'cuda' cannot run on cpu"):
        contrast(**arguments)


def integers(*values: int) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": [1]}, TypeError, r"contrast: features expected a float32 or .* tensor \(N, D\), got list \[1\]"),
        ({"features": torch.ones(2)}, ValueError, r"contrast: features expected \(N, D\), got float32 \(2,\) on cpu"),
        ({"keys": torch.ones(3, 5)}, ValueError, r"contrast: keys expected \(K, 4\) on cpu, got float32 \(3, 5\)"),
        ({"keys": torch.ones(0, 4)}, ValueError, r"contrast: keys expected at least one row, got float32 \(0, 4\)"),
        ({"keys": torch.ones(3, 4).int()}, TypeError, r"contrast: keys expected a float32 or .*, got int32"),
        ({"keys": torch.ones(3, 4, device="meta")}, ValueError, "contrast: keys expected .* on cpu, got .* on meta"),
        ({"targets": integers(0, 1, 2)}, ValueError, r"contrast: targets expected \(2,\) on cpu, got int64 \(3,\)"),
        ({"targets": torch.ones(2)}, TypeError, "contrast: targets expected an int64 or int32 tensor"),
        ({"targets": integers(0, 3)}, ValueError, "contrast: targets expected -1 or 0 to 2, got values from 0 to 3"),
        ({"targets": integers(0, -2)}, ValueError, "contrast: targets expected -1 or 0 to 2, got values from -2 to 0"),
        ({"ignore_index": 2**70}, ValueError, "contrast: ignore_index expected an integer of 64 bits"),
        ({"scale": "a"}, TypeError, r"contrast: scale expected a number or a \(K,\) tensor, got str 'a'"),
        ({"scale": torch.ones(2)}, ValueError, r"contrast: scale expected \(3,\) on cpu, got float32 \(2,\)"),
        ({"bias": torch.ones(2)}, ValueError, r"contrast: bias expected \(3,\) on cpu, got float32 \(2,\)"),
        ({"groups": integers(0, 1)}, ValueError, "contrast: groups and key_groups expected both or none, got one of"),
        ({"groups": integers(0), "key_groups": integers(0, 1, 2)}, ValueError, r"contrast: groups expected \(2,\)"),
        ({"groups": integers(0, 1), "key_groups": integers(0)}, ValueError, r"contrast: key_groups expected \(3,\)"),
    ],
)
def test_bad_input_is_refused_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"features": torch.ones(2, 4), "keys": torch.ones(3, 4), "targets": integers(0, 1)} | changes
    with pytest.raises(error, match=message):
        contrast(**arguments)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("entries", "ignore_index", "message"),
    [
        ([0, 1, 3], -1, "op: index expected -1 or 0 to 2, got values from 0 to 3"),
        ([1, 2, -1], 5, "op: index expected 5 or 0 to 2, got values from -1 to 2"),
        ([2, -1, -2], -1, "op: index expected -1 or 0 to 2, got values from -2 to 2"),
        ([3, 7, 7], 7, "op: index expected 7 or 0 to 2, got values from 0 to 3"),
        ([1, 2, 7], 7, ""),
        ([-1, -1, -1], -1, ""),
    ],
)
def test_indices_are_checked_alike_by_kernel_and_torch(
    monkeypatch: pytest.MonkeyPatch,
    compiled: bool,
    dtype: torch.dtype,
    entries: list[int],
    ignore_index: int,
    message: str,
) -> None:
    if not compiled:
        monkeypatch.setattr(_native, "cpp", None)
    counted = len(entries) - entries.count(ignore_index) if _native.cpp is not None else None
    column = torch.tensor([[entry, 9] for entry in entries], dtype=dtype)[:, 0]
    if message:
        with pytest.raises(ValueError, match=message):
            expect_index(column, "op", "index", 3, ignore_index)
    else:
        assert expect_index(column, "op", "index", 3, ignore_index) == counted
    expect_index(column[:0], "op", "index", 3, ignore_index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_rows_are_those_of_torch(dtype: torch.dtype) -> None:
    """Zero rows too, whose gradient F.normalize multiplies by 1e12."""
    arguments = problem(7, 9, 5, dtype=dtype)
    for name in ("features", "keys"):
        arguments[name] = arguments[name].detach().mul(3).index_fill(0, torch.tensor([2]), 0).requires_grad_()
    leaves = [arguments[name] for name in ("features", "keys", "scale", "bias")]
    upstream = torch.linspace(-1, 1, 7, dtype=dtype)
    ours = torch.autograd.grad(contrast(**arguments, normalize=True).loss, leaves, upstream)
    unit = {name: torch.nn.functional.normalize(arguments[name], dim=1) for name in ("features", "keys")}
    expected = torch.autograd.grad(contrast(**(arguments | unit)).loss, leaves, upstream)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-6)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_divisor_makes_one_number_of_the_rows(as_tensor: bool) -> None:
    arguments = problem(7, 9, 5)
    leaves = [arguments[name] for name in ("features", "keys", "scale", "bias")]
    divisor = torch.tensor(5.0, dtype=torch.float64) if as_tensor else 5.0
    mean = contrast(**arguments, divisor=divisor).loss
    expected = contrast(**arguments).loss.sum() / 5
    assert mean.shape == ()
    torch.testing.assert_close(mean, expected)
    for a, b in zip(torch.autograd.grad(mean * 3, leaves), torch.autograd.grad(expected * 3, leaves), strict=True):
        torch.testing.assert_close(a, b)
