"""ONNX files: writing them small, reading them back, running and checking them."""
