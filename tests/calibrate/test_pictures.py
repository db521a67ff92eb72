"""Pictures of a calibration: sampled by seed, prepared as predict does, damaged files named, loaders checked."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from dsr_tool.calibrate.pictures import read_calibration
from dsr_tool.errors import FileError, UsageError
from dsr_tool.runtime import load_inputs
from dsr_tool.sparsity.config import ModelConfig, Preprocessing

SHAPE = (3, 16, 16)


def config(shape: tuple[int, ...] = SHAPE) -> ModelConfig:
    return ModelConfig("torchvision", "net", 10, shape, Preprocessing(resize=18, crop=16))


def draw(path: Path, mode: str = "RGB", size: tuple[int, int] = (24, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(path.name.encode())).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Returns a folder of 20 pictures in two class folders, with a README and a hidden file."""
    root = tmp_path / "photos"
    for index in range(20):
        draw(root / "ab"[index % 2] / f"{index:02}.png")
    (root / "README.md").write_text("no picture")
    (root / "a" / "._00.png").write_bytes(b"resource fork")
    return root


def test_pictures_are_those_of_predict_under_their_names(folder):
    found = read_calibration(folder, config())
    assert found.count == 20 and not found.warnings
    assert found.inputs.dtype == torch.float32 and found.inputs.is_contiguous()
    assert sorted(found.names) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("[0-9]*.png"))
    for name, picture in zip(found.names, found.inputs, strict=True):
        assert np.array_equal(picture.numpy(), load_inputs([folder / name], config())[0])


def test_the_seed_chooses_the_sample_and_nothing_else_does(folder, tmp_path):
    first, again, other = (read_calibration(folder, config(), 17, seed) for seed in (0, 0, 1))
    assert first.names == again.names and torch.equal(first.inputs, again.inputs)
    assert len(set(first.names)) == 17 and set(first.names) != set(other.names)
    # A smaller sample is the beginning of a larger one, and both classes are in it.
    assert read_calibration(folder, config(), 16).names == first.names[:16]
    assert {name[0] for name in first.names} == {"a", "b"}
    folder.rename(tmp_path / "elsewhere")
    assert read_calibration(tmp_path / "elsewhere", config(), 17).names == first.names


def test_any_mode_and_size_is_converted(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        draw(tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}", mode, (9, 300))
    assert read_calibration(tmp_path, config()).inputs.shape == (5, *SHAPE)


def test_damaged_files_are_replaced_and_named(folder):
    for index in range(5):
        (folder / f"bad{index}.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    found = read_calibration(folder, config(), 20)
    assert found.count == 20 and not any("bad" in name for name in found.names)
    (warning,) = read_calibration(folder, config(), 25).warnings
    named, reason = warning.split("; of the first, ")
    assert "5 files were skipped in the calibration folder" in named and named.count("bad") == 3
    assert "cannot be read: Truncated File Read" in reason


def test_pictures_without_a_range_are_skipped_with_the_reason(folder):
    Image.new("F", (24, 20)).save(folder / "depth.tif")
    (warning,) = read_calibration(folder, config(), 25).warnings
    assert warning.startswith("1 file was skipped in the calibration folder: 'depth.tif'; of the first, input ")
    assert "holds floats, for which black and white are not defined; save it with 8 or 16 bits" in warning


def test_few_pictures_warn_and_none_are_an_error(tmp_path):
    draw(tmp_path / "one.png")
    (warning,) = read_calibration(tmp_path, config()).warnings
    assert "1 usable picture;" in warning and "fewer than 16" in warning
    (tmp_path / "one.png").write_bytes(b"damaged")
    with pytest.raises(FileError, match=r"1 pictures or arrays, none of which can be used: input '.*one\.png'"):
        read_calibration(tmp_path, config())
    (tmp_path / "one.png").rename(tmp_path / "one.txt")
    with pytest.raises(FileError, match=r"only 1 files of other kinds, such as 'one\.txt'"):
        read_calibration(tmp_path, config())


@pytest.mark.parametrize("name", ["absent", "file"])
def test_a_path_that_is_no_folder_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="give a folder of pictures"):
        read_calibration(tmp_path / name, config())


def test_links_in_a_circle_end_and_count_once(folder):
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "c").symlink_to(folder / "b")
    assert read_calibration(folder, config()).count == 20


def test_arrays_are_inputs_of_video_models_and_pictures_are_not(tmp_path):
    shape = (3, 4, 8, 8)
    draw(tmp_path / "photo.png")
    with pytest.raises(UsageError, match="which pictures do not have"):
        read_calibration(tmp_path, config(shape))
    (tmp_path / "photo.png").unlink()
    clips = np.random.default_rng(0).normal(size=(20, *shape)).astype(np.float32)
    np.save(tmp_path / "clips.npy", clips)
    found = read_calibration(tmp_path, config(shape), 18)
    assert found.names[-1] == "clips.npy[17]" and np.array_equal(found.inputs, clips[:18])


def test_models_of_any_size_take_arrays_of_one_shape(tmp_path):
    for index, side in enumerate((8, 9)):
        np.save(tmp_path / f"{index}.npy", np.zeros((3, side, side), np.float32))
    with pytest.raises(UsageError, match="give inputs of one shape"):
        read_calibration(tmp_path, config(()))


def test_tensors_are_sampled_and_loaders_are_read_in_order():
    inputs = torch.randn(40, *SHAPE, dtype=torch.float64)
    pairs = TensorDataset(inputs, torch.arange(40))
    sampled = read_calibration(inputs, config(), 16, seed=3)
    assert torch.equal(sampled.inputs, inputs[[int(name) for name in sampled.names]].float())
    for source in (DataLoader(pairs, batch_size=7), DataLoader(inputs, batch_size=7), pairs, [inputs]):
        found = read_calibration(source, config(), 16)
        assert torch.equal(found.inputs, inputs[:16].float()) and not found.warnings
    found.inputs.zero_()
    assert inputs.abs().min() > 0, "the caller's tensor must not change"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (torch.zeros(4, 3, 8, 8), r"\(4, 3, 8, 8\)"),
        (torch.zeros(4, *SHAPE, dtype=torch.uint8), "uint8"),
        (torch.full((4, *SHAPE), torch.nan), "NaN"),
        (torch.zeros(0, *SHAPE), r"\(0, 3"),
        ([], "no inputs"),
        ([{"pixels": torch.zeros(1, *SHAPE)}], "dict"),
    ],
)
def test_a_wrong_tensor_or_loader_is_refused(source, message):
    with pytest.raises(UsageError, match=message):
        read_calibration(source, config())


def test_a_count_below_one_is_refused(folder):
    with pytest.raises(UsageError, match="--calibration-images 0"):
        read_calibration(folder, config(), 0)
