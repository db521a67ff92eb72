"""The checkpoint of a run: in compact storage, the optimizer's state has the length of the active weights."""

import torch

from dsr_tool.sparse.compact.marks import VALUES
from dsr_tool.train import RunFolder, train
from dsr_tool.train.checkpoint import CHECKPOINT, read_state


def _tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [tensor for child in children for tensor in _tensors(child)]


def test_a_compact_run_saves_no_dense_state(tiny, tmp_path):
    bytes_of = {}
    for storage in ("masked", "compact"):
        model, folder = tiny.model(0.9), tmp_path / storage
        with RunFolder(folder) as run:
            run.facts = {"data": "fake:200"}
            train(model, tiny.data(), tiny.settings(epochs=1, batch_size=16, storage=storage), [run])
        state = read_state(folder / CHECKPOINT)["training"]
        bytes_of[storage] = sum(tensor.nbytes for tensor in _tensors(state))
        assert (VALUES in state["trained"]) == (storage == "compact")
    saved = bytes_of["masked"] - bytes_of["compact"]
    # Momentum of every inactive weight, 4 bytes each, is all that is missing.
    assert saved == 4 * (model.prunable_weights - model.active_weights)
