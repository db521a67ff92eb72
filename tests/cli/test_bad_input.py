"""Every mistake of a user is one sentence on stderr with the right exit code; no traceback, no file left behind."""

import errno
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision import models


def bad(run, folder, *arguments):
    """Runs a command that must fail in one line and leave no file. Returns exit code and line."""
    before = sorted(path.name for path in folder.iterdir())
    code, out, err = run(*arguments)
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert "unexpected" not in err
    assert sorted(path.name for path in folder.iterdir()) == before
    return code, err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["resnet81", "--sparsity", "0.9"], 2, "did you mean resnet18"),
        (["resnet18", "--sparsity", "1"], 2, "is not in [0, 1)"),
        (["resnet18", "--sparsity", "-0.1"], 2, "is not in [0, 1)"),
        (["resnet18", "--sparsity", "ninety"], 2, "fraction of zeros"),
        (["resnet18"], 2, "exactly one of --sparsity and --budget"),
        (["resnet18", "--sparsity", "0.9", "--budget", "1Mparams"], 2, "exactly one"),
        (["resnet18", "--budget", "12 apples"], 2, "5.1Mparams"),
        (["resnet18", "--budget", "1kparams"], 2, "cannot be met"),
        (["resnet18", "--budget", "12mb"], 2, "did you mean 12MB?"),
        (["resnet18", "--budget", "0MB"], 2, "allows nothing"),
        (["squeezenet1_1", "--budget", "9GMACs"], 2, "more than this model can fill"),
        (["squeezenet1_1", "--budget", "9MMACs", "--keep-dense", "*"], 2, "no layer of this model is left"),
        (["resnet18", "--sparsity", "0.9", "--sparsty"], 2, "option --sparsty is unknown; did you mean --sparsity"),
        (["resnet18", "--hepl"], 2, "option --hepl is unknown; did you mean --help?"),
        (["resnet18", "--architecture", "x"], 2, "option --architecture is unknown; `dsr-tool convert --help` lists"),
        (["resnet18", "--sparsity", "0.9", "--foo"], 2, "option --foo is unknown; `dsr-tool convert --help` lists"),
        (["resnet18", "--sparsity", "0.9", "--input-shape", ""], 2, "write it as 3,224,224"),
        (["resnet18.onnx", "--sparsity", "0.9"], 1, "does not exist"),
        (["resnet18", "--sparsity", "0.9", "--weights", "DEFALT"], 2, "did you mean DEFAULT?"),
        (["resnet18", "--sparsity", "0.9999999"], 2, "highest reachable sparsity is 0.999998"),
        (["resnet18", "--sparsity", "0.9", "--keep-dense", "*"], 2, "highest reachable sparsity is 0"),
        (["resnet18", "--sparsity", "0.9", "--keep-dense", "layr1.0.conv1"], 2, "did you mean layer1.0.conv1"),
        (["resnet18", "--sparsity", "0.9", "--distribution", "erc"], 2, "did you mean erk"),
        (["resnet18", "--sparsity", "0.9", "--preset", "papers"], 2, "did you mean paper"),
        (["resnet18", "--sparsity", "0.9", "--weights", "ResNet18_Weights.DEFALT"], 2, "ResNet18_Weights.DEFAULT"),
        (["resnet18", "--sparsity", "0.9", "--weights", "nothing.pth"], 1, "does not exist"),
        (["resnet18", "--sparsity", "0.9", "--weights", "."], 1, "is not a file"),
        (["resnet18", "--sparsity", "0.9", "--weights", ""], 2, "DEFAULT"),
        (["resnet18", "--sparsity", "0.9", "--distribution", ""], 2, "erk"),
        (["resnet18", "--sparsity", "0.9", "--seed", "-1"], 2, "seed -1"),
        (["resnet18", "--sparsity", "1/0"], 2, "fraction of zeros"),
        (["resnet18", "--sparsity", "0.9", "--num-classes", "99999999999"], 2, "1 to 1,000,000"),
        (["resnet18", "--sparsity", "0.9", "--seed", "many"], 2, "integer"),
        ([], 2, "ARCH is missing"),
        (["resnet18", "--sparsity", "0.9", "--num-classes", "0"], 2, "--num-classes 0"),
        (["resnet18", "--sparsity", "0.9", "--input-size", "0"], 2, "--input-size 0"),
        (["alexnet", "--sparsity", "0.9", "--input-size", "8"], 2, "--input-size"),
    ],
)
def test_wrong_arguments_of_convert_are_one_sentence(run, tmp_path, arguments, code, says):
    found, sentence = bad(run, tmp_path, "convert", *arguments, "-o", tmp_path / "m")
    assert found == code
    assert says in sentence


