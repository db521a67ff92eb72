"""Latency of sparse models against the dense model in ONNX Runtime, with other runtimes beside.

Masks and weights are random, also where a model starts with zeros: "uniform" keeps the first convolution dense and all
other weights equally sparse, "erk" gives each layer a density by its shape. All contenders take turns on the same
input in one process; each turn runs twice and times the second run. A ratio is ONNX Runtime's time on the dense model
divided by the contender's in the same round: the median, and the quartiles in parentheses. Loading time and memory are
medians over child processes.

Run: python benchmarks/inference.py [--models resnet50] [--batches 1] [--against openvino scipy] [--threads 1]
[--deepsparse ds/bin/python]
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from inference_contenders import Run, contenders

from converters.conversion import convert
from dsr_tool.formats.archive import open_archive
from dsr_tool.measure.memory.process import Measured, Request, measure
from dsr_tool.measure.pairs import spread
from dsr_tool.runtime.kernels.library import level
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.tensor import Array
from exporters.export import export
from exporters.onnx.write import to_onnx


class Row(NamedTuple):
    """A model and its targets.

    Attributes:
        model: name of a torchvision model.
        distribution: distribution of the densities, `uniform` or `erk`.
        sparsity: fraction of zeros.
        batch: inputs at once.
        least: smallest acceptable ratio.
        aim: ratio that is aimed at.
    """

    model: str
    distribution: str
    sparsity: float
    batch: int
    least: float
    aim: float


TARGETS = {
    ("resnet50", "uniform", 1): {
        0.0: (0.95, 1),
        0.5: (1.15, 1.3),
        0.8: (2.4, 2.8),
        0.9: (4, 5),
        0.95: (6, 7.5),
        0.98: (9, 12),
    },
    ("resnet50", "erk", 1): {0.8: (1.8, 2.2), 0.9: (2.7, 3.3), 0.95: (4.2, 5), 0.98: (7.5, 9)},
    ("resnet50", "uniform", 16): {0.9: (4, 4.8)},
    ("resnet50", "erk", 16): {0.9: (2.7, 3.3)},
    ("resnet18", "uniform", 1): {0.9: (3.5, 4.2)},
    ("resnet18", "erk", 1): {0.9: (2.4, 3)},
    ("vgg16", "erk", 1): {0.9: (1.9, 2.4), 0.95: (2.8, 3.5)},
    ("mobilenet_v2", "uniform", 1): {0.9: (2, 2.6)},
    ("mobilenet_v2", "erk", 1): {0.9: (1.6, 2)},
    ("mobilenet_v2", "erk", 16): {0.9: (2, 2.8)},
    ("vit_b_16", "uniform", 1): {0.9: (2.6, 3.5)},
}
"""The project's targets: smallest acceptable ratio and ratio aimed at by sparsity, for one thread with AVX-512."""

AVX2_TARGETS = {
    ("resnet50", "uniform", 1): {0.5: (1, 1.1), 0.8: (2.2, 2.6), 0.9: (3.6, 4.5), 0.95: (5, 6.5), 0.98: (8.5, 11)},
    ("resnet50", "erk", 1): {0.8: (1.4, 1.8), 0.9: (2.2, 2.8), 0.95: (3.8, 4.5), 0.98: (7, 8.5)},
    ("resnet50", "uniform", 16): {0.9: (3.3, 4)},
    ("resnet50", "erk", 16): {0.9: (2.2, 2.8)},
    ("mobilenet_v2", "uniform", 1): {0.9: (1.8, 2.5)},
    ("mobilenet_v2", "erk", 1): {0.9: (1.4, 1.9)},
    ("mobilenet_v2", "erk", 16): {0.9: (1.9, 2.6)},
    ("vit_b_16", "uniform", 1): {0.9: (2.2, 3)},
}
"""Least and aimed-at ratios of levels below AVX-512, by model, masks and batch, then by sparsity."""

ROWS = [
    Row(model, distribution, sparsity, batch, *ratios)
    for (model, distribution, batch), targets in (TARGETS if level() == "avx512" else AVX2_TARGETS).items()
    for sparsity, ratios in targets.items()
]


def write(row: Row, folder: Path) -> tuple[Path, Path]:
    """Writes the archive and the dense ONNX file of a row, unless they exist."""
    archive = folder / f"{row.model}-{row.distribution}-{row.sparsity:g}.dsr"
    dense = archive.with_suffix(".onnx")
    # Converting, exporting and verifying a model takes far longer than measuring it; `--folder` keeps the files.
    if not archive.exists():
        # As in the uniform models of Evci et al. 2020 (RigL), whose first layer is dense.
        first = {"keep_dense": [first_convolution(row.model)]} if row.distribution == "uniform" else {}
        model = convert(row.model, sparsity=row.sparsity, distribution=row.distribution, seed=0, **first)
        fill_zeros(model)
        export(model, archive)
    if not dense.exists():
        opened = open_archive(archive)
        dense.write_bytes(to_onnx(opened.graph, dict(opened), encoding="dense").SerializeToString())
    return archive, dense


def fill_zeros(model: SparseModel) -> None:
    """Draws weights that start at zero, such as heads of transformers: an output of zeros would hide every error."""
    import torch

    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.module.named_parameters():
            spec = model.specs[name]
            if spec.weight and not weight.any():
                weight.normal_(0, spec.matrix_shape[1] ** -0.5, generator=random)
    model.apply_masks()


def first_convolution(model: str) -> str:
    """Returns the name of the first convolution's weight."""
    import torchvision
    from torch import nn

    module = torchvision.models.get_model(model)
    return next(f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Conv2d))


