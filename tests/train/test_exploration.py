import pytest
import torch

from dsr_tool.errors import FormatError
from dsr_tool.train import Observer, train
from dsr_tool.train.exploration import Exploration


class Union(Observer):
    """The reference: reads every mask after every step."""

    def on_start(self, model, total_steps):  # noqa: ARG002
        self.model = model
        self.ever = {name: mask.clone() for name, mask in model.masks.items()}
        self.counted = Exploration(model)

    def on_step(self, step):  # noqa: ARG002
        self.counted.look()
        for name, mask in self.model.masks.items():
            self.ever[name] = self.ever[name] | mask


@pytest.mark.parametrize("method", ["dsr", "set", "static", "deepr"])
def test_exploration_is_the_union_of_all_masks(tiny, method):
    referee = Union()
    train(tiny.model(), tiny.data(), tiny.settings(method=method, epochs=2, every=1), [referee])
    expected = {name: int(ever.sum()) for name, ever in referee.ever.items()}
    assert referee.counted.counts() == expected
    moved = any(expected[name] > int(mask.sum()) for name, mask in referee.model.masks.items())
    assert moved == (method != "static")


def test_exploration_is_restored_from_its_bits(tiny):
    model = tiny.model()
    before = Exploration(model)
    with torch.no_grad():
        model.masks["second.weight"].view(-1)[:50] = True
    before.look()
    with torch.no_grad():
        model.masks["second.weight"].view(-1)[:50] = False
    fresh = Exploration(model)
    assert fresh.counts() != before.counts()
    assert Exploration(model, before.bits()).counts() == before.counts()


def test_exploration_sees_masks_that_are_replaced_by_other_tensors(tiny):
    model = tiny.model()
    counted = Exploration(model)
    model.masks["head.weight"] = torch.ones_like(model.masks["head.weight"])
    counted.look()
    assert counted.counts()["head.weight"] == model.masks["head.weight"].numel()


@pytest.mark.parametrize("bits", [{"other": torch.zeros(3, dtype=torch.uint8)}, {"head.weight": torch.zeros(3)}])
def test_exploration_bits_of_another_model_are_refused(tiny, bits):
    with pytest.raises(FormatError, match="record of active weights does not fit"):
        Exploration(tiny.model(), bits)
