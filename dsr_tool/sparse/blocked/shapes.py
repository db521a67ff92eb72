"""Steps of pools, means, and of what only rearranges a value: flatten, view, concatenation, chunks, shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dsr_tool.sparse.blocked.context import Context, Run, reader
from dsr_tool.sparse.blocked.operations import Operation
from dsr_tool.sparse.blocked.pooling import MOST_ENTRIES, adaptive_avg_pool, avg_pool, global_mean, max_pool
from dsr_tool.sparse.blocked.values import Registers, Value, value_at

__all__ = ["ANSWERS", "REARRANGED", "answer_step", "cat_step", "mean_step", "pool_step", "rearranged_step"]


def pool_step(operation: Operation, node: fx.Node, context: Context, otherwise: Run) -> Run | None:
    """Returns the step of a maximum, average or adaptive average pool."""
    given = dict(operation.arguments)
    place, out = context.place(given.pop("input")), context.places[node]
    if place is None or any(isinstance(each, fx.Node) for each in given.values()):
        return None
    pool = _pool(operation.name, {key: _pair(value) for key, value in given.items()})
    if pool is None:
        return None

    def run(registers: Registers) -> None:
        value = value_at(registers, place)
        if value is None or value.rank != 4:
            otherwise(registers)
        else:
            registers[out] = value.same(pool(value.image))

    return run


def _pool(name: str, given: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """Returns a pool of a blocked activation, or None if the kernels have none like this."""
    if name == "adaptive_avg_pool2d":
        size = given["output_size"]
        return lambda x: adaptive_avg_pool(x, size)
    stride = given["stride"] or None
    if name == "avg_pool2d":
        if given["divisor_override"]:
            return None
        kernel, padding, ceil, counts = (
            given[key] for key in ("kernel_size", "padding", "ceil_mode", "count_include_pad")
        )
        return lambda x: avg_pool(x, kernel, stride, padding, ceil, counts)
    kernel, padding, dilation, ceil = (given[key] for key in ("kernel_size", "padding", "dilation", "ceil_mode"))
    entries = kernel**2 if isinstance(kernel, int) else math.prod(kernel)
    if given["return_indices"] or entries > MOST_ENTRIES:
        return None
    return lambda x: max_pool(x, kernel, stride, padding, dilation, ceil)


def _pair(value: Any) -> Any:
    """Returns a list as a tuple, and one number in it as that number."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(value) == 1 else tuple(value)
    return value


def mean_step(operation: Operation, node: fx.Node, context: Context, otherwise: Run) -> Run | None:
    """Returns the step of a mean over all pixels, or None for one over other dimensions."""
    given = operation.arguments
    dim, keep = given["dim"], given["keepdim"]
    place, out = context.place(given["input"]), context.places[node]
    if place is None or not isinstance(dim, (list, tuple)) or isinstance(keep, fx.Node):
        return None
    if not all(isinstance(each, int) for each in dim) or sorted(_axis(each, 4) for each in dim) != [2, 3]:
        return None

    def run(registers: Registers) -> None:
        value = registers[place]
        if type(value) is not Value or not value.in_lanes or value.rank != 4:
            otherwise(registers)
            return
        mean = global_mean(value.image)
        registers[out] = value.same(mean if keep else mean.view(*mean.shape[:2], mean.shape[4]))

    return run


def cat_step(operation: Operation, node: fx.Node, context: Context, otherwise: Run) -> Run | None:
    """Returns the step of a concatenation of channels."""
    tensors, dim, out = operation.arguments["tensors"], operation.arguments["dim"], context.places[node]
    whole = context.place(tensors)
    parts = [] if whole is not None else list(tensors)
    if not isinstance(dim, int) or not all(isinstance(each, fx.Node) for each in parts):
        return None
    places = [context.places[each] for each in parts]

    def run(registers: Registers) -> None:
        held = [registers[place] for place in places] if whole is None else list(registers[whole])
        if any(type(each) is Value and each.in_lanes for each in held):
            # The ones that have no blocked form yet get it: the others are larger or as large.
            values = held if whole is not None else [value_at(registers, place) for place in places]
            first = values[0]
            if type(first) is Value and _axis(dim, first.rank) == 1:
                alike = [each.lanes for each in values if type(each) is Value and _alike(each, first)]
                if len(alike) == len(values):
                    registers[out] = first.same(torch.cat(alike, 1))
                    return
        otherwise(registers)

    return run


def _alike(value: Value, first: Value) -> bool:
    return value.images == first.images and value.rank == first.rank


