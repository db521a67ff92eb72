import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsr_tool.formats.footprint import footprint
from dsr_tool.graph.compact.record import COMPACTED, Savings
from dsr_tool.report.page.page import page_html
from dsr_tool.report.sources import Source, StoredBytes, read
from dsr_tool.report.tables import report_document
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

HOSTILE = "<script>alert(1)</script>\"'&\x00\ud800"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    from converters.conversion import convert

    path = tmp_path_factory.mktemp("page") / "net"
    convert("squeezenet1_1", sparsity=0.9, num_classes=5, input_size=64).save(path)
    return path


@pytest.fixture(scope="session")
def run_folder(model_folder):
    """Returns the model with the log of a run of 200 epochs, in which one loss was not finite."""
    path = model_folder.with_name("run")
    shutil.copytree(model_folder, path)
    names = [layer.spec.name for layer in read(path).footprint.layers if layer.spec.role == "sparse"]
    settings = {"method": "dsr", "epochs": 200, "lr": 0.1}
    lines = [{"kind": "start", "model": "squeezenet1_1", "data": "digits", "settings": settings, "total_steps": 2000}]
    for epoch in range(1, 201):
        moved = dict.fromkeys(names, 1000 - 5 * epoch)
        lines += [{"kind": "reallocation", "step": 10 * epoch - 5, "dropped": moved, "grown": moved, "threshold": 1e-3}]
        lines += [_epoch(epoch, names, moved)]
    lines += [{"kind": "end", "status": "complete", "epochs": 200, "best_accuracy": 0.9}]
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _epoch(number, names, moved):
    return {
        "kind": "epoch",
        "epoch": number,
        "step": 10 * number,
        "train_loss": 2 / number,
        "test_loss": None if number == 100 else 3 / number,
        "train_accuracy": 1 - 0.9 / number,
        "test_accuracy": 0.9 - 0.8 / number,
        "lr": 0.1,
        "time_s": 1.0,
        "active_weights": 1,
        "density": {name: 0.1 + 0.001 * (i + 1) * (number % 7) for i, name in enumerate(names)},
        "dropped": moved,
        "grown": moved,
        "threshold": 1e-3 * 2 ** (number % 5),
    }


@pytest.fixture(scope="session")
def exported(model_folder):
    """Archive, ONNX and .npz files of the model, by kind."""
    from converters.loading import load
    from exporters.export import export

    files = {"archive": "net.dsr", "onnx": "net.onnx", "csr": "net.npz"}
    model = load(model_folder)
    for name in files.values():
        export(model, model_folder.with_name(name))
    return {kind: model_folder.with_name(name) for kind, name in files.items()}


@pytest.fixture(scope="session")
def make_source():
    """Returns a function that makes a source of equal layers with names of a pattern."""

    def make(layers, name="features.denseblock{0}.denselayer{0}.conv.weight", architecture="net", role="sparse"):
        rng = np.random.default_rng(0)
        mask = Mask.from_bool(rng.random((64, 32, 3, 3)) < 0.1) if role == "sparse" else Mask.full((64, 32, 3, 3))
        tensor = SparseTensor(mask, rng.normal(size=mask.active).astype(np.float32))
        names = [name.format(i) for i in range(layers)]
        specs = {n: LayerSpec(n, mask.shape, "Conv2d", role, True, f"why {n}", 49.0) for n in names}
        tensors = dict.fromkeys(names, tensor)
        stored = dict.fromkeys(names, ("delta", 6000))
        parts = {"sparse weights": 6000 * layers, "graph": 100}
        measured = footprint(tensors, specs, stored=stored, file_bytes=6000 * layers + 100, parts=parts)
        apart = dict.fromkeys(names, StoredBytes(1000, 5000))
        config = ModelConfig("module", architecture, 5, (3, 32, 32))
        return Source(Path("somewhere"), "archive", measured, config, None, tensors, apart)

    return make


_MEASURED = {"computed_bytes": 5400, "measured_bytes": 6000, "difference": -0.1, "load_peak_bytes": 9000}
_COMPUTED = {"computed_bytes": 1234, "measured_bytes": None, "difference": None, "load_peak_bytes": None}


