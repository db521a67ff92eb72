"""Torch's own ONNX exporter, kept quiet and without side effects."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import nn

from dsr_tool.errors import UsageError, first_line

__all__ = ["INPUT", "OUTPUT", "capture", "frozen_copy"]

INPUT, OUTPUT = "input", "output"
_NO_LIMIT = 1 << 40  # bytes; constants of any size are folded
_LARGEST_BATCH = 1 << 24  # some versions of torch want a bound


def capture(module: nn.Module, input_shape: tuple[int, ...]) -> Any:
    """The module in eval mode as an `onnx_ir` model with one input and one output.

    Args:
        module: stays as it is, with its training flags and torch's random state.
        input_shape: dimensions of one input, without the batch.

    Raises:
        UsageError: torch cannot capture the module, or not with this shape; it returns several tensors.
    """
    with _quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]), _no_fast_attention():
        program = _export(module, input_shape)
        _keep_one_output(program, type(module).__name__)
        _fold(program.model, frozenset(module.state_dict()))
    return program.model


def frozen_copy(module: nn.Module) -> nn.Module:
    """The module in eval mode on the CPU, as a copy that shares tensors which are there already."""
    # Shared tensors cost no memory, and tied weights stay tied.
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().cpu(), p.requires_grad) for p in module.parameters()}
    memo |= {id(b): b.detach().cpu() for b in module.buffers()}
    return copy.deepcopy(module, memo).eval()


def _export(module: nn.Module, input_shape: tuple[int, ...]) -> Any:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    try:
        return torch.onnx.export(
            frozen_copy(module),
            # A batch of one would be taken for a constant.
            (torch.zeros(2, *input_shape, dtype=dtype),),
            dynamo=True,
            optimize=False,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)},),
            input_names=[INPUT],
            output_names=[OUTPUT],
        )
    except Exception as error:  # torch has a class of its own for each stage, and the module may raise anything
        raise UsageError(
            f"{type(module).__name__} cannot be captured with input shape {input_shape}: "
            f"{first_line(error.__cause__ or error)}; give the shape that the model takes, and a model without "
            f"data-dependent control flow."
        ) from error


def _fold(model: Any, state: Container[str]) -> None:
    """Compute everything that depends on no state_dict entry, and drop what nothing uses."""
    from onnxscript import optimizer

    optimizer.inline(model)  # older exporters leave functions
    # As inputs, state_dict entries have shapes but no values, so that nothing is computed from them.
    for name in [name for name in model.graph.initializers if name in state]:
        model.graph.inputs.append(model.graph.initializers.pop(name))
    # Twice, since the first round uncovers shapes for the second.
    for _ in range(2):
        optimizer.fold_constants(
            model, input_size_limit=_NO_LIMIT, output_size_limit=_NO_LIMIT, onnx_shape_inference=True
        )
        optimizer.remove_unused_nodes(model)


def _keep_one_output(program: Any, name: str) -> None:
    outputs = program.model.graph.outputs
    if len(outputs) == 1:
        return
    spec = program.exported_program.call_spec.out_spec
    keys = list(spec.context) if isinstance(spec.context, list) else []
    if "out" not in keys or len(keys) != len(outputs):
        raise UsageError(
            f"{name} returns {len(outputs)} tensors; wrap it in a module that returns one, or a mapping with "
            f"the key 'out'."
        )
    kept = outputs[keys.index("out")]
    outputs.clear()
    outputs.append(kept)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's prints, warnings and logs from the user: a failure is told by an exception."""
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


@contextlib.contextmanager
def _no_fast_attention() -> Iterator[None]:
    """Capture attention as its plain operators; the fused one of eval mode exists in torch alone."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
