"""Networks of tasks beyond classification take the steps of masked storage in compact storage."""

import copy

import pytest
import torch
from torch import nn, optim
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, Conv3DSimple

from converters.conversion import convert
from converters.torchvision_builders import architectures
from dsr_tool.methods import attach
from dsr_tool.runtime.kernels.training import available
from dsr_tool.sparse.compact.modules import runner_of

PIXELS = 64
CLIPS = {"mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224), "s3d": (16, 224)}
"""Frames and pixels of clips: transformers with embedded positions take no others, and pools of S3D need no fewer."""


def shape_of(name):
    if name not in architectures("video"):
        return (3, PIXELS, PIXELS)
    frames, pixels = CLIPS.get(name, (8, 32))
    return (3, frames, pixels, pixels)


def small_video_network():
    """The blocks of torchvision's networks for clips, whose convolutions are classes of their own."""
    return nn.Sequential(
        Conv3DSimple(3, 8), nn.BatchNorm3d(8), nn.ReLU(), BasicBlock(8, 8, Conv3DSimple), BasicBlock(8, 8, Conv2Plus1D),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def storages(network, shape, **more):
    """Returns a model in masked and in compact storage, and in float64."""
    torch.manual_seed(0)
    masked = convert(network, sparsity=0.8, input_shape=shape, positions="magnitude", **more)
    for module in masked.module.modules():
        # Kernels draw random numbers in another order.
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return masked, copy.deepcopy(masked).to_storage("compact"), copy.deepcopy(masked).to(torch.float64)


def losses_and_gradient(model, inputs):
    """Takes one step with a reallocation. Returns the losses before and after, and the first gradient."""
    model.module.train()
    optimizer = optim.SGD(model.module.parameters(), lr=1e-3, momentum=0.9)
    attach(model, optimizer, "set", total_steps=9, seed=3, every=1, stop=1.0)
    losses, masks = [], {name: mask.clone() for name, mask in model.masks.items()}
    for _ in range(2):
        optimizer.zero_grad()
        outputs = model(inputs)
        outputs = outputs["out"] if isinstance(outputs, dict) else outputs
        wanted = torch.sin(torch.arange(outputs.numel(), dtype=outputs.dtype)).view(outputs.shape)
        loss = (outputs - wanted).pow(2).mean()
        losses.append(loss.item())
        if len(losses) == 1:
            loss.backward()
            gradient = _flat_gradient(model, masks)
            optimizer.step()
    assert any(not torch.equal(mask, model.masks[name]) for name, mask in masks.items())
    return losses, gradient


def _flat_gradient(model, masks):
    gradients = {name: parameter.grad.reshape(-1) for name, parameter in model.named_parameters()}
    pieces = [
        g[masks[name].reshape(-1)] if name in masks and model.store is None else g for name, g in gradients.items()
    ]
    return torch.cat(pieces).double()


def check_one_step(network, shape, **more):
    masked, compact, wide = storages(network, shape, **more)
    # Transformers for clips need 4 GB for one; batch norms need two.
    inputs, budget = torch.randn(1 if shape[-1] > 200 else 2, *shape), masked.active_weights
    losses, gradients = zip(
        *(losses_and_gradient(model, inputs.to(torch.float64 if model is wide else torch.float32))
          for model in (masked, compact, wide)), strict=True,
    )  # fmt: skip
    for usual, ours, exact in zip(*losses, strict=True):
        assert abs(ours - exact) <= 10 * abs(usual - exact) + 1e-4 * abs(exact)
    usual, ours, exact = gradients
    assert (ours - exact).norm() <= 10 * (usual - exact).norm() + 1e-4 * exact.norm()
    assert compact.active_weights == budget
    return compact


def test_a_segmenter_takes_the_same_step_on_kernels():
    name = "lraspp_mobilenet_v3_large"
    compact = check_one_step(name, shape_of(name), num_classes=5)
    if available():
        coverage = runner_of(compact.module).coverage
        assert coverage.sparse_on_kernels == coverage.sparse == len(compact.masks)


def test_a_network_for_clips_takes_the_same_step_by_rebuilding():
    compact = check_one_step(small_video_network(), (3, 4, 12, 12))
    if available():
        coverage = runner_of(compact.module).coverage
        assert coverage.sparse == len(compact.masks) == 7
        assert coverage.sparse_on_kernels == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [*architectures("segmentation"), *architectures("video")])
def test_every_network_of_another_task_takes_the_same_step(name):
    check_one_step(name, shape_of(name), num_classes=5)