def test_weights_of_another_architecture_are_refused(run, tmp_path):
    save_file(models.squeezenet1_1().state_dict(), tmp_path / "squeeze.safetensors")
    code, sentence = bad(
        run, tmp_path, "convert", "resnet18", "--sparsity", "0.5", "--weights", tmp_path / "squeeze.safetensors", "-o",
        tmp_path / "m",
    )  # fmt: skip
    assert code == 2
    assert "is no state_dict of resnet18" in sentence


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not really", b"\x80\x04N."])
def test_a_file_that_is_not_a_state_dict_is_refused(run, tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    code, sentence = bad(
        run, tmp_path, "convert", "resnet18", "--sparsity", "0.5", "--weights", tmp_path / "w.pth", "-o", tmp_path / "m"
    )
    assert code == 1
    assert "state_dict" in sentence or (not content and "is empty; write or download it again" in sentence)


def test_pickles_are_never_run(run, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"a": Evil()}, tmp_path / "w.pth")
    code, _ = bad(
        run, tmp_path, "convert", "resnet18", "--sparsity", "0.5", "--weights", tmp_path / "w.pth", "-o", tmp_path / "m"
    )
    assert code == 1
    assert not (tmp_path / "owned").exists()


def test_existing_outputs_are_not_replaced(run, folder, tmp_path):
    for name in ("a.dsr", "a.onnx", "m"):
        (tmp_path / name).write_text("mine")
    for arguments in (
        ["convert", "squeezenet1_1", "--sparsity", "0.9", "-o", tmp_path / "m"],
        ["export", folder, "-o", tmp_path / "a.dsr"],
        ["export", folder, "-o", tmp_path / "a.onnx"],
        ["train", folder, "-o", tmp_path / "m", "--data", "fake:10"],
    ):
        code, sentence = bad(run, tmp_path, *arguments)
        assert code == 1
        assert "exists already" in sentence
    assert all((tmp_path / name).read_text() == "mine" for name in ("a.dsr", "a.onnx", "m"))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["export", "{missing}", "-o", "{out}"], 1, "does not exist"),
        (["export", "{tmp}", "-o", "{out}"], 1, "is not a model folder"),
        (["export", "{folder}", "-o", "{out}", "--to", "onix"], 2, "did you mean onnx"),
        (["export", "{folder}", "-o", "{out}", "--encoding", "delt"], 2, "did you mean delta"),
        (["export", "{folder}", "-o", "{out}", "--to", "onnx", "--encoding", "csr"], 2, "csr"),
        (["export", "{folder}", "-o", "{tmp}/a.npy"], 2, "call it a.dsr"),
        (["export", "{folder}", "-o", "{tmp}/a.npz", "--to", "archive"], 2, "call it a.dsr"),
        (["export", "{folder}", "-o", "{tmp}/a.dsr", "--to", "onnx"], 2, "call it a.onnx"),
        (["predict", "{archive}", "{nan}"], 2, "not finite"),
        (["report", "{missing}"], 1, "does not exist"),
        (["report", "{tmp}"], 1, "is not a model folder"),
        (["report", "{text}"], 1, "starts like no file that this dsr-tool reads"),
        (["report", "{textonnx}"], 1, "starts like no file that this dsr-tool reads"),
        (["report", "{plain}"], 2, "safetensors file, which holds weights and no computation, and does not say"),
        (["verify", "{missing}", "--against", "{folder}"], 1, "does not exist"),
        (["verify", "{archive}", "--against", "{missing}"], 1, "does not exist"),
        (["verify", "{text}", "--against", "{folder}"], 3, "text"),
        (["predict", "{missing}", "{npy}"], 1, "does not exist"),
        (["predict", "{archive}", "{missing}"], 1, "does not exist"),
        (["predict", "{archive}", "{text}"], 1, "text"),
        (["predict", "{archive}", "{npy}"], 2, "shape"),
        (["predict", "{archive}", "{npy}", "--runtime", "tensorrt"], 2, "onnxruntime"),
        (["predict", "{archive}", "{npy}", "--labels", "{text}"], 2, "1 lines"),
        (["predict", "{archive}", "{zipped}"], 1, "is not a .npy file"),
        (["predict", "{archive}", "{huge}"], 1, "contain NaN or inf"),
        (["train", "{folder}", "-o", "{folder}", "--data", "fake:10", "--force"], 2, "is the model to train"),
        (["train", "{missing}", "-o", "{out}", "--data", "fake:10"], 1, "does not exist"),
        (["train", "{folder}", "-o", "{out}", "--data", "minst:x"], 2, "did you mean mnist"),
        (["train", "{folder}", "-o", "{out}", "--data", "mnist:{missing}"], 1, "missing"),
        (["train", "{folder}", "-o", "{out}", "--data", "images:{tmp}"], 1, "train"),
        (["train", "{folder}", "-o", "{out}", "--data", "fake:10", "--method", "dsrr"], 2, "did you mean dsr"),
        (["train", "{folder}", "-o", "{out}", "--data", "fake:10", "--epochs", "0"], 2, "epochs"),
        (["train", "{folder}", "-o", "{out}", "--data", "fake:10", "--resume", "--force"], 2, "give one of the two"),
        (["train", "{folder}", "-o", "{out}", "--data", "fake:10", "--milestones", ""], 2, "60,120,160"),
        (["train", "", "-o", "{out}", "--data", "fake:10"], 2, "'' is no path; give one, such as ."),
        (["convert", "resnet18", "--sparsity", "0.9", "-o", ""], 2, "for '-o' / '--output': '' is no path; give one"),
        (["verify", "{archive}", "--against", ""], 2, "for '--against': '' is no path; give one"),
        (["reprot", "x"], 2, "did you mean report"),
    ],
)
def test_wrong_arguments_of_other_commands_are_one_sentence(run, folder, archive, tmp_path, arguments, code, says):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "text.onnx").write_text("hello")
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    np.save(tmp_path / "x.npy", np.zeros((7, 7), np.float32))
    np.save(tmp_path / "huge.npy", np.full((3, 64, 64), 3e38, np.float32))
    np.savez(tmp_path / "zipped.npz", x=np.zeros(3))
    (tmp_path / "zipped.npz").rename(tmp_path / "zipped.npy")
    np.save(tmp_path / "nan.npy", np.full((3, 64, 64), np.nan, np.float32))
    places = {
        "missing": tmp_path / "missing",
        "nan": tmp_path / "nan.npy",
        "huge": tmp_path / "huge.npy",
        "zipped": tmp_path / "zipped.npy",
        "tmp": tmp_path,
        "out": tmp_path / "out",
        "folder": folder,
        "archive": archive,
        "text": tmp_path / "text",
        "textonnx": tmp_path / "text.onnx",
        "plain": tmp_path / "plain.safetensors",
        "npy": tmp_path / "x.npy",
    }
    found, sentence = bad(run, tmp_path, *(argument.format(**places) for argument in arguments))
    assert says in sentence
    assert found == code


