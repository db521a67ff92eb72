"""Measuring whatever lies at a path: a model folder, a run folder, or a file of any container."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsr_tool.errors import FileError, FormatError
from dsr_tool.formats.footprint import Footprint, footprint
from dsr_tool.formats.tensor_file import header_bytes
from dsr_tool.graph.compact.record import Savings
from dsr_tool.report.runlog import RunLog, RunSummary, read_log
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.containers import contents_of, listed
from exporters.contents import StoredBytes

__all__ = ["Source", "StoredBytes", "read"]

_MODEL_FOLDER, _RUN_FOLDER = "model folder", "run folder"


@dataclass(frozen=True)
class Source:
    """The measured contents of a path.

    Attributes:
        path: the file or folder.
        kind: `model folder`, `run folder`, or the name of the file's container.
        footprint: parameters, bytes and multiply-adds of every tensor, and the parts of the file.
        config: description of the model; None if the file has none.
        training: summary of the log of a run; None elsewhere.
        tensors: every tensor of the footprint by name, decoded when asked for.
        stored: bytes of each tensor in the file, positions and values apart.
        log: the whole log of a run.
        saved: record of what compaction removed; None for a file that was not compacted.
        has_graph: True for a file that holds a computation; a folder has a module, which must be traced first.
    """

    path: Path
    kind: str
    footprint: Footprint
    config: ModelConfig | None
    training: RunSummary | None
    tensors: Mapping[str, SparseTensor] = field(default_factory=dict)
    stored: Mapping[str, StoredBytes] = field(default_factory=dict)
    log: RunLog | None = None
    saved: Savings | None = None
    has_graph: bool = False

    @property
    def is_folder(self) -> bool:
        """True for a model folder or run folder, from which the module can be built and trained."""
        return self.kind in (_MODEL_FOLDER, _RUN_FOLDER)


def read(path: str | Path) -> Source:
    """Measures a model folder, a run folder, or a file, whose container is recognised by its content.

    Raises:
        FileError: there is nothing at the path.
        FormatError: the folder or file is damaged, or no container recognises the file.
        UsageError: a file of plain weights, which says neither what is sparse nor what is computed.
    """
    path = Path(path)
    if not path.exists():
        raise FileError(
            f"PATH {str(path)!r} does not exist; give a model folder, a run folder, or a file of one of these kinds: "
            f"{listed(lambda one: one.measurable)}."
        )
    if path.is_dir():
        return _folder(path)
    container, found = contents_of(path, "PATH")
    return Source(
        path,
        container.name,
        found.footprint,
        found.config,
        None,
        found.tensors,
        found.stored,
        saved=found.saved,
        has_graph=container.has_graph,
    )


def _folder(path: Path) -> Source:
    """Measures a model folder; a run folder is one with a log."""
    # Here, since folders need torch and files do not.
    from dsr_tool.sparse.folder import CONFIG, MASKS, WEIGHTS, read_folder

    saved = read_folder(path)
    masks = saved.masks()
    state = saved.weights()
    _same_shapes(path, {name: tuple(value.shape) for name, value in state.items()}, saved.specs)
    tensors = {}
    for name, value in state.items():
        # numpy has no bf16, whose values fp32 holds exactly; the stored type is counted below.
        array = (value.float() if value.is_floating_point() else value).numpy()
        tensors[name] = SparseTensor.from_dense(array, masks.get(name, Mask.full(array.shape)))
    stored = {name: ("dense", value.nbytes) for name, value in state.items()}
    # One bit an entry, in whole bytes for each mask.
    positions = {name: (mask.size + 7) // 8 for name, mask in masks.items()}
    parts = {
        "weights, zeros in place": sum(nbytes for _, nbytes in stored.values()),
        "masks": sum(positions.values()),
        "description": saved.file(CONFIG).stat().st_size,
        "container headers": sum(header_bytes(saved.file(name)) for name in (WEIGHTS, MASKS)),
    }
    # The model alone: checkpoint, log and best epoch of a run are not what a user would ship.
    total = sum(saved.file(name).stat().st_size for name in (CONFIG, WEIGHTS, MASKS))
    measured = footprint(tensors, saved.specs, stored=stored, file_bytes=total, parts=parts)
    by_tensor = {name: StoredBytes(positions.get(name, 0), value.nbytes) for name, value in state.items()}
    log_file = path / "log.jsonl"
    log = read_log(log_file) if log_file.is_file() else None
    kind, training = (_RUN_FOLDER, log.summary()) if log else (_MODEL_FOLDER, None)
    return Source(path, kind, measured, saved.config, training, tensors, by_tensor, log)


def _same_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], specs: Mapping[str, LayerSpec]) -> None:
    """Raises `FormatError` if a tensor is missing on one side, or has another shape there."""
    listed = {name: spec.shape for name, spec in specs.items()}
    differing = [name for name in {**listed, **shapes} if listed.get(name) != shapes.get(name)]
    if differing:
        raise FormatError(
            f"{str(path)!r}: weights and config.json disagree about {differing[0]!r}; the folder is damaged."
        )
