"""Random inputs that an ONNX file of any tool takes, and its own outputs for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from dsr_tool.errors import DsrError, FormatError
from dsr_tool.graph.ir import Value
from dsr_tool.sparsity.tensor import Array
from exporters.onnx.densify import numbers
from exporters.onnx.session import OnnxSession
from exporters.onnx.source import OnnxSource
from exporters.verify.outputs import Outputs

__all__ = ["references"]

_SIDES = (64, 224, 32, 48, 128, 16, 8, 1)
"""Sizes tried for free dimensions of an input until the model takes one; many models ask for multiples of 32."""
_PAIRS = ((48, 192), (48, 320), (32, 100), (320, 320), (640, 640))
"""Heights and widths that are tried after equal ones: readers of text take lines of a fixed height."""
_BATCHES = (1, 3)
"""Sizes of the two batches of inputs: a batch that was captured as a constant shows in one of them."""
_MOST_ENTRIES = 1 << 27
"""Largest number of entries of one random input: half a GiB in float32."""


def references(source: OnnxSource, seed: int) -> tuple[list[Array], list[Outputs], tuple[str, ...]]:
    """Returns random inputs that the source takes, its outputs, and notes on what it does not take."""
    run, value = OnnxSession(source.path).run_all, source.graph.inputs[0]
    random = np.random.default_rng(seed)
    fault: DsrError | None = None
    for shape in _shapes(value):
        first, *more = _BATCHES if value.shape[0] is None else (value.shape[0],)
        x = _random(random, (first, *shape), value.dtype)
        try:
            outputs: list[Outputs] = [numbers(source.path, run(x))]
        except FormatError as error:
            fault = fault or error
            continue
        inputs, notes = [x], cast("tuple[str, ...]", ())
        for batch in more:
            x = _random(random, (batch, *shape), value.dtype)
            try:
                outputs.append(numbers(source.path, run(x)))
                inputs.append(x)
            except FormatError:
                notes = (f"the file says that it takes any batch, and fails on one of {batch}",)
        return inputs, outputs, notes
    free = ",".join("any" if n is None else str(n) for n in value.shape[1:])
    raise FormatError(
        f"{str(source.path)!r} takes inputs of shape {free} and runs on none that was tried ({fault}); give "
        f"--input-shape, such as 3,224,224."
    )


def _shapes(value: Value) -> Iterator[tuple[int, ...]]:
    """Yields shapes of one input that a model with free dimensions may take."""
    own = value.shape[1:]
    free = sum(n is None for n in own)
    pairs = _PAIRS if free == 2 else ()
    seen = set()
    for sizes in itertools.chain(((side,) * free for side in _SIDES), pairs):
        left = iter(sizes)
        shape = tuple(next(left) if n is None else n for n in own)
        if shape not in seen and min(shape, default=1) > 0 and int(np.prod(shape, dtype=object)) <= _MOST_ENTRIES:
            seen.add(shape)
            yield shape


def _random(random: np.random.Generator, shape: Sequence[int], dtype: str) -> Array:
    x = random.standard_normal(shape)
    # Whole numbers are mostly indices.
    return (x if np.dtype(dtype).kind == "f" else np.abs(x)).astype(dtype)
