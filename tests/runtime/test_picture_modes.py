"""Pictures of every mode keep their values: wide greys are scaled, and numbers without a range are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dsr_tool.errors import FormatError
from dsr_tool.runtime import load_inputs
from dsr_tool.runtime.pictures import to_mode
from dsr_tool.sparsity.config import ModelConfig, Preprocessing
from dsr_tool.train.images import OnDisk

GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)
WIDE = GREYS.astype(np.uint16) * 257


def read(path: Path, channels: int = 1) -> np.ndarray:
    """Returns a picture as prediction and training read it, which must be the same; values in [0, 255]."""
    plain = Preprocessing(0, 0, (0.0,) * channels, (1.0,) * channels)
    config = ModelConfig("module", "Net", 2, (channels, 16, 16), plain)
    mode = "L" if channels == 1 else "RGB"
    trained = np.asarray(OnDisk([str(path)], torch.zeros(1)).read(0, mode)).reshape(16, 16, channels)
    predicted = load_inputs([path], config)[0].transpose(1, 2, 0) * 255
    np.testing.assert_allclose(predicted, trained, atol=1e-4)
    return trained


def tiff(path: Path, values: np.ndarray, bits: int, sample_format: int = 1) -> Path:
    """Writes greys as an uncompressed TIFF file of any depth, which Pillow cannot."""
    if bits == 12:
        pairs = values.astype(np.uint32).reshape(-1, 2)
        packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    else:
        packed = values.tobytes()
    height, width = values.shape
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 3, height), (279, 4, len(packed)), (339, 3, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    start = struct.pack("<2sHI", b"II", 42, 8 + len(packed))
    path.write_bytes(start + packed + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0")
    return path


@pytest.mark.parametrize("ending", ["png", "tif", "pgm", "jp2"])
@pytest.mark.parametrize("channels", [1, 3])
def test_greys_of_16_bits_are_scaled_to_those_of_8(tmp_path, ending, channels):
    path = tmp_path / f"wide.{ending}"
    Image.fromarray(WIDE).save(path, **({"irreversible": False} if ending == "jp2" else {}))
    assert np.array_equal(read(path, channels), np.repeat(GREYS[..., None], channels, 2))


def test_every_grey_of_16_bits_is_rounded_to_the_nearest(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (16, 16), np.uint16)
    Image.fromarray(values).save(tmp_path / "wide.png")
    assert np.array_equal(read(tmp_path / "wide.png")[..., 0], np.rint(values / 257).astype(np.uint8))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_every_order_of_bytes_is_read(mode):
    picture = Image.frombytes(mode, (16, 16), WIDE.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    assert np.array_equal(np.asarray(to_mode(picture, "L", "it")), GREYS)


def test_greys_of_12_bits_have_a_white_of_their_own(tmp_path):
    path = tiff(tmp_path / "x.tif", np.rint(GREYS * (4095 / 255)).astype(np.uint16), 12)
    assert np.array_equal(read(path)[..., 0], GREYS)


@pytest.mark.parametrize(
    ("values", "bits", "sample_format", "what"),
    [
        (GREYS / np.float32(255), 32, 3, "floats"),
        (GREYS.astype(np.int32) << 20, 32, 2, "32-bit or signed integers"),
        (GREYS.astype(np.int16) - 128, 16, 2, "32-bit or signed integers"),
    ],
)
def test_numbers_without_a_range_are_refused(tmp_path, values, bits, sample_format, what):
    path = tiff(tmp_path / "x.tif", values, bits, sample_format)
    with pytest.raises(FormatError, match=rf"x\.tif' holds {what}, for which black and white are not defined; save"):
        load_inputs([path], ModelConfig("module", "Net", 2, (1, 16, 16)))
    with pytest.raises(FormatError, match=rf"image '.*x\.tif' holds {what}.*8 or 16 bits per value\.$"):
        OnDisk([str(path)], torch.zeros(1)).read(0, "L")


@pytest.mark.parametrize("mode", sorted(Image.MODES))
@pytest.mark.parametrize("wanted", ["L", "RGB"])
def test_every_mode_of_pillow_keeps_its_values_or_is_refused(mode, wanted):
    """A mode that a later Pillow adds fails here until somebody has looked at it."""
    if mode in ("F", "I"):
        with pytest.raises(FormatError):
            to_mode(Image.new(mode, (16, 16)), wanted, "it")
        return
    picture = Image.fromarray(WIDE) if mode.startswith("I;16") else to_8_bits(mode)
    converted = to_mode(picture, wanted, "it")
    assert converted.mode == wanted
    greys = np.asarray(converted.convert("L"), int)
    expected = 255 * (GREYS > 127) if mode == "1" else GREYS
    # Pillow's colour conversions are off by a few levels.
    assert np.abs(greys - expected).max() <= 4


def to_8_bits(mode: str) -> Image.Image:
    picture = Image.fromarray(GREYS)
    if mode == "1":
        return picture.convert(mode, dither=Image.Dither.NONE)
    if mode in ("P", "PA"):  # from grey, since the palette for colours has few greys
        return picture.convert("P").convert(mode)
    if mode == "La":
        return picture.convert("LA").convert(mode)
    return picture.convert("RGB").convert("RGBA" if mode == "RGBa" else mode).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBX", "RGBa"])
def test_modes_of_8_bits_are_converted_as_torchvision_does(mode):
    picture = to_8_bits(mode)
    for wanted in ("L", "RGB"):
        assert np.array_equal(np.asarray(to_mode(picture, wanted, "it")), np.asarray(picture.convert(wanted)))
