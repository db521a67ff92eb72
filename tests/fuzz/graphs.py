"""Mutants of the graph inside an archive: well-formed graphs with correct checksums that may not be computable."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from archive_mutants import repacked
from blind import NUMBERS, choose, json_tree
from numpy.random import Generator

# Sizes around the limits of index types, and sizes that no memory holds.
SIZES = (0, 1, -1, 2, 3, 7, 100, 1 << 16, 1 << 20, 1 << 31, 1 << 40, 1 << 62, -(1 << 63))
ATTRIBUTES = ("axis", "group", "pads", "strides", "kernel_shape", "perm", "to", "keepdims", "num_outputs", "value_ints")
DOUBLING = ("Add", "MatMul", "Concat", "Mul", "Expand", "Gather")


def graph(random: Generator, corpus: Sequence[bytes]) -> bytes:
    """Makes one to three changes of nodes, constants or the input."""

    def change(document: Any) -> Any:
        for _ in range(int(random.integers(1, 4))):
            _CHANGES[int(random.integers(len(_CHANGES)))](random, document)
        return document

    return repacked(corpus[int(random.integers(len(corpus)))], change)


def _values(document: Any) -> list[str]:
    outputs = [name for node in document["nodes"] for name in node["outputs"]]
    return ["", document["inputs"][0]["name"], *document["constants"], *document["parameters"], *outputs]


def _input(random: Generator, document: Any) -> None:
    inputs = choose(random, document["nodes"])["inputs"]
    choice = random.random()
    if choice < 0.2 or not inputs:
        inputs.append(choose(random, _values(document)))
    elif choice < 0.4:
        inputs.pop()
    else:
        inputs[int(random.integers(len(inputs)))] = choose(random, _values(document))


def _operator(random: Generator, document: Any) -> None:
    from dsr_tool.runtime.reference.call import FUNCTIONS

    choose(random, document["nodes"])["op"] = choose(random, sorted(FUNCTIONS))


def _attribute(random: Generator, document: Any) -> None:
    attributes = choose(random, document["nodes"]).setdefault("attributes", {})
    name = choose(random, [*attributes, *attributes, *ATTRIBUTES])
    value = attributes.get(name, [1, 1])
    if isinstance(value, list) and value and random.random() < 0.7:
        value[int(random.integers(len(value)))] = choose(random, SIZES)
        attributes[name] = value
    else:
        attributes[name] = choose(random, (*SIZES, *NUMBERS[:9], json_tree(random, value), "text", []))


def _constant(random: Generator, document: Any) -> None:
    constants = document["constants"]
    name = choose(random, [*constants, "new"])
    old = constants.get(name, {"dtype": "int64", "shape": [2], "data": base64.b64encode(bytes(16)).decode()})
    array = np.frombuffer(base64.b64decode(old["data"]), old["dtype"]).copy()
    if array.size:
        array[int(random.integers(array.size))] = np.array(choose(random, SIZES)).astype(array.dtype)
    array = array[: int(random.integers(array.size + 1))] if random.random() < 0.2 else array
    shape = old["shape"] if array.size == np.prod(old["shape"]) else list(array.shape)
    constants[name] = {**old, "shape": shape, "data": base64.b64encode(array.tobytes()).decode()}
    if name == "new":
        _input(random, document)


def _doubling(random: Generator, document: Any) -> None:
    """Inserts a chain of operators, each of which reads the result of the one before twice."""
    i = int(random.integers(len(document["nodes"])))
    value = choose(random, [name for name in document["nodes"][i]["inputs"] if name] or [document["inputs"][0]["name"]])
    op = choose(random, DOUBLING)
    attributes = {"axis": 0} if op in ("Concat", "Gather") else {}
    for k in range(int(random.integers(2, 40))):
        output = f"chain{i}_{k}_{random.integers(1 << 30)}"
        node = {"op": op, "inputs": [value, value], "outputs": [output], "attributes": attributes}
        document["nodes"].insert(i + k, node)
        value = output
    document["outputs"][0]["name"] = value


def _type_or_shape(random: Generator, document: Any) -> None:
    value = document["inputs"][0]
    if random.random() < 0.5:
        value["dtype"] = choose(random, ("float64", "float16", "int64", "bool", "uint8"))
    else:
        value["shape"] = [choose(random, (None, 1, 3, 8, 0)) for _ in value["shape"]]


_CHANGES = (_input, _input, _operator, _attribute, _attribute, _constant, _doubling, _type_or_shape)
