"""ONNX files of one operator that holds a plan, so that ONNX Runtime runs a model on our kernels."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from dsr_tool.errors import FormatError
from dsr_tool.runtime.deploy.plan import PlanFile, PlanValue
from dsr_tool.runtime.deploy.session import in_batches
from exporters.base import ExportOptions
from exporters.checked import CheckedModel
from exporters.onnx.load import load
from exporters.onnx.native_node import DOMAIN, NATIVE, OPERATOR
from exporters.onnx.session import OnnxSession
from exporters.onnx.write import METADATA, refuse_too_large
from exporters.plan import plan_content, verify_plan
from exporters.verify.result import Verification

__all__ = ["native_onnx", "plan_of", "verify_native", "wrapped"]

_IR_VERSION, _OPSET = 10, 20
"""Versions of the file format and of the standard's operators; ONNX Runtime 1.20 reads both."""
_PLAN = "dsr_tool/plan"
"""Name of the initializer with the plan; no input of a model is called so."""


def native_onnx(checked: CheckedModel, options: ExportOptions) -> ModelProto:
    """Builds an ONNX model of one operator.

    Args:
        checked: the model.
        options: values, compaction, batch and levels.

    Raises:
        FormatError: this processor runs no level of the plan.
        UsageError: what no plan can hold (`exporters.plan.PlanFiles.encode`), or a plan of more than 2 GB.
    """
    return wrapped(plan_content(checked, options), checked.model.config.architecture)


def wrapped(plan: bytes, architecture: str) -> ModelProto:
    """Returns an ONNX model of one operator that holds a plan.

    Args:
        plan: the bytes of a plan file.
        architecture: name of the model.

    Raises:
        FormatError: this processor runs no level of the plan.
        UsageError: the plan is too large for one ONNX file.
    """
    refuse_too_large(len(plan))
    opened = PlanFile(plan)
    inputs, outputs = ([_value(one) for one in values] for values in (opened.inputs, opened.outputs))
    names = [value.name for value in inputs]
    node = helper.make_node(OPERATOR, [_PLAN, *names], [value.name for value in outputs], architecture, domain=DOMAIN)
    # An initializer and no attribute, since ONNX Runtime hands out its bytes without a copy.
    stored = numpy_helper.from_array(np.frombuffer(plan, np.uint8), _PLAN)
    model = helper.make_model(
        helper.make_graph([node], "model", inputs, outputs, [stored]),
        opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=_IR_VERSION,
        producer_name="dsr-tool",
        producer_version=version("dsr-tool"),
        doc_string=f"{architecture} as one operator. Register the library dsr_tool.ort_library() to run it.",
    )
    record = {
        "schema": "dsr-tool/onnx/1",
        "architecture": architecture,
        "sparse_weights": [],
        "encoding": NATIVE,
    }
    helper.set_model_props(model, {METADATA: json.dumps(record, separators=(",", ":"))})
    return model


def _value(value: PlanValue) -> ValueInfoProto:
    return helper.make_tensor_value_info(value.name, TensorProto.FLOAT, value.shape)


def plan_of(path: Path) -> bytes:
    """Returns the plan in an ONNX file.

    Raises:
        FileError: there is no such file.
        FormatError: it is damaged, or has no initializer with a plan.
    """
    model, _ = load(path)
    stored = next((tensor for tensor in model.graph.initializer if tensor.name == _PLAN), None)
    if stored is None or stored.data_type != TensorProto.UINT8:
        raise FormatError(f"{str(path)!r} has the operator {OPERATOR} and no plan for it; the file is damaged.")
    return numpy_helper.to_array(stored).tobytes()


def verify_native(path: Path, checked: CheckedModel, *, samples: int, seed: int) -> Verification:
    """Compares the outputs of ONNX Runtime, with our operator registered, with those of the model.

    Args:
        path: the file.
        checked: the model.
        samples: size of the second batch of inputs; the first has one.
        seed: seed of the inputs.

    Raises:
        FormatError: the file is damaged, or this processor runs no level of its plan.
        UsageError: weights were rounded by pictures, which the file does not show.
    """
    # One thread, since runs on small batches would not gain by more.
    session, plan = OnnxSession(path, threads=1), PlanFile(plan_of(path))
    runs = {f"onnxruntime, {plan.text('level')} kernels": in_batches(session.run_all, plan.inputs[0].shape[0])}
    return verify_plan(path, "onnx", plan, runs, checked, samples=samples, seed=seed)
