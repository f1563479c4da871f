"""What every method shares: an encoder with heads, a loss in named terms, and the momentum branch with its queue."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproto.losses._gather import gather_dealt_rows
from fastproto.train.clock import Clock
from fastproto.train.config import Config, HeadConfig
from fastproto.train.encoders import Encoder


class Prototypes(NamedTuple):
    """What clustering knows about the samples of a batch, one entry per prototype set."""

    centers: list[Tensor]  # (K, D)
    assignments: list[Tensor]  # (N,) int64
    concentration: list[Tensor]  # (K,)


class Method(nn.Module, ABC):
    """The base of all methods.

    A step of the loop is ``forward``, backward and the optimiser's step, then ``after_step``. A method that
    ``clusters`` says by ``embed`` and ``cluster_space`` what is clustered, and hears of it by ``after_clustering``.

    Args:
        config: the run's settings.
        encoder: the backbone that is trained.
    """

    clusters = False
    idle_parts = False  # whether a step may leave trained parameters without a gradient
    constant_lr: tuple[str, ...] = ()  # parts whose learning rate neither rises nor falls
    projector: nn.Module

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.cluster_dim = config.head.dim

    def forward(
        self, views: tuple[Tensor, Tensor], prototypes: Prototypes | None = None, clock: Clock | None = None
    ) -> dict[str, Tensor]:
        """The weighted terms of the loss, whose sum is minimised.

        Args:
            views: two augmented views of the same images, (N, 3, H, W) each.
            prototypes: of these images; None before the first clustering, and for methods that do not cluster.
            clock: told where the forward pass ends and the loss begins.
        """
        outputs = self.outputs(views)
        if clock is not None:
            clock.start("loss")
        terms = self.terms(outputs, prototypes)
        return {name: getattr(self.config.loss, f"{name}_weight") * term for name, term in terms.items()}

    @abstractmethod
    def outputs(self, views: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """What the networks make of two views."""

    @abstractmethod
    def terms(self, outputs: tuple[Tensor, ...], prototypes: Prototypes | None) -> dict[str, Tensor]:
        """The terms of the loss by name, each a scalar: "contrast" and those that have a weight in ``LossConfig``."""

    def after_step(self, progress: float) -> None:
        """What follows the optimiser's step; ``progress`` is the share of all steps that are done, 0 to 1."""

    def project(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to the embeddings (N, D) that are contrasted."""
        return self.projector(self.encoder(images))

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) un-augmented to the features that are clustered."""
        return self.encoder(images)

    def cluster_space(self, features: Tensor) -> Tensor:
        """``embed``'s features of the whole training set to the (N, cluster_dim) that k-means sees."""
        return features

    def after_clustering(self) -> list[nn.Parameter]:
        """Called after each clustering; returns the parameters that were drawn anew."""
        return []

    def temperature(self, default: float) -> float:
        """The configured temperature of the contrast, or the method's own."""
        configured = self.config.loss.temperature
        return default if configured is None else configured


class MomentumMethod(Method):
    """A method with a projection head and a target: slow copies of encoder and head that follow step by step."""

    def __init__(self, config: Config, encoder: Encoder, last_norm: bool = False) -> None:
        super().__init__(config, encoder)
        self.projector = projection_head(config.head, encoder, last_norm=last_norm)
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to the target's embeddings (N, D), without gradient."""
        return self.target_projector(self.target_encoder(images))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        start, end = self.config.target.momentum, self.config.target.momentum_end
        momentum = end - (end - start) * (1 + math.cos(math.pi * progress)) / 2
        for target, online in ((self.target_encoder, self.encoder), (self.target_projector, self.projector)):
            # Parameters only: the target sees every batch, so its normalisation keeps statistics of its own.
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - momentum)


class QueueMethod(MomentumMethod):
    """A momentum method that contrasts with past keys; its prototypes are clusters of the target's embeddings.

    By default each view is the query once and the key once, and the loss is the mean of both ways, and the head ends in
    a normalisation (both as in MoCo v3, arXiv 2104.02057): runs of few steps need them. Not ``target.symmetric``, the
    first view is the query and the second the key, as in MoCo v2 and PCL. Batches are not shuffled between devices for
    the keys, as there; with ``sync_norm`` all devices share their statistics.
    """

    queue: Tensor

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder, last_norm=config.head.last_norm)
        self.symmetric = config.target.symmetric
        self.register_buffer("queue", F.normalize(torch.randn(config.target.queue, config.head.dim), dim=1))
        self._keys: list[Tensor] = []  # of the parts of a step

    def outputs(self, views: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Queries (N, D) of the first view, or of both, then the target's keys of the second, or of both."""
        ways = 2 if self.symmetric else 1
        keys = [self.target(view) for view in views[-ways:]]
        self._keys.append(F.normalize(keys[-1].float(), dim=1))
        return *(self.projector(self.encoder(view)) for view in views[:ways]), *keys

    def terms(self, outputs: tuple[Tensor, ...], prototypes: Prototypes | None) -> dict[str, Tensor]:
        ways = len(outputs) // 2
        queries, keys = outputs[:ways], outputs[ways:]
        found = [self.one_way(query, key, prototypes) for query, key in zip(queries, reversed(keys), strict=True)]
        return {name: torch.stack([terms[name] for terms in found]).mean() for name in found[0]}

    @abstractmethod
    def one_way(self, query: Tensor, key: Tensor, prototypes: Prototypes | None) -> dict[str, Tensor]:
        """The terms of the loss, as ``terms`` gives them, for queries (N, D) of one view and keys of the other."""

    def embed(self, images: Tensor) -> Tensor:
        return F.normalize(self.target(images), dim=1)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        # In the order of one process the queue keeps the same of them.
        keys, self._keys = gather_dealt_rows(torch.cat(self._keys)), []
        self.queue.copy_(torch.cat([keys, self.queue])[: len(self.queue)])


def projection_head(config: HeadConfig, encoder: Encoder, last_norm: bool = False) -> nn.Sequential:
    """From the encoder's features to the embedding."""
    hidden = [config.hidden] * (config.layers - 1)
    return mlp(encoder.num_features, *hidden, config.dim, last_norm=last_norm)


def mlp(*sizes: int, last_norm: bool = False) -> nn.Sequential:
    """Linear layers with batch normalisation and ReLU between them; with ``last_norm`` the output is normalised too."""
    layers: list[nn.Module] = []
    for size_in, size_out in pairwise(sizes[:-1]):
        layers += [nn.Linear(size_in, size_out, bias=False), nn.BatchNorm1d(size_out), nn.ReLU()]
    layers.append(nn.Linear(sizes[-2], sizes[-1], bias=not last_norm))
    if last_norm:
        layers.append(nn.BatchNorm1d(sizes[-1], affine=False))
    return nn.Sequential(*layers)
