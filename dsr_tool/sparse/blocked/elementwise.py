"""Steps of activations, sums, products and dropout: what treats every entry, or every channel, by itself.

They run on whichever form a value has already. Only functions are here whose derivative is finite everywhere, since a
lane of padding holds any number and its gradient of zero must stay zero.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import functional

from dsr_tool.runtime.kernels.train_planes import ACTIVATIONS
from dsr_tool.sparse.blocked.context import Context, Run
from dsr_tool.sparse.blocked.layout import block
from dsr_tool.sparse.blocked.norm import act, add_act
from dsr_tool.sparse.blocked.operations import Operation
from dsr_tool.sparse.blocked.values import Registers, Value, value_at

__all__ = ["BINARY", "UNARY", "activation_of", "activation_step", "binary_step", "prelu_step", "sum_step", "unary_step"]

Builder = Callable[[Operation, fx.Node, Context, Run], Run | None]


def activation_of(operation: Operation | None) -> tuple[str, float] | None:
    """Returns name and slope of an activation that the kernels have; None for other operations."""
    if operation is None or operation.name not in ACTIVATIONS:
        return None
    slope = operation.arguments.get("negative_slope", 0.01)
    return (operation.name, float(slope)) if isinstance(slope, (int, float)) and slope >= 0 else None


def activation_step(operation: Operation, node: fx.Node, context: Context, otherwise: Run) -> Run | None:
    """Returns the step of an activation of the kernels."""
    source, known = context.place(operation.arguments["input"]), activation_of(operation)
    if source is None or known is None:
        return None
    name, slope = known
    return _in_lanes_step(lambda value: act(value.lanes, name, slope), source, context.places[node], otherwise)


def unary_step(operation: Operation, node: fx.Node, context: Context, otherwise: Run) -> Run | None:
    """Returns the step of a function of each entry that torch computes."""
    source = context.place(operation.arguments["input"])
    options = {key: value for key, value in operation.arguments.items() if key != "input"}
    if source is None or any(isinstance(value, fx.Node) for value in options.values()):
        return None
    function = functools.partial(UNARY[operation.name], **options)
    return _in_lanes_step(function, source, context.places[node], otherwise)


def prelu_step(node: fx.Node, context: Context, otherwise: Run) -> Run | None:
    """Returns the step of an nn.PReLU, whose slopes are those of channels in either form."""
    source, parameters = context.places[cast(fx.Node, node.args[0])], context.module(node)._parameters

    def bent(value: Value) -> Tensor:
        return functional.prelu(value.lanes, cast(Tensor, parameters["weight"]))

    return _in_lanes_step(bent, source, context.places[node], otherwise)


def _in_lanes_step(function: Callable[[Value], Tensor], source: int, out: int, otherwise: Run) -> Run:
    """Returns the step of a function of one value, which takes it in lanes if it is there."""

    def run(registers: Registers) -> None:
        value = registers[source]
        if type(value) is Value and value.in_lanes:
            registers[out] = value.same(function(value))
        else:
            otherwise(registers)

    return run


def _of_lanes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda value, **options: function(value.lanes, **options)


def _dropout2d(value: Value, p: float, training: bool) -> Tensor:
    """Zeroes whole channels of single images."""
    lanes = value.lanes
    if not training or not p:
        return lanes
    noise = lanes.new_ones(*lanes.shape[:2], *([1] * (lanes.dim() - 3)), lanes.shape[-1])
    return lanes * functional.dropout(noise, p, training)


def _stochastic_depth(value: Value, p: float, mode: str, training: bool) -> Tensor:
    """Zeroes whole images, by the numbers that torchvision's own function draws for them."""
    lanes, survival = value.lanes, 1.0 - p
    if not training or not p:
        return lanes
    noise = torch.empty(value.images if mode == "row" else 1, 1).bernoulli_(survival)
    if survival > 0.0:
        noise.div_(survival)
    if mode != "row":
        return lanes * noise
    blocked = block(noise, lanes.shape[-1])
    return lanes * blocked.view(blocked.shape[0], *([1] * (lanes.dim() - 2)), lanes.shape[-1])


