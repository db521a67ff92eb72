"""A full disk: the sentence names the folder that is full, whoever wrote there, and nothing is left behind."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dsr_tool.errors import CheckFailed, FileError, FormatError, UsageError
from dsr_tool.files import new_file, new_folder, temporary_folder, writing

LARGE = np.ones(300_000, np.float32)


@pytest.fixture
def full(tmp_path):
    """Returns a folder of 40 kB, on a disk of its own."""
    place = tmp_path / "small disk"
    place.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(place)]
    try:
        subprocess.run(mounted, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this process may not mount a file system")
    yield place
    # Lazily, since a session in a traceback may still have a removed file open.
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def full_temporary(full, monkeypatch):
    """Returns the same folder, as the one for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(full))
    return full


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Returns the folder of a model whose files do not fit."""
    from converters.conversion import convert

    path = tmp_path_factory.mktemp("models") / "net"
    convert("lenet-300-100", sparsity=0.8).save(path)
    return path


def save_with_torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save({"a": torch.from_numpy(LARGE)}, file)


def save_with_numpy(path: Path) -> None:
    with path.open("wb") as file:
        LARGE.tofile(file)


WRITERS = {
    "bytes": lambda path: path.write_bytes(LARGE.tobytes()),
    "text": lambda path: path.write_text("x" * 300_000, encoding="utf-8"),
    "safetensors": lambda path: save_file({"a": LARGE}, path),
    "torch": save_with_torch,
    "tofile": save_with_numpy,
    "savez": lambda path: np.savez(path.with_suffix(".npz"), a=LARGE),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_library_that_fills_a_disk_gives_the_name_of_the_folder(full, monkeypatch, writer):
    name = f"the folder '{full}' is full; free some space there, or give a path on a disk with more; nothing was left"
    with pytest.raises(FileError) as caught, new_file(full / "x") as part:
        WRITERS[writer](part)
    assert name in str(caught.value)
    for extra in full.iterdir():  # savez adds an ending of its own
        extra.unlink()
    with pytest.raises(FileError) as caught, new_folder(full / "x", marker="m") as part:
        WRITERS[writer](part / "y")
    assert name in str(caught.value)
    assert not list(full.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(full))
    with (
        pytest.raises(FileError, match="the temporary folder .*small disk' is full; .*TMPDIR"),
        temporary_folder() as to,
    ):
        WRITERS[writer](to / "y")
    assert not list(full.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_known_by_the_number_of_the_error(tmp_path, number, wrapped):
    def fail():
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            if wrapped:
                raise RuntimeError("enforce fail") from error
            raise

    with pytest.raises(FileError, match=f"the folder '{tmp_path}' is full"), writing(tmp_path / "x"):
        fail()
    text = f"I/O error: {os.strerror(number)} (os error {number})"
    with pytest.raises(FileError, match=f"the folder '{tmp_path}' is full"), writing(tmp_path / "x"):
        raise SafetensorError(text)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileError, match="could not be written: Permission denied; nothing"), writing(tmp_path / "x"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    for error in (KeyError("x"), RuntimeError("x"), FormatError("x"), CheckFailed("x"), KeyboardInterrupt()):
        for context in (lambda: writing(tmp_path / "x"), temporary_folder, lambda: new_file(tmp_path / "x")):
            with pytest.raises(type(error)) as caught, context():
                raise error
            assert caught.value is error


@pytest.mark.usefixtures("full_temporary")
def test_errors_that_know_their_reason_keep_it_on_a_full_disk():
    for error in (UsageError("x"), CheckFailed("x")):
        with pytest.raises(type(error)) as caught, temporary_folder() as folder:
            with contextlib.suppress(OSError):
                (folder / "y").write_bytes(LARGE.tobytes())
            raise error
        assert caught.value is error


def test_a_full_disk_elsewhere_is_not_blamed_on_the_temporary_folder(tmp_path):
    other, full = tmp_path / "other" / "x", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    theirs = f"output '{other}' could not be written: the folder '{other.parent}' is full"
    with pytest.raises(FileError, match=theirs), temporary_folder(), writing(other):
        raise full
    named = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(other))
    theirs = f"the folder '{other.parent}' is full; free some space there"
    with pytest.raises(FileError, match=theirs), temporary_folder():
        raise RuntimeError("cannot save") from named


def test_a_full_temporary_folder_is_known_by_its_path_or_where_none_is_named():
    for named, write in itertools.product((False, True), (writing, contextlib.nullcontext)):
        ours = "the temporary folder '.*' is full.*or set TMPDIR"
        with pytest.raises(FileError, match=ours), temporary_folder() as folder, write(folder / "x"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([str(folder / "y")] if named else []))


def test_without_a_place_for_temporary_folders_the_variable_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(FileError, match="no temporary folder can be made: .*; set TMPDIR"), temporary_folder():
        pass


@pytest.mark.parametrize("to", ["archive", "onnx", "csr", "safetensors", "state-dict"])
def test_an_export_to_a_full_disk_names_its_folder(run, full, model, to):
    from exporters.containers import CONTAINERS

    ending = CONTAINERS[to].endings[0]
    code, out, err = run("export", model, "-o", full / f"net{ending}", "--to", to)
    assert (code, out) == (1, "")
    assert err.startswith(f"dsr-tool: output '{full}/net{ending}' could not be written: the folder '{full}' is full")
    assert not list(full.iterdir())


COMMANDS = {
    "report": ("report", "{model}", "--html", "{full}/page.html"),
    "convert": ("convert", "lenet-300-100", "--sparsity", ".8", "-o", "{full}/net"),
    "train": ("train", "{model}", "-o", "{full}/run", "--data", "fake:8", "--epochs", "1", "--batch-size", "4"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_writes_names_the_folder(run, full, model, name):
    code, out, err = run(*(part.format(model=model, full=full) for part in COMMANDS[name]))
    assert (code, out) == (1, "")
    assert f"the folder '{full}' is full" in err.splitlines()[-1], err
    assert not list(full.iterdir())


def test_a_training_keeps_its_last_epoch_when_the_disk_fills(run, tmp_path, model):
    place = tmp_path / "disk"
    place.mkdir()
    options = "size=2600k"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=False).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        training = ("train", model, "-o", place / "run", "--data", "fake:8", "--batch-size", "4", "--epochs")
        arguments = (*training, "3")
        code, _, err = run(*arguments)
        if code == 0:
            pytest.skip("three epochs fit on this disk")
        assert f"the folder '{place / 'run'}' is full" in err.splitlines()[-1], err
        assert not list(place.rglob(".part.*"))
    finally:
        subprocess.run(["umount", "-l", place], check=True)


TEMPORARY = {
    "export": ("export", "{model}", "-o", "{tmp}/net.onnx"),
    "verify": ("verify", "{file}", "--against", "{model}"),
    "bench": ("bench", "{file}", "--rounds", "4"),
    "memory": ("report", "{model}", "--memory", "--measure"),
    "convert": ("convert", "lenet-300-100", "--budget", "120kB", "-o", "{tmp}/budget"),
}


@pytest.fixture(scope="module")
def onnx_file(model):
    from converters.loading import load
    from exporters.export import export

    export(load(model), model.with_suffix(".onnx"))
    return model.with_suffix(".onnx")


@pytest.mark.parametrize("name", TEMPORARY)
def test_a_full_temporary_folder_is_named_by_every_command_that_uses_it(
    run, full_temporary, tmp_path, model, onnx_file, name
):
    arguments = (part.format(model=model, tmp=tmp_path, file=onnx_file) for part in TEMPORARY[name])
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    expected = f"dsr-tool: the temporary folder '{full_temporary}' is full; free some space there, or set TMPDIR"
    assert err.splitlines()[-1].startswith(expected), err
    assert not list(full_temporary.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["small disk"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("option", [(), ("--json",)])
def test_a_full_disk_behind_stdout_is_named(model, option):
    command = [sys.executable, "-c", "from dsr_tool.cli import main; main()", "report", str(model), *option]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "dsr-tool: the result could not be written to stdout: No space left on device; the work itself is done.\n"
    )
