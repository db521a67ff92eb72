"""CSR files: scipy and numpy read them, and invalid ones are refused before scipy gets them."""

import json
import math

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.formats.csr_file import load_csr, write_csr
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec, matrix_shape
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

CONFIG = ModelConfig("module", "Net", 3, (4,))


def spec_of(name, shape, role="sparse"):
    return LayerSpec(name, shape, "Linear", role, role == "sparse", "test")


def sparse(shape, density, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    mask = Mask.from_bool(rng.random(shape) < density)
    return SparseTensor(mask, rng.normal(size=mask.active).astype(dtype))


def dense(array):
    return SparseTensor.from_dense(array, Mask.full(array.shape))


def write(path, weights, rest=None):
    tensors = {**weights, **{name: dense(array) for name, array in (rest or {}).items()}}
    specs = {
        name: spec_of(name, t.mask.shape, "sparse" if name in weights else "buffer") for name, t in tensors.items()
    }
    write_csr(path, tensors, specs, CONFIG)
    return path


@pytest.fixture
def small(tmp_path):
    """Returns a file with a bias and a 4 x 6 weight whose rows have 2, 0, 3 and 1 active entries."""
    mask = Mask((4, 6), np.array([1, 4, 12, 14, 17, 23]))
    weights = {"fc.weight": SparseTensor(mask, np.arange(1, 7, dtype=np.float32))}
    return write(tmp_path / "small.npz", weights, {"fc.bias": np.ones(4, np.float32)})


def resave(path, change):
    """Lets `change` edit the arrays and the description of a file, and writes it again with numpy."""
    with np.load(path) as file:
        arrays = dict(file)
    document = json.loads(arrays.pop(":description").tobytes())
    change(arrays, document)
    text = np.frombuffer(json.dumps(document).encode(), np.uint8)
    np.savez(path, **{":description": text, **arrays})


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    dtype=st.sampled_from([np.float32, np.float64, np.float16]),
    seed=st.integers(0, 1000),
)
def test_scipy_sees_the_same_matrices(tmp_path_factory, shapes, density, dtype, seed):
    weights = {f"{i}.weight": sparse(shape, density, seed + i, dtype) for i, shape in enumerate(shapes)}
    path = write(tmp_path_factory.mktemp("csr") / "m.npz", weights, {"mean": np.float32([1, 2]), "n": np.array(7)})
    file = load_csr(path)
    assert list(file) == [*weights, "mean", "n"] and file["n"].shape == () and file["n"] == 7
    for name, tensor in weights.items():
        array = tensor.to_dense().reshape(matrix_shape(tensor.mask.shape))
        wide = np.float32 if dtype == np.float16 else dtype
        expected = scipy.sparse.csr_matrix(array.astype(wide))
        found = file[name]
        assert found.indices.dtype == found.indptr.dtype == np.int32 and found.dtype == wide
        assert found.shape == expected.shape and (found != expected).nnz == 0
        x = np.random.default_rng(seed).normal(size=array.shape[1]).astype(wide)
        np.testing.assert_array_equal(found @ x, expected @ x)
        back = file.tensor(name)
        assert back.mask.equals(tensor.mask) and back.values.tobytes() == tensor.values.tobytes()


def test_numpy_and_scipy_alone_are_enough(small):
    with np.load(small, allow_pickle=False) as file:
        parts = [file[f"fc.weight:{part}"] for part in ("data", "indices", "indptr")]
        weight = scipy.sparse.csr_matrix(tuple(parts), shape=file["fc.weight:shape"])
        y = weight @ np.ones(6, np.float32) + file["fc.bias"]
        document = json.loads(file[":description"].tobytes())
    assert y.tolist() == [4, 1, 13, 7]
    assert document["schema"] == "dsr-tool/csr/1" and document["model"]["architecture"] == "Net"
    np.testing.assert_array_equal(load_csr(small)["fc.weight"].toarray(), weight.toarray())


def test_active_zeros_are_kept(tmp_path):
    tensor = SparseTensor(Mask((2, 3), np.array([0, 4])), np.float32([0.0, -0.0]))
    file = load_csr(write(tmp_path / "m.npz", {"w": tensor}))
    assert file["w"].nnz == 2 and file.tensor("w").values.tobytes() == tensor.values.tobytes()


def test_equal_models_make_equal_bytes_and_every_byte_is_accounted_for(tmp_path):
    weights = {"a": sparse((20, 3, 3, 3), 0.2, 0), "b": sparse((7,), 0.5, 1)}
    one, two = (write(tmp_path / name, weights, {"c": np.zeros(5)}) for name in ("one.npz", "two.npz"))
    assert one.read_bytes() == two.read_bytes()
    file = load_csr(one)
    parts = sum(map(file.entry_bytes, file)) + file.description_bytes + file.container_bytes
    assert parts == file.nbytes == one.stat().st_size


def test_a_file_saved_again_by_numpy_is_read(small):
    resave(small, lambda arrays, document: None)
    assert load_csr(small)["fc.weight"].nnz == 6


def put(name, values, dtype=np.int32):
    def change(arrays, _document):
        arrays[name] = np.array(values, dtype)

    return change


def entry(index, **fields):
    def change(_arrays, document):
        document["tensors"][index].update(fields)

    return change


