"""Every method against its formula, written out in loops in float64, and what it does between steps."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastproto.cluster import whiten
from fastproto.train import loop, methods
from fastproto.train.clock import Clock
from fastproto.train.config import Config, HeadConfig, LossConfig, PrototypeConfig
from fastproto.train.data import Dataset
from fastproto.train.encoders import build_encoder
from fastproto.train.files import read_log
from fastproto.train.methods import METHODS, Method, Prototypes, build_method

N, D, C = 6, 8, 32
QUEUED = ["moco", "pcl", "pauc"]


def build(config: Config, method: str) -> Method:
    return build_method(replace(config, method=method), build_encoder("resnet-tiny", image_size=16, width=8))


def two_views() -> tuple[Tensor, Tensor]:
    return torch.rand(N, 3, 16, 16), torch.rand(N, 3, 16, 16)


def prototypes_of(dim: int) -> Prototypes:
    """Two sets, one row without a prototype in the first."""
    centers = [nn.functional.normalize(torch.randn(k, dim), dim=1) for k in (5, 3)]
    assignments = [torch.tensor([0, 1, 2, 0, -1, 4]), torch.tensor([0, 1, 2, 0, 1, 1])]
    return Prototypes(centers, assignments, [torch.rand(5) + 0.1, torch.rand(3) + 0.1])


def unit(row: Tensor) -> Tensor:
    return row / row.norm()


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    total = 0.0
    for q, k in zip(query.double(), key.double(), strict=True):
        logits = torch.stack([unit(q) @ unit(other) / temperature for other in [k, *queue.double()]])
        total = total - (logits[0] - logits.logsumexp(0))
    return total / len(query)


def proto_nce(query: Tensor, prototypes: Prototypes) -> Tensor:
    means = []
    for centers, assignments, concentration in zip(*prototypes, strict=True):
        rows = []
        for q, y in zip(query.double(), assignments.tolist(), strict=True):
            scales = zip(centers.double(), concentration.double(), strict=True)
            logits = torch.stack([unit(q) @ unit(center) / phi for center, phi in scales])
            if y >= 0:
                rows.append(logits.logsumexp(0) - logits[y])
        means.append(torch.stack(rows).mean())
    return torch.stack(means).mean()


def both_ways(outputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """Each view's prediction or query, with the other view's target or key."""
    first0, first1, second0, second1 = outputs
    return [(first0, second1), (first1, second0)]


def crosswise_cosine(outputs: tuple[Tensor, ...]) -> Tensor:
    """Mean cosine of each view's prediction and the other view's target."""
    rows = [row for pair in both_ways(outputs) for row in zip(*(out.double() for out in pair), strict=True)]
    return torch.stack([unit(prediction) @ unit(target) for prediction, target in rows]).mean()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=2e-6)


def test_simclr_contrasts_all_views_of_the_batch(tiny_config: Config) -> None:
    method = build(tiny_config, "simclr")
    out0, out1 = method.outputs(two_views())
    rows = [unit(row) for row in torch.cat([out0, out1]).double()]
    total = 0.0
    for i in range(2 * N):
        logits = {j: rows[i] @ rows[j] / 0.5 for j in range(2 * N) if j != i}
        total = total + torch.stack(list(logits.values())).logsumexp(0) - logits[(i + N) % (2 * N)]
    close(method.terms((out0, out1), None)["contrast"], total / (2 * N))


def test_moco_contrasts_query_and_key_with_the_queue(tiny_config: Config) -> None:
    method = build(tiny_config, "moco")
    views = two_views()
    outputs = method.outputs(views)
    for view, query, key in zip(views, outputs[:2], outputs[2:], strict=True):
        close(query, method.projector(method.encoder(view)))
        close(key, method.target_projector(method.target_encoder(view)))
        assert not key.requires_grad
    expected = [info_nce(query, key, method.queue, 0.2) for query, key in both_ways(outputs)]
    close(method.terms(outputs, None)["contrast"], sum(expected) / 2)


@pytest.mark.parametrize("method", QUEUED)
def test_one_way_the_first_view_asks_and_the_second_answers(tiny_config: Config, method: str) -> None:
    """As in the authors' MoCo v2 and PCL, whose embedding is no more normalised over the batch than theirs."""
    one_way = replace(
        tiny_config,
        target=replace(tiny_config.target, symmetric=False),
        head=replace(tiny_config.head, last_norm=False),
    )
    built, (view0, view1) = build(one_way, method), two_views()
    assert not isinstance(list(built.projector)[-1], nn.BatchNorm1d)
    query, key = built.outputs((view0, view1))
    close(query, built.projector(built.encoder(view0)))
    close(key, built.target_projector(built.target_encoder(view1)))
    queue = built.queue.clone()
    close(built.terms((query, key), None)["contrast"], info_nce(query, key, queue, 0.2))
    built.after_step(0.0)
    close(built.queue[:N], nn.functional.normalize(key, dim=1))


