import pytest
import torch

FAMILY = """
schema = "dsr-tool/recipes/1"
title = "small"
data = "digits"
sparsities = [0.9]
[model]
arch = "lenet-300-100"
sparsity = "@sparsity"
[train]
epochs = 2
batch_size = 100
device = "cpu"
[methods.dsr]
train = { every = 1 }
options = { target = 200 }
accuracy = { "0.9" = [97.5, 0.5, 3] }
[methods.static]
[methods.dense]
model = { sparsity = 0.0 }
[methods.gmp]
model = { from = "dense", sparsity = 0.0 }
options = { final_sparsity = "@sparsity" }
[methods.ticket]
model = { structure = "dsr", init = "original" }
train = { method = "static" }
[methods.fresh]
model = { structure = "dsr", init = "fresh" }
train = { method = "static" }
[methods.broken]
model = { keep_dense = ["no such layer"] }
train = { method = "static" }
[methods.afterwards]
model = { from = "broken", sparsity = 0.0 }
options = { final_sparsity = "@sparsity" }
train = { method = "gmp" }
"""


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def family(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(FAMILY)
    return str(path)


@pytest.fixture
def tables(family):
    """A grid as a file would hold it, with changes."""

    def make(**changes):
        plain = {"recipe": family, "data": "fake:300", "methods": ["dsr", "static"], "sparsity": [0.9], "seeds": 1}
        return {key: value for key, value in {**plain, **changes}.items() if value is not None}

    return make
