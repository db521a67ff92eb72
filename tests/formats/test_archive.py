import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.formats.archive import open_archive, write_archive
from dsr_tool.formats.codecs import CODECS
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor


@pytest.mark.parametrize("encoding", ["auto", *(name for name in CODECS if name != "nm")])
def test_an_archive_round_trips_bit_for_bit(tmp_path, encoding, small_model):
    tensors, specs, graph, config = small_model
    write_archive(tmp_path / "a.dsr", tensors, specs, graph, config, encoding=encoding)
    archive = open_archive(tmp_path / "a.dsr")
    assert list(archive.entries) == list(tensors)
    assert archive.config == config
    assert archive.graph.to_json() == graph.to_json()
    for name, tensor in archive:
        assert archive.entries[name].spec == specs[name]
        np.testing.assert_array_equal(tensor.mask.positions, tensors[name].mask.positions)
        assert tensor.values.tobytes() == tensors[name].values.tobytes()


@pytest.mark.parametrize("encoding", ["auto", "dense"])
@pytest.mark.parametrize("shape", [(), (0,), (5, 0), (0, 5, 2)])
@pytest.mark.parametrize("role", ["dense", "buffer"])
def test_tensors_with_one_or_no_entry_round_trip(tmp_path, encoding, shape, role, small_model):
    tensors, specs, graph, config = small_model
    mask = Mask.full(shape)
    for name, dtype, weight in (("a.odd", np.float32, True), ("b.odd", np.float32, False), ("c.odd", np.int64, False)):
        tensors[name] = SparseTensor(mask, np.full(mask.size, 7, dtype))
        specs[name] = LayerSpec(name, shape, "Odd", role, weight, "odd")
    write_archive(tmp_path / "net.dsr", tensors, specs, graph, config, encoding=encoding)
    for name, array in open_archive(tmp_path / "net.dsr").dense().items():
        np.testing.assert_array_equal(array, tensors[name].to_dense(), strict=True)


def test_the_same_model_gives_the_same_bytes(tmp_path, small_model):
    for name in ("a", "b"):
        write_archive(tmp_path / name, *small_model)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_stored_bytes_add_up_to_the_file(archive):
    opened = open_archive(archive)
    payload = sum(opened.entry_bytes(name) for name in opened.entries) + opened.document_bytes
    assert payload + opened.header_bytes == opened.nbytes == archive.stat().st_size


def test_an_existing_file_stays_without_force(archive, small_model):
    before = archive.read_bytes()
    with pytest.raises(FileError, match="exists already"):
        write_archive(archive, *small_model)
    assert archive.read_bytes() == before
    write_archive(archive, *small_model, force=True)


def test_a_failed_write_leaves_nothing(tmp_path, small_model):
    tensors, specs, graph, config = small_model
    with pytest.raises(UsageError, match="did you mean delta"):
        write_archive(tmp_path / "a.dsr", tensors, specs, graph, config, encoding="delt")
    with pytest.raises(UsageError, match=r"fc\.weight"):
        write_archive(tmp_path / "a.dsr", {"fc.bias": tensors["fc.bias"]}, specs, graph, config)
    assert list(tmp_path.iterdir()) == []


def test_a_newer_major_version_asks_for_a_newer_tool(archive, rewrite):
    rewrite(archive, lambda manifest: None, {"version": "2.0"})
    with pytest.raises(FormatError, match="install a newer dsr-tool"):
        open_archive(archive)


def test_a_newer_minor_version_is_read(archive, rewrite):
    def add(manifest):
        manifest.update(news="ignored")
        manifest["model"].update(news="ignored")
        for entry in manifest["tensors"]:
            entry.update(news="ignored")

    rewrite(archive, add, {"version": "1.7"})
    open_archive(archive).check()


@pytest.mark.parametrize("version", ["0.3", "-1.0", "x"])
def test_other_majors_are_refused(archive, version, rewrite):
    rewrite(archive, lambda manifest: None, {"version": version})
    with pytest.raises(FormatError):
        open_archive(archive)


