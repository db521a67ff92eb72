"""Footprints of whatever lies at a path: model folder, run, archive or ONNX file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsr_tool.core.archive import Archive, open_archive
from dsr_tool.core.codecs import SparseTensor
from dsr_tool.core.config import ModelConfig
from dsr_tool.core.footprint import Footprint, footprint
from dsr_tool.core.layers import LayerSpec
from dsr_tool.core.manifest import container_header_bytes
from dsr_tool.core.mask import Mask
from dsr_tool.errors import FileError, FormatError

__all__ = ["Source", "read"]


@dataclass(frozen=True)
class Source:
    """What was found at a path.

    Attributes:
        path: where.
        kind: `model folder`, `run folder`, `archive` or `onnx`.
        footprint: what it weighs.
        config: what the model is, where the file tells.
        training: what the log of a run says; empty elsewhere.
    """

    path: Path
    kind: str
    footprint: Footprint
    config: ModelConfig | None
    training: Mapping[str, Any]


def read(path: str | Path) -> Source:
    """Measure a model folder, run folder, archive or ONNX file.

    Raises:
        FileError: nothing there.
        FormatError: damaged, or none of the four.
    """
    path = Path(path)
    if not path.exists():
        raise FileError(f"PATH {str(path)!r} does not exist; give a model folder, run folder, .dsr or .onnx file.")
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".onnx":
        return _onnx(path)
    return _archive(open_archive(path))


def _archive(archive: Archive) -> Source:
    specs = {name: entry.spec for name, entry in archive.entries.items()}
    stored = {name: (entry.codec, archive.entry_bytes(name)) for name, entry in archive.entries.items()}
    parts = {
        **_weight_bytes(specs, stored),
        "graph and manifest": archive.document_bytes,
        "container header": archive.header_bytes,
    }
    measured = footprint(_Decoding(archive), specs, stored=stored, file_bytes=archive.nbytes, parts=parts)
    return Source(archive.path, "archive", measured, archive.config, {})


def _weight_bytes(specs: Mapping[str, LayerSpec], stored: Mapping[str, tuple[str, int]]) -> dict[str, int]:
    sparse = sum(nbytes for name, (_, nbytes) in stored.items() if specs[name].role == "sparse")
    return {"sparse weights": sparse, "dense rest": sum(nbytes for _, nbytes in stored.values()) - sparse}


class _Decoding(Mapping[str, SparseTensor]):
    """The tensors of an archive, decoded one at a time."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def __getitem__(self, name: str) -> SparseTensor:
        return self._archive.tensor(name)

    def __iter__(self) -> Any:
        return iter(self._archive.entries)

    def __len__(self) -> int:
        return len(self._archive.entries)


def _onnx(path: Path) -> Source:
    from exporters.onnx_read import read_onnx

    file = read_onnx(path)
    specs = {name: entry.spec for name, entry in file.entries.items()}
    stored = {name: (entry.codec, entry.nbytes) for name, entry in file.entries.items()}
    parts = {
        **_weight_bytes(specs, stored),
        "nodes and names": file.document_bytes,
    }
    measured = footprint(dict(file), specs, stored=stored, file_bytes=file.nbytes, parts=parts)
    return Source(path, "onnx", measured, None, {})


def _folder(path: Path) -> Source:
    from dsr_tool.sparse.folder import CONFIG, MASKS, WEIGHTS, read_folder

    saved = read_folder(path)
    masks = saved.masks()
    state = saved.weights()
    _same_shapes(path, {name: tuple(value.shape) for name, value in state.items()}, saved.specs)
    tensors = {}
    for name, value in state.items():
        array = (value.float() if value.is_floating_point() else value).numpy()
        tensors[name] = SparseTensor.from_dense(array, masks.get(name, Mask.full(array.shape)))
    stored = {name: ("dense", value.nbytes) for name, value in state.items()}
    mask_bytes = sum((mask.size + 7) // 8 for mask in masks.values())
    parts = {
        "weights, zeros in place": sum(nbytes for _, nbytes in stored.values()),
        "masks": mask_bytes,
        "description": saved.file(CONFIG).stat().st_size,
        "container headers": sum(container_header_bytes(saved.file(name)) for name in (WEIGHTS, MASKS)),
    }
    total = sum(saved.file(name).stat().st_size for name in (CONFIG, WEIGHTS, MASKS))
    measured = footprint(tensors, saved.specs, stored=stored, file_bytes=total, parts=parts)
    training = _training(path / "log.jsonl")
    return Source(path, "run folder" if training else "model folder", measured, saved.config, training)


def _same_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], specs: Mapping[str, LayerSpec]) -> None:
    listed = {name: spec.shape for name, spec in specs.items()}
    differing = [name for name in {**listed, **shapes} if listed.get(name) != shapes.get(name)]
    if differing:
        raise FormatError(
            f"{str(path)!r}: weights and config.json disagree about {differing[0]!r}; the folder is damaged."
        )


def _training(log: Path) -> dict[str, Any]:
    """Method, epochs and accuracy of a run, from its log."""
    if not log.is_file():
        return {}
    text = log.read_bytes()
    # A last line that was cut off, by a full disk or a power cut, tells nothing.
    whole = text[: text.rfind(b"\n") + 1]
    try:
        return _summary([json.loads(line) for line in whole.splitlines() if line.strip()])
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise FormatError(f"log {str(log)!r} is not understood ({error!r}); the run is damaged.") from error


def _summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    kinds: dict[str, list[dict[str, Any]]] = {"start": [], "epoch": [], "reallocation": [], "end": []}
    for line in lines:
        kinds[line["kind"]].append(line)
    start = kinds["start"][0]
    epochs = kinds["epoch"]
    best = max(epochs, key=lambda line: float(line["test_accuracy"]), default=None)
    return {
        "status": kinds["end"][-1]["status"] if kinds["end"] else "cut off",
        "method": start["settings"]["method"],
        "data": start["data"],
        "epochs": len(epochs),
        "reallocations": len(kinds["reallocation"]),
        "weights_moved": sum(sum(line["dropped"].values()) for line in kinds["reallocation"]),
        "last_test_accuracy": epochs[-1]["test_accuracy"] if epochs else None,
        "best_test_accuracy": best["test_accuracy"] if best else None,
        "best_epoch": best["epoch"] if best else None,
    }
