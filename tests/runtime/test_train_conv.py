"""Sparse convolutions for training agree with sums in float64, at every level that runs here."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.runtime.kernels import library as library_module
from dsr_tool.runtime.kernels import training
from dsr_tool.runtime.kernels.cpu import supported_levels
from dsr_tool.runtime.kernels.training import CALLS, ConvPlan, Layer

pytestmark = pytest.mark.skipif(not training.available(), reason="no kernels were built here")

LOADED = library_module.kernels()
LEVELS = [name for name in LOADED.built if name in supported_levels()] if LOADED.level != "custom" else ["custom"]
"""Every level of this build that runs here; the one library that the variable names, if it does."""


@pytest.fixture(scope="module", params=LEVELS)
def level(request):
    """Runs tests with the kernels of one level."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "custom":
            found = library_module.choose(request.param, Path(library_module.__file__).parent).library
            patch.setattr(training, "library", lambda: found)
        training._functions.cache_clear()
        yield
    training._functions.cache_clear()


def blocked(images, lanes):
    """Returns (N, C, H, W) as (blocks, C, H, W, lanes)."""
    blocks = -(-len(images) // lanes)
    padded = np.zeros((blocks * lanes, *images.shape[1:]), np.float32)
    padded[: len(images)] = images
    return np.ascontiguousarray(padded.reshape(blocks, lanes, *images.shape[1:]).transpose(0, 2, 3, 4, 1))


def unblocked(x, count):
    return x.transpose(0, 4, 1, 2, 3).reshape(-1, *x.shape[1:4])[:count]


class Case:
    """A layer with a sparse weight, an input and a gradient to its output; all results in float64."""

    def __init__(self, rng, layer, images, density):
        self.layer, self.images = layer, images
        shape = (layer.out_channels, layer.in_channels // layer.groups, layer.kernel_y, layer.kernel_x)
        self.active = rng.random(shape) < density
        self.weight = np.where(self.active, rng.standard_normal(shape), 0).astype(np.float32)
        self.positions = np.flatnonzero(self.active).astype(np.int32)
        self.values = self.weight.ravel()[self.positions]
        self.bias = rng.standard_normal(layer.out_channels).astype(np.float32)
        self.x = rng.standard_normal((images, layer.in_channels, layer.height, layer.width)).astype(np.float32)
        rows = (layer.height + layer.top + layer.bottom - layer.dilation_y * (layer.kernel_y - 1) - 1) // layer.stride_y
        columns = (
            layer.width + layer.left + layer.right - layer.dilation_x * (layer.kernel_x - 1) - 1
        ) // layer.stride_x
        self.gradient = rng.standard_normal((images, layer.out_channels, rows + 1, columns + 1)).astype(np.float32)

    def _taps(self):
        """Yields each tap of the kernel, and the slices of the padded input that it reads."""
        rows, columns = self.gradient.shape[2:]
        for ky in range(self.layer.kernel_y):
            for kx in range(self.layer.kernel_x):
                y, x = ky * self.layer.dilation_y, kx * self.layer.dilation_x
                yield ky, kx, (
                    slice(None), slice(None), slice(y, y + rows * self.layer.stride_y, self.layer.stride_y),
                    slice(x, x + columns * self.layer.stride_x, self.layer.stride_x),
                )  # fmt: skip

    def _padded(self, x):
        layer = self.layer
        # The last step may reach past the padding without reading there.
        after = (layer.bottom + layer.stride_y, layer.right + layer.stride_x)
        return np.pad(np.asarray(x, np.float64), ((0, 0), (0, 0), (layer.top, after[0]), (layer.left, after[1])))

    def _split(self, array, axis):
        return np.split(array, self.layer.groups, axis)

    def forward(self, x, weight):
        padded, out = self._padded(x), np.zeros(self.gradient.shape)
        for ky, kx, view in self._taps():
            parts = zip(self._split(padded[view], 1), self._split(weight[:, :, ky, kx], 0), strict=True)
            out += np.concatenate([np.einsum("nchw,oc->nohw", a, w, optimize=True) for a, w in parts], 1)
        return out

    def to_input(self, gradient, weight):
        padded = np.zeros(self._padded(self.x).shape)
        for ky, kx, view in self._taps():
            parts = zip(self._split(gradient, 1), self._split(weight[:, :, ky, kx], 0), strict=True)
            padded[view] += np.concatenate([np.einsum("nohw,oc->nchw", g, w, optimize=True) for g, w in parts], 1)
        layer = self.layer
        return padded[:, :, layer.top : layer.top + layer.height, layer.left : layer.left + layer.width]

    def to_values(self, x, gradient):
        padded, out = self._padded(x), np.zeros(self.weight.shape)
        for ky, kx, view in self._taps():
            parts = zip(self._split(padded[view], 1), self._split(np.float64(gradient), 1), strict=True)
            out[:, :, ky, kx] = np.concatenate([np.einsum("nchw,nohw->oc", a, g, optimize=True) for a, g in parts], 0)
        return out.ravel()[self.positions]

    def run(self, threads=1):
        """Returns the kernels' output and gradients, to the input and to the values."""
        layer, x, gradient = self.layer, blocked(self.x, self.layer.lanes), blocked(self.gradient, self.layer.lanes)
        # What the results hold before must not matter, and every entry must be written.
        out, to_input = np.full_like(gradient, np.nan), np.full_like(x, np.nan)
        to_values = np.full_like(self.values, np.nan)
        before = CALLS.copy()
        where = (self.positions.ctypes.data, len(self.positions))
        forward, backward = ConvPlan(layer, *where), ConvPlan(replace(layer, gradient=True), *where)
        values = self.values.ctypes.data
        forward.gather(x.ctypes.data, len(x), values, self.bias.ctypes.data, out.ctypes.data, threads)
        backward.gather(gradient.ctypes.data, len(x), values, None, to_input.ctypes.data, threads)
        forward.weights(x.ctypes.data, len(x), gradient.ctypes.data, to_values.ctypes.data, threads)
        assert CALLS - before == {"dsr_conv": 2, "dsr_conv_weights": 1}
        return unblocked(out, self.images), unblocked(to_input, self.images), to_values

    def check(self, results):
        """Asserts that results are as exact as sums in float32 can be: relative to the sums of absolute terms."""
        x, gradient, weight = np.abs(self.x), np.abs(self.gradient), np.abs(self.weight)
        bias = self.bias[:, None, None]
        expected = (
            (self.forward(self.x, self.weight) + bias, self.forward(x, weight) + np.abs(bias)),
            (self.to_input(self.gradient, self.weight), self.to_input(gradient, weight)),
            (self.to_values(self.x, self.gradient), self.to_values(x, gradient)),
        )
        for found, (exact, scale) in zip(results, expected, strict=True):
            assert np.all(np.abs(found - exact) <= 1e-5 * scale)


@st.composite
def layers(draw):
    """Layers that are small and of every kind; groups 0 stands for depthwise."""
    kernel = draw(st.sampled_from(((1, 1), (3, 3), (5, 5), (2, 2), (7, 7), (1, 5), (3, 1), (4, 3))))
    dilation = draw(st.sampled_from(((1, 1), (1, 1), (2, 2), (3, 1), (1, 5))))
    stride = draw(st.sampled_from(((1, 1), (1, 1), (2, 2), (3, 3), (1, 2), (2, 1))))
    pads = draw(st.tuples(*[st.integers(0, 4)] * 4))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    # Half of the planes are tiny, as at the end of networks.
    most = draw(st.sampled_from((4, 21)))
    size = [draw(st.integers(max(r - pads[i] - pads[i + 2], 1), max(most, r))) for i, r in enumerate(reach)]
    group, channels, rows = draw(st.sampled_from((1, 1, 1, 2, 3, 0))), draw(st.integers(1, 17)), draw(st.integers(1, 9))
    if group == 0:
        group, channels, rows = channels, 1, draw(st.integers(1, 2))
    tile = draw(
        st.one_of(st.just((0, 0, 0)), st.tuples(st.integers(1, 9), st.integers(1, 30), st.sampled_from((0, 600, 5000))))
    )
    return Layer(
        group * rows, group * channels, *kernel, *stride, *pads, *dilation, group, *size,
        lanes=draw(st.sampled_from((4, 8, 16))), blocks=draw(st.integers(1, 6)),
        tile_y=tile[0], tile_x=tile[1], panel_bytes=tile[2],
    )  # fmt: skip


DENSITIES = st.sampled_from((0.0, 0.02, 0.1, 0.3, 1.0))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("threads", [1, 2])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), layer=layers(), images=st.integers(1, 70), density=DENSITIES)
def test_results_agree_with_sums_in_float64(threads, seed, layer, images, density):
    """The number of blocks is seldom the one that the plan expects, and the last block is seldom full."""
    case = Case(np.random.default_rng(seed), layer, images, density)
    case.check(case.run(threads))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("layer", [
    Layer(24, 40, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 33, 33, 16, 1),
    Layer(70, 300, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 30, 30, 16, 1),
    Layer(24, 40, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 45, 45, 8, 2),
    Layer(400, 300, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 16, 4),
    Layer(96, 96, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 96, 28, 28, 8, 1),
])  # fmt: skip
def test_layers_with_many_blocks_of_channels_agree(layer):
    case = Case(np.random.default_rng(1), layer, layer.blocks * layer.lanes, 0.1)
    case.check(case.run(2))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), layer=layers(), images=st.integers(1, 70), density=DENSITIES)
