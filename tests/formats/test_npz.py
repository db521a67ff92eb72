"""Hostile zip archives: none gets memory, file names or code past the reader of .npz files."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.formats.npz import NpzReader, write_npz


def npy(array, version=(1, 0)):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


def header(text, version=1):
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text


def make(path, *members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return path


def read(path, name="a", dtype=np.float32, shape=(3,)):
    with NpzReader(path) as file:
        return file.read(name, dtype, shape)


def test_arrays_round_trip_and_numpy_reads_them(tmp_path):
    arrays = {
        "a:b.c": np.arange(6, dtype=np.int32).reshape(2, 3),
        "0": np.array(7),
        "file": np.zeros((0, 4), np.float16),
    }
    write_npz(tmp_path / "m.npz", arrays)
    with np.load(tmp_path / "m.npz", allow_pickle=False) as theirs, NpzReader(tmp_path / "m.npz") as ours:
        assert set(theirs.files) == ours.names == set(arrays)
        for name, array in arrays.items():
            for found in (theirs[name], ours.read(name, array.dtype, array.shape)):
                assert found.dtype == array.dtype and found.shape == array.shape and np.array_equal(found, array)
    with zipfile.ZipFile(tmp_path / "m.npz") as file:
        assert {member.date_time for member in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_model_beyond_the_limits_of_zip_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 10)
    with pytest.raises(UsageError, match="export an archive"):
        write_npz(tmp_path / "m.npz", {str(i): np.zeros(1, np.uint8) for i in range(11)})


THREE = np.arange(3, dtype=np.float32)
RAW = THREE.tobytes()
FINE = "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }"
MEMBERS = {
    "a path": [("../a.npy", npy(THREE))],
    "an absolute path": [("/etc/a.npy", npy(THREE))],
    "a folder": [("a.npy", npy(THREE)), ("b/", b"")],
    "no array": [("a.npy", npy(THREE)), ("run.py", b"import os")],
    "another type": [("a.npy", npy(THREE.astype(np.int32)))],
    "another shape": [("a.npy", npy(THREE[:2]))],
    "objects": [("a.npy", npy(np.array([1, None, "x"], object)))],
    "columns first": [("a.npy", header(FINE.replace("False", "True").encode()) + RAW)],
    "a header of version 2": [("a.npy", npy(THREE, (2, 0)))],
    "a header of 4 GiB": [("a.npy", header(b"", 2)[:8] + b"\xff\xff\xff\xff")],
    "a header that is code": [("a.npy", header(b"__import__('os').abort()") + RAW)],
    "a header of brackets": [("a.npy", header(b"(" * 1000) + RAW)],
    "a long header": [("a.npy", header(FINE.encode() + b" " * 60000) + RAW)],
    "a header of long numbers": [("a.npy", header(FINE.replace("3", "3" * 900).encode()) + RAW)],
    "a header of another Python": [("a.npy", header(FINE.replace("3,", "3L,").encode() + b"+") + RAW)],
    "too little data": [("a.npy", header(FINE.encode()) + RAW[:-1])],
    "too much data": [("a.npy", header(FINE.encode()) + RAW + b"\0")],
    "nothing": [("a.npy", b"")],
    "text": [("a.npy", b"hello")],
}


@pytest.mark.parametrize("members", MEMBERS.values(), ids=MEMBERS)
def test_hostile_members_are_refused(tmp_path, members):
    with pytest.raises(FormatError, match="m.npz"):
        read(make(tmp_path / "m.npz", *members))


def test_two_members_with_the_same_name_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        make(tmp_path / "m.npz", ("a.npy", npy(THREE)), ("a.npy", npy(THREE + 1)))
    with pytest.raises(FormatError, match="the same name"):
        read(tmp_path / "m.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_without_a_bounded_reader_are_refused(tmp_path, method):
    with pytest.raises(FormatError, match="another method than deflate"):
        read(make(tmp_path / "m.npz", ("a.npy", npy(THREE)), method=method))


def patched(path, offset, data, *, directory):
    """Overwrites part of the first directory entry, or of the end record."""
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02") if directory else raw.rindex(b"PK\x05\x06")
    raw[at + offset : at + offset + len(data)] = data
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("offset", "data", "directory"),
    [
        (8, b"\x01\x00", True),  # encrypted
        (6, b"\xff\xff", True),  # needs a version of zip that nobody has
        (16, b"\0\0\0\0", True),  # checksum
        (20, b"\x05\0\0\0", True),  # compressed bytes
        (20, b"\xff\xff\xff\x7f", True),
        (24, b"\xff\xff\xff\xff", True),  # bytes
        (24, b"\x01\0\0\0", True),
        (42, b"\xff\xff\xff\x7f", True),  # place
        (12, b"\xff\xff\xff\xff", False),  # size of the directory
        (12, b"\0\0\0\0", False),
        (16, b"\xff\xff\xff\xff", False),  # place of the directory
    ],
)
def test_a_directory_that_disagrees_with_the_file_is_refused(tmp_path, offset, data, directory):
    path = patched(make(tmp_path / "m.npz", ("a.npy", npy(THREE))), offset, data, directory=directory)
    with pytest.raises(FormatError, match="m.npz"):
        read(path)


def test_truncated_and_extended_files_are_refused(tmp_path):
    raw = make(tmp_path / "m.npz", ("a.npy", npy(THREE))).read_bytes()
    for end in range(len(raw)):
        (tmp_path / "m.npz").write_bytes(raw[:end])
        with pytest.raises(FormatError, match="m.npz"):
            read(tmp_path / "m.npz")
    (tmp_path / "m.npz").write_bytes(raw + b"more")
    with pytest.raises(FormatError, match="does not end"):
        read(tmp_path / "m.npz")


def test_bombs_are_refused_without_decompressing_them(tmp_path):
    bomb = header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (134217728,), }") + bytes(1 << 27)
    path = make(tmp_path / "m.npz", ("a.npy", bomb))
    # The directory says so little that the size looks right.
    lying = patched(make(tmp_path / "n.npz", ("a.npy", bomb)), 24, struct.pack("<I", 200), directory=True)
    del bomb
    tracemalloc.start()
    try:
        for file in (path, lying):
            with NpzReader(file) as reader, pytest.raises(FormatError):
                reader.read_bytes("a", 1000)
            with NpzReader(file) as reader, pytest.raises(FormatError):
                reader.read("a", np.float32, (3,))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_claim_beyond_the_ratio_of_deflate_is_refused(tmp_path):
    path = patched(make(tmp_path / "m.npz", ("a.npy", npy(THREE))), 24, struct.pack("<I", 10**6), directory=True)
    with pytest.raises(FormatError, match="claims more bytes than deflate"):
        read(path)
