"""The public functions that write and verify files, for every container of the table.

`export` and `densify_export` share one frame: check the arguments, write beside the target, verify, move into place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsr_tool.errors import UsageError, join_words, unknown_name
from dsr_tool.files import new_file, refuse_existing
from exporters.base import Container, Draft, ExportOptions
from exporters.calibrated import check_calibration, rounded_by_pictures
from exporters.checked import CheckedModel
from exporters.containers import CONTAINERS, container_of
from exporters.onnx.native_node import NATIVE, refuse_native
from exporters.verify.agreement import Images, check_images, with_agreement
from exporters.verify.result import Verification, require

if TYPE_CHECKING:
    import torch

    from dsr_tool.graph.ir import Graph
    from dsr_tool.sparse.model import SparseModel

__all__ = ["densify_export", "export", "export_onnx", "verify", "verify_onnx_export"]

_OF_ONNX = ("archive", "onnx")
"""Containers that a computation can be written to without the model that it was captured from."""

MOST_BATCH = 1 << 16
"""Largest batch of a plan."""

_OTHER_ENDINGS = (".npy", ".bin", ".zip", ".json", ".txt", ".gz", ".html")
"""Endings of well-known files that no container writes: a reader would take the export for something else."""


def export(
    model: SparseModel,
    path: str | Path,
    *,
    to: str | None = None,
    encoding: str = "auto",
    values: str = "fp32",
    compact: bool = False,
    calibrate: str | Path | torch.Tensor | Iterable[object] | None = None,
    calibration_images: int | None = None,
    images: Images | None = None,
    min_agreement: float | None = None,
    batch: int | None = None,
    levels: Sequence[str] | None = None,
    graph: Graph | None = None,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Writes a model into one file; the file is run and compared with the model before it is moved into place.

    Args:
        model: the model; its weights and masks must agree, and `config.input_shape` must be known.
        path: the new file.
        to: name of a container in `exporters.containers.CONTAINERS`, such as `archive` or `onnx`. None takes the
            container with the ending of `path`, or an archive if no container has that ending.
        encoding: `auto` for the smallest encoding of each layer, or one that the container has.
        values: `fp32` stores weights exactly, `fp16` rounds them, `int8`, `int6`, `int5` and `int4` store whole numbers
            with one scale for each output channel.
        compact: True to fold normalisation and remove channels that no active weight reaches, in containers that hold
            a graph. Such a file is for inference: it does not go back into the module.
        calibrate: unlabelled pictures, for weights in few bits: rounding then keeps the outputs of each layer on them.
            A folder, a tensor of preprocessed inputs, or a loader, as `convert` takes them.
        calibration_images: largest number of these pictures; default 256.
        images: other pictures, on which the top-1 answers of the file are compared with those of the model: a folder,
            a tensor of preprocessed inputs of shape (N, *input_shape), or batches of that shape.
        min_agreement: least share of equal answers, in (0, 1].
        batch: number of inputs of one run, for plans, which are compiled for one number; default 1.
        levels: levels of the processor that a plan is compiled for, such as `avx2`; default all of this machine's kind.
        graph: the computation of the model as `dsr_tool.sparse.trace.trace` returns it, so that several exports capture
            it once; captured if None.
        force: True to replace an existing file.
        on_progress: receives the number of layers that are calibrated, and of all.

    Returns:
        The result of the verification.

    Raises:
        UsageError: a container, encoding or type of values that does not exist or does not fit the others, an ending
            that means another kind of file, a weight that float16 cannot hold, no input shape, a module that cannot
            be captured, or pictures that do not fit the model.
        CheckFailed: weights and masks disagree, the file does not hold the model, or it gives fewer equal answers than
            `min_agreement`; no file remains.
        FileError: the file exists and `force` is not set, the disk refuses it, or there are no usable pictures.
    """
    path = Path(path)
    container = _container_for(path, to)
    options = _options(container, encoding, values, compact, batch, levels)
    check_calibration(calibrate, calibration_images, options)
    # Before the model is captured and encoded, which can take minutes.
    refuse_existing(path, force=force)
    checked = CheckedModel(model, values, graph=graph)
    check_images(images, min_agreement, checked)
    notes: tuple[str, ...] = ()
    if calibrate is not None:
        rounded, notes = rounded_by_pictures(checked, calibrate, calibration_images, on_progress)
        checked = CheckedModel(model, values, rounded, graph)
    draft = container.encode(checked, options)

    def check(part: Path) -> Verification:
        # A fixed seed: notes and differences are the same whenever the same model is exported.
        found = require(container.verify(part, checked, samples=3, seed=0))
        return found if images is None else with_agreement(found, container, part, checked, images, min_agreement)

    return _write_verified(path, replace(draft, notes=(*draft.notes, *notes)), check, force=force)


