import hashlib
import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dsr_tool.core.archive import open_archive, write_archive
from dsr_tool.core.codecs import CODECS, SparseTensor
from dsr_tool.core.config import ModelConfig
from dsr_tool.core.graph import Graph, Node, Value
from dsr_tool.core.layers import LayerSpec
from dsr_tool.core.mask import Mask
from dsr_tool.errors import FileError, FormatError, UsageError


def model():
    rng = np.random.default_rng(0)
    mask = Mask.from_bool(rng.random((8, 40)) < 0.2)
    full = Mask((8,), np.arange(8))
    tensors = {
        "fc.weight": SparseTensor(mask, rng.normal(size=mask.active).astype(np.float32)),
        "fc.bias": SparseTensor(full, rng.normal(size=8).astype(np.float32)),
        "steps": SparseTensor(Mask((), np.arange(1)), np.array([3], np.int64)),
    }
    specs = {
        "fc.weight": LayerSpec("fc.weight", (8, 40), "Linear", "sparse", True, "weight of Linear", 1.0),
        "fc.bias": LayerSpec("fc.bias", (8,), "Linear", "dense", False, "bias of Linear"),
        "steps": LayerSpec("steps", (), "BatchNorm2d", "buffer", False, "buffer of BatchNorm2d"),
    }
    node = Node("Gemm", ("x", "fc.weight", "fc.bias"), ("y",), {"transB": 1})
    graph = Graph((Value("x", (None, 40)),), (Value("y", (None, 8)),), (node,), {}, ("fc.weight", "fc.bias"), 18)
    return tensors, specs, graph, ModelConfig("module", "Net", 8, (40,))


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "net.dsr"
    write_archive(path, *model())
    return path


def rewrite(path, change, metadata=None):
    """The archive with its manifest changed and its checksum made to match again."""
    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["dsr_archive"])
    streams = load_file(path)
    manifest = json.loads(zlib.decompress(streams[":manifest"].tobytes()))
    change(manifest)
    packed = zlib.compress(json.dumps(manifest).encode())
    streams[":manifest"] = np.frombuffer(packed, np.uint8)
    header.update(manifest_sha256=hashlib.sha256(packed).hexdigest(), **(metadata or {}))
    save_file(streams, path, metadata={"dsr_archive": json.dumps(header)})


@pytest.mark.parametrize("encoding", ["auto", *CODECS])
def test_every_bit_comes_back(tmp_path, encoding):
    tensors, specs, graph, config = model()
    write_archive(tmp_path / "a.dsr", tensors, specs, graph, config, encoding=encoding)
    archive = open_archive(tmp_path / "a.dsr")
    assert list(archive.entries) == list(tensors)
    assert archive.config == config
    assert archive.graph.to_json() == graph.to_json()
    for name, tensor in archive:
        assert archive.entries[name].spec == specs[name]
        np.testing.assert_array_equal(tensor.mask.positions, tensors[name].mask.positions)
        assert tensor.values.tobytes() == tensors[name].values.tobytes()


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_archive(tmp_path / name, *model())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_stored_bytes_add_up_to_the_file(archive):
    opened = open_archive(archive)
    payload = sum(opened.entry_bytes(name) for name in opened.entries) + opened.document_bytes
    assert payload + opened.header_bytes == opened.nbytes == archive.stat().st_size


def test_an_existing_file_stays_without_force(archive):
    before = archive.read_bytes()
    with pytest.raises(FileError, match="exists already"):
        write_archive(archive, *model())
    assert archive.read_bytes() == before
    write_archive(archive, *model(), force=True)


