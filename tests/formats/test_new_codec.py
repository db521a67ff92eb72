"""A codec is one entry of the table: archive, manifest and footprint use a new one without further edits."""

import numpy as np
import pytest

from dsr_tool.errors import FormatError
from dsr_tool.formats import codecs
from dsr_tool.formats.archive import open_archive, write_archive
from dsr_tool.formats.codecs import CODECS, Codec, Column, encode_smallest
from dsr_tool.formats.footprint import footprint
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor


def encode(tensor):
    return {"positions": tensor.mask.positions.astype(np.int16), "values": tensor.values}


def decode(streams, shape, active, dtype):
    positions, values = streams["positions"], streams["values"]
    if len(positions) != active or values.dtype != dtype:
        raise FormatError("the positions do not match.")
    return SparseTensor(Mask(shape, positions.astype(np.int64)), values)


@pytest.fixture
def toy(monkeypatch):
    """Returns a codec with 16-bit positions, which is in the table during the test."""
    codec = Codec("toy", "small weights", encode, decode, column=Column("toy", "Toy, 16-bit positions"))
    monkeypatch.setitem(CODECS, "toy", codec)
    return codec


def test_a_new_codec_round_trips_through_an_archive(toy, tmp_path, small_model):
    tensors, specs, graph, config = small_model
    write_archive(tmp_path / "a.dsr", tensors, specs, graph, config, encoding="toy")
    archive = open_archive(tmp_path / "a.dsr")
    assert [archive.entries[name].codec for name in tensors] == ["toy", "dense", "dense"]
    for name, tensor in archive:
        np.testing.assert_array_equal(tensor.mask.positions, tensors[name].mask.positions)
        assert tensor.values.tobytes() == tensors[name].values.tobytes()
    assert archive.entry_bytes("fc.weight") == toy.nbytes(tensors["fc.weight"])


@pytest.mark.usefixtures("toy")
def test_auto_takes_a_new_codec_where_it_is_the_smallest(small_model):
    weight = small_model[0]["fc.weight"]
    fitting = [name for name, codec in CODECS.items() if codec.fits(weight)]
    assert encode_smallest(weight)[0] == min(fitting, key=lambda name: CODECS[name].nbytes(weight))
    free = Codec("free", "anything", lambda tensor: {}, decode, lambda tensor: 0)
    assert encode_smallest(weight, {**CODECS, "free": free}) == ("free", {})


def test_a_new_codec_has_its_column_in_the_footprint(toy, small_model):
    tensors, specs, *_ = small_model
    document = footprint(tensors, specs).to_dict()
    assert document["prunable"]["toy_bytes"] == toy.nbytes(tensors["fc.weight"])
    assert document["layers"][0]["toy_bytes"] == toy.nbytes(tensors["fc.weight"])
    assert document["with_buffers"]["toy_bytes"] == toy.nbytes(tensors["fc.weight"]) + 8 * 4 + 8
    assert codecs.size_columns()["toy"].label == "Toy, 16-bit positions"


def test_a_file_with_an_unknown_codec_is_refused(tmp_path, small_model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(CODECS, "toy", Codec("toy", "small weights", encode, decode))
        write_archive(tmp_path / "a.dsr", *small_model, encoding="toy")
    with pytest.raises(FormatError, match="codec 'toy', which this version cannot read"):
        open_archive(tmp_path / "a.dsr")
