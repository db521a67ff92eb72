import gzip
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from dsr_tool.errors import DsrError, FileError, FormatError, UsageError
from dsr_tool.train.datasets import open_dataset

SHAPE = (3, 8, 8)


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder, *, packed=True, labels=None):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 10)):
        images, classes = rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        files = {"images-idx3": images, "labels-idx1": classes if labels is None else labels}
        for kind, array in files.items():
            name, content = f"{part}-{kind}-ubyte", idx(array)
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return folder


def write_images(root, classes=("ants", "bees"), count=2, parts=("train", "val")):
    rng = np.random.default_rng(0)
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                picture = rng.integers(0, 256, (12 + i, 20, 3), dtype=np.uint8)
                Image.fromarray(picture).save(root / part / name / f"{i}.png")
    return root


def test_digits_are_split_by_class_and_the_same_each_time():
    data, again = open_dataset("digits", SHAPE), open_dataset("digits", SHAPE)
    assert torch.equal(data.train.images, again.train.images) and torch.equal(data.test.labels, again.test.labels)
    assert len(data.train.labels) + len(data.test.labels) == 1797
    every = torch.cat([data.train.labels, data.test.labels]).bincount()
    fraction = data.test.labels.bincount() / every
    assert fraction.min() > 0.19 and fraction.max() < 0.21
    assert data.train.images.dtype == torch.uint8 and data.train.images.shape[1:] == (1, 8, 8)
    assert int(data.train.images.max()) == 255 and data.classes[3] == "3"


@pytest.mark.parametrize("place", ["MNIST/raw", "raw", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_read_from_each_of_its_usual_folders(tmp_path, place, packed):
    folder = write_mnist(tmp_path / "root" / place, packed=packed)
    before = sorted(folder.iterdir())
    data = open_dataset(f"mnist:{tmp_path / 'root'}", SHAPE)
    assert data.train.images.shape == (30, 1, 28, 28) and data.test.labels.tolist() == list(range(10))
    assert data.num_classes == 10 and sorted(folder.iterdir()) == before


def test_idx_files_agree_with_torchvision(tmp_path):
    from torchvision.datasets import FashionMNIST

    folder = write_mnist(tmp_path / "FashionMNIST" / "raw", packed=False)
    theirs = FashionMNIST(tmp_path, train=False)
    ours = open_dataset(f"fashion-mnist:{tmp_path}", SHAPE)
    assert torch.equal(theirs.data, ours.test.images.squeeze(1)) and torch.equal(theirs.targets, ours.test.labels)
    assert tuple(theirs.classes) == ours.classes and folder.exists()


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
@pytest.mark.parametrize("kind", ["uint8", "float32", "float64"])
def test_arrays_of_every_layout_become_images(tmp_path, arrays, layout, kind):
    x = np.random.default_rng(0).integers(0, 256, (20, 6, 8, 3), dtype=np.uint8)
    expected = x if layout != "NHW" else x[..., :1]
    given = {"NHWC": x, "NCHW": x.transpose(0, 3, 1, 2), "NHW": x[..., 0]}[layout]
    given = given if kind == "uint8" else (given / 255).astype(kind)
    path = arrays(tmp_path / "a.npz", x_train=given, x_test=given[:8], classes=["a", "b", "c", "d"])
    data = open_dataset(f"arrays:{path}", SHAPE)
    images = data.train.images if kind == "uint8" else (data.train.images * 255).round()
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected)
    assert data.classes == ("a", "b", "c", "d") and data.num_classes == 4


def test_cifar_becomes_channels_first(monkeypatch):
    class Official:
        def __init__(self, root, train, download):
            assert root and not download
            count = 20 if train else 5
            self.data = np.random.default_rng(train).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            self.targets, self.classes = [i % 10 for i in range(count)], list("abcdefghij")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Official)
    data = open_dataset("cifar10:anywhere", SHAPE)
    assert np.array_equal(data.train.images.permute(0, 2, 3, 1).numpy(), Official("x", True, False).data)
    assert data.test.labels.tolist() == [0, 1, 2, 3, 4] and data.classes == tuple("abcdefghij")


