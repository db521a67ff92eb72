"""Takes one model through the whole chain: convert, archive, load back, ONNX, both runtimes; one row of the zoo.

    python benchmarks/zoo_row.py resnet18 --input-shape 3,64,64

prints one JSON object. `benchmarks/zoo.py` runs this script once per model, so that the peak of memory is that of one
model.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from machine import processor
from torch import nn

from converters.conversion import convert
from converters.loading import load
from dsr_tool.errors import DsrError
from dsr_tool.measure.memory.process import held_bytes
from dsr_tool.runtime.kernels.library import level
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.trace import trace
from exporters.export import export
from exporters.verify.result import Verification

SPARSITY = 0.9
"""Fraction of zeros among the prunable weights."""

_NOISE = 0.1
"""Standard deviation of the noise that is added to biases and norm parameters."""

_BATCH = 16
"""Inputs from which batch norms take their statistics; four for inputs of `_LARGE_INPUT` entries or more."""

_LARGE_INPUT = 3 * 128 * 128


@torch.no_grad()
def enliven(model: SparseModel, seed: int = 0) -> float:
    """Makes a random model behave like a trained one, so that an error in any layer reaches its output.

    Fresh networks hide their layers: layer scale starts at 1e-6, heads at zero, norms do nothing, and at a sparsity
    of 0.9 signals fade. Therefore sparse weights are scaled by the inverse root of their density (weights that are all
    zero are drawn anew), every other parameter gets noise, and batch norms take the statistics of one batch.

    Args:
        model: the model, whose weights are changed in place; masks stay.
        seed: seed of the noise and the batch.

    Returns:
        Largest difference between the outputs of two random inputs, as a fraction of the largest output.
    """
    random = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=random)

    parameters = dict(model.module.named_parameters())
    for name, spec in model.specs.items():
        if spec.role == "buffer":
            continue
        value = parameters[name]
        if spec.weight and not value.any():
            value.copy_(noise(value) / math.sqrt(spec.matrix_shape[1]))
        elif not spec.weight:
            value.add_(_NOISE * noise(value))
        # A sum over fewer inputs has a smaller variance, by the density.
        if name in model.masks:
            value.div_(math.sqrt(float(model.masks[name].float().mean())))
    model.apply_masks()
    model.module.eval()
    shape = model.config.input_shape
    norms = [layer for layer in model.module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    for layer in norms:
        layer.train()
        # The running statistics become those of the one batch that follows.
        layer.momentum = 1.0
    if norms:
        # Few samples underestimate some variances, and dividing by those makes values grow from layer to layer.
        model(torch.randn(_BATCH if math.prod(shape) < _LARGE_INPUT else 4, *shape, generator=random))
    model.module.eval()
    # Two inputs, whose outputs differ only if the signal reaches the output.
    outputs = model(torch.randn(2, *shape, generator=random))
    outputs = outputs["out"] if isinstance(outputs, Mapping) else outputs
    return float((outputs[0] - outputs[1]).abs().max() / outputs.abs().max())


def measure(name: str, input_shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns the row of one model.

    Args:
        name: its name in torchvision.
        input_shape: shape of one input; if empty, the architecture's own.
    """
    start = time.perf_counter()
    row = {"model": name, **chain(convert(name, sparsity=SPARSITY, input_shape=input_shape, seed=0))}
    return row | {"seconds": time.perf_counter() - start, "peak_bytes": held_bytes("VmHWM"), "machine": _machine()}


def chain(model: SparseModel, fresh: nn.Module | None = None) -> dict[str, Any]:
    """Exports a converted model in each form and compares what comes back; changes its weights first.

    Args:
        model: the model, with an input shape.
        fresh: another module of the same architecture, for models that torchvision does not know by name.
    """
    spread = enliven(model)
    row: dict[str, Any] = {
        "input_shape": list(model.config.input_shape),
        "parameters": model.parameters,
        "prunable": model.prunable_weights,
        "active": model.active_weights,
        "model_sparsity": model.model_sparsity,
        "spread": spread,
        **_bytes(model),
    }
    # Both exports trace the same module, which takes longer than everything else, so the second trace is cached.
    with tempfile.TemporaryDirectory() as folder, mock.patch("exporters.checked.trace", functools.cache(trace)):
        archive = export(model, Path(folder) / "model.dsr")
        row["bit_for_bit"] = archive.weights_equal and _same(model, load(archive.path, fresh))
        onnx = export(model, Path(folder) / "model.onnx")
    return row | {
        "archive_bytes": archive.file_bytes,
        "onnx_bytes": onnx.file_bytes,
        "relative": {
            "archive in the sparse runtime": _relative(archive, "sparse"),
            "archive in onnxruntime": _relative(archive, "onnxruntime"),
            "onnx in onnxruntime": _relative(onnx, "onnxruntime"),
        },
        "notes": [*archive.notes, *onnx.notes],
    }


def _bytes(model: SparseModel) -> dict[str, int]:
    """Returns the bytes of the state_dict and of its bound: log2 C(n, active) bits per mask, values and rest raw."""
    dense, bound = 0, 0.0
    for tensor in model.tensors().values():
        width = tensor.values.dtype.itemsize
        dense += tensor.mask.size * width
        bound += tensor.mask.entropy_bound_bits / 8 + tensor.mask.active * width
    return {"dense_bytes": dense, "bound_bytes": math.ceil(bound)}


def _same(model: SparseModel, other: SparseModel) -> bool:
    """Returns whether every tensor and every mask of the two models have the same bits."""
    ours, theirs = model.module.state_dict(), other.module.state_dict()
    return (
        ours.keys() == theirs.keys()
        and model.masks.keys() == other.masks.keys()
        and all(torch.equal(_bits(ours[name]), _bits(theirs[name])) for name in ours)
        and all(torch.equal(model.masks[name], other.masks[name]) for name in model.masks)
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # Compared as integers: NaN differs from itself, and -0 equals +0.
    return tensor.contiguous().view(torch.int32) if tensor.dtype == torch.float32 else tensor


def _relative(verification: Verification, runtime: str) -> float | None:
    """Returns the largest difference to PyTorch as a fraction of the largest output; None if it did not run."""
    difference = verification.runtimes.get(runtime)
    return None if difference is None else difference / verification.scale


def _machine() -> str:
    """Returns versions and hardware in words."""
    names = ("torch", "torchvision", "onnxruntime", "numpy", "scipy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    ours = f"kernels {level()}" if level() else "scipy"
    hardware = f"{platform.system()}, {os.cpu_count()} cores of {processor()}"
    return f"Python {platform.python_version()}, {versions}, our own runtime on {ours}; on {hardware}"


def main() -> None:
    """Prints the row of one model, or its error, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--input-shape", default="", help="such as 3,64,64; default: the architecture's")
    arguments = parser.parse_args()
    shape = tuple(int(n) for n in arguments.input_shape.split(",") if n)
    # One thread a model: zoo.py runs several models at once.
    torch.set_num_threads(1)
    try:
        row = measure(arguments.name, shape)
    except DsrError as error:
        # A row all the same: the table lists what failed.
        row = {"model": arguments.name, "input_shape": list(shape), "error": str(error)}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
