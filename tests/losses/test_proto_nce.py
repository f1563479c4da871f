"""ProtoNCE against loops in float64, and its sampling of negatives."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastproto.losses import ProtoNCELoss
from fastproto.losses.functional import proto_nce

Problem = dict[str, Any]


def problem(n: int, k: int, d: int, dtype: torch.dtype = torch.float64) -> Problem:
    return {
        "features": torch.randn(n, d, dtype=dtype, requires_grad=True),
        "prototypes": torch.randn(k, d, dtype=dtype, requires_grad=True),
        "assignments": torch.randint(-1, k, (n,)),
        "concentration": torch.rand(k, dtype=dtype).add(0.2).requires_grad_(),
        "bias": torch.randn(k, dtype=dtype, requires_grad=True),
    }


def oracle(
    features: Tensor,
    prototypes: Tensor,
    assignments: Tensor,
    concentration: float | Tensor,
    bias: Tensor | None = None,
    normalize: bool = True,
    seen: set[int] | None = None,
) -> np.ndarray:
    """Row losses by the formula, over the prototypes that are seen."""
    v, c = (x.detach().double().numpy() for x in (features, prototypes))
    if normalize:
        v, c = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (v, c))
    phi = concentration.tolist() if isinstance(concentration, Tensor) else [concentration] * len(c)
    b = [0.0] * len(c) if bias is None else bias.tolist()
    losses = []
    for i, y in enumerate(assignments.tolist()):
        if y == -1:
            losses.append(0.0)
            continue
        logits = {j: v[i] @ c[j] / phi[j] + b[j] for j in (range(len(c)) if seen is None else seen)}
        losses.append(math.log(sum(math.exp(s) for s in logits.values())) - logits[y])
    return np.array(losses)


@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 24), (33, 507, 96), (33, 5, 130), (300, 5, 7)])
@pytest.mark.parametrize("normalize", [True, False])
def test_is_its_formula(n: int, k: int, d: int, normalize: bool) -> None:
    arguments = problem(n, k, d)
    arguments["prototypes"].data /= d**0.5
    rows = oracle(**arguments, normalize=normalize)
    counted = max(int((arguments["assignments"] >= 0).sum()), 1)
    for reduction, value in (("none", rows), ("sum", rows.sum()), ("mean", rows.sum() / counted)):
        loss = proto_nce(**arguments, normalize=normalize, reduction=reduction)
        torch.testing.assert_close(loss, torch.as_tensor(value))


def test_concentration_may_be_a_number() -> None:
    arguments = problem(5, 7, 3) | {"concentration": 0.3, "bias": None}
    expected = oracle(**arguments)
    torch.testing.assert_close(proto_nce(**arguments, reduction="none"), torch.tensor(expected))
    del arguments["concentration"]
    torch.testing.assert_close(
        proto_nce(**arguments, reduction="none"), torch.tensor(oracle(**arguments, concentration=0.1))
    )


@pytest.mark.parametrize("num_negatives", [None, 2])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_to_everything(num_negatives: int | None, normalize: bool) -> None:
    arguments = problem(5, 9, 3)
    names = ("features", "prototypes", "concentration", "bias")

    def rows(*leaves: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        options = {"normalize": normalize, "num_negatives": num_negatives, "generator": generator}
        values = dict(zip(names, leaves, strict=True))
        return proto_nce(**values, assignments=arguments["assignments"], reduction="none", **options)

    assert torch.autograd.gradcheck(rows, tuple(arguments[name] for name in names))


def test_frozen_prototypes_get_no_gradient() -> None:
    arguments = problem(5, 7, 3)
    frozen = {name: arguments[name].detach() for name in ("prototypes", "concentration", "bias")}
    proto_nce(**{**arguments, **frozen}).backward()
    assert arguments["features"].grad is not None
    assert all(arguments[name].grad is None for name in frozen)


@pytest.mark.parametrize("num_negatives", [None, 3])
def test_several_sets_are_their_mean(num_negatives: int | None) -> None:
    features = torch.randn(6, 4, dtype=torch.float64)
    sets = [problem(6, k, 4) for k in (3, 9, 5)]
    lists = {name: [one[name] for one in sets] for name in ("prototypes", "assignments", "concentration", "bias")}
    lists["assignments"][1] = torch.full((6,), -1)  # a set in which no row counts
    for reduction in ("none", "sum", "mean"):
        options = {"reduction": reduction, "num_negatives": num_negatives, "generator": torch.Generator()}
        options["generator"].manual_seed(5)
        actual, stats = proto_nce(features, **lists, **options, return_stats=True)
        options["generator"].manual_seed(5)
        singles = [
            proto_nce(features, *one, bias=bias, **options, return_stats=True)
            for *one, bias in zip(*lists.values(), strict=True)
        ]
        torch.testing.assert_close(actual, sum(loss for loss, _ in singles) / 3)
        for several, (_, single) in zip(stats, singles, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(several, single, strict=True))
    one_number = ProtoNCELoss()(features, lists["prototypes"], lists["assignments"], 0.2)
    numbers = ProtoNCELoss()(features, lists["prototypes"], lists["assignments"], [0.2, 0.2, 0.2])
    assert torch.equal(one_number, numbers)


@pytest.mark.parametrize("num_negatives", [None, 4])
def test_stats(num_negatives: int | None) -> None:
    arguments = problem(33, 50, 24) | {"bias": None}
    generator = torch.Generator().manual_seed(1)
    loss, stats = proto_nce(
        **arguments, num_negatives=num_negatives, generator=generator, return_stats=True, reduction="none"
    )
    counted = arguments["assignments"] >= 0
    torch.testing.assert_close((stats.lse - stats.positive_logit)[counted], loss[counted])
    v, c = (torch.nn.functional.normalize(arguments[name].detach(), dim=1) for name in ("features", "prototypes"))
    logits = v @ c.T / arguments["concentration"].detach()
    positive = logits.gather(1, arguments["assignments"].clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(stats.positive_logit, positive.where(counted, 0))
    assert torch.equal(stats.top1[~counted], torch.full_like(stats.top1[~counted], -1))
    if num_negatives is None:
        assert torch.equal(stats.top1[counted], logits.argmax(1)[counted])
        torch.testing.assert_close(
            stats.entropy[counted], torch.distributions.Categorical(logits=logits[counted]).entropy()
        )
    else:
        best = logits.gather(1, stats.top1.clamp(min=0)[:, None])[:, 0]
        assert (best >= positive)[counted].all()
    assert not any(value.requires_grad for value in stats)


def hidden_prototypes(arguments: Problem, num_negatives: int, generator: torch.Generator) -> set[int]:
    """Prototypes whose bias gets no gradient: those that the step left out."""
    loss = proto_nce(**arguments, num_negatives=num_negatives, generator=generator)
    (gradient,) = torch.autograd.grad(loss, arguments["bias"])
    return set((gradient == 0).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("num_negatives", [0, 1, 7, 40, 1000])
def test_sampling_sums_over_the_distinct_positives_and_r_others(num_negatives: int) -> None:
    arguments = problem(12, 50, 8)
    arguments["assignments"] = torch.tensor([3, 3, 3, 9, -1, 0, 0, 49, -1, 9, 3, 7])
    seen = set(range(50)) - hidden_prototypes(arguments, num_negatives, torch.Generator().manual_seed(2))
    assert {0, 3, 7, 9, 49} <= seen
    assert len(seen) == min(50, 5 + num_negatives)
    loss = proto_nce(
        **arguments, num_negatives=num_negatives, generator=torch.Generator().manual_seed(2), reduction="none"
    )
    torch.testing.assert_close(loss, torch.tensor(oracle(**arguments, seen=seen)))


def test_enough_negatives_are_all_prototypes() -> None:
    arguments = problem(12, 50, 8)
    torch.testing.assert_close(proto_nce(**arguments, num_negatives=50), proto_nce(**arguments))
    del arguments["bias"]
    torch.testing.assert_close(ProtoNCELoss(num_negatives=50)(**arguments), ProtoNCELoss()(**arguments))


def test_negatives_are_drawn_uniformly_and_anew() -> None:
    arguments = problem(4, 20, 3)
    arguments["assignments"] = torch.tensor([0, 1, 1, -1])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(20)
    for _ in range(300):
        seen = set(range(20)) - hidden_prototypes(arguments, 6, generator)
        counts[sorted(seen)] += 1
    assert counts[:2].tolist() == [300, 300]
    # Each of 18 with probability 1/3: 100 times, standard deviation 8.
    assert (counts[2:] - 100).abs().max() < 35


@pytest.mark.parametrize("num_negatives", [None, 0, 3])
def test_nothing_that_counts_is_zero_with_zero_gradient(num_negatives: int | None) -> None:
    for n in (0, 6):
        arguments = problem(n, 7, 3) | {"assignments": torch.full((n,), -1)}
        loss = proto_nce(**arguments, num_negatives=num_negatives)
        assert loss.item() == 0
        loss.backward()
        for name in ("features", "prototypes", "concentration", "bias"):
            assert torch.equal(arguments[name].grad, torch.zeros_like(arguments[name])), name


@pytest.mark.parametrize("num_negatives", [None, 3])
def test_an_ignored_nan_row_reaches_nothing_else(num_negatives: int | None) -> None:
    arguments = problem(6, 7, 3)
    arguments["assignments"][2] = -1
    arguments["features"].data[2] = float("nan")
    proto_nce(**arguments, num_negatives=num_negatives).backward()
    for name in ("prototypes", "concentration", "bias"):
        assert arguments[name].grad.isfinite().all(), name
    assert arguments["features"].grad[[0, 1, 3, 4, 5]].isfinite().all()
    arguments["assignments"][2] = 0
    assert proto_nce(**arguments, num_negatives=num_negatives).isnan()


@pytest.mark.parametrize("num_negatives", [None, 2])
def test_ignore_index(num_negatives: int | None) -> None:
    arguments = problem(6, 5, 3)
    arguments["assignments"] = torch.tensor([0, -1, 4, -1, 1, 4])
    expected, stats = proto_nce(
        **arguments, num_negatives=num_negatives, generator=torch.Generator().manual_seed(0), return_stats=True
    )
    arguments["assignments"] = torch.tensor([0, 2, 4, 2, 1, 4], dtype=torch.int32)
    actual, other = proto_nce(
        **arguments,
        num_negatives=num_negatives,
        generator=torch.Generator().manual_seed(0),
        return_stats=True,
        ignore_index=2,
    )
    assert torch.equal(actual, expected)
    assert torch.equal(other.top1, stats.top1.where(stats.top1 >= 0, 2))


def test_zero_rows_and_strides() -> None:
    arguments = problem(6, 5, 3)
    arguments["prototypes"].data[2] = 0  # an empty cluster
    assert proto_nce(**arguments).isfinite()
    loose = {**arguments, "features": arguments["features"].T.contiguous().T}
    loose["prototypes"] = torch.stack([arguments["prototypes"]] * 2, 2)[..., 1]
    assert not loose["prototypes"].is_contiguous()
    torch.testing.assert_close(proto_nce(**loose), proto_nce(**arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_as_exact_as_plain_pytorch(dtype: torch.dtype) -> None:
    exact = problem(64, 200, 96) | {"bias": None, "concentration": 0.1}
    halves = [exact[name].detach().to(dtype).requires_grad_() for name in ("features", "prototypes")]
    labels = exact["assignments"]
    loss = proto_nce(*halves, labels)
    expected = proto_nce(*(x.double() for x in halves), labels)
    v, c = (torch.nn.functional.normalize(x, dim=1) for x in halves)
    plain = torch.nn.functional.cross_entropy(v @ c.T / 0.1, labels, ignore_index=-1)
    assert loss.dtype == torch.float32
    assert (loss - expected).abs() <= 2 * (plain - expected).abs() + 1e-6
    for a, b, truth in zip(*(torch.autograd.grad(x, halves) for x in (loss, plain, expected)), strict=True):
        assert a.dtype == dtype
        error, eager_error = ((grad.double() - truth.double()).abs().max() for grad in (a, b))
        assert error <= 2 * eager_error + 1e-6


def test_autocast_does_not_lower() -> None:
    arguments = problem(16, 9, 24, torch.float32)
    expected = proto_nce(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(proto_nce(**arguments), expected)


@pytest.mark.parametrize("num_negatives", [None, 3])
def test_compiles_as_one_graph(num_negatives: int | None) -> None:
    arguments = problem(6, 5, 3)
    del arguments["bias"]
    loss_fn = ProtoNCELoss(num_negatives)
    compiled = torch.compile(copy.deepcopy(loss_fn), fullgraph=True, backend="eager")
    actual = compiled(**arguments)
    if num_negatives is None:
        torch.testing.assert_close(actual, loss_fn(**arguments))
        lists = {name: [value, value] for name, value in arguments.items() if name != "features"}
        torch.testing.assert_close(compiled(arguments["features"], **lists), actual)
    else:  # drawn anew each time: between the positives alone and all prototypes
        low = proto_nce(**arguments, num_negatives=0)
        assert low <= actual <= proto_nce(**arguments)


@pytest.mark.parametrize("sets", [1, 2, 3])
def test_compiles_without_a_gradient(sets: int) -> None:
    """By the number of keys alone the compiler once took two sets for a function without a context."""
    features, prototypes, labels = torch.randn(6, 4), torch.randn(5, 4), torch.arange(6) % 5

    def loss(x: Tensor) -> Tensor:
        return proto_nce(x, [prototypes] * sets, [labels] * sets, 0.2)

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features), loss(features))
    with torch.no_grad():
        torch.testing.assert_close(compiled(features.clone().requires_grad_()), loss(features))


def integers(*values: int) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": torch.ones(4)}, ValueError, r"proto_nce: features expected \(N, D\), got float32 \(4,\)"),
        ({"prototypes": torch.ones(3, 5)}, ValueError, r"proto_nce: prototypes expected \(K, 4\) on cpu, got"),
        ({"prototypes": torch.ones(0, 4)}, ValueError, "proto_nce: prototypes expected at least one row"),
        ({"prototypes": None}, TypeError, "proto_nce: prototypes expected a float32 or .*, got NoneType None"),
        ({"prototypes": []}, ValueError, "proto_nce: prototypes expected a tensor or at least one"),
        ({"assignments": torch.ones(2)}, TypeError, "proto_nce: assignments expected an int64 or int32 tensor"),
        ({"assignments": integers(0)}, ValueError, r"proto_nce: assignments expected \(2,\) on cpu, got int64 \(1,\)"),
        ({"assignments": integers(0, 3)}, ValueError, "assignments expected -1 or 0 to 2, got values from 0 to 3"),
        ({"concentration": 0.0}, ValueError, "proto_nce: concentration expected at least 1e-08, finite, got float 0.0"),
        ({"concentration": None}, TypeError, "proto_nce: concentration expected a number or"),
        ({"concentration": torch.zeros(3)}, ValueError, "concentration expected at least 1e-08, finite, got values"),
        ({"concentration": torch.tensor([1, math.inf, 1])}, ValueError, "expected .*, finite, got values from 1"),
        ({"concentration": torch.ones(2)}, ValueError, r"concentration expected \(3,\) on cpu, got float32 \(2,\)"),
        ({"bias": torch.ones(2)}, ValueError, r"proto_nce: bias expected \(3,\) on cpu, got float32 \(2,\)"),
        ({"num_negatives": 10**30}, ValueError, "num_negatives expected None or an integer of at least 0 and 63 bits"),
        ({"ignore_index": None}, TypeError, "proto_nce: ignore_index expected an int, got NoneType None"),
        ({"normalize": "no"}, ValueError, "proto_nce: normalize expected True or False, got str 'no'"),
        ({"num_negatives": -1}, ValueError, "proto_nce: num_negatives expected None or an integer of at least 0"),
        ({"reduction": "max"}, ValueError, "proto_nce: reduction expected"),
        ({"prototypes": [torch.ones(3, 4)]}, TypeError, "proto_nce: assignments expected a list of 1 tensors"),
        (
            {"prototypes": [torch.ones(3, 4)], "assignments": [integers(0, 1)] * 2},
            ValueError,
            "proto_nce: assignments expected 1 entries, one per prototype set, got 2",
        ),
        (
            {"prototypes": [torch.ones(3, 4)], "assignments": [integers(0, 1)], "concentration": torch.ones(3)},
            TypeError,
            "proto_nce: concentration expected a number or a list of 1",
        ),
    ],
)
def test_bad_input_is_refused_by_name(changes: Problem, error: type[Exception], message: str) -> None:
    arguments = {"features": torch.ones(2, 4), "prototypes": torch.ones(3, 4), "assignments": integers(0, 1)} | changes
    with pytest.raises(error, match=message):
        proto_nce(**arguments)
    with pytest.raises(TypeError, match="ProtoNCELoss: ignore_index expected an int, got str 'a'"):
        ProtoNCELoss(ignore_index="a")
    with pytest.raises(ValueError, match="ProtoNCELoss: num_negatives expected None or an integer"):
        ProtoNCELoss(num_negatives=-1)


@pytest.mark.parametrize("num_negatives", [None, 2])
def test_compiled_once_for_any_number_of_prototypes(num_negatives: int | None) -> None:
    compiled = torch.compile(ProtoNCELoss(num_negatives=num_negatives), fullgraph=True, backend="aot_eager")
    for k in (5, 6, 7):
        features = torch.randn(4, 3, requires_grad=True)
        compiled(features, torch.randn(k, 3), torch.arange(4), 0.1).backward()
        assert features.grad is not None and features.grad.isfinite().all()


def test_a_trace_holds_no_number_of_rows() -> None:
    features, prototypes, all_count = torch.randn(8, 3), torch.randn(4, 3), torch.arange(8) % 4
    some = torch.where(torch.arange(8) < 6, -1, all_count)
    traced = make_fx(lambda labels: proto_nce(features, prototypes, labels))(some)
    torch.testing.assert_close(traced(all_count), proto_nce(features, prototypes, all_count))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in (features, prototypes, all_count)]
        assert proto_nce(*fake).shape == ()


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("as_number", [False, True])
def test_float64_rows_keep_their_digits_beside_narrower_options(sets: int, as_number: bool) -> None:
    """1 / φ is taken in float64 where rows are, whatever dtype φ and the prototypes have."""
    torch.manual_seed(0)
    x, y, t = torch.randn(9, 4).double(), torch.randn(5, 4), torch.randint(5, (9,))
    phi = 0.07 if as_number else torch.rand(5) + 0.05
    args = (y, t, phi) if sets == 1 else ([y] * 2, [t] * 2, [phi] * 2)
    logits = F.normalize(x, dim=1) @ F.normalize(y.double(), dim=1).T / phi
    torch.testing.assert_close(proto_nce(x, *args), F.cross_entropy(logits, t), rtol=1e-13, atol=0)