UNARY: dict[str, Callable[..., Tensor]] = {
    "gelu": _of_lanes(functional.gelu),
    "elu": _of_lanes(functional.elu),
    "tanh": _of_lanes(torch.tanh),
    "mish": _of_lanes(functional.mish),
    "softplus": _of_lanes(functional.softplus),
    "hardtanh": _of_lanes(functional.hardtanh),
    "neg": _of_lanes(torch.neg),
    "abs": _of_lanes(torch.abs),
    "identity": _of_lanes(lambda lanes: lanes),
    "detach": _of_lanes(torch.detach),
    "dropout": _of_lanes(functional.dropout),
    "dropout2d": _dropout2d,
    "stochastic_depth": _stochastic_depth,
}
"""Functions of a value in lanes, by name; other options of the operation are keywords."""

BINARY: dict[str, Callable[[Any, Any], Tensor]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
}  # fmt: skip


def binary_step(operation: Operation, node: fx.Node, context: Context, otherwise: Run) -> Run | None:
    """Returns the step of a sum, difference, product or quotient."""
    one, other = operation.arguments["input"], operation.arguments["other"]
    function, out, divides = BINARY[operation.name], context.places[node], operation.name == "div"
    read_one, read_other = (_operand(each, context) for each in (one, other))

    def run(registers: Registers) -> None:
        a, b = read_one(registers), read_other(registers)
        first = a if type(a) is Value and a.in_lanes else b
        if type(first) is Value and first.in_lanes and not (divides and not isinstance(b, (int, float))):
            x, y = _in_lanes(a, first), _in_lanes(b, first)
            if x is not None and y is not None:
                registers[out] = first.same(function(x, y))
                return
        otherwise(registers)

    return run


def _operand(argument: Any, context: Context) -> Callable[[Registers], Any]:
    place = context.place(argument)
    return (lambda _: argument) if place is None else (lambda registers: registers[place])


def _in_lanes(held: Any, beside: Value) -> Tensor | int | float | None:
    """Returns an operand in a form that broadcasts against a value in lanes as its rows do; None if there is none."""
    if isinstance(held, (int, float)):
        return held
    if type(held) is Value:
        return held.lanes if held.images == beside.images and held.rank == beside.rank else None
    if not isinstance(held, Tensor) or held.dtype is not torch.float32:
        return None
    if held.dim() < beside.rank or (held.dim() == beside.rank and held.shape[0] == 1):
        # (C, 1, 1) or (1, C, 1, 1): dimensions are matched from the last one, which is lanes here.
        return held.unsqueeze(-1) if held.dim() else held
    if held.dim() == beside.rank and held.shape[0] == beside.images and held.dim() in (2, 4):
        return Value(beside.images, rows=held).lanes
    return None


def sum_step(
    operands: tuple[fx.Node, fx.Node], context: Context, activation: tuple[str, float], out: fx.Node, apart: list[Run]
) -> Run:
    """Returns the step of a sum of two nodes with the activation that follows.

    Args:
        operands: what it adds.
        context: the network.
        activation: name and slope.
        out: the activation's node.
        apart: the steps of both nodes, for what the kernel does not take.
    """
    one, other, place = context.places[operands[0]], context.places[operands[1]], context.places[out]
    name, slope = activation

    def run(registers: Registers) -> None:
        a, b = registers[one], registers[other]
        lanes = (type(a) is Value and a.in_lanes) or (type(b) is Value and b.in_lanes)
        x, y = (value_at(registers, one), value_at(registers, other)) if lanes else (None, None)
        if x is None or y is None or x.shape != y.shape:
            for step in apart:
                step(registers)
            return
        registers[place] = x.same(add_act(x.lanes, y.lanes, name, slope))

    return run
