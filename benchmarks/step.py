"""Time of a sparse training step beside a dense one: forward, loss, backward and fused SGD, steps in turns.

The dense side is PyTorch in the faster of its two memory formats, measured in the same rounds. All sides take turns on
the same inputs, and ratios are computed round by round, so a machine that slows down slows all. With one thread,
processor time counts, with more the wall clock. `--storage masked` and `--storage rebuild` measure masked storage, and
compact storage whose dense weights are rebuilt one layer at a time because kernels are switched off.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from machine import processor
from torch import nn, optim

import dsr_tool
from converters.conversion import convert
from dsr_tool.runtime.kernels.library import level

Step = Callable[[], float]


@dataclass(frozen=True)
class Item:
    """A network and its input.

    Attributes:
        name: name of the network, as `dsr-tool convert` takes it.
        side: side of the square input in pixels.
        batch: images per step.
        classes: number of outputs; None for the network's own.
    """

    name: str
    side: int
    batch: int
    classes: int | None = None


ITEMS = {
    "wrn-28-2": Item("wrn-28-2", 32, 96),
    "resnet18-32": Item("resnet18", 32, 64),
    "resnet50-64": Item("resnet50", 64, 16),
    "resnet50-224": Item("resnet50", 224, 8),
    "mobilenet_v2": Item("mobilenet_v2", 224, 16),
    "vit_b_16": Item("vit_b_16", 224, 8),
}
STORAGES = ("compact", "masked", "rebuild")


def make_step(item: Item, sparsity: float, distribution: str, side: str, threads: int) -> Step:
    """Returns a function that takes one training step and returns its seconds.

    Args:
        item: the network and its input.
        sparsity: fraction of zeros.
        distribution: how they are spread over the layers.
        side: one of `STORAGES`, or `nchw` or `channels_last` for a dense network in that memory format.
        threads: number of threads, which decides the clock.
    """
    dense = side not in STORAGES
    model = convert(
        item.name,
        sparsity=0 if dense else sparsity,
        distribution="uniform" if dense else distribution,
        input_size=item.side,
        num_classes=item.classes,
        seed=0,
    )
    if side in ("compact", "rebuild"):
        model.to_storage("compact")
        model.store.kernels = side == "compact"
    memory_format = torch.channels_last if side == "channels_last" else torch.contiguous_format
    module = model.to(memory_format=memory_format).module.train()
    parameters = list(module.parameters())
    optimizer = optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    # Nothing is attached to the dense side, so the ratio is the whole price of being sparse.
    if not dense:
        dsr_tool.attach(model, optimizer, "dsr", total_steps=100_000)
    generator = torch.Generator().manual_seed(0)
    shape = (item.batch, 3, item.side, item.side)
    images = torch.randn(shape, generator=generator).to(memory_format=memory_format)
    labels = torch.randint(0, 10, (item.batch,), generator=generator)
    clock = time.process_time if threads == 1 else time.perf_counter

    def step() -> float:
        start = clock()
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), labels).backward()
        optimizer.step()
        return clock() - start

    return step


def measure(item: Item, sparsity: float, distribution: str, sides: list[str], rounds: int, threads: int) -> None:
    """Prints one line: the dense step, and for each side the median ratio of dense to sparse with its quartiles."""
    steps = {side: make_step(item, sparsity, distribution, side, threads) for side in ("nchw", "channels_last", *sides)}
    found: list[dict[str, float]] = []
    for index in range(rounds + 2):
        # The order turns, so that none always runs in the state that the same other one leaves.
        names = list(steps)
        names = names[index % len(names) :] + names[: index % len(names)]
        seconds = {name: steps[name]() for name in names}
        if index >= 2:  # the first steps allocate, and make plans
            found.append(seconds)
    best = min(("nchw", "channels_last"), key=lambda name: statistics.median(each[name] for each in found))
    dense = statistics.median(each[best] for each in found)
    cells = []
    for side in sides:
        ratios = sorted(each[best] / each[side] for each in found)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        cells.append(f"{side} {statistics.median(ratios):5.2f} x ({low:.2f} to {high:.2f})")
    label = f"{item.name} {item.side} px, batch {item.batch}, {distribution} {sparsity:g}"
    print(f"{label:45} dense {best:13} {1e3 * dense:7.0f} ms; {'; '.join(cells)}", flush=True)


def main() -> None:
    """Measures the chosen networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", metavar="NETWORK", help=f"of {', '.join(ITEMS)}; default: the first four")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95], help="default: %(default)s")
    parser.add_argument("--distribution", nargs="+", default=["uniform", "erk"], help="default: %(default)s")
    parser.add_argument("--storage", nargs="+", choices=STORAGES, default=["compact"], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.items if name not in ITEMS]
    if unknown:
        parser.error(f"unknown network {unknown[0]!r}; give {', '.join(ITEMS)}.")
    torch.set_num_threads(arguments.threads)
    print(f"{processor()}, kernels {level()}; {arguments.threads} thread(s), torch {torch.__version__}")
    for name in arguments.items or list(ITEMS)[:4]:
        for distribution in arguments.distribution:
            for sparsity in arguments.sparsity:
                measure(ITEMS[name], sparsity, distribution, arguments.storage, arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
