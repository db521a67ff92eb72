"""Small archives, their plans, and the library's functions as ctypes sees them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsr_tool.errors import UsageError
from dsr_tool.formats.archive import open_archive, write_archive
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime.deploy.library import LevelRow, level_rows, library
from dsr_tool.runtime.deploy.writer import chosen_levels, plan_bytes
from dsr_tool.sparsity.config import ModelConfig, Preprocessing
from dsr_tool.sparsity.grid_rounding import to_grid
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

SHAPE, CLASSES = (3, 40, 36), 7
PADS = {"pads": (1, 1, 1, 1)}
Network = tuple[dict[str, tuple[int, ...]], list[Node], list[str]]
"""Shapes of the weights, nodes, and names of the outputs."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of this folder where the library was not built."""
    try:
        library()
    except UsageError as error:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=str(error)))


def _gated() -> Network:
    """A depthwise convolution, a gate for each channel, and a linear layer."""
    shapes = {"stem": (16, 3, 3, 3), "depth": (16, 1, 3, 3), "squeeze": (4, 16, 1, 1), "excite": (16, 4, 1, 1)}
    nodes = [
        Node("Conv", ("x", "stem"), ("a",), {"strides": (2, 2), **PADS}),
        Node("HardSwish", ("a",), ("b",)),
        Node("Conv", ("b", "depth"), ("c",), {"group": 16, **PADS}),
        Node("Relu", ("c",), ("d",)),
        Node("GlobalAveragePool", ("d",), ("e",)),
        Node("Conv", ("e", "squeeze"), ("f",)),
        Node("Relu", ("f",), ("g",)),
        Node("Conv", ("g", "excite"), ("h",)),
        Node("Sigmoid", ("h",), ("i",)),
        Node("Mul", ("d", "i"), ("j",)),
        Node("Conv", ("j", "wide"), ("k",), PADS),
        Node("Add", ("k", "b"), ("l",)),
        Node("GlobalAveragePool", ("l",), ("m",)),
        Node("Flatten", ("m",), ("n",)),
        Node("Gemm", ("n", "head"), ("scores",), {"transB": 1}),
    ]
    return {**shapes, "wide": (16, 16, 3, 3), "head": (CLASSES, 16)}, nodes, ["scores"]


def _heads() -> Network:
    """Maps of two resolutions and a vector; the first one is read by other nodes as well."""
    shapes = {"a": (12, 3, 3, 3), "b": (20, 12, 3, 3), "c": (20, 20, 1, 1)}
    nodes = [
        Node("Conv", ("x", "a"), ("fine",), PADS),
        Node("Relu", ("fine",), ("r",)),
        Node("Conv", ("r", "b"), ("s",), {"strides": (2, 2), **PADS}),
        Node("Sigmoid", ("s",), ("coarse",)),
        Node("Conv", ("coarse", "c"), ("t",)),
        Node("GlobalAveragePool", ("t",), ("vector",)),
    ]
    return shapes, nodes, ["vector", "fine", "coarse"]


NETWORKS = {"gated": (_gated, 0), "few bits": (_gated, 8), "heads": (_heads, 0)}
"""Networks, and the bits of their weights; 0 for float32."""


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Archives of `NETWORKS` by name."""
    folder = tmp_path_factory.mktemp("archives")
    return {name: _write(folder / f"{name}.dsr", *entry) for name, entry in NETWORKS.items()}


def _write(
    path: Path, network: Callable[[], tuple[dict[str, tuple[int, ...]], list[Node], list[str]]], bits: int
) -> Path:
    shapes, nodes, outputs = network()
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes.items():
        mask = rng.random(shape) < (0.3 if name != "head" else 0.9)
        values = rng.standard_normal(int(mask.sum())) * (
            0.3 if name == "head" else 1
        )  # no class with all of the chance
        tensor = SparseTensor(Mask.from_bool(mask), values.astype(np.float32))
        tensors[name] = to_grid(tensor, bits) if bits else tensor
    graph = Graph(
        (Value("x", (None, *SHAPE)),),
        tuple(Value(name, (None, CLASSES) if name == "scores" else (None,) * 4) for name in outputs),
        tuple(nodes),
        {},
        tuple(shapes),
        20,
    )
    specs = {name: LayerSpec(name, one.mask.shape, "Conv2d", "sparse", True, "") for name, one in tensors.items()}
    labels = tuple(f"class {index}" for index in range(CLASSES))
    picture = Preprocessing(resize=44, crop=36, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    config = ModelConfig("module", "Net", CLASSES, SHAPE, picture, labels if outputs == ["scores"] else ())
    write_archive(path, tensors, specs, graph, config)
    return path


@pytest.fixture(scope="session")
def levels() -> tuple[LevelRow, ...]:
    """The levels that the library holds, fastest first."""
    return level_rows()


@pytest.fixture(scope="session")
def plan_of(archives: dict[str, Path]) -> Callable[..., bytes]:
    """Returns a function that makes the plan of an archive, for all levels or for some."""

    def make(name: str = "gated", batch: int = 1, levels: tuple[str, ...] = ()) -> bytes:
        return plan_bytes(open_archive(archives[name]), batch, chosen_levels(levels))

    return make


@pytest.fixture(scope="session")
def plan_path(plan_of: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of batch 1, for all levels."""
    path = tmp_path_factory.mktemp("plan") / "net.dsrplan"
    path.write_bytes(plan_of())
    return path


@pytest.fixture(scope="session")
def compiler() -> str:
    """A compiler for C and C++ whose programs start here."""
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("there is no C++ compiler here")
    return found


@pytest.fixture(scope="session")
def linked() -> list[str]:
    """Arguments that link a program with the library, which it then finds where it lies."""
    return [str(library()), f"-Wl,-rpath,{library().parent}"]


@pytest.fixture(scope="session")
def called() -> Callable[..., str]:
    """Returns a function that runs a program, which must succeed, and returns what it prints."""

    def call(*command: str | Path) -> str:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return call
