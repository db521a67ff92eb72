"""Opening ONNX files as computations with weights, so that every runtime of archives runs them too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import AttributeProto, TensorProto, ValueInfoProto, helper

from dsr_tool.errors import FormatError
from dsr_tool.graph.ir import Attribute, Graph, Node, Value
from dsr_tool.sparsity.config import LONGEST_SIDE, MOST_CLASSES, ModelConfig, Preprocessing
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.onnx.decode import to_array
from exporters.onnx.read import OnnxFile, read_onnx

__all__ = ["OnnxModel", "graph_of_onnx", "open_onnx"]

_TYPES = ("float16", "float32", "float64", "int8")
"""Types in which weights that the runtimes compute with are stored; those on a grid are int8."""
_NO_PREPROCESSING = Preprocessing(resize=0, crop=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""Pictures as they are, scaled to [0, 1]: an ONNX file does not say how they become inputs."""


class OnnxModel:
    """An open ONNX file that a session runs like an archive (`Model` in `dsr_tool/runtime/source.py`).

    The mask of a weight is where it is not zero: an ONNX file has no other.

    Attributes:
        path: path of the file.
        config: description of the model, as far as the file has one.
        graph: the computation.
    """

    def __init__(self, file: OnnxFile) -> None:
        """Opens a file that was read; see `open_onnx`."""
        self._file = file
        self.path = file.path
        self.graph = graph_of_onnx(file)
        # The file is of a stranger: a graph that reads a value before it is made would fail in the middle of a run.
        try:
            self.graph.check()
        except FormatError as error:
            raise FormatError(f"{str(self.path)!r}: {error}") from error
        for name in self.graph.parameters:
            if (dtype := file.entries[name].dtype) not in _TYPES:
                raise FormatError(
                    f"{str(self.path)!r}: weight {name[:80]!r} is of type {dtype}; the runtimes take "
                    f"{', '.join(_TYPES)}, so convert it."
                )
        self.config = _config(file, self.graph)

    def tensor(self, name: str) -> SparseTensor:
        """Decodes one weight.

        Raises:
            FormatError: the weight is damaged.
        """
        return self._file.tensor(name)


def open_onnx(path: str | Path) -> OnnxModel:
    """Opens an ONNX file of any tool.

    Raises:
        FileError: there is no such file.
        FormatError: it is no ONNX file, is damaged, has subgraphs or operators that are not of the ONNX standard, or
            values of a type that archives do not have.
    """
    return OnnxModel(read_onnx(path))


def _config(file: OnnxFile, graph: Graph) -> ModelConfig:
    shape, classes = graph.inputs[0].shape[1:], graph.outputs[0].shape[1:2] if len(graph.outputs) == 1 else ()
    # One free size, or one that no description may have, leaves the input shape unknown.
    fixed = tuple(n for n in shape if n is not None and 0 < n < LONGEST_SIDE)
    count = next((n for n in classes if n is not None and 0 < n <= MOST_CLASSES), 0)
    input_shape = fixed if len(fixed) == len(shape) else ()
    return ModelConfig("onnx", file.architecture or file.path.stem, count, input_shape, _NO_PREPROCESSING)


def graph_of_onnx(file: OnnxFile) -> Graph:
    """Returns the computation of an ONNX file without the nodes that decode weights.

    Raises:
        FormatError: it has no input, a subgraph, an operator that is not of the ONNX standard, or an input or output
            that is no tensor.
    """
    source = file.model.graph
    arrays = {tensor.name: to_array(tensor) for tensor in source.initializer if tensor.name not in file.entries}
    needed, nodes = {value.name for value in source.output}, []
    for node in reversed(source.node):
        # Backwards from the outputs: nodes that decode weights are needed by nothing once the weights are parameters.
        if not set(node.output) & needed or set(node.output) & file.entries.keys():
            continue
        needed.update(node.input)
        if node.domain not in ("", "ai.onnx"):
            raise FormatError(
                f"{str(file.path)!r}: operator {node.op_type[:80]!r} is of domain {node.domain[:80]!r}; only "
                f"operators of the ONNX standard are run."
            )
        if node.op_type == "Constant" and len(node.attribute) != 1:
            raise FormatError(
                f"{str(file.path)!r}: constant {node.output[0][:80]!r} has {len(node.attribute)} values, "
                f"expected 1; the file is damaged."
            )
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            arrays[node.output[0]] = to_array(node.attribute[0].t)
        else:
            attributes = {attr.name: _attribute(file, attr) for attr in node.attribute}
            nodes.append(Node(node.op_type, tuple(node.input), tuple(node.output), attributes))
    # Old exporters list initializers among the inputs too.
    held = {*arrays, *file.entries}
    inputs = tuple(_value(file, value) for value in source.input if value.name not in held)
    if not inputs:
        raise FormatError(f"{str(file.path)!r} has no input; a model takes one.")
    opset = next((item.version for item in file.model.opset_import if item.domain in ("", "ai.onnx")), 0)
    constants = {name: array for name, array in arrays.items() if name in needed}
    parameters = tuple(name for name in file.entries if name in needed)
    outputs = tuple(_value(file, value) for value in source.output)
    return Graph(inputs, outputs, tuple(reversed(nodes)), constants, parameters, opset)


def _attribute(file: OnnxFile, attr: AttributeProto) -> Attribute:
    if attr.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
        raise FormatError(
            f"{str(file.path)!r} has a subgraph ({attr.name[:80]!r}), which only control flow uses; export the model "
            f"without it."
        )
    value = helper.get_attribute_value(attr)
    if isinstance(value, bytes):
        # A string that is no UTF-8 is no value of any operator, so the operator will refuse it by name.
        return value.decode("utf-8", "replace")
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value):
        return tuple(value)
    raise FormatError(
        f"{str(file.path)!r}: attribute {attr.name!r} is neither a number, a string nor a list of numbers."
    )


def _value(file: OnnxFile, value: ValueInfoProto) -> Value:
    kind = value.type.tensor_type
    if not kind.elem_type:
        raise FormatError(
            f"{str(file.path)!r}: value {value.name[:80]!r} is no tensor; sequences, maps and "
            f"optional values are not run here."
        )
    if kind.elem_type not in TensorProto.DataType.values():
        raise FormatError(
            f"{str(file.path)!r}: value {value.name[:80]!r} has type {kind.elem_type}, which ONNX does not "
            f"define; the file is damaged."
        )
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
    return Value(value.name, shape, np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).name)
