"""Measures converted trained networks as a user has them: bytes, accuracy, agreement with the dense network, latency.

    python benchmarks/trained_rows.py resnet50-80 --dense resnet50.onnx --samples samples --agreement others
        --values int8 --rows docs/results/trained-networks.csv

MODEL is a folder of `dsr-tool convert`; `--dense` is the network before the conversion: a model folder of sparsity 0,
or an ONNX file. A row compares an archive of MODEL with the dense network as an ONNX file in ONNX Runtime. It is added
to the file of rows, or replaces the row with the same network, sparsity, pictures and values. Without MODEL, the rows
are printed as a table in Markdown.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from commands import run_json
from machine import processor

__all__ = ["COLUMNS", "read_rows", "table", "write_rows"]

COLUMNS = (
    *("network", "sparsity", "pictures", "values", "bytes", "dense_bytes", "top1", "dense_top1", "samples"),
    *("agreement", "others", "time_ratio", "time_ratio_low", "time_ratio_high", "time_ms", "dense_time_ms", "threads"),
    *("processor", "kernels", "date", "dsr_tool", "torch", "onnxruntime", "command"),
)
"""Columns of the file of rows. Accuracies are fractions of `samples` and `others` pictures, `time_ratio` is the dense
time ÷ ours with its quartiles, `pictures` counts those of the calibration, and `command` makes the model."""

NO_KERNELS = "none"
"""This stands for the kernels of a network that is so dense that a session gives it to ONNX Runtime."""

_KEY = ("network", "sparsity", "pictures", "values")
"""Columns that name a row."""

Row = Mapping[str, str]


def main() -> None:
    """Measures the rows of the models, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="folders of dsr-tool convert")
    parser.add_argument("--dense", type=Path, help="the network before the conversion")
    parser.add_argument("--samples", type=Path, help="labelled pictures for top-1")
    parser.add_argument("--agreement", type=Path, help="pictures for the agreement with the dense network")
    parser.add_argument("--values", nargs="+", default=["int8"], help="types of the stored values, a row for each")
    parser.add_argument("--round-by", type=Path, metavar="DIR", help="pictures to round values by; default: none")
    parser.add_argument("--threads", type=int, default=1, help="threads of both sides of the latency")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of runs of the latency")
    parser.add_argument(
        "--rows", type=Path, default=Path("trained-networks.csv"), help="file of rows, read and added to"
    )
    options = parser.parse_args()
    if options.models and not (options.dense and options.samples and options.agreement):
        parser.error("a MODEL needs --dense, --samples and --agreement")
    for model in options.models:
        for values in options.values:
            row = _measure(model, values, options)
            write_rows(options.rows, [*(old for old in read_rows(options.rows) if _name(old) != _name(row)), row])
    print(table(read_rows(options.rows)))


def _measure(model: Path, values: str, options: argparse.Namespace) -> dict[str, str]:
    """Exports a model, and returns its row."""
    with tempfile.TemporaryDirectory() as folder:
        dense, file = Path(folder) / "dense.onnx", Path(folder) / "model.dsr"
        run_json("export", options.dense, "-o", dense, "--encoding", "dense")
        by = ("--calibrate", options.round_by) if options.round_by else ()
        run_json("export", model, "-o", file, "--values", values, *by)
        right = run_json("report", file, "--accuracy", options.samples, "--against", dense)
        others = run_json("report", file, "--accuracy", options.agreement, "--against", dense)["accuracy"]
        bench = run_json("bench", file, "--threads", options.threads, "--rounds", options.rounds)
        found, latency, record = right["accuracy"], bench["latency"], right["config"]["conversion"]
        row = {
            "network": right["config"]["architecture"],
            "sparsity": f"{record['sparsity']:g}",
            "pictures": record.get("calibration", {}).get("pictures", 0),
            "values": values,
            "bytes": file.stat().st_size,
            "dense_bytes": dense.stat().st_size,
            "top1": found["this"]["top1_fraction"],
            "dense_top1": found["against"]["top1_fraction"],
            "samples": found["pictures"],
            "agreement": others["agreement_fraction"],
            "others": others["pictures"],
            "time_ratio": round(latency["ratio"]["median"], 3),
            "time_ratio_low": round(latency["ratio"]["low"], 3),
            "time_ratio_high": round(latency["ratio"]["high"], 3),
            "time_ms": round(1e3 * latency["ours_s"]["median"], 3),
            "dense_time_ms": round(1e3 * latency["dense_s"]["median"], 3),
            "threads": options.threads,
            "processor": processor(),
            "kernels": bench["kernels"] or NO_KERNELS,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "dsr_tool": version("dsr-tool"),
            "torch": version("torch"),
            "onnxruntime": version("onnxruntime"),
            "command": _command(right["config"]),
        }
    return {name: str(row[name]) for name in COLUMNS}


def _command(config: Mapping[str, Any]) -> str:
    """Returns the command that made a model, with the name of the weights alone and `photographs` for the folder."""
    record = config["conversion"]
    parts = ["dsr-tool", "convert", config["architecture"], "--weights", Path(str(record["weights"])).name]
    parts += ["--sparsity", f"{record['sparsity']:g}"]
    if "calibration" in record:
        parts += ["--calibrate", "photographs"]
    return shlex.join(parts)


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a file, none if there is no file yet."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes all rows, sorted by their names."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=_name))


def _name(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in _KEY)


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as a table in Markdown, and the machines that they were measured on."""
    headers = (
        *("network", "sparsity", "values", "MB (dense)", "right, % (dense)", "agreement, %", "dense time ÷ ours"),
        "made by",
    )
    lines = [f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}", *map(_line, rows)]
    machines = {
        f"{row['processor']}, kernels {row['kernels']}, threads {row['threads']}, torch {row['torch']}, onnxruntime "
        f"{row['onnxruntime']}, {row['date']}."
        for row in rows
    }
    return "\n".join([*lines, "", *sorted(machines)])


def _line(row: Row) -> str:
    cells = (
        row["network"],
        row["sparsity"],
        row["values"],
        f"{int(row['bytes']) / 1e6:.2f} ({int(row['dense_bytes']) / 1e6:.1f})",
        f"{100 * float(row['top1']):.0f} ({100 * float(row['dense_top1']):.0f})",
        f"{100 * float(row['agreement']):.1f}",
        f"{float(row['time_ratio']):.2f}" if row["kernels"] != NO_KERNELS else "1, in ONNX Runtime",
        f"`{row['command']}`",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
