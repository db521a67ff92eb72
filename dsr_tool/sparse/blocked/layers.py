"""Steps of convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dsr_tool.sparse.blocked.choice import prefers_dense
from dsr_tool.sparse.blocked.context import Context, Run, torch_step
from dsr_tool.sparse.blocked.convolution import convolve, convolve_dense
from dsr_tool.sparse.blocked.linear import linear
from dsr_tool.sparse.blocked.plans import Geometry
from dsr_tool.sparse.blocked.trace import sparse_names
from dsr_tool.sparse.blocked.values import Registers, rows_at, value_at
from dsr_tool.sparse.compact.rebuild import light

__all__ = ["Product", "convolution_step", "linear_step", "product", "sparse_product"]

Product = Callable[[Tensor], Tensor]
"""A layer, applied to a blocked activation or to rows of features."""


def convolution_step(node: fx.Node, context: Context) -> Run | None:
    """Returns the step of an nn.Conv2d, or None if the kernels have none for its padding."""
    module = cast(nn.Conv2d, context.module(node))
    geometry = geometry_of(module)
    if geometry is None or len(node.args) != 1 or node.kwargs:
        return None
    source, out = context.places[cast(fx.Node, node.args[0])], context.places[node]
    multiply, otherwise = _convolution(module, geometry, context), torch_step(node, context)
    stem = not sparse_names(module) and geometry.groups == 1 and geometry.kernel != (1, 1)

    def run(registers: Registers) -> None:
        value = value_at(registers, source)
        if value is None or value.rank != 4 or value.shape[1] != geometry.in_channels:
            otherwise(registers)
        elif stem and not value.in_lanes:
            # Torch's own convolution is at its best with channels last, which `block` reads as they lie.
            registers[source] = value.rows.contiguous(memory_format=torch.channels_last)
            otherwise(registers)
            registers[source] = value
        else:
            registers[out] = value.same(multiply(value.image))

    return run


def geometry_of(module: nn.Conv2d) -> Geometry | None:
    """Returns the geometry of a convolution, or None if it does not pad with zeros."""
    if module.padding_mode != "zeros":
        return None
    kernel, dilation = cast(tuple[int, int], module.kernel_size), cast(tuple[int, int], module.dilation)
    padding: Any = module.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        # As torch does: where the padding is odd, the end has one pixel more.
        reach = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in reach)
    stride = cast(tuple[int, int], module.stride)
    return Geometry(module.out_channels, module.in_channels, kernel, stride, padding, dilation, module.groups)


def _convolution(module: nn.Conv2d | nn.Linear, geometry: Geometry, context: Context) -> Product:
    parameters = module._parameters
    name = sparse_names(module).get("weight")
    if name is None:

        def multiply_dense(x: Tensor) -> Tensor:
            return convolve_dense(x, cast(Tensor, parameters["weight"]), geometry, parameters["bias"])

        return multiply_dense
    store, plans = context.store, context.plans

    def multiply(x: Tensor) -> Tensor:
        layer = store.layers[name]
        if prefers_dense(geometry, layer.count / layer.size):
            with light():
                return convolve_dense(x, store.dense(name), geometry, parameters["bias"])
        values, positions = store.values_of(name), store.positions_of(name)
        return convolve(x, values, positions, geometry, plans, name, store.version, parameters["bias"])

    return multiply


def linear_step(node: fx.Node, context: Context) -> Run | None:
    """Returns the step of an nn.Linear with a sparse weight, or None for a dense one, which torch multiplies by."""
    module = cast(nn.Linear, context.module(node))
    name = sparse_names(module).get("weight")
    if name is None or len(node.args) != 1 or node.kwargs:
        return None
    source, out = context.places[cast(fx.Node, node.args[0])], context.places[node]
    geometry, store = Geometry(module.out_features, module.in_features), context.store
    on_images, otherwise = _convolution(module, geometry, context), torch_step(node, context)
    on_rows = product(module, "weight", "bias", geometry, context)

    def run(registers: Registers) -> None:
        value, layer = value_at(registers, source), store.layers[name]
        if value is None or value.rank != 2 or prefers_dense(geometry, layer.count / layer.size):
            rows = rows_at(registers, source)
            if rows is None or rows.dim() < 2:
                otherwise(registers)
            else:
                registers[out] = on_rows(rows)
            return
        made = on_images(value.image)
        registers[out] = value.same(made.view(*made.shape[:2], made.shape[4]))

    return run


def product(module: nn.Module, weight: str, bias: str, geometry: Geometry, context: Context) -> Product:
    """Returns the product of rows of features (..., F) with a weight of a module, plus its bias.

    Args:
        module: owner of both.
        weight: attribute of the weight, which may be sparse.
        bias: attribute of the bias, which may be None.
        geometry: output and input features.
        context: the network.
    """
    parameters = module._parameters
    name = sparse_names(module).get(weight)
    if name is None:
        return lambda x: functional.linear(x, cast(Tensor, parameters[weight]), parameters[bias])
    multiply = sparse_product(name, geometry, context)
    return lambda x: multiply(x, parameters[bias])


def sparse_product(name: str, geometry: Geometry, context: Context) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Returns the product of rows of features (..., F) with a sparse weight, plus a bias.

    Args:
        name: name of the weight in the store.
        geometry: output and input features.
        context: the network.
    """
    store, plans = context.store, context.plans

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        layer = store.layers[name]
        if prefers_dense(geometry, layer.count / layer.size):
            with light():
                return functional.linear(x, store.dense(name), bias)
        values, positions = store.values_of(name), store.positions_of(name)
        return linear(x, values, positions, geometry.out_channels, plans, name, store.version, bias)

    return multiply
