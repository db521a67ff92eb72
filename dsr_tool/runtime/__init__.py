"""Runs archives and ONNX files on compiled sparse kernels, or on numpy and scipy alone.

Nothing here imports torch; only ONNX files need the package onnx, and only pictures need Pillow.
"""

from dsr_tool.runtime.inputs import load_inputs
from dsr_tool.runtime.session import Session

__all__ = ["Session", "load_inputs"]
