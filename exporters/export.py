"""export: one call for every container, and one place that says what fits together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.formats.archive import ENCODINGS
from dsr_tool.sparse.model import SparseModel
from exporters.archive import export_archive
from exporters.csr import CSR_ENCODINGS, export_csr
from exporters.onnx.container import ONNX_ENCODINGS, densify_file, export_onnx
from exporters.state_dict import DENSE_ENCODINGS, export_safetensors, export_state_dict
from exporters.values import VALUES
from exporters.verify.result import Verification

__all__ = ["CONTAINERS", "Container", "densify_export", "export"]


@dataclass(frozen=True)
class Container:
    """A kind of file that models are written to.

    Attributes:
        export: writes and verifies one.
        endings: what such files are called; readers of other files do not understand them.
        encodings: how weights can lie in it.
        compacts: whether it holds a graph, from which dead channels can be removed.
    """

    export: Callable[..., Verification]
    endings: tuple[str, ...]
    encodings: tuple[str, ...]
    compacts: bool = False


CONTAINERS = {
    "archive": Container(export_archive, (".dsr",), ENCODINGS, compacts=True),
    "onnx": Container(export_onnx, (".onnx",), ONNX_ENCODINGS, compacts=True),
    "csr": Container(export_csr, (".npz",), CSR_ENCODINGS),
    "safetensors": Container(export_safetensors, (".safetensors",), DENSE_ENCODINGS),
    "state-dict": Container(export_state_dict, (".pth", ".pt"), DENSE_ENCODINGS),
}

_ENDINGS = {ending: name for name, container in CONTAINERS.items() for ending in container.endings}
_FOREIGN = (".npy", ".bin", ".zip", ".json", ".txt", ".gz", ".html")


def export(
    model: SparseModel,
    path: str | Path,
    *,
    to: str | None = None,
    encoding: str = "auto",
    values: str = "fp32",
    compact: bool = False,
    force: bool = False,
) -> Verification:
    """Write a model into one file and verify it by running it before it takes its name.

    Args:
        model: the model; its weights and masks must agree.
        path: the new file.
        to: `archive`, `onnx`, `csr`, `safetensors` or `state-dict`; by the ending of `path` when absent, and an archive
            where the ending says nothing.
        encoding: `auto` for the smallest per layer, or one that the container has.
        values: `fp32` as they are, or weights as `fp16`.
        compact: remove channels that no active weight reaches (`archive` and `onnx`).
        force: replace an existing file.

    Returns:
        What the verification measured.

    Raises:
        UsageError: a container, encoding or type of values that does not exist or does not fit the others, or an
            ending that means another kind of file.
        CheckFailed: the file does not hold the model; none is left.
        FileError: the file exists without `force`, or the disk refuses it.
    """
    path = Path(path)
    name = _container(path, to)
    container = CONTAINERS[name]
    _check_encoding(name, encoding)
    if values not in VALUES:
        raise unknown_name("--values", values, VALUES)
    if compact and not container.compacts:
        able = " or ".join(other for other, one in CONTAINERS.items() if one.compacts)
        raise UsageError(
            f"--compact removes channels from a graph, which {name} files lack; leave it out, or use --to {able}."
        )
    options: dict[str, object] = {"compact": True} if compact else {}
    return container.export(model, path, encoding=encoding, values=values, force=force, **options)


def densify_export(
    source: str | Path,
    path: str | Path,
    *,
    to: str | None = None,
    encoding: str = "auto",
    values: str = "fp32",
    compact: bool = False,
    force: bool = False,
) -> Verification:
    """Turn a compact ONNX file into one with plain initializers, for tools that look for weights there.

    Args:
        source: the compact file.
        path: the new file.
        to: `onnx` or absent.
        encoding: `dense`; an ONNX file alone cannot be written otherwise.
        values: `fp32`; values stay as they are.
        compact: not possible.
        force: replace an existing file.

    Raises:
        UsageError: anything else is asked for.
        FormatError: `source` is no ONNX file, or is damaged.
        CheckFailed: the new file does not compute what `source` computes; none is left.
        FileError: the file exists without `force`, or the disk refuses it.
    """
    path = Path(path)
    if (_container(path, to), encoding, values, compact) != ("onnx", "dense", "fp32", False):
        raise UsageError(
            f"MODEL_DIR {str(source)!r} is an ONNX file, which can only become a dense one (-o FILE.onnx --encoding "
            f"dense); give the model folder or an archive for everything else."
        )
    return densify_file(Path(source), path, force=force)


def _container(path: Path, to: str | None) -> str:
    """Name of the container; raises `UsageError` when the ending of the file means another one."""
    ending = path.suffix.lower()
    name = to or _ENDINGS.get(ending, "archive")
    if name not in CONTAINERS:
        raise unknown_name("--to", name, CONTAINERS)
    if ending in _FOREIGN or _ENDINGS.get(ending, name) != name:
        raise UsageError(
            f"output {str(path)!r} would hold {_a(name)} file, which readers of {ending} files do not understand; call "
            f"it {path.stem}{CONTAINERS[name].endings[0]}."
        )
    return name


def _check_encoding(name: str, encoding: str) -> None:
    allowed = CONTAINERS[name].encodings
    if encoding in allowed:
        return
    having = [other for other, container in CONTAINERS.items() if encoding in container.encodings]
    if not having:
        raise unknown_name("--encoding", encoding, allowed)
    raise UsageError(
        f"--encoding {encoding!r} does not exist in {name} files, which take {', '.join(allowed)}; take one, or "
        f"--to {' or '.join(having)}."
    )


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