def test_folders_of_images_are_found(tmp_path):
    data = open_dataset(f"images:{write_images(tmp_path)}", SHAPE)
    assert data.classes == ("ants", "bees") and data.train.labels.tolist() == [0, 0, 1, 1]
    assert data.train.read(1, "L").size == (20, 13)


def test_fake_images_have_the_size_of_the_input():
    data = open_dataset("fake:50", (1, 5, 7))
    assert data.train.images.shape == (50, 1, 5, 7) and len(data.test.labels) == 10
    assert torch.equal(data.train.images, open_dataset("fake:50", (1, 5, 7)).train.images)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("digit", UsageError, "--data 'digit' is unknown; did you mean digits"),
        ("digits:x", UsageError, "write it as digits"),
        ("mnist", UsageError, "write it as mnist:ROOT"),
        ("mnist:{tmp}", FileError, "has no train-images-idx3-ubyte"),
        ("fashion-mnist:{tmp}/none", FileError, "FashionMNIST/raw"),
        ("cifar10:{tmp}", FileError, "CIFAR10 folder .* does not hold the official cifar-10-batches-py"),
        ("cifar100:{tmp}/none", FileError, "cifar-100-python"),
        ("images:{tmp}", FileError, "train' does not exist; give a ROOT"),
        ("images:{tmp}/none", FileError, "give a ROOT with train/CLASS/"),
        ("arrays:{tmp}", FileError, "is not a file"),
        ("arrays:{tmp}/none.npz", FileError, "does not exist"),
        ("fake:0", UsageError, "from 2 to 10,000,000"),
        ("fake:many", UsageError, "a number of training images"),
    ],
)
def test_missing_or_malformed_data_specs_are_refused_in_one_line(tmp_path, spec, error, message):
    with pytest.raises(error, match=message) as caught:
        open_dataset(spec.format(tmp=tmp_path), SHAPE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None}, "has no 'x_test'"),
        ({"x_train": np.zeros((20, 8), np.uint8)}, "x_train has shape .20, 8. and type uint8; give"),
        ({"x_train": np.zeros((20, 5, 8, 8), np.uint8)}, "with 1 or 3 channels"),
        ({"x_train": np.zeros((20, 8, 8, 1), np.uint8)}, "x_train has 1 channels and x_test has 3"),
        ({"x_train": np.full((20, 8, 8, 3), 2.0)}, r"floats in \[0, 1\]"),
        ({"x_train": np.full((20, 8, 8, 3), np.nan)}, r"floats in \[0, 1\]"),
        ({"x_train": np.zeros((20, 8, 8, 3), np.int32)}, "give uint8"),
        ({"y_train": np.arange(19)}, "y_train has shape .19,. and type int64; .* each of the 20 images"),
        ({"y_train": np.arange(20) - 1}, "0 or more, for each"),
        ({"y_train": np.zeros(20)}, "one class number"),
        ({"x_test": np.zeros((0, 8, 8, 3), np.uint8), "y_test": np.zeros(0, int)}, "x_test has shape .0, 8, 8, 3."),
        ({"x_train": np.array([{}] * 20)}, "cannot be read"),
    ],
)
def test_arrays_that_are_not_images_are_refused(tmp_path, arrays, changes, message):
    with pytest.raises(FormatError, match=message):
        open_dataset(f"arrays:{arrays(tmp_path / 'a.npz', **changes)}", SHAPE)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no archive at all", b"\x93NUMPY\x01"])
def test_damaged_array_files_are_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(FormatError, match="cannot be read"):
        open_dataset(f"arrays:{tmp_path / 'a.npz'}", SHAPE)


def test_damaged_idx_files_are_refused(tmp_path):
    folder = write_mnist(tmp_path / "cut", packed=True)
    whole = (folder / "train-images-idx3-ubyte.gz").read_bytes()
    for content in (whole[:100], b"not packed", gzip.compress(b"\0\0\x08\x01abcd"), whole[:-9] + b"x" * 9):
        (folder / "train-images-idx3-ubyte.gz").write_bytes(content)
        with pytest.raises(FormatError, match="is damaged"):
            open_dataset(f"mnist:{folder}", SHAPE)
    with pytest.raises(FormatError, match="do not belong together"):
        open_dataset(f"mnist:{write_mnist(tmp_path / 'labels', labels=np.arange(7))}", SHAPE)
    missing = write_mnist(tmp_path / "missing")
    (missing / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileError, match="t10k-labels"):
        open_dataset(f"mnist:{missing}", SHAPE)


