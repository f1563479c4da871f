"""The losses as functions: tensors first, options by keyword. The modules of ``fastproto.losses`` call them."""

from fastproto.losses.distribution import alignment, batch_prototypes, covariance, cross_correlation, uniformity
from fastproto.losses.info_nce import info_nce
from fastproto.losses.nt_xent import nt_xent
from fastproto.losses.proto_nce import proto_nce
from fastproto.losses.siamese import siamese_metric, siamese_metric_all_pairs

__all__ = [
    "alignment",
    "batch_prototypes",
    "covariance",
    "cross_correlation",
    "info_nce",
    "nt_xent",
    "proto_nce",
    "siamese_metric",
    "siamese_metric_all_pairs",
    "uniformity",
]
