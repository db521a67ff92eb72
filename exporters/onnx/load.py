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

__all__ = ["constants", "load"]


def load(path: Path) -> ModelProto:
    """Parses an ONNX file.

    Raises:
        FileError: there is no such file, or it cannot be read.
        FormatError: it is no ONNX file, damaged, or keeps weights in other files.
    """
    require_file(path, "ONNX file")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
        _check_tensors(path, model)
        _check_names(path, model.graph)
        # Last, so that the faults above are named by sentences of their own.
        onnx.checker.check_model(model)
    except FormatError:
        raise
    except OSError as error:
        raise FileError(f"ONNX file {str(path)!r} cannot be read: {first_line(error)}.") from error
    except (DecodeError, RuntimeError, UnicodeError, ValueError, onnx.checker.ValidationError) as error:
        raise FormatError(f"{str(path)!r} is not an ONNX file, or is damaged: {first_line(error)}.") from error
    return model


def constants(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """Yields the tensors of Constant nodes, with the names of their values."""
    for node in graph.node:
        if node.op_type == "Constant" and node.output:
            yield from ((node.output[0], attribute.t) for attribute in node.attribute if attribute.name == "value")


def _check_tensors(path: Path, model: ModelProto) -> None:
    # Functions are graphs of their own, which the main graph only names.
    nodes = [node for function in model.functions for node in function.node]
    for tensor in itertools.chain(_tensors_of_graph(model.graph), _tensors_of_nodes(nodes)):
        # A path in a file of a stranger could name any file of this machine.
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise FormatError(f"{str(path)!r} keeps its weights in other files; save it again as one file.")
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
