"""Follows weights through a run of a network, to the operators that multiply with them or with a function of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["WeightFlow", "storage"]


def _trilinear_flops(_first: object, weight: torch.Tensor, *_: object, out_val: torch.Tensor) -> int:
    return 2 * out_val.numel() * weight[0].numel()


_OTHER_FORMULAS: Mapping[Any, Callable[..., int]] = {torch.ops.aten._trilinear: _trilinear_flops}
"""Operations of operators that torch's own table lacks: those of `nn.Bilinear`, which reads each weight once."""


class WeightFlow(TorchDispatchMode):
    """Finds for every convolution and matrix product the weights that its operands are, or are computed from.

    An operand belongs to weights if it depends on nothing but the state of the network: a view of a weight, the parts
    of a packed projection, or a function such as a standardised or masked weight. Subclasses say what is done with it.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], others: Iterable[torch.Tensor]) -> None:
        """Takes the state that a run reads.

        Args:
            weights: the weights that are followed, by name.
            others: all other parameters and buffers.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = {storage(tensor): name for name, tensor in weights.items()}
        # Names of the weights that a storage is computed from; a storage that is absent depends on the input.
        self._names = {storage(tensor): frozenset[str]() for tensor in others}
        self._names |= {address: frozenset((name,)) for address, name in self._own.items()}
        # Addresses of storages are used again once they are free, so everything that was noted stays alive.
        self._kept: list[torch.Tensor] = []

    @abstractmethod
    def multiplied(self, names: Sequence[str], operand: torch.Tensor, macs: int, *, itself: bool) -> None:
        """Takes one operand of a convolution or matrix product.

        Args:
            names: the weights that it is computed from, at least one.
            operand: the operand.
            macs: multiply-adds of the operator for the whole batch.
            itself: whether the operand has the memory of the weight, so that it holds the same values.
        """

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        formula = flop_registry.get(func._overloadpacket) or _OTHER_FORMULAS.get(func._overloadpacket)
        constant = all(storage(tensor) in self._names for tensor in inputs)
        # The formula counts a multiply-add as two operations.
        macs = formula(*args, **(kwargs or {}), out_val=out) // 2 if formula is not None else 0
        for tensor in inputs if formula is not None else ():
            names, itself = self._names.get(storage(tensor)), storage(tensor) in self._own
            # A product of functions of weights alone is one step in making a weight.
            if names and (itself or not constant):
                self.multiplied(sorted(names), tensor, macs, itself=itself)
        self._note(inputs, [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)], constant=constant)
        return out

    def _note(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], *, constant: bool) -> None:
        """Notes what the outputs of an operator are computed from."""
        names = frozenset[str]().union(*(self._names.get(storage(tensor), ()) for tensor in inputs))
        for tensor in outputs:
            address = storage(tensor)
            if address in self._own:
                continue
            if constant:
                self._names[address] = names | self._names.get(address, frozenset())
                self._kept.append(tensor)
            else:
                self._names.pop(address, None)  # a buffer that the input was written into


def storage(tensor: torch.Tensor) -> int:
    """Returns what two views of one memory have in common."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # sparse layouts have no storage of their own
        return -id(tensor)
