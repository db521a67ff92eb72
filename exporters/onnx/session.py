"""ONNX Runtime on the CPU: sessions for users, for verification and as a runtime of archives."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dsr_tool.errors import FileError, FormatError, UsageError, first_line, unknown_name
from dsr_tool.files import require_file
from dsr_tool.runtime.deploy.library import ort_library
from dsr_tool.sparsity.tensor import Array
from exporters.onnx.native_node import THREADS, is_native

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["PRESETS", "OnnxSession", "onnx_session"]

_ERRORS_ONLY = 3
"""ONNX Runtime's log level for errors; its warnings about initializers would mix with the output of commands."""
_LARGEST_FOLDED = "optimization.constant_folding_max_output_size_in_bytes"
"""ONNX Runtime's option for the largest value that it computes while loading, in bytes."""
_MAX_THREADS = 256
"""Most threads of a plan."""


def _latency(_: onnxruntime.SessionOptions) -> None:
    """Keeps ONNX Runtime's defaults."""


def _balanced(options: onnxruntime.SessionOptions) -> None:
    options.add_session_config_entry(_LARGEST_FOLDED, str(1 << 20))


def _memory(options: onnxruntime.SessionOptions) -> None:
    import onnxruntime

    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # The arena never returns the memory that decoding a weight took.
    options.enable_cpu_mem_arena = False


PRESETS: dict[str, Callable[[onnxruntime.SessionOptions], None]] = {
    "latency": _latency,
    "balanced": _balanced,
    "memory": _memory,
}
"""Functions that set the options of a session, by preset; `docs/onnx.md` has their measured load time, memory and
latency."""


def onnx_session(
    path: str | Path, *, preset: str = "latency", threads: int | None = None
) -> onnxruntime.InferenceSession:
    """Opens an ONNX file in ONNX Runtime, on the CPU.

    Args:
        path: the file, of any tool.
        preset: `latency` decodes every weight when the file is loaded, `balanced` decodes weights above 1 MiB at
            every inference, `memory` decodes all of them at every inference. Releases of ONNX Runtime without the
            option behind `balanced` load the file as with `latency`.
        threads: number of threads of one inference; None for one per core.

    Returns:
        A plain session of ONNX Runtime; for a file that holds a plan, with our operator registered.

    Raises:
        FileError: there is no such file.
        FormatError: ONNX Runtime refuses it.
        UsageError: unknown preset, fewer than one thread, or a plan where our library was not built.
    """
    import onnxruntime

    path = Path(path)
    if preset not in PRESETS:
        raise unknown_name("preset", preset, PRESETS)
    if threads is not None and threads < 1:
        raise UsageError(f"threads {threads} is not allowed; give 1 or more, or leave it out for one per core.")
    require_file(path, "ONNX file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads or 0
    PRESETS[preset](options)
    _register(path, options, threads)
    return _load(path, options)


class OnnxSession:
    """A loaded model with one input."""

    def __init__(
        self,
        source: Path | bytes,
        *,
        threads: int | None = None,
        optimized: Path | None = None,
        optimise: bool = True,
        spinning: bool = True,
    ) -> None:
        """Loads a model and optimises it.

        Args:
            source: a file, or the bytes of one.
            threads: number of threads of one inference; None for one per core.
            optimized: file to write the optimised graph to; None for no file.
            optimise: False runs every node by itself, as the file has it.
            spinning: True lets threads without work keep their cores busy for a while, ONNX Runtime's default; False
                beside anything else that is timed.

        Raises:
            FormatError: ONNX Runtime refuses the model.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if optimized is not None:
            options.optimized_model_filepath = _utf8(optimized)
            # Weights go to a second file, since a model of more than 2 GB does not fit into one.
            data = optimized.with_suffix(".data").name
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data)
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        if isinstance(source, Path):
            _register(source, options, threads)
        self._session = _load(source, options)
        self._input = self._session.get_inputs()[0].name
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, x: Array) -> Array:
        """Computes the outputs as `run_all` does, and returns the first."""
        return next(iter(self.run_all(x).values()))

    def run_all(self, x: Array) -> dict[str, Array]:
        """Computes the outputs by name, in the order of the file, for one batch of inputs of shape (batch, ...).

        Raises:
            FormatError: ONNX Runtime cannot run the model on it.
        """
        try:
            return dict(zip(self._outputs, self._session.run(None, {self._input: x}), strict=True))
        except Exception as error:  # as in `_load`
            raise FormatError(f"onnxruntime cannot run inputs of shape {x.shape}: {first_line(error)}.") from error


def _register(path: Path, options: onnxruntime.SessionOptions, threads: int | None) -> None:
    """Adds our operator to a session, if the file holds a plan.

    Raises:
        UsageError: the library with the operator was not built.
    """
    if is_native(path):
        # Before the library is registered, which reads the entry; our kernels have threads of their own.
        options.add_session_config_entry(THREADS, str(min(threads or os.cpu_count() or 1, _MAX_THREADS)))
        options.register_custom_ops_library(str(ort_library()))


def _load(source: Path | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    import onnxruntime

    model = _utf8(source) if isinstance(source, Path) else source
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have a class for each status code and no common base
        name = repr(str(source)) if isinstance(source, Path) else "the model"
        raise FormatError(f"onnxruntime cannot load {name}: {first_line(error)}.") from error


def _utf8(path: Path) -> str:
    """Returns a path as ONNX Runtime takes it, in UTF-8, where Python has ASCII for lack of a locale.

    Raises:
        FileError: the name has bytes that are no UTF-8.
    """
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"onnxruntime cannot open {str(path)!r}, whose name is not UTF-8; rename it.") from error
