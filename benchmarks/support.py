"""This script writes docs/support.md, what works for which family of models, from the zoo and one model of each family.

    python benchmarks/support.py                 measure families that have no row yet, then write the page
    python benchmarks/support.py resnet vgg      measure the families with these names again
    python benchmarks/support.py --page-only     write the page from the rows that exist

docs/zoo.md has every model through archive, ONNX and the runtimes. The smallest model of each family is measured here
for what that table lacks: steps of a training in compact storage, and whether kernels compute every operator.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from zoo_table import passed_in_table, table_rows

import dsr_tool
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.compiler.program import Machine
from dsr_tool.runtime.kernels.library import level, library
from dsr_tool.runtime.session import decode
from dsr_tool.runtime.source import ModelInMemory
from dsr_tool.sparse.compact.modules import runner_of
from exporters.checked import CheckedModel

_DOCS = Path(__file__).resolve().parents[1] / "docs"

FAMILIES = {
    "AlexNet": "alexnet",
    "ConvNeXt": "convnext",
    "DeepLabV3, FCN": "deeplabv3|fcn",
    "DenseNet": "densenet",
    "EfficientNet": "efficientnet_b",
    "EfficientNetV2": "efficientnet_v2",
    "GoogLeNet": "googlenet",
    "Inception v3": "inception",
    "LR-ASPP": "lraspp",
    "MaxViT": "maxvit",
    "MNASNet": "mnasnet",
    "MobileNetV2": "mobilenet_v2",
    "MobileNetV3": "mobilenet_v3",
    "MViT": "mvit",
    "RegNet": "regnet",
    "ResNet": "resnet",
    "ResNeXt": "resnext",
    "ResNet, video": "r3d|mc3|r2plus1d",
    "ShuffleNetV2": "shufflenet",
    "SqueezeNet": "squeezenet",
    "Swin": "swin_",
    "Swin, video": "swin3d",
    "VGG": "vgg",
    "ViT": "vit_",
    "Wide ResNet": "wide_resnet",
}
"""Families of models, with the starts of their models' names."""

_PAGE = """\
# Support matrix

What works for which family of torchvision's models. Archives, ONNX files and runtimes are the results of
[the zoo](zoo.md), for every model. Training and kernels were measured with the smallest model of each family, by
`python benchmarks/support.py`.

{table}

- **models**: those of the family in the zoo. All of them convert with random weights, published ones
  (`--weights DEFAULT`) or a checkpoint; `docs/pretrained.md` says what is kept.
- **trained on kernels**: uses of sparse weights in compact storage, in steps of `dsr` with SGD. For the others, a dense
  weight is built for one operation: slower, with the same result. Masked storage works for every model, with every
  optimizer of torch but SparseAdam (`docs/training.md`).
- **archive, ONNX, runtimes**: models that came back bit for bit, and whose archive and compact ONNX file agree with
  PyTorch in our runtime and in ONNX Runtime, within the zoo's limit. `docs/zoo.md` says why deep models may exceed it.
- **plan**: yes if kernels compute every operator. The model can then be a plan for C and C++, and an operator inside
  ONNX Runtime. Otherwise the operators that run on the reference are named; its archive runs all the same.

## Other networks

| network | convert | train | export |
|---|---|---|---|
| torchvision's detectors | yes | in your own loop | their raw outputs (`docs/onnx.md`) |
| your own module or callable | yes | yes; `train` takes classifiers | yes, if torch can capture it |
| `lenet-300-100`, `wrn-22-2`, `wrn-28-2` | yes | yes | yes |
| ONNX files of other tools | yes, as layers of PyTorch | yes, a classifier | yes (`docs/onnx.md`) |

{machine}
"""


def family(name: str) -> str:
    """Returns the family of a model."""
    return next(title for title, starts in FAMILIES.items() if re.match(starts, name))


