"""Contrastive and prototypical losses. Inputs are un-normalised (N, D) tensors, outputs scalar means."""

from fastproto.losses import functional
from fastproto.losses.cosine import NegativeCosineSimilarity
from fastproto.losses.distribution import AlignmentLoss, CorrelationLoss, UniformityLoss
from fastproto.losses.info_nce import InfoNCELoss
from fastproto.losses.nt_xent import NTXentLoss
from fastproto.losses.pauc import PAUCLoss
from fastproto.losses.proto_nce import ProtoNCELoss
from fastproto.losses.siamese import SiameseMetricLoss
from fastproto.losses.spcl import SPCLLoss

__all__ = [
    "AlignmentLoss",
    "CorrelationLoss",
    "InfoNCELoss",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "PAUCLoss",
    "ProtoNCELoss",
    "SPCLLoss",
    "SiameseMetricLoss",
    "UniformityLoss",
    "functional",
]
