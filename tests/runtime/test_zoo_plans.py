"""Every classifier of torchvision has a plan of kernels alone, for one image and for several."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import densenet, shufflenetv2, swin_transformer, vision_transformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from converters.torchvision_builders import architectures
from dsr_tool.graph.fold import fold_norms
from dsr_tool.graph.ir import Graph
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.reference.interpreter import Interpreter
from dsr_tool.sparse.trace import trace
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels were built here")

CLASSES = {"num_classes": 10}

# Torchvision's own classes with few layers, for the kinds of operators that no plain convolutional network has.
SMALL = {
    "adaptive": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=16), nn.ReLU(), nn.AdaptiveAvgPool2d((7, 7)), nn.Flatten(), nn.Linear(392, 10)
    ),
    "convnext": lambda: ConvNeXt([CNBlockConfig(24, 48, 1), CNBlockConfig(48, None, 1)], **CLASSES),
    "densenet": lambda: densenet.DenseNet(8, (2, 2), 16, **CLASSES),
    "shufflenet": lambda: shufflenetv2.ShuffleNetV2([2, 2, 2], [24, 32, 64, 96, 128], **CLASSES),
    "swin": lambda: swin_transformer.SwinTransformer([4, 4], 24, [2], [2], [4, 4], **CLASSES),
    "vit": lambda: vision_transformer.VisionTransformer(64, 16, 1, 4, 48, 96, **CLASSES),
}


def small_input(name: str) -> tuple[int, int, int]:
    """A small input that a classifier allows: tables of positions fix the size of some, pools need one."""
    sides = {"vit_h_14": 224, "vit_*": 224, "maxvit_t": 224, "inception_v3": 96}
    side = next((side for pattern, side in sides.items() if fnmatch.fnmatchcase(name, pattern)), 64)
    return (3, side, side)


def sparse_tensors(module: nn.Module, graph: Graph) -> dict[str, SparseTensor]:
    """Random values for the parameters of a graph: a tenth of a large weight, of a size that keeps signals alive."""
    rng, state, tensors = np.random.default_rng(0), module.state_dict(), {}
    for name in graph.parameters:
        shape = tuple(state[name].shape)
        if state[name].dtype != torch.float32:
            tensors[name] = SparseTensor.from_dense(state[name].numpy(), Mask.full(shape))
            continue
        large = len(shape) > 1 and state[name].numel() > 4096
        mask = rng.random(shape) < (0.1 if large else 1)
        fan_in = max(int(np.prod(shape[1:])), 1) if len(shape) > 1 else 100
        values = rng.standard_normal(int(mask.sum())) * np.sqrt(2 / (fan_in * (0.1 if large else 1)))
        # Scales of norms and variances are positive.
        values = np.abs(values) + 0.7 if len(shape) == 1 and "bias" not in name and "mean" not in name else values
        tensors[name] = SparseTensor(Mask.from_bool(mask), values.astype(np.float32))
    return tensors


def check(module: nn.Module, shape: tuple[int, int, int]) -> None:
    module.eval()
    graph = trace(module, shape)
    graph, tensors = fold_norms(graph, sparse_tensors(module, graph))
    reference, machine = Interpreter(graph, tensors), Machine(library(), 2)
    for batch in (1, 2):
        x = np.random.default_rng(batch).standard_normal((batch, *shape)).astype(np.float32)
        plan = Plan(graph, tensors, x.shape, machine)
        assert not plan.coverage.fallbacks
        (expected,), (found,) = reference.run(x), plan.run(x)
        assert np.isfinite(expected).all()
        assert np.ptp(expected) > 0
        # Random networks make rounding errors grow with their depth; a wrong entry would be off by its own size.
        allowed = 1e-5 * float(np.abs(expected).max())
        if not np.abs(found - expected).max() <= allowed:
            # Random weights make some deep networks chaotic: EfficientNetV2-L moves by .44 of its largest output when
            # its input moves by 1e-7. A plan may differ by some times what the reference itself does then.
            (moved,) = reference.run(x * np.float32(1 + 2**-23))
            allowed += 10 * float(np.abs(moved - expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("family", SMALL)
def test_every_family_has_a_plan_of_kernels_alone(family):
    torch.manual_seed(0)
    check(SMALL[family](), (3, 64, 64))


def build(name: str) -> nn.Module:
    options: Mapping[str, object] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(architectures("classification")))
def test_every_classifier_has_a_plan_of_kernels_alone(name):
    """An hour on two cores, and up to 12 GB for the largest."""
    check(build(name), small_input(name))
