"""Time and peak memory of one update of every method on ResNet-50, beside the same written with full top-k sorts.

The floor to hold is 0.2 s on two cores for dsr. An update is all that happens between two steps: read the active
weights, decide, change masks, weights and optimizer state; for rigl also copying the dense gradients. gmp's is its
first, on the dense model, which is its dearest. static has none. Memory is resident memory above that before the call,
on Linux.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import optim

from converters.convert import convert
from dsr_tool.methods import DSR, SET, GradualPruning, Method, Reallocation, ReallocationSchedule, RigL
from dsr_tool.report.memory.measure import can_measure, held_bytes, reset_peak
from dsr_tool.sparse.active import gather
from dsr_tool.sparse.keeper import MaskKeeper
from dsr_tool.sparse.model import SparseModel

EVERY_STEP = ReallocationSchedule(((0, 1),), 20)


class Ours:
    """A whole update of a method."""

    def __init__(self, model: SparseModel, method: Method) -> None:
        """Make an optimizer whose momentum buffers exist, and keep it inside the masks."""
        self.model, self.method = model, method
        self.optimizer = optim.SGD(model.module.parameters(), lr=0.0, momentum=0.9)
        for parameter in model.module.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.keeper = MaskKeeper(model, self.optimizer)
        self.generator = torch.Generator().manual_seed(0)
        self.moved: Reallocation | None = None

    def prepare(self) -> None:
        """Take the last update back, and give all active weights and all gradients new values."""
        if self.moved is not None:
            self.keeper.move(self.moved.grown, self.moved.dropped)
        with torch.no_grad():
            for name, weight in self.model.weights.items():
                weight.normal_(0, 0.02).masked_fill_(~self.model.masks[name], 0)
                weight.grad = torch.randn_like(weight)
        if isinstance(self.method, DSR):
            # Exactly as many lie below the threshold as are to move.
            self.method.threshold = float(gather(self.model).values.abs().kthvalue(int(self.method.target) + 1).values)

    def __call__(self) -> int:
        """Update once; how many weights were dropped."""
        weights = gather(self.model)
        if self.method.needs_gradients:
            gradients = [weight.grad for weight in self.model.weights.values() if weight.grad is not None]
            weights = replace(weights, gradients=tuple(gradient.detach().clone().reshape(-1) for gradient in gradients))
        self.moved = self.method.update(weights, 1, self.generator)
        self.keeper.move(self.moved.dropped, self.moved.grown)
        return len(self.moved.dropped.flat)


class ByTopk:
    """The same amounts moved with one top-k over all magnitudes to drop and one over random scores to grow."""

    def __init__(self, model: SparseModel, target: int) -> None:
        """Hold all masks and weights as one vector each."""
        self.target = target
        self.mask = torch.cat([mask.reshape(-1) for mask in model.masks.values()])
        self.weights = torch.cat([weight.detach().reshape(-1) for weight in model.weights.values()])

    def prepare(self) -> None:
        """Nothing."""

    def __call__(self) -> int:
        """Move once."""
        dropped = self.weights.abs().masked_fill_(~self.mask, torch.inf).topk(self.target, largest=False).indices
        grown = torch.rand(len(self.mask)).masked_fill_(self.mask, -1).topk(self.target).indices
        self.mask[dropped], self.mask[grown] = False, True
        return len(dropped)


def measure(update: Ours | ByTopk, rounds: int) -> tuple[float, int | None, int]:
    """Median seconds, bytes at the peak of a first call that is not timed, and the weights dropped."""
    update.prepare()
    peak = None
    if can_measure():
        reset_peak()
        before = held_bytes("VmRSS")
        update()
        peak = held_bytes("VmHWM") - before
    times, moved = [], 0
    for _ in range(rounds):
        update.prepare()
        start = time.perf_counter()
        moved = update()
        times.append(time.perf_counter() - start)
    return statistics.median(times), peak, moved


def main() -> None:
    """Print a row for each method and one for the peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--target", type=int, default=400_000, help="weights to move; the paper's number for ResNet-50")
    arguments = parser.parse_args()
    sparse = convert("resnet50", sparsity=0.9, preset="paper")
    print(
        f"ResNet-50, {sparse.prunable_weights:,} sparse weights, {sparse.active_weights:,} active (gmp: all), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; MB are 10^6 bytes"
    )
    makers: dict[str, Callable[[], Ours | ByTopk]] = {
        "dsr": lambda: Ours(sparse, DSR(EVERY_STEP, target=arguments.target)),
        "set": lambda: Ours(sparse, SET(EVERY_STEP)),
        "rigl": lambda: Ours(sparse, RigL(EVERY_STEP)),
        "gmp": lambda: Ours(convert("resnet50", sparsity=0), GradualPruning(EVERY_STEP, final_sparsity=0.9)),
        "two full top-k": lambda: ByTopk(sparse, arguments.target),
    }
    print(f"{'update of':16}{'seconds':>9}{'peak MB':>9}{'dropped':>12}")
    for name, make in makers.items():
        seconds, peak, moved = measure(make(), arguments.rounds)
        print(f"{name:16}{seconds:9.3f}{f'{peak / 1e6:.0f}' if peak is not None else '-':>9}{moved:12,}", flush=True)


if __name__ == "__main__":
    main()
