"""Weights in few bits and in palettes: what files hold, what loading and exporting again keeps, what is refused."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from converters.loading import load
from dsr_tool.errors import UsageError
from dsr_tool.formats.archive import open_archive
from dsr_tool.runtime import Session
from dsr_tool.sparsity.grid import GridTensor, largest_code
from dsr_tool.sparsity.grid_rounding import balanced, to_grid
from exporters.export import export, verify
from exporters.values import GRID_BITS

VALUES = sorted(GRID_BITS)


@pytest.mark.parametrize("values", VALUES)
def test_an_archive_holds_the_grid_and_nothing_else_is_rounded(make_model, tmp_path, values):
    model = make_model()
    found = export(model, tmp_path / "m.dsr", values=values)
    assert found.passed and found.weights_equal and set(found.runtimes) == {"onnxruntime", "sparse"}
    archive, exact = open_archive(tmp_path / "m.dsr"), model.tensors()
    for name, entry in archive.entries.items():
        tensor = archive.tensor(name)
        assert tensor.mask.equals(exact[name].mask)
        assert isinstance(tensor, GridTensor) == entry.spec.weight == (entry.codec == "grid")
        if entry.spec.weight:
            bits = GRID_BITS[values]
            expected = balanced(to_grid(exact[name], bits), exact[name], bits)
            assert np.array_equal(tensor.codes, expected.codes) and np.array_equal(tensor.scales, expected.scales)
            assert np.abs(tensor.codes.astype(int)).max() == largest_code(GRID_BITS[values])
        else:
            assert tensor.values.tobytes() == exact[name].values.tobytes()


@pytest.mark.parametrize("values", VALUES)
def test_a_loaded_archive_keeps_its_grid(make_model, tmp_path, values):
    export(make_model(), tmp_path / "m.dsr", values=values)
    loaded = load(tmp_path / "m.dsr", make_model().module)
    assert verify(tmp_path / "m.dsr", loaded).passed
    export(loaded, tmp_path / "again.dsr", values=values)
    first, second = open_archive(tmp_path / "m.dsr"), open_archive(tmp_path / "again.dsr")
    assert all(second.tensor(name).values.tobytes() == tensor.values.tobytes() for name, tensor in first)


def test_fewer_bits_are_smaller(make_model, tmp_path):
    sizes = []
    for values in ("fp32", "fp16", "int8", "int6", "int5", "int4"):
        export(make_model(0.3), tmp_path / f"{values}.dsr", values=values)
        sizes.append((tmp_path / f"{values}.dsr").stat().st_size)
    assert sizes == sorted(sizes, reverse=True)


def test_a_safetensors_file_has_codes_beside_scales(make_model, tmp_path):
    model = make_model()
    assert export(model, tmp_path / "m.safetensors", values="int8").passed
    state = load_file(tmp_path / "m.safetensors")
    expected = open_archive_of(model, tmp_path).dense()
    for name, spec in model.specs.items():
        if not spec.weight:
            assert np.array_equal(state[name], expected[name])
            continue
        assert state[name].dtype == np.int8
        assert np.array_equal(state[name].astype(np.float32) * state[name + "_scale"], expected[name])
    assert verify(tmp_path / "m.safetensors", make_model()).passed


def test_scales_of_columns_are_not_those_of_rows(make_model, tmp_path):
    path, model = tmp_path / "m.safetensors", make_model()
    export(model, path, values="int8")
    state = load_file(path)
    state["8.weight_scale"] = state["8.weight_scale"].reshape(1, -1)
    save_file(state, path)
    assert not verify(path, make_model()).weights_equal


def open_archive_of(model, folder):
    export(model, folder / "same.dsr", values="int8")
    return open_archive(folder / "same.dsr")


def test_the_sparse_runtime_computes_the_rounded_model(make_model, tmp_path):
    model = make_model()
    export(model, tmp_path / "m.dsr", values="int8")
    rounded = load(tmp_path / "m.dsr", make_model().module).module.eval()
    x = np.random.default_rng(0).standard_normal((3, *model.config.input_shape)).astype(np.float32)
    with torch.no_grad():
        expected = rounded(torch.from_numpy(x)).numpy()
    for runtime in ("native", "scipy"):
        np.testing.assert_allclose(
            Session(tmp_path / "m.dsr", runtime=runtime).run(x), expected, atol=1e-5 * np.abs(expected).max()
        )


def test_palettes_keep_every_bit_of_every_weight(make_model, tmp_path):
    model = make_model()
    with torch.no_grad():
        for weight in model.weights.values():
            weight.copy_((weight * 8).round() / 8)
    assert export(model, tmp_path / "m.dsr", values="palette").passed
    archive = open_archive(tmp_path / "m.dsr")
    assert {entry.codec for entry in archive.entries.values() if entry.spec.weight} == {"palette"}
    assert all(tensor.values.tobytes() == model.tensors()[name].values.tobytes() for name, tensor in archive)
    export(model, tmp_path / "auto.dsr")
    assert (tmp_path / "auto.dsr").stat().st_size <= (tmp_path / "m.dsr").stat().st_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": "int8", "encoding": "delta"}, "--encoding 'delta' stores floats as they are"),
        ({"values": "int8", "encoding": "palette"}, "--encoding 'palette' stores floats as they are"),
        ({"values": "palette", "encoding": "csr"}, "--encoding 'csr' stores floats as they are"),
        ({"values": "palette", "to": "onnx"}, "--values 'palette' does not exist in onnx files"),
        ({"values": "int8", "to": "csr"}, "--values 'int8' does not exist in csr files, which take fp32, fp16"),
        ({"values": "int5", "to": "state-dict"}, "--values 'int5' does not exist in state-dict files"),
        ({"values": "int3"}, "--values 'int3' is unknown"),
    ],
)
def test_values_that_do_not_fit_leave_no_file(make_model, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        export(make_model(), tmp_path / "m", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_have_no_grid(make_model, tmp_path, value):
    model = make_model()
    with torch.no_grad():
        model.weights["8.weight"][model.masks["8.weight"]] = value
    with pytest.raises(UsageError, match="'int8' cannot hold weight '8.weight'"):
        export(model, tmp_path / "m.dsr", values="int8")
    assert not list(tmp_path.iterdir())


def test_values_beyond_float16_and_empty_channels_have_grids(make_model, tmp_path):
    model = make_model()
    with torch.no_grad():
        weight = model.weights["10.weight"]
        weight[0] *= 1e9
        weight[1] *= 1e-30
        weight[2] = 0
    assert export(model, tmp_path / "m.dsr", values="int8").passed
    scales = open_archive(tmp_path / "m.dsr").tensor("10.weight").scales
    assert scales[0] > 65504 / 127 and 0 < scales[1] < 1e-28 and scales[2] == 0


def test_a_name_that_scales_need_is_refused(make_model, tmp_path):
    model = make_model()
    model.module[8].register_buffer("weight_scale", torch.ones(1))
    model = type(model)(model.module, {**model.specs, "8.weight_scale": buffer_spec()}, model.masks, model.config)
    with pytest.raises(UsageError, match="stores the scales of '8.weight' as '8.weight_scale'"):
        export(model, tmp_path / "m.safetensors", values="int8")


def buffer_spec():
    from dsr_tool.sparsity.layers import LayerSpec

    return LayerSpec("8.weight_scale", (1,), "Linear", "buffer", False, "buffer")


BROKEN = {
    "codes of -128": ("codes", np.array([-128, 1, 1], np.int8), "a code is -128"),
    "NaN": ("scales", np.array([np.nan, 1], np.float32), "a scale is nan"),
    "infinite": ("scales", np.array([1, np.inf], np.float32), "a scale is inf"),
    "negative": ("scales", np.array([-1, 1], np.float32), "a scale is -1"),
    "minus zero": ("scales", np.array([-0.0, 1], np.float32), "a scale is -0"),
    "denormal": ("scales", np.array([1e-40, 1], np.float32), "a scale is 9.99"),
    "overflow": ("scales", np.array([1e38, 1], np.float32), "127 do not overflow"),
    "zero": ("scales", np.array([0, 1], np.float32), "a scale of 0 has codes"),
    "too few": ("scales", np.array([1], np.float32), "damaged"),
    "too many": ("codes", np.array([1, 1, 1, 1], np.int8), "byte plane"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_streams_that_no_writer_makes_are_refused(fault):
    from dsr_tool.errors import FormatError
    from dsr_tool.formats.coding import encode_planes
    from dsr_tool.formats.grid import decode_grid, encode_grid
    from dsr_tool.sparsity.mask import Mask

    stream, array, message = BROKEN[fault]
    mask = Mask((2, 4), np.array([0, 3, 6]))
    streams = encode_grid(GridTensor(mask, np.array([1, -2, 3], np.int8), np.array([0.5, 0.25], np.float32)))
    assert decode_grid(streams, (2, 4), 3, np.dtype(np.float32)).values.tolist() == [0.5, -1, 0.75]
    with pytest.raises(FormatError, match=message):
        decode_grid({**streams, stream: encode_planes(array)}, (2, 4), 3, np.dtype(np.float32))
    with pytest.raises(FormatError, match="float32"):
        decode_grid(streams, (2, 4), 3, np.dtype(np.float16))
