"""Measures what few bits cost on trained networks: bytes, accuracy, agreement with the dense network, and latency.

    python benchmarks/values.py mobilenet_v2=mobilenet_v2.pth resnet50=resnet50.pth --samples samples
        --agreement others --calibration photographs

Each network is converted as `dsr-tool convert` does it by default, then exported once for each row and measured by
`dsr-tool report --accuracy` and `dsr-tool bench`. Rows that a file of rows has are not measured again, so that a run
can go on where it stopped; the table of all rows goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands import run_json
from machine import processor

SPARSITIES = (0.0, 0.5, 0.8)
VALUES = ("fp32", "fp16", "int8", "int6", "int5", "int4")
_CALIBRATED = ("int6", "int5", "int4")
"""Values for which there is a second row with `--calibrate`: with more bits it changes nothing that can be counted."""
_TIMED = ("fp32", "int8")
"""Values whose latency is measured: kernels hold all grids alike."""


def main() -> None:
    """Measures the missing rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", metavar="ARCH=WEIGHTS", help="torchvision's name, and a state_dict")
    parser.add_argument("--samples", type=Path, required=True, help="labelled pictures for top-1")
    parser.add_argument(
        "--agreement", type=Path, required=True, help="pictures for the agreement with the dense network"
    )
    parser.add_argument("--calibration", type=Path, help="pictures to round by; default: no such rows")
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES, help="fractions of zeros")
    parser.add_argument("--values", nargs="+", default=VALUES, choices=VALUES, help="rows of each network")
    parser.add_argument("--rows", type=Path, default=Path("values.jsonl"), help="file of rows, read and added to")
    options = parser.parse_args()
    for network in options.networks:
        arch, _, weights = network.partition("=")
        for sparsity in options.sparsity:
            _measure(arch, Path(weights), sparsity, options)
    print(table(_rows(options.rows)))


def _measure(arch: str, weights: Path, sparsity: float, options: argparse.Namespace) -> None:
    """Adds the missing rows of a network at a sparsity to the file of rows."""
    wanted = [(values, "") for values in options.values]
    if options.calibration:
        wanted += [(values, "--calibrate") for values in options.values if values in _CALIBRATED]
    known = {(row["arch"], row["sparsity"], row["values"], row["calibrate"]) for row in _rows(options.rows)}
    missing = [pair for pair in wanted if (arch, sparsity, *pair) not in known]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        dense, model, file = Path(folder) / "dense", Path(folder) / "model", Path(folder) / "file.dsr"
        run_json("convert", arch, "--weights", weights, "--sparsity", 0, "-o", dense)
        run_json("convert", arch, "--weights", weights, "--sparsity", sparsity, "-o", model)
        for values, calibrate in missing:
            more = [calibrate, options.calibration] if calibrate else []
            run_json("export", model, "-o", file, "--values", values, *more, "--force")
            found = run_json("report", file, "--accuracy", options.samples)["accuracy"]
            agreed = run_json("report", file, "--accuracy", options.agreement, "--against", dense)["accuracy"]
            row = {
                "arch": arch,
                "sparsity": sparsity,
                "values": values,
                "calibrate": calibrate,
                "bytes": file.stat().st_size,
                "accuracy": found,
                "agreement": agreed,
                "bench": run_json("bench", file) if values in _TIMED else None,
                "processor": processor(),
            }
            with options.rows.open("a", encoding="utf-8") as rows:
                rows.write(json.dumps(row) + "\n")
            print(line(row), file=sys.stderr, flush=True)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a table in Markdown, sorted as they are asked for by default."""
    headers = ("network", "sparsity", "`--values`", "bytes", "right of 100", "agreement, %", "dense time ÷ ours")
    ordered = sorted(
        rows, key=lambda row: (row["arch"], row["sparsity"], VALUES.index(row["values"]), row["calibrate"])
    )
    lines = [f"| {' | '.join(headers)} |", "|---|" + "---|" * (len(headers) - 1), *map(line, ordered)]
    return "\n".join([*lines, "", *sorted({f"Processor: {row['processor']}." for row in rows})])


def line(row: dict[str, Any]) -> str:
    """Returns a row of the table."""
    ratio = f"{row['bench']['latency']['ratio']['median']:.2f}" if row["bench"] else ""
    cells = (
        row["arch"],
        f"{row['sparsity']:g}",
        f"{row['values']} {row['calibrate']}".strip(),
        f"{row['bytes']:,}",
        f"{100 * row['accuracy']['this']['top1_fraction']:.0f}",
        f"{100 * row['agreement']['agreement_fraction']:.1f}",
        ratio,
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