def test_pcl_draws_some_of_the_other_prototypes(tiny_config: Config) -> None:
    method = build(replace(tiny_config, prototypes=replace(tiny_config.prototypes, negatives=2)), "pcl")
    query = torch.randn(N, D)
    centers, assignment = nn.functional.normalize(torch.randn(40, D), dim=1), torch.tensor([7, 7, 9, -1, 7, 9])
    seen = set()
    for _ in range(8):
        terms = method.one_way(query, query, Prototypes([centers], [assignment], [torch.full((40,), 0.3)]))
        seen.add(float(terms["prototype"]))
    everything = proto_nce(query, Prototypes([centers], [assignment], [torch.full((40,), 0.3)]))
    assert len(seen) > 1
    assert max(seen) < everything


def test_byol_predicts_the_target_of_the_other_view(tiny_config: Config) -> None:
    method = build(tiny_config, "byol")
    views = two_views()
    outputs = method.outputs(views)
    for view, prediction, target in zip(views, outputs[:2], outputs[2:], strict=True):
        close(prediction, method.predictor(method.projector(method.encoder(view))))
        close(target, method.target_projector(method.target_encoder(view)))
        assert not target.requires_grad
    close(method.terms(outputs, None)["contrast"], -crosswise_cosine(outputs))


def test_simsiam_predicts_the_stopped_projection_of_the_other_view(tiny_config: Config) -> None:
    method = build(tiny_config, "simsiam")
    outputs = method.outputs(two_views())
    for prediction, projection in zip(outputs[:2], outputs[2:], strict=True):
        close(prediction, method.predictor(projection))
        assert prediction.requires_grad
        assert not projection.requires_grad
    close(method.terms(outputs, None)["contrast"], -crosswise_cosine(outputs))


def test_pcl_adds_proto_nce_once_there_are_prototypes(tiny_config: Config) -> None:
    method = build(tiny_config, "pcl")
    outputs = method.outputs(two_views())
    prototypes = prototypes_of(D)
    terms = method.terms(outputs, prototypes)
    assert list(terms) == ["contrast", "prototype"]
    close(terms["contrast"], sum(info_nce(query, key, method.queue, 0.2) for query, key in both_ways(outputs)) / 2)
    close(terms["prototype"], sum(proto_nce(query, prototypes) for query in outputs[:2]) / 2)
    assert list(method.terms(outputs, None)) == ["contrast"]


def test_spcl_contrasts_projections_and_classifies_features(tiny_config: Config) -> None:
    method = build(tiny_config, "spcl")
    views = two_views()
    outputs = method.outputs(views)
    _, out1, features0, features1 = outputs
    close(out1, method.projector(features1))
    assert features0.shape == (N, C)
    labels = torch.tensor([0, 1, 2, 0, 3, 4])
    terms = method.terms(outputs, Prototypes([torch.zeros(5, 12)], [labels], [torch.ones(5)]))
    assert list(terms) == ["contrast", "metric", "prototype"]
    weight, bias = method.loss.classifier.weight.double(), method.loss.classifier.bias.double()
    cross_entropy = 0.0
    for row, y in zip(torch.cat([features0, features1]).double(), [*labels.tolist() * 2], strict=True):
        logits = weight @ row + bias
        cross_entropy = cross_entropy + (logits.logsumexp(0) - logits[y]) / N
    close(terms["prototype"], cross_entropy)
    alone = method.terms(outputs, None)
    assert list(alone) == ["contrast"]
    close(alone["contrast"], terms["contrast"])


def spanned(out: Tensor, assignments: Tensor) -> Tensor:
    """Batch prototypes: the unit mean of the unit rows of each prototype that is present."""
    present = sorted(set(assignments.tolist()) - {-1})
    means = [torch.stack([unit(row) for row in out.double()[assignments == y]]).mean(0) for y in present]
    return torch.stack([unit(mean) for mean in means])


