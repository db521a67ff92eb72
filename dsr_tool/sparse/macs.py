"""Counts the multiply-adds of every weight by running the module, on the meta device if possible."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from dsr_tool.errors import UsageError, first_line
from dsr_tool.sparse.feeding import evaluating, float_tensors, tensor_form
from dsr_tool.sparse.flow import WeightFlow
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["BATCH", "output_shape", "run_once", "split_weights", "with_macs"]

_Mode = Callable[[Mapping[str, torch.Tensor]], contextlib.AbstractContextManager[object]]

BATCH = 2
"""Number of inputs of a run."""


class _Counter(WeightFlow):
    """Adds up multiply-adds by weight.

    Attributes:
        macs: multiply-adds of `BATCH` inputs by name.
        functions: names of weights that an operator reads a function of.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], others: Iterable[torch.Tensor]) -> None:
        """Takes the state that a run reads; see `WeightFlow`."""
        super().__init__(weights, others)
        self.macs: dict[str, float] = {}
        self.functions: set[str] = set()
        self._sizes = {name: weight.numel() for name, weight in weights.items()}

    def multiplied(self, names: Sequence[str], operand: torch.Tensor, macs: int, *, itself: bool) -> None:  # noqa: ARG002
        """Divides the multiply-adds by the sizes of the weights that the operand is computed from."""
        total = max(sum(self._sizes[name] for name in names), 1)
        for name in names:
            self.macs[name] = self.macs.get(name, 0) + macs * self._sizes[name] / total
        self.functions.update(() if itself else names)


def with_macs(module: nn.Module, specs: Mapping[str, LayerSpec], input_shape: tuple[int, ...]) -> dict[str, LayerSpec]:
    """Returns the specs with `macs_per_weight` for one input.

    Detectors with two stages count as many regions in the second one as it gets at most. If the network computes with
    a function of a weight, the reason of its spec says so.

    Args:
        module: the network.
        specs: the specs that `discover` returned for it.
        input_shape: shape of one input, without the batch dimension.

    Raises:
        UsageError: the network does not accept such an input.
    """
    counters: list[_Counter] = []

    def count(state: Mapping[str, torch.Tensor]) -> _Counter:
        counters.append(_Counter(*split_weights(state, specs)))
        return counters[-1]

    run_once(module, input_shape, count)
    # The last one: a run on the meta device may have failed.
    return {name: _counted(spec, counters[-1]) if spec.weight else spec for name, spec in specs.items()}


def split_weights(
    state: Mapping[str, torch.Tensor], specs: Mapping[str, LayerSpec]
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Splits parameters and buffers of a run into weights by name and all others."""
    weights = {name: tensor for name, tensor in state.items() if name in specs and specs[name].weight}
    return weights, [tensor for name, tensor in state.items() if name not in weights]


def _counted(spec: LayerSpec, counter: _Counter) -> LayerSpec:
    macs = counter.macs.get(spec.name, 0) / BATCH / max(spec.size, 1)
    how = "; the network computes with a function of it" if spec.name in counter.functions else ""
    return replace(spec, macs_per_weight=macs, reason=spec.reason + how)


def output_shape(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the output for one input, without the batch dimension.

    It is empty if the network returns several tensors, or none of real numbers; see `float_tensors`.

    Raises:
        UsageError: the network does not accept such an input.
    """
    found = float_tensors(run_once(module, input_shape))
    return tuple(found[0].shape[1:]) if len(found) == 1 else ()


def run_once(
    module: nn.Module,
    input_shape: tuple[int, ...],
    mode: _Mode = lambda _: contextlib.nullcontext(),
    *,
    values: bool = False,
) -> object:
    """Returns the output for a batch of `BATCH` inputs in eval mode. The module itself stays as it is.

    It runs on the meta device, where nothing is computed or copied; if it decides by values, on noise.

    Args:
        module: the network; of a detector its tensor form runs.
        input_shape: shape of one input, without the batch dimension.
        mode: returns the context of a run, given all parameters and buffers that it reads.
        values: whether only a run on noise will do.

    Raises:
        UsageError: the network does not accept such an input.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    first = next((t for t in module.parameters() if t.is_floating_point()), torch.empty(0))
    shape = (BATCH, *input_shape)
    try:
        try:
            if not values:
                meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
                return _forward(module, meta, torch.empty(shape, dtype=first.dtype, device="meta"), mode)
        except Exception as error:
            # Control flow that depends on values, or an operator without a rule for shapes.
            if "meta" not in str(error).lower():
                raise
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return _forward(module, state, noise.to(first.device, first.dtype), mode)
    except Exception as error:  # a module may raise anything
        remedy = "give another --input-size or --input-shape"
        if "indices" in str(error):  # of torch.embedding
            remedy = "it takes whole numbers, as an embedding does, and only networks of real inputs can be run here"
        raise UsageError(
            f"input shape {list(input_shape)} does not fit {type(module).__name__}: {first_line(error)}; {remedy}."
        ) from error


def _forward(module: nn.Module, state: dict[str, torch.Tensor], example: torch.Tensor, mode: _Mode) -> object:
    with evaluating(module), torch.random.fork_rng(devices=[]), mode(state):
        # The boxes of a detector depend on values, so it runs in its form without their choice.
        form = tensor_form(module, regions=None)
        # torch gives a tensor back under each name, and of a module with two names the second one is the example's. So
        # each module gets all of its tensors under one name, and torch is not asked to find those that are tied.
        output: object = torch.func.functional_call(form, _for_each_module(form, state), (example,), tie_weights=False)
        return output


def _for_each_module(module: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns tensors by name for every module that reads them, given them under the first of their names."""
    first = {id(tensor): name for name, tensor in (*module.named_buffers(), *module.named_parameters())}
    return {
        f"{path}.{local}" if path else local: state[first[id(tensor)]]
        for path, owner in module.named_modules()
        for local, tensor in (*owner._parameters.items(), *owner._buffers.items())
        if tensor is not None
    }