def test_the_number_of_threads_changes_no_bit(seed, layer, images, density):
    case = Case(np.random.default_rng(seed), layer, images, density)
    first, *others = (case.run(threads) for threads in (1, 2, 3))
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("level")
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), layer=layers(), images=st.integers(1, 40), density=DENSITIES)
def test_nan_reaches_what_reads_it_and_nothing_else(seed, layer, images, density):
    rng = np.random.default_rng(seed)
    case = Case(rng, layer, images, density)
    for array in (case.x, case.gradient):
        array[rng.random(array.shape) < 2 / array.size] = np.nan
    bad_x, bad_gradient = np.isnan(case.x), np.isnan(case.gradient)
    out, to_input, _ = case.run()
    np.testing.assert_array_equal(np.isnan(out), case.forward(bad_x, case.active) > 0)
    np.testing.assert_array_equal(np.isnan(to_input), case.to_input(bad_gradient, case.active) > 0)


@pytest.mark.usefixtures("level")
def test_a_row_without_weights_is_its_bias_and_its_input_gets_no_gradient():
    layer = Layer(5, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 6, 6, 16, 1)
    case = Case(np.random.default_rng(0), layer, 16, 0.0)
    case.positions = np.array([17], np.int32)
    case.weight.ravel()[17] = 2
    case.values = np.array([2], np.float32)
    out, to_input, to_values = results = case.run()
    case.check(results)
    np.testing.assert_array_equal(out[:, 1:], np.broadcast_to(case.bias[1:, None, None], out[:, 1:].shape))
    assert not to_input[:, [0, 2, 3]].any()
    assert to_values.shape == (1,)


