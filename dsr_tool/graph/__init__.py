"""The computation of a model as ONNX operators, and passes over it: folding, fusing, compaction."""
