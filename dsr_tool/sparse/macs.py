"""Counts the multiply-adds of every weight by running the module, on the meta device if possible."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dsr_tool.errors import UsageError, first_line
from dsr_tool.sparse.feeding import evaluating, tensor_form
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["output_shape", "storage", "with_macs"]

_Mode = Callable[[Mapping[str, torch.Tensor]], contextlib.AbstractContextManager[object]]

_BATCH = 2
"""Number of inputs of the run; counts are divided by it."""


class _Counter(TorchDispatchMode):
    """Adds up torch's own FLOP formula of each operator, for the parameters whose storage the operator reads.

    Attributes:
        macs: multiply-adds of `_BATCH` inputs by parameter name.
    """

    def __init__(self, owners: Mapping[int, str], macs: dict[str, int]) -> None:
        """Takes the parameter name of each storage, by address, and the counts to add to."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._owners, self.macs = owners, macs

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            for name in self._weights(args):
                # The formula counts a multiply-add as two operations.
                self.macs[name] = self.macs.get(name, 0) + formula(*args, **(kwargs or {}), out_val=out) // 2
        return out

    def _weights(self, args: Sequence[Any]) -> list[str]:
        # By storage, because operators get views of a weight: transposed, or the parts of a packed projection.
        storages = [storage(arg) for arg in args if isinstance(arg, torch.Tensor)]
        return [self._owners[address] for address in storages if address in self._owners]


def storage(tensor: torch.Tensor) -> int:
    """Returns what two views of one memory have in common."""
    return int(tensor.untyped_storage()._cdata)


def with_macs(module: nn.Module, specs: Mapping[str, LayerSpec], input_shape: tuple[int, ...]) -> dict[str, LayerSpec]:
    """Returns the specs with `macs_per_weight` for one input.

    The module runs on the meta device, where nothing is computed or copied; if it decides by values, on noise instead.
    Detectors with two stages count as many regions in the second one as it gets at most.

    Args:
        module: the network.
        specs: the specs that `discover` returned for it.
        input_shape: shape of one input, without the batch dimension.

    Raises:
        UsageError: the network does not accept such an input.
    """
    macs: dict[str, int] = {}

    def counter(state: Mapping[str, torch.Tensor]) -> _Counter:
        macs.clear()  # of a run that failed
        names = (name for name, spec in specs.items() if spec.weight)
        return _Counter({storage(state[name]): name for name in names}, macs)

    _run(module, input_shape, counter)
    return {
        name: replace(spec, macs_per_weight=macs.get(name, 0) / _BATCH / max(spec.size, 1)) if spec.weight else spec
        for name, spec in specs.items()
    }


def output_shape(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the output for one input, without the batch dimension.

    If the module returns a mapping, this is the shape of its entry `out`. It is empty if the output is not a tensor.

    Raises:
        UsageError: the network does not accept such an input.
    """
    output = _run(module, input_shape)
    if isinstance(output, Mapping):
        output = output.get("out")
    return tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else ()


def _run(module: nn.Module, input_shape: tuple[int, ...], mode: _Mode = lambda _: contextlib.nullcontext()) -> object:
    """Returns the output for `_BATCH` inputs in eval mode. The module itself stays as it is.

    Args:
        module: the network.
        input_shape: shape of one input.
        mode: returns the context of a run, given all parameters and buffers that it reads.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    first = next((t for t in module.parameters() if t.is_floating_point()), torch.empty(0))
    shape = (_BATCH, *input_shape)
    try:
        try:
            meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
            return _forward(module, meta, torch.empty(shape, dtype=first.dtype, device="meta"), mode)
        except Exception as error:
            # Control flow that depends on values, or an operator without a rule for shapes.
            if "meta" not in str(error).lower():
                raise
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return _forward(module, state, noise.to(first.device, first.dtype), mode)
    except Exception as error:  # a module may raise anything
        raise UsageError(
            f"input shape {list(input_shape)} does not fit {type(module).__name__}: {first_line(error)}; "
            f"give another --input-size or --input-shape."
        ) from error


def _forward(module: nn.Module, state: dict[str, torch.Tensor], example: torch.Tensor, mode: _Mode) -> object:
    with evaluating(module), torch.random.fork_rng(devices=[]), mode(state):
        # The boxes of a detector depend on values, so it runs in its form without their choice.
        output: object = torch.func.functional_call(tensor_form(module, regions=None), state, (example,))
        return output
