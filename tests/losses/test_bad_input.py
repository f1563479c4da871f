"""What every public loss does with bad input: an error that names the argument, and NaN for NaN.

One row of ``LOSSES`` per loss: valid arguments, and which of them have N rows, D columns, labels and so on. The faults
are made from those, so that no loss can miss one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fastproto import losses
from fastproto.losses import functional
from fastproto.ops.contrast import contrast

N, D, C, K, M = 6, 4, 5, 3, 7
TENSORS: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("out0", "out1", "x0", "x1", "x", "query", "key", "features"), lambda: torch.randn(N, D)),
    **dict.fromkeys(("features0", "features1", "a", "b"), lambda: torch.randn(N, C)),
    "queue": lambda: torch.randn(M, D),
    "prototypes": lambda: torch.randn(K, D),
    "concentration": lambda: torch.rand(K) + 0.2,
    "assignments": lambda: torch.tensor([0, 1, 2, 0, 1, -1]),
    "same": lambda: torch.tensor([0, 1, 1, 0, 1, -1]),
    "mask": lambda: torch.ones(N, dtype=torch.bool),
    "weight": lambda: torch.randn(C),
    "bias": lambda: torch.randn(()),
}
LABELS = ("assignments", "same")


@dataclass
class Loss:
    """How one public loss is called, and what of it may be wrong."""

    make: Callable[..., Callable[..., Tensor]]  # from the options
    arguments: str
    options: dict[str, Any] = field(default_factory=dict)  # what it needs
    bad_options: dict[str, list[Any]] = field(default_factory=dict)
    labels: int | None = None  # labels run below this, None for no upper end
    any_shape: bool = False


def function(name: str) -> Callable[..., Callable[..., Tensor]]:
    return lambda **options: lambda **arguments: getattr(functional, name)(**arguments, **options)


SIGNED = {"temperature": [0.0, 9e-9, -9e-9, float("nan"), "0.1", None]}  # NT-Xent takes negative ones, as lightly does
TEMPERATURES = {"temperature": [*SIGNED["temperature"], -0.5]}
REDUCTIONS = {"reduction": ["max", None]}
NEGATIVES = {"num_negatives": [-1, 1.5]}
SETS = "features prototypes assignments concentration"
LOSSES = {
    "NTXentLoss": Loss(losses.NTXentLoss, "out0 out1 assignments", bad_options=SIGNED),
    "InfoNCELoss": Loss(losses.InfoNCELoss, "query key queue", bad_options=TEMPERATURES),
    "NegativeCosineSimilarity": Loss(losses.NegativeCosineSimilarity, "x0 x1", any_shape=True),
    "ProtoNCELoss": Loss(losses.ProtoNCELoss, SETS, bad_options=NEGATIVES, labels=K),
    "SiameseMetricLoss": Loss(
        losses.SiameseMetricLoss, "features0 features1 assignments", {"feature_dim": C}, {"pairs": ["some", None]}
    ),
    "SPCLLoss": Loss(
        losses.SPCLLoss,
        "out0 out1 features0 features1 assignments",
        {"feature_dim": C, "num_prototypes": K},
        SIGNED,
        K,
    ),
    "PAUCLoss": Loss(
        losses.PAUCLoss,
        "query key prototypes assignments concentration queue",
        bad_options={**TEMPERATURES, "uniform_t": [0.0, -1.0, "2"], "correlation": ["none", None]},
        labels=K,
    ),
    "AlignmentLoss": Loss(losses.AlignmentLoss, "x0 x1 mask", bad_options={"alpha": [0.9, -1, "2"]}),
    "UniformityLoss": Loss(losses.UniformityLoss, "x mask", bad_options={"t": [0.0, -1.0, "2"]}),
    "CorrelationLoss": Loss(losses.CorrelationLoss, "x0 x1 mask", bad_options={"kind": ["both", None]}),
    "nt_xent": Loss(function("nt_xent"), "out0 out1 assignments", bad_options=SIGNED | REDUCTIONS),
    "info_nce": Loss(function("info_nce"), "query key queue", bad_options=TEMPERATURES | REDUCTIONS),
    "proto_nce": Loss(function("proto_nce"), SETS, bad_options=NEGATIVES | REDUCTIONS, labels=K),
    "siamese_metric": Loss(function("siamese_metric"), "a b same weight bias", bad_options=REDUCTIONS, labels=2),
    "siamese_metric_all_pairs": Loss(
        function("siamese_metric_all_pairs"), "features0 features1 assignments weight bias"
    ),
    "batch_prototypes": Loss(function("batch_prototypes"), "features assignments"),
    "alignment": Loss(function("alignment"), "x0 x1 mask", bad_options={"alpha": [0.9, "2"]} | REDUCTIONS),
    "uniformity": Loss(function("uniformity"), "x mask", bad_options={"t": [0.0, "2"]}),
    "cross_correlation": Loss(function("cross_correlation"), "x0 x1 mask"),
    "covariance": Loss(function("covariance"), "x mask"),
}


def valid(loss: Loss) -> dict[str, Any]:
    torch.manual_seed(0)
    return {name: TENSORS[name]() for name in loss.arguments.split()}


def faults(loss: Loss) -> Iterator[tuple[str, str, Any]]:
    """Which argument is wrong, how, and its bad value. The first of a kind says what N, D and the device are."""
    arguments = valid(loss)
    first = next(iter(arguments))
    for name, value in arguments.items():
        yield name, "no tensor", "text"
        yield name, "complex", value.to(torch.complex64)
        leads = name == first or name.endswith("0")
        has_dim = value.dim() == 2 and not (leads and loss.any_shape)
        if has_dim or value.dim() < 2:
            yield name, "of one dimension too many", value[..., None]
        integers = name in LABELS or name == "mask"
        yield name, "float" if integers else "integer", value.float() if integers else value.long()
        if name != first:
            yield name, "on another device", value.to("meta")
        if has_dim:
            yield name, "of one dimension", value[0]
        if value.dim() == 2 and (not leads or (name == "features0" and "feature_dim" in loss.options)):
            yield name, "of another D", torch.randn(len(value), value.shape[1] + 1)
        if not leads and name not in ("queue", "prototypes", "bias"):
            yield name, "of another length", torch.cat([value, value])
        if name in LABELS:
            yield name, "below -1", value - 1
        if name in LABELS and loss.labels is not None:
            yield name, "too large", torch.where(value == value.max(), loss.labels, value)
        if name == "prototypes":
            yield name, "of no row", value[:0]
        if name == "concentration":
            yield name, "0", 0.0
            yield name, "negative", -0.1
            yield name, "None", None
            yield name, "0 in one place", value - value.min()
            yield name, "negative in all", -value
    if "concentration" in arguments:
        sets = {name: [arguments[name]] * 2 for name in ("prototypes", "assignments", "concentration")}
        for name in ("assignments", "concentration"):
            yield name, "a list of another length", sets | {name: sets[name] * 2}
            yield name, "a tensor beside lists", sets | {name: arguments[name]}
        yield "prototypes", "an empty list", sets | {"prototypes": []}


ROWS = [pytest.param(name, *row, id="-".join((name, *row[:2]))) for name in LOSSES for row in faults(LOSSES[name])]


def test_every_public_loss_is_in_the_table() -> None:
    assert set(LOSSES) == {*losses.__all__, *functional.__all__} - {"functional"}


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_s_arguments_are_valid(name: str) -> None:
    loss = LOSSES[name]
    result = loss.make(**loss.options)(**valid(loss))
    assert (result if isinstance(result, Tensor) else result[0]).isfinite().all()


@pytest.mark.parametrize(("name", "argument", "fault", "value"), ROWS)
def test_a_bad_argument_is_refused_by_its_name(name: str, argument: str, fault: str, value: Any) -> None:
    loss = LOSSES[name]
    changes = value if isinstance(value, dict) else {argument: value}
    wrong_kind = fault in ("no tensor", "complex", "integer", "float", "None", "a tensor beside lists")
    with pytest.raises(TypeError if wrong_kind else ValueError, match=rf"^\w+: {argument} expected .*, got "):
        loss.make(**loss.options)(**valid(loss) | changes)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(name, option, value) for name in LOSSES for option, bad in LOSSES[name].bad_options.items() for value in bad],
)
def test_a_bad_option_is_refused_by_its_name(name: str, option: str, value: Any) -> None:
    loss = LOSSES[name]
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: {option} expected .*, got "):
        loss.make(**loss.options | {option: value})(**valid(loss))


FEATURES = [
    (name, argument)
    for name in LOSSES
    for argument, value in valid(LOSSES[name]).items()
    if value.is_floating_point() and value.dim() == 2
]


@pytest.mark.parametrize(("name", "argument"), FEATURES)
def test_nan_in_is_nan_out(name: str, argument: str) -> None:
    loss = LOSSES[name]
    arguments = valid(loss)
    arguments[argument][1, 2] = torch.nan
    result = loss.make(**loss.options)(**arguments)
    assert (result if isinstance(result, Tensor) else result[0]).isnan().any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.SPCLLoss(3, -1), "SPCLLoss: num_prototypes expected an integer of at least 1, got int -1"),
        (lambda: losses.SPCLLoss(0, 3), "SPCLLoss: feature_dim expected an integer of at least 1, got int 0"),
        (lambda: losses.SPCLLoss(3, 3, metric_weight=math.nan), "SPCLLoss: metric_weight expected a finite number"),
        (lambda: losses.SiameseMetricLoss("a"), "SiameseMetricLoss: feature_dim expected an integer .*, got str 'a'"),
        (lambda: losses.PAUCLoss(align_weight="x"), "PAUCLoss: align_weight expected a finite number, got str 'x'"),
        (lambda: losses.NTXentLoss(math.inf), "NTXentLoss: temperature expected a magnitude .*, finite, got float inf"),
        (lambda: losses.NegativeCosineSimilarity(eps="x"), "NegativeCosineSimilarity: eps expected a number"),
        (lambda: losses.NegativeCosineSimilarity(dim=1.0), "NegativeCosineSimilarity: dim expected an int"),
    ],
)
def test_what_a_loss_is_made_with_is_checked_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize("reference", [False, True])
def test_an_int32_is_not_compared_with_the_low_bits_of_ignore_index(
    monkeypatch: pytest.MonkeyPatch, reference: bool
) -> None:
    if reference:
        monkeypatch.setattr("fastproto._settings.forced_backend", "reference")
        monkeypatch.setattr("fastproto._native.cpp", None)  # which checks by itself
    x, labels = torch.randn(4, 3), torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    metric, ignored = (torch.ones(3), torch.tensor(1.0)), {"ignore_index": 1 << 32}
    calls = {
        "proto_nce": lambda of: functional.proto_nce(x, x, of, **ignored),
        "two sets": lambda of: functional.proto_nce(x, [x, x], [of, of], **ignored),
        "contrast": lambda of: contrast(x, x, of, **ignored).loss,
        "nt_xent": lambda of: functional.nt_xent(x, x + 1, of, **ignored),
        "batch_prototypes": lambda of: functional.batch_prototypes(x, of, **ignored).mask,
        "siamese_metric": lambda of: functional.siamese_metric(x, x + 1, of, *metric, **ignored),
        "all pairs": lambda of: functional.siamese_metric_all_pairs(x, x + 1, of, *metric, **ignored),
    }
    for name, call in calls.items():
        torch.testing.assert_close(call(labels), call(labels.long()), rtol=0, atol=0, msg=name)
