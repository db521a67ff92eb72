"""ONNX files: writing them small, reading those of any tool, running and verifying them."""

ONNX_ENCODINGS = ("auto", "delta", "bitmask", "coo", "dense")
"""Ways of storing sparse weights in an ONNX file. They stand here, since the modules that implement them import onnx,
which the table of containers must not."""