def test_plans_take_eight_bytes_a_weight_and_leave_out_taps_that_never_meet_the_input():
    rng = np.random.default_rng(0)
    shape = (256, 256, 3, 3)
    positions = np.flatnonzero(rng.random(shape) < 0.1).astype(np.int32)

    def size(plane):
        layer = Layer(256, 256, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, plane, plane, 16, 1)
        plans = [
            ConvPlan(replace(layer, gradient=gradient), positions.ctypes.data, len(positions)) for gradient in (0, 1)
        ]
        return sum(plan.bytes for plan in plans)

    assert size(14) <= 9 * len(positions)
    assert size(1) <= 2 * len(positions)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_process_makes_threads_of_its_own():
    """The threads of the parent do not exist in the child, so a call on its pool would wait for ever."""
    script = """
import os, sys
import numpy as np
from dsr_tool.runtime.kernels.training import ConvPlan, Layer
layer = Layer(8, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 20, 20, 16, 1)
positions = np.arange(576, dtype=np.int32)
values, x = np.ones(576, np.float32), np.ones((4, 8, 20, 20, 16), np.float32)
plan, out = ConvPlan(layer, positions.ctypes.data, 576), np.empty_like(x)
def run():
    plan.gather(x.ctypes.data, 4, values.ctypes.data, None, out.ctypes.data, 2)
    assert out[0, 0, 5, 5, 0] == 72
run()
child = os.fork()
run()
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
