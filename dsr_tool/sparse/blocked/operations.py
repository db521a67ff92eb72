"""One name for each operation, whether a network calls a module, a function or a method for it.

`OPERATIONS` is the table: the name, and the functions, methods and modules that mean it. Names are those of torch's
functions. Arguments are read by name, with torch's own defaults.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from dsr_tool.sparse.compact.marks import plain_class

__all__ = [
    "AUGMENTED",
    "Operation",
    "called_name",
    "in_place_argument",
    "module_kind",
    "operation_of",
    "names_a_write",
    "writes_in_place",
]


class Spelling(NamedTuple):
    """The ways to write an operation.

    Attributes:
        parameters: names of the arguments of the functions and methods, in order.
        defaults: values of those that may be left out; of modules, the attributes of the same name are read.
        functions: functions.
        methods: methods of tensors; those with a trailing underscore are meant as well.
        modules: classes of modules.
    """

    parameters: tuple[str, ...]
    defaults: Mapping[str, Any] = {}
    functions: tuple[Any, ...] = ()
    methods: tuple[str, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()


_X = ("input",)
_OTHER = ("input", "other")
_DIM = ("input", "dim", "keepdim")

OPERATIONS: dict[str, Spelling] = {
    "relu": Spelling(_X, {}, (torch.relu, torch.relu_, functional.relu, functional.relu_), ("relu",), (nn.ReLU,)),
    "relu6": Spelling(_X, {}, (functional.relu6,), (), (nn.ReLU6,)),
    "sigmoid": Spelling(_X, {}, (torch.sigmoid, functional.sigmoid), ("sigmoid",), (nn.Sigmoid,)),
    "silu": Spelling(_X, {}, (functional.silu,), (), (nn.SiLU,)),
    "hardsigmoid": Spelling(_X, {}, (functional.hardsigmoid,), (), (nn.Hardsigmoid,)),
    "hardswish": Spelling(_X, {}, (functional.hardswish,), (), (nn.Hardswish,)),
    "leaky_relu": Spelling(
        ("input", "negative_slope"), {"negative_slope": 0.01}, (functional.leaky_relu, functional.leaky_relu_), (),
        (nn.LeakyReLU,),
    ),
    "gelu": Spelling(("input", "approximate"), {"approximate": "none"}, (functional.gelu,), (), (nn.GELU,)),
    "elu": Spelling(("input", "alpha"), {"alpha": 1.0}, (functional.elu, functional.elu_), (), (nn.ELU,)),
    "tanh": Spelling(_X, {}, (torch.tanh, functional.tanh), ("tanh",), (nn.Tanh,)),
    "mish": Spelling(_X, {}, (functional.mish,), (), (nn.Mish,)),
    "softplus": Spelling(
        ("input", "beta", "threshold"), {"beta": 1.0, "threshold": 20.0}, (functional.softplus,), (), (nn.Softplus,)
    ),
    "hardtanh": Spelling(
        ("input", "min_val", "max_val"), {"min_val": -1.0, "max_val": 1.0}, (functional.hardtanh,), (), (nn.Hardtanh,)
    ),
    "neg": Spelling(_X, {}, (operator.neg, torch.neg), ("neg",)),
    "abs": Spelling(_X, {}, (operator.abs, torch.abs), ("abs",)),
    "identity": Spelling(_X, {}, (), ("contiguous",), (nn.Identity,)),
    "detach": Spelling(_X, {}, (torch.detach,), ("detach",)),
    "dropout": Spelling(
        ("input", "p", "training"), {"p": 0.5, "training": True}, (functional.dropout,), (), (nn.Dropout,)
    ),
    "dropout2d": Spelling(
        ("input", "p", "training"), {"p": 0.5, "training": True}, (functional.dropout2d,), (), (nn.Dropout2d,)
    ),
    "stochastic_depth": Spelling(("input", "p", "mode", "training"), {"training": True}),
    "add": Spelling(_OTHER, {}, (operator.add, operator.iadd, torch.add), ("add",)),
    "sub": Spelling(_OTHER, {}, (operator.sub, operator.isub, torch.sub), ("sub",)),
    "mul": Spelling(_OTHER, {}, (operator.mul, operator.imul, torch.mul), ("mul",)),
    "div": Spelling(_OTHER, {}, (operator.truediv, operator.itruediv, torch.div), ("div",)),
    "cat": Spelling(("tensors", "dim"), {"dim": 0}, (torch.cat, torch.concat, torch.concatenate)),
    "chunk": Spelling(("input", "chunks", "dim"), {"dim": 0}, (torch.chunk,), ("chunk",)),
    "split": Spelling(("input", "split_size", "dim"), {"dim": 0}, (torch.split,), ("split",)),
    "flatten": Spelling(
        ("input", "start_dim", "end_dim"), {"start_dim": 0, "end_dim": -1}, (torch.flatten,), ("flatten",),
        (nn.Flatten,),
    ),
    "transpose": Spelling(("input", "dim0", "dim1"), {}, (torch.transpose, torch.swapaxes), ("transpose", "swapaxes")),
    "max_pool2d": Spelling(
        ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
        {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False},
        (functional.max_pool2d, torch.max_pool2d), (), (nn.MaxPool2d,),
    ),
    "avg_pool2d": Spelling(
        ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
        {"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None},
        (functional.avg_pool2d,), (), (nn.AvgPool2d,),
    ),
    "adaptive_avg_pool2d": Spelling(
        ("input", "output_size"), {}, (functional.adaptive_avg_pool2d,), (), (nn.AdaptiveAvgPool2d,)
    ),
    "mean": Spelling(_DIM, {"dim": None, "keepdim": False}, (torch.mean,), ("mean",)),
    "batch_norm": Spelling(
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5},
        (functional.batch_norm,),
    ),
    "prelu": Spelling(("input", "weight"), {}, (torch.prelu, functional.prelu)),
    "getattr": Spelling(("input", "name"), {}, (getattr,)),
    "getitem": Spelling(("input", "index"), {}, (operator.getitem,)),
    "size": Spelling(("input", "dim"), {"dim": None}, (), ("size",)),
    "rank": Spelling(_X, {}, (), ("dim", "ndimension")),
    "view": Spelling(("input",), {}, (torch.reshape,), ("view", "reshape")),
}  # fmt: skip
"""Every operation that has a step of its own; the others are called as they are."""

_FUNCTIONS = {id(function): name for name, row in OPERATIONS.items() for function in row.functions}
_METHODS = {method: name for name, row in OPERATIONS.items() for method in row.methods}
_MODULES = {kind: name for name, row in OPERATIONS.items() for kind in row.modules}
_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d, nn.MultiheadAttention, nn.PReLU, nn.Dropout1d,
)  # fmt: skip
"""Modules with parameters, or without a row, which have steps of their own."""


class Operation(NamedTuple):
    """An operation in a graph.

    Attributes:
        name: a key of `OPERATIONS`.
        arguments: what it is called with, by name: nodes and constants.
    """

    name: str
    arguments: dict[str, Any]


def operation_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Operation | None:
    """Returns the operation of a node, or None if it has no name here or is called in a way that has no name.

    Args:
        node: any node.
        modules: the modules that nodes call, by name.
    """
    if node.op == "call_module":
        module = modules[str(node.target)]
        kind = module_kind(module)
        name = _MODULES.get(kind) if kind else None
        if name is None or len(node.args) != 1 or node.kwargs:
            return None
        row = OPERATIONS[name]
        return Operation(
            name, {"input": node.args[0]} | {each: getattr(module, each, None) for each in row.parameters[1:]}
        )
    name = _name_of(node)
    if name is None:
        return None
    if name == "view":
        sizes = node.args[1:] or tuple(node.kwargs.values())
        return Operation(name, {"input": node.args[0], "sizes": sizes}) if sizes else None
    return _bound(name, OPERATIONS[name], node)


def _name_of(node: fx.Node) -> str | None:
    if node.op == "call_method":
        return _METHODS.get(str(node.target).removesuffix("_"))
    if node.op != "call_function":
        return None
    target: Any = node.target
    if getattr(target, "__name__", "") == "stochastic_depth" and target.__module__.startswith("torchvision"):
        return "stochastic_depth"
    return _FUNCTIONS.get(id(target))


def _bound(name: str, row: Spelling, node: fx.Node) -> Operation | None:
    given = dict(zip(row.parameters, node.args, strict=False)) | dict(node.kwargs)
    given.pop("inplace", None)
    extra = len(node.args) - len(row.parameters)
    # One positional argument more than there are names is `inplace`.
    if extra > 1 or (extra == 1 and not isinstance(node.args[-1], bool)):
        return None
    if not given.keys() <= set(row.parameters) or not set(row.parameters) <= given.keys() | row.defaults.keys():
        return None
    return Operation(name, {**row.defaults, **given})


def module_kind(module: nn.Module) -> type[nn.Module] | None:
    """Returns the class of torch.nn whose `forward` a module has, if there is a step for it; else None."""
    kind = plain_class(module)
    for known in (*_MODULES, *_LAYERS):
        if issubclass(kind, known):
            same = kind.forward is known.forward
            # A norm checks its input and a convolution pads in methods of their own.
            inner = all(
                getattr(kind, name, None) is getattr(known, name, None)
                for name in ("_conv_forward", "_check_input_dim")
            )
            if same and inner and not hasattr(module, "parametrizations"):
                return known
    return None


def writes_in_place(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Returns whether a node writes into its first argument, as far as its spelling tells."""
    if node.op == "call_module":
        return getattr(modules[str(node.target)], "inplace", False) is True
    if node.op not in ("call_method", "call_function"):
        return False
    if node.target in AUGMENTED or names_a_write(called_name(node)):
        return True
    return node.op == "call_function" and bool(in_place_argument(node))


AUGMENTED: dict[Any, Callable[[Any, Any], Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
"""Augmented assignments, and what they assign."""


def called_name(node: fx.Node) -> str:
    """Returns the name of the method or the function that a node calls; empty if the function has none."""
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))


def names_a_write(name: str) -> bool:
    """Returns whether a function or method of this name writes into its first argument, as torch names them."""
    return name.endswith("_") and not name.endswith("__")


def in_place_argument(node: fx.Node) -> Any:
    """Returns the argument `inplace` of a call of a function, by name or by position; None if there is none."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"]
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    place = names.index("inplace") if "inplace" in names else len(node.args)
    return node.args[place] if place < len(node.args) else None
