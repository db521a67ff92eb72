"""Reports say what values take: bits each, their entropy, and exactly what the next step would save."""

import json
from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner

from dsr_tool import convert
from dsr_tool.cli.group import cli
from dsr_tool.formats.footprint import footprint
from dsr_tool.formats.grid import encode_grid
from dsr_tool.formats.value_bits import entropy_bits
from dsr_tool.report.page.page import page_html
from dsr_tool.report.sources import read
from dsr_tool.report.tables import report_document, report_text
from dsr_tool.report.values import value_bits
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.grid_rounding import to_grid
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.export import export

STEPS = ("fp32", "fp16", "int8", "int6", "int5", "int4")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("values")
    model = convert("lenet-300-100", sparsity=0.9)
    model.save(folder / "m")
    for values in (*STEPS, "palette"):
        export(model, folder / f"{values}.dsr", values=values)
    for values in ("fp32", "int8"):
        export(model, folder / f"{values}.onnx", values=values)
    return folder


@pytest.mark.parametrize(("now", "following"), list(pairwise(STEPS)))
def test_the_next_step_saves_what_the_report_says(files, now, following):
    found = value_bits(read(files / f"{now}.dsr"))
    assert (found.values, found.next_values) == (now, following)
    saved = (files / f"{now}.dsr").stat().st_size - (files / f"{following}.dsr").stat().st_size
    # Descriptions name the types, and int8 is rounded again here, not the weights that it came from.
    assert found.saved_bytes == pytest.approx(saved, rel=0.02, abs=200)


def test_bits_fall_with_each_step_and_stay_above_the_entropy(files):
    bits = [value_bits(read(files / f"{values}.dsr")) for values in STEPS]
    assert [found.stored_bits for found in bits] == sorted((found.stored_bits for found in bits), reverse=True)
    assert all(found.stored_bits > found.entropy_bits > 0 for found in bits)
    assert bits[-1].next_values is bits[-1].saved_bytes is None


def test_folders_and_onnx_files_speak_of_the_archive(files):
    folder, archive, onnx = (value_bits(read(files / name)) for name in ("m", "fp32.dsr", "fp32.onnx"))
    assert folder.stored_bits == pytest.approx(archive.stored_bits, rel=0.01)
    assert folder.saved_bytes == pytest.approx(archive.saved_bytes, rel=0.01)
    assert onnx.stored_bits > 32 > onnx.entropy_bits
    assert value_bits(read(files / "int8.onnx")).values == "int8"


def test_text_document_and_page_have_the_line(files):
    source = read(files / "int8.dsr")
    (line,) = [line for line in report_text(source).splitlines() if line.startswith("values: int8, ")]
    assert line.endswith("bytes of an archive") and "--values int6 would save" in line
    document = report_document(source)
    assert document["values"]["values"] == "int8" and line in page_html(source, document)
    done = CliRunner().invoke(cli, ["report", str(files / "int8.dsr"), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["values"] == document["values"]


@pytest.mark.parametrize("role", ["sparse", "dense"])
def test_the_bound_of_a_grid_is_below_its_bytes_whatever_its_role(role):
    values = np.random.default_rng(0).standard_normal(6400).astype(np.float32)
    tensor = to_grid(SparseTensor(Mask((64, 100)), values), 4)
    sizes = footprint({"w": tensor}, {"w": LayerSpec("w", (64, 100), "Linear", role, True, "")}).everything
    assert sizes.bound_bytes <= sum(stream.nbytes for stream in encode_grid(tensor).values())
    assert sizes.codec_bytes["delta"] < sizes.dense_bytes / 3


def test_entropy_of_grids_palettes_and_floats():
    mask = Mask.full((4, 16))
    codes = np.tile(np.array([1, -1, 2, 3], np.int8), 16)
    assert entropy_bits(GridTensor(mask, codes, np.ones(4, np.float32))) == pytest.approx(128)
    assert entropy_bits(SparseTensor(mask, codes.astype(np.float32))) == pytest.approx(128)
    assert entropy_bits(SparseTensor(Mask.full((0,)), np.zeros(0, np.float32))) == 0
    values = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    bits = entropy_bits(SparseTensor(Mask.full(values.shape), values)) / len(values)
    # Two bytes of noise, one of mantissa and sign, and few exponents.
    assert 26 < bits < 28


def test_steps_that_no_weight_can_take_are_left_out():
    from types import SimpleNamespace

    layer = SimpleNamespace(spec=SimpleNamespace(name="w", weight=True))
    for value, following in ((1e6, "int8"), (np.nan, None)):
        tensor = SparseTensor(Mask.full((1, 2)), np.array([value, 1], np.float32))
        source = SimpleNamespace(
            footprint=SimpleNamespace(layers=[layer]), tensors={"w": tensor}, stored={}, is_folder=True, kind="folder"
        )
        assert value_bits(source).next_values == following
