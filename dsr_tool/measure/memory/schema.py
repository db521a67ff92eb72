"""The keys of the memory document, as `dsr-tool report --memory --json` prints them."""

from __future__ import annotations

from typing import TypedDict

__all__ = ["Activations", "Comparison", "MemoryDocument", "MethodMemory", "RuntimeRow", "TrainingStep"]


class Comparison(TypedDict):
    """A computed figure beside the measured one; None where it was not computed or not measured.

    Attributes:
        computed_bytes: largest sum of everything that is alive at once.
        measured_bytes: peak of resident memory of a child process while it runs or trains.
        difference: computed / measured - 1.
        load_peak_bytes: peak of resident memory of the child while it loads the model.
    """

    computed_bytes: int | None
    measured_bytes: int | None
    difference: float | None
    load_peak_bytes: int | None


class RuntimeRow(Comparison):
    """The memory of one runtime, at the moment when it is largest.

    Attributes:
        runtime: its name, with the instruction set of its kernels.
        weights_bytes: bytes that stay from run to run.
        activations_bytes: bytes of the input, of values alive at that moment, and of scratch.
        moment: the operator that runs at that moment; None if values lie in an arena.
    """

    runtime: str
    weights_bytes: int | None
    activations_bytes: int | None
    moment: str | None


class Activations(TypedDict):
    """The activations that are alive at once; the `fused` keys belong to the schema and are always None."""

    in_order_bytes: int
    in_order_moment: str
    fused_bytes: int | None
    fused_moment: str | None


class MethodMemory(TypedDict):
    """The memory that a training method holds besides the ledger."""

    name: str
    bytes: int


class TrainingStep(Comparison):
    """The memory of a training step.

    Attributes:
        optimizer: name of the optimizer.
        held_bytes: bytes in full by kind, such as `gradients` and `optimizer state`; `masks` in masked storage,
            `positions` and `plans` of kernels in compact storage.
        at_peak_bytes: bytes by kind at the moment when their sum is largest.
        moment: the operator that runs at that moment.
        optimizer_state_bytes: bytes of state for each optimizer that could be chosen.
        method: bytes that the method of a run holds besides; None if there are none.
    """

    optimizer: str
    held_bytes: dict[str, int]
    at_peak_bytes: dict[str, int]
    moment: str
    optimizer_state_bytes: dict[str, int]
    method: MethodMemory | None


class MemoryDocument(TypedDict):
    """The memory of a model, as `dsr-tool report --memory --json` prints it.

    Attributes:
        batch: inputs at once.
        input_shape: shape of one input.
        activations: activations alive at once, operator by operator.
        inference: memory of running by runtime.
        training: memory of a training step in masked storage; None for a file.
        training_note: why there is none for a folder; None if there is.
        training_compact: the same in compact storage.
        training_compact_note: why there is none for a folder; None if there is.
        measurement_note: why figures were not measured; None if they were.
    """

    batch: int
    input_shape: list[int]
    activations: Activations
    inference: list[RuntimeRow]
    training: TrainingStep | None
    training_note: str | None
    training_compact: TrainingStep | None
    training_compact_note: str | None
    measurement_note: str | None
