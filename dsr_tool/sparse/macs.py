"""Multiply-adds of every weight, counted by running the module on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dsr_tool.errors import UsageError, first_line
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["output_shape", "with_macs"]

_BATCH = 2


class _Counter(TorchDispatchMode):
    """Adds up what torch's own FLOP formulas say of each operator, for the parameter whose storage it reads."""

    def __init__(self, owners: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owners = owners
        self.macs: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            for name in self._weights(args):
                # The formula counts a multiply-add as two.
                self.macs[name] = self.macs.get(name, 0) + formula(*args, **(kwargs or {}), out_val=out) // 2
        return out

    def _weights(self, args: Sequence[Any]) -> list[str]:
        storages = [arg.untyped_storage()._cdata for arg in args if isinstance(arg, torch.Tensor)]
        return [self.owners[storage] for storage in storages if storage in self.owners]


def with_macs(module: nn.Module, specs: Mapping[str, LayerSpec], input_shape: tuple[int, ...]) -> dict[str, LayerSpec]:
    """Fill in `macs_per_weight` for one input of `input_shape`; nothing is computed or copied.

    Args:
        module: the network.
        specs: what `discover` found in it.
        input_shape: shape of one input without the batch dimension.

    Raises:
        UsageError: the network cannot take such an input.
    """
    state = _without_values(module)
    counter = _Counter({state[name].untyped_storage()._cdata: name for name, spec in specs.items() if spec.weight})
    with counter:
        _run(module, state, input_shape)
    return {
        name: replace(spec, macs_per_weight=counter.macs.get(name, 0) / _BATCH / max(spec.size, 1))
        if spec.weight
        else spec
        for name, spec in specs.items()
    }


def output_shape(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what the network makes of one input, or of its entry `out`; empty where that is no tensor.

    Raises:
        UsageError: the network cannot take such an input.
    """
    output = _run(module, _without_values(module), input_shape)
    output = output.get("out") if isinstance(output, Mapping) else output
    return tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else ()


def _without_values(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer on the meta device."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def _run(module: nn.Module, state: dict[str, torch.Tensor], input_shape: tuple[int, ...]) -> Any:
    """The output for `_BATCH` inputs in eval mode; nothing is computed, and the module stays as it is."""
    training = {child: child.training for child in module.modules()}
    dtype = next((t.dtype for t in module.parameters() if t.is_floating_point()), torch.float32)
    example = torch.empty((_BATCH, *input_shape), dtype=dtype, device="meta")
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator would hide the projections
    try:
        module.eval()
        with torch.no_grad():
            return torch.func.functional_call(module, state, (example,))
    except Exception as error:  # a module may raise anything
        raise UsageError(
            f"input shape {list(input_shape)} does not fit {type(module).__name__}: {first_line(error)}; "
            f"give another --input-size or --input-shape."
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for child, mode in training.items():
            child.training = mode
