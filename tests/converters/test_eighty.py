"""All of torchvision's classifiers: roles by type compared with a rule by shape and name, and exact counts."""

import math
from fractions import Fraction

import pytest
import torch
from torchvision import models

from converters.conversion import convert
from converters.torchvision_builders import architectures, structure
from dsr_tool.sparse.discover import count, discover
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.distribution import erk, uniform

# Parameters with two or more dimensions that are no weights of a layer, by what torchvision calls them.
NO_WEIGHTS = ("class_token", "pos_embedding", "layer_scale", "relative_position_bias_table", "logit_scale")

CLASSIFIERS = architectures("classification")


def test_torchvision_has_the_eighty_classifiers():
    assert len(CLASSIFIERS) >= 80
    assert models.list_models(module=models) == CLASSIFIERS


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_roles_agree_with_a_rule_by_shape_and_name(name):
    module = structure(name)
    specs = discover(module)
    assert list(specs) == list(module.state_dict())
    weights = {
        key: tuple(value.shape)
        for key, value in module.named_parameters()
        if value.ndim >= 2 and key.rpartition(".")[2] not in NO_WEIGHTS
    }
    assert {key: spec.shape for key, spec in specs.items() if spec.weight} == weights
    total = sum(math.prod(shape) for shape in weights.values())
    for key, spec in specs.items():
        assert spec.reason
        if spec.weight:
            kernels = weights[key][2:]
            depthwise = len(kernels) > 0 and weights[key][1] == 1
            tiny = spec.size < 1024 and spec.size < total / 100
            assert spec.role == ("dense" if depthwise or tiny else "sparse"), key
        else:
            assert spec.role == ("dense" if key in dict(module.named_parameters()) else "buffer")
    counts = count(specs)
    assert counts["weights"] == total
    assert counts["parameters"] == sum(parameter.numel() for parameter in module.parameters())
    shapes = [spec.shape for spec in specs.values() if spec.role == "sparse"]
    for sparsity in ("0.5", "0.9", "0.98"):
        target = Budget.of_sparsity(sparsity).active_weights(counts["prunable"], 0, len(shapes))
        assert sum(uniform(target, shapes)) == sum(erk(target, shapes)) == target


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_is_converted_at_its_exact_count(name):
    model = convert(name, sparsity="0.9")
    assert model.active_weights == round(Fraction(model.prunable_weights, 10))
    assert all(mask.any() for mask in model.masks.values())
    assert sum(spec.macs_per_weight for spec in model.specs.values()) > 0
    model.check()


@pytest.mark.parametrize(
    ("name", "distribution"),
    [
        ("shufflenet_v2_x0_5", "uniform"),
        ("shufflenet_v2_x0_5", "erk"),
        ("shufflenet_v2_x0_5", "magnitude"),
        ("mobilenet_v3_small", "magnitude"),
        ("squeezenet1_1", "erk"),
        ("resnet18", "uniform"),
        ("swin_t", "erk"),
    ],
)
def test_small_classifiers_are_converted_at_their_exact_count(name, distribution):
    model = convert(name, sparsity="0.9", distribution=distribution, num_classes=7)
    assert model.active_weights == round(model.prunable_weights / 10)
    model.check()
    for key, weight in model.weights.items():
        assert torch.count_nonzero(weight).item() <= torch.count_nonzero(model.masks[key]).item()
        assert model.masks[key].any()
