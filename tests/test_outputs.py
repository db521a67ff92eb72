"""Outputs that are no files are never replaced, and nothing is blamed on a full disk that has none."""

import os

import pytest

from dsr_tool.errors import FileError, UsageError
from dsr_tool.files import disk_is_full, new_file, new_folder
from dsr_tool.sparsity.budget import Budget
from dsr_tool.train.settings import TrainSettings


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_a_pipe_or_a_device_is_not_replaced_with_force_either(tmp_path, make):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    options = {"marker": "config.json"} if make is new_folder else {}
    with pytest.raises(FileError, match="is a device or a pipe"), make(pipe, force=True, **options):
        pass
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_a_folder_without_a_size_is_not_full(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage(0, 0))
    assert not disk_is_full(OSError(2, "no such file"), tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage(10**9, 0))
    assert disk_is_full(OSError(2, "no such file"), tmp_path)


class _Usage:
    def __init__(self, total, free):
        self.total, self.free = total, free


@pytest.mark.parametrize("text", ["", "wrong", "a\x1b[31m", "1/0"])
def test_a_sparsity_that_is_no_number_is_quoted(text):
    with pytest.raises(UsageError) as caught:
        Budget.of_sparsity(text)
    assert f"sparsity {text!r} is not a number in [0, 1)" in str(caught.value)


def test_a_batch_that_no_tensor_can_have_is_refused():
    with pytest.raises(UsageError, match=r"--batch-size 99999999999999999999 is not allowed; give 2 or more images"):
        TrainSettings(batch_size=99999999999999999999).check()
