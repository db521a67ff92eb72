import dataclasses
import json

import numpy as np
import pytest

from dsr_tool.errors import FormatError
from dsr_tool.graph.ir import Graph, Node, Value


@pytest.fixture
def graph():
    return Graph(
        inputs=(Value("x", (None, 3, 4, 4)),),
        outputs=(Value("y", (None, 2)),),
        nodes=(
            Node("Conv", ("x", "w", ""), ("h",), {"pads": (0, 0, 0, 0), "group": 1, "auto_pad": "NOTSET"}),
            Node("Gemm", ("h", "k"), ("y",), {"alpha": 1.0}),
        ),
        constants={"k": np.array([[1.5, -np.inf]], np.float32)},
        parameters=("w",),
        opset=18,
    )


def test_json_round_trip_keeps_the_graph(graph):
    again = Graph.from_json(graph.to_json())
    assert again.to_json() == graph.to_json()
    assert again.nodes == graph.nodes
    np.testing.assert_array_equal(again.constants["k"], graph.constants["k"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"h"', '"z"'),
        ('"outputs":["y"]', '"outputs":["h"]'),
        ('"opset":18', '"opset":null'),
        ('"float32","shape":[1,2]', '"float32","shape":[1,3]'),
        ('"float32","shape":[1,2]', '"object","shape":[1,2]'),
        ('"parameters":["w"]', '"parameters":3'),
        ('"pads":[0,0,0,0]', '"pads":[0,"a",0,0]'),
        ('"shape":[null,3,4,4]', '"shape":[null,3,4,-4]'),
        ('"shape":[null,2]', '"shape":[-1,2]'),
        ("{", "["),
    ],
)
def test_damaged_documents_are_refused(graph, old, new):
    text = graph.to_json()
    assert old in text
    with pytest.raises(FormatError):
        Graph.from_json(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"op":"Conv"', '"op":"a b"'),
        ('"op":"Conv"', '"op":"two\\nlines"'),
        ('"pads":[0', '"not\\u2028printable":[0'),
        ('"outputs":["y"]', '"outputs":[""]'),
        ('"outputs":["y"]', '"outputs":[]'),
        ('["x",', json.dumps(["x" * 5000])[:-1] + ","),
        ('"float32","shape":[1,2]', json.dumps("\x1b[2J" * 1000) + ',"shape":[1,2]'),
        ('"pads":[0,0', '"pads":[0,' + json.dumps({"long": "x" * 5000})),
    ],
)
def test_error_messages_cut_long_names_of_a_document(graph, old, new):
    text = graph.to_json()
    assert old in text
    with pytest.raises(FormatError) as caught:
        Graph.from_json(text.replace(old, new, 1))
    assert len(str(caught.value)) < 460
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("size", [-1, -(2**40)])
@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_negative_sizes_are_refused_in_one_sentence(graph, where, size):
    (value,) = getattr(graph, where)
    damaged = dataclasses.replace(graph, **{where: (Value(value.name, (size, 2)),)})
    with pytest.raises(FormatError, match=f"value '{value.name}' has a negative size; the file is damaged"):
        damaged.check()


def test_an_output_that_is_listed_twice_is_refused(graph):
    with pytest.raises(FormatError, match="output 'y' is listed twice"):
        dataclasses.replace(graph, outputs=graph.outputs * 2).check()


def test_constants_of_other_types_are_refused(graph):
    damaged = dataclasses.replace(graph, constants={"k": np.array([1], np.uint64)})
    with pytest.raises(FormatError, match="constant 'k' is of type 'uint64', not one of bool, int32"):
        damaged.check()
