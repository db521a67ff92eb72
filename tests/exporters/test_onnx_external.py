"""External data of ONNX files are read from beside the file, and from nowhere else."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dsr_tool.errors import FileError, FormatError
from dsr_tool.runtime import Session
from exporters.containers import contents_of
from exporters.onnx.read import read_onnx
from exporters.onnx.session import OnnxSession

WEIGHT = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)


def model(**entries: str) -> onnx.ModelProto:
    """A matrix product whose weight lies in another file."""
    weight = TensorProto(name="w", dims=WEIGHT.shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        weight.external_data.add(key=key, value=value)
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 40]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 30]),
    ]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.fixture
def folder(tmp_path):
    """A folder with the data of the weight, behind 64 other bytes, and a secret beside the folder."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("in/w.bin", "in/deep/w.bin", "secret.bin"):
        (tmp_path / name).write_bytes(bytes(64) + WEIGHT.tobytes())
    return tmp_path / "in"


def read(folder, content):
    (folder / "m.onnx").write_bytes(content.SerializeToString())
    return read_onnx(folder / "m.onnx")


@pytest.mark.parametrize("location", ["w.bin", "deep/w.bin", "./w.bin"])
@pytest.mark.parametrize("length", [{}, {"length": str(WEIGHT.nbytes)}])
def test_data_beside_the_file_are_read(folder, location, length):
    file = read(folder, model(location=location, offset="64", **length))
    np.testing.assert_array_equal(file.array("w"), WEIGHT)
    x = np.random.default_rng(1).standard_normal((2, 40)).astype(np.float32)
    path = folder / "m.onnx"
    np.testing.assert_allclose(Session(path).run(x), OnnxSession(path).run(x), rtol=1e-5, atol=1e-5)


def test_the_bytes_of_data_files_count(folder):
    read(folder, model(location="w.bin", offset="64"))
    path = folder / "m.onnx"
    found = contents_of(path)[1].footprint
    assert found.file_bytes == path.stat().st_size + 64 + WEIGHT.nbytes == sum(found.parts.values())


def test_files_that_onnx_writes_are_read(folder):
    content = model()
    content.graph.initializer[0].CopyFrom(numpy_helper.from_array(WEIGHT, "w"))
    onnx.save(content, folder / "n.onnx", save_as_external_data=True, location="n.data", size_threshold=0)
    np.testing.assert_array_equal(read_onnx(folder / "n.onnx").array("w"), WEIGHT)


def test_constants_may_lie_in_other_files(folder):
    content = model(location="w.bin", offset="64")
    constant = helper.make_node("Constant", [], ["w"], value=content.graph.initializer[0])
    content.graph.node.insert(0, constant)
    del content.graph.initializer[:]
    np.testing.assert_array_equal(read(folder, content).array("w"), WEIGHT)


@pytest.mark.parametrize(
    "location",
    [
        "../secret.bin",
        "deep/../../secret.bin",
        "..\\secret.bin",
        "C:\\secret.bin",
        "\\\\host\\secret.bin",
        "link.bin",
        "linked/secret.bin",
        "circle",
        "w.bin\0",
        "w" * 5000,
    ],
)
def test_data_outside_of_the_folder_are_refused(folder, location):
    (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
    (folder / "linked").symlink_to(folder.parent)
    (folder / "circle").symlink_to(folder / "circle")
    with pytest.raises(
        (FormatError, FileError), match="not in its folder|cannot be read|is not an ONNX file"
    ) as caught:
        read(folder, model(location=location, offset="64"))
    assert str(caught.value).count("\n") == 0


def test_absolute_paths_are_refused_even_if_they_lie_inside(folder):
    with pytest.raises(FormatError, match="not in its folder"):
        read(folder, model(location=str(folder / "w.bin"), offset="64"))


def test_links_that_stay_inside_are_followed(folder):
    (folder / "link.bin").symlink_to("w.bin")
    np.testing.assert_array_equal(read(folder, model(location="link.bin", offset="64")).array("w"), WEIGHT)


def test_pipes_and_folders_are_refused(folder):
    os.mkfifo(folder / "pipe")
    for location in ("pipe", "deep"):
        with pytest.raises(FormatError, match="no plain file"):
            read(folder, model(location=location))


def test_a_missing_data_file_is_named(folder):
    with pytest.raises(FileError, match=r"none\.bin.*put that file beside it\.$") as caught:
        read(folder, model(location="none.bin"))
    assert str(caught.value).count("cannot be read") == 1
    with pytest.raises(FileError) as caught:
        read(folder, model(location="x" * 5000))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": "65"},
        {"offset": "9" * 19},
        {"offset": "9" * 4000},
        {"offset": "-1"},
        {"offset": "٤"},
        {"offset": "1e3"},
        {"offset": "0", "length": "4"},
        {"offset": "0", "length": str(1 << 62)},
    ],
)
def test_places_outside_of_the_data_are_refused(folder, entries):
    with pytest.raises(FormatError, match="do not belong together|no count of bytes"):
        read(folder, model(location="w.bin", **entries))


def test_a_tensor_without_a_file_or_with_two_is_refused(folder):
    twice = model(location="w.bin", offset="64")
    twice.graph.initializer[0].external_data.add(key="location", value="deep/w.bin")
    for content in (model(offset="64"), model(location=""), twice):
        with pytest.raises(FormatError, match="names no file of its data, or several"):
            read(folder, content)


def test_a_small_data_file_cannot_fill_the_memory(folder):
    content = model(location="w.bin", offset="64")
    for i in range(10):
        content.graph.initializer.add().CopyFrom(content.graph.initializer[0])
        content.graph.initializer[-1].name = f"w{i}"
    with pytest.raises(FormatError, match="claims more than"):
        read(folder, content)


def test_text_is_refused_in_other_files(folder):
    content = model(location="w.bin", offset="64")
    content.graph.initializer[0].data_type = TensorProto.STRING
    with pytest.raises(FormatError, match="holds text"):
        read(folder, content)
