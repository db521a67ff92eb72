"""A batch in parts gives the step of the whole batch, within rounding, and takes the memory of one part."""

import json

import pytest
import torch
from torch import nn

from converters.conversion import convert
from converters.loading import load
from dsr_tool.errors import UsageError
from dsr_tool.train import Ranks, RunFolder, Teacher, TrainSettings, load_data, train
from dsr_tool.train.step import NonFiniteLossError, Stepper


class Plain(nn.Module):
    """A network without batch normalisation. It keeps the sizes of the batches that it sees while training."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.drop = nn.Dropout(0.0)
        self.head = nn.Linear(512, 10)
        self.seen = []

    def forward(self, x):
        if self.training:
            self.seen.append(len(x))
        return self.head(self.drop(torch.relu(self.conv(x))).flatten(1))


def plain(dropout=0.0):
    torch.manual_seed(0)
    module = Plain()
    module.drop.p = dropout
    return convert(module, sparsity=0.8, input_shape=(3, 8, 8), positions="random", seed=0)


def stepper(model, **changes):
    settings = TrainSettings(**{"method": "static", "epochs": 1, "batch_size": 24, "device": "cpu", **changes})
    teacher = Teacher(plain().module) if settings.teacher else None
    model.module.train()
    return Stepper(model, settings, classes=10, steps_per_epoch=100, on_reallocation=lambda *_: None, teacher=teacher)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(24, 3, 8, 8), torch.randint(0, 10, (24,))


@pytest.mark.parametrize(
    ("storage", "changes"),
    [
        ("masked", {}),
        ("compact", {}),
        ("masked", {"teacher": "given"}),
        ("compact", {"teacher": "given"}),
        ("masked", {"precision": "bf16"}),
        ("masked", {"method": "rigl", "every": 2}),
    ],
    ids=str,
)
def test_steps_by_parts_equal_steps_by_whole_batches(batch, storage, changes):
    models = {parts: plain().to_storage(storage) for parts in (1, 2, 6)}
    results = {}
    for parts, model in models.items():
        taking = stepper(model, accumulate=parts, **changes)
        model.module.seen.clear()
        results[parts] = [taking.step(*batch) for _ in range(3)]
        assert model.module.seen == [24 // parts] * (3 * parts)
        assert taking.attached.step == 3
    near = {"rtol": 1e-4, "atol": 1e-6} if "precision" not in changes else {"rtol": 0.02, "atol": 0.02}
    for parts in (2, 6):
        for (loss, scores), (expected, wanted) in zip(results[parts], results[1], strict=True):
            torch.testing.assert_close(loss, expected, **near)
            torch.testing.assert_close(scores, wanted, **near)
        whole = models[1].module.state_dict()
        for name, value in models[parts].module.state_dict().items():
            torch.testing.assert_close(value, whole[name], **near)


def test_a_loss_of_nan_in_the_last_part_changes_no_weight(batch):
    inputs, labels = batch
    inputs[-1] = torch.nan
    model = plain()
    taking = stepper(model, accumulate=4)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    with pytest.raises(NonFiniteLossError):
        taking.step(inputs, labels)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


@pytest.mark.parametrize("method", ["dsr", "rigl"])
def test_a_training_by_parts_resumes_bit_for_bit(tmp_path, method):
    def model():
        return plain(dropout=0.3)

    data = load_data("fake:100", model().config)
    given = {"method": method, "epochs": 2, "every": 2, "device": "cpu"}
    settings = TrainSettings(**given, batch_size=24, accumulate=3)
    whole = model()
    train(whole, data, settings)
    for _ in range(2):
        run = RunFolder(tmp_path / "run", resume=True)
        run.facts = {"settings": settings.to_dict()}
        piece = load(tmp_path / "run", model().module) if run.stopped else model()
        with run:
            train(piece, data, settings, [run], state=run.stopped.state if run.stopped else None, deadline=0.0)
    expected = whole.module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in piece.module.state_dict().items())
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]["accumulate"] == 3
    stopped = RunFolder(tmp_path / "run", resume=True).stopped
    with pytest.raises(UsageError, match=r"--accumulate 1 differs from the 3 that"):
        stopped.settings({**given, "batch_size": 24, "accumulate": 1})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accumulate": 0}, "--accumulate 0 is not allowed; give 1 or more"),
        ({"accumulate": 3, "batch_size": 64}, "--accumulate 3 does not divide --batch-size 64"),
        ({"accumulate": 64, "batch_size": 64}, "into equal parts of 2 or more images"),
    ],
)
def test_parts_that_cannot_be_are_refused(changes, words):
    with pytest.raises(UsageError, match=words) as refused:
        TrainSettings(**changes, device="cpu").check()
    assert str(refused.value).count("--accumulate") == 1


def test_parts_of_ranks_and_of_small_data_are_refused_too(tiny):
    assert Ranks(0, 2).part(24, 3) == 12
    with pytest.raises(UsageError, match="among 2 processes with --accumulate 3; .* a multiple of 6 and at least 12"):
        Ranks(0, 2).part(20, 3)
    with pytest.raises(UsageError, match="a batch of 10 images cannot be divided into parts with --accumulate 4"):
        train(tiny.model(), tiny.data("fake:10"), tiny.settings(batch_size=64, accumulate=4))
