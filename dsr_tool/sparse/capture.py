"""Captures a module with torch's own ONNX exporter, without its messages and side effects."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from dsr_tool.errors import UsageError, first_line
from dsr_tool.sparse.compact.modules import uninstall
from dsr_tool.sparse.feeding import INPUT, graph_form, plain_attention, require_floats

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["capture", "frozen_copy"]

_NO_LIMIT = 1 << 40
"""Bytes up to which constants are folded: constants of any size are."""

_MAX_BATCH = 1 << 24
"""Upper bound of the batch dimension, which some versions of torch require."""


def capture(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[onnx_ir.Model, tuple[str, ...]]:
    """Captures a module in eval mode as an ONNX model with one input; of a detector its `graph_form`.

    Args:
        module: the module; its training flags and torch's random state do not change.
        input_shape: shape of one input, without the batch dimension.

    Returns:
        The model, and the names of its outputs by `named_floats`, in their order.

    Raises:
        UsageError: torch cannot capture the module with this input shape, or it returns no real numbers.
    """
    with _quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]), plain_attention():
        program, names = _export(module, input_shape)
        _fold(program.model, frozenset(module.state_dict()))
    return program.model, names


def frozen_copy(module: nn.Module) -> nn.Module:
    """Returns a copy of the module in eval mode on the CPU, which shares the tensors that are there already."""
    # A copy by memo: shared tensors cost no memory, and tied weights stay tied.
    memo: dict[int, torch.Tensor] = {
        id(p): nn.Parameter(p.detach().cpu(), p.requires_grad) for p in module.parameters()
    }
    memo |= {id(b): b.detach().cpu() for b in module.buffers()}
    copied = copy.deepcopy(module, memo).eval()
    # A captured weight must have its name, which only a parameter has.
    uninstall(copied)
    return copied


def _export(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[torch.onnx.ONNXProgram, tuple[str, ...]]:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    name, copied, names = type(module).__name__, graph_form(frozen_copy(module)), list[str]()

    def flat(_module: nn.Module, _inputs: object, output: object) -> tuple[torch.Tensor, ...]:
        found = require_floats(output, name)
        names[:] = found
        return tuple(found.values())

    # As a hook of the copy, so that torch captures a network of plain tensors, whatever containers lie around them.
    copied.register_forward_hook(flat)
    try:
        program = torch.onnx.export(
            copied,
            # torch specialises a batch of one to a constant.
            (torch.zeros(2, *input_shape, dtype=dtype),),
            dynamo=True,
            optimize=False,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=_MAX_BATCH)},),
            input_names=[INPUT],
        )
    except Exception as error:  # torch has a class of its own for each stage, and the module may raise anything
        if (refused := _usage_error(error)) is not None:
            raise refused from None
        raise UsageError(
            f"{name} cannot be captured with input shape {input_shape}: "
            f"{first_line(error.__cause__ or error)}; give the shape of its input, and a model without "
            f"data-dependent control flow."
        ) from error
    return cast("torch.onnx.ONNXProgram", program), tuple(names)  # None only with dynamo=False


def _usage_error(error: BaseException | None) -> UsageError | None:
    """Returns the error of `require_floats` that another one was raised for, or None."""
    while error is not None and not isinstance(error, UsageError):
        error = error.__cause__ or error.__context__
    return error


def _fold(model: onnx_ir.Model, state: Container[str]) -> None:
    """Computes everything that does not depend on a state_dict entry, and removes unused nodes."""
    from onnxscript import optimizer

    optimizer.inline(model)  # older exporters leave functions
    # Entries of the state_dict become inputs, which have shapes but no values, so nothing computed from them is folded.
    for name in [name for name in model.graph.initializers if name in state]:
        model.graph.inputs.append(model.graph.initializers.pop(name))
    # Twice, because the first round finds shapes that the second needs.
    for _ in range(2):
        optimizer.fold_constants(
            model, input_size_limit=_NO_LIMIT, output_size_limit=_NO_LIMIT, onnx_shape_inference=True
        )
        optimizer.remove_unused_nodes(model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides torch's prints, warnings and logs; a failure is an exception anyway."""
    before = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
