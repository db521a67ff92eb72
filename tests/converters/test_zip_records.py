"""A checkpoint whose tensors or records share bytes is refused in one sentence, however it is read."""

import struct
import zipfile

import pytest
import torch
from torch import nn

from converters.pickles import read_file
from converters.state_dicts import fill_from_file
from dsr_tool.errors import FormatError

SIZE = 256
"""Bytes of each of the two tensors."""


@pytest.fixture
def path(tmp_path):
    state = {"a": torch.arange(64.0).reshape(8, 8), "b": torch.arange(64.0, 128).reshape(8, 8)}
    torch.save(state, tmp_path / "w.pth")
    return tmp_path / "w.pth"


def rewrite(path, change, compression=zipfile.ZIP_STORED):
    """Writes a file again with other bytes in its records, which `change` gets by their last names."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name.partition("/")[2], data))


def directory(path):
    """Returns the bytes of a file, and where the directory describes each record."""
    raw, entries, start = bytearray(path.read_bytes()), {}, 0
    while (start := raw.find(b"PK\x01\x02", start)) >= 0:
        length = struct.unpack_from("<H", raw, start + 28)[0]
        entries[raw[start + 46 : start + 46 + length].decode().partition("/")[2]] = start
        start += 46
    return raw, entries


@pytest.mark.parametrize("size", [0, 4, 40, SIZE - 1])
@pytest.mark.parametrize("record", ["data/0", "data/1"])
def test_a_tensor_larger_than_its_record(path, record, size):
    rewrite(path, lambda name, data: data[:size] if name == record else data)
    with pytest.raises(FormatError, match=r"256 bytes of a tensor of shape \(8, 8\) reach into another record"):
        read_file(path)


def test_a_tensor_larger_than_its_compressed_record(path):
    rewrite(path, lambda name, data: data[:40] if name == "data/0" else data, zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="cannot be read as a state_dict"):
        read_file(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_two_records_in_one_place(path, compression):
    rewrite(path, lambda _, data: data, compression)
    raw, entries = directory(path)
    one, other = entries["data/0"] + 42, entries["data/1"] + 42
    raw[other : other + 4] = raw[one : one + 4]
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"the bytes of 'w/data/[01]' reach into another record"):
        read_file(path)


@pytest.mark.parametrize("more", [SIZE, 10**6])
def test_a_record_that_claims_more_than_it_has(path, more):
    raw, entries = directory(path)
    for at in (entries["data/1"] + 20, entries["data/1"] + 24):  # compressed and plain size
        struct.pack_into("<I", raw, at, struct.unpack_from("<I", raw, at)[0] + more)
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="'w/data/1' reach into another record"):
        read_file(path)


def test_bits_of_the_directory_never_end_in_a_traceback(path):
    raw, entries = directory(path)
    original = {name: tensor.clone() for name, tensor in read_file(path).items()}
    for record in ("data/0", "data/1", "byteorder"):
        for at in range(entries[record], entries[record] + 46):
            for bit in (0, 7):
                changed = bytearray(raw)
                changed[at] ^= 1 << bit
                path.write_bytes(changed)
                try:
                    found = read_file(path)
                except FormatError:
                    continue
                # Any content that is read is what the file had: no tensor takes another's bytes.
                assert all(torch.equal(found[name], tensor) for name, tensor in original.items())


def test_views_of_one_record_and_tied_tensors_are_read(tmp_path):
    whole = torch.arange(128.0)
    state = {"weight": whole[:64].view(8, 8), "bias": whole[64:72], "other": whole[:64].view(8, 8)}
    torch.save(state, tmp_path / "w.pth")
    found = read_file(tmp_path / "w.pth")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    torch.save({"weight": state["weight"].to_sparse(), "bias": state["bias"]}, tmp_path / "s.pth")
    module = nn.Linear(8, 8)
    fill_from_file(module, "Linear", str(tmp_path / "s.pth"))
    assert torch.equal(module.weight, state["weight"])
