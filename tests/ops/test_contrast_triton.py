"""The contrast op's Triton kernels against the float64 reference.

With a GPU the tests marked gpu run on it. Without one, a second pytest runs this file under Triton's interpreter, which
has to be chosen before triton is first imported; bfloat16 is left out there, since the interpreter gets it wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE, HALVES, INTERPRETED, on_gpu, run_interpreted
from ops import test_contrast_kernels, test_contrast_sets
from ops.test_contrast_accuracy import assert_entropy_behind_a_mask, assert_short_rows_as_in_pytorch
from ops.test_contrast_kernels import assert_close, op_arguments, problem, run
from torch import Tensor

import fastproto
from fastproto.ops.contrast import contrast, contrast_unchecked

SHAPES = [(1, 1, 24), (33, 507, 130), (1, 507, 96), (33, 3, 17), (40, 70, 24)]


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests of this file run here themselves")
def test_all_of_this_file_under_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter: tiles that make small problems long, and two parts of every loop."""
    if not INTERPRETED:
        return
    from fastproto.kernels import _tiles, contrast_bwd, contrast_fwd

    for kernel in (contrast_fwd, contrast_bwd):
        monkeypatch.setattr(kernel, "tile_for", lambda *_: _tiles.Tile(64, 128, 64, 64, 4, 1))
        monkeypatch.setattr(kernel, "choose_parts", lambda *_: 2)


@on_gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("grouped", "normalize"), [(False, True), (True, False)])
def test_equals_the_reference(shape: tuple[int, int, int], grouped: bool, normalize: bool) -> None:
    """Duplicates, ignored rows, a random scale and bias, an upstream gradient; D one tile wide or several."""
    arguments = problem(*shape, grouped=grouped, normalize=normalize, device=DEVICE)
    assert_close(run("triton", arguments, torch.float32), run("reference", arguments, torch.float64), 4e-6)


@on_gpu
@pytest.mark.parametrize("normalize", [False, True])
def test_a_scale_of_zero_has_a_gradient(normalize: bool) -> None:
    arguments = problem(33, 70, 24, normalize=normalize, device=DEVICE)
    arguments["scale"] = torch.where(torch.arange(70, device=DEVICE) % 7 == 0, 0.0, arguments["scale"])
    assert_close(run("triton", arguments, torch.float32), run("reference", arguments, torch.float64), 4e-6)


@on_gpu
def test_vectors_may_have_any_stride() -> None:
    test_contrast_kernels.test_vectors_may_have_any_stride("triton", DEVICE)


