"""Seconds of a sparse training step beside a dense one: ResNet-18, steps in pairs.

Dense and sparse steps take turns on the same inputs, and ratios are computed pair by pair, so a machine that slows down
slows both. The ratio to hold is 1.03.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn, optim

import dsr_tool
from converters.conversion import convert

BATCHES = {224: 16, 96: 32, 32: 128}
"""Inputs of one step by their side in pixels; smaller inputs come in larger batches."""


def stepper(module: nn.Module, optimizer: optim.Optimizer) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Returns a function that runs one training step and returns its seconds."""

    def step(images: torch.Tensor, labels: torch.Tensor) -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), labels).backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def make_step(*, sparse: bool) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Returns a step of a dense ResNet-18, or of one at sparsity 0.9 with a DSR method attached."""
    model = convert("resnet18", sparsity=0.9 if sparse else 0, seed=0)
    optimizer = optim.SGD(model.module.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    # Nothing is attached to the dense side, so the ratio is the whole price of being sparse.
    if sparse:
        dsr_tool.attach(model, optimizer, "dsr", total_steps=100_000)
    return stepper(model.module, optimizer)


def measure(batch_size: int, size: int, pairs: int) -> None:
    """Prints the median ratio and its quartiles for one shape of input."""
    dense, sparse = make_step(sparse=False), make_step(sparse=True)
    images = torch.randn(batch_size, 3, size, size)
    labels = torch.randint(0, 1000, (batch_size,))
    times = []
    for index in range(pairs + 2):
        # The side that begins alternates, so neither always runs in the state that the other one leaves.
        first, second = (dense, sparse) if index % 2 else (sparse, dense)
        seconds = (first(images, labels), second(images, labels))
        if index >= 2:  # the first step of each kind allocates
            times.append(seconds if index % 2 else seconds[::-1])
    # Ratios within a pair, not of medians: both steps of a pair ran while the machine was equally fast.
    ratios = sorted(sparse_s / dense_s for dense_s, sparse_s in times)
    dense_ms, sparse_ms = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    spread = f"quartiles {ratios[len(ratios) // 4]:.4f} to {ratios[-len(ratios) // 4]:.4f}"
    print(
        f"batch {batch_size:3} of {size:3} px: dense {dense_ms:6.1f} ms, sparse {sparse_ms:6.1f} ms (medians)", end="; "
    )
    print(f"sparse / dense {statistics.median(ratios):.4f} ({spread})")


def main() -> None:
    """Measures at ImageNet's, an intermediate and CIFAR's size; small inputs hide the overhead least."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30, help="pairs of timed steps per size; default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--sizes", type=int, nargs="+", choices=BATCHES, default=list(BATCHES), help="sides in pixels")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"ResNet-18, SGD with Nesterov momentum, {arguments.threads} threads, torch {torch.__version__}")
    for size in arguments.sizes:
        measure(BATCHES[size], size, arguments.pairs)


if __name__ == "__main__":
    main()
