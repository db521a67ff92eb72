"""Session presets decode weights at other moments and compute the same outputs."""

import numpy as np
import pytest

import dsr_tool
from dsr_tool.errors import FileError, FormatError, UsageError
from exporters.export import export
from exporters.onnx.session import PRESETS, onnx_session

pytestmark = pytest.mark.usefixtures("trace_once")


@pytest.mark.parametrize("values", ["fp32", "fp16"])
def test_every_preset_computes_the_same(make_model, tmp_path, values):
    export(make_model(), tmp_path / "m.onnx", values=values)
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    outputs = [
        dsr_tool.onnx_session(tmp_path / "m.onnx", preset=preset, threads=1).run(None, {"input": x})[0]
        for preset in PRESETS
    ]
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], rtol=0, atol=1e-5 * np.abs(outputs[0]).max())


def test_missing_files_unknown_presets_and_no_threads_are_refused(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        onnx_session(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(FormatError, match="cannot load"):
        onnx_session(tmp_path / "text.onnx")
    with pytest.raises(UsageError, match="known names: balanced, latency, memory"):
        onnx_session(tmp_path / "text.onnx", preset="quick")
    with pytest.raises(UsageError, match="threads 0"):
        onnx_session(tmp_path / "text.onnx", threads=0)