_SIDE = {
    "path": HOSTILE,
    "kind": "model folder",
    "runtime": "pytorch",
    "top1_fraction": 0.84,
    "top1_interval": [0.756, 0.899],
    "top5_fraction": 0.98,
    "top5_interval": [0.93, 0.994],
}


@pytest.fixture(scope="session")
def extras():
    """Parts of a report's JSON: a budget that is exceeded, fallbacks, memory and accuracy."""
    runtimes = [("PyTorch", _MEASURED), (HOSTILE, _COMPUTED)]
    sizes = {"weights_bytes": 400, "activations_bytes": 5000, "moment": "Conv -> a_name_without_any_place_to_break"}
    unknown = dict.fromkeys(("weights_bytes", "activations_bytes", "moment", "computed_bytes", "difference"))
    only_measured = [
        {"runtime": "ONNX Runtime", **unknown, "measured_bytes": 7000, "load_peak_bytes": 8000},
        {"runtime": "none", **unknown, "measured_bytes": None, "load_peak_bytes": None},
    ]
    ledger = {"weights": 1000, "gradients": 1000, "masks": 500, "optimizer state": 2000}
    return {
        "budget": {
            "kind": "bytes",
            "unit": "MB",
            "asked": 10**7,
            "found": 12 * 10**6,
            "fraction": 1.2,
            "measured": "on disk",
            "fits": False,
            "line": "budget 10.00 MB: does not fit, 12.00 MB (120.0 %) on disk, 2,000,000 bytes too many",
        },
        "fallback": {"nodes": 124, "on_reference": 3, "operators": ["Tile", HOSTILE]},
        "memory": {
            "batch": 4,
            "input_shape": [3, 32, 32],
            "activations": {
                "in_order_bytes": 77_000,
                "in_order_moment": "Relu -> relu_0",
                "fused_bytes": None,
                "fused_moment": None,
            },
            "inference": [*({"runtime": name, **sizes, **measured} for name, measured in runtimes), *only_measured],
            "training": {
                "optimizer": "sgd",
                "held_bytes": {**ledger, "saved activations": 300},
                "at_peak_bytes": {**ledger, "input": 50, "activations": 250, "scratch": 600},
                "moment": "aten.convolution",
                "optimizer_state_bytes": {"sgd": 2000, "adam": 4000},
                "method": None,
                **_MEASURED,
            },
            "training_note": None,
            "measurement_note": "nothing was measured twice",
        },
        "accuracy": {
            "data": HOSTILE,
            "pictures": 100,
            "labels": "labels.csv, column a_header_without_any_place_to_break",
            "this": {**_SIDE, "top1_fraction": 0.0, "top1_interval": [0.0, 0.037]},
            "against": {**_SIDE, "path": "dense"},
            "agreement_fraction": 0.64,
            "agreement_interval": [0.542, 0.727],
            "kl_divergence_nats": 1.0031,
            "notes": [HOSTILE],
        },
    }


@pytest.fixture(scope="session")
def compacted(make_source):
    """An archive that lost filters in a compaction."""
    record = {
        "weights": [2000, 1500],
        "active": [300, 240],
        "dense_macs": [80_000, 60_000],
        "sparse_macs": [8000, 6000],
        "plain_bytes": 20_000,
        "layers": {"conv.weight": [64, 60, 16, 9]},
    }
    source = make_source(2)
    config = replace(source.config, conversion={COMPACTED: record, "seed": 3, "nothing": {}})
    return replace(source, config=config, saved=Savings.from_dict(record))


@pytest.fixture(scope="session")
def page():
    """Returns a function that makes the page of a source or path; keywords add parts to the document."""

    def make(source, **parts):
        source = source if isinstance(source, Source) else read(source)
        return page_html(source, {**report_document(source), **parts})

    return make


@pytest.fixture
def hostile(make_source):
    """A source in which every text is an attack by markup."""
    return make_source(3, HOSTILE + "{0}", HOSTILE)
