"""Layers that are starved or silent."""

import numpy as np

from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.starved import silent_layers, starved_layers
from dsr_tool.sparsity.tensor import SparseTensor


def spec(name, shape, kind="Conv2d", role="sparse"):
    return LayerSpec(name, shape, kind, role, True, "")


def test_starved_by_density_or_by_outputs():
    specs = {s.name: s for s in (spec("thin", (10, 1000)), spec("few", (100, 10)), spec("good", (10, 100)))}
    found = starved_layers(specs, {"thin": 199, "few": 99, "good": 20})
    assert list(found) == ["thin", "few"]
    assert found["few"] == "99 of 1,000 weights, density 0.099"


def test_dense_layers_are_never_starved():
    assert starved_layers({"a": spec("a", (10, 10), role="dense")}, {}) == {}


def rows(shape, axis, alive, value=1.0):
    """Returns a weight with one active value in each of the first outputs."""
    array = np.zeros(shape, np.float32)
    index = [slice(None)] * len(shape)
    index[axis] = slice(alive)
    mask = np.zeros(shape, bool)
    mask[tuple(index)] = True
    array[mask] = value
    return SparseTensor.from_dense(array, Mask.from_bool(mask))


def test_silent_below_a_tenth_of_the_outputs():
    specs = {"a": spec("a", (40, 8, 3, 3)), "b": spec("b", (8, 40, 3, 3), "ConvTranspose2d")}
    for alive, expected in ((3, ["a", "b"]), (4, [])):
        tensors = {"a": rows((40, 8, 3, 3), 0, alive), "b": rows((8, 40, 3, 3), 1, alive)}
        assert list(silent_layers(specs, tensors)) == expected


def test_active_zeros_carry_no_signal():
    specs = {"a": spec("a", (4, 4), "Linear")}
    assert silent_layers(specs, {"a": rows((4, 4), 0, 4, value=0.0)}) == {"a": "0 of 4 outputs have a weight"}
    assert not silent_layers(specs, {"a": rows((4, 4), 0, 4)})
