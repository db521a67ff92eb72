"""Plan files (.dsrplan): what the kernels run, for programs without Python (`dsr.h`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dsr_tool.errors import UsageError
from dsr_tool.graph.compact.rewrite import fold_and_compact
from dsr_tool.runtime.deploy.format import MAGIC
from dsr_tool.runtime.source import ModelInMemory
from exporters.base import Container, Draft, ExportOptions, Head
from exporters.values import EXACT, GRID_BITS

if TYPE_CHECKING:
    from dsr_tool.runtime.deploy.plan import PlanFile
    from dsr_tool.sparsity.tensor import SparseTensor
    from exporters.checked import CheckedModel
    from exporters.verify.outputs import Run
    from exporters.verify.result import Verification

__all__ = ["PlanFiles", "plan_content", "verify_plan"]

_VALUES = "values"
"""Name of the text that says how the weights of a plan are rounded; `ROUNDED_BY_PICTURES` if pictures decided it."""
_ROUNDED_BY_PICTURES = "calibrated"


class PlanFiles(Container):
    """The container of plans. It holds a program and no graph, so nothing but the library for C programs runs it."""

    name = "plan"
    endings = (".dsrplan",)
    encodings = ("auto",)
    # Kernels take floats and codes, so float16 would be as large as float32.
    values = ("fp32", *GRID_BITS)
    compacts = True
    compiles = True
    preprocesses = True
    holds = "a program for the kernels"

    def recognises(self, head: Head) -> bool:
        """Looks for the first bytes of a plan file."""
        return head.start.startswith(MAGIC)

    def encode(self, checked: CheckedModel, options: ExportOptions) -> Draft:
        """Compiles the model for each level.

        Raises:
            UsageError: an operator that no kernel computes, a level that the library does not hold, a weight that
                float16 or a grid cannot hold, or a machine without kernels.
        """
        return Draft(partial(_write, plan_content(checked, options)))

    def verify(self, path: Path, checked: CheckedModel, *, samples: int, seed: int) -> Verification:
        """Compares the outputs of the library with those of the model, rounded as the plan is.

        Weights are folded into the plan, so they are compared by what they compute.
        """
        from dsr_tool.runtime.deploy.plan import PlanFile
        from dsr_tool.runtime.deploy.session import in_batches

        plan = PlanFile(path)
        runs = {f"kernels ({plan.text('level')})": in_batches(plan.run, plan.inputs[0].shape[0])}
        return verify_plan(path, self.name, plan, runs, checked, samples=samples, seed=seed)


def plan_content(checked: CheckedModel, options: ExportOptions) -> bytes:
    """Compiles a model for each level; see `PlanFiles.encode`."""
    from dsr_tool.runtime.deploy.writer import chosen_levels, plan_bytes

    levels = chosen_levels(options.levels)
    model = checked.model
    graph, tensors = checked.graph, checked.stored(model.tensors(), model.specs)
    if options.compact:
        if options.values not in EXACT:
            raise UsageError(
                f"--compact does not go with --values {options.values!r} in a plan; leave one of them out."
            )
        _, small = fold_and_compact(graph, tensors)
        graph, tensors = small.graph, dict(small.tensors)
    source = ModelInMemory(Path(model.config.architecture), model.config, graph, tensors)
    values = _ROUNDED_BY_PICTURES if checked.rounded else options.values
    return plan_bytes(source, options.batch, levels, {_VALUES: values})


def verify_plan(
    path: Path, kind: str, plan: PlanFile, runs: Mapping[str, Run], checked: CheckedModel, *, samples: int, seed: int
) -> Verification:
    """Compares the outputs of a plan with those of the model, rounded as the plan is.

    Args:
        path: the file with the plan.
        kind: name of its container.
        plan: the plan.
        runs: the plan as some runtimes run it on any number of inputs.
        checked: the model.
        samples: size of the second batch of inputs; the first has one.
        seed: seed of the inputs.
    """
    from dsr_tool.graph.ir import Value
    from dsr_tool.sparse.feeding import graph_form
    from exporters.verify.compare import compare_outputs
    from exporters.verify.rounding import how_rounded, rounded_model, zeros_note

    model, notes = checked.model, ("weights are part of the plan, so they were compared by the outputs alone",)
    tensors = _rounded(path, plan, checked)
    how = how_rounded(tensors, model.specs)
    rounded = rounded_model(model, tensors) if how else model
    value = plan.inputs[0]
    return compare_outputs(
        path,
        kind,
        rounded.module,
        runs=runs,
        value=Value(value.name, (None, *value.shape[1:]), "float32"),
        samples=samples,
        seed=seed,
        differing=None,
        notes=(*notes, *(zeros_note(model, rounded) if how else ())),
        exact=model.module if how else None,
        how=how,
        form=graph_form,
    )


def _rounded(path: Path, plan: PlanFile, checked: CheckedModel) -> dict[str, SparseTensor]:
    """Returns the tensors of the model as the plan has them.

    Raises:
        UsageError: they were rounded by pictures, which only the export itself knows.
    """
    from exporters.values import stored_as

    model = checked.model
    if checked.values is not None:
        return checked.stored(model.tensors(), model.specs)
    values = plan.text(_VALUES) or EXACT[0]
    if values == _ROUNDED_BY_PICTURES:
        raise UsageError(
            f"{str(path)!r} has weights that were rounded by pictures, which its model does not know; it was verified "
            f"when it was exported, and an archive of the same weights can be verified again."
        )
    return stored_as(model.tensors(), model.specs, values)


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)