def rearranged_step(operation: Operation, node: fx.Node, context: Context, otherwise: Run) -> Run | None:
    """Returns the step of a rearrangement that leaves images alone; whether it does shows when it runs."""
    place, options = _read(operation, context)
    if place is None:
        return None
    rearrange, out = REARRANGED[operation.name], context.places[node]

    def run(registers: Registers) -> None:
        value = registers[place]
        if type(value) is Value and value.in_lanes:
            made = rearrange(value, **options(registers))
            if made is not None:
                registers[out] = made
                return
        otherwise(registers)

    return run


def _read(operation: Operation, context: Context) -> tuple[int | None, Callable[[Registers], dict[str, Any]]]:
    """Returns the register of an operation's input, and a function that reads its other arguments by name."""
    options = dict(operation.arguments)
    place = context.place(options.pop("input"))
    return place, reader(options, context.places)


def _axis(dim: int, rank: int) -> int:
    """Returns a dimension as a number from 0 on; -1 for one that the value lacks, which torch itself refuses."""
    if not -rank <= dim < rank:
        return -1
    return dim + rank if dim < 0 else dim


def _flatten(value: Value, start_dim: int, end_dim: int) -> Value | None:
    rank = value.rank
    start, end = _axis(start_dim, rank), _axis(end_dim, rank)
    if start <= 0 or end < 0:
        return None
    lanes = value.lanes
    return value.same(lanes.flatten(start, end)) if end > start else value


def _view(value: Value, sizes: Any) -> Value | None:
    wanted = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)) else sizes
    if len(wanted) < 2 or not all(isinstance(each, int) for each in wanted):
        return None
    rest, lanes = tuple(wanted[1:]), value.lanes
    whole = math.prod(lanes.shape[1:-1])
    # (-1, F) keeps images apart only if F entries are those of one image.
    if wanted[0] != value.images and not (wanted[0] == -1 and -1 not in rest and math.prod(rest) == whole):
        return None
    return value.same(lanes.reshape(lanes.shape[0], *rest, lanes.shape[-1]))


def _transpose(value: Value, dim0: int, dim1: int) -> Value | None:
    rank = value.rank
    # Of four dimensions the result is mostly tokens, which torch's own layers take.
    one, other = _axis(dim0, rank), _axis(dim1, rank)
    if rank < 5 or min(one, other) <= 0:
        return None
    return value.same(value.lanes.transpose(one, other))


def _chunk(value: Value, chunks: int, dim: int) -> tuple[Value, ...] | None:
    axis = _axis(dim, value.rank)
    return tuple(map(value.same, value.lanes.chunk(chunks, axis))) if axis > 0 else None


def _split(value: Value, split_size: Any, dim: int) -> tuple[Value, ...] | None:
    axis = _axis(dim, value.rank)
    return tuple(map(value.same, value.lanes.split(split_size, axis))) if axis > 0 else None


REARRANGED: dict[str, Callable[..., Any]] = {
    "flatten": _flatten, "view": _view, "transpose": _transpose, "chunk": _chunk, "split": _split,
}  # fmt: skip
"""Rearrangements of a value in lanes, by name; None where they would mix images."""


def answer_step(operation: Operation, node: fx.Node, context: Context, otherwise: Run) -> Run | None:
    """Returns the step of a question about a value, or of taking one of several, that needs no layout."""
    place, options = _read(operation, context)
    if place is None:
        return None
    answer, out = ANSWERS[operation.name], context.places[node]

    def run(registers: Registers) -> None:
        held = registers[place]
        answered = answer(held, **options(registers)) if type(held) is Value or operation.name == "getitem" else _NONE
        if answered is _NONE:
            otherwise(registers)
        else:
            registers[out] = answered

    return run


_NONE = object()
_PLAIN = {"dtype": torch.float32, "device": torch.device("cpu"), "is_cuda": False, "layout": torch.strided}


def _getattr(value: Value, name: str) -> Any:
    if name == "shape":
        return value.shape
    return value.rank if name == "ndim" else _PLAIN.get(name, _NONE)


def _size(value: Value, dim: int | None) -> torch.Size | int:
    return value.shape if dim is None else value.shape[dim]


def _rank(value: Value) -> int:
    return value.rank


def _getitem(held: Any, index: Any) -> Any:
    return held[index] if type(held) in (tuple, list, torch.Size) and type(index) is int else _NONE


ANSWERS: dict[str, Callable[..., Any]] = {"getattr": _getattr, "size": _size, "rank": _rank, "getitem": _getitem}
"""Answers by operation."""
