"""Mutants of ONNX files: well-formed protobuf with wrong dimensions, types, names, links or data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from blind import TEXTS, any_bytes, choose, json_tree
from numpy.random import Generator

__all__ = ["onnx_model"]


def onnx_model(random: Generator, corpus: Sequence[bytes]) -> bytes:
    """Makes an ONNX file with wrong dimensions, types, names, links or data."""
    import onnx

    model = onnx.ModelProto.FromString(choose(random, corpus))
    for _ in range(int(random.integers(1, 4))):
        choose(random, _ONNX_CHANGES)(random, model.graph)
    if random.random() < 0.1 and model.metadata_props:
        entry = model.metadata_props[0]
        entry.value = json.dumps(json_tree(random, json.loads(entry.value)))
    return bytes(model.SerializeToString())


def _tensor(random: Generator, graph: Any) -> Any:
    sparse = [part for tensor in graph.sparse_initializer for part in (tensor.values, tensor.indices)]
    return choose(random, [*graph.initializer, *sparse])


def _dims(random: Generator, graph: Any) -> None:
    dims = _tensor(random, graph).dims
    values = [0, 1, -1, 3, 255, 2**31, 2**40, 2**62]
    if dims and random.random() < 0.7:
        dims[int(random.integers(len(dims)))] = choose(random, values)
    else:
        dims.append(choose(random, values))


def _raw(random: Generator, graph: Any) -> None:
    tensor = _tensor(random, graph)
    changed = any_bytes(random, [tensor.raw_data])
    tensor.raw_data = (changed + tensor.raw_data)[: len(tensor.raw_data)] if random.random() < 0.7 else changed


def _kind(random: Generator, graph: Any) -> None:
    _tensor(random, graph).data_type = int(random.integers(0, 25))


def _name(random: Generator, graph: Any) -> None:
    _tensor(random, graph).name = choose(random, (*TEXTS[:3], _tensor(random, graph).name))


def _external(random: Generator, graph: Any) -> None:
    tensor = _tensor(random, graph)
    tensor.data_location = 1
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", choose(random, TEXTS[1:4])


def _link(random: Generator, graph: Any) -> None:
    node, other = choose(random, graph.node), choose(random, graph.node)
    names = choose(random, (node.input, node.output))
    if names:
        names[int(random.integers(len(names)))] = choose(random, (*other.input, *other.output, "x", ""))


def _operator(random: Generator, graph: Any) -> None:
    node = choose(random, graph.node)
    node.op_type = choose(random, [other.op_type for other in graph.node] + ["Constant", "Loop", "NoSuchOperator"])


def _attribute(random: Generator, graph: Any) -> None:
    node = choose(random, graph.node)
    if node.attribute:
        attribute = choose(random, node.attribute)
        attribute.i = int(choose(random, [0, 1, -1, 7, 13, 2**40]))
        if attribute.ints:
            attribute.ints[0] = int(choose(random, [0, -1, 2**31, 2**62]))


def _order(random: Generator, graph: Any) -> None:
    field = choose(random, (graph.node, graph.initializer))
    items = list(field)
    i = int(random.integers(len(items)))
    choice = random.random()
    items = items[:i] + items[i + 1 :] if choice < 0.4 else [*items, items[i]] if choice < 0.7 else items[::-1]
    del field[:]
    field.extend(items)


_ONNX_CHANGES = (_dims, _dims, _raw, _raw, _kind, _name, _external, _link, _operator, _attribute, _order)
