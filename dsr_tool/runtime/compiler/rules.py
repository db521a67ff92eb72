"""The lowering rule of each operator that has one."""

from __future__ import annotations

from dsr_tool.runtime.compiler.channels import batch_norm
from dsr_tool.runtime.compiler.concat import concat
from dsr_tool.runtime.compiler.convolution import conv
from dsr_tool.runtime.compiler.elementwise import activation, arithmetic, clip, gelu, relu
from dsr_tool.runtime.compiler.lowering import Rule
from dsr_tool.runtime.compiler.matmul import gemm, matmul
from dsr_tool.runtime.compiler.movement import expand, gather, gather_nd, pad, resize, slices, split, transpose, where
from dsr_tool.runtime.compiler.pooling import average_pool, max_pool
from dsr_tool.runtime.compiler.products import einsum
from dsr_tool.runtime.compiler.reduce import global_average_pool, layer_norm, reduction, softmax
from dsr_tool.runtime.compiler.shapes import flatten, identity, reshape, squeeze, unsqueeze
from dsr_tool.runtime.kernels.ops import Activation

__all__ = ["RULES"]

# The fields of Activate that attributes set; attributes and their defaults are those of the ONNX standard.
_LINE = {"alpha": "slope", "beta": "shift"}
_BELOW_ZERO = {"alpha": "negative_scale"}

RULES: dict[str, Rule] = {
    "Add": arithmetic,
    "AveragePool": average_pool,
    "BatchNormalization": batch_norm,
    "Clip": clip,
    "Concat": concat,
    "Conv": conv,
    "Div": arithmetic,
    "Dropout": identity,
    "Einsum": einsum,
    "Elu": activation(Activation.ELU, _BELOW_ZERO, alpha=1.0),
    "Expand": expand,
    "Flatten": flatten,
    "Gather": gather,
    "GatherND": gather_nd,
    "Gelu": gelu,
    "Gemm": gemm,
    "GlobalAveragePool": global_average_pool,
    "HardSigmoid": activation(Activation.HARD_SIGMOID, _LINE, alpha=0.2, beta=0.5),
    "HardSwish": activation(Activation.HARD_SWISH, _LINE, alpha=1 / 6, beta=0.5),
    "Identity": identity,
    "LayerNormalization": layer_norm,
    "LeakyRelu": activation(Activation.LEAKY_RELU, _BELOW_ZERO, alpha=0.01),
    "MatMul": matmul,
    "MaxPool": max_pool,
    "Mul": arithmetic,
    "Pad": pad,
    "ReduceL2": reduction(squares=True),
    "ReduceMean": reduction(mean=True),
    "ReduceSum": reduction(),
    "Relu": relu,
    "Reshape": reshape,
    "Resize": resize,
    "Sigmoid": activation(Activation.SIGMOID),
    "Slice": slices,
    "Softmax": softmax,
    "Split": split,
    "Squeeze": squeeze,
    "Sub": arithmetic,
    "Swish": activation(Activation.SILU),
    "Tanh": activation(Activation.TANH),
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
    "Where": where,
}
"""Lowering rules by operator; a node of any other operator is a fallback."""
