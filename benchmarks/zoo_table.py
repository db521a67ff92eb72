"""docs/zoo.md from the rows that `zoo_row.py` measured."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["passed", "passed_in_table", "table", "table_rows"]

Row = Mapping[str, Any]

_LIMIT = 1e-4
"""Largest difference to PyTorch, as a fraction of the largest output, with which a model passes."""
# In the order of `_cells`; the page explains each.
_HEAD = (
    "model",
    "input",
    "parameters, M",
    "prunable, M",
    "zeros of all",
    "dense, MB",
    "archive, MB",
    "÷ bound",
    "ONNX, MB",
    "ONNX Runtime",
    "own runtime",
    "bit for bit",
    "peak, GB",
    "s",
)

_OPENING = """\
# The zoo: every torchvision classifier through the whole chain

Each row is one model. It is converted at sparsity 0.9 of the prunable weights (random weights, seed 0), written as an
archive, loaded back, written as a compact ONNX file, and run by PyTorch, by ONNX Runtime and by our own runtime. One
command,

    python benchmarks/zoo.py

measures each model in a process of its own, stores finished rows in `build/zoo.jsonl`, continues after an
interruption, and writes this file.

{machine}

The columns:

- **input**: channels, height, width (video: channels, frames, height, width). It is small if the model allows it;
  vision transformers and MaxViT have position tables of one size. It hardly changes the sizes of files, but peak
  memory and seconds depend on it.
- **zeros of all**: zeros as a fraction of all parameters. **prunable**: weights that may become sparse. Depthwise
  and tiny layers, norms and biases stay dense, so small mobile networks have fewer zeros.
- **dense**: the state_dict as it is. **archive**: the `.dsr` file, encoding `auto`, exact float32 values. **÷ bound**:
  the archive divided by a bound, the sum of log2 C(n, active) bits for each mask, the raw values and the raw dense
  parameters. It is below 1 because values are compressed too.
- **ONNX**: the compact file, encoding `auto`. It is smaller than an archive if a model has auxiliary heads for
  training (GoogLeNet, Inception), because its output does not depend on them.
- **ONNX Runtime**, **own runtime**: the largest difference to PyTorch, as a fraction of the largest output, on a
  batch of one and a batch of three random inputs. ONNX Runtime ran both files if it could; the larger difference
  is shown. The limit is {limit:g}. Batch norms with the statistics of a batch, see below, make the deepest networks
  amplify rounding, so a few rows are above it. There the difference is within 1e-5 plus four times PyTorch's own
  distance from double precision, which is the rule for every export. With norms as they are initialised,
  efficientnet_b6, efficientnet_v2_l and resnet152 agreed within 1.2e-6.
- **bit for bit**: yes if every tensor and every mask that `converters.loading.load` returns has the bits of the model.
- **peak**: peak resident memory of the process, including PyTorch (about 0.7 GB by itself) and all checks.

