"""Pictures are preprocessed like torchvision does, and files that are no input are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.runtime import load_inputs
from dsr_tool.sparsity.config import ModelConfig, Preprocessing

MODES = {
    "bilinear": transforms.InterpolationMode.BILINEAR,
    "bicubic": transforms.InterpolationMode.BICUBIC,
    "nearest": transforms.InterpolationMode.NEAREST,
}


def config(shape: tuple[int, ...] = (3, 20, 20), **changes) -> ModelConfig:
    return ModelConfig("torchvision", "net", 10, shape, Preprocessing(**{"resize": 24, "crop": 20, **changes}))


def picture(path: Path, width: int, height: int, mode: str = "RGB", seed: int = 0) -> Path:
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), np.uint8)
    Image.fromarray(pixels.squeeze(-1) if bands == 1 else pixels).convert(mode).save(path)
    return path


def by_torchvision(path: Path, preprocessing: Preprocessing, mode: str = "RGB", version: str = "v1") -> np.ndarray:
    """Returns a picture as torchvision preprocesses it, with its first or second API of transforms."""
    image = Image.open(path).convert(mode)
    package = transforms if version == "v1" else v2
    steps = [
        *([package.Resize(preprocessing.resize, MODES[preprocessing.interpolation])] if preprocessing.resize else []),
        *([package.CenterCrop(preprocessing.crop)] if preprocessing.crop else []),
        *([package.ToTensor()] if version == "v1" else [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
        package.Normalize(preprocessing.mean, preprocessing.std),
    ]
    return package.Compose(steps)(image).numpy()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(5, 70),
    st.integers(5, 70),
    st.integers(16, 40),
    st.integers(9, 50),
    st.sampled_from(sorted(MODES)),
    st.sampled_from(("v1", "v2")),
)
def test_pictures_are_preprocessed_like_torchvision(tmp_path_factory, width, height, resize, crop, mode, version):
    path = picture(tmp_path_factory.mktemp("pictures") / "a.png", width, height)
    model = config((3, crop, crop), resize=resize, crop=crop, interpolation=mode)
    found = load_inputs([path], model)
    assert found.dtype == np.float32
    assert found.shape == (1, 3, crop, crop)
    np.testing.assert_allclose(
        found[0], by_torchvision(path, model.preprocessing, version=version), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("size", [(640, 427), (1000, 333), (333, 1000), (257, 256), (256, 256), (224, 300)])
@pytest.mark.parametrize("resize", [256, 232])
def test_common_photograph_sizes_are_preprocessed_like_torchvision(tmp_path, size, resize):
    path = picture(tmp_path / "a.png", *size)
    model = config((3, 224, 224), resize=resize, crop=224)
    np.testing.assert_allclose(
        load_inputs([path], model)[0], by_torchvision(path, model.preprocessing), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_any_mode_become_gray_or_rgb(tmp_path, mode, channels):
    path = picture(tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"), 40, 30, mode)
    one = (0.3,) * channels
    model = config((channels, 20, 20), mean=one, std=one)
    expected = by_torchvision(path, model.preprocessing, "L" if channels == 1 else "RGB")
    np.testing.assert_allclose(load_inputs([path], model)[0], expected, rtol=1e-6, atol=1e-6)


def test_without_resize_and_crop_the_size_stays(tmp_path):
    path = picture(tmp_path / "a.png", 28, 28, "L")
    model = config((1, 28, 28), resize=0, crop=0, mean=(0.5,), std=(0.5,))
    np.testing.assert_allclose(load_inputs([path], model)[0], by_torchvision(path, model.preprocessing, "L"), rtol=1e-6)


def test_pictures_are_resized_to_the_input_shape_of_the_model(tmp_path):
    path = picture(tmp_path / "a.png", 50, 31)
    found = load_inputs([path], config((3, 16, 20), resize=0, crop=0))
    image = Image.open(path).resize((20, 16), Image.Resampling.BILINEAR)
    expected = (np.asarray(image) / 255 - Preprocessing().mean) / Preprocessing().std
    np.testing.assert_allclose(found[0], expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)


def test_a_model_without_input_shape_requires_pictures_of_one_size(tmp_path):
    paths = [picture(tmp_path / f"{i}.png", 30 + i // 2, 30, seed=i) for i in range(3)]
    model = config((), resize=0, crop=0)
    assert load_inputs(paths[:2], model).shape == (2, 3, 30, 30)
    with pytest.raises(UsageError, match=r"2\.png.*one shape"):
        load_inputs(paths, model)


def test_arrays_and_pictures_keep_their_order(tmp_path):
    batch = np.random.default_rng(0).standard_normal((3, 3, 20, 20)).astype(np.float32)
    np.save(tmp_path / "one.npy", batch[0])
    np.save(tmp_path / "batch.npy", batch[1:])
    path = picture(tmp_path / "a.png", 30, 30)
    found = load_inputs([tmp_path / "one.npy", str(path), str(tmp_path / "batch.npy")], config())
    assert found.shape == (4, 3, 20, 20)
    np.testing.assert_array_equal(found[[0, 2, 3]], batch)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 20, 20)),
        np.zeros((3, 20, 21), np.float32),
        np.zeros((1, 1, 3, 20, 20), np.float32),
        np.zeros((0, 3, 20, 20), np.float32),
        np.zeros((), np.float32),
        np.zeros((20, 20, 3), np.uint8),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UsageError, match=r"a\.npy.*expects float32 of shape \(3, 20, 20\)"):
        load_inputs([tmp_path / "a.npy"], config())


def test_arrays_of_objects_are_never_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(FormatError, match=r"a\.npy.*not a \.npy file of numbers"):
        load_inputs([tmp_path / "a.npy"], config())


@pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\x10\x00garbage garbage!"])
def test_damaged_arrays_are_refused_by_name(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(FormatError, match=r"a\.npy"):
        load_inputs([tmp_path / "a.npy"], config())


def test_files_that_are_no_pictures_are_refused_by_name(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(FormatError, match=r"a\.png.*not a picture"):
        load_inputs([tmp_path / "a.png"], config())


def test_a_truncated_picture_is_refused_by_name(tmp_path):
    path = picture(tmp_path / "a.jpg", 60, 60)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(FileError, match=r"a\.jpg.*truncated"):
        load_inputs([path], config())


def test_missing_files_folders_and_no_files_are_refused(tmp_path):
    with pytest.raises(FileError, match=r"absent\.png.*does not exist"):
        load_inputs([tmp_path / "absent.png"], config())
    with pytest.raises(FileError, match="is not a file"):
        load_inputs([tmp_path], config())
    with pytest.raises(UsageError, match="no inputs"):
        load_inputs([], config())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (config((4, 20, 20)), "pictures do not have"),
        (config((784,)), "pictures do not have"),
        (config((1, 20, 20)), "mean"),
        (config(interpolation="lanczos"), "interpolation"),
    ],
)
def test_pictures_are_refused_by_models_with_other_inputs(tmp_path, model, message):
    with pytest.raises(UsageError, match=message):
        load_inputs([picture(tmp_path / "a.png", 30, 30)], model)
