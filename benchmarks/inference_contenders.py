"""The contenders of the inference benchmark: the sparse runtime, ONNX Runtime and other runtimes on one model."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from converters.loading import load
from dsr_tool.measure.latency import open_session
from dsr_tool.sparsity.tensor import Array
from exporters.onnx.session import OnnxSession

__all__ = ["Run", "contenders"]

Run = Callable[[Array], Array | None]
"""Runs a model on one batch; None from a contender that keeps its output in a process of its own."""


def contenders(
    archive: Path, dense: Path, batch: int, threads: int, others: Sequence[str], deepsparse_python: str
) -> Iterator[tuple[str, Run]]:
    """Yields the contenders by name; one that cannot run the model is reported and skipped.

    Args:
        archive: the sparse model.
        dense: the same model as an ONNX file of plain initializers.
        batch: inputs at once.
        threads: number of worker threads of each contender.
        others: names of contenders besides the sparse runtime and ONNX Runtime.
        deepsparse_python: interpreter of an environment with DeepSparse.
    """
    makers: dict[str, Callable[[], Run]] = {
        "sparse": lambda: open_session(archive, "sparse", batch, threads).run,
        "onnxruntime": lambda: OnnxSession(dense, threads=threads, spinning=False).run,
        "scipy": lambda: open_session(archive, "scipy", batch, threads).run,
        "openvino": lambda: openvino(dense, batch, threads),
        "torch": lambda: pytorch(archive, threads),
        "deepsparse": lambda: deepsparse(archive, batch, threads, deepsparse_python),
    }
    # The two that every ratio needs come first.
    for name in ("sparse", "onnxruntime", *others):
        try:
            yield name, makers[name]()
        except RuntimeError as error:
            print(f"  {name} is skipped: {str(error).splitlines()[0]}")


def openvino(dense: Path, batch: int, threads: int) -> Run:
    """Loads the dense model into OpenVINO, in fp32."""
    import openvino as ov

    model = ov.Core().read_model(dense)
    model.reshape([batch, *(n.get_length() for n in list(model.input(0).partial_shape)[1:])])
    # Without the last option OpenVINO computes in bfloat16 where the processor can, which would not be the same work.
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(model, "CPU", options)
    return lambda x: compiled(x)[0]


def pytorch(archive: Path, threads: int) -> Run:
    """Loads the dense model into PyTorch, without compilation."""
    import torch

    torch.set_num_threads(threads)
    module = load(archive).module.eval()

    def run(x: Array) -> Array:
        with torch.inference_mode():
            output: Array = module(torch.from_numpy(x)).numpy()
        return output

    return run


def deepsparse(archive: Path, batch: int, threads: int, python: str) -> Run:
    """Loads the model into DeepSparse, which finds the zeros; a run is a line to its process and a line back."""
    import torch

    model = archive.with_suffix(".opset13.onnx")
    if not model.exists():
        # The newest operator set of which DeepSparse compiles every operator.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                load(archive).module.eval(), (torch.zeros(1, 3, 224, 224),), model, opset_version=13, dynamo=False,
                input_names=["x"], dynamic_axes={"x": {0: "batch"}},
            )  # fmt: skip
    command = [python, str(Path(__file__).with_name("deepsparse_worker.py")), str(model), str(batch), str(threads)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    requests, replies = child.stdin, child.stdout
    # Lines that DeepSparse may print before the worker's `ready` are skipped; without that line the child has ended.
    if requests is None or replies is None or not any(line == "ready\n" for line in replies):
        raise RuntimeError(f"{python} ended with exit code {child.wait()}.")

    def run(x: Array) -> None:  # noqa: ARG001 - the worker has drawn the same input
        requests.write("\n")
        requests.flush()
        if replies.readline() != "done\n":
            raise RuntimeError(f"{python} ended with exit code {child.wait()}.")

    return run