A new network hides errors in its layers: layer scale starts at 1e-6, heads of transformers at zero, norms do nothing,
and signals fade at this sparsity. So that an error in any layer reaches the output, weights are divided by the square
root of their density after the conversion, all other parameters get noise, and batch norms get the statistics of one
batch. The outputs for two random inputs then differ by at least {spread:.1%} of the largest output, for every model
here."""


def table(rows: Mapping[str, Row], order: Sequence[str], beyond: Iterable[str]) -> str:
    """Returns the document.

    Args:
        rows: measurements by model.
        order: names of all models, in the order of the tables.
        beyond: names of those that are not classifiers.
    """
    beyond = set(beyond)
    groups = [[name for name in order if name not in beyond], [name for name in order if name in beyond]]
    # Rows of models that are no longer in the list stay in the file and are not shown.
    done = {name: row for name, row in rows.items() if "error" not in row and name in order}
    opening = _OPENING.format(
        machine=_machine(done.values()), limit=_LIMIT, spread=min((row["spread"] for row in done.values()), default=0)
    )
    parts = [opening, "## Classification", _summary(groups[0], done), *_rows(groups[0], done)]
    parts += ["## Segmentation and video", _summary(groups[1], done), *_rows(groups[1], done)]
    failed = [f"- {name}: {rows[name]['error']}" for name in order if "error" in rows.get(name, {})]
    missing = [f"- {name}: not measured" for name in order if name not in rows]
    if failed or missing:
        parts += ["## Not done", "\n".join([*failed, *missing])]
    return "\n\n".join(parts) + "\n"


def passed(row: Row) -> bool:
    """Returns whether a model came back unchanged and both runtimes agree with PyTorch."""
    ours, theirs = _differences(row)
    # A runtime that did not run has no difference, and must not count as one that agrees.
    return bool(row["bit_for_bit"]) and ours is not None and theirs is not None and max(ours, theirs) <= _LIMIT


def table_rows(text: str) -> list[dict[str, str]]:
    """Returns the rows of a document that `table` made: cells by column."""
    rows: list[dict[str, str]] = []
    head: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells[:2] == ["model", "input"]:
            head = cells
        elif cells and len(cells) == len(head) and not cells[0].startswith("-"):
            rows.append(dict(zip(head, cells, strict=True)))
    return rows


def passed_in_table(row: Mapping[str, str]) -> bool:
    """Returns whether a row of the document is that of a model which passed."""
    differences = [row["ONNX Runtime"], row["own runtime"]]
    return row["bit for bit"] == "yes" and all(d != "not run" and float(d) <= _LIMIT for d in differences)


def _summary(names: Sequence[str], done: Mapping[str, Row]) -> str:
    rows = [done[name] for name in names if name in done]
    if not rows:
        return "Nothing measured yet."
    good = sum(passed(row) for row in rows)
    pairs = [_differences(row) for row in rows]
    ours = max((pair[0] for pair in pairs if pair[0] is not None), default=0.0)
    theirs = max((pair[1] for pair in pairs if pair[1] is not None), default=0.0)
    dense, archive = (sum(row[key] for row in rows) for key in ("dense_bytes", "archive_bytes"))
    minutes = sum(row["seconds"] for row in rows) / 60
    ratios = sorted(row["archive_bytes"] / row["bound_bytes"] for row in rows)
    return _wrapped(
        f"{good} of {len(names)} models pass every check. Largest difference: ONNX Runtime {theirs:.1e}, own runtime "
        f"{ours:.1e}. Together {dense / 1e9:.2f} GB dense and {archive / 1e9:.2f} GB as archives, which are "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f} times the bound; {minutes:.0f} minutes in all."
    )


def _rows(names: Sequence[str], done: Mapping[str, Row]) -> list[str]:
    lines = ["| " + " | ".join(_HEAD) + " |", "|---|---|" + "---:|" * (len(_HEAD) - 2)]
    lines += ["| " + " | ".join(_cells(done[name])) + " |" for name in names if name in done]
    return ["\n".join(lines)]


def _cells(row: Row) -> list[str]:
    ours, theirs = _differences(row)
    return [
        row["model"],
        " x ".join(map(str, row["input_shape"])),
        f"{row['parameters'] / 1e6:.2f}",
        f"{row['prunable'] / 1e6:.2f}",
        f"{row['model_sparsity']:.3f}",
        f"{row['dense_bytes'] / 1e6:.2f}",
        f"{row['archive_bytes'] / 1e6:.2f}",
        f"{row['archive_bytes'] / row['bound_bytes']:.3f}",
        f"{row['onnx_bytes'] / 1e6:.2f}",
        "not run" if theirs is None else f"{theirs:.1e}",
        "not run" if ours is None else f"{ours:.1e}",
        "yes" if row["bit_for_bit"] else "no",
        f"{row['peak_bytes'] / 1e9:.2f}",
        f"{row['seconds']:.0f}",
    ]


def _differences(row: Row) -> tuple[float | None, float | None]:
    """Returns the differences of our runtime and of ONNX Runtime; None for one that was not run."""
    both = [row["relative"][key] for key in ("archive in onnxruntime", "onnx in onnxruntime")]
    ran = [value for value in both if value is not None]
    return row["relative"]["archive in the sparse runtime"], max(ran, default=None)


def _machine(rows: Iterable[Row]) -> str:
    """Returns versions and hardware, as the rows recorded them."""
    # Rows of several sessions may come from several machines or versions.
    texts = dict.fromkeys(row["machine"] for row in rows)
    return _wrapped("Measured with " + "; and with ".join(texts) + ", one thread a model.") if texts else ""


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_on_hyphens=False)
