"""Peak memory of a conversion from a file of trained weights, until the model folder is written.

Each measurement is a child process. It converts a small network first, so that libraries and what torch generates for
a capture are not part of the figure; its peak is that of resident memory above them. The file has random weights, and
norms with random statistics, since the norms of a new network would be left alone.

Run: python benchmarks/conversion_memory.py [--models resnet50 ...] [--sparsity 0.9]
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from machine import processor
from safetensors.torch import save_file

from converters.conversion import AUTO, convert
from converters.torchvision_builders import build
from dsr_tool.calibrate.memory import release_freed
from dsr_tool.measure.memory.process import ENVIRONMENT, held_bytes, reset_peak

MODELS = ("resnet18", "resnet50")
_WARM = "squeezenet1_1"


def write_weights(name: str, path: Path) -> int:
    """Writes weights as a training leaves them, and returns their bytes."""
    torch.manual_seed(0)
    state = build(name).state_dict()
    for key, tensor in state.items():
        if key.endswith("running_mean"):
            tensor.normal_(0, 0.3)
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def child(name: str, weights: Path, sparsity: float) -> None:
    """Converts and saves; prints peak bytes, bytes of the model that is left, and seconds."""
    torch.set_num_threads(1)
    warm = weights.with_name(f"warm{weights.suffix}")
    write_weights(_WARM, warm)
    convert(_WARM, weights=str(warm), sparsity=0.5, storage=AUTO)
    gc.collect()
    release_freed()
    reset_peak()
    base, start = held_bytes("VmRSS"), time.perf_counter()
    model = convert(name, weights=str(weights), sparsity=sparsity, storage=AUTO)
    model.save(weights.with_name("model"))
    took = time.perf_counter() - start
    peak = held_bytes("VmHWM")
    gc.collect()
    release_freed()
    print(peak - base, held_bytes("VmRSS") - base, took)


def main() -> None:
    """Prints a line for each model and kind of file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], Path(arguments.child[1]), arguments.sparsity)
        return
    print(f"{processor()}, torch {version('torch')}; MB are 10^6 bytes above the libraries")
    for name in arguments.models:
        for ending in ("pth", "safetensors"):
            with tempfile.TemporaryDirectory() as folder:
                weights = Path(folder) / f"weights.{ending}"
                dense = write_weights(name, weights)
                line = [sys.executable, __file__, "--sparsity", str(arguments.sparsity), "--child", name, str(weights)]
                done = subprocess.run(
                    line, check=True, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
                )
                peak, left, took = map(float, done.stdout.split()[-3:])
                print(
                    f"{name} from .{ending}: {dense / 1e6:.1f} MB of weights, peak {peak / 1e6:.1f} MB, "
                    f"{left / 1e6:.1f} MB left, {took:.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
