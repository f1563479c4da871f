"""How the kernels cut their loops into parts."""

from __future__ import annotations

import pytest
import torch

tiles = pytest.importorskip("fastproto.kernels._tiles")


def test_parts_fill_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "processors", lambda _: 132)

    def parts(programs: int, blocks: int) -> int:
        return tiles.choose_parts(programs, blocks, torch.device("meta"))

    assert parts(32, 512) == 4  # 128 of 132
    assert parts(132, 512) == 1
    assert parts(1000, 512) == 1
    assert parts(2, 512) == 64  # 8 blocks each, as 66 parts would have
    assert parts(128, 3) == 1
    assert parts(70, 512) == 7  # 490 of 528, where 2 parts would be 140 of 264
    assert tiles.part_length(507, 2, 64) == 256


def test_sets_share_a_part_length() -> None:
    assert tiles.common_part((507,), 2, 64) == 256
    assert tiles.common_part((300, 10, 10), 1, 64) == 320  # a part for each
    # 66 parts of 21 blocks would leave 67 parts, of which one would wait for all others.
    sizes = (25_000, 50_000, 100_000)
    assert sum(-(-k // (21 * 128)) for k in sizes) == 67
    assert tiles.common_part(sizes, 66, 128) == 22 * 128


@pytest.mark.parametrize("arch", list(tiles.TILES))
@pytest.mark.parametrize("d", [16, 64, 128, 144, 2048])
def test_float32_scores_are_sums_of_the_same_columns_in_both_passes(
    arch: str, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they differ by a rounding, and exp(s - lse) of sharp rows by more than float32 PyTorch's error."""
    monkeypatch.setattr(tiles, "_architecture", lambda _: arch)
    kernels = ("contrast_fwd", "contrast_bwd_keys")
    chosen = [tiles.tile_for(kernel, torch.float32, d, torch.device("cuda")) for kernel in kernels]
    assert len({tile.block_d for tile in chosen}) == 1
