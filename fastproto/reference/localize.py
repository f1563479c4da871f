"""The box of the warm part of a feature map, in plain PyTorch.

    heat = sum over C of the map, min-max to [0, 1], bilinear to the image's size (align_corners False)
    box  = (first row, first column, last row, last column whose maximum exceeds t) / (H, W, H, W)

Letters: N images, C channels, h w the map, H W the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def localize(
    feature_map: Tensor,  # (N, C, h, w) float
    threshold: float,
    height: int,
    width: int,
) -> Tensor:  # (N, 4) float32: h0, w0, h1, w1
    dtype = torch.promote_types(feature_map.dtype, torch.float32)
    heat_nhw = feature_map.sum(dim=1, dtype=dtype)
    heat_nhw = heat_nhw - heat_nhw.amin(dim=(1, 2), keepdim=True)
    heat_nhw = heat_nhw / heat_nhw.amax(dim=(1, 2), keepdim=True)
    if heat_nhw.shape[1:] != (height, width):
        heat_nhw = F.interpolate(heat_nhw[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]

    hot_row_nh = heat_nhw.amax(dim=2) > threshold
    hot_column_nw = heat_nhw.amax(dim=1) > threshold
    h0_n, h1_n = (edge_n.double() / height for edge_n in _ends(hot_row_nh))
    w0_n, w1_n = (edge_n.double() / width for edge_n in _ends(hot_column_nw))
    # A constant map is 0 / 0, and NaN exceeds nothing: such images keep their whole area.
    cold_n = ~hot_row_nh.any(dim=1)
    low = [edge_n.masked_fill(cold_n, 0.0) for edge_n in (h0_n, w0_n)]
    high = [edge_n.masked_fill(cold_n, 1.0) for edge_n in (h1_n, w1_n)]
    return torch.stack(low + high, dim=1).float()


def _ends(hot: Tensor) -> tuple[Tensor, Tensor]:
    """First and last true place of every row of a boolean matrix."""
    marks = hot.to(torch.uint8)
    return marks.argmax(dim=1), hot.shape[1] - 1 - marks.flip(1).argmax(dim=1)
