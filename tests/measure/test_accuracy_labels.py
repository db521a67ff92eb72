"""The class of a picture follows from labels.csv or from class folders, and every fault of a table is said at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.measure.accuracy.labels import read_labels
from dsr_tool.sparsity.config import ModelConfig


def config(classes: int = 3, labels: tuple[str, ...] = ()) -> ModelConfig:
    return ModelConfig("torchvision", "net", classes, (3, 8, 8), labels=labels)


def pictures(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / name)
    return root


def classes(root: Path, model: ModelConfig) -> dict[str, int]:
    found = read_labels(root, model, required=True)
    return {path.relative_to(root).as_posix(): index for path, index in zip(found.files, found.classes, strict=True)}


def test_folders_with_the_names_of_classes_are_those_classes_in_any_number(tmp_path):
    pictures(tmp_path, "Great_white-shark/1.png", "cat/deep/2.png", "3.png")
    model = config(4, ("dog", "cat", "ant", "great white shark"))
    assert classes(tmp_path, model) == {"Great_white-shark/1.png": 3, "cat/deep/2.png": 1}
    assert read_labels(tmp_path, model, required=True).notes == ("1 pictures beside the class folders were left out",)


def test_folders_of_numbers_are_indices(tmp_path):
    # Sorted as text, 10 would come before 2.
    assert classes(pictures(tmp_path, "2/a.png", "10/b.png"), config(11)) == {"10/b.png": 10, "2/a.png": 2}
    # Names of the model's own classes come first, even if they are numbers.
    assert classes(tmp_path, config(2, ("10", "2"))) == {"10/b.png": 0, "2/a.png": 1}


def test_as_many_folders_as_classes_are_classes_in_sorted_order(tmp_path):
    root = pictures(tmp_path, "n03/a.png", "n01/b.png", "n02/c.png")
    for model in (config(3), config(3, ("tench", "goldfish", "shark"))):
        assert classes(root, model) == {"n01/b.png": 0, "n02/c.png": 1, "n03/a.png": 2}


@pytest.mark.parametrize(
    ("folders", "model", "unknown"),
    [
        (("n01", "n02"), config(3), "'n01', 'n02'"),  # fewer than classes, and no names to compare with
        (("ants", "wasps"), config(2, ("ants", "bees")), "'wasps'"),  # one known name: the order is not meant
        (("1", "2"), config(2), "'1', '2'"),  # counted from 1
        (("crane", "x"), config(3, ("crane", "crane", "x")), "'crane'"),  # two classes of one name
    ],
)
def test_folders_that_no_rule_assigns_are_refused_with_both_ways_out(tmp_path, folders, model, unknown):
    root = pictures(tmp_path, *(f"{name}/a.png" for name in folders))
    with pytest.raises(UsageError, match="labels.csv") as error:
        read_labels(root, model, required=True)
    assert f"{unknown} cannot be assigned" in str(error.value)
    found = read_labels(root, model, required=False)
    assert found.classes is None and found.rule == "none" and "cannot be assigned" in found.notes[0]


def test_a_folder_without_classes_points_to_against(tmp_path):
    with pytest.raises(UsageError, match="--against"):
        read_labels(pictures(tmp_path, "a.png"), config(), required=True)
    with pytest.raises(FileError, match="--accuracy .* does not exist"):
        read_labels(tmp_path / "absent", config(), required=False)


@pytest.mark.parametrize(
    "table",
    [
        "path,class\na.png,2\nb/c.png,0\n",
        "\ufeffpath,wnid,imagenet_class_index,category\r\na.png,n1,2,x\r\nb/c.png,n2,0,y\r\n",
        "Label,File\nBEE,a.png\nant,b/c.png\n",
        'filename,label\n"a.png",bee\nb/c.png , ant\n',
    ],
)
def test_a_table_has_paths_and_numbers_or_names(tmp_path, table):
    pictures(tmp_path, "a.png", "b/c.png", "b/d.png")
    (tmp_path / "labels.csv").write_bytes(table.encode())
    model = config(3, ("ant", "wasp", "bee"))
    assert classes(tmp_path, model) == {"a.png": 2, "b/c.png": 0}
    found = read_labels(tmp_path, model, required=True)
    assert found.rule.startswith("labels.csv, column") and found.notes[0].startswith("1 pictures")


def test_every_fault_of_a_table_is_said_at_once(tmp_path):
    pictures(tmp_path, "a.png")
    (tmp_path / "labels.csv").write_text("path,class\na.png,0\na.png,1\nb.png,1\nc.png,7\nd.png\n")
    with pytest.raises(FormatError) as error:
        read_labels(tmp_path, config(3), required=True)
    for part in (
        "1 incomplete lines ('6')",
        "3 missing files ('b.png', 'c.png', 'd.png')",
        "1 repeated paths ('a.png')",
        "3 unknown classes ('0', '1', '7')",  # not all cells are numbers, so they are names
        "3 classes and no names",
    ):
        assert part in str(error.value), part


@pytest.mark.parametrize("content", [b"", b"path,class\n", b"a.png,1\n", b"path,class\n\xff\xfe,1\n", b"path\na.png\n"])
def test_a_file_that_is_no_such_table_is_refused(tmp_path, content):
    pictures(tmp_path, "a.png")
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(FormatError, match=r"labels\.csv"):
        read_labels(tmp_path, config(3), required=True)
