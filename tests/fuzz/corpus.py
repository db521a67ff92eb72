"""Writes the valid files that mutants are made from, one folder for each kind: python corpus.py FOLDER."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from network import SHAPE, Network
from safetensors.torch import save_file

from dsr_tool.runtime.deploy.library import level_rows
from dsr_tool.runtime.deploy.writer import chosen_levels, plan_bytes
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.sparsify import sparsify
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig
from exporters.export import export

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDER_FILES = {"weights": "model.safetensors", "masks": "masks.safetensors", "config": "config.json"}


def main() -> None:
    """Writes the files of every kind."""
    root = Path(sys.argv[1])
    for kind in ("archive", "predict", "onnx", "npz", "plan", *FOLDER_FILES, "safetensors", "pickle"):
        (root / kind).mkdir(parents=True)
    model = _model()
    for encoding in ("auto", "delta", "csr", "dense", "palette"):
        export(model, root / "archive" / f"{encoding}.dsr", encoding=encoding)
    for values in ("fp16", "int8", "int4"):
        export(model, root / "archive" / f"{values}.dsr", values=values)
    for values in ("fp32", "int8"):
        export(_model("2:4"), root / "archive" / f"nm-{values}.dsr", values=values)
    shutil.copy(root / "archive" / "auto.dsr", root / "predict")
    # Archives of earlier versions, which must stay readable, are attacked too.
    for path in GOLDEN.glob("*.dsr"):
        shutil.copy(path, root / "archive")
    for encoding in ("auto", "delta", "bitmask", "coo", "dense"):
        export(model, root / "onnx" / f"{encoding}.onnx", encoding=encoding)
    for encoding in ("delta", "bitmask", "dense"):
        export(model, root / "onnx" / f"int8-{encoding}.onnx", encoding=encoding, values="int8")
    export(model, root / "npz" / "model.npz")
    for values in ("fp32", "int8"):
        export(model, root / "plan" / f"{values}.dsrplan", values=values)
    export(model, root / "plan" / "batch.dsrplan", batch=3, levels=[row.name for row in level_rows() if row.runs])
    _write_plans_of_rules(root / "plan")
    model.save(root / "folder")
    for kind, name in FOLDER_FILES.items():
        shutil.copy(root / "folder" / name, root / kind)
    state = {f"features.{i}.weight": torch.arange(12.0).reshape(3, 4) for i in range(6)}
    save_file(state, root / "safetensors" / "state.safetensors")
    torch.save(state, root / "pickle" / "state.pth")


def _write_plans_of_rules(folder: Path) -> None:
    """Writes a plan for each case of the lowering rules, which together have every kind of op."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
    from test_rules import CASES, CaseModel

    levels = chosen_levels([row.name for row in level_rows() if row.runs])
    for case in CASES:
        content = plan_bytes(CaseModel(case), case.shape[0], levels)
        (folder / f"{case.name.replace(':', '-')}.dsrplan").write_bytes(content)


def _model(granularity: str = "weight") -> SparseModel:
    torch.manual_seed(0)
    budget = Budget.of_sparsity(0.8 if granularity == "weight" else 0.5)
    config = ModelConfig("module", "Network", 4, SHAPE)
    return sparsify(Network(), config, budget, positions="random", granularity=granularity)


if __name__ == "__main__":
    main()
