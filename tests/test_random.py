"""The keyed generator against Random123's vectors and plain Python, the quantile tables against scipy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch

from fastproto import _native, _random
from fastproto._random import CELLS, Stream, expect_key, philox, quantile, quantile_table, random_bits, uniform

CPU = torch.device("cpu")
WORD = 0xFFFFFFFF


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & WORD, (p0 >> 32) ^ c[3] ^ k[1], p0 & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([WORD] * 4, [WORD] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter: list[int], key: list[int], expected: str) -> None:
    words = philox(tuple(torch.tensor([word]) for word in counter), (key[0], key[1]))
    assert " ".join(f"{int(word):08x}" for word in words) == expected
    assert philox_in_python(counter, key) == [int(word) for word in words]
    if _native.cpp is not None:
        assert _native.cpp.philox(counter, key[0] | key[1] << 32) == [int(word) for word in words]


@pytest.mark.skipif(_native.cpp is None, reason=_native.cpp_error)
def test_philox_in_cpp() -> None:
    for *counter, k0, k1 in torch.randint(2**32, (200, 6)).tolist():
        assert _native.cpp.philox(counter, k0 | k1 << 32) == philox_in_python(counter, [k0, k1])


@pytest.mark.parametrize("draws", [1, 4, 9])
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_bits_are_philox_of_the_key(seed: int, draws: int) -> None:
    ids = torch.tensor([0, 5, 2**31, 2**40 + 3])
    bits = random_bits(ids, Stream.FLIP, draws, views=3, seed=seed, epoch=2**32 - 1)
    assert bits.shape == (3, 4, draws)
    for v in range(3):
        for n, sample in enumerate(ids.tolist()):
            words: list[int] = []
            for block in range(-(-draws // 4)):
                last = int(Stream.FLIP) << 24 | v << 12 | block
                words += philox_in_python([sample & WORD, sample >> 32, WORD, last], [seed & WORD, seed >> 32])
            assert bits[v, n].tolist() == words[:draws]


def test_bits_do_not_depend_on_the_batch() -> None:
    ids = torch.randperm(1000)[:33]
    whole = random_bits(ids, Stream.CROP, 22, views=2, seed=3, epoch=4)
    parts = [random_bits(part, Stream.CROP, 22, views=2, seed=3, epoch=4) for part in ids.split(7)]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    assert torch.equal(whole, random_bits(ids.int(), Stream.CROP, 22, views=2, seed=3, epoch=4))
    assert torch.equal(whole[:1, :, :5], random_bits(ids, Stream.CROP, 5, views=1, seed=3, epoch=4))
    strided = torch.stack([ids, ids], dim=1)[:, 0]
    assert torch.equal(whole, random_bits(strided, Stream.CROP, 22, views=2, seed=3, epoch=4))


def test_every_part_of_the_key_changes_the_bits() -> None:
    ids = torch.arange(5)
    one = random_bits(ids, Stream.CROP, 8, views=2, seed=3, epoch=4)
    others = [
        random_bits(ids, Stream.CROP, 8, views=2, seed=2, epoch=4),
        random_bits(ids, Stream.CROP, 8, views=2, seed=3 + 2**32, epoch=4),
        random_bits(ids, Stream.CROP, 8, views=2, seed=3, epoch=5),
        random_bits(ids, Stream.FLIP, 8, views=2, seed=3, epoch=4),
        random_bits(ids + 5, Stream.CROP, 8, views=2, seed=3, epoch=4),
    ]
    for other in others:
        assert not (one == other).any()
    assert not (one[0] == one[1]).any()


def test_uniform_is_uniform() -> None:
    draws = uniform(random_bits(torch.arange(5000), Stream.CROP, 4, views=2, seed=0, epoch=0))
    assert draws.dtype == torch.float64
    assert 0 <= draws.min() < 1e-3
    assert 1 - 1e-3 < draws.max() < 1
    for column in draws.flatten(0, 1).unbind(1):
        assert scipy.stats.kstest(column.numpy(), "uniform").pvalue > 1e-3
    views = draws[..., 0]
    assert abs(np.corrcoef(views.numpy())[0, 1]) < 0.05


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.6, 1.0, 2.0])
def test_beta_against_scipy(alpha: float) -> None:
    table = quantile_table("beta", (alpha,), CPU)
    nodes = scipy.stats.beta.ppf(np.linspace(0, 1, CELLS + 1), alpha, alpha)
    np.testing.assert_allclose(table.numpy() * 2.0**-24, nodes, atol=4e-8)
    lower, upper = table[: CELLS // 2 + 1], table[CELLS // 2 :]
    assert torch.equal(upper, ((1 << 24) - lower.flip(0)).clamp(max=(1 << 24) - 1))
    draws = quantile(random_bits(torch.arange(20_000), Stream.CROP, 1, views=1, seed=1, epoch=0).flatten(), table)
    assert ((draws >= 0) & (draws < 1)).all()
    # Kolmogorov and Smirnov's distance, but for the table's unit, in which a tenth of Beta(0.1, 0.1) lies.
    ordered, unit = draws.sort().values.numpy(), 2.0**-24
    share = np.arange(len(ordered) + 1) / len(ordered)
    above = share[1:] - scipy.stats.beta.cdf(ordered + unit, alpha, alpha)
    below = scipy.stats.beta.cdf(ordered - unit, alpha, alpha) - share[:-1]
    assert max(above.max(), below.max()) < 1.95 / math.sqrt(len(ordered))


@pytest.mark.parametrize("alpha", [1e-9, 1e-3, 50.0, 1e6])
def test_beta_of_extreme_alpha(alpha: float) -> None:
    table = quantile_table("beta", (alpha,), CPU)
    nodes = scipy.stats.beta.ppf(np.linspace(0, 1, CELLS + 1)[1:-1], alpha, alpha)
    np.testing.assert_allclose(table.numpy()[1:-1] * 2.0**-24, nodes, atol=4e-6)
    assert (table.diff() >= 0).all()


def test_uniform_and_log_uniform_tables() -> None:
    probabilities = np.linspace(0, 1, CELLS + 1)
    uniform_nodes = quantile_table("uniform", (0.2, 1.0), CPU).numpy() * 2.0**-24
    np.testing.assert_allclose(uniform_nodes, 0.2 + 0.8 * probabilities, atol=2.0**-25)
    ratio_nodes = quantile_table("log_uniform", (3 / 4, 4 / 3), CPU).numpy() * 2.0**-24
    np.testing.assert_allclose(ratio_nodes, 0.75 * (16 / 9) ** probabilities, atol=2.0**-24)
    assert (quantile_table("log_uniform", (1.0, 1.0), CPU) == 1 << 24).all()
    assert quantile_table("uniform", (0.2, 1.0), CPU) is quantile_table("uniform", (0.2, 1.0), CPU)


@pytest.mark.parametrize("alpha", [0.1, 0.6, 1.0])
def test_last_bits_of_a_library_cannot_change_a_published_table(alpha: float) -> None:
    """No node lies so near to the middle between two table values that a few float64 roundings would move it."""
    for values in (_random._beta_quantiles(alpha), 0.75 * (16 / 9) ** np.linspace(0, 1, CELLS + 1)):
        steps = values * 2.0**24
        assert np.abs(steps - np.floor(steps) - 0.5).min() > 1e-7


def test_quantile_is_exact() -> None:
    table = quantile_table("beta", (0.1,), CPU)
    bits = torch.cat([torch.randint(2**32, (200,)), torch.tensor([0, 2**32 - 1])])
    for word, draw in zip(bits.tolist(), quantile(bits, table).tolist(), strict=True):
        low, high = int(table[word >> 20]), int(table[(word >> 20) + 1])
        assert Fraction(draw) == (low + (high - low) * Fraction(word & 0xFFFFF, 2**20)) / 2**24


@pytest.mark.parametrize(
    ("error", "argument", "key"),
    [
        (ValueError, "views expected 1 to 4096, got int 0", {"views": 0}),
        (ValueError, "views expected 1 to 4096, got int 4097", {"views": 4097}),
        (ValueError, "seed expected 0 to 9223372036854775807, got int -1", {"seed": -1}),
        (ValueError, "epoch expected 0 to 4294967295, got int 4294967296", {"epoch": 2**32}),
        (TypeError, "epoch expected an int, got float 0.5", {"epoch": 0.5}),
    ],
)
def test_bad_keys(error: type[Exception], argument: str, key: dict[str, int]) -> None:
    with pytest.raises(error, match=f"^some_op: {argument}$"):
        expect_key("some_op", **{"views": 2, "seed": 0, "epoch": 0, **key})


@pytest.mark.gpu
def test_cuda_gives_the_same_bits() -> None:
    ids = torch.arange(1000)
    cpu = random_bits(ids, Stream.CROP, 22, views=2, seed=3, epoch=4)
    cuda = random_bits(ids.cuda(), Stream.CROP, 22, views=2, seed=3, epoch=4)
    assert torch.equal(cpu, cuda.cpu())
    for alpha in (0.1, 0.6):
        table = quantile_table("beta", (alpha,), CPU)
        assert torch.equal(quantile(cpu, table), quantile(cuda, quantile_table("beta", (alpha,), cuda.device)).cpu())
