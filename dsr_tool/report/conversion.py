"""The result of a conversion as a document and as text: each parameter, sparse or dense, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from rich.table import Table

from converters.budgets import LEAST_BYTES, LEAST_MACS, Fitted
from dsr_tool.report.budget import ARCHIVE, BudgetCheck, BudgetDocument
from dsr_tool.report.tables import plain_table, render
from dsr_tool.sparse.discover import count
from dsr_tool.sparse.model import SparseModel

__all__ = ["ConversionDocument", "conversion_document", "conversion_text"]


class FittedBudget(BudgetDocument):
    """The check of a budget, with the sparsity of the prunable weights that meets it, in [0, 1)."""

    sparsity: float


class ConversionDocument(TypedDict):
    """A conversion as JSON, schema `dsr-tool/convert/1`.

    Attributes:
        schema: name and version of the schema.
        path: path of the model folder.
        model: the model's description, as in its `config.json`.
        parameters: number of all parameters.
        weights_by_type: number of weights of convolutions and linear layers, pruned or not.
        prunable_weights: number of weights that the masks cover.
        active_weights: number of active weights among them.
        sparsity_of_prunable_weights: fraction of zeros among the prunable weights.
        sparsity_of_whole_model: fraction of zeros among all parameters.
        budget: check of the budget; None for a budget given as a sparsity.
        archive_bytes: predicted size of the exported archive in bytes; None unless the budget is in bytes.
        notes: sentences on what the conversion decided by itself.
        warnings: sentences on what the user should look at.
        layers: each entry of the state_dict: its specification, `parameters` and `active` counts.
    """

    schema: str
    path: str
    model: dict[str, Any]
    parameters: int
    weights_by_type: int
    prunable_weights: int
    active_weights: int
    sparsity_of_prunable_weights: float
    sparsity_of_whole_model: float
    budget: FittedBudget | None
    archive_bytes: int | None
    notes: list[str]
    warnings: list[str]
    layers: list[dict[str, Any]]


def conversion_document(fitted: Fitted, path: Path) -> ConversionDocument:
    """Returns the conversion as plain values, schema `dsr-tool/convert/1`.

    Args:
        fitted: the converted model and its budget.
        path: the model folder that it was saved to.
    """
    model = fitted.model
    active = _active_counts(model)
    counts = count(model.specs)
    layers = [{**spec.to_dict(), "parameters": spec.size, "active": active[name]} for name, spec in model.specs.items()]
    return {
        "schema": "dsr-tool/convert/1",
        "path": str(path),
        "model": model.config.to_dict(),
        "parameters": counts["parameters"],
        "weights_by_type": counts["weights"],
        "prunable_weights": counts["prunable"],
        "active_weights": model.active_weights,
        "sparsity_of_prunable_weights": model.sparsity,
        "sparsity_of_whole_model": model.model_sparsity,
        "budget": _budget(fitted, counts["parameters"]),
        "archive_bytes": fitted.archive_bytes,
        "notes": list(fitted.notes),
        "warnings": list(fitted.warnings),
        "layers": layers,
    }


def conversion_text(document: ConversionDocument, *, short: bool = False) -> str:
    """Returns the document as text.

    Args:
        document: the result of `conversion_document`.
        short: omit the table, which lists weights one by one and all other parameters by reason.
    """
    closing = (
        f"{document['path']}: {document['model']['architecture']}{_width(document)} with "
        f"{document['active_weights']:,} of {document['prunable_weights']:,} prunable weights active "
        f"({document['weights_by_type'] - document['prunable_weights']:,} more weights are kept dense); zeros are "
        f"{document['sparsity_of_prunable_weights']:.4%} of the prunable weights and "
        f"{document['sparsity_of_whole_model']:.4%} of all {document['parameters']:,} parameters"
    )
    # Every share names its denominator: the whole model also has weights that are kept dense, biases and norms.
    if document["budget"]:
        closing += f"\n{document['budget']['line']}"
    if short:
        return closing
    return "\n".join([render(_layers(document)).rstrip("\n"), *document["notes"], closing])


def _budget(fitted: Fitted, parameters: int) -> FittedBudget | None:
    """Returns the check of the budget; None for a budget given as a sparsity, which is met exactly."""
    model, budget = fitted.model, fitted.budget
    if budget.kind == "sparsity":
        return None
    if budget.kind == "parameters":
        # The parameters outside of the prunable weights are all active.
        active = parameters - model.prunable_weights + model.active_weights
        check, close = BudgetCheck(budget, active, "active in the whole model"), 1.0
    elif budget.kind == "bytes":
        check, close = BudgetCheck(budget, fitted.archive_bytes or 0, ARCHIVE), LEAST_BYTES
    else:
        check, close = BudgetCheck(budget, _macs(model), "with active weights, for one input"), LEAST_MACS
    # The smallest change is one channel or one weight, so not every budget can be used up.
    step = "channel" if model.config.width < 1 else "weight"
    note = "" if check.fraction >= close else f"; one more {step} would exceed it, so this is as close as it gets"
    return {**check.to_dict(), "sparsity": model.sparsity, "line": f"{check.line}{note}"}


def _width(document: ConversionDocument) -> str:
    """Returns the width of the network relative to the usual one, in words; empty for the usual one."""
    width = document["model"]["width"]
    return "" if width == 1 else f", {width:g} times as wide,"


def _macs(model: SparseModel) -> int:
    """Returns the multiply-adds of the active weights for one input."""
    active = _active_counts(model)
    return sum(round(active[name] * spec.macs_per_weight) for name, spec in model.specs.items())


def _active_counts(model: SparseModel) -> dict[str, int]:
    """Returns the number of active entries of each parameter; one without a mask is active as a whole."""
    masked = model.counts
    return {name: masked.get(name, spec.size) for name, spec in model.specs.items()}


def _layers(document: ConversionDocument) -> Table:
    """Returns the table of the layers: each weight, then all other parameters by reason."""
    table = plain_table("weight", "role", "active", "of", "why", numbers=("active", "of"))
    for layer in document["layers"]:
        if layer["weight"]:
            counts = (f"{layer['active']:,}", f"{layer['parameters']:,}")
            table.add_row(layer["name"], layer["role"], *counts, layer["reason"])
    # Biases, norms and buffers are listed by reason: one by one they would be most of the table.
    others: dict[str, list[int]] = {}
    for layer in document["layers"]:
        if layer["role"] == "dense" and not layer["weight"]:
            others.setdefault(layer["reason"], []).append(layer["parameters"])
    for reason, sizes in others.items():
        table.add_row(f"{len(sizes)} more", "dense", f"{sum(sizes):,}", f"{sum(sizes):,}", reason)
    return table
