"""Opening ONNX files as computations with weights, so that every runtime of archives runs them too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from dsr_tool.errors import FormatError
from dsr_tool.graph.ir import Attribute, Graph, Node, Value
from dsr_tool.sparsity.config import LONGEST_SIDE, MOST_CLASSES, ModelConfig, Preprocessing
from dsr_tool.sparsity.tensor import Array, SparseTensor
from exporters.onnx.decode import to_array
from exporters.onnx.macs import static_shapes
from exporters.onnx.opset import converted, opset_of
from exporters.onnx.pads import SAME, explicit_pads
from exporters.onnx.read import OnnxFile, read_onnx

__all__ = ["OnnxModel", "graph_of_onnx", "open_onnx"]

_TYPES = ("float16", "float32", "float64", "int8")
"""Types in which weights that the runtimes compute with are stored; those on a grid are int8."""
_STANDARD = ("", "ai.onnx")
"""Names of the domain of the ONNX standard."""
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

    Operator sets before 18 are converted. Where padding depends on sizes that are known, it becomes explicit.

    Raises:
        FormatError: it has no input, a subgraph, an operator that is not of the ONNX standard, an input or output
            that is no tensor, or an operator set that onnx cannot convert.
    """
    declared = file.declared()
    # Nodes are judged before they are converted: onnx's converter knows the standard alone.
    needed_nodes = list(_needed_nodes(file, file.model.graph))[::-1]
    if not any(value.name not in declared for value in file.model.graph.input):
        raise FormatError(f"{str(file.path)!r} has no input; a model takes one.")
    try:
        model = converted(file.model, needed_nodes, declared)
    except FormatError as error:
        raise FormatError(f"{str(file.path)!r}: {error}") from error
    source = model.graph
    arrays = {tensor.name: to_array(tensor) for tensor in source.initializer if tensor.name not in declared}
    nodes = []
    for proto in _needed_nodes(file, source):
        if proto.op_type == "Constant" and proto.output[0] in declared:
            continue
        if proto.op_type == "Constant" and proto.attribute[0].name == "value":
            arrays[proto.output[0]] = to_array(proto.attribute[0].t)
        elif proto.op_type == "ConstantOfShape":
            # Its attribute is an array, which attributes of a Graph cannot be; expanding a constant is the same.
            filler = f"{proto.output[0]}/value"
            arrays[filler] = _filler(file, proto)
            nodes.append(Node("Expand", (filler, *proto.input), tuple(proto.output)))
        else:
            attributes = {attr.name: _attribute(file, attr) for attr in proto.attribute}
            nodes.append(Node(proto.op_type, tuple(proto.input), tuple(proto.output), attributes))
    nodes.reverse()
    # Old exporters list initializers among the inputs too.
    inputs = tuple(_value(file, value) for value in source.input if value.name not in {*arrays, *declared})
    outputs = tuple(_value(file, value) for value in source.output)
    if any(node.attributes.get("auto_pad") in SAME for node in nodes):
        shapes = static_shapes(model, declared)
        nodes = [explicit_pads(node, shapes) for node in nodes]
    needed = {name for node in nodes for name in node.inputs} | {value.name for value in outputs}
    constants = {name: array for name, array in arrays.items() if name in needed}
    parameters = tuple(name for name in file.entries if name in needed)
    return Graph(inputs, outputs, tuple(nodes), constants, parameters, opset_of(model))


def _needed_nodes(file: OnnxFile, graph: GraphProto) -> Iterator[NodeProto]:
    """Yields the nodes that the outputs depend on, from the last one, without those that decode weights.

    Raises:
        FormatError: one of them is not of the ONNX standard, has a subgraph, or is an invalid constant.
    """
    needed = {value.name for value in graph.output}
    for node in reversed(graph.node):
        # Nodes that decode weights are needed by nothing once the weights are parameters.
        constant = node.op_type == "Constant" and node.domain in _STANDARD
        if not needed.intersection(node.output) or not (constant or file.entries.keys().isdisjoint(node.output)):
            continue
        needed.update(node.input)
        if node.domain not in _STANDARD:
            raise FormatError(
                f"{str(file.path)!r}: operator {node.op_type[:80]!r} is of domain {node.domain[:80]!r}; only "
                f"operators of the ONNX standard are run."
            )
        if constant and len(node.attribute) != 1:
            raise FormatError(
                f"{str(file.path)!r}: constant {node.output[0][:80]!r} has {len(node.attribute)} values, "
                f"expected 1; the file is damaged."
            )
        for attr in node.attribute:
            if attr.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
                raise FormatError(
                    f"{str(file.path)!r} has a subgraph ({attr.name[:80]!r}), which only control flow uses; export the "
                    f"model without it."
                )
        yield node


def _filler(file: OnnxFile, node: NodeProto) -> Array:
    """Returns the value of a ConstantOfShape as a scalar."""
    array = to_array(node.attribute[0].t) if node.attribute else np.zeros(1, np.float32)
    if array.size != 1:
        raise FormatError(
            f"{str(file.path)!r}: ConstantOfShape {node.output[0][:80]!r} has {array.size} values, expected 1."
        )
    return array.reshape(())


def _attribute(file: OnnxFile, attr: AttributeProto) -> Attribute:
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
