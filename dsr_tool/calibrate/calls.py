"""Watches the calls of weights while a module runs: their inputs as matrices, their outputs, and what follows them.

Watching operators instead of modules finds every use of a weight: by a module, by a function, or as a part of a packed
projection of attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere
from torch.utils._python_dispatch import TorchDispatchMode

from dsr_tool.sparse.flow import storage

__all__ = ["Call", "Watch", "owners_of", "rows_of_weight", "weight_of_rows"]

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """One use of a weight.

    Attributes:
        name: name of the weight.
        first_row: first row of the weight that this use reads; packed projections are read in parts.
        operand: the input of the operator.
        output: its output, None where the pass ends before the operator.
        geometry: of a convolution (weight shape, stride, padding, dilation, transposed, output padding, groups);
            None for a product of matrices.
    """

    name: str
    first_row: int
    operand: torch.Tensor
    output: torch.Tensor | None
    geometry: tuple[tuple[int, ...], list[int], list[int], list[int], bool, list[int], int] | None = None

    @property
    def groups(self) -> int:
        """Number of groups of a convolution, else 1."""
        return self.geometry[6] if self.geometry else 1

    @property
    def taps(self) -> int:
        """Entries of a kernel of a convolution, else 1."""
        return math.prod(self.geometry[0][2:]) if self.geometry else 1

    @property
    def columns(self) -> int:
        """Length of an input vector."""
        if self.geometry is None:
            return self.operand.shape[-1]
        return self.operand.shape[1] // self.groups * self.taps

    @property
    def length(self) -> int:
        """Number of input vectors: positions of all pictures."""
        if self.geometry is None:
            return math.prod(self.operand.shape[:-1])
        return len(self.operand) * math.prod(self._positions())

    def _positions(self) -> list[int]:
        """Returns the output's size along each axis of space."""
        assert self.geometry is not None  # noqa: S101 - for the type checker
        shape, stride, padding, dilation, transposed, extra, _ = self.geometry
        sizes = zip(self.operand.shape[2:], shape[2:], stride, padding, dilation, extra, strict=True)
        if transposed:
            return [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, s, p, d, e in sizes]
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in sizes]

    def inputs(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the input vectors of some positions, in the order of `rows_of_weight`.

        Args:
            rows: numbers of the positions, shape (n,).

        Returns:
            The vectors, shape (groups, n, columns).
        """
        if self.geometry is None:
            return self.operand.reshape(-1, self.operand.shape[-1])[rows].unsqueeze(0)
        shape, stride, padding, dilation, transposed, extra, groups = self.geometry
        x = self.operand
        if transposed:
            x = _spread(x, shape, stride, padding, dilation, extra)
            stride, padding = [1] * len(stride), [0] * len(stride)
        x = F.pad(x.movedim(1, -1), [0, 0, *(p for n in reversed(padding) for p in (n, n))])
        picture, *place = torch.unravel_index(rows, [len(x), *self._positions()])
        taps = torch.cartesian_prod(*(torch.arange(k) * d for k, d in zip(shape[2:], dilation, strict=True)))
        taps = taps.reshape(-1, len(stride))
        # One gather of whole pixels: their channels lie together.
        flat = picture[:, None]
        for axis, (size, step) in enumerate(zip(x.shape[1:-1], stride, strict=True)):
            flat = flat * size + place[axis][:, None] * step + taps[None, :, axis]
        channels = x.shape[-1]
        found = x.reshape(-1, channels)[flat.reshape(-1)].reshape(len(rows), len(taps), groups, channels // groups)
        return found.permute(2, 0, 1, 3).reshape(groups, len(rows), -1)

    def outputs(self, rows: torch.Tensor, tensor: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the outputs of some positions, shape (n, outputs).

        Args:
            rows: numbers of the positions, shape (n,).
            tensor: a tensor of the output's shape that is read instead.
        """
        y = self.output if tensor is None else tensor
        assert y is not None  # noqa: S101 - for the type checker
        if self.geometry is not None:
            y = y.movedim(1, -1)
        return y.reshape(-1, y.shape[-1])[rows]


def _spread(
    x: torch.Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    extra: Sequence[int],
) -> torch.Tensor:
    """Returns the input over which a transposed convolution is a plain one: zeros between and around its pixels."""
    sizes = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], stride, strict=True)]
    wide = x.new_zeros([*x.shape[:2], *sizes])
    places = tuple(slice(None, None, step) for step in (1, 1, *stride))
    wide[places] = x
    sides: list[int] = []
    for k, p, d, e in reversed(list(zip(shape[2:], padding, dilation, extra, strict=True))):
        sides += [d * (k - 1) - p, d * (k - 1) - p + e]
    return F.pad(wide, sides)


