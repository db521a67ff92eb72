"""Networks in compact storage on the kernels, beside the same ones in float64 and float32 of torch."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from dsr_tool.runtime.kernels.training import CALLS
from dsr_tool.sparse.blocked.runner import Runner
from dsr_tool.sparse.compact.change import compacted
from dsr_tool.sparse.compact.store import CompactStore


def masks_of(network, density, skip=()):
    """Returns random masks of all weights but those that `skip` names."""
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for name, parameter in network.named_parameters():
        if parameter.dim() >= 2 and name.rpartition(".")[2] in ("weight", "in_proj_weight") and name not in skip:
            masks[name] = torch.rand(parameter.shape, generator=generator) < density
            masks[name].view(-1)[0] = True
    return masks


def compact(network, density=0.2, skip=()) -> tuple[nn.Module, CompactStore, dict[str, torch.Tensor]]:
    """Zeroes weights of a network, and returns a copy of it in compact storage."""
    masks = masks_of(network, density, skip)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
    changed = copy.deepcopy(network)
    return changed, compacted(changed, masks), masks


def smooth(network):
    """Puts SiLU in place of every ReLU and ReLU6, whose kinks turn a rounding error into another gradient."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, (nn.ReLU, nn.ReLU6)):
                setattr(module, name, nn.SiLU())
    return network


def tensors(result):
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def loss_of(result):
    """Returns a scalar that depends on every entry of every tensor of a result, each in its own way."""
    generator = torch.Generator().manual_seed(3)
    return sum((each * torch.randn(each.shape, generator=generator).to(each)).sum() for each in tensors(result))


def error(one, other):
    """Returns the distance of two tensors relative to the second one."""
    difference = (one.double() - other.double()).norm()
    return (difference / (other.double().norm() + 1e-30)).item()


@dataclass
class Pass:
    """Outputs, gradients and buffers after one forward and backward pass."""

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def passed(network, inputs, masks, store=None, run=None):
    """Runs one pass; gradients of sparse weights are those of the active ones."""
    torch.manual_seed(5)
    network.zero_grad()
    floats = network_dtype(network)
    given = [x.to(floats).clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    result = (run or network)(*given)
    loss_of(result).backward()
    gradients = {f"input {i}": x.grad for i, x in enumerate(given) if x.grad is not None}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None and name != "sparse_values":
            held = parameter.grad.reshape(-1)
            gradients[name] = held[masks[name].reshape(-1)] if name in masks else held
    if store is not None and store.values.grad is not None:
        for name, layer in store.layers.items():
            gradients[name] = store.values.grad[layer.start : layer.start + layer.count]
    return Pass(tensors(result), gradients, dict(network.named_buffers()))


def network_dtype(network):
    return next(each.dtype for each in network.parameters() if each.is_floating_point())


@dataclass
class Comparison:
    """A pass on kernels beside torch's, both measured against float64.

    Attributes:
        runner: the runner.
        calls: kernels that ran, with their number.
        errors: pairs of relative errors, ours and torch's, by name of gradient, output or buffer.
    """

    runner: Runner
    calls: Counter[str]
    errors: dict[str, tuple[float, float]]

    def bad(self, *, factor=10.0, floor=2e-6):
        """Returns the errors that are much larger than torch's own."""
        return {name: pair for name, pair in self.errors.items() if not pair[0] <= factor * pair[1] + floor}

    def check(self):
        """Asserts that no error is much larger than torch's own."""
        assert not self.bad()


def compare(network, *inputs, training=True, density=0.2, skip=(), passes=1) -> Comparison:
    """Runs passes of a network on kernels, in float64 and in float32, and compares the last ones."""
    frozen = [module for module in network.modules() if not module.training]
    network.train(training)
    for module in frozen:
        module.eval()
    sparse, store, masks = compact(network, density, skip)
    wide, same = copy.deepcopy(network).double(), copy.deepcopy(network)
    runner = Runner(sparse, store)
    before = Counter(CALLS)
    assert runner.accepts(inputs, {}), runner.note
    for _ in range(passes):
        ours = passed(sparse, inputs, masks, store, runner)
        exact, usual = passed(wide, inputs, masks), passed(same, inputs, masks)
    calls = Counter(CALLS) - before
    assert ours.gradients.keys() >= exact.gradients.keys()
    errors = {}
    for i, (a, b, c) in enumerate(zip(ours.outputs, usual.outputs, exact.outputs, strict=True)):
        assert a.shape == b.shape
        errors[f"output {i}"] = (error(a, c), error(b, c))
    for name, c in exact.gradients.items():
        errors[name] = (error(ours.gradients[name], c), error(usual.gradients[name], c))
    for name, c in exact.buffers.items():
        errors[name] = (error(ours.buffers[name], c), error(usual.buffers[name], c))
    return Comparison(runner, calls, errors)


@pytest.fixture
def networks():
    """Returns what tests of whole networks share; torch runs on one thread and from one seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield SimpleNamespace(compact=compact, compare=compare, smooth=smooth, loss_of=loss_of, error=error)
    torch.set_num_threads(threads)
