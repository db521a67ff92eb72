"""Distillation: a teacher is read strictly, only answers, and is the same one when a run resumes."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn.functional import cross_entropy

from converters.conversion import convert
from converters.loading import load
from dsr_tool.cli.train import command
from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.train import Observer, RunFolder, TrainSettings, train, train_in_folder
from dsr_tool.train.evaluation import training_loss
from dsr_tool.train.teacher import distillation, open_teacher


@pytest.fixture
def teacher(tiny, tmp_path):
    """Returns the path of a dense model folder with other weights than those of the models that the tests train."""
    tiny.model(0, seed=7).save(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_the_loss_is_that_of_hinton_vinyals_and_dean():
    torch.manual_seed(0)
    scores, taught, labels = torch.randn(6, 5, dtype=torch.double), torch.randn(6, 5), torch.arange(6) % 5
    taught = taught.double()
    settings = TrainSettings(teacher="t", teacher_weight=0.3, teacher_temperature=4.0)
    loss, _ = training_loss(scores.float(), labels, 5, settings, taught.float())
    soft, hard = (taught / 4).softmax(1), (scores / 4).softmax(1)
    by_hand = 16 * (soft * (soft.log() - hard.log())).sum(1).mean()
    expected = 0.7 * cross_entropy(scores, labels) + 0.3 * by_hand
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_student_equal_to_its_teacher_has_no_gradient():
    torch.manual_seed(0)
    student = nn.Linear(4, 3)
    inputs, labels = torch.randn(8, 4), torch.arange(8) % 3
    settings = TrainSettings(teacher="t", teacher_weight=1.0)
    loss, _ = training_loss(student(inputs), labels, 3, settings, student(inputs).detach())
    loss.backward()
    # Zero up to the rounding of exp(log_softmax).
    assert abs(loss.item()) < 1e-6 and all(float(p.grad.abs().max()) < 1e-7 for p in student.parameters())
    other, _ = training_loss(student(inputs), labels, 3, settings, student(inputs).detach().flip(0))
    other.backward()
    assert float(student.weight.grad.abs().max()) > 1e-3


def test_the_size_of_the_gradient_stays_when_the_temperature_rises():
    torch.manual_seed(0)
    taught, sizes = torch.randn(64, 10), []
    for temperature in (8.0, 32.0):
        scores = torch.zeros(64, 10, requires_grad=True)
        distillation(scores, taught, temperature).backward()
        sizes.append(scores.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@pytest.mark.parametrize("kind", ["model", "run", "state_dict"])
def test_a_teacher_is_a_folder_or_a_file_of_weights(tiny, teacher, tmp_path, kind):
    dense, path = load(teacher, tiny.module()), teacher
    if kind == "run":
        path = str(tmp_path / "run")
        run = RunFolder(path)
        train_in_folder(
            run, dense, tiny.data(), {"method": "dense", "epochs": 1, "device": "cpu"}, facts={"data": "x"}, quiet=True
        )
    if kind == "state_dict":
        path = str(tmp_path / "dense.pth")
        torch.save(dense.module.state_dict(), path)
    student = tiny.model()
    before = {name: value.clone() for name, value in student.module.state_dict().items()}
    opened = open_teacher(path, student)
    state = dense.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in opened.module.state_dict().items())
    assert not opened.module.training and not any(p.requires_grad for p in opened.module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.module.state_dict().items())


def other_folder(tiny, path, change):
    model = tiny.model(0)
    change(model)
    model.save(path)
    return str(path)


def test_what_is_no_teacher_is_refused_with_the_remedy(tiny, tmp_path):
    student = tiny.model()
    with pytest.raises(FileError, match=r"--teacher 'nowhere' does not exist; give a model folder"):
        open_teacher("nowhere", student)
    torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(UsageError, match=r"is no Tiny: .* weights are missing.*own architecture"):
        open_teacher(str(tmp_path / "linear.pth"), student)
    state = {**tiny.module().state_dict(), "head.weight": torch.zeros(7, 16), "head.bias": torch.zeros(7)}
    torch.save(state, tmp_path / "seven.pth")
    with pytest.raises(UsageError, match=r"has 7 outputs, and the model has 10; train the dense network on this data"):
        open_teacher(str(tmp_path / "seven.pth"), student)
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(FormatError, match=r"--teacher .*damaged.pth' "):
        open_teacher(str(tmp_path / "damaged.pth"), student)
    state = tiny.module().state_dict()
    state["second.bias"][2] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(FormatError, match=r"'second.bias' contains NaN or inf; use an earlier checkpoint"):
        open_teacher(str(tmp_path / "nan.pth"), student)


def test_a_teacher_changes_the_training_and_stays_as_it_is(tiny, teacher):
    alone, taught = tiny.model(), tiny.model()
    train(alone, tiny.data(), tiny.settings())
    opened = open_teacher(teacher, taught)
    before = opened.checksum
    train(taught, tiny.data(), tiny.settings(teacher=teacher), teacher=opened)
    assert not torch.equal(alone.module.head.weight, taught.module.head.weight)
    assert open_teacher(teacher, taught).checksum == before and taught.active_weights == alone.active_weights
    by_path = tiny.model()
    train(by_path, tiny.data(), tiny.settings(teacher=teacher))
    assert torch.equal(by_path.module.head.weight, taught.module.head.weight)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_student_approaches_its_teacher(tiny, teacher, precision):
    model = tiny.model(0.5)
    answers = load(teacher, tiny.module()).module.eval()
    images = torch.randn(64, 3, 8, 8)

    def distance():
        model.module.eval()
        with torch.no_grad():
            return distillation(model.module(images), answers(images), 1.0).item()

    before = distance()
    train(model, tiny.data(), tiny.settings(teacher=teacher, teacher_weight=1.0, epochs=8, precision=precision))
    assert distance() < before / 2


def in_folder(tiny, folder, teacher, *observers, resume=True, **given):
    run = RunFolder(folder, resume=resume)
    model = load(folder, tiny.module()) if run.stopped else tiny.model()
    given = {"epochs": 3, "batch_size": 50, "every": 1, "device": "cpu", **given}
    if teacher is not None:
        given["teacher"] = teacher
    deadline = 0.0 if observers else float("inf")
    return train_in_folder(run, model, tiny.data(), given, facts={"data": "fake:200"}, quiet=True, deadline=deadline)


def test_a_run_with_a_teacher_resumes_bit_for_bit(tiny, teacher, tmp_path):
    in_folder(tiny, tmp_path / "whole", teacher)
    for _ in range(3):
        in_folder(tiny, tmp_path / "cut", teacher, Observer())
    for name in ("model.safetensors", "masks.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    facts = json.loads((tmp_path / "whole" / "settings.json").read_text())
    assert facts["settings"]["teacher"] == teacher and len(facts["teacher_sha256"]) == 64


def test_a_changed_teacher_is_refused_and_a_moved_one_is_not(tiny, teacher, tmp_path):
    run = tmp_path / "run"
    in_folder(tiny, run, teacher, Observer())
    moved = str(tmp_path / "moved")
    shutil.move(teacher, moved)
    with pytest.raises(FileError, match="does not exist"):
        in_folder(tiny, run, None)
    in_folder(tiny, run, moved, Observer())
    shutil.rmtree(moved)
    tiny.model(0, seed=8).save(moved)
    with pytest.raises(UsageError, match="was not started with this --teacher: its weights are others"):
        in_folder(tiny, run, moved)
    in_folder(tiny, tmp_path / "alone", None, Observer())
    with pytest.raises(UsageError, match="was not started with this --teacher"):
        in_folder(tiny, tmp_path / "alone", moved)


def test_the_command_takes_a_teacher(tmp_path):
    for name, sparsity in (("dense", 0.0), ("sparse", 0.9)):
        convert("lenet-300-100", sparsity=sparsity, input_size=8, seed=3).save(tmp_path / name)
    line = [str(tmp_path / "sparse"), "--data", "digits", "--epochs", "1", "--json", "-q"]
    teacher = ["--teacher", str(tmp_path / "dense"), "--teacher-weight", "0.5", "--teacher-temperature", "3"]
    done = CliRunner().invoke(command, [*line, "-o", str(tmp_path / "run"), *teacher], catch_exceptions=False)
    settings = json.loads(done.stdout)["settings"]
    assert (settings["teacher_weight"], settings["teacher_temperature"]) == (0.5, 3.0)
    for options, message in (
        (["--teacher-weight", "0.5"], "go with --teacher"),
        (["--teacher", "nowhere"], "--teacher 'nowhere' does not exist"),
        ([*teacher[:2], "--teacher-weight", "1.5"], r"--teacher-weight 1.5 is not allowed; give a share"),
        ([*teacher[:2], "--teacher-temperature", "0"], r"--teacher-temperature 0.0 is not allowed; give a positive"),
    ):
        with pytest.raises((UsageError, FileError), match=message):
            CliRunner().invoke(command, [*line, "-o", str(tmp_path / "no"), *options], catch_exceptions=False)
        assert not (tmp_path / "no").exists()