def verify(path: str | Path, model: SparseModel, *, samples: int = 3, seed: int = 0) -> Verification:
    """Compares an exported file with the model that it should hold, by running both on random inputs.

    Args:
        path: the file; its container is recognised by its content.
        model: the model.
        samples: size of the second batch of inputs; the first has one.
        seed: seed of the inputs.

    Returns:
        The differences found; `passed` is True if there are none.

    Raises:
        CheckFailed: the file holds another architecture, or the model's weights and masks disagree.
        FileError: there is no such file.
        FormatError: it is damaged, or no container recognises it.
        UsageError: the model has no input shape, or no runtime runs the file.
    """
    path = Path(path)
    return container_of(path).verify(path, CheckedModel(model), samples=samples, seed=seed)


def densify_export(source: str | Path, path: str | Path, *, force: bool = False) -> Verification:
    """Rewrites an ONNX file in any encoding with plain initializers, for tools that look for weights there.

    Values and nodes stay as they are; `export_onnx` writes the other encodings.

    Args:
        source: the ONNX file.
        path: the new file.
        force: True to replace an existing file.

    Returns:
        The result of running both files in ONNX Runtime; `scale` is the largest output of `source`.

    Raises:
        UsageError: an ending that means another container, a file that holds a plan, or a dense model of more than
            2 GB.
        FileError: `source` does not exist, or `path` exists and `force` is not set.
        FormatError: `source` is no ONNX file, or is damaged.
        CheckFailed: the new file does not compute what `source` computes; no file remains.
    """
    source, path = Path(source), Path(path)
    _container_for(path, "onnx")
    from exporters.onnx.densify import densify, verify_dense
    from exporters.onnx.read import read_onnx

    refuse_existing(path, force=force)
    # The parsed file is also what the result is compared with, since there is no PyTorch model.
    compact_file = read_onnx(source)
    refuse_native(source)
    content = densify(compact_file.model).SerializeToString(deterministic=True)
    draft = Draft(lambda part: _write_bytes(part, content))
    return _write_verified(path, draft, lambda part: verify_dense(compact_file, read_onnx(part)), force=force)


def export_onnx(
    source: str | Path,
    path: str | Path,
    *,
    to: str | None = None,
    encoding: str = "auto",
    values: str = "fp32",
    compact: bool = False,
    input_shape: Sequence[int] = (),
    force: bool = False,
    **pictures: object,
) -> Verification:
    """Writes an ONNX file of any tool as an archive or a compact ONNX file; the zeros of its weights become masks.

    The new file is run and compared with the ONNX file, as ONNX Runtime runs it, before it is moved into place.

    Args:
        source: the ONNX file.
        path: the new file.
        to: `archive` or `onnx`; None as in `export`.
        encoding: one that the container has. `dense` in an ONNX file keeps its nodes, see `densify_export`.
        values: one that the container has.
        compact: see `export`.
        input_shape: shape of one input without the batch, for a file that takes any; empty to leave it free.
        force: True to replace an existing file.
        pictures: the other options of `export`, all None: without a model there is nothing to calibrate.

    Raises:
        UsageError: a container or an option that an ONNX file does not go with, or an input shape that is not its own.
        FileError: `source` does not exist, or `path` exists and `force` is not set.
        FormatError: `source` is no ONNX file, is damaged, or has operators or types that are not run here.
        CheckFailed: the new file does not compute what `source` computes; no file remains.
    """
    source, path = Path(source), Path(path)
    container, options = _container_for(path, to), ExportOptions(encoding, values, compact)
    given = [f"--{name.replace('_', '-')}" for name, option in pictures.items() if option is not None]
    if given or container.name not in _OF_ONNX:
        what = f"{given[0]} takes a model" if given else f"{container.name} files take the parameters of a model"
        raise UsageError(
            f"MODEL_DIR {str(source)!r} is an ONNX file, and {what}; export it to {join_words(list(_OF_ONNX))}, or "
            f"make a model folder of it first (dsr-tool convert)."
        )
    _check_options(container, options)
    if container.name == "onnx" and (encoding, values, compact) == ("dense", "fp32", False) and not input_shape:
        return densify_export(source, path, force=force)
    from exporters.onnx.source import OnnxSource
    from exporters.onnx.verify_source import verify_source

    refuse_existing(path, force=force)
    opened = OnnxSource(source, tuple(input_shape))
    draft = opened.encode(container.name, options)
    return _write_verified(path, draft, lambda part: verify_source(part, opened), force=force)


