"""The writer of safetensors files writes the bytes of the package, and holds one array at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dsr_tool.formats.tensor_writer import Planned, write_arrays
from dsr_tool.sparse.contract import DTYPES
from dsr_tool.sparse.folder import _planned

KINDS = {
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    "bool": "BOOL",
    "complex64": "C64",
}
NAMES = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=8).filter(
    lambda n: n != "__metadata__"
)
ARRAYS = st.tuples(st.sampled_from(sorted(KINDS)), st.lists(st.integers(0, 4), max_size=3))


@given(st.dictionaries(NAMES, ARRAYS, max_size=6), st.integers(0, 2**32 - 1))
def test_bytes_are_those_of_the_package(tmp_path_factory, named, seed):
    rng = np.random.default_rng(seed)
    arrays = {
        name: np.asarray(np.asarray(rng.random(shape) * 100).astype(kind)) for name, (kind, shape) in named.items()
    }
    folder = tmp_path_factory.mktemp("files")
    save_file(arrays, folder / "theirs")
    planned = [Planned(name, KINDS[str(a.dtype)], a.shape, lambda a=a: a) for name, a in arrays.items()]
    write_arrays(folder / "ours", planned)
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


def test_every_type_of_torch_is_written_as_the_package_does(tmp_path):
    from safetensors.torch import save_file as save_torch

    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    save_torch(tensors, tmp_path / "theirs")
    write_arrays(tmp_path / "ours", [_planned(name, t, lambda t=t: t) for name, t in tensors.items()])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_an_array_of_another_length_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'a' has 12 bytes, expected 16"):
        write_arrays(tmp_path / "file", [Planned("a", "F32", (4,), lambda: np.zeros(3, np.float32))])