def measure(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns what one model shows: sparse weights on kernels while training, operators without one."""
    model = dsr_tool.convert(name, sparsity=0.9, input_shape=shape, seed=0)
    checked = CheckedModel(model)
    stored = checked.stored(model.tensors(), model.specs)
    graph, tensors = decode(ModelInMemory(Path(name), model.config, checked.graph, stored))
    coverage = Plan(graph, tensors, (1, *shape), Machine(library(), 1)).coverage
    return {"model": name, "inference": coverage.to_dict(), **_trained(model, shape)}


def _trained(model: dsr_tool.SparseModel, shape: tuple[int, ...]) -> dict[str, Any]:
    """Takes two steps in compact storage, with an update of the method after each."""
    model.to_storage("compact")
    optimizer = torch.optim.SGD(model.module.parameters(), lr=1e-3, momentum=0.9)
    dsr_tool.attach(model, optimizer, "dsr", total_steps=4)
    model.module.train()
    for _ in range(2):
        outputs = tree_leaves(model.module(torch.randn(2, *shape)))
        loss = sum(output.square().mean() for output in outputs if output.is_floating_point())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.check()
    runner = runner_of(model.module)
    coverage = runner.coverage if runner and not runner.note else None
    if coverage is None:
        return {"sparse": len(model.masks), "on_kernels": 0}
    return {"sparse": coverage.sparse, "on_kernels": coverage.sparse_on_kernels}


def page(zoo: Sequence[Mapping[str, str]], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the page.

    Args:
        zoo: the rows of docs/zoo.md, cells by column.
        rows: measurements by family.
    """
    head = ("family", "models", "trained on kernels", "archive, ONNX, runtimes", "plan")
    lines = ["| " + " | ".join(head) + " |", "|---|---:|---|---|---|"]
    for title in FAMILIES:
        models = [row for row in zoo if family(row["model"]) == title]
        good = sum(passed_in_table(row) for row in models)
        row = rows.get(title)
        training = f"{row['on_kernels']} of {row['sparse']}" if row else "not measured"
        plan = _plan(row["inference"]) if row else "not measured"
        lines.append(f"| {title} | {len(models)} | {training} | {good} of {len(models)} | {plan} |")
    machines = dict.fromkeys(row["machine"] for row in rows.values())
    machine = "Measured with " + "; and with ".join(machines) + "." if rows else ""
    return _PAGE.format(table="\n".join(lines), machine=machine)


def _plan(inference: Mapping[str, Any]) -> str:
    """Returns whether a model can be a plan, or the operators that prevent it."""
    return f"no: {', '.join(inference['operators'])}" if inference["on_reference"] else "yes"


def main() -> int:
    """Measures what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models or starts of their names, to measure their families again")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--rows", type=Path, default=Path("build/support.jsonl"), help="default: %(default)s")
    parser.add_argument("--page", type=Path, default=_DOCS / "support.md", help="default: docs/support.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    zoo = table_rows((_DOCS / "zoo.md").read_text(encoding="utf-8"))
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    lines = arguments.rows.read_text(encoding="utf-8").splitlines() if arguments.rows.exists() else []
    rows = {row["family"]: row for row in map(json.loads, lines)}
    again = {family(name) for name in arguments.names}
    for title in FAMILIES:
        if arguments.page_only or title not in (again or FAMILIES) or (title in rows and not again):
            continue
        # The zoo lists small models first.
        smallest = next(row for row in zoo if family(row["model"]) == title)
        start = time.perf_counter()
        row = measure(smallest["model"], tuple(int(n) for n in smallest["input"].split(" x ")))
        rows[title] = {"family": title, **row, "machine": machine_text()}
        print(f"{title}: {rows[title]}, {time.perf_counter() - start:.0f} s", flush=True)
        with arguments.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[title]) + "\n")
    arguments.page.write_text(page(zoo, rows), encoding="utf-8")
    return 0


def machine_text() -> str:
    """Returns versions and the level of the kernels."""
    import torchvision

    return f"torch {torch.__version__}, torchvision {torchvision.__version__}, kernels {level()}"


if __name__ == "__main__":
    sys.exit(main())
