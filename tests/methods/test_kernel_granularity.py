"""Masks of whole kernels: conversion, and the methods that prune and grow kernels."""

import numpy as np
import pytest
import torch
from torch import nn, optim

from converters.conversion import convert
from converters.loading import load
from dsr_tool.errors import FormatError, UsageError
from dsr_tool.methods import DSR, SET, ReallocationSchedule, attach, make
from dsr_tool.sparse.active import gather

ALWAYS = ReallocationSchedule(((0, 1),), 10**9)


def network(seed=0, *, layout=torch.contiguous_format):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(6, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 20, 1),
        nn.Conv2d(20, 24, 3),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    ).to(memory_format=layout)


def model(seed=0, **options):
    return convert(network(seed), **{"sparsity": 0.8, "positions": "random", "granularity": "kernel", **options})


def whole(sparse):
    """Returns the active kernels per layer; fails if a kernel is active in part."""
    counts = []
    for mask in sparse.masks.values():
        kernels = mask.flatten(2).sum(-1) if mask.ndim > 2 else mask
        size = mask[0, 0].numel() if mask.ndim > 2 else 1
        assert set(kernels.unique().tolist()) <= {0, size}
        counts.append(int((kernels > 0).sum()))
    return counts


@pytest.mark.parametrize("distribution", ["uniform", "erk", "magnitude"])
@pytest.mark.parametrize("positions", ["random", "magnitude"])
def test_conversion_makes_whole_kernels_and_meets_the_number_exactly(distribution, positions):
    sparse = model(distribution=distribution, positions=positions)
    assert min(whole(sparse)) >= 1
    # Layers with single weights take what whole kernels leave.
    assert sparse.active_weights == round(sparse.prunable_weights * 0.2) == sparse.config.conversion["active_weights"]
    if positions == "magnitude":
        weight, mask = sparse.weights["0.weight"], sparse.masks["0.weight"][:, :, 0, 0]
        original = network()[0].weight.detach().abs().mean((2, 3))
        assert original[mask].min() >= original[~mask].max() and weight.count_nonzero() == 9 * mask.sum()


def test_with_kernels_of_one_size_the_number_is_the_nearest_from_below():
    convolutions = nn.Sequential(nn.Conv2d(6, 16, 3), nn.Conv2d(16, 20, 3))
    sparse = convert(convolutions, sparsity=0.8, granularity="kernel")
    wanted = round(sparse.prunable_weights * 0.2)
    assert wanted - 9 < sparse.active_weights <= wanted and sparse.active_weights % 9 == 0
    assert sparse.config.conversion["active_weights"] == sparse.active_weights


def test_too_few_weights_for_a_kernel_in_each_layer_are_refused():
    with pytest.raises(UsageError, match="allow 20 or more"):
        model(sparsity=0.999, sparsify_patterns=["*"])
    with pytest.raises(UsageError, match=r"granularity 'kernels' is unknown; did you mean kernel"):
        model(granularity="kernels")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("method", ["dsr", "layers", "set"])
def test_training_reallocates_whole_kernels_and_keeps_the_number(method, layout):
    sparse = convert(network(1, layout=layout), sparsity=0.8, positions="random", granularity="kernel")
    methods = {
        "dsr": DSR(ALWAYS, threshold=0.05),
        "layers": DSR(ALWAYS, threshold=0.05, cross_layer=False),
        "set": SET(ALWAYS, drop_fraction=0.3),
    }
    optimizer = optim.SGD(sparse.module.parameters(), lr=0.05, momentum=0.9)
    attached = attach(sparse, optimizer, methods[method])
    before, moved = whole(sparse), 0
    for _ in range(6):
        optimizer.zero_grad()
        sparse(torch.randn(4, 6, 6, 6)).square().mean().backward()
        optimizer.step()
        moved += len(attached.last.dropped.flat)
        now = whole(sparse)
        # Kernels stay among layers of their size: 3x3 in the first and third, single weights in the others.
        assert now[0] + now[2] == before[0] + before[2] and now[1] + now[3] == before[1] + before[3]
        assert method == "dsr" or now == before
        assert sum(attached.last.dropped.counts) == sum(attached.last.grown.counts) == len(attached.last.grown.flat)
        sparse.check()
    assert moved > 50


def test_a_kernel_is_pruned_by_the_mean_magnitude_of_its_weights():
    """The authors' prune_threshold with sub_kernel_granularity 2, written out."""
    sparse = model()
    weights = gather(sparse)
    assert weights.units == (9, 1, 9, 1)
    method = DSR(ALWAYS, threshold=0.05)
    moved = method.update(weights, 1, torch.Generator())
    expected, start = [], 0
    for name, mask in sparse.masks.items():
        weight = sparse.weights[name].detach()
        kernels = (weight.abs().sum((2, 3)) / weight[0, 0].numel() if weight.ndim > 2 else weight.abs()).flatten()
        active = (mask[:, :, 0, 0] if mask.ndim > 2 else mask).flatten()
        expected += (np.flatnonzero((kernels < 0.05) & active) + start).tolist()
        start += len(active)
    assert moved.dropped.flat.tolist() == expected and 20 < len(expected) < len(weights.values)


def test_the_granularity_is_saved_with_the_model(tmp_path):
    sparse = model()
    sparse.save(tmp_path / "model")
    again = load(tmp_path / "model", network())
    assert str(again.granularity) == "kernel" and whole(again) == whole(sparse)
    optimizer = optim.SGD(again.module.parameters(), lr=0.1)
    for name, options in (("rigl", {}), ("deepr", {}), ("gmp", {"final_sparsity": 0.9})):
        with pytest.raises(UsageError, match=f"method {name} does not keep the pattern of --granularity kernel"):
            attach(again, optimizer, make(name, 1000, **options))
    attach(again, optimizer, make("static", 1000))


def test_masks_with_partly_active_kernels_are_refused():
    sparse = convert(network(), sparsity=0.8)
    sparse.config.conversion["granularity"] = "kernel"
    with pytest.raises(UsageError, match="mask of '0.weight' does not have the pattern of --granularity kernel"):
        attach(sparse, optim.SGD(sparse.module.parameters(), lr=0.1), "dsr", total_steps=100)
    sparse.config.conversion["granularity"] = "row"
    with pytest.raises(FormatError, match="granularity 'row'"):
        gather(sparse)
