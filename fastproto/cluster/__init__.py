"""Prototypes by k-means: the estimator, its nearest-centre search, concentration, and a bank that keeps them."""

from __future__ import annotations

from fastproto.cluster.bank import PrototypeBank as PrototypeBank
from fastproto.cluster.concentration import concentration as concentration
from fastproto.cluster.kmeans import KMeans as KMeans
from fastproto.cluster.kmeans import kmeans_assign as kmeans_assign
from fastproto.cluster.whiten import whiten as whiten

__all__ = ["KMeans", "PrototypeBank", "concentration", "kmeans_assign", "whiten"]
