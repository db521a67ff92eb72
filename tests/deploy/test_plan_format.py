"""A reader of plans that was written from docs/format.md finds the weights, texts and levels of a model."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pytest

from dsr_tool.formats.archive import open_archive
from dsr_tool.runtime.deploy.format import string
from dsr_tool.runtime.kernels.ops import ABI
from dsr_tool.runtime.session import decode


class Reader:
    """Reads numbers, bytes and texts from front to back."""

    def __init__(self, content):
        self.content, self.now = content, 0

    def number(self):
        return struct.unpack("<q", self.bytes(8))[0]

    def bytes(self, size):
        found = self.content[self.now : self.now + size]
        assert len(found) == size
        padding = self.content[self.now + size : self.now + size + -size % 8]
        assert padding == bytes(-size % 8)
        self.now += size + -size % 8
        return found

    def text(self):
        found = self.bytes(self.number())
        assert found[-1] == 0
        return found[:-1].decode()

    def value(self):
        name = self.text()
        return name, tuple(self.number() for _ in range(self.number()))

    def list(self, item):
        return [item() for _ in range(self.number())]

    def rows(self, width):
        return self.list(lambda: tuple(self.number() for _ in range(width)))

    def weight(self):
        """Returns a weight with its zeros, flat."""
        form, width, size, active, mask_bytes = (self.number() for _ in range(5))
        mask, values = self.bytes(mask_bytes), self.bytes(active * width)
        dense = np.zeros(size, np.float32 if width == 4 else np.int8)
        bits = np.ones(size, bool)
        if form == 1:
            bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=size).astype(bool)
        if form == 2:
            bits, at = np.zeros(size, bool), 0
            for distance in mask:
                at += distance
                if distance < 255:
                    bits[at] = True
                    at += 1
        dense[bits] = np.frombuffer(values, dense.dtype)
        return dense

    def table(self):
        kind = ("<f4", "<i4", "<i8")[self.number()]
        count = self.number()
        return np.frombuffer(self.bytes(count * np.dtype(kind).itemsize), kind)

    def level(self):
        name, lanes, widest, widest_dense = self.text(), self.number(), self.number(), self.number()
        return name, (lanes, widest, widest_dense), self.bytes(self.number())


def test_a_label_that_is_no_unicode_is_written_all_the_same():
    assert Reader(string("Käse\ud800\0!")).text() == "Käse?!"


@pytest.mark.parametrize("name", ["gated", "few bits", "heads"])
def test_a_plan_is_what_the_page_says(archives, plan_of, levels, name):
    content = plan_of(name, batch=2)
    assert content[:8] == b"\x89DSRPLAN"
    version, interface, _, size, checksum = struct.unpack("<5q", content[8:48])
    assert (version, interface, size, checksum) == (1, ABI, len(content), zlib.crc32(content[48:]))
    file = Reader(content[48:])
    head = Reader(file.bytes(file.number()))
    texts = dict(head.list(lambda: (head.text(), head.text())))
    archive = open_archive(archives[name])
    assert json.loads(texts["config"])["architecture"] == texts["architecture"] == archive.config.architecture
    assert texts["mean"] == "0.4 0.5 0.6" and texts["resize"] == "44"
    assert head.list(head.value) == [("x", (2, 3, 40, 36))]
    assert [value[0] for value in head.list(head.value)] == [value.name for value in archive.graph.outputs]
    assert head.now == len(head.content)

    weights = {weight.tobytes() for weight in file.list(file.weight)}
    _, tensors = decode(archive)
    wanted = {getattr(one, "codes", one.values).dtype.type: one for one in tensors.values()}
    for tensor in tensors.values():
        dense = np.zeros(tensor.mask.size, getattr(tensor, "codes", tensor.values).dtype)
        dense[tensor.mask.positions] = getattr(tensor, "codes", tensor.values)
        assert dense.tobytes() in weights
    assert set(wanted) == {np.int8 if name == "few bits" else np.float32}
    assert len(weights) == len(tensors)

    assert all(np.isfinite(table).all() for table in file.list(file.table))
    found = file.list(file.level)
    assert [(one, sizes) for one, sizes, _ in found] == [
        (row.name, (row.lanes, row.widest_tile, row.widest_dense_tile)) for row in levels
    ]
    assert file.now == len(file.content)
    for _, _, body in found:
        level = Reader(body)
        arena, packs = level.number(), level.rows(12)
        arrays = level.rows(3)
        assert arena > 0 and all(0 <= pack[0] < len(weights) for pack in packs)
        assert sorted(role for _, role, _ in arrays if role) == [1] + [2] * len(archive.graph.outputs)