def test_pauc_adds_terms_of_the_batchs_prototypes(tiny_config: Config) -> None:
    method = build(tiny_config, "pauc")
    outputs = tuple(torch.randn(4, N, D))
    prototypes = prototypes_of(D)
    terms = method.terms(outputs, prototypes)
    assert list(terms) == ["contrast", "prototype", "align", "uniform", "correlation"]
    close(terms["contrast"], sum(info_nce(query, key, method.queue, 0.2) for query, key in both_ways(outputs)) / 2)
    close(terms["prototype"], sum(proto_nce(query, prototypes) for query in outputs[:2]) / 2)
    align, uniform = [], []
    for assignments in prototypes.assignments:
        for pair in both_ways(outputs):
            spans = [spanned(out, assignments) for out in pair]
            align.append(torch.stack([(p - q).square().sum() for p, q in zip(*spans, strict=True)]).mean())
            for span in spans:
                apart = [(-2 * (p - q).square().sum()).exp() for i, p in enumerate(span) for q in span[:i]]
                uniform.append(torch.stack(apart).mean().log())
    close(terms["align"], torch.stack(align).mean())
    close(terms["uniform"], torch.stack(uniform).mean())
    assert list(method.terms(outputs, None)) == ["contrast"]


@pytest.mark.parametrize("correlation", ["cross", "covariance"])
def test_paucs_correlation_is_the_configured_one(tiny_config: Config, correlation: str) -> None:
    method = build(replace(tiny_config, loss=LossConfig(correlation=correlation)), "pauc")  # type: ignore[arg-type]
    outputs = tuple(torch.randn(4, N, D))
    once = Prototypes(*([entry[0]] for entry in prototypes_of(D)))
    expected = []
    for pair in both_ways(outputs):
        centred = [span - span.mean(0) for span in (spanned(out, once.assignments[0]) for out in pair)]
        if correlation == "cross":
            z0, z1 = (x / x.square().mean(0).sqrt() for x in centred)
            r = z0.T @ z1 / 4
            expected.append((1 - r.diagonal()).square().sum() + 0.0051 * (r - r.diagonal().diag()).square().sum())
        else:
            covariances = [x.T @ x / 3 for x in centred]
            expected.append(sum((c - c.diagonal().diag()).square().sum() / D for c in covariances) / 2)
    correlation_term = method.terms(outputs, once)["correlation"].double()
    torch.testing.assert_close(correlation_term, sum(expected) / 2, rtol=1e-3, atol=1e-6)


def test_terms_are_weighted_and_the_clock_is_told(tiny_config: Config) -> None:
    weights = LossConfig(contrast_weight=2.0, prototype_weight=0.5, align_weight=3.0, uniform_weight=0.0)
    method = build(replace(tiny_config, loss=weights), "pauc")
    views, prototypes, clock = two_views(), prototypes_of(D), Clock(torch.device("cpu"))
    clock.start("forward")
    weighted = method(views, prototypes, clock)
    plain = method.terms(method.outputs(views), prototypes)
    for name, weight in {"contrast": 2.0, "prototype": 0.5, "align": 3.0, "uniform": 0.0, "correlation": 0.01}.items():
        close(weighted[name], weight * plain[name])
    seconds = clock.take()
    assert seconds["forward"] > 0
    assert seconds["loss"] > 0


@pytest.mark.parametrize(
    ("method", "own"), [("simclr", 0.5), ("moco", 0.2), ("pcl", 0.2), ("spcl", 0.5), ("pauc", 0.2)]
)
def test_the_temperature_is_the_papers_unless_configured(tiny_config: Config, method: str, own: float) -> None:
    def contrast(built: Method) -> float:
        loss = built.contrast if hasattr(built, "contrast") else built.loss
        return getattr(loss, "contrast", getattr(loss, "info_nce", loss)).temperature

    assert contrast(build(tiny_config, method)) == own
    assert contrast(build(replace(tiny_config, loss=LossConfig(temperature=0.07)), method)) == 0.07


@pytest.mark.parametrize("name", list(METHODS))
def test_the_loss_reaches_every_weight_that_is_trained(tiny_config: Config, name: str) -> None:
    method = build(tiny_config, name)
    prototypes = prototypes_of(method.cluster_dim) if method.clusters else None
    sum(method(two_views(), prototypes).values()).backward()
    for path, parameter in method.named_parameters():
        if parameter.requires_grad:
            # A bias before a normalisation or a softmax over the batch may have a gradient of 0, no other has none.
            assert parameter.grad is not None, path
            assert parameter.grad.isfinite().all(), path
        else:
            assert path.startswith("target_"), path
            assert parameter.grad is None, path
    assert all(parameter.grad.abs().max() > 0 for parameter in method.encoder.parameters())


@pytest.mark.parametrize("name", ["byol", *QUEUED])
def test_the_target_follows_slower_and_slower(tiny_config: Config, name: str) -> None:
    method = build(tiny_config, name).train()
    for progress in (0.0, 0.25, 1.0):
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.add_(torch.randn_like(parameter))
        before = {path: value.clone() for path, value in method.state_dict().items()}
        method.outputs(two_views())
        statistics = [buffer.clone() for buffer in method.target_encoder.buffers()]
        method.after_step(progress)
        momentum = 1.0 - (1.0 - 0.9) * (math.cos(math.pi * progress) + 1) / 2
        for path, value in method.named_parameters():
            if path.startswith("target_"):
                online = method.get_parameter(path.removeprefix("target_")).double()
                expected = momentum * before[path].double() + (1 - momentum) * online
                torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        # Its normalisation has seen the batch by itself.
        for buffer, kept in zip(method.target_encoder.buffers(), statistics, strict=True):
            assert torch.equal(buffer, kept)


