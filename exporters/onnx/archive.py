"""ONNX files as archives, so that whatever runs archives runs them too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dsr_tool.core.archive import Archive, open_archive, write_archive
from dsr_tool.core.config import LONGEST_SIDE, MOST_CLASSES, ModelConfig, Preprocessing
from dsr_tool.core.graph import Graph, Node, Value
from dsr_tool.errors import FormatError, UsageError
from exporters.onnx.read import OnnxFile, read_onnx

__all__ = ["archive_of_onnx", "graph_of_onnx"]

_AS_IT_IS = Preprocessing(resize=0, crop=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def archive_of_onnx(source: str | Path, target: str | Path) -> Archive:
    """Write the computation and the weights of an ONNX file as an archive, and open that.

    An ONNX file does not say how pictures become inputs, so that the archive takes them as they are, scaled to [0, 1].
    A mask is where a weight is not zero: the ONNX file knows no other.

    Args:
        source: a file of ours, or of another tool with the operators that archives have.
        target: the new archive; one for the moment, since its weights are not made small.

    Raises:
        FileError: there is no such file, or the target exists.
        FormatError: it is no ONNX file, is damaged, or has subgraphs.
        UsageError: it has several inputs, or values of a type that archives do not have.
    """
    file = read_onnx(source)
    graph = graph_of_onnx(file)
    if len(graph.inputs) != 1:
        raise UsageError(f"{str(source)!r} takes {len(graph.inputs)} inputs; the sparse runtime runs models with one.")
    graph.check()
    tensors = {name: file.tensor(name) for name in graph.parameters}
    specs = {name: file.entries[name].spec for name in graph.parameters}
    write_archive(Path(target), tensors, specs, graph, _config(file, graph), encoding="csr")
    return open_archive(target)


def _config(file: OnnxFile, graph: Graph) -> ModelConfig:
    shape, classes = graph.inputs[0].shape[1:], (graph.outputs[0].shape or (None,))[1:2]
    fixed = tuple(n for n in shape if n is not None and 0 < n < LONGEST_SIDE)
    count = next((n for n in classes if n is not None and 0 < n <= MOST_CLASSES), 0)
    input_shape = fixed if len(fixed) == len(shape) else ()
    return ModelConfig("onnx", file.architecture or file.path.stem, count, input_shape, _AS_IT_IS)


def graph_of_onnx(file: OnnxFile) -> Graph:
    """The computation of an ONNX file, from where its weights are decoded on.

    Raises:
        FormatError: it has no input, or a subgraph.
    """
    from onnx import numpy_helper

    source = file.model.graph
    arrays = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in source.initializer if tensor.name not in file.entries
    }
    needed, nodes = {value.name for value in source.output}, []
    for node in reversed(source.node):
        # What decodes a weight is left out, since nothing else needs it.
        if not set(node.output) & needed or set(node.output) & file.entries.keys():
            continue
        needed.update(node.input)
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            arrays[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        else:
            attributes = {attr.name: _attribute(file, attr) for attr in node.attribute}
            nodes.append(Node(node.op_type, tuple(node.input), tuple(node.output), attributes))
    held = {*arrays, *file.entries}
    inputs = tuple(_value(value) for value in source.input if value.name not in held)
    if not inputs:
        raise FormatError(f"{str(file.path)!r} has no input.")
    opset = next((item.version for item in file.model.opset_import if item.domain in ("", "ai.onnx")), 0)
    constants = {name: array for name, array in arrays.items() if name in needed}
    parameters = tuple(name for name in file.entries if name in needed)
    return Graph(inputs, tuple(map(_value, source.output)), tuple(reversed(nodes)), constants, parameters, opset)


def _attribute(file: OnnxFile, attr: Any) -> Any:
    from onnx import helper

    value = helper.get_attribute_value(attr)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value):
        return tuple(value)
    raise FormatError(
        f"{str(file.path)!r}: attribute {attr.name!r} is neither a number, a string nor a list of numbers."
    )


def _value(value: Any) -> Value:
    from onnx import helper

    kind = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
    return Value(value.name, shape, np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).name)
