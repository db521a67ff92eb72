"""Mutants of the graph inside of an archive: each is a graph, with right checksums, that may make no sense."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from mutators import NUMBERS, json_tree, repacked
from numpy.random import Generator

SIZES = (0, 1, -1, 2, 3, 7, 100, 1 << 16, 1 << 20, 1 << 31, 1 << 40, 1 << 62, -(1 << 63))
ATTRIBUTES = ("axis", "group", "pads", "strides", "kernel_shape", "perm", "to", "keepdims", "num_outputs", "value_ints")
DOUBLING = ("Add", "MatMul", "Concat", "Mul", "Expand", "Gather")


def graph(random: Generator, corpus: Sequence[bytes]) -> bytes:
    """One to three changes of nodes, constants or the input."""

    def change(document: Any) -> Any:
        for _ in range(int(random.integers(1, 4))):
            _CHANGES[int(random.integers(len(_CHANGES)))](random, document)
        return document

    return repacked(corpus[int(random.integers(len(corpus)))], change)


def _one(random: Generator, items: Sequence[Any]) -> Any:
    return items[int(random.integers(len(items)))]


def _values(document: Any) -> list[str]:
    made = [name for node in document["nodes"] for name in node["outputs"]]
    return ["", document["inputs"][0]["name"], *document["constants"], *document["parameters"], *made]


def _input(random: Generator, document: Any) -> None:
    inputs = _one(random, document["nodes"])["inputs"]
    choice = random.random()
    if choice < 0.2 or not inputs:
        inputs.append(_one(random, _values(document)))
    elif choice < 0.4:
        inputs.pop()
    else:
        inputs[int(random.integers(len(inputs)))] = _one(random, _values(document))


def _operator(random: Generator, document: Any) -> None:
    from dsr_tool.runtime.reference.call import FUNCTIONS

    _one(random, document["nodes"])["op"] = _one(random, sorted(FUNCTIONS))


def _attribute(random: Generator, document: Any) -> None:
    attributes = _one(random, document["nodes"]).setdefault("attributes", {})
    name = _one(random, [*attributes, *attributes, *ATTRIBUTES])
    value = attributes.get(name, [1, 1])
    if isinstance(value, list) and value and random.random() < 0.7:
        value[int(random.integers(len(value)))] = _one(random, SIZES)
        attributes[name] = value
    else:
        attributes[name] = _one(random, (*SIZES, *NUMBERS[:9], json_tree(random, value), "text", []))


def _constant(random: Generator, document: Any) -> None:
    constants = document["constants"]
    name = _one(random, [*constants, "new"])
    old = constants.get(name, {"dtype": "int64", "shape": [2], "data": base64.b64encode(bytes(16)).decode()})
    array = np.frombuffer(base64.b64decode(old["data"]), old["dtype"]).copy()
    if array.size:
        array[int(random.integers(array.size))] = np.array(_one(random, SIZES)).astype(array.dtype)
    array = array[: int(random.integers(array.size + 1))] if random.random() < 0.2 else array
    shape = old["shape"] if array.size == np.prod(old["shape"]) else list(array.shape)
    constants[name] = {**old, "shape": shape, "data": base64.b64encode(array.tobytes()).decode()}
    if name == "new":
        _input(random, document)


def _doubling(random: Generator, document: Any) -> None:
    """A chain of operators, each of which takes twice what the one before makes."""
    i = int(random.integers(len(document["nodes"])))
    value = _one(random, [name for name in document["nodes"][i]["inputs"] if name] or [document["inputs"][0]["name"]])
    op = _one(random, DOUBLING)
    attributes = {"axis": 0} if op in ("Concat", "Gather") else {}
    for k in range(int(random.integers(2, 40))):
        made = f"chain{i}_{k}_{random.integers(1 << 30)}"
        node = {"op": op, "inputs": [value, value], "outputs": [made], "attributes": attributes}
        document["nodes"].insert(i + k, node)
        value = made
    document["outputs"][0]["name"] = value


def _given(random: Generator, document: Any) -> None:
    given = document["inputs"][0]
    if random.random() < 0.5:
        given["dtype"] = _one(random, ("float64", "float16", "int64", "bool", "uint8"))
    else:
        given["shape"] = [_one(random, (None, 1, 3, 8, 0)) for _ in given["shape"]]


_CHANGES = (_input, _input, _operator, _attribute, _attribute, _constant, _doubling, _given)
