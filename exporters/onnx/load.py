"""Loading ONNX files from strangers: everything that could mislead a reader is checked before anything is used."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from dsr_tool.errors import FileError, FormatError, first_line
from dsr_tool.files import require_file
from exporters.onnx.external import bring_in

__all__ = ["constants", "load"]


def load(path: Path) -> tuple[ModelProto, int]:
    """Parses an ONNX file, and reads the data that it keeps in other files beside it.

    Returns:
        The model, without external data and with free dimensions where a file has -1; and the bytes of its data files.

    Raises:
        FileError: there is no such file, it cannot be read, or a data file is missing.
        FormatError: it is no ONNX file, damaged, or keeps data outside of its folder.
    """
    require_file(path, "ONNX file")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
        _check_tensors(path, model)
        _check_names(path, model.graph)
        _free_dimensions(path, model.graph)
        nbytes = bring_in(path, _tensors_of(model))
        # Last, so that the faults above are named by sentences of their own.
        onnx.checker.check_model(model)
    except (FileError, FormatError):
        raise
    except OSError as error:
        raise FileError(f"ONNX file {str(path)!r} cannot be read: {first_line(error)}.") from error
    except (DecodeError, RuntimeError, UnicodeError, ValueError, onnx.checker.ValidationError) as error:
        raise FormatError(f"{str(path)!r} is not an ONNX file, or is damaged: {first_line(error)}.") from error
    return model, nbytes


def constants(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """Yields the tensors of Constant nodes, with the names of their values."""
    for node in graph.node:
        if node.op_type == "Constant" and node.output:
            yield from ((node.output[0], attribute.t) for attribute in node.attribute if attribute.name == "value")


def _free_dimensions(path: Path, graph: GraphProto) -> None:
    """Makes dimensions of -1, which some exporters write for any size, free ones; refuses other negative sizes."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value < -1:
                raise FormatError(f"{str(path)!r}: value {value.name[:80]!r} has a negative size; the file is damaged.")
            if dim.dim_value == -1:
                dim.ClearField("dim_value")


def _tensors_of(model: ModelProto) -> Iterator[TensorProto]:
    # Functions are graphs of their own, which the main graph only names.
    nodes = [node for function in model.functions for node in function.node]
    return itertools.chain(_tensors_of_graph(model.graph), _tensors_of_nodes(nodes))


def _check_tensors(path: Path, model: ModelProto) -> None:
    for tensor in _tensors_of(model):
        if any(n < 0 for n in tensor.dims):
            raise FormatError(f"{str(path)!r}: tensor {tensor.name!r} has a negative size; the file is damaged.")


def _tensors_of_graph(graph: GraphProto) -> Iterator[TensorProto]:
    """Yields every tensor of a graph and of the graphs inside it; protobuf limits how deep graphs nest."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _tensors_of_graph(graph)


def _check_names(path: Path, graph: GraphProto) -> None:
    """Raises `FormatError` for a name that two things make: this reader and a runtime could take different ones."""
    seen: set[str] = set()
    names = [tensor.name for tensor in graph.initializer]
    names += [sparse.values.name for sparse in graph.sparse_initializer]
    names += [name for node in graph.node for name in node.output if name]
    for name in names:
        if name in seen:
            raise FormatError(f"{str(path)!r} defines value {name!r} twice; the file is damaged.")
        seen.add(name)
