"""Memory of training: the dense network, and a sparse one in masked and in compact storage, computed and measured.

State is what stays from step to step: weights, gradients, optimizer state, and masks or positions. Plans are what the
kernels keep beside it. Each measurement is a child process of its own, which loads the model and trains four steps; its
peak is that of resident memory above the libraries. The dense network is the same network without masks.

Run: python benchmarks/training_memory.py [--cases resnet50@64x16 ...] [--sparsity 0.9] [--optimizers sgd adam]
     [--plain-malloc]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from machine import processor

import dsr_tool
from converters.loading import load
from dsr_tool.measure.memory.ledger import Ledger, training_ledger
from dsr_tool.measure.memory.process import ENVIRONMENT, Request, measure

STORAGES = ("dense", "masked", "compact")
CASES = ("resnet50@64x16", "resnet50@224x8", "wrn-28-2@32x96")
_STATE = ("weights", "masks", "positions", "gradients", "optimizer state")
_HEADERS = (
    "state MB",
    "of dense",
    "/density",
    "plans MB",
    "/density",
    "computed MB",
    "measured MB",
    "difference",
    "of dense",
)


@dataclass(frozen=True)
class Row:
    """The memory of one storage, in bytes.

    Attributes:
        state: weights, gradients, optimizer state, and masks or positions.
        plans: what the kernels keep beside it.
        computed: peak of a step, computed.
        measured: peak of four steps in a child process, above its libraries.
    """

    state: int
    plans: int
    computed: int
    measured: int


@dataclass(frozen=True)
class Case:
    """A network, the side of its inputs in pixels, and their number."""

    name: str
    size: int
    batch: int

    @classmethod
    def of(cls, text: str) -> Case:
        """Reads `name@sizexbatch`."""
        name, _, numbers = text.rpartition("@")
        size, _, batch = numbers.partition("x")
        return cls(name, int(size), int(batch))


def without_masks(ledger: Ledger) -> Ledger:
    """Returns the ledger of the same network without masks, which is what masked storage adds to a dense one."""
    return replace(ledger, held={**ledger.held, "masks": 0}, at_peak={**ledger.at_peak, "masks": 0})


def row(case: Case, folder: Path, storage: str, optimizer: str, environment: Mapping[str, str]) -> Row:
    """Computes and measures one row."""
    shape = (3, case.size, case.size)
    model = load(folder, storage="compact" if storage == "compact" else "masked")
    ledger = training_ledger(model, case.batch, input_shape=shape, optimizer=optimizer)
    if storage == "dense":
        ledger = without_masks(ledger)
    state = sum(ledger.held.get(kind, 0) for kind in _STATE)
    request = Request("training", str(folder), (case.batch, *shape), optimizer, storage=storage)
    measured = measure(request, environment)
    return Row(state, ledger.held.get("plans", 0), ledger.peak_bytes, measured.peak_bytes)


def lines(rows: dict[str, Row], density: float) -> Iterator[str]:
    """Yields a line for each storage; shares are those of the dense network's figures."""
    dense = rows["dense"]
    for storage, this in rows.items():
        state, both = this.state / dense.state, (this.state + this.plans) / dense.state
        cells = (
            f"{this.state / 1e6:.1f}",
            f"{state:.3f}",
            f"{state / density:.2f}",
            f"{this.plans / 1e6:.1f}",
            f"{both / density:.2f}",
            f"{this.computed / 1e6:.1f}",
            f"{this.measured / 1e6:.1f}",
            f"{this.computed / this.measured - 1:+.1%}",
            f"{this.measured / dense.measured:.2f}",
        )
        yield f"  {storage:8} " + " ".join(f"{cell:>11}" for cell in cells)


def main() -> None:
    """Prints a table for each case and optimizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="NAME@SIZExBATCH")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--distribution", default="uniform")
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adam"])
    parser.add_argument("--plain-malloc", action="store_true", help="measure without a fixed MALLOC_MMAP_THRESHOLD_")
    arguments = parser.parse_args()
    environment = dict(ENVIRONMENT)
    if arguments.plain_malloc:
        del environment["MALLOC_MMAP_THRESHOLD_"]
    print(f"{processor()}, torch {version('torch')}; MB are 10^6 bytes; the second /density has plans too")
    for case in map(Case.of, arguments.cases):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            model = dsr_tool.convert(
                case.name, sparsity=arguments.sparsity, distribution=arguments.distribution, input_size=case.size
            )
            model.save(folder)
            density = model.active_weights / model.prunable_weights
            del model
            for optimizer in arguments.optimizers:
                print(
                    f"{case.name}, {case.size} px, batch {case.batch}, {optimizer}, {arguments.distribution}, density "
                    f"{density:.3f}"
                )
                print(" " * 11 + " ".join(f"{header:>11}" for header in _HEADERS))
                rows = {storage: row(case, folder, storage, optimizer, environment) for storage in STORAGES}
                print("\n".join(lines(rows, density)), flush=True)


if __name__ == "__main__":
    main()