@pytest.mark.parametrize("at", [0.0, 0.02, 0.5, 0.999])
def test_damaged_archives_are_refused(run, folder, archive, tmp_path, at):
    raw = bytearray(archive.read_bytes())
    raw[int(at * len(raw))] ^= 0x55
    (tmp_path / "flipped.dsr").write_bytes(raw)
    (tmp_path / "cut.dsr").write_bytes(raw[: len(raw) // 2])
    np.save(tmp_path / "x.npy", np.zeros((3, 64, 64), np.float32))
    for name in ("flipped.dsr", "cut.dsr"):
        for command, code in (
            (["predict", tmp_path / name, tmp_path / "x.npy"], 1),
            (["report", tmp_path / name], 1),
            (["verify", tmp_path / name, "--against", folder], 3),
        ):
            found, sentence = bad(run, tmp_path, *command)
            assert found == code
            assert "damaged" in sentence


def test_a_mask_that_does_not_fit_its_weight_is_refused(run, folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    document = json.loads((broken / "config.json").read_text())
    next(layer for layer in document["layers"] if layer["role"] == "sparse")["shape"] = [3, 3]
    (broken / "config.json").write_text(json.dumps(document))
    code, sentence = bad(run, tmp_path, "export", broken, "-o", tmp_path / "a.dsr")
    assert code == 1
    assert "mask" in sentence


@pytest.mark.parametrize("name", ["a.dsr", "a.onnx", "a.npz", "a.safetensors", "a.pth"])
def test_a_full_disk_is_one_sentence_and_leaves_no_file(run, folder, tmp_path, monkeypatch, name):
    from pathlib import Path

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for writer in (
        "dsr_tool.formats.archive_writer.save_file",
        "dsr_tool.formats.csr_file.write_csr",
        "exporters.state_dict.save_file",
    ):
        monkeypatch.setattr(writer, full)
    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    code, sentence = bad(run, tmp_path, "export", folder, "-o", tmp_path / name)
    assert code == 1
    assert "is full; free some space there" in sentence
    monkeypatch.setattr("dsr_tool.sparse.folder.write_arrays", full)
    code, sentence = bad(run, tmp_path, "convert", "squeezenet1_1", "--sparsity", "0.5", "-o", tmp_path / "m")
    assert code == 1
    assert "is full; free some space there" in sentence
