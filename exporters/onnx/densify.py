"""Compact ONNX files back to plain initializers, for tools that look for weights there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from dsr_tool.files import new_file, refuse_existing
from dsr_tool.graph.ir import Value
from exporters.onnx.read import OnnxFile, read_onnx, stored_weights
from exporters.onnx.session import OnnxSession
from exporters.onnx.write import refuse_too_large
from exporters.verify.result import Verification, require

__all__ = ["densify", "densify_file"]

_SAMPLES = 3
_RELATIVE_TOLERANCE = 1e-5  # runtimes may compute the same graph in another order


def densify(model: ModelProto) -> ModelProto:
    """The same model with every weight as a plain initializer under its own name.

    Raises:
        FormatError: a weight is damaged.
        UsageError: the dense model exceeds the 2 GB of one ONNX file.
    """
    graph = model.graph
    weights = [stored for stored in stored_weights(graph) if stored.steps or stored.codec == "coo"]
    refuse_too_large(sum(stored.computed.itemsize * int(np.prod(stored.shape)) for stored in weights))
    steps = {step for stored in weights for step in stored.steps}
    made = {stored.name for stored in weights}
    nodes = _without(graph.node, steps - made, made, {value.name for value in graph.output})
    needed = {name for node in nodes for name in node.input}
    parts = {name for node in graph.node if not steps.isdisjoint(node.output) for name in node.input} - needed
    result = ModelProto()
    result.CopyFrom(model)
    for field in (result.graph.node, result.graph.initializer, result.graph.sparse_initializer):
        del field[:]
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(numpy_helper.from_array(stored.array(), stored.name) for stored in weights)
    result.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name not in parts)
    result.graph.sparse_initializer.extend(
        sparse for sparse in graph.sparse_initializer if sparse.values.name not in parts | made
    )
    return result


def densify_file(path: str | Path, target: str | Path, *, force: bool = False) -> Verification:
    """Write `densify` of an ONNX file, and verify that both compute the same before it takes its name.

    Args:
        path: the compact file.
        target: the new file.
        force: replace an existing file.

    Returns:
        What the verification measured, both files run in ONNX Runtime; `scale` is the largest output of the first.

    Raises:
        CheckFailed: the new file does not hold the same; none is left.
        FileError: `path` does not exist, or `target` does without `force`.
        FormatError: `path` is no ONNX file, or is damaged.
        UsageError: the dense model exceeds 2 GB.
    """
    target = Path(target)
    refuse_existing(target, force=force)
    source = read_onnx(path)
    dense = densify(source.model)
    with new_file(target, force=force) as part:
        part.write_bytes(dense.SerializeToString(deterministic=True))
        verification = require(_compared(source, read_onnx(part)))
    return replace(verification, path=target)


def _without(nodes: list[NodeProto], inner: set[str], made: set[str], outputs: set[str]) -> list[NodeProto]:
    """The nodes without those that make weights, and without inner steps that nobody else reads."""
    kept: list[NodeProto] = []
    needed = set(outputs)
    for node in reversed(nodes):
        if made.isdisjoint(node.output) and (inner.isdisjoint(node.output) or not needed.isdisjoint(node.output)):
            kept.append(node)
            needed.update(node.input)
    return kept[::-1]


def _compared(source: OnnxFile, dense: OnnxFile) -> Verification:
    from exporters.verify.outputs import largest_difference, random_inputs

    names = {*source.entries, *dense.entries}
    differing = [name for name in sorted(names) if not _same_weight(name, source, dense)]
    inputs = random_inputs(_value(source.model.graph.input[0]), _SAMPLES, seed=0)
    expected, found = ([OnnxSession(file.path).run(x) for x in inputs] for file in (source, dense))
    scale = float(np.max([np.abs(y).max(initial=0.0) for y in expected]))
    difference = largest_difference(expected, found)
    problems = [f"the values of {name!r} differ" for name in differing[:1]]
    if not difference <= _RELATIVE_TOLERANCE * scale:
        problems.append(f"its outputs differ from those of {str(source.path)!r} by {difference:.3g}")
    return Verification(
        dense.path,
        "onnx",
        dense.nbytes,
        {"onnxruntime": difference},
        scale,
        _RELATIVE_TOLERANCE * scale,
        masks_equal=not differing,
        weights_equal=not differing,
        problems=tuple(problems),
        notes=(f"compared with {source.path.name} in onnxruntime, not with PyTorch",),
    )


def _same_weight(name: str, source: OnnxFile, dense: OnnxFile) -> bool:
    if name not in source.entries or name not in dense.entries:
        return False
    one, other = source.array(name), dense.array(name)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _value(value: ValueInfoProto) -> Value:
    """The input of a model; sizes that are free are None."""
    shape = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in value.type.tensor_type.shape.dim)
    return Value(value.name, shape, helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name)