def seconds(runs: dict[str, Run], x: Array, rounds: int) -> dict[str, list[float]]:
    """Times all contenders in turns; returns their seconds, one for each round."""
    names, times = list(runs), {name: list[float]() for name in runs}
    for index in range(rounds + 2):
        # Each round begins with the next one, so none always runs right after the same other.
        for name in names[index % len(names) :] + names[: index % len(names)]:
            runs[name](x)  # brings its own weights back into the caches
            start = time.perf_counter()
            runs[name](x)
            if index >= 2:  # the first rounds allocate
                times[name].append(time.perf_counter() - start)
    return times


def print_latency(row: Row, arguments: argparse.Namespace) -> None:
    """Measures a row and prints its line."""
    archive, dense = write(row, arguments.folder)
    others = contenders(archive, dense, row.batch, arguments.threads, arguments.against, arguments.deepsparse or "")
    runs = dict(others)
    x = np.random.default_rng(0).standard_normal((row.batch, 3, 224, 224)).astype(np.float32)
    outputs = {name: run(x) for name, run in runs.items()}
    ours, expected = outputs["sparse"], outputs["onnxruntime"]
    if ours is None or expected is None or not expected.any():
        raise SystemExit(f"{archive} has an output of zeros, which hides errors; remove it and its .onnx file.")
    # A speed counts only for the right answer, so the difference stands in the same line.
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    times = seconds(runs, x, arguments.rounds)
    cells = []
    for name in runs:
        if name != "onnxruntime":
            ratio = spread([d / t for d, t in zip(times["onnxruntime"], times[name], strict=True)])
            cells.append((name, f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})", ratio["median"]))
    reached = "aim" if cells[0][2] >= row.aim else "least" if cells[0][2] >= row.least else "below"
    # The times of both sides for orientation: claims are made from the ratios, which were taken round by round.
    ours_ms, dense_ms = (1e3 * statistics.median(times[name]) for name in ("sparse", "onnxruntime"))
    others = "  ".join(f"{name} {text}" for name, text, _ in cells[1:])
    figures = f"{ours_ms:8.2f} {dense_ms:8.2f}  {cells[0][1]:18} {row.least:5g} {row.aim:5g} {reached:7} {error:8.1e}"
    print(f"{start_of_line(row)} {figures}  {others}", flush=True)


def start_of_line(row: Row) -> str:
    """Returns the columns that identify a row."""
    return f"{row.model:13} {row.distribution:8} {row.sparsity:5.2f} {row.batch:3}"


def print_memory(row: Row, arguments: argparse.Namespace) -> None:
    """Measures loading time and memory of a row in child processes and prints its line."""
    archive, dense = write(row, arguments.folder)
    shape = (row.batch, 3, 224, 224)
    medians = {}
    for kind, path in (("sparse", archive), ("onnxruntime", dense)):
        # The median of three: one of them may meet a moment when the machine is busy.
        results = [measure(Request(kind, str(path), shape, threads=arguments.threads)) for _ in range(3)]
        medians[kind] = {n: statistics.median(getattr(r, n) for r in results) for n in Measured.__dataclass_fields__}
    ours, theirs = medians["sparse"], medians["onnxruntime"]
    megabytes = [f"{side[key] / 1e6:8.1f}" for key in ("ready_bytes", "peak_bytes") for side in (ours, theirs)]
    share = ours["ready_bytes"] / theirs["ready_bytes"]
    print(
        f"{start_of_line(row)} {ours['load_s']:8.2f} {theirs['load_s']:8.2f} {' '.join(megabytes)} {share:8.2f}",
        flush=True,
    )


def main() -> None:
    """Prints both tables for the rows that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=sorted({row.model for row in ROWS}))
    parser.add_argument("--distributions", nargs="+", default=["uniform", "erk"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=sorted({row.sparsity for row in ROWS}))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--against", nargs="*", default=["openvino", "torch", "scipy"])
    parser.add_argument(
        "--deepsparse", metavar="PYTHON", help="python of an environment with DeepSparse; see deepsparse_worker.py"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="keep the models in this folder for the next run")
    parser.add_argument("--only", choices=("latency", "memory"))
    arguments = parser.parse_args()
    wanted = [arguments.models, arguments.distributions, arguments.sparsities, arguments.batches]
    rows = [row for row in ROWS if all(value in values for value, values in zip(row[:4], wanted, strict=True))]
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = arguments.folder or Path(folder)
        arguments.folder.mkdir(parents=True, exist_ok=True)
        packages = installed()
        arguments.against = [name for name in arguments.against if name in packages]
        arguments.against += ["deepsparse"] if arguments.deepsparse else []
        versions = ", ".join(f"{name} {number}" for name, number in packages.items())
        print(f"{platform.machine()}, kernels {level()}, {arguments.threads} threads; {versions}")
        start = f"{'model':13} {'masks':8} {'zeros':>5} {'n':>3}"
        if arguments.only != "memory":
            print(f"{start} {'ms':>8} {'dense ms':>8}  {'ratio':18} least   aim reached    error  other ratios")
            for row in rows:
                print_latency(row, arguments)
        if arguments.only != "latency":
            titles = ("load s", "dense s", "held MB", "dense MB", "peak MB", "dense MB", "held /")
            print(start, *(f"{title:>8}" for title in titles))
            for row in rows:
                print_memory(row, arguments)


def installed() -> dict[str, str]:
    """Returns the versions of the installed runtimes."""
    versions = {}
    for name in ("onnxruntime", "openvino", "torch", "scipy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


if __name__ == "__main__":
    main()
