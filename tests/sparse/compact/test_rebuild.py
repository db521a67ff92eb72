"""Rebuilt weights: right gradients, and no dense tensor that stays."""

import gc
import weakref

import pytest
import torch
from torch import nn


def dense_floats(threshold):
    """Counts the float tensors of at least so many entries that are alive, by storage."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, nn.Parameter) and each.is_floating_point() and each.numel() >= threshold:
            found[each.untyped_storage()._cdata] = each.numel()
    return len(found)


def test_gradients_are_those_of_the_active_weights(pair):
    masked, compact = pair()
    images = torch.randn(4, 3, 9, 9)
    for model in (masked, compact):
        model(images).square().sum().backward()
    flat = torch.cat([masked.weights[name].grad[mask] for name, mask in masked.masks.items()])
    assert torch.equal(compact.module.sparse_values.grad, flat)


def test_nothing_dense_is_kept_for_the_backward_pass():
    from converters.conversion import convert

    module = nn.Sequential(*[nn.Linear(300, 300) for _ in range(6)])
    model = convert(module, sparsity=0.9).to_storage("compact")
    model.store.kernels = False
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        before = dense_floats(90_000)
        loss = model(torch.randn(2, 300)).sum()
    assert dense_floats(90_000) == before
    loss.backward()
    assert dense_floats(90_000) == before
    # The innermost hooks see the saved tensors: all that reach the outer ones are small.
    assert max(saved, default=0) < 90_000


def test_a_weight_that_changed_before_backward_is_refused(pair):
    _, compact = pair()
    loss = compact(torch.randn(2, 3, 9, 9)).sum()
    with torch.no_grad():
        compact.module.sparse_values.add_(1)
    with pytest.raises(RuntimeError, match="changed between forward and backward pass"):
        loss.backward()


def test_second_derivatives_are_refused(pair):
    _, compact = pair()
    loss = compact(torch.randn(2, 3, 9, 9)).square().sum()
    (gradient,) = torch.autograd.grad(loss, compact.module.sparse_values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_modules_called_by_themselves_have_gradients_too(pair):
    masked, compact = pair()
    images = torch.randn(2, 3, 9, 9)
    for model in (masked, compact):
        model.module.first(images).sum().backward()
    mask = masked.masks["first.weight"]
    layer = compact.store.layers["first.weight"]
    gradient = compact.module.sparse_values.grad[layer.start : layer.start + layer.count]
    assert torch.equal(gradient, masked.module.first.weight.grad[mask])


def test_a_network_that_nobody_uses_is_freed(pair):
    _, compact = pair()
    with torch.no_grad():
        assert compact.module.state_dict()
    store = weakref.ref(compact.store)
    del compact, _
    gc.collect()
    assert store() is None
