"""The operators that the project knows: one row for each, read by everything that asks about an operator.

Names and meanings are those of the ONNX standard (https://onnx.ai/onnx/operators). Adding an operator touches its row
here, its function in `runtime/reference`, and, for speed, its lowering rule and kernel in `runtime/compiler` and
`runtime/kernels`. An operator without a row is read and written like any other, but nothing computes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["OPERATORS", "VARIADIC", "Operator", "operator_of"]

VARIADIC = (1 << 31) - 1
"""Largest number of inputs of an operator that accepts any number of them; the value in ONNX's own schemas."""


@dataclass(frozen=True)
class Operator:
    """The facts about one operator.

    Attributes:
        name: its name in the standard.
        min_inputs: fewest inputs; these must be present, later ones may be left out.
        max_inputs: most inputs; `VARIADIC` for any number, all of them present.
        elementwise: an entry of the result depends on one entry of each input: on the entry at its place in the first
            input, and on those of the others where they broadcast to it. The shape of the first input is the result's,
            up to broadcasting.
        windowed: slides a window over the pixels of its first input; has kernel_shape, strides, pads, dilations.
        by_image: reads a whole image (channels, height, width) at a time, so kernels run once per image.
        by_row: reads a whole row of the last axis at a time, so kernels run once over the rows of all images.
        weights: positions of the inputs that are weights when they are constant; biases are none.
        identity: returns its first input unchanged at inference.
        keeps_entries: the result holds every entry of the first input once, in another shape, order or type.
        selects: the result holds entries of the first input, or means of a few, and perhaps those of other inputs.
        narrows: the result is a part of the first input.
        arithmetic: the sum, difference, product or quotient of two inputs.
        commutative: two inputs may be swapped.
        pools: what it makes of the entries of a window, an image or an axis: `mean`, `max`, or empty for neither.
        own_statistics: gives its input a mean of 0 and a variance of 1, measured on that input, before scale and bias.
        gate_of: name of the operator that x * gate(x) is.
        all_outputs: all outputs are computed; of other operators only the first is.
        inert: attributes that do not change what the first output holds at inference.
    """

    name: str
    min_inputs: int = 1
    max_inputs: int = 1
    elementwise: bool = False
    windowed: bool = False
    by_image: bool = False
    by_row: bool = False
    weights: tuple[int, ...] = ()
    identity: bool = False
    keeps_entries: bool = False
    selects: bool = False
    narrows: bool = False
    arithmetic: bool = False
    commutative: bool = False
    pools: str = ""
    own_statistics: bool = False
    gate_of: str = ""
    all_outputs: bool = False
    inert: frozenset[str] = frozenset()


