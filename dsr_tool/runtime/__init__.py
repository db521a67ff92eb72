"""Sparse inference from an archive: compiled kernels, or numpy and scipy alone. No torch; ONNX files take onnx."""

from dsr_tool.runtime.pictures import load_inputs
from dsr_tool.runtime.session import Session

__all__ = ["Session", "load_inputs"]
