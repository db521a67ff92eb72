"""ONNX files as computations with weights, so that whatever runs archives runs them too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import AttributeProto, TensorProto, helper

from dsr_tool.errors import FormatError
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.sparsity.config import LONGEST_SIDE, MOST_CLASSES, ModelConfig, Preprocessing
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.onnx.decode import to_array
from exporters.onnx.read import OnnxFile, read_onnx

__all__ = ["OnnxModel", "graph_of_onnx", "open_onnx"]

_TYPES = ("float16", "float32", "float64")
_AS_IT_IS = Preprocessing(resize=0, crop=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class OnnxModel:
    """An open ONNX file, with what the runtime asks of an archive.

    An ONNX file does not say how pictures become inputs, so that they are taken as they are, scaled to [0, 1]. A mask
    is where a weight is not zero: the ONNX file knows no other.

    Attributes:
        path: where it lies.
        config: what the model is, as far as the file says.
        graph: its computation.
    """

    def __init__(self, file: OnnxFile) -> None:
        """Use `open_onnx`."""
        self._file = file
        self.path = file.path
        self.graph = graph_of_onnx(file)
        try:
            self.graph.check()
        except FormatError as error:
            raise FormatError(f"{str(self.path)!r}: {error}") from error
        for name in self.graph.parameters:
            if (dtype := file.entries[name].dtype) not in _TYPES:
                raise FormatError(
                    f"{str(self.path)!r}: weight {name[:80]!r} is of type {dtype}; weights of {', '.join(_TYPES)} are "
                    f"computed with here, so convert it."
                )
        self.config = _config(file, self.graph)

    def tensor(self, name: str) -> SparseTensor:
        """Decode one weight.

        Raises:
            FormatError: it is damaged.
        """
        return self._file.tensor(name)


def open_onnx(path: str | Path) -> OnnxModel:
    """Open an ONNX file, of ours or of another tool with the operators that archives have.

    Raises:
        FileError: there is no such file.
        FormatError: it is no ONNX file, is damaged, has subgraphs, or values of a type that archives do not have.
    """
    return OnnxModel(read_onnx(path))


def _config(file: OnnxFile, graph: Graph) -> ModelConfig:
    shape, classes = graph.inputs[0].shape[1:], (graph.outputs[0].shape or (None,))[1:2]
    fixed = tuple(n for n in shape if n is not None and 0 < n < LONGEST_SIDE)
    count = next((n for n in classes if n is not None and 0 < n <= MOST_CLASSES), 0)
    input_shape = fixed if len(fixed) == len(shape) else ()
    return ModelConfig("onnx", file.architecture or file.path.stem, count, input_shape, _AS_IT_IS)


def graph_of_onnx(file: OnnxFile) -> Graph:
    """The computation of an ONNX file, from where its weights are decoded on.

    Raises:
        FormatError: it has no input, a subgraph, or an input or output that is no tensor.
    """
    source = file.model.graph
    arrays = {tensor.name: to_array(tensor) for tensor in source.initializer if tensor.name not in file.entries}
    needed, nodes = {value.name for value in source.output}, []
    for node in reversed(source.node):
        # What decodes a weight is left out, since nothing else needs it.
        if not set(node.output) & needed or set(node.output) & file.entries.keys():
            continue
        needed.update(node.input)
        if node.domain not in ("", "ai.onnx"):
            raise FormatError(
                f"{str(file.path)!r}: operator {node.op_type[:80]!r} is of {node.domain[:80]!r}, not of the standard."
            )
        if node.op_type == "Constant" and len(node.attribute) != 1:
            raise FormatError(f"{str(file.path)!r}: constant {node.output[0][:80]!r} has {len(node.attribute)} values.")
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            arrays[node.output[0]] = to_array(node.attribute[0].t)
        else:
            attributes = {attr.name: _attribute(file, attr) for attr in node.attribute}
            nodes.append(Node(node.op_type, tuple(node.input), tuple(node.output), attributes))
    held = {*arrays, *file.entries}
    inputs = tuple(_value(file, value) for value in source.input if value.name not in held)
    if not inputs:
        raise FormatError(f"{str(file.path)!r} has no input.")
    opset = next((item.version for item in file.model.opset_import if item.domain in ("", "ai.onnx")), 0)
    constants = {name: array for name, array in arrays.items() if name in needed}
    parameters = tuple(name for name in file.entries if name in needed)
    outputs = tuple(_value(file, value) for value in source.output)
    return Graph(inputs, outputs, tuple(reversed(nodes)), constants, parameters, opset)


def _attribute(file: OnnxFile, attr: Any) -> Any:
    if attr.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
        raise FormatError(f"{str(file.path)!r} has a subgraph ({attr.name[:80]!r}); archives have none.")
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


def _value(file: OnnxFile, value: Any) -> Value:
    kind = value.type.tensor_type
    if not kind.elem_type:
        raise FormatError(f"{str(file.path)!r}: value {value.name[:80]!r} is no tensor, which every value has to be.")
    if kind.elem_type not in TensorProto.DataType.values():
        raise FormatError(
            f"{str(file.path)!r}: value {value.name[:80]!r} is of type {kind.elem_type}, which ONNX has not."
        )
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
    return Value(value.name, shape, np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).name)
