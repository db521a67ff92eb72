"""Stages of a module: their run equals the module, from any cut, and the module stays as it was."""

import pytest
import torch
import torchvision
from torch import nn

from dsr_tool.calibrate.segments import Segments, kept, used
from dsr_tool.errors import UsageError
from dsr_tool.sparse.feeding import evaluating


class Residual(nn.Module):
    """A residual block with in-place activations, as torchvision writes them."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.relu, self.head = nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        x = self.relu(self.stem(x))
        y = self.second(self.relu(self.norm(self.first(x))))
        y += x * self.scale
        return self.head(self.relu(y).mean((2, 3)))


class Untraceable(Residual):
    def forward(self, x):
        return super().forward(x if float(x.detach().sum()) > -1e9 else -x)


class Holder(nn.Module):
    """Holds a submodule that cannot be traced between two that can."""

    def __init__(self):
        super().__init__()
        self.before, self.inside, self.after = nn.Linear(4, 3 * 49), Untraceable(), nn.Linear(4, 2)

    def forward(self, x):
        return self.after(self.inside(self.before(x).view(-1, 3, 7, 7)))


@pytest.mark.parametrize(
    ("build", "shape", "least"),
    [(Residual, (3, 8, 8), 4), (Untraceable, (3, 8, 8), 1), (Holder, (4,), 3)],
    ids=["residual", "untraceable", "holder"],
)
def test_every_cut_goes_on_to_the_output_of_the_module(build, shape, least):
    torch.manual_seed(0)
    module, pictures = build(), torch.randn(6, *shape)
    segments = Segments.of(module, pictures[:2])
    assert len(segments) >= least
    with evaluating(module):
        expected, values = module(pictures), segments.begin(pictures)
        for stage in range(len(segments)):
            # Copies, because activations in place would change what is kept.
            torch.testing.assert_close(segments.run(used(values), stage), expected)
            values = segments.advance(stage, used(values))


def test_changed_weights_are_seen():
    torch.manual_seed(0)
    module, pictures = Residual(), torch.randn(2, 3, 8, 8)
    segments = Segments.of(module, pictures)
    with evaluating(module):
        before = segments.run(segments.begin(pictures))
        module.second.weight.zero_()
        module.scale.zero_()
        assert not torch.equal(segments.run(segments.begin(pictures)), before)
        torch.testing.assert_close(segments.run(segments.begin(pictures)), module(pictures))


def test_a_layer_that_is_called_twice_lies_in_one_stage():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.c(self.b(torch.relu(self.a(self.b(x)))))

    module = Twice()
    segments = Segments.of(module, torch.randn(2, 4))
    stages = [segments.stage_of[f"{name}.weight"] for name in "bac"]
    assert stages[0] == stages[1] < stages[2]


def test_no_cut_keeps_more_values_than_allowed():
    module, pictures = Residual(), torch.randn(2, 3, 8, 8)
    assert len(Segments.of(module, pictures, most_values=400)) < len(Segments.of(module, pictures))
    segments = Segments.of(module, pictures, most_values=400)
    with evaluating(module):
        values = segments.begin(pictures)
        for stage in range(len(segments) - 1):
            values = segments.advance(stage, values)
            assert sum(v.numel() for v in values.values() if isinstance(v, torch.Tensor)) <= 400 * len(pictures)


def test_flags_come_back_and_the_example_must_fit():
    module = Residual()
    module.norm.eval()
    with pytest.raises(UsageError, match="does not take inputs of shape"):
        Segments.of(module, torch.randn(2, 5, 8, 8))
    assert module.training
    assert not module.norm.training
    assert module.norm.num_batches_tracked == 0


def test_kept_values_are_half_as_large_unless_that_would_overflow():
    values = {"a": torch.tensor([1.5]), "b": torch.tensor([1e6]), "c": (torch.tensor([2]), 3)}
    small = kept(values, half=True)
    assert [v.dtype for v in (small["a"], small["b"], small["c"][0])] == [torch.float16, torch.float32, torch.int64]
    back = used(small)
    assert back["a"].dtype == torch.float32
    assert back["c"] == values["c"]


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_classifiers_are_cut_before_every_layer(name):
    module = torchvision.models.get_model(name)
    layers = sum(p.dim() > 1 for p in module.parameters())
    assert layers - 1 <= len(Segments.of(module, torch.randn(2, 3, 64, 64))) <= layers