def test_classes_of_both_folders_must_agree(tmp_path):
    write_images(tmp_path, ("ants", "bees"), parts=("train",))
    write_images(tmp_path, ("ants", "wasps"), parts=("val",))
    with pytest.raises(FormatError, match="class 'bees' is only in one of"):
        open_dataset(f"images:{tmp_path}", SHAPE)
    (tmp_path / "val" / "empty").mkdir()
    with pytest.raises(FileError, match="val' has a folder 'empty' without pictures, so it cannot be a class"):
        open_dataset(f"images:{tmp_path}", SHAPE)


def test_visible_folders_give_what_torchvision_gives(tmp_path):
    root = write_images(tmp_path, ("b", "A", "a-10", "a"))
    nested = root / "train" / "a" / "nested" / "deeper"
    nested.mkdir(parents=True)
    for name in ("z.png", "a.png", "Z.PNG"):
        (nested / name).write_bytes(b"")
        (nested.parent / name).write_bytes(b"")
    (root / "train" / "beside.png").write_bytes(b"")
    (root / "train" / "b" / "notes.txt").write_bytes(b"")
    (root / "train" / "b" / "link").symlink_to(nested)
    data, theirs = open_dataset(f"images:{root}", SHAPE), ImageFolder(str(root / "train"))
    assert list(data.classes) == theirs.classes
    assert list(zip(data.train.paths, data.train.labels.tolist(), strict=True)) == theirs.samples


def test_hidden_folders_and_files_are_neither_classes_nor_pictures(tmp_path):
    root = write_images(tmp_path)
    plain = open_dataset(f"images:{root}", SHAPE)
    picture = next((root / "train" / "ants").iterdir()).read_bytes()
    for hidden in (
        ".ipynb_checkpoints/0.png",
        "ants/.ipynb_checkpoints/0-checkpoint.png",
        "ants/._0.png",
        "bees/.hidden.jpg",
        "bees/deep/.hidden/1.png",
        ".DS_Store",
        ".cache.png",
    ):
        for part in ("train", "val"):
            (root / part / hidden).parent.mkdir(parents=True, exist_ok=True)
            (root / part / hidden).write_bytes(picture)
    (root / ".train").mkdir()
    data = open_dataset(f"images:{root}", SHAPE)
    assert data.classes == plain.classes == ("ants", "bees")
    assert data.train.paths == plain.train.paths
    assert data.test.labels.tolist() == plain.test.labels.tolist()


def test_folders_whose_files_are_all_hidden_are_refused_by_name(tmp_path):
    root = write_images(tmp_path)
    (root / "train" / "__MACOSX").mkdir()
    (root / "train" / "__MACOSX" / "._0.png").write_bytes(b"")
    with pytest.raises(FileError, match="has a folder '__MACOSX' without pictures.*remove it"):
        open_dataset(f"images:{root}", SHAPE)


def test_a_root_without_class_folders_is_refused(tmp_path):
    (tmp_path / "train" / ".hidden").mkdir(parents=True)
    with pytest.raises(FileError, match="train' has no class folders; give a ROOT"):
        open_dataset(f"images:{tmp_path}", SHAPE)


@pytest.mark.parametrize("ending", ["gif", "jp2", "pbm"])
def test_pictures_that_torchvision_leaves_out_are_found(tmp_path, ending):
    root = write_images(tmp_path)
    Image.new("1", (8, 8)).convert("L" if ending != "pbm" else "1").save(root / "train" / "ants" / f"z.{ending}")
    data = open_dataset(f"images:{root}", SHAPE)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    data.train.read(2, "RGB")


def test_digits_without_scikit_learn_name_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DsrError, match=r"pip install 'dsr-tool\[digits\]'"):
        open_dataset("digits", SHAPE)