def test_a_failed_write_leaves_nothing(tmp_path):
    tensors, specs, graph, config = model()
    with pytest.raises(UsageError, match="did you mean delta"):
        write_archive(tmp_path / "a.dsr", tensors, specs, graph, config, encoding="delt")
    with pytest.raises(UsageError, match=r"fc\.weight"):
        write_archive(tmp_path / "a.dsr", {"fc.bias": tensors["fc.bias"]}, specs, graph, config)
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_byte_is_noticed(archive, tmp_path):
    reference = {name: tensor.values.tobytes() for name, tensor in open_archive(archive)}
    raw, damaged = archive.read_bytes(), tmp_path / "damaged.dsr"
    for at in range(0, len(raw), 3):
        damaged.write_bytes(raw[:at] + bytes([raw[at] ^ 0x41]) + raw[at + 1 :])
        with pytest.raises(FormatError, match="damaged"):
            dict(open_archive(damaged))
    assert {name: tensor.values.tobytes() for name, tensor in open_archive(archive)} == reference


def test_every_truncation_is_noticed(archive, tmp_path):
    raw, cut = archive.read_bytes(), tmp_path / "cut.dsr"
    for length in range(0, len(raw), 7):
        cut.write_bytes(raw[:length])
        with pytest.raises(FormatError):
            open_archive(cut).check()


def test_a_newer_major_version_asks_for_a_newer_tool(archive):
    rewrite(archive, lambda manifest: None, {"version": "2.0"})
    with pytest.raises(FormatError, match="install a newer dsr-tool"):
        open_archive(archive)


def test_a_newer_minor_version_is_read(archive):
    def add(manifest):
        manifest.update(news="ignored")
        manifest["model"].update(news="ignored")
        for entry in manifest["tensors"]:
            entry.update(news="ignored")

    rewrite(archive, add, {"version": "1.7"})
    open_archive(archive).check()


@pytest.mark.parametrize("version", ["0.3", "-1.0", "x"])
def test_other_majors_are_refused(archive, version):
    rewrite(archive, lambda manifest: None, {"version": version})
    with pytest.raises(FormatError):
        open_archive(archive)


def test_a_claim_of_terabytes_is_refused_before_anything_is_made(archive):
    rewrite(archive, lambda manifest: manifest["tensors"][0].update(shape=[1 << 20, 1 << 19], active=0))
    with pytest.raises(FormatError, match="claims 2,7"):
        open_archive(archive)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["tensors"][0].update(active=10**6),
        lambda m: m["tensors"][0].update(active=-1),
        lambda m: m["tensors"][0].update(codec="pickle"),
        lambda m: m["tensors"][0].update(dtype="object"),
        lambda m: m["tensors"][0].update(shape=[-8, -40]),
        lambda m: m["tensors"][0].update(shape=[1 << 70, 0]),
        lambda m: m["tensors"][0].update(shape=[float("inf")]),
        lambda m: m["tensors"][0].update(macs_per_weight=float("nan")),
        lambda m: m["tensors"][0].update(macs_per_weight=-5),
        lambda m: m["tensors"][0].update(role="buffer", dtype="int64"),
        lambda m: m["model"].update(num_classes=float("inf")),
        lambda m: m["model"].update(num_classes=10**30),
        lambda m: m["tensors"][0].update(name="fc.other"),
        lambda m: m["tensors"][0].pop("crc32"),
        lambda m: m["tensors"].append(m["tensors"][0]),
        lambda m: m["tensors"].pop(),
        lambda m: m.update(tensors={}),
        lambda m: m.update(model=[]),
        lambda m: m["model"].update(architecture=["os.system"]),
        lambda m: m.pop("versions"),
    ],
)
def test_manifests_that_disagree_with_the_file_are_refused(archive, change):
    rewrite(archive, change)
    with pytest.raises(FormatError):
        open_archive(archive).check()


def test_files_of_another_kind_are_refused(tmp_path):
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


def test_a_tensor_name_that_would_hide_a_stream_is_refused(tmp_path):
    tensors, specs, graph, config = model()
    tensors["fc.weight:mask"] = tensors["fc.bias"]
    specs["fc.weight:mask"] = replace(specs["fc.bias"], name="fc.weight:mask")
    with pytest.raises(UsageError, match="fc.weight:mask"):
        write_archive(tmp_path / "a.dsr", tensors, specs, graph, config, encoding="bitmask")
