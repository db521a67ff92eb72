"""The child process of a measurement: loads one model, runs or trains it, and prints the memory that it took.

Each kind of work first runs something tiny with the same libraries: code that is imported or generated at the first
call would otherwise be counted as memory of the model.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dsr_tool.measure.memory.process import Measured, Request, held_bytes, reset_peak

if TYPE_CHECKING:
    from dsr_tool.runtime.source import ModelInMemory

__all__ = ["KINDS", "warm_torch"]

_RUNS = 3
"""Inference runs per measurement: onnxruntime lays out its memory in the second run, after it has seen the first."""

_STEPS = 4
"""Training steps per measurement: gradients and optimizer state exist from the second step on."""

Load = Callable[[], Callable[[], object]]
"""Loads a model and returns a function that runs it once."""


def _measure(load: Load, repeats: int) -> Measured:
    # Garbage of the warm-up would be freed during loading, and hide as much of the model's memory.
    gc.collect()
    reset_peak()
    base, start = held_bytes("VmRSS"), time.perf_counter()
    run = load()
    load_s = time.perf_counter() - start
    gc.collect()
    loading, loaded = held_bytes("VmHWM"), held_bytes("VmRSS")
    # From here on the peak is that of running, not of loading.
    reset_peak()
    for _ in range(repeats):
        run()
    peak, ready = held_bytes("VmHWM"), held_bytes("VmRSS")
    return Measured(base, loading - base, loaded - base, peak - base, ready - base, load_s)


def _pytorch(request: Request) -> Measured:
    import torch

    from converters.loading import load

    torch.set_num_threads(1)
    warm_torch()

    def load_model() -> Callable[[], object]:
        module = load(request.path, request.maker).module.eval()
        inputs = torch.zeros(request.shape)

        def run() -> None:
            with torch.inference_mode():
                module(inputs)

        return run

    return _measure(load_model, _RUNS)


def _training(request: Request) -> Measured:
    import torch

    from converters.loading import load
    from dsr_tool.measure.memory.steps import loss_of, make_optimizer
    from dsr_tool.methods import attach

    torch.set_num_threads(1)
    warm_torch()

    def load_model() -> Callable[[], object]:
        dense = request.storage == "dense"
        model = load(request.path, request.maker, storage="masked" if dense else request.storage)
        module = model.module.train()
        optimizer = make_optimizer(request.optimizer, model.module.parameters())
        # `static` has a mask keeper and no updates; an update happens at a moment without activations. Without it the
        # model is gone with its masks, and what is left is the network.
        if not dense:
            attach(model, optimizer, "static")
        inputs = torch.zeros(request.shape)

        def step() -> None:
            loss = loss_of(module, inputs, "fp32")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    return _measure(load_model, _STEPS)


def warm_torch() -> None:
    """Runs a forward pass, a backward pass and an optimizer step of a few layers."""
    import torch
    from torch import nn, optim

    network = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(64, 64, 3, 1, 1), nn.Conv2d(64, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8),
    )  # fmt: skip
    optimizer = optim.SGD(network.parameters(), 1e-3, momentum=0.9)
    network(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    with torch.inference_mode():
        network.eval()(torch.zeros(2, 3, 32, 32))


def _onnxruntime(request: Request) -> Measured:
    import numpy as np

    from exporters.onnx.session import OnnxSession

    OnnxSession(_tiny_onnx()).run(np.zeros((1, 16, 8, 8), np.float32))

    def load_model() -> Callable[[], object]:
        session = OnnxSession(Path(request.path), threads=request.threads)
        # np.zeros would not touch its pages, so the input would not be resident.
        inputs = np.full(request.shape, 0.5, np.float32)
        return lambda: session.run(inputs)

    return _measure(load_model, _RUNS)


def _tiny_onnx() -> bytes:
    """Returns an ONNX file of one convolution and one ReLU."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.zeros((16, 16, 3, 3), np.float32), "w")
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16, 6, 6])
    graph = helper.make_graph(nodes, "tiny", [x], [y], [weight])
    # Old versions, so that every supported onnxruntime reads it.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


def _sparse(request: Request) -> Measured:
    import numpy as np

    from dsr_tool.measure.latency import open_session
    from exporters.containers import reader_of

    reader_of(Path(request.path))  # imports what reading this kind of file needs
    # The first session loads the kernels, or scipy's products; the reference computes dense layers with BLAS.
    tiny = open_session(_tiny_model(), request.kind, 1, request.threads)
    tiny.run(np.zeros((1, 16, 8, 8), np.float32))
    np.ones((64, 64), np.float32) @ np.ones((64, 64), np.float32)

    def load_model() -> Callable[[], object]:
        session = open_session(request.path, request.kind, request.shape[0], request.threads)
        inputs = np.full(request.shape, 0.5, np.float32)
        return lambda: session.run(inputs)

    return _measure(load_model, _RUNS)


def _tiny_model() -> ModelInMemory:
    """Returns a model of one sparse convolution; a dense one would be given to ONNX Runtime, and import it."""
    import numpy as np

    from dsr_tool.graph.ir import Graph, Node, Value
    from dsr_tool.runtime.source import ModelInMemory
    from dsr_tool.sparsity.config import ModelConfig
    from dsr_tool.sparsity.mask import Mask
    from dsr_tool.sparsity.tensor import SparseTensor

    shape = (16, 16, 3, 3)
    mask = Mask.from_bool(np.arange(16 * 16 * 9).reshape(shape) % 20 == 0)
    x, y = Value("x", (None, 16, 8, 8)), Value("y", (None, 16, 6, 6))
    graph = Graph((x,), (y,), (Node("Conv", ("x", "w"), ("y",)),), {}, ("w",), 20)
    weight = SparseTensor.from_dense(np.ones(shape, np.float32), mask)
    return ModelInMemory(Path("tiny"), ModelConfig("module", "tiny"), graph, {"w": weight})


KINDS: dict[str, Callable[[Request], Measured]] = {
    "pytorch": _pytorch,
    "training": _training,
    "onnxruntime": _onnxruntime,
    "sparse": _sparse,
    "scipy": _sparse,
}
"""The work of a child by `Request.kind`."""


def _main(arguments: Sequence[str]) -> None:
    request = Request(**json.loads(arguments[0]))
    print(json.dumps(asdict(KINDS[request.kind](request))))


if __name__ == "__main__":
    _main(sys.argv[1:])
