"""Class weights: the formula, where they are refused, and that a run with them resumes bit for bit."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn.functional import cross_entropy, kl_div

from converters.conversion import convert
from converters.loading import load
from dsr_tool.cli.train import command
from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.train import Ranks, RunFolder, TrainSettings, train, train_in_folder
from dsr_tool.train.class_weights import class_weights, uneven_note
from dsr_tool.train.evaluation import training_loss
from dsr_tool.train.images import DataSet, InMemory
from dsr_tool.train.step import Stepper


def dataset(labels, classes=3, names=(), test=(0, 1, 2, 2, 2, 2)):
    parts = [
        InMemory(torch.zeros(len(part), 3, 8, 8, dtype=torch.uint8), torch.tensor(part)) for part in (labels, test)
    ]
    return DataSet(*parts, classes, names, augment="none")


UNEVEN = [0] * 10 + [1] * 4 + [2]


def table(path, *lines):
    path.write_text("\n".join(["class,weight", *lines]) + "\n", encoding="utf-8")
    return str(path)


def test_balanced_classes_add_up_alike_and_the_mean_over_the_training_images_is_one():
    weights = class_weights("balanced", dataset(UNEVEN))
    assert weights == pytest.approx((15 / 30, 15 / 12, 15 / 3))
    assert [w * n for w, n in zip(weights, (10, 4, 1), strict=True)] == pytest.approx([5, 5, 5])
    assert np.mean([weights[label] for label in UNEVEN]) == pytest.approx(1)
    assert class_weights("none", dataset(UNEVEN)) is None


def test_a_class_without_training_images_has_no_part_in_the_scale():
    assert class_weights("balanced", dataset([0, 0, 0, 2])) == pytest.approx((4 / 6, 0, 4 / 2))


def test_the_weights_of_a_file_are_scaled_to_mean_one(tmp_path):
    path = table(tmp_path / "w.csv", "2,8", "0,1", "1,2.5")
    weights = class_weights(path, dataset(UNEVEN))
    assert np.array(weights) / weights[0] == pytest.approx([1, 2.5, 8])
    assert np.mean([weights[label] for label in UNEVEN]) == pytest.approx(1)
    named = dataset(UNEVEN, names=("a", "b", "c"))
    assert class_weights(table(tmp_path / "n.csv", "b,2.5", "c,8", "a,1"), named) == weights
    assert class_weights(path, named) == weights
    # Folders called 1, 2 and 0: the cells are names before they are numbers.
    swapped = class_weights(path, dataset(UNEVEN, names=("1", "2", "0")))
    assert np.array(swapped) / swapped[2] == pytest.approx([2.5, 8, 1])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0,1", "1,1"], "missing classes: '2'. Give each of the 3 classes one line"),
        (["0,1", "1,1", "2,1", "3,1"], "unknown classes: '3'"),
        (["0,1", "1,1", "2,1", "1,2"], "repeated classes: '1'"),
        (["0,1", "1,-1", "2,nan"], "weights that are no positive numbers: '-1', 'nan'"),
        (
            ["cat,1", "1,x", "0,1", "0,1"],
            "unknown classes: 'cat'; repeated classes: '0'; missing classes: '2'; weights",
        ),
        ([], "has no lines below its header"),
        (["0", "1", "2"], "weights that are no positive numbers: '', '', ''"),
    ],
)
def test_a_file_that_does_not_fit_the_data_is_refused_with_all_its_faults(tmp_path, lines, message):
    with pytest.raises(FormatError, match=message):
        class_weights(table(tmp_path / "w.csv", *lines), dataset(UNEVEN))


def test_what_is_no_table_is_refused(tmp_path):
    with pytest.raises(FileError, match=r"--class-weights file 'balance' does not exist"):
        class_weights("balance", dataset(UNEVEN))
    (tmp_path / "w.csv").write_bytes(b"class,weight\n\xff\xfe,1\n")
    with pytest.raises(FormatError, match="cannot be read as a CSV file"):
        class_weights(str(tmp_path / "w.csv"), dataset(UNEVEN))
    (tmp_path / "w.csv").write_text("label,weight\n0,1\n")
    with pytest.raises(FormatError, match="has no column 'class'; begin it with the line class,weight"):
        class_weights(str(tmp_path / "w.csv"), dataset(UNEVEN))


def test_the_loss_of_each_image_is_multiplied_whole():
    torch.manual_seed(0)
    scores, auxiliary, taught = (torch.randn(6, 3) for _ in range(3))
    labels, weights = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0.5, 1.0, 2.5])
    settings = TrainSettings(label_smoothing=0.1, teacher="t", teacher_weight=0.4, teacher_temperature=2.0)
    loss, _ = training_loss((scores, auxiliary), labels, 3, settings, taught, weights)
    by_hand = 0.0
    for i in range(6):
        one = slice(i, i + 1)
        label, aux = (cross_entropy(x[one], labels[one], label_smoothing=0.1) for x in (scores, auxiliary))
        soft = 4 * kl_div((scores[i] / 2).log_softmax(0), (taught[i] / 2).softmax(0), reduction="sum")
        by_hand += weights[labels[i]] * (0.6 * label + 0.4 * soft + 0.3 * aux) / 6
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    ones, _ = training_loss((scores, auxiliary), labels, 3, settings, taught, torch.ones(3))
    without, _ = training_loss((scores, auxiliary), labels, 3, settings, taught)
    assert ones.item() == pytest.approx(without.item(), rel=1e-6)
    assert loss.item() != pytest.approx(ones.item(), rel=1e-3)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tiny):
    # torch's own weights would divide each part by the weights that happen to be in it.
    gradients = []
    inputs, labels = torch.randn(8, 3, 8, 8), torch.tensor([0, 0, 0, 0, 0, 1, 2, 2])
    for parts in (1, 4):
        model = tiny.model()
        model.module.norm = torch.nn.Identity()
        settings = tiny.settings(batch_size=8, accumulate=parts, method="static", lr=1e-9)
        stepper = Stepper(
            model,
            settings,
            classes=10,
            steps_per_epoch=4,
            on_reallocation=lambda *_: None,
            class_weights=[0.2, 1.0, 4.0, *[1.0] * 7],
        )
        stepper.step(inputs, labels)
        gradients.append(model.module.head.weight.grad.clone())
        stepper.close()
    assert torch.allclose(*gradients, atol=1e-6) and float(gradients[0].abs().max()) > 1e-3


def test_weights_come_from_the_training_images_alone():
    one = class_weights("balanced", dataset(UNEVEN, test=[0]))
    assert one == class_weights("balanced", dataset(UNEVEN, test=[2] * 50))


def test_uneven_data_are_said_once_and_only_above_ten_to_one():
    assert uneven_note(dataset([0] * 20 + [1] * 2 + [2] * 9)) == ""
    line = uneven_note(dataset([0] * 21 + [1] * 2 + [2] * 9, names=("cat", "dog", "eel")))
    assert line.startswith("the classes are uneven: 21 training images of 'cat', 2 of 'dog'; --class-weights balanced")
    assert "21 training images of class 0, 2 of class 1" in uneven_note(dataset([0] * 21 + [1] * 2))


def in_folder(tiny, folder, *, pause=False, quiet=True, **given):
    run = RunFolder(folder, resume=True)
    model = load(folder, tiny.module()) if run.stopped else tiny.model()
    given = {"epochs": 3, "batch_size": 50, "every": 1, "device": "cpu", **given}
    deadline = 0.0 if pause else float("inf")
    return train_in_folder(run, model, tiny.data(), given, facts={"data": "fake:200"}, quiet=quiet, deadline=deadline)


def test_a_run_with_weights_resumes_bit_for_bit_and_records_them(tiny, tmp_path):
    in_folder(tiny, tmp_path / "whole", class_weights="balanced")
    for _ in range(3):
        in_folder(tiny, tmp_path / "cut", pause=True, class_weights="balanced")
    for name in ("model.safetensors", "masks.safetensors", "settings.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    facts = json.loads((tmp_path / "whole" / "settings.json").read_text())
    assert facts["settings"]["class_weights"] == "balanced"
    assert tuple(facts["class_weights"]) == class_weights("balanced", tiny.data().dataset)
    in_folder(tiny, tmp_path / "without")
    other = (tmp_path / "without" / "model.safetensors").read_bytes()
    assert other != (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert "class_weights" not in json.loads((tmp_path / "without" / "settings.json").read_text())


def test_a_file_may_move_but_not_change_before_a_resume(tiny, tmp_path):
    lines = [f"{index},{1 + index}" for index in range(10)]
    path = table(tmp_path / "w.csv", *lines)
    in_folder(tiny, tmp_path / "run", pause=True, class_weights=path)
    moved = table(tmp_path / "moved.csv", *lines[::-1])
    in_folder(tiny, tmp_path / "run", pause=True, class_weights=moved)
    for choice in ("none", "balanced", table(tmp_path / "other.csv", *lines[1:], "0,7")):
        with pytest.raises(UsageError, match="was not started with these --class-weights; give the same"):
            in_folder(tiny, tmp_path / "run", class_weights=choice)
    in_folder(tiny, tmp_path / "plain", pause=True)
    with pytest.raises(UsageError, match="was not started with these --class-weights"):
        in_folder(tiny, tmp_path / "plain", class_weights="balanced")


def test_the_note_is_printed_at_the_start_unless_the_option_is_given(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dsr_tool.train.launch.uneven_note", lambda data: "the classes are uneven: so it is")
    for name, expected, given in (("a", 1, {}), ("b", 0, {"class_weights": "none"}), ("a", 0, {})):
        in_folder(tiny, tmp_path / name, pause=True, quiet=False, **given)
        assert capsys.readouterr().err.count("the classes are uneven") == expected


def test_balanced_weights_teach_a_rare_class(tiny, tmp_path):
    """One image in forty is bright and of class 1; without weights, few steps only learn the frequent class."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 100, (400, 3, 8, 8), dtype=np.uint8)
    labels = (np.arange(400) % 40 == 0).astype(int)
    images[labels == 1] += 60
    test = np.arange(400) % 40 < 2
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images[test], y_test=labels[test])
    accuracies = []
    for choice in ("none", "balanced"):
        settings = tiny.settings(class_weights=choice, epochs=2, batch_size=40, method="static", lr=0.01)
        accuracies.append(
            train(tiny.model(0.3), tiny.data(f"arrays:{tmp_path / 'a.npz'}"), settings).last.test_accuracy
        )
    assert accuracies[0] == 0.5 and accuracies[1] > 0.8


def test_the_command_takes_class_weights(tmp_path):
    convert("lenet-300-100", sparsity=0.9, input_size=8, seed=3).save(tmp_path / "sparse")
    line = [str(tmp_path / "sparse"), "--data", "digits", "--epochs", "1", "--json", "-q"]
    done = CliRunner().invoke(
        command, [*line, "-o", str(tmp_path / "run"), "--class-weights", "balanced"], catch_exceptions=False
    )
    assert json.loads(done.stdout)["settings"]["class_weights"] == "balanced"
    with pytest.raises(FileError, match="--class-weights file 'balancd' does not exist"):
        CliRunner().invoke(
            command, [*line, "-o", str(tmp_path / "no"), "--class-weights", "balancd"], catch_exceptions=False
        )
    assert not (tmp_path / "no").exists() and Ranks.current().first