MATRICES = {
    "column past the end": put("fc.weight:indices", [1, 4, 0, 2, 6, 5]),
    "negative column": put("fc.weight:indices", [-1, 4, 0, 2, 5, 5]),
    "columns out of order": put("fc.weight:indices", [4, 1, 0, 2, 5, 5]),
    "a column twice": put("fc.weight:indices", [1, 1, 0, 2, 5, 5]),
    "falling row pointers": put("fc.weight:indptr", [0, 3, 2, 5, 6]),
    "row pointers that wrap around": put("fc.weight:indptr", [0, 2**31 - 1, -(2**31), 5, 6]),
    "row pointers that start late": put("fc.weight:indptr", [1, 2, 2, 5, 6]),
    "row pointers that end early": put("fc.weight:indptr", [0, 2, 2, 5, 5]),
    "row pointers that end late": put("fc.weight:indptr", [0, 2, 2, 5, 7]),
    "a row less": put("fc.weight:indptr", [0, 2, 2, 6]),
    "a value less": put("fc.weight:data", [1, 2, 3, 4, 5], np.float32),
    "a column less": put("fc.weight:indices", [1, 4, 0, 2, 5]),
    "another matrix": put("fc.weight:shape", [6, 4], np.int64),
    "int64 columns": put("fc.weight:indices", [1, 4, 0, 2, 5, 5], np.int64),
    "float64 values": put("fc.weight:data", range(6), np.float64),
    "big-endian values": put("fc.weight:data", range(6), ">f4"),
    "a bias of another shape": put("fc.bias", [1, 2], np.float32),
    "a bias in two dimensions": put("fc.bias", [[1, 2], [3, 4]], np.float32),
    "a pickled bias": put("fc.bias", [1, "a", None, 2], object),
    "an array too many": put("fc.more", [1]),
    "no bias": lambda arrays, _: arrays.pop("fc.bias"),
    "no columns": lambda arrays, _: arrays.pop("fc.weight:indices"),
}
DOCUMENTS = {
    "a weight twice": lambda _, document: document["tensors"].append(document["tensors"][0]),
    "a weight ten thousand times": lambda _, document: document.update(tensors=document["tensors"] * 5_000),
    "no model": lambda _, document: document.pop("model"),
    "no list": lambda _, document: document.update(tensors=7),
    "a shape that overflows": entry(0, shape=[2**40, 2**40]),
    "a shape of terabytes": entry(0, shape=[2**12, 2**27]),
    "a dense shape of terabytes": entry(1, shape=[2**39], active=2**39),
    "an empty shape that overflows": entry(1, shape=[0, 2**39, 2**39, 2**39], active=0),
    "a negative shape": entry(0, shape=[-4, -6]),
    "too many columns for int32": entry(0, shape=[1, 2**31]),
    "a negative count": entry(0, active=-1),
    "a count that is none": entry(0, active=True),
    "a count above the size": entry(0, active=25),
    "a type of objects": entry(1, dtype="object"),
    "a sparse weight as dense": entry(0, codec="dense"),
    "a dense array as CSR": entry(1, codec="csr"),
    "a role that nobody knows": entry(1, role="code"),
    "a path as a name": entry(1, name="../../etc/passwd"),
    "the name of the description": entry(1, name=":description"),
}


@pytest.mark.parametrize("change", [*MATRICES.values(), *DOCUMENTS.values()], ids=[*MATRICES, *DOCUMENTS])
def test_arrays_that_disagree_with_the_description_are_refused(small, change):
    resave(small, change)
    with pytest.raises(FormatError, match="small.npz"):
        load_csr(small)


def test_row_pointers_without_columns_are_checked_too(tmp_path):
    # scipy looks at nothing where the last row pointer is 0.
    path = write(
        tmp_path / "small.npz", {"w": SparseTensor(Mask((2, 3), np.empty(0, np.int64)), np.empty(0, np.float32))}
    )
    assert load_csr(path)["w"].nnz == 0
    resave(path, put("w:indptr", [0, 2**20, 0]))
    with pytest.raises(FormatError, match="row pointers"):
        load_csr(path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff", b"[" * 20000, b'{"schema": "dsr-tool/csr/2"}', b'{"a":1,"a":1}']
)
def test_malformed_descriptions_are_refused(tmp_path, text):
    np.savez(tmp_path / "m.npz", **{":description": np.frombuffer(text, np.uint8)})
    with pytest.raises(FormatError, match="m.npz"):
        load_csr(tmp_path / "m.npz")


def test_other_npz_files_are_distinguished_from_damaged_ones(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.zeros(3))
    scipy.sparse.save_npz(tmp_path / "matrix.npz", scipy.sparse.eye(3, format="csr"))
    for name in ("data.npz", "matrix.npz"):
        with pytest.raises(FormatError, match="not one that dsr-tool exports"):
            load_csr(tmp_path / name)
    with pytest.raises(FileError, match="does not exist"):
        load_csr(tmp_path / "none.npz")


def test_a_file_that_claims_too_much_is_refused(small):
    with pytest.raises(FormatError, match="raise max_decoded_bytes"):
        load_csr(small, max_decoded_bytes=100)


@pytest.mark.parametrize("name", ["a/b", "a\\b", ":description", "w:data"])
def test_names_that_collide_in_a_npz_file_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match="rename the module"):
        write(tmp_path / "m.npz", {"w": sparse((3, 4), 0.5, 0)}, {name: np.zeros(3)})


@settings(max_examples=300, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_is_detected_or_harmless(tmp_path_factory, at, flip):
    folder = tmp_path_factory.getbasetemp() / "flips"
    folder.mkdir(exist_ok=True)
    path = folder / "m.npz"
    weights = {"w": sparse((6, 5), 0.4, 0)}
    raw = bytearray(write(path, weights, {"b": np.arange(3.0)}).read_bytes())
    raw[math.floor(at * len(raw))] ^= flip
    path.write_bytes(raw)
    try:
        file = load_csr(path)
    except FormatError:
        return
    assert file.tensor("w").to_dense().tobytes() == weights["w"].to_dense().tobytes()
    assert file["b"].tolist() == [0, 1, 2]
