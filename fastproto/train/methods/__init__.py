"""The methods by name: each a module with an encoder, heads, and a loss in named terms."""

from __future__ import annotations

from fastproto.train.config import Config, MethodName
from fastproto.train.encoders import Encoder
from fastproto.train.methods._base import Method as Method
from fastproto.train.methods._base import Prototypes as Prototypes
from fastproto.train.methods.byol import BYOL
from fastproto.train.methods.moco import MoCo
from fastproto.train.methods.pauc import PAUC
from fastproto.train.methods.pcl import PCL
from fastproto.train.methods.simclr import SimCLR
from fastproto.train.methods.simsiam import SimSiam
from fastproto.train.methods.spcl import SPCL

METHODS: dict[MethodName, type[Method]] = {
    "simclr": SimCLR,
    "moco": MoCo,
    "byol": BYOL,
    "simsiam": SimSiam,
    "pcl": PCL,
    "spcl": SPCL,
    "pauc": PAUC,
}

__all__ = ["METHODS", "Method", "Prototypes", "build_method"]


def build_method(config: Config, encoder: Encoder) -> Method:
    """The configured method on a fresh encoder.

    Raises:
        ValueError: settings that the method refuses.
    """
    return METHODS[config.method](config, encoder)
