"""The lowering rule of each operator that has one."""

from __future__ import annotations

from dsr_tool.runtime.compiler.convolution import conv
from dsr_tool.runtime.compiler.elementwise import activation, arithmetic, clip, gelu, relu
from dsr_tool.runtime.compiler.lowering import Rule
from dsr_tool.runtime.compiler.matmul import gemm, matmul
from dsr_tool.runtime.compiler.pooling import average_pool, max_pool
from dsr_tool.runtime.compiler.reduce import global_average_pool, layer_norm, reduce_mean, softmax
from dsr_tool.runtime.compiler.shapes import flatten, reshape, transpose
from dsr_tool.runtime.kernels.ops import Activation

__all__ = ["RULES"]

# The fields of Activate that attributes set; attributes and their defaults are those of the ONNX standard.
_LINE = {"alpha": "slope", "beta": "shift"}
_BELOW_ZERO = {"alpha": "negative_scale"}

RULES: dict[str, Rule] = {
    "Add": arithmetic,
    "AveragePool": average_pool,
    "Clip": clip,
    "Conv": conv,
    "Div": arithmetic,
    "Elu": activation(Activation.ELU, _BELOW_ZERO, alpha=1.0),
    "Flatten": flatten,
    "Gelu": gelu,
    "Gemm": gemm,
    "GlobalAveragePool": global_average_pool,
    "HardSigmoid": activation(Activation.HARD_SIGMOID, _LINE, alpha=0.2, beta=0.5),
    "HardSwish": activation(Activation.HARD_SWISH, _LINE, alpha=1 / 6, beta=0.5),
    "LayerNormalization": layer_norm,
    "LeakyRelu": activation(Activation.LEAKY_RELU, _BELOW_ZERO, alpha=0.01),
    "MatMul": matmul,
    "MaxPool": max_pool,
    "Mul": arithmetic,
    "ReduceMean": reduce_mean,
    "Relu": relu,
    "Reshape": reshape,
    "Sigmoid": activation(Activation.SIGMOID),
    "Softmax": softmax,
    "Sub": arithmetic,
    "Swish": activation(Activation.SILU),
    "Tanh": activation(Activation.TANH),
    "Transpose": transpose,
}
"""Lowering rules by operator; a node of any other operator is a fallback."""
