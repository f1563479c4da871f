"""Views of images for contrastive learning: boxes, crops in them, resizing, colours."""

from fastproto.ops.crop_resize import crop_resize
from fastproto.ops.localize import localize
from fastproto.ops.photometric import apply_photometric, color_jitter, gaussian_blur, grayscale, solarize
from fastproto.ops.sample_crops import sample_crops
from fastproto.ops.sample_photometric import PhotometricParameters, sample_photometric
from fastproto.views.boxes import SIMC_BOX, BoxBank
from fastproto.views.contrastive_crop import ContrastiveCrop
from fastproto.views.multi_crop import MultiCrop
from fastproto.views.transform import ContrastiveCropTransform

__all__ = [
    "SIMC_BOX",
    "BoxBank",
    "ContrastiveCrop",
    "ContrastiveCropTransform",
    "MultiCrop",
    "PhotometricParameters",
    "apply_photometric",
    "color_jitter",
    "crop_resize",
    "gaussian_blur",
    "grayscale",
    "localize",
    "sample_crops",
    "sample_photometric",
    "solarize",
]
