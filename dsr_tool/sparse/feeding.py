"""Feeds a batch tensor to any network, and reads what it returns as named tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from dsr_tool.errors import UsageError
from dsr_tool.sparse.detectors import REGIONS, TensorDetector, detector_kind

__all__ = [
    "INPUT",
    "OUTPUT",
    "evaluating",
    "float_tensors",
    "graph_form",
    "named_floats",
    "plain_attention",
    "require_floats",
    "tensor_form",
]

INPUT, OUTPUT = "input", "output"
"""Names of a graph's input, and of its output if there is one."""

_COMPARED = (torch.float16, torch.float32, torch.float64)
"""Types of outputs that runtimes have."""


def tensor_form(module: nn.Module, regions: int | None = REGIONS) -> nn.Module:
    """Returns a network that takes a batch tensor and has the parameters of `module` under the same names.

    The children are shared, so hooks, training flags and changed weights are seen in both.

    Args:
        module: the network.
        regions: for detectors with two stages, the regions of each picture that the second one gets; None for as many
            as it gets at most, 0 for a network that ends with the first stage.

    Returns:
        The module itself, or for a detector of torchvision its `TensorDetector`.
    """
    return module if detector_kind(module) is None else TensorDetector(module, regions)


def graph_form(module: nn.Module) -> nn.Module:
    """Returns the network that files with a graph compute: as `tensor_form`, and of two stages the first one.

    The second stage reads regions that the first one chose, so no network of pictures alone computes it.
    """
    return tensor_form(module, regions=0)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode without gradients and with `plain_attention`, and gives every flag back."""
    training = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with plain_attention(), torch.no_grad():
            yield
    finally:
        for child, mode in training.items():
            child.training = mode


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Turns off the fused attention of eval mode, which is one operator that only torch has."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def float_tensors(output: object) -> list[torch.Tensor]:
    """Returns the tensors of real numbers in an output, in a fixed order.

    Args:
        output: a tensor, or any nesting of mappings, lists, tuples and dataclasses; a mapping with a key `out` counts
            as that entry, since the others are auxiliary heads.
    """
    return [tensor for _, tensor in _flatten(output)]


def named_floats(output: object) -> dict[str, torch.Tensor]:
    """Returns `float_tensors` of an output by name.

    One alone is called `output`. Several have the keys, fields and indices on the way to them, joined by `_`:
    `boxes`, `levels_0`, or `output_1` for the second entry of a tuple.
    """
    leaves = list(_flatten(output))
    if len(leaves) == 1:
        return {OUTPUT: leaves[0][1]}
    named: dict[str, torch.Tensor] = {}
    for path, tensor in leaves:
        name = re.sub(r"\W", "_", "_".join(path))
        name = name if name[:1].isalpha() else f"{OUTPUT}_{name}"
        while name in named or name == INPUT:
            name += "_"
        named[name] = tensor
    return named


def require_floats(output: object, network: str) -> dict[str, torch.Tensor]:
    """Returns `named_floats` of an output.

    Args:
        output: the output.
        network: name of the network's class, for messages.

    Raises:
        UsageError: there are none, or their type is one that numpy lacks.
    """
    found = named_floats(output)
    if not found:
        what = f"a tensor of {output.dtype}" if isinstance(output, torch.Tensor) else type(output).__name__
        raise UsageError(
            f"{network} returns {what} in eval mode, and an export compares tensors of real numbers; return the scores "
            f"that it is computed from, as a tensor or in a tuple, list or mapping."
        )
    other = next((tensor.dtype for tensor in found.values() if tensor.dtype not in _COMPARED), None)
    if other is not None:
        raise UsageError(f"{network} returns a tensor of {other}; return it as float32 (output.float()).")
    return found


def _flatten(output: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Yields the tensors of real numbers, each with the keys, fields and indices on the way to it."""
    entries: Iterable[tuple[object, object]] = ()
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield path, output
    elif isinstance(output, Mapping):
        if "out" in output:
            yield from _flatten(output["out"], path)
        else:
            entries = output.items()
    elif isinstance(output, Sequence) and not isinstance(output, str):
        entries = zip(getattr(output, "_fields", range(len(output))), output, strict=True)
    elif dataclasses.is_dataclass(output):
        entries = [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    for key, part in entries:
        yield from _flatten(part, (*path, str(key)))
