"""Takes every torchvision classifier, and more, through the whole chain, and writes docs/zoo.md.

    python benchmarks/zoo.py                     measure all missing rows, then write the table
    python benchmarks/zoo.py 'resnet*' vgg16     measure these models only, then write the table of all rows
    python benchmarks/zoo.py --again             measure existing rows again

Each model runs in a process of its own (`zoo_row.py`) and adds a line to a file of rows as soon as it is done, so an
interrupted run continues where it stopped. The table holds the rows that exist.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torchvision import models
from zoo_table import passed, table

from converters.torchvision_builders import architectures

_HERE = Path(__file__).resolve().parent
_TIMEOUT_S = 1800
"""Seconds after which a model is given up."""

_SIDE = 64
"""Side of the input in pixels, unless a model needs another one."""

_LARGE = 180e6
"""Parameters from which models run one at a time: two of them would not fit into 16 GB."""

BEYOND = {
    "lraspp_mobilenet_v3_large": (3, 96, 96),
    "fcn_resnet50": (3, 96, 96),
    "deeplabv3_resnet50": (3, 96, 96),
    "r3d_18": (3, 8, 64, 64),
    "mc3_18": (3, 8, 64, 64),
    "r2plus1d_18": (3, 8, 64, 64),
    "mvit_v2_s": (3, 16, 224, 224),
    "swin3d_t": (3, 8, 64, 64),
}
"""Models of segmentation and video with the shape of their input."""

_OWN_SIZE = ("maxvit", "vit_")
"""Families whose position tables fix the size of the input."""

_SIDES = {"inception_v3": 96, "wide_resnet101_2": 128, "efficientnet_v2_l": 160}
"""Larger sides: Inception's pools need one, the others' batch norms amplify rounding less with it."""


def input_shape(name: str) -> tuple[int, ...]:
    """Returns a small input shape if the model allows one; an empty one stands for the model's own."""
    if name in BEYOND:
        return BEYOND[name]
    if name.startswith(_OWN_SIZE):
        return ()
    side = _SIDES.get(name, _SIDE)
    return (3, side, side)


def names(patterns: Iterable[str]) -> list[str]:
    """Returns the names that match a pattern, small models first."""
    every = [*architectures("classification"), *BEYOND]
    chosen = [name for name in every if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    return sorted(chosen, key=parameters)


def parameters(name: str) -> int:
    """Returns the number of parameters that torchvision states, without building the model."""
    return int(models.get_model_weights(name).DEFAULT.meta["num_params"])


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the rows by model; skips a line that was cut off by an interruption."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        # A model that was measured again has two lines, of which the later one counts.
        rows[row["model"]] = row
    return rows


def run(name: str) -> dict[str, Any]:
    """Measures one model in a child process; returns its row, or one with an error."""
    shape = input_shape(name)
    command = [sys.executable, str(_HERE / "zoo_row.py"), name, "--input-shape", ",".join(map(str, shape))]
    row: dict[str, Any] = {"model": name, "input_shape": list(shape)}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            check=False,
            text=True,
            timeout=_TIMEOUT_S,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return row | {"error": f"not done after {_TIMEOUT_S} s"}
    if done.returncode:
        # The last line of a traceback names the error; -9 is SIGKILL, which the kernel sends when memory runs out.
        last = (done.stderr.strip().splitlines() or [""])[-1]
        killed = "killed, as when memory runs out" if done.returncode == -9 else f"exit code {done.returncode}"
        return row | {"error": f"{killed}: {last}" if last else killed}
    # Libraries may print while they are imported; the result is the last line.
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def print_row(row: Mapping[str, Any]) -> None:
    """Prints one line about a row."""
    if "error" in row:
        print(f"{row['model']}: {row['error']}", flush=True)
        return
    worst = max(value for value in row["relative"].values() if value is not None)
    print(
        f"{row['model']}: archive {row['archive_bytes'] / 1e6:.2f} MB, ONNX {row['onnx_bytes'] / 1e6:.2f} MB, "
        f"difference {worst:.1e}, {row['seconds']:.0f} s, {row['peak_bytes'] / 1e9:.2f} GB",
        flush=True,
    )


def main() -> int:
    """Measures missing rows and writes the table; returns 1 if a model failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=["*"], help="names, with * and ?")
    parser.add_argument("--again", action="store_true", help="measure models that have a row already")
    parser.add_argument("--jobs", type=int, default=2, help="models at once, except the largest; default: %(default)s")
    parser.add_argument("--rows", type=Path, default=Path("build/zoo.jsonl"), help="default: %(default)s")
    parser.add_argument("--table", type=Path, default=_HERE.parent / "docs" / "zoo.md", help="default: docs/zoo.md")
    parser.add_argument(
        "--largest", type=float, default=1000, metavar="M", help="skip models with more million parameters"
    )
    arguments = parser.parse_args()
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = {} if arguments.again else read_rows(arguments.rows)
    due = [name for name in names(arguments.patterns) if name not in rows or "error" in rows[name]]
    due = [name for name in due if parameters(name) <= arguments.largest * 1e6]
    start, failed = time.perf_counter(), 0
    # Two of the largest at once would not fit into memory.
    small = [name for name in due if parameters(name) < _LARGE]
    for jobs, some in ((arguments.jobs, small), (1, due[len(small) :])):
        with ThreadPoolExecutor(jobs) as pool:
            for row in pool.map(run, some):
                rows[row["model"]] = row
                print_row(row)
                failed += "error" in row or not passed(row)
                # At once, so that an interruption loses no row.
                with arguments.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    # From the file: with --again, `rows` has only what was measured now.
    rows = read_rows(arguments.rows)
    arguments.table.write_text(table(rows, names(["*"]), BEYOND), encoding="utf-8")
    print(f"{arguments.table}: {len(rows)} rows, {time.perf_counter() - start:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