def verify_onnx_export(path: str | Path, source: str | Path) -> Verification:
    """Compares a file with the ONNX file that it was exported from, by running both on random inputs.

    Raises:
        FileError: there is no such file.
        FormatError: one of them is damaged, or `source` does not run.
        UsageError: `path` is neither an archive nor an ONNX file.
    """
    from dsr_tool.runtime.source import open_model
    from exporters.onnx.source import OnnxSource
    from exporters.onnx.verify_source import verify_source

    container = container_of(Path(path))
    # The archive says for which inputs it was exported.
    shape = open_model(path).config.input_shape if container.name in _OF_ONNX else ()
    return verify_source(Path(path), OnnxSource(Path(source), tuple(shape)))


def _write_verified(path: Path, draft: Draft, check: Callable[[Path], Verification], *, force: bool) -> Verification:
    """Writes a file beside its target, verifies it, and moves it into place only if it passed."""
    # A temporary name in the same folder: renaming is atomic there, and nobody reads a file that is not verified.
    with new_file(path, force=force) as part:
        draft.write(part)
        verification = require(check(part))
    return replace(verification, path=path, notes=(*verification.notes, *draft.notes))


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _container_for(path: Path, to: str | None) -> Container:
    """Returns the container to write; raises `UsageError` if the ending of the file means another one."""
    # Read from the table at each call, so that rows added at run time count.
    ending = path.suffix.lower()
    by_ending = next((name for name, one in CONTAINERS.items() if ending in one.endings), None)
    name = to if to is not None else by_ending or "archive"
    if name not in CONTAINERS:
        raise unknown_name("--to", name, CONTAINERS)
    container = CONTAINERS[name]
    if ending in _OTHER_ENDINGS or by_ending not in (None, name):
        article = "an" if name[0] in "aeiou" else "a"
        raise UsageError(
            f"output {str(path)!r} would hold {article} {name} file, which readers of {ending} files do not "
            f"understand; call it {path.stem}{container.endings[0]}."
        )
    return container


def _options(
    container: Container, encoding: str, values: str, compact: bool, batch: int | None, levels: Sequence[str] | None
) -> ExportOptions:
    """Returns the options of an export.

    Raises:
        UsageError: the container does not have one of them, or a value is out of range.
    """
    options = ExportOptions(encoding, values, compact, 1 if batch is None else batch, tuple(levels or ()))
    _check_options(container, options)
    if not (container.compiles or encoding == NATIVE) and (batch is not None or levels):
        given = "--batch" if batch is not None else "--level"
        raise UsageError(
            f"{given} is for plans, which are compiled for one batch size and some levels; leave it out, or use --to "
            f"plan."
        )
    if not 1 <= options.batch <= MOST_BATCH:
        raise UsageError(f"--batch {batch} is not in [1, {MOST_BATCH}]; give the number of inputs of one run.")
    return options


def _check_options(container: Container, options: ExportOptions) -> None:
    """Raises `UsageError` for an option that the container lacks, naming the containers that have it."""
    for option, value, offered in (
        ("--encoding", options.encoding, {name: one.encodings for name, one in CONTAINERS.items()}),
        ("--values", options.values, {name: one.values for name, one in CONTAINERS.items()}),
    ):
        allowed = offered[container.name]
        if value in allowed:
            continue
        # A value that another container has is no typing mistake, so the answer is another one.
        others = [name for name, choices in offered.items() if value in choices]
        if not others:
            raise unknown_name(option, value, allowed)
        raise UsageError(
            f"{option} {value!r} does not exist in {container.name} files, which take {', '.join(allowed)}; give one "
            f"of these, or --to {join_words(others)}."
        )
    if options.compact and not container.compacts:
        able = join_words([name for name, one in CONTAINERS.items() if one.compacts])
        raise UsageError(
            f"--compact removes channels from a graph, which {container.name} files lack; leave it out, or use --to "
            f"{able}."
        )
