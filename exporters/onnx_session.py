"""ONNX Runtime as a referee and as a runtime of archives: quiet, on the CPU."""

from __future__ import annotations

from pathlib import Path

from dsr_tool.core.graph import Array
from dsr_tool.errors import FormatError, first_line

__all__ = ["OnnxSession"]

_ERRORS_ONLY = 3


class OnnxSession:
    """A loaded model with one input and one output."""

    def __init__(self, source: Path | bytes, *, optimized: Path | None = None) -> None:
        """Load a model and optimise it.

        Args:
            source: a file, or the bytes of one.
            optimized: where to write the graph as it runs after optimisation; None for nowhere.

        Raises:
            FormatError: onnxruntime refuses the model.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        model = str(source) if isinstance(source, Path) else source
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # one class for each of its status codes, all straight from Exception
            raise FormatError(f"onnxruntime cannot load {_name(source)}: {first_line(error)}.") from error
        self._input = self._session.get_inputs()[0].name

    def run(self, x: Array) -> Array:
        """The output for one batch of inputs, shape (batch, ...).

        Raises:
            FormatError: onnxruntime cannot run the model on it.
        """
        try:
            output: Array = self._session.run(None, {self._input: x})[0]
        except Exception as error:  # as above
            raise FormatError(f"onnxruntime cannot run inputs of shape {x.shape}: {first_line(error)}.") from error
        return output


def _name(source: Path | bytes) -> str:
    return repr(str(source)) if isinstance(source, Path) else "the model"
