"""Rewriting compact ONNX files with plain initializers, for tools that look for weights there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from dsr_tool.errors import FormatError
from dsr_tool.graph.ir import Value
from dsr_tool.sparsity.tensor import Array
from exporters.onnx.read import OnnxFile, stored_weights
from exporters.onnx.session import OnnxSession
from exporters.onnx.write import refuse_too_large
from exporters.verify.result import Verification

__all__ = ["densify", "numbers", "verify_dense"]

_SAMPLES = 3
"""Size of the second batch of random inputs; the first has one."""


def densify(model: ModelProto) -> ModelProto:
    """Returns the same model with every weight as a plain initializer under its own name.

    Raises:
        FormatError: a weight is damaged.
        UsageError: the dense model exceeds the 2 GB of one ONNX file.
    """
    graph = model.graph
    weights = [stored for stored in stored_weights(graph) if stored.steps or stored.codec == "coo"]
    # From the claimed shapes, before a weight is decoded.
    refuse_too_large(sum(stored.computed.itemsize * math.prod(stored.shape) for stored in weights))
    steps = {step for stored in weights for step in stored.steps}
    names = {stored.name for stored in weights}
    nodes = _without(graph.node, steps - names, names, {value.name for value in graph.output})
    needed = {name for node in nodes for name in node.input}
    parts = {name for node in graph.node if not steps.isdisjoint(node.output) for name in node.input} - needed
    # A copy, since the caller compares both; metadata, inputs and outputs stay as they are.
    result = ModelProto()
    result.CopyFrom(model)
    for field in (result.graph.node, result.graph.initializer, result.graph.sparse_initializer):
        del field[:]
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(numpy_helper.from_array(stored.array(), stored.name) for stored in weights)
    result.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name not in parts)
    result.graph.sparse_initializer.extend(
        sparse for sparse in graph.sparse_initializer if sparse.values.name not in parts | names
    )
    return result


def verify_dense(source: OnnxFile, dense: OnnxFile) -> Verification:
    """Compares a file with its dense version: every weight bit for bit, and the outputs of both in ONNX Runtime.

    Raises:
        FormatError: an output is no array of numbers.
    """
    from exporters.verify.compare import compare_each
    from exporters.verify.outputs import random_inputs

    weights = {*source.entries, *dense.entries}
    differing = [name for name in sorted(weights) if not _same_weight(name, source, dense)]
    inputs = random_inputs(_value(source.model.graph.input[0]), _SAMPLES, seed=0)
    expected, found = (
        [numbers(file.path, OnnxSession(file.path).run_all(x)) for x in inputs] for file in (source, dense)
    )
    # A runtime may compute the same graph in another order.
    compared = compare_each(expected, {"onnxruntime": found})
    (difference,) = compared.runtimes.values()
    problems = [f"the values of {name!r} differ" for name in differing[:1]]
    if not compared.agree:
        problems.append(
            f"its output {compared.name[:80]!r} differs from that of {str(source.path)!r} by {difference:.3g}"
        )
    return Verification(
        dense.path,
        "onnx",
        dense.nbytes,
        compared.runtimes,
        compared.scale,
        compared.tolerance,
        masks_equal=not differing,
        weights_equal=not differing,
        problems=tuple(problems),
        notes=(f"compared with {source.path.name} in onnxruntime, not with PyTorch",),
    )


def numbers(path: Path, outputs: Mapping[str, object]) -> dict[str, Array]:
    """Returns outputs of any type of numbers, truth values too, as float64: bytes have no negative difference.

    Raises:
        FormatError: an output is no array of numbers.
    """
    found = {}
    for name, output in outputs.items():
        if not isinstance(output, np.ndarray) or output.dtype.kind not in "biuf":
            raise FormatError(
                f"{str(path)!r}: output {name[:80]!r} is no tensor of real numbers, so that an export cannot be "
                f"verified; remove that output."
            )
        found[name] = output.astype(np.float64)
    return found


def _without(nodes: Sequence[NodeProto], inner: set[str], names: set[str], outputs: set[str]) -> list[NodeProto]:
    """Removes the nodes that make weights, and inner steps that no other node reads."""
    # From the last node back, so that a node is seen after all of its readers.
    kept: list[NodeProto] = []
    needed = set(outputs)
    for node in reversed(nodes):
        if names.isdisjoint(node.output) and (inner.isdisjoint(node.output) or not needed.isdisjoint(node.output)):
            kept.append(node)
            needed.update(node.input)
    return kept[::-1]


def _same_weight(name: str, source: OnnxFile, dense: OnnxFile) -> bool:
    if name not in source.entries or name not in dense.entries:
        return False
    one, other = source.array(name), dense.array(name)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _value(value: ValueInfoProto) -> Value:
    """Describes the input of a model; free sizes are None."""
    shape = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in value.type.tensor_type.shape.dim)
    return Value(value.name, shape, helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name)