@on_gpu
def test_few_scores_of_wide_rows_are_left_to_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastproto.kernels import contrast_bwd, contrast_fwd

    arguments = problem(9, 20, 300, device=DEVICE)
    exact = run("reference", arguments, torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(contrast_fwd, "contrast_fwd", None)
        patch.setattr(contrast_bwd, "contrast_bwd_keys", None)
        assert_close(run("triton", arguments, torch.float32), exact, 4e-6)
    monkeypatch.setattr("fastproto.ops.contrast.FEW_SCORES", 179)
    assert_close(run("triton", arguments, torch.float32), exact, 4e-6)


@on_gpu
def test_a_target_beyond_the_keys_gives_nan() -> None:
    """Where nothing has refused it, as outside of debug mode on a GPU: no memory beyond the keys is read."""
    arguments = problem(5, 7, 24, device=DEVICE)
    targets = torch.tensor([0, 7, -1, 1 << 40, 6], device=DEVICE)
    with fastproto.backend("triton"):
        loss = contrast_unchecked(
            arguments["features"], arguments["keys"], targets, arguments["scale"], arguments["bias"], None, None
        )[0]
    assert loss.isnan().tolist() == [False, True, False, True, False]


@on_gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(33, 507, 130), (40, 70, 24)])
def test_half_precision_is_as_exact_as_plain_pytorch(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Twice the error of matrix product and cross-entropy in the same dtype at most, from the same rounded inputs."""
    arguments = problem(*shape, grouped=False, device=DEVICE)
    scale, bias = (arguments[name].to(dtype) for name in ("scale", "bias"))
    features, keys = (arguments[name].to(dtype).requires_grad_() for name in ("features", "keys"))
    targets, upstream = arguments["targets"], torch.rand(shape[0], device=DEVICE) / shape[0]
    with fastproto.backend("triton"):
        loss = contrast(features, keys, targets, scale=scale, bias=bias).loss
    logits = features @ keys.T * scale + bias
    plain = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    x, y = features.detach().double().requires_grad_(), keys.detach().double().requires_grad_()
    exact = F.cross_entropy(x @ y.T * scale.double() + bias.double(), targets, ignore_index=-1, reduction="none")

    def of(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]

    results = [of(loss, features, keys), of(plain, features, keys), of(exact, x, y)]
    for ours, theirs, right in zip(*results, strict=True):
        error, allowed = (float((value.double() - right).abs().max()) for value in (ours, theirs))
        assert error <= 2 * allowed + 1e-6 * float(right.abs().max())


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("near", [0.3, 0.03])
@pytest.mark.parametrize("grouped", [False, True])
def test_rows_near_their_target_are_as_exact_as_plain_pytorch(dtype: torch.dtype, near: float, grouped: bool) -> None:
    """p_t is rounded beside p_t - 1, of which little is left: the target has no part in the rounded sum."""
    n, k, d = 40, 300, 130
    y = F.normalize(torch.randn(k, d), dim=1)
    x = F.normalize(y[:n] + near * torch.randn(n, d) / math.sqrt(d), dim=1)
    targets, groups, key_groups = torch.arange(n, device=DEVICE), torch.arange(n) % 7, torch.arange(k) % 7
    groups, key_groups = (ids.to(DEVICE) if grouped else None for ids in (groups, key_groups))

    def plain(features: Tensor, keys: Tensor) -> Tensor:
        # As under autocast, where the softmax is of float32.
        product = features @ keys.T
        scores = product.to(torch.promote_types(product.dtype, torch.float32)) * 14.3
        if groups is not None:
            hidden = (groups[:, None] == key_groups) & (targets[:, None] != torch.arange(k, device=DEVICE))
            scores = scores.masked_fill(hidden, -math.inf)
        return F.cross_entropy(scores, targets, reduction="none")

    def ours(features: Tensor, keys: Tensor) -> Tensor:
        with fastproto.backend("triton"):
            return contrast(features, keys, targets, scale=14.3, groups=groups, key_groups=key_groups).loss

    def gradient(loss: Callable[[Tensor, Tensor], Tensor], of: torch.dtype) -> Tensor:
        features, keys = x.to(DEVICE, dtype).to(of).requires_grad_(), y.to(DEVICE, dtype).to(of)
        return torch.autograd.grad(loss(features, keys).sum(), features)[0].double()

    right = gradient(plain, torch.float64)
    error, allowed = ((gradient(loss, dtype) - right).norm() for loss in (ours, plain))
    assert error <= 2 * allowed


@on_gpu
@pytest.mark.parametrize("grouped", [False, True])
def test_rows_against_themselves(grouped: bool) -> None:
    """The symmetric pass equals the two passes of the reference."""
    n = 70
    features, upstream = torch.randn(n, 24, device=DEVICE), torch.linspace(-1, 2, n, device=DEVICE)
    targets = torch.randint(n, (n,), device=DEVICE)
    groups = torch.arange(n, device=DEVICE) // 2 if grouped else None

    def gradient(backend: str, dtype: torch.dtype, symmetric: bool) -> Tensor:
        x = features.to(dtype).requires_grad_()
        with fastproto.backend(backend):
            keys = None if symmetric else x
            (loss,) = contrast_unchecked(x, keys, targets, 10.0, None, groups, groups, normalize=True)
            return torch.autograd.grad(loss, x, upstream.to(dtype))[0]

    exact = gradient("reference", torch.float64, symmetric=False)
    error = (gradient("triton", torch.float32, symmetric=True) - exact).abs().max()
    assert error <= 1e-5 * exact.abs().max()


@on_gpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of an overflow that is masked
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, -100.0), (HALVES[0], -50.0)])
def test_rows_against_themselves_under_a_negative_temperature(dtype: torch.dtype, scale: float) -> None:
    """All scores far below 0: what stands in for rows beyond the last must not be raised above them."""
    x = F.normalize(1 + 0.01 * torch.randn(3, 24, device=DEVICE), dim=1).to(dtype).requires_grad_()
    targets, groups = torch.tensor([1, 2, 0], device=DEVICE), torch.arange(3, device=DEVICE)

    def gradient(backend: str, x: Tensor) -> Tensor:
        with fastproto.backend(backend):
            (loss,) = contrast_unchecked(x, None, targets, scale, None, groups, groups, normalize=False)
            return torch.autograd.grad(loss.sum(), x)[0]

    exact = gradient("reference", x.detach().double().requires_grad_())
    # A logit of that size is known to its last digits, and so is the probability that meets the scale once more.
    assert (gradient("triton", x).double() - exact).abs().max() <= scale**2 * torch.finfo(dtype).eps


@on_gpu
def test_small_float16_gradients_do_not_vanish() -> None:
    """A mean over many rows: g_i p_ij is far below what float16 holds."""
    arguments = problem(40, 300, 32, grouped=False, device=DEVICE)
    arguments = {name: value.half() if value.is_floating_point() else value for name, value in arguments.items()}
    *tensors, scale, bias = (arguments[name] for name in ("features", "keys", "targets", "scale", "bias"))
    grad = torch.linspace(1e-8, 3e-8, 40, device=DEVICE)

    def keys_gradient(backend: str, dtype: torch.dtype) -> list[Tensor]:
        cast = [value.to(dtype) if value.is_floating_point() else value for value in tensors]
        options = (scale.to(dtype), 1.0, bias.to(dtype), None, None, False, None)
        with fastproto.backend(backend):
            _, saved = torch.ops.fastproto.contrast_fwd(*cast, *options, False, None, False, False)
            return torch.ops.fastproto.contrast_bwd_keys(*cast, *options, False, saved, grad.to(saved.dtype))

    pairs = zip(keys_gradient("triton", torch.float16), keys_gradient("reference", torch.double), strict=True)
    for ours, exact in pairs:
        assert (ours - exact).abs().max() <= 1e-3 * exact.abs().max()


@on_gpu
def test_sharp_temperatures_and_large_biases() -> None:
    """φ = 0.01, and biases that put logits at ±100: the running maximum keeps every exponential finite."""
    arguments = problem(33, 300, 24, device=DEVICE)
    arguments["scale"] = torch.full_like(arguments["scale"], 100.0)
    arguments["bias"] = arguments["bias"] * 50
    exact = run("reference", arguments, torch.float64)
    # A logit of 250 is known to 250 · 2⁻²⁴ · a few, and so is its probability.
    assert_close(run("triton", arguments, torch.float32), exact, 2e-4)


@on_gpu
def test_a_small_loss_keeps_its_digits() -> None:
    x, y = (torch.tensor(rows, device=DEVICE) for rows in ([[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]))
    with fastproto.backend("triton"):
        loss = contrast(x, y, torch.tensor([0], device=DEVICE), scale=8.0).loss
    torch.testing.assert_close(loss.cpu(), torch.tensor([math.log1p(math.exp(-8))]), rtol=1e-3, atol=0)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_positive_that_is_the_maximum_has_its_very_bits(dtype: torch.dtype) -> None:
    """Alone in its group a row sees only its target: the loss is 0, not the rounding of two equal scores."""
    arguments = problem(70, 200, 130, device=DEVICE)
    arguments["groups"], arguments["key_groups"] = arguments["groups"] * 0, arguments["key_groups"] * 0
    loss, lse, entropy, _, positive, *_ = run("triton", arguments, dtype)
    # Under the interpreter a product is numpy's, whose bits depend on a row's place.
    atol = 1e-5 if INTERPRETED else 0
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=atol)
    torch.testing.assert_close(lse, positive, rtol=0, atol=atol)
    assert (entropy == 0).all()


@on_gpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of a NaN under the interpreter
def test_nan_stays_in_its_row_and_infinite_biases_hide() -> None:
    arguments = problem(40, 300, 24, device=DEVICE)
    arguments["features"][7, 3] = math.nan
    arguments["targets"][7] = 5
    arguments["targets"][8] = -1
    arguments["features"][8] = math.nan
    arguments["bias"][::3] = -math.inf
    arguments["targets"][arguments["targets"] % 3 == 0] = 1
    ours = run("triton", arguments, torch.float32)
    assert ours[0].isnan().nonzero().flatten().tolist() == [7]
    assert ours[5].isnan().any(1).nonzero().flatten().tolist() == [7]
    assert ours[0][8] == 0
    assert (ours[5][8] == 0).all()
    arguments["targets"][7] = -1
    assert_close(run("triton", arguments, torch.float32), run("reference", arguments, torch.float64), 4e-6)


@on_gpu
def test_any_stride_offset_and_mix_of_dtypes() -> None:
    arguments = problem(33, 70, 48, device=DEVICE)
    wide = torch.zeros(33, 96, device=DEVICE)
    wide[:, 1:49] = arguments["features"]
    doubled = torch.stack([arguments["features"]] * 2, -1)
    loose = [arguments["features"].T.contiguous().T, wide[:, 1:49], doubled[..., 1]]
    exact = run("reference", arguments, torch.float64)
    for features in loose:
        assert_close(run("triton", arguments | {"features": features}, torch.float32), exact, 4e-6)
    with fastproto.backend("triton"):
        same = contrast(torch.ones(1, 32, device=DEVICE).expand(4, 32), torch.ones(1, 32, device=DEVICE).expand(3, 32),
                        torch.zeros(4, dtype=torch.int64, device=DEVICE))  # fmt: skip
        mixed = contrast(**arguments | {"features": arguments["features"].half(), "keys": arguments["keys"].bfloat16()})
    torch.testing.assert_close(same.loss, torch.full((4,), math.log(3), device=DEVICE))
    rounded = {"features": arguments["features"].half().double(), "keys": arguments["keys"].bfloat16().double()}
    with fastproto.backend("reference"):
        torch.testing.assert_close(mixed.loss.double(), contrast(**arguments | rounded).loss, rtol=2e-6, atol=2e-6)


@on_gpu
def test_parts_and_repeats() -> None:
    """However many parts, the same result; with as many, the same bits."""
    from fastproto.kernels import contrast_bwd, contrast_fwd

    from fastproto.ops.contrast import outputs, present

    arguments = problem(70, 300, 24, device=DEVICE)
    features, keys, *rest = arguments.values()
    grad = torch.linspace(-1, 1, 70, device=DEVICE)

    def results(parts: int) -> list[Tensor]:
        out = present(outputs(features, True, True))
        contrast_fwd.contrast_fwd(features, [keys], *rest, True, True, out, parts=parts)
        return [*out, *contrast_bwd.contrast_bwd_keys(features, keys, *rest, False, out[1], grad, parts=parts)]

    whole = results(1)
    for parts in (2, 3, 7):
        several = results(parts)
        assert all(map(torch.equal, several, results(parts)))
        for a, b in zip(several, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@on_gpu
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("sizes", [(40, 300), (2, 507, 130, 3, 70, 257)])
def test_several_sets(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], normalize: bool) -> None:
    """Some sets in several parts; six take two launches."""
    if INTERPRETED:
        from fastproto.kernels import contrast_fwd

        monkeypatch.setattr(contrast_fwd, "choose_parts", lambda *_: 7)
    arguments = test_contrast_sets.sets_problem(70, sizes, 24, DEVICE, normalize)
    options = {"normalize": normalize, "mean": True}
    exact = test_contrast_sets.run("reference", arguments, torch.float64, looped=True, **options)
    ours = test_contrast_sets.run("triton", arguments, torch.float32, looped=False, **options)
    test_contrast_sets.assert_close(ours, exact, 4e-6)
    again = test_contrast_sets.run("triton", arguments, torch.float32, looped=False, **options)
    assert all(map(torch.equal, again, ours))


@on_gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_several_sets_in_half_precision(dtype: torch.dtype) -> None:
    """As exact as one after another."""
    arguments = test_contrast_sets.sets_problem(40, (40, 300, 200), 130, DEVICE)
    arguments["keys"] = [y.to(dtype) for y in arguments["keys"]]
    arguments |= {name: arguments[name].to(dtype) for name in ("features", "scale", "bias")}
    options = {"normalize": True, "mean": False}
    exact = test_contrast_sets.run("reference", arguments, torch.float64, looped=True, **options)
    ours, loop = (test_contrast_sets.run("triton", arguments, dtype, looped=x, **options) for x in (False, True))
    for a, b, right in zip(ours, loop, exact, strict=True):
        assert (a - right).abs().max() <= 2 * (b - right).abs().max() + 1e-6 * right.abs().max()


@on_gpu
@pytest.mark.parametrize("k", [0, 5])
def test_empty_batch(k: int) -> None:
    features = torch.zeros(0, 3, device=DEVICE, requires_grad=True)
    keys = torch.randn(k, 3, device=DEVICE, requires_grad=True)
    with fastproto.backend("triton"):
        rows = contrast(features, keys, torch.zeros(0, dtype=torch.int64, device=DEVICE))
        rows.loss.sum().backward()
    assert all(value.shape == (0,) for value in rows)
    assert torch.equal(keys.grad, torch.zeros_like(keys))
    assert features.grad.shape == (0, 3)


@on_gpu
def test_without_columns_all_scores_are_equal() -> None:
    features, keys = torch.zeros(3, 0, device=DEVICE), torch.zeros(5, 0, device=DEVICE)
    with fastproto.backend("triton"):
        loss = contrast(features, keys, torch.tensor([0, 1, 4], device=DEVICE)).loss
    torch.testing.assert_close(loss, torch.full((3,), math.log(5), device=DEVICE))


@on_gpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of an overflow that is masked
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_of_huge_equal_scores_are_finite(symmetric: bool) -> None:
    """lse is rounded by more than its log: the weights are tiny beside the target's, which has to fit float16 too."""
    x = F.normalize(torch.ones(64, 24, device=DEVICE), dim=1).requires_grad_()
    with fastproto.backend("triton"):
        (loss,) = contrast_unchecked(
            x.detach() if not symmetric else x, None if symmetric else x, torch.arange(64, device=DEVICE).roll(1), 1e9,
            None, None, None, normalize=False,
        )  # fmt: skip
        assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


@on_gpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of an overflow that is masked
def test_entropy_behind_a_large_finite_mask() -> None:
    for mask in (-1e38, torch.finfo(torch.float32).min / 2):
        assert_entropy_behind_a_mask("triton", mask, DEVICE)


@on_gpu
def test_rows_too_short_to_have_a_direction() -> None:
    assert_short_rows_as_in_pytorch("triton", DEVICE)


@on_gpu
def test_only_ignored_rows_give_nothing() -> None:
    arguments = problem(33, 20, 24, device=DEVICE)
    arguments["features"][:], arguments["targets"][:] = math.nan, -1
    loss, *_, top1, _, dx, dy, da, db = run("triton", arguments, torch.float32)
    assert (top1 == -1).all()
    for value in (loss, dx, dy, da, db):
        assert torch.equal(value, torch.zeros_like(value))


@on_gpu
def test_ops_are_sound() -> None:
    tensors = op_arguments(problem(9, 11, 5, normalize=True, device=DEVICE))
    rest = torch.rand(3, 9, device=DEVICE), torch.rand(9, device=DEVICE)
    with fastproto.backend("triton"):
        torch.library.opcheck(torch.ops.fastproto.contrast_fwd.default, (*tensors, None, False, None, True, True))
        torch.library.opcheck(torch.ops.fastproto.contrast_bwd_keys.default, (*tensors, None, False, *rest))
        several = test_contrast_sets.sets_problem(9, (11, 3), 5, DEVICE)
        several["features"].nan_to_num_(1.0)
        torch.library.opcheck(torch.ops.fastproto.contrast_sets_fwd.default, (*several.values(), True, True))
