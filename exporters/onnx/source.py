"""An ONNX file of any tool as the source of an export: an archive or a compact ONNX file of the same computation.

The zeros of its weights become their masks, so whatever was pruned elsewhere becomes small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from dsr_tool.errors import UsageError
from dsr_tool.graph.compact.record import COMPACTED, compacted_specs, measure_savings
from dsr_tool.graph.compact.rewrite import fold_and_compact
from dsr_tool.graph.ir import Graph, Value
from dsr_tool.sparsity.config import LONGEST_SIDE
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.archive import draft_archive
from exporters.base import Draft, ExportOptions
from exporters.onnx.graph import OnnxModel
from exporters.onnx.native_node import refuse_native
from exporters.onnx.read import read_onnx
from exporters.onnx.write import to_onnx
from exporters.values import stored_as

__all__ = ["OnnxSource", "graph_in"]


class OnnxSource:
    """An open ONNX file that is exported.

    Attributes:
        path: path of the file.
        graph: its computation, for inputs of the given shape.
        config: description of the model.
        specs: name, shape and role of each weight that the computation reads.
    """

    def __init__(self, path: Path, input_shape: tuple[int, ...] = ()) -> None:
        """Opens a file.

        Args:
            path: the file.
            input_shape: shape of one input without the batch, for a file that takes any; empty to leave it free.

        Raises:
            FileError: there is no such file.
            FormatError: it is damaged, or has operators, types or subgraphs that are not run here.
            UsageError: it has several inputs, inputs of another shape, or a plan in place of a computation.
        """
        self.path = path
        self._file = read_onnx(path)
        refuse_native(path)
        self._model = OnnxModel(self._file)
        graph, config = self._model.graph, self._model.config
        if len(graph.inputs) != 1:
            raise UsageError(f"{str(path)!r} takes {len(graph.inputs)} inputs; models with one are exported.")
        if input_shape:
            graph = replace(graph, inputs=(_fixed(path, graph.inputs[0], input_shape),))
            config = replace(config, input_shape=input_shape)
            self._file.fix_input(graph.inputs[0].name, input_shape)
        self.graph, self.config = graph, config
        entries = {name: self._file.entries[name].spec for name in graph.parameters}
        # A weight without entries is not pruned.
        self.specs = {n: spec if spec.size else replace(spec, role="dense") for n, spec in entries.items()}

    @cached_property
    def tensors(self) -> dict[str, SparseTensor]:
        """Every weight; the mask of one that is multiplied with is where it is not zero."""
        return {name: self._tensor(name, spec) for name, spec in self.specs.items()}

    def stored(self, values: str) -> dict[str, SparseTensor]:
        """Returns the weights as a file with these values holds them.

        Raises:
            UsageError: a weight that they cannot hold.
        """
        return _stored(self.tensors, self.specs, values)

    def encode(self, to: str, options: ExportOptions) -> Draft:
        """Encodes the file for a container, `archive` or `onnx`.

        Raises:
            UsageError: options that do not fit each other, a weight that the values cannot hold, or a file that would
                be too large.
        """
        if to == "archive":
            stored = partial(_stored, values=options.values)
            return draft_archive(self.graph, self.tensors, self.specs, self.config, stored, options)
        build = partial(
            to_onnx, encoding=options.encoding, values=options.values, architecture=self.config.architecture
        )
        content = build(self.graph, self.tensors, specs=self.specs)
        if options.compact:
            before, small = fold_and_compact(self.graph, self.tensors)
            record = measure_savings(before, small, self.specs, content.ByteSize())
            specs = compacted_specs(small.tensors, self.specs)
            content = build(small.graph, small.tensors, specs=specs, notes={COMPACTED: record.to_dict()})
        return Draft(lambda path: _write(path, content.SerializeToString(deterministic=True)))

    def _tensor(self, name: str, spec: LayerSpec) -> SparseTensor:
        tensor = self._model.tensor(name)
        if spec.role == "sparse" or isinstance(tensor, GridTensor):
            return tensor
        # Zeros of biases, norms and constants are values like others.
        return SparseTensor.from_dense(tensor.to_dense(), Mask.full(tensor.mask.shape))


def _stored(
    tensors: Mapping[str, SparseTensor], specs: Mapping[str, LayerSpec], values: str
) -> dict[str, SparseTensor]:
    """Rounds weights as `stored_as` does, but not those that are on a grid or in float16 already."""
    done = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, GridTensor) or tensor.values.dtype == "float16"
    }
    return {**stored_as(tensors, {n: spec for n, spec in specs.items() if n not in done}, values)}


def _fixed(path: Path, value: Value, shape: tuple[int, ...]) -> Value:
    """Returns the input with the sizes of a shape."""
    own = value.shape[1:]
    if any(not 0 < n < LONGEST_SIDE for n in shape):
        raise UsageError(f"--input-shape {list(shape)} is not allowed; give numbers from 1 to {LONGEST_SIDE - 1:,}.")
    if len(own) != len(shape) or any(n not in (None, size) for n, size in zip(own, shape, strict=True)):
        expected = ",".join("any" if n is None else str(n) for n in own)
        raise UsageError(
            f"--input-shape {','.join(map(str, shape))} does not fit {str(path)!r}, whose inputs have the shape "
            f"{expected}."
        )
    return replace(value, shape=(value.shape[0], *shape))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def graph_in(graph: Graph, dtype: str) -> Graph:
    """Returns a computation whose constants of floating point have another type, and its input if that is a float."""
    constants = {n: array.astype(dtype) if array.dtype.kind == "f" else array for n, array in graph.constants.items()}
    inputs = tuple(replace(one, dtype=dtype) if np.dtype(one.dtype).kind == "f" else one for one in graph.inputs)
    return replace(graph, inputs=inputs, constants=constants)
