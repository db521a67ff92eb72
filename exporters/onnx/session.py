"""ONNX Runtime: sessions for users, and as a referee and a runtime of archives; quiet, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsr_tool.errors import FormatError, UsageError, first_line, unknown_name
from dsr_tool.files import require_file
from dsr_tool.sparsity.tensor import Array

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["PRESETS", "OnnxSession", "onnx_session"]

_ERRORS_ONLY = 3
_LARGEST_FOLDED = "optimization.constant_folding_max_output_size_in_bytes"


def _latency(_: Any) -> None:
    """ONNX Runtime's own choice."""


def _balanced(options: Any) -> None:
    options.add_session_config_entry(_LARGEST_FOLDED, str(1 << 20))


def _memory(options: Any) -> None:
    import onnxruntime

    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # The arena never gives back what decoding a weight took.
    options.enable_cpu_mem_arena = False


PRESETS: dict[str, Callable[[Any], None]] = {
    "latency": _latency,
    "balanced": _balanced,
    "memory": _memory,
}
"""Session options by name; `docs/onnx.md` has what each of them measures."""


def onnx_session(
    path: str | Path, *, preset: str = "latency", threads: int | None = None
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU for a file of ours, or any other.

    Args:
        path: the file.
        preset: `latency` decodes every weight when the file is loaded, `balanced` decodes weights above 1 MiB at
            every inference, `memory` decodes all of them at every inference. Releases of ONNX Runtime that do not
            know the option behind `balanced` load such a file as with `latency`.
        threads: of one inference; None for as many as there are cores.

    Raises:
        FileError: there is no such file.
        FormatError: ONNX Runtime refuses it.
        UsageError: unknown preset, or fewer than one thread.
    """
    import onnxruntime

    path = Path(path)
    if preset not in PRESETS:
        raise unknown_name("preset", preset, PRESETS)
    if threads is not None and threads < 1:
        raise UsageError(f"threads {threads} must be at least 1; leave it out for as many as there are cores.")
    require_file(path, "ONNX file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads or 0
    PRESETS[preset](options)
    return _load(path, options)


class OnnxSession:
    """A loaded model with one input and one output."""

    def __init__(
        self,
        source: Path | bytes,
        *,
        threads: int | None = None,
        optimized: Path | None = None,
        spinning: bool = True,
    ) -> None:
        """Load a model and optimise it.

        Args:
            source: a file, or the bytes of one.
            threads: of one inference; None for as many as there are cores.
            optimized: where to write the graph as it runs after optimisation; None for nowhere.
            spinning: threads without work keep their cores busy for a while, as is onnxruntime's default; not beside
                something else that is timed.

        Raises:
            FormatError: onnxruntime refuses the model.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
            # Beside it, since a model of more than 2 GB does not fit into one file of this format.
            data = optimized.with_suffix(".data").name
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data)
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        self._session = _load(source, options)
        self._input = self._session.get_inputs()[0].name

    def run(self, x: Array) -> Array:
        """The output for one batch of inputs, shape (batch, ...).

        Raises:
            FormatError: onnxruntime cannot run the model on it.
        """
        try:
            output: Array = self._session.run(None, {self._input: x})[0]
        except Exception as error:  # as in `_load`
            raise FormatError(f"onnxruntime cannot run inputs of shape {x.shape}: {first_line(error)}.") from error
        return output


def _load(source: Path | bytes, options: Any) -> onnxruntime.InferenceSession:
    import onnxruntime

    model = str(source) if isinstance(source, Path) else source
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # one class for each of its status codes, all straight from Exception
        name = repr(str(source)) if isinstance(source, Path) else "the model"
        raise FormatError(f"onnxruntime cannot load {name}: {first_line(error)}.") from error
