"""Parameter groups by layer that leave out the sparse weights, because those are one parameter of the root module."""

from __future__ import annotations

from torch import optim

from dsr_tool.errors import UsageError
from dsr_tool.sparse.compact.marks import LAYERS, VALUES
from dsr_tool.sparse.model import SparseModel

__all__ = ["refuse_groups_by_layer"]


def refuse_groups_by_layer(model: SparseModel, optimizer: optim.Optimizer) -> None:
    """Refuses groups that separate biases of sparse layers from others, while all sparse weights are in one group.

    Groups by kind are allowed: biases and norms without weight decay, for example.

    Raises:
        UsageError: the groups are by layer, but were not made from `model.named_parameters()`.
    """
    settings = {
        id(parameter): str({key: value for key, value in group.items() if key != "params"})
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    flat = settings.get(id(model.module._parameters.get(VALUES)))
    if flat is None:
        return
    found: dict[str, dict[str, str]] = {}
    for path, owner in model.module.named_modules():
        for attribute, parameter in owner._parameters.items():
            own = settings.get(id(parameter))
            if attribute != VALUES and own is not None and (own == flat or owner.__dict__.get(LAYERS)):
                found.setdefault(attribute, {})[own] = f"{path}.{attribute}" if path else attribute
    for names in found.values():
        if len(names) > 1:
            one, other = list(names.values())[:2]
            raise UsageError(
                f"the optimizer has other settings for {one!r} than for {other!r}, and {VALUES!r} has the sparse "
                f"weights of all layers; make its groups from model.named_parameters(), or load the model with "
                f"storage='masked'."
            )