def rows_of_weight(weight: torch.Tensor, kind: str, groups: int) -> torch.Tensor:
    """Returns a weight as matrices of shape (groups, outputs per group, columns), so that a row gives an output.

    The columns of a convolution are ordered by tap, then by channel.

    Args:
        weight: the parameter.
        kind: type of its module.
        groups: groups of a convolution; 1 for a linear layer.
    """
    if weight.dim() == 2 and not kind.startswith("Conv"):
        return weight.unsqueeze(0)
    if kind.startswith("ConvTranspose"):
        # (inputs, outputs per group, taps): turned around, and by group.
        parts = weight.flip(list(range(2, weight.dim()))).reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    else:
        parts = weight.reshape(groups, -1, *weight.shape[1:])
    return parts.movedim(2, -1).reshape(groups, parts.shape[1], -1)


def weight_of_rows(rows: torch.Tensor, shape: Sequence[int], kind: str) -> torch.Tensor:
    """Returns the weight of a shape from its matrices: the inverse of `rows_of_weight`."""
    groups, outputs, _ = rows.shape
    if not kind.startswith("Conv"):
        return rows.reshape(tuple(shape))
    parts = rows.reshape(groups, outputs, *shape[2:], -1).movedim(-1, 2)
    if kind.startswith("ConvTranspose"):
        parts = parts.transpose(1, 2).flip(list(range(3, parts.dim())))
    return parts.reshape(tuple(shape))


def owners_of(module: nn.Module) -> dict[int, str]:
    """Returns the names of a module's parameters and buffers by the address of their storage."""
    tensors = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    return {storage(tensor): name for name, tensor in tensors.items()}


class Watch(TorchDispatchMode):
    """Sees every use of a weight while it is entered. Subclasses say what is done with what they see."""

    def __init__(self, owners: Mapping[int, str]) -> None:
        """Takes the names of `owners_of`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._owners = owners

    def before(self, operator: str, operands: list[torch.Tensor]) -> None:
        """Receives every operator that is no use of a weight, before it runs."""

    def after(self, operator: str, operands: list[torch.Tensor], result: torch.Tensor) -> None:
        """Receives every operator that is no use of a weight, after it ran, with its first result."""

    def seen(self, call: Call) -> None:
        """Receives every use of a weight twice: before it runs, without its output, and after it ran."""
        raise NotImplementedError

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        call = self._call(func.overloadpacket, args)
        if call is not None:
            self.seen(call)
            out = func(*args, **(kwargs or {}))
            self.seen(replace(call, output=out))
            return out
        operator, operands = func.overloadpacket.__name__, [arg for arg in args if isinstance(arg, torch.Tensor)]
        self.before(operator, operands)
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if isinstance(first, torch.Tensor):
            self.after(operator, operands, first)
        return out

    def _call(self, op: Any, args: Sequence[Any]) -> Call | None:
        """Returns the use of a weight that an operator is, if it is one."""
        if op is _ATEN.convolution and (name := self._owners.get(storage(args[1]))) is not None:
            weight = args[1]
            return Call(name, 0, args[0], None, (tuple(weight.shape), *args[3:9]))
        if op in (_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.linear):
            operand, weight = args[1:3] if op is _ATEN.addmm else args[:2]
            name = self._owners.get(storage(weight))
            if op is not _ATEN.linear:
                weight = weight.mT  # products get the transposed weight
            if name is None or weight.stride()[-1] != 1 or (weight.dim() == 3 and weight.stride()[0] != 0):
                return None
            return Call(name, weight.storage_offset() // weight.shape[-1], operand, None)
        return None
