"""Verifying a network that was made of an ONNX file: its outputs beside those of the file in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dsr_tool.errors import CheckFailed
from dsr_tool.graph.ir import Graph, Value
from dsr_tool.runtime.deploy.session import in_batches
from dsr_tool.sparse.feeding import named_floats
from dsr_tool.sparsity.tensor import Array
from exporters.onnx.session import OnnxSession
from exporters.verify.compare import compare_outputs

__all__ = ["verify_network"]

_COMPARED = ("float32", "float64")
"""Types of inputs of files whose outputs are compared. With others the file rounds far more than the network."""


def verify_network(path: Path, network: nn.Module, graph: Graph, input_shape: tuple[int, ...]) -> None:
    """Compares a network with the ONNX file that it was made of, on one random input.

    Differences have the tolerance of exports: a share of the largest output, and more for networks that round more.
    Not compared are files of float16, outputs that are no real numbers, and files whose outputs are not finite: random
    inputs need not be what a file was made for.

    Args:
        path: the file.
        network: the network with the values of the file.
        graph: the computation of the file.
        input_shape: shape of one input, without the batch.

    Raises:
        CheckFailed: an output differs.
        FormatError: ONNX Runtime refuses the file.
    """
    value = graph.inputs[0]
    if value.dtype not in _COMPARED or not any(np.dtype(one.dtype).kind == "f" for one in graph.outputs):
        return
    session = OnnxSession(path, threads=1)
    finite: list[bool] = []

    def run(x: Array) -> Mapping[str, Array]:
        found = session.run_all(x.astype(value.dtype))
        floats = {name: array.astype(np.float32) for name, array in found.items() if array.dtype.kind == "f"}
        finite.extend(bool(np.isfinite(array).all()) for array in floats.values())
        # Named as the outputs of the network are.
        named = named_floats({name: torch.from_numpy(array) for name, array in floats.items()})
        return {name: tensor.numpy() for name, tensor in named.items()}

    result = compare_outputs(
        path,
        "onnx",
        network,
        runs={"ONNX Runtime": in_batches(run, value.shape[0] or 1)},
        value=Value(value.name, (None, *input_shape), "float32"),
        samples=1,
        seed=0,
        differing=None,
    )
    if result.problems and all(finite):
        raise CheckFailed(
            f"the network that PyTorch makes of {str(path)!r} does not compute what the file computes: "
            f"{result.problems[0]}; export the file itself (dsr-tool export)."
        )
