"""Sparse inference from an archive with numpy and scipy: no torch, no ONNX."""

from dsr_tool.runtime.pictures import load_inputs
from dsr_tool.runtime.session import Session

__all__ = ["Session", "load_inputs"]