_ROWS = (
    # One input, entry by entry.
    Operator("Abs", elementwise=True),
    Operator("Cast", elementwise=True, keeps_entries=True, inert=frozenset({"saturate"})),  # concerns 8-bit floats only
    Operator("CastLike", 2, 2, elementwise=True, keeps_entries=True, inert=frozenset({"saturate"})),
    Operator("Ceil", elementwise=True),
    Operator("Celu", elementwise=True),
    Operator("Clip", 1, 3, elementwise=True),
    Operator("Cos", elementwise=True),
    Operator("Dropout", 1, 3, elementwise=True, identity=True, keeps_entries=True, inert=frozenset({"seed"})),
    Operator("Elu", elementwise=True),
    Operator("Erf", elementwise=True),
    Operator("Exp", elementwise=True),
    Operator("Floor", elementwise=True),
    Operator("Gelu", elementwise=True),
    Operator("HardSigmoid", elementwise=True, gate_of="HardSwish"),
    Operator("HardSwish", elementwise=True),
    Operator("Identity", elementwise=True, identity=True, keeps_entries=True),
    Operator("LeakyRelu", elementwise=True),
    Operator("Log", elementwise=True),
    Operator("Mish", elementwise=True),
    Operator("Neg", elementwise=True),
    Operator("Not", elementwise=True),
    Operator("Reciprocal", elementwise=True),
    Operator("Relu", elementwise=True),
    Operator("Round", elementwise=True),
    Operator("Selu", elementwise=True),
    Operator("Sigmoid", elementwise=True, gate_of="Swish"),
    Operator("Sign", elementwise=True),
    Operator("Sin", elementwise=True),
    Operator("Softplus", elementwise=True),
    Operator("Softsign", elementwise=True),
    Operator("Sqrt", elementwise=True),
    Operator("Swish", elementwise=True),  # SiLU is Swish with alpha = 1
    Operator("Tanh", elementwise=True),
    Operator("ThresholdedRelu", elementwise=True),
    # Several inputs, entry by entry.
    Operator("Add", 2, 2, elementwise=True, arithmetic=True, commutative=True),
    Operator("And", 2, 2, elementwise=True, commutative=True),
    Operator("BatchNormalization", 5, 5, elementwise=True, by_image=True, inert=frozenset({"momentum"})),
    Operator("Div", 2, 2, elementwise=True, arithmetic=True),
    Operator("Equal", 2, 2, elementwise=True, commutative=True),
    Operator("Greater", 2, 2, elementwise=True),
    Operator("GreaterOrEqual", 2, 2, elementwise=True),
    Operator("Less", 2, 2, elementwise=True),
    Operator("LessOrEqual", 2, 2, elementwise=True),
    Operator("Max", 1, VARIADIC, elementwise=True, commutative=True),
    Operator("Mean", 1, VARIADIC, elementwise=True, commutative=True),
    Operator("Min", 1, VARIADIC, elementwise=True, commutative=True),
    Operator("Mul", 2, 2, elementwise=True, arithmetic=True, commutative=True),
    Operator("Or", 2, 2, elementwise=True, commutative=True),
    Operator("PRelu", 2, 2, elementwise=True),
    Operator("Pow", 2, 2, elementwise=True),
    Operator("Sub", 2, 2, elementwise=True, arithmetic=True),
    Operator("Sum", 1, VARIADIC, elementwise=True, commutative=True),
    Operator("Where", 3, 3, elementwise=True),
    # Products with a weight, and of two computed values.
    Operator("Conv", 2, 3, windowed=True, by_image=True, weights=(1,)),
    Operator("ConvTranspose", 2, 3, by_image=True, weights=(1,)),
    Operator("Einsum", 1, VARIADIC),
    Operator("Gemm", 2, 3, by_row=True, weights=(0, 1)),
    Operator("MatMul", 2, 2, by_row=True, weights=(0, 1)),
    # Pools, reductions and normalisations.
    Operator("ArgMax"),
    Operator("ArgMin"),
    Operator("AveragePool", windowed=True, by_image=True, pools="mean"),
    Operator("GlobalAveragePool", by_image=True, pools="mean"),
    Operator("GlobalMaxPool", by_image=True, pools="max"),
    Operator("InstanceNormalization", 3, 3, own_statistics=True),
    Operator("LayerNormalization", 2, 3, by_row=True, own_statistics=True, inert=frozenset({"stash_type"})),
    Operator(
        "MaxPool", windowed=True, by_image=True, inert=frozenset({"storage_order"}), pools="max"
    ),  # orders the second output
    Operator("LogSoftmax"),
    Operator("ReduceL1", 1, 2),
    Operator("ReduceL2", 1, 2),
    Operator("ReduceLogSum", 1, 2),
    Operator("ReduceLogSumExp", 1, 2),
    Operator("ReduceMax", 1, 2),
    Operator("ReduceMean", 1, 2, pools="mean"),
    Operator("ReduceMin", 1, 2),
    Operator("ReduceProd", 1, 2),
    Operator("ReduceSum", 1, 2),
    Operator("ReduceSumSquare", 1, 2),
    Operator("Softmax"),
    # Operators that move, select or make entries.
    Operator("Col2Im", 3, 3),
    Operator("Concat", 1, VARIADIC, selects=True),
    Operator("Constant", 0, 0),
    Operator("ConstantOfShape"),
    Operator("DepthToSpace", keeps_entries=True),
    Operator("Expand", 2, 2, selects=True),
    Operator("Flatten", keeps_entries=True),
    Operator("Gather", 2, 2, selects=True, narrows=True),
    Operator("GatherND", 2, 2),
    Operator("GridSample", 2, 2),
    Operator("Pad", 2, 4, selects=True),
    Operator("Range", 3, 3),
    Operator("Reshape", 2, 2, keeps_entries=True),
    Operator("Resize", 1, 4, selects=True),
    Operator("ScatterND", 3, 3),
    Operator("Shape"),
    Operator("Slice", 3, 5, selects=True, narrows=True),
    Operator("SpaceToDepth", keeps_entries=True),
    Operator("Split", 1, 2, all_outputs=True, selects=True, narrows=True),
    Operator("Squeeze", 1, 2, keeps_entries=True),
    Operator("Tile", 2, 2, selects=True),
    Operator("Transpose", keeps_entries=True),
    Operator("Unsqueeze", 2, 2, keeps_entries=True),
)

OPERATORS: Mapping[str, Operator] = {row.name: row for row in _ROWS}
"""The row of every operator by its name."""


def operator_of(name: str) -> Operator:
    """Returns the row of an operator; for an unknown name one that claims nothing."""
    return OPERATORS.get(name) or Operator(name)
