"""Every command writes its output into a pipe of any encoding, and into folders of any name."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dsr_tool import cli
from dsr_tool.cli.streams import write_anything
from dsr_tool.errors import FileError
from exporters.onnx.session import OnnxSession

ENCODINGS = ("ascii", "cp1252", "latin-1", "utf-8")
NAMES = ["model-\u00e4\u732b"]
if sys.platform == "linux":
    # Bytes that are no UTF-8, as in folders of older systems. safetensors, and so model folders, cannot have them.
    NAMES.append(os.fsdecode(b"model-\xe4"))


@pytest.fixture(scope="module", params=NAMES, ids=ascii)
def place(request, tmp_path_factory, folder, archive):
    """Returns a folder whose name, classes and labels have letters that few encodings have, with a model and files."""
    place = tmp_path_factory.mktemp("encodings") / request.param
    shutil.copytree(folder, place / "net")
    config = json.loads((place / "net" / "config.json").read_text(encoding="utf-8"))
    names = ["\u732b", "\u00e4", "\u0141", "\U0001f408", "plain"]
    (place / "net" / "config.json").write_text(json.dumps({**config, "labels": names}), encoding="utf-8")
    shutil.copy(archive, place / "net.dsr")
    (place / "labels.txt").write_text("\n".join(names), encoding="utf-8")
    for part in ("train", "val"):
        for i, name in enumerate(names[:2]):
            (place / "images" / part / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (64, 64), (40 * i, 10 * number, 9)).save(
                    place / "images" / part / name / f"{number}.png"
                )
    return place


@pytest.fixture
def written(monkeypatch):
    """Returns a function that runs a command with pipes of an encoding: its exit code, and the bytes of each pipe."""

    def call(encoding, *arguments):
        pipes = {
            name: io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
            for name, errors in (("stdout", "strict"), ("stderr", "backslashreplace"))
        }
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["dsr-tool", *map(str, arguments)])
            for name, pipe in pipes.items():
                patch.setattr(sys, name, pipe)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        for pipe in pipes.values():
            pipe.flush()
        return ended.value.code, *(pipe.buffer.getvalue() for pipe in pipes.values())

    return call


COMMANDS = {
    "report of a folder": ("report", "{place}/net"),
    "report of an archive": ("report", "{place}/net.dsr"),
    "report of memory": ("report", "{place}/net.dsr", "--memory"),
    "report as a page": ("report", "{place}/net.dsr", "--html", "{place}/{encoding}.html", "--force"),
    "accuracy": ("report", "{place}/net.dsr", "--accuracy", "{place}/images/val", "--against", "{place}/net"),
    "predict": ("predict", "{place}/net.dsr", "{place}/images/val/\u732b/0.png", "--labels", "{place}/labels.txt"),
    "export": ("export", "{place}/net", "-o", "{place}/{encoding}.dsr", "--force"),
    "verify": ("verify", "{place}/net.dsr", "--against", "{place}/net"),
    "convert": ("convert", "lenet-300-100", "--sparsity", ".9", "-o", "{place}/{encoding}", "--force"),
    "recipes": ("recipes",),
    "recipe": ("recipes", "wrn-28-2/set@0.9", "-o", "{place}/{encoding}.toml", "--force"),
    "bench": ("bench", "{place}/net.dsr", "--rounds", "4"),
    "doctor": ("doctor",),
    "help": ("train", "--help"),
}
CODES = {"doctor": (0, 3)}


def is_utf8(place):
    return str(place).isprintable()


def told(encoding, out, err):
    """Returns the text of both pipes, which must be in their encoding."""
    text = (out + err).decode(encoding)
    assert "UnicodeEncodeError" not in text
    assert "a bug in dsr-tool" not in text
    return text


@pytest.mark.parametrize("name", [pytest.param(name, id=name.replace(" ", "-")) for name in COMMANDS])
def test_a_command_writes_into_any_pipe(written, place, name):
    if not is_utf8(place) and "{place}/net" in COMMANDS[name]:
        pytest.skip("safetensors needs UTF-8")
    for encoding in ENCODINGS if name not in ("bench", "export", "convert") else ("ascii", "utf-8"):
        arguments = [part.format(place=place, encoding=encoding) for part in COMMANDS[name]]
        code, out, err = written(encoding, *arguments)
        text = told(encoding, out, err)
        assert code in CODES.get(name, (0,)), text
        assert out or code


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_is_the_same_ascii_in_every_encoding(written, place, encoding):
    code, out, _ = written(encoding, "report", place / "net.dsr", "--json")
    assert code == 0
    assert out.isascii()
    assert json.loads(out)["path"] == str(place / "net.dsr")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "arguments",
    [
        ("report", "{place}/absent-\u732b"),
        ("train", "{place}/net", "-o", "{place}/run", "--data", "\u732b"),
        ("convert", "\u732b\u00e4", "--sparsity", ".9", "-o", "{place}/never"),
        ("repr\u00f6rt",),
        ("report", "--opti\u00f6n"),
    ],
)
def test_an_error_is_one_sentence_in_every_encoding(written, place, encoding, arguments):
    code, out, err = written(encoding, *(part.format(place=place) for part in arguments))
    text = told(encoding, out, err)
    assert code in (1, 2)
    assert text.startswith("dsr-tool: ")
    assert text.count("\n") == 1


def test_a_training_and_a_comparison_write_into_ascii(written, place):
    if not is_utf8(place):
        pytest.skip("safetensors needs UTF-8")
    data = ("--data", f"images:{place / 'images'}")
    run = place / "run"
    code, out, err = written(
        "ascii", "train", place / "net", "-o", run, *data, "--epochs", "1", "--batch-size", "4", "--force"
    )
    text = told("ascii", out, err)
    assert code == 0, text
    assert "epoch 1/1" in text
    code, out, err = written("ascii", "report", run, "--html", place / "run.html", "--force")
    assert code == 0, told("ascii", out, err)
    grid = (
        "--recipe",
        "lenet-300-100",
        "--methods",
        "static",
        "--sparsity",
        ".9",
        "--data",
        "digits",
        "--set",
        "epochs=1",
    )
    code, out, err = written("ascii", "compare", "-o", place / "grid", *grid)
    text = told("ascii", out, err)
    assert code == 0, text
    lines = out.decode("ascii").splitlines()
    assert lines[1].split()[0] == "method"
    assert set(lines[2]) == {"-"}


def test_a_table_in_ascii_has_the_columns_of_the_one_in_utf8(written, place):
    tables = [written(encoding, "report", place / "net.dsr")[1].decode(encoding) for encoding in ("ascii", "utf-8")]
    rules = [[line for line in table.splitlines() if set(line) <= set("-\u2500 ") and line.strip()] for table in tables]
    assert rules[0]
    assert [line.replace("-", "\u2500") for line in rules[0]] == rules[1]


WITHOUT_A_LOCALE = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def without_a_locale(*arguments):
    command = [sys.executable, "-c", "from dsr_tool.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=WITHOUT_A_LOCALE, check=False)


def test_a_real_pipe_of_a_container_without_a_locale(place):
    done = without_a_locale("report", place / "net.dsr")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


def test_onnx_files_in_folders_of_any_name(place):
    """Python has ASCII for names then, and ONNX Runtime UTF-8."""
    if is_utf8(place):
        done = without_a_locale("export", place / "net", "-o", place / "locale.onnx")
        assert done.returncode == 0, done.stderr
        assert (place / "locale.onnx").is_file()
    else:
        (place / "x.onnx").write_bytes(b"")
        with pytest.raises(FileError, match="whose name is not UTF-8; rename it"):
            OnnxSession(place / "x.onnx")


def test_streams_that_cannot_be_changed_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    write_anything()


def test_signs_without_a_stand_in_become_escapes(monkeypatch):
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", pipe)
    write_anything()
    pipe.write("\u2500\u2502\u253c \u00b1 \u2026 \u732b \udce4 \U0001f408")
    pipe.flush()
    assert pipe.buffer.getvalue() == b"-|+ \xb1 \x85 \\u732b \\udce4 \\U0001f408"


def test_arrays_have_any_name(written, place):
    path = place / "\u732b.npy"
    np.save(path, np.zeros((3, 64, 64), np.float32))
    code, out, err = written("ascii", "predict", place / "net.dsr", path)
    assert code == 0, told("ascii", out, err)
