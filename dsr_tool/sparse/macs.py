"""Multiply-adds of every weight, counted by running the module on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dsr_tool.core.layers import LayerSpec
from dsr_tool.errors import UsageError, first_line

__all__ = ["with_macs"]

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
    training = {child: child.training for child in module.modules()}
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    dtype = next((t.dtype for t in module.parameters() if t.is_floating_point()), torch.float32)
    example = torch.empty((_BATCH, *input_shape), dtype=dtype, device="meta")
    counter = _Counter({state[name].untyped_storage()._cdata: name for name, spec in specs.items() if spec.weight})
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator would hide the projections
    try:
        module.eval()
        with torch.no_grad(), counter:
            torch.func.functional_call(module, state, (example,))
    except Exception as error:  # a module may raise anything
        raise UsageError(
            f"input shape {list(input_shape)} does not fit {type(module).__name__}: {first_line(error)}; "
            f"give another --input-size."
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for child, mode in training.items():
            child.training = mode
    return {
        name: replace(spec, macs_per_weight=counter.macs.get(name, 0) / _BATCH / max(spec.size, 1))
        if spec.weight
        else spec
        for name, spec in specs.items()
    }