def test_files_that_are_not_archives_are_refused(tmp_path):
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "plain.safetensors")
    with pytest.raises(FormatError, match="not a dsr archive"):
        open_archive(tmp_path / "plain.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(FormatError, match="not a dsr archive"):
        open_archive(tmp_path / "text")
    with pytest.raises(FileError, match="does not exist"):
        open_archive(tmp_path / "nothing.dsr")
    with pytest.raises(FileError, match="not a file"):
        open_archive(tmp_path)


def test_a_tensor_name_that_would_hide_a_stream_is_refused(tmp_path, small_model):
    tensors, specs, graph, config = small_model
    tensors["fc.weight:mask"] = tensors["fc.bias"]
    specs["fc.weight:mask"] = replace(specs["fc.bias"], name="fc.weight:mask")
    with pytest.raises(UsageError, match="fc.weight:mask"):
        write_archive(tmp_path / "a.dsr", tensors, specs, graph, config, encoding="bitmask")


def test_dense_equals_each_tensor_decoded_by_itself(archive, small_model):
    tensors, *_ = small_model
    dense = open_archive(archive).dense()
    assert list(dense) == list(tensors)
    for name, tensor in tensors.items():
        assert dense[name].tobytes() == tensor.to_dense().tobytes()
        assert dense[name].shape == tensor.mask.shape and dense[name].flags.aligned


def test_a_decoded_tensor_may_be_changed(archive, small_model):
    opened = open_archive(archive)
    opened.tensor("fc.bias").values[:] = 7
    assert opened.tensor("fc.bias").values.tobytes() == small_model[0]["fc.bias"].values.tobytes()


def test_an_open_archive_outlives_its_replacement(archive, tmp_path):
    opened = open_archive(archive)
    (tmp_path / "other").write_bytes(b"nothing")
    (tmp_path / "other").replace(archive)
    opened.check()


def test_small_dense_tensors_share_a_stream_unless_a_codec_is_named(tmp_path, small_model):
    for encoding, shared in (("auto", {":packed:float32", ":packed:int64"}), ("delta", set())):
        path = tmp_path / encoding
        write_archive(path, *small_model, encoding=encoding)
        assert {name for name in load_file(path) if name.startswith(":packed")} == shared
        opened = open_archive(path)
        payload = sum(opened.entry_bytes(name) for name in opened.entries) + opened.document_bytes
        assert payload + opened.header_bytes == opened.nbytes


def test_weights_kept_dense_take_the_smallest_codec_too(tmp_path, small_model):
    tensors, specs, graph, config = small_model
    for name, values in (("even", np.full(4000, 0.5, np.float32)), ("odd", np.zeros(3, np.float32) + 0.3)):
        tensors[name] = SparseTensor(Mask.full(values.shape), values)
        specs[name] = LayerSpec(name, values.shape, "Linear", "dense", True, "weight of Linear")
    write_archive(tmp_path / "a", tensors, specs, graph, config)
    entries = open_archive(tmp_path / "a").entries
    assert (entries["even"].codec, entries["odd"].codec) == ("palette", "dense")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_decoding_takes_no_more_memory_than_the_dense_model_and_a_layer(tmp_path, small_model):
    tensors, specs, graph, config = small_model
    layer, count, random = (1024, 1024), 12, np.random.default_rng(0)
    for i in range(count):
        mask = Mask.from_bool(random.random(layer) < 0.1)
        tensors[f"{i}"] = SparseTensor(mask, random.normal(size=mask.active).astype(np.float32))
        specs[f"{i}"] = LayerSpec(f"{i}", layer, "Linear", "sparse", True, "weight of Linear")
    write_archive(tmp_path / "a", tensors, specs, graph, config)
    code = f"""
from pathlib import Path
from dsr_tool.formats.archive import open_archive
def status(field):
    return 1024 * int(Path("/proc/self/status").read_text().partition(field + ":")[2].split()[0])
before = status("VmRSS")
dense = open_archive({str(tmp_path / "a")!r}).dense()
print(status("VmHWM") - before)
"""
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert peak <= (count + 1) * 4 * 1024 * 1024 + (2 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["sparse", "dense"])
def test_a_hundred_thousand_layers_load(tmp_path, role, small_model):
    tensors, specs, graph, config = small_model
    one = tensors["fc.weight"] if role == "sparse" else tensors["fc.bias"]
    for i in range(100_000):
        tensors[f"layers.{i}.weight"] = one
        specs[f"layers.{i}.weight"] = LayerSpec(f"layers.{i}.weight", one.mask.shape, "Linear", role, False, "many")
    write_archive(tmp_path / "a", tensors, specs, graph, config)
    start = time.process_time()
    assert len(open_archive(tmp_path / "a").entries) == 100_003
    assert time.process_time() - start < 15
