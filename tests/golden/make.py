"""Writes the frozen archives that every later version must read; run once per format version."""

from pathlib import Path

import numpy as np

from dsr_tool.core.archive import write_archive
from dsr_tool.core.codecs import SparseTensor
from dsr_tool.core.config import ModelConfig
from dsr_tool.core.graph import Graph, Node, Value
from dsr_tool.core.layers import LayerSpec
from dsr_tool.core.mask import Mask

SHAPES = {"conv": (6, 5, 3, 3), "far": (2, 900), "most": (4, 7), "rows": (5, 9), "fc": (3, 4)}


def active(name: str) -> np.ndarray:
    """Which entries are active, by arithmetic alone."""
    i = np.arange(np.prod(SHAPES[name]))
    rule = {"conv": i % 7 == 3, "far": i % 601 == 600, "most": i % 3 != 1, "rows": i * i % 5 == 1, "fc": i >= 0}
    return np.flatnonzero(rule[name])


def values(name: str) -> np.ndarray:
    """Their values, exact in float32, with a negative zero."""
    found = (active(name) - 10).astype(np.float32) / 8
    found[1] = -0.0
    return found


def main() -> None:
    """Write the files beside this script."""
    tensors, specs = {}, {}
    for name, shape in SHAPES.items():
        role = "dense" if name == "fc" else "sparse"
        specs[name] = LayerSpec(name, shape, "Linear", role, True, "golden", 1.0)
        tensors[name] = SparseTensor(Mask(shape, active(name)), values(name))
    graph = Graph(
        (Value("x", (None, 4)),),
        (Value("y", (None, 3)),),
        (Node("Gemm", ("x", "fc", ""), ("y",), {"transB": 1, "alpha": 1.0}),),
        {"k": np.array([1, -2], np.int64)},
        ("fc",),
        18,
    )
    config = ModelConfig("module", "Golden", 3, (4,))
    for encoding in ("delta", "bitmask", "csr", "dense"):
        path = Path(__file__).with_name(f"{encoding}.dsr")
        write_archive(path, tensors, specs, graph, config, encoding=encoding, force=True)


if __name__ == "__main__":
    main()
