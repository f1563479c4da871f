"""PrototypeBank: what it holds is what KMeans finds, and it travels in the state dict."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastproto.cluster import KMeans, PrototypeBank, concentration


def test_holds_what_kmeans_finds() -> None:
    features = F.normalize(torch.randn(200, 24))
    bank = PrototypeBank(200, 24, num_prototypes=(5, 33), temperature=0.1, seed=3, n_iter=4, n_init=2)
    assert not bank.ready
    assert bank.update(features) is None
    assert bank.ready
    ids = torch.tensor([0, 199, 7, 7])
    prototypes, assignments, phi = bank.lookup(ids)
    for index, size in enumerate((5, 33)):
        kmeans = KMeans(size, seed=3 + index, n_iter=4, n_init=2).fit(features)
        torch.testing.assert_close(prototypes[index], F.normalize(kmeans.cluster_centers_))
        assert torch.equal(assignments[index], kmeans.labels_[ids])
        expected = concentration(features, kmeans.labels_, kmeans.cluster_centers_, temperature=0.1)
        torch.testing.assert_close(phi[index], expected)


def test_before_the_first_update_every_row_is_ignored() -> None:
    prototypes, assignments, phi = PrototypeBank(10, 4, 3).lookup(torch.arange(10, dtype=torch.int32))
    assert len(prototypes) == len(assignments) == len(phi) == 1
    assert assignments[0].eq(-1).all()
    assert prototypes[0].eq(0).all()
    assert phi[0].eq(0.2).all()


def test_a_second_update_replaces_the_first() -> None:
    bank = PrototypeBank(50, 4, (3,), n_iter=3)
    bank.update(torch.randn(50, 4))
    later = torch.randn(50, 4, dtype=torch.float64)
    bank.update(later)
    fresh = PrototypeBank(50, 4, (3,), n_iter=3)
    fresh.update(later)
    assert int(bank.num_updates) == 2
    for one, other in zip(bank.lookup(torch.arange(50)), fresh.lookup(torch.arange(50)), strict=True):
        assert torch.equal(one[0], other[0])


def test_state_dict_fills_a_fresh_bank() -> None:
    bank = PrototypeBank(50, 4, (3, 7), n_iter=3)
    bank.update(torch.randn(50, 4))
    fresh = PrototypeBank(50, 4, (3, 7), n_iter=3)
    fresh.load_state_dict(bank.state_dict())
    assert fresh.ready
    assert not list(bank.parameters())
    for one, other in zip(bank.lookup(torch.arange(50)), fresh.lookup(torch.arange(50)), strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert torch.equal(mine, theirs)


def test_a_state_fits_a_bank_with_the_same_warm_start() -> None:
    cold, warm = (PrototypeBank(50, 4, 3, warm_start=warm_start) for warm_start in (False, True))
    with pytest.raises(RuntimeError, match=r'Missing key.*"centers_0"'):
        warm.load_state_dict(cold.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"centers_0"'):
        cold.load_state_dict(warm.state_dict())


def test_an_update_changes_what_lookup_gave() -> None:
    bank = PrototypeBank(50, 4, 3)
    prototypes, assignments, phi = bank.lookup(torch.arange(50))
    bank.update(torch.randn(50, 4))
    later = bank.lookup(torch.arange(50))
    assert torch.equal(prototypes[0], later[0][0]) and torch.equal(phi[0], later[2][0])
    assert assignments[0].eq(-1).all()


def test_features_that_require_a_gradient() -> None:
    bank = PrototypeBank(20, 4, 3)
    bank.update(torch.randn(20, 4, requires_grad=True))
    assert not bank.lookup(torch.tensor([1]))[0][0].requires_grad


def test_repr_names_the_sizes() -> None:
    assert "20, 4, num_prototypes=(3, 5), temperature=0.2" in repr(PrototypeBank(20, 4, [3, 5]))
    assert PrototypeBank(20, 4, np.int64(3)).lookup(torch.tensor([0]))[0][0].shape == (3, 4)
    for sizes in (np.array([3, 5]), torch.tensor([3, 5])):
        assert PrototypeBank(20, 4, sizes).num_prototypes == (3, 5)
    assert PrototypeBank(20, 4, torch.tensor(3)).num_prototypes == (3,)


def test_bad_input() -> None:
    sizes = r"num_prototypes expected 1 \.\.\. num_samples = 10, got"
    for size, got in ((11, "int 11"), (0, "int 0"), (3.0, "float 3.0"), ("3", "str '3'"), (True, "bool True")):
        with pytest.raises(ValueError, match=f"PrototypeBank: {sizes} {got}"):
            PrototypeBank(10, 4, (3, size))
    for value in (5.5, "56", None, True, {5, 6}, torch.tensor(5.5)):
        with pytest.raises(TypeError, match=r"PrototypeBank: num_prototypes expected an int, or several, got"):
            PrototypeBank(10, 4, value)
    with pytest.raises(ValueError, match=r"PrototypeBank: num_prototypes expected at least one size, got tuple \(\)"):
        PrototypeBank(10, 4, ())
    for size in (0, 10.0, "10", True):
        with pytest.raises(ValueError, match=r"PrototypeBank: num_samples expected an integer of at least 1, got"):
            PrototypeBank(size, 4, 1)
        with pytest.raises(ValueError, match=r"PrototypeBank: dim expected an integer of at least 1, got"):
            PrototypeBank(10, size, 1)
    for temperature in (0, np.inf, np.nan, "a", True):
        with pytest.raises(ValueError, match=r"PrototypeBank: temperature expected a finite number above 0, got"):
            PrototypeBank(10, 4, 1, temperature=temperature)
    for seed in (-1, 0.5, "a", None):
        with pytest.raises(ValueError, match=r"PrototypeBank: seed expected an integer of at least 0, got"):
            PrototypeBank(10, 4, 1, seed=seed)
    with pytest.raises(ValueError, match=r"PrototypeBank: warm_start expected True or False, got a"):
        PrototypeBank(10, 4, 1, warm_start="a")
    with pytest.raises(TypeError, match=r"PrototypeBank: n_clusters expected none, .* num_prototypes, got int 3"):
        PrototypeBank(10, 4, 1, n_clusters=3)
    with pytest.raises(ValueError, match=r"PrototypeBank: init expected \(5, 4\), got float32 \(5, 3\) on cpu"):
        PrototypeBank(10, 4, 5, init=torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"KMeans: n_iter expected an integer of at least 1, got int 0"):
        PrototypeBank(10, 4, 1, n_iter=0)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'iterations'"):
        PrototypeBank(10, 4, 1, iterations=3)
    bank = PrototypeBank(10, 4, 3)
    with pytest.raises(ValueError, match=r"PrototypeBank.update: features expected 10 rows in all, got 9"):
        bank.update(torch.randn(9, 4))
    with pytest.raises(ValueError, match=r"PrototypeBank.update: features expected \(M, 4\), got float32 \(10, 5\)"):
        bank.update(torch.randn(10, 5))
    with pytest.raises(TypeError, match=r"PrototypeBank.update: features expected a float32 .* got int64 \(10, 4\)"):
        bank.update(torch.ones(10, 4).long())
    finite = "features expected finite rows, got 10 with NaN or infinity, the first at index 0"
    with pytest.raises(ValueError, match=f"^PrototypeBank.update: {finite}$"):
        bank.update(torch.full((10, 4), torch.nan))
    with pytest.raises(ValueError, match=r"^PrototypeBank.update: features expected distances that float32 can hold"):
        bank.update(torch.randn(10, 4) * 1e30)
    assert not bank.ready
    with pytest.raises(ValueError, match=r"PrototypeBank.lookup: sample_ids expected 0 to 9, got values from -1 to 3"):
        bank.lookup(torch.tensor([-1, 3]))
    with pytest.raises(ValueError, match=r"PrototypeBank.lookup: sample_ids expected 0 to 9, got values from 10 to 10"):
        bank.lookup(torch.tensor([10]))
    with pytest.raises(TypeError, match=r"PrototypeBank.lookup: sample_ids expected an int64 or int32 .* got float32"):
        bank.lookup(torch.tensor([1.0]))


@pytest.mark.gpu
def test_moves_to_a_gpu() -> None:
    features = torch.randn(200, 24)
    bank, expected = PrototypeBank(200, 24, 5).cuda(), PrototypeBank(200, 24, 5)
    bank.update(features.cuda())
    expected.update(features)
    ids = torch.arange(200)
    for one, other in zip(bank.lookup(ids.cuda()), expected.lookup(ids), strict=True):
        assert one[0].is_cuda
        torch.testing.assert_close(one[0].cpu(), other[0])


def test_a_warm_start_goes_on_from_the_last_centers() -> None:
    centers = torch.randn(30, 8)
    features = centers[torch.randint(30, (2000,))] + 0.1 * torch.randn(2000, 8)
    moved = features + 0.01 * torch.randn(2000, 8)
    bank = PrototypeBank(2000, 8, num_prototypes=(30, 50), warm_start=True, n_iter=3, seed=5)
    bank.update(features)
    bank.update(moved)
    for index, size in enumerate((30, 50)):
        cold = KMeans(size, n_iter=3, seed=5 + index).fit(features)
        warm = KMeans(size, n_iter=3, init=cold.cluster_centers_).fit(moved)
        prototypes, assignments, _ = bank.lookup(torch.arange(2000))
        assert torch.equal(assignments[index], warm.labels_)
        assert torch.equal(prototypes[index], torch.nn.functional.normalize(warm.cluster_centers_, dim=1))


def test_a_warm_start_survives_being_saved() -> None:
    features = torch.randn(200, 4)
    bank = PrototypeBank(200, 4, num_prototypes=9, warm_start=True, n_iter=2)
    bank.update(features)
    loaded = PrototypeBank(200, 4, num_prototypes=9, warm_start=True, n_iter=2)
    loaded.load_state_dict(bank.state_dict())
    bank.update(features)
    loaded.update(features)
    for name, tensor in bank.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_without_a_warm_start_every_update_is_cold() -> None:
    features = torch.randn(200, 4)
    bank = PrototypeBank(200, 4, num_prototypes=9, n_iter=2)
    bank.update(torch.randn(200, 4))
    bank.update(features)
    assert "centers_0" not in bank.state_dict()
    assert torch.equal(bank.lookup(torch.arange(200))[1][0], KMeans(9, n_iter=2).fit(features).labels_)


def test_a_state_without_centers_starts_a_warm_bank_cold() -> None:
    x = torch.randn(60, 4)
    old, warm, fresh = PrototypeBank(60, 4, 5), *(PrototypeBank(60, 4, 5, warm_start=True) for _ in range(2))
    old.update(x)
    warm.load_state_dict(old.state_dict(), strict=False)
    for bank in (warm, fresh):
        bank.update(x)
    assert torch.equal(warm.assignments_0, fresh.assignments_0)
