"""The operator table, held against the ONNX standard and against everything that reads it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from onnx.defs import OpSchema, get_schema

from dsr_tool.graph.compact.constants import BINARY, UNARY, binary_constant, unary_constant
from dsr_tool.graph.ir import Node
from dsr_tool.graph.operators import OPERATORS, VARIADIC, Operator, operator_of
from dsr_tool.runtime.compiler.rules import RULES
from dsr_tool.runtime.reference import NumpyFunction, elementwise
from dsr_tool.runtime.reference.call import _WITH_WEIGHTS, FUNCTIONS

ROOT = Path(__file__).parents[2]
OLDEST_OPSET = 18  # as in dsr_tool/runtime/reference/interpreter.py

every_row = pytest.mark.parametrize("row", OPERATORS.values(), ids=lambda row: row.name)
computed = [row for row in OPERATORS.values() if row.name in FUNCTIONS]


def schemas(name: str) -> list[OpSchema]:
    """Every definition of an operator from the oldest operator set that is read to the newest one."""
    newest = onnx.defs.onnx_opset_version()
    versions = range(OLDEST_OPSET, newest + 1)
    return [get_schema(name, version) for version in versions if onnx.defs.has(name, max_inclusive_version=version)]


@every_row
def test_rows_agree_with_the_standard(row: Operator):
    assert schemas(row.name)
    for schema in schemas(row.name):
        assert (row.min_inputs, row.max_inputs) == (schema.min_input, schema.max_input)
        if row.windowed:
            assert {"kernel_shape", "strides", "pads"} <= schema.attributes.keys()
    assert row.inert <= schemas(row.name)[-1].attributes.keys()


@every_row
def test_rows_do_not_contradict_themselves(row: Operator):
    assert not row.identity or (row.elementwise and row.keeps_entries)
    assert not row.arithmetic or (row.elementwise and row.min_inputs == 2)
    assert not row.gate_of or (row.elementwise and operator_of(row.gate_of).elementwise)
    assert not row.windowed or row.by_image
    assert not (row.by_image and row.by_row and row.elementwise)
    assert all(position < row.max_inputs for position in row.weights)


def test_unknown_operators_claim_nothing():
    assert operator_of("Unheard") == Operator("Unheard")


# --- the reference, the compiler and compaction ----------------------------------------------------------


def arity(function: NumpyFunction) -> tuple[int, int]:
    """Fewest and most arguments of a function."""
    if isinstance(function, np.ufunc):
        return function.nin, function.nin
    parameters = inspect.signature(function).parameters.values()
    positional = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return 1, VARIADIC
    return sum(parameter.default is parameter.empty for parameter in positional), len(positional)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_the_reference_have_a_row_with_their_number_of_inputs(name):
    assert arity(FUNCTIONS[name]) == (OPERATORS[name].min_inputs, OPERATORS[name].max_inputs)


def test_rows_are_elementwise_where_the_reference_is():
    assert {row.name for row in computed if row.elementwise} == elementwise.FUNCTIONS.keys() | {"BatchNormalization"}


def test_rows_are_windowed_where_the_standard_has_a_kernel_shape():
    windowed = {row.name for row in computed if "kernel_shape" in schemas(row.name)[-1].attributes}
    windowed.remove("ConvTranspose")  # its windows lie over the pixels of its output
    assert {row.name for row in OPERATORS.values() if row.windowed} == windowed


def test_all_outputs_are_computed_where_the_function_returns_several():
    functions = {row: FUNCTIONS[row.name] for row in computed if not isinstance(FUNCTIONS[row.name], np.ufunc)}
    several = {row.name for row, function in functions.items() if "tuple" in str(return_type(function))}
    assert {row.name for row in OPERATORS.values() if row.all_outputs} == several


def return_type(function: NumpyFunction) -> object:
    return inspect.signature(function).return_annotation


def test_functions_take_no_inert_attribute():
    for row in computed:
        if not isinstance(FUNCTIONS[row.name], np.ufunc):
            assert row.inert.isdisjoint(inspect.signature(FUNCTIONS[row.name]).parameters)


def test_operators_with_weights_are_prepared_once():
    assert _WITH_WEIGHTS.keys() == {row.name for row in computed if row.weights}


def test_lowering_rules_have_a_row_and_a_function():
    assert RULES.keys() <= OPERATORS.keys() & FUNCTIONS.keys()


@pytest.mark.parametrize("name", [*UNARY, "Clip"])
def test_constant_channels_become_what_the_reference_computes(name):
    x = np.concatenate([np.linspace(-8, 8, 41), [np.nan]])
    limits = (-1.0, 2.5) if name == "Clip" else ()
    with np.errstate(all="ignore"):
        expected = np.asarray(FUNCTIONS[name](x, *map(np.float64, limits)))
    found = unary_constant(Node(name, ("x",), ("y",)), x, limits)
    assert operator_of(name).elementwise
    np.testing.assert_allclose(found, np.where(np.isfinite(expected), expected, np.nan), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", BINARY)
def test_constant_channels_of_two_values_become_what_the_reference_computes(name):
    one, other = (part.ravel() for part in np.meshgrid(np.linspace(-3, 3, 13), np.linspace(-2, 2, 9)))
    with np.errstate(all="ignore"):
        expected = np.asarray(FUNCTIONS[name](one, other))
    assert operator_of(name).elementwise
    np.testing.assert_allclose(
        binary_constant(name, one, other), np.where(np.isfinite(expected), expected, np.nan), rtol=1e-12
    )


# --- what rows claim about values ------------------------------------------------------------------------


def others(name: str, x: np.ndarray) -> tuple[np.ndarray | None, ...]:
    """Valid further inputs of an operator whose first input is `x`."""
    row = OPERATORS[name]
    if name == "BatchNormalization":
        return (np.full(x.shape[1], 2.0, np.float32),) * 4
    if name == "Clip":
        return np.float32(0.25), np.float32(0.75)
    count = row.min_inputs - 1 if row.max_inputs < VARIADIC else 2
    # Broadcast along the first axis, so that the first input alone has the shape of the result.
    return (np.full((1, *x.shape[1:]), 0.5, np.float32).astype(x.dtype),) * count


def apply(name: str, x: np.ndarray) -> np.ndarray:
    typed = x > 0.5 if name in ("And", "Not", "Or", "Where") else x
    inputs = [typed, *others(name, x if name == "Where" else typed)]
    attributes = {"to": onnx.TensorProto.DOUBLE} if name == "Cast" else {}
    with np.errstate(all="ignore"):
        return np.asarray(FUNCTIONS[name](*inputs, **attributes))


@pytest.mark.parametrize("name", [row.name for row in computed if row.elementwise])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_elementwise_operators_keep_the_shape_and_read_one_entry(name, data):
    shape = data.draw(array_shapes(min_dims=2, max_dims=5, max_side=4))
    x = np.random.default_rng(data.draw(st.integers(0, 99))).random(shape, np.float32)
    before = apply(name, x)
    assert before.shape == x.shape
    place = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    x[place] = 1.5 - x[place]
    changed = apply(name, x) != before
    changed[place] = False
    assert not changed.any()


@pytest.mark.parametrize("name", [row.name for row in computed if row.keeps_entries])
def test_operators_that_keep_entries_return_each_once(name):
    x = np.random.default_rng(0).permutation(24).reshape(2, 1, 3, 4).astype(np.float32)
    further: dict[str, tuple[np.ndarray, ...]] = {
        "CastLike": (np.zeros(1),),
        "Reshape": (np.array([4, -1]),),
        "Unsqueeze": (np.array([0]),),
    }
    attributes = {"Cast": {"to": onnx.TensorProto.DOUBLE}, "DepthToSpace": {"blocksize": 2}}
    attributes["SpaceToDepth"] = {"blocksize": 2}
    x = x.reshape(1, 4, 2, 3) if name == "DepthToSpace" else x.reshape(1, 3, 2, 4) if name == "SpaceToDepth" else x
    result = np.asarray(FUNCTIONS[name](x, *further.get(name, ()), **attributes.get(name, {})))
    assert sorted(result.ravel()) == list(range(24))


@pytest.mark.parametrize("name", [row.name for row in computed if row.identity])
def test_identities_return_their_input(name):
    x = np.arange(6, dtype=np.float32)
    np.testing.assert_array_equal(np.asarray(FUNCTIONS[name](x)), x)


@pytest.mark.parametrize("row", [row for row in computed if row.gate_of], ids=lambda row: row.name)
def test_gates_times_their_input_are_the_operator_that_the_row_names(row):
    x = np.linspace(-6, 6, 101)
    # HardSigmoid is a gate only with the slope of HardSwish, which is not its default.
    attributes = {"alpha": 1 / 6} if row.name == "HardSigmoid" else {}
    gate = np.asarray(FUNCTIONS[row.name](x, **attributes))
    np.testing.assert_allclose(x * gate, np.asarray(FUNCTIONS[row.gate_of](x)), rtol=1e-12)


# --- one table -------------------------------------------------------------------------------------------


def lists_of_operators(path: Path) -> Iterator[str]:
    """Sets, lists and tuples of operator names in a module; tables of functions by operator are not among them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Set | ast.List | ast.Tuple) and len(node.elts) > 1:
            names = [element.value for element in node.elts if isinstance(element, ast.Constant)]
            if len(names) == len(node.elts) and all(name in OPERATORS for name in names):
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {names}"


def test_no_other_module_lists_operators():
    """A second list would drift from the table: one said `Silu` where graphs say `Swish`, and nobody noticed."""
    modules = [path for room in ("dsr_tool", "exporters", "converters") for path in (ROOT / room).rglob("*.py")]
    assert len(modules) > 100
    assert [line for path in modules for line in lists_of_operators(path)] == []


def test_every_fact_of_a_row_has_a_reader():
    modules = [path for room in ("dsr_tool", "exporters") for path in (ROOT / room).rglob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in modules if path.name != "operators.py"]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {field.name for field in dataclasses.fields(Operator)} <= read