@pytest.mark.parametrize("name", QUEUED)
def test_the_queue_holds_the_latest_keys_first(tiny_config: Config, name: str) -> None:
    method = build(tiny_config, name)
    torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(40))
    expected = list(method.queue.clone())
    for _ in range(8):
        keys = method.outputs(two_views())[3]
        expected = [*(unit(key) for key in keys), *expected]
        method.after_step(0.0)
        torch.testing.assert_close(method.queue, torch.stack(expected[:40]))


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_says_whether_parts_may_be_idle(tiny_config: Config, name: str) -> None:
    config = replace(tiny_config, prototypes=PrototypeConfig(num=(5,)))
    method = build(config, name)
    torch.stack(list(method(two_views()).values())).sum().backward()
    idle = [path for path, value in method.named_parameters() if value.requires_grad and value.grad is None]
    assert bool(idle) == method.idle_parts, idle


def test_the_method_in_contributing_is_one(
    tmp_path: Path, tiny_config: Config, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parent.parent.parent / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "twins.py").write_text(code)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.setitem(METHODS, "twins", methods._class_of("twins"))
    config = replace(tiny_config, method="twins", loss=LossConfig(correlation_weight=0.5))
    loop.train(config, tiny_data, tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert [row["loss/correlation"] == row["loss"] > 0 for row in log] == [True, True]


def test_the_projection_head_has_the_layers_asked_for(tiny_config: Config) -> None:
    for layers in (1, 2, 3):
        head = HeadConfig(hidden=16, dim=8, layers=layers)
        method = build_method(replace(tiny_config, head=head), build_encoder("resnet-tiny", image_size=16, width=8))
        linear = [module for module in method.projector if isinstance(module, nn.Linear)]
        sizes = [32, *[16] * (layers - 1), 8]
        assert [(layer.in_features, layer.out_features) for layer in linear] == list(pairwise(sizes))


def test_a_queue_shorter_than_a_batch_keeps_its_first_keys(tiny_config: Config) -> None:
    method = build(replace(tiny_config, target=replace(tiny_config.target, queue=4)), "moco")
    keys = method.outputs(two_views())[3]
    method.after_step(0.0)
    torch.testing.assert_close(method.queue, nn.functional.normalize(keys[:4], dim=1))


@pytest.mark.parametrize("name", ["pcl", "pauc"])
def test_unit_embeddings_of_the_target_are_clustered(tiny_config: Config, name: str) -> None:
    method = build(tiny_config, name).eval()
    nn.init.normal_(method.target_projector[-1].running_mean)
    images = torch.rand(N, 3, 16, 16)
    expected = torch.stack([unit(row) for row in method.target_projector(method.target_encoder(images))])
    torch.testing.assert_close(method.cluster_space(method.embed(images)), expected)
    assert method.cluster_dim == D
    assert method.after_clustering() == []


def test_spcl_clusters_whitened_features_and_starts_its_classifier_anew(tiny_config: Config) -> None:
    method = build(tiny_config, "spcl").eval()
    images = torch.rand(N, 3, 16, 16)
    torch.testing.assert_close(method.embed(images), method.encoder(images))
    features = torch.randn(50, C)
    assert torch.equal(method.cluster_space(features), whiten(features, 12))
    assert method.cluster_dim == 12
    for parameter in method.loss.classifier.parameters():
        nn.init.ones_(parameter)  # as if it had learnt
    before = [parameter.clone() for parameter in method.loss.classifier.parameters()]
    fresh = method.after_clustering()
    assert [id(parameter) for parameter in fresh] == [
        id(parameter) for parameter in method.loss.classifier.parameters()
    ]
    assert not any(torch.equal(old, new) for old, new in zip(before, fresh, strict=True))


def test_spcl_whitens_to_no_more_dimensions_than_there_are(tiny_config: Config) -> None:
    assert build(replace(tiny_config, prototypes=PrototypeConfig(num=(5,))), "spcl").cluster_dim == C


def test_spcl_takes_one_prototype_set(tiny_config: Config) -> None:
    with pytest.raises(ValueError, match=r"spcl: prototypes.num expected one prototype set, got \(5, 3\)"):
        build(replace(tiny_config, prototypes=PrototypeConfig(num=(5, 3))), "spcl")
