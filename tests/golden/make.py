"""Writes the frozen archives that every later version must read. Run once per format version."""

from pathlib import Path

import numpy as np

from dsr_tool.formats.archive import write_archive
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

SHAPES = {
    "conv": (6, 5, 3, 3),
    "far": (2, 900),
    "most": (4, 7),
    "rows": (5, 9),
    "fc": (3, 4),
    "kept": (40, 30),
    "shift": (5,),
    "scale": (70,),
    "steps": (),
    "flags": (3,),
}
WEIGHTS = ("conv", "far", "most", "rows", "fc", "kept")
FILES = ("delta", "bitmask", "csr", "dense", "palette", "grid", "auto-1.1", "fp16-1.1", "nm", "grid-nm")
"""Files that this version writes. `auto.dsr` and `fp16.dsr` are of version 1.0, which had no palettes and no grids;
`nm.dsr` and `grid-nm.dsr` are of version 1.2."""
PATTERNS = {"conv": (2, 5), "far": (2, 4), "most": (3, 7), "rows": (1, 3), "fc": (1, 4), "kept": (7, 15)}
"""N and M of the weights in the files with masks N:M."""


def active(name: str, file: str = "") -> np.ndarray:
    """Returns the positions of the active entries, by arithmetic alone."""
    i = np.arange(int(np.prod(SHAPES[name])))
    if file.endswith("nm") and name in PATTERNS:
        kept, group = PATTERNS[name]
        taps = int(np.prod(SHAPES[name][2:]))
        output, channel, tap = i // (SHAPES[name][1] * taps), i // taps % SHAPES[name][1], i % taps
        # Each group is turned by a number of places of its own.
        turn = 3 * output + tap + channel // group
        return np.flatnonzero((channel + turn) % group < kept)
    rule = {"conv": i % 7 == 3, "far": i % 601 == 600, "most": i % 3 != 1, "rows": i * i % 5 == 1}
    return np.flatnonzero(rule.get(name, i >= 0))


def values(name: str, file: str) -> np.ndarray:
    """Returns their values, exact in float16, with a negative zero."""
    if name == "steps":
        return np.array([70_000], np.int64)
    if name == "flags":
        return np.array([True, False, True])
    if file.startswith("grid") and name in WEIGHTS:
        return grid(name, file).values
    found = ((active(name, file) - 10) % 97).astype(np.float32) / 8
    found[1] = -0.0
    return found.astype(np.float16) if file.startswith("fp16") and name in WEIGHTS else found


def grid(name: str, file: str) -> GridTensor:
    """Returns a weight on a grid; its first channel has no scale, and its last one codes of both ends."""
    rows = SHAPES[name][0]
    row_of = active(name, file) // (int(np.prod(SHAPES[name])) // rows)
    codes = np.where(row_of == 0, 0, active(name, file) % 255 - 127).astype(np.int8)
    return GridTensor(mask(name, file), codes, np.arange(rows, dtype=np.float32) / 64)


def main(folder: Path = Path(__file__).parent) -> None:
    """Writes the files that a folder lacks."""
    rest = {"shift": "dense", "scale": "dense", "steps": "buffer", "flags": "buffer"}
    graph = Graph(
        (Value("x", (None, 4)),),
        (Value("y", (None, 3)),),
        (Node("Gemm", ("x", "fc", ""), ("y",), {"transB": 1, "alpha": 1.0}),),
        {"k": np.array([1, -2], np.int64)},
        ("fc",),
        18,
    )
    config = ModelConfig("module", "Golden", 3, (4,))
    for file in FILES:
        path = folder / f"{file}.dsr"
        # Files of earlier versions stay as they were written.
        if path.exists():
            continue
        roles = rest if file.endswith("nm") else {"fc": "dense", "kept": "dense", **rest}
        specs = {
            name: LayerSpec(name, shape, "Linear", roles.get(name, "sparse"), name in WEIGHTS, "golden", 1.0)
            for name, shape in SHAPES.items()
        }
        tensors = {name: SparseTensor(mask(name, file), values(name, file)) for name in SHAPES}
        if file.startswith("grid"):
            tensors |= {name: grid(name, file) for name in WEIGHTS}
        encoding = "auto" if "-" in file or file.startswith("grid") else file
        write_archive(path, tensors, specs, graph, config, encoding=encoding)


def mask(name: str, file: str) -> Mask:
    """Returns the mask of one tensor in a file."""
    full = len(active(name, file)) == np.prod(SHAPES[name])
    return Mask(SHAPES[name], None if full else active(name, file))


if __name__ == "__main__":
    main()
