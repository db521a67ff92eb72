"""The table of mutators: functions that make a damaged file from the valid files of one kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from archive_mutants import archive, safetensors
from blind import any_bytes, json_bytes
from npz_mutants import npz
from numpy.random import Generator
from onnx_mutants import onnx_model
from plan_mutants import plan

__all__ = ["MUTATORS"]

Mutate = Callable[[Generator, Sequence[bytes]], bytes]
"""Makes a mutant from the valid files of one kind."""

MUTATORS: dict[str, tuple[Mutate, ...]] = {
    "archive": (any_bytes, safetensors, archive, archive, archive),
    "predict": (archive,),
    "onnx": (any_bytes, onnx_model, onnx_model),
    "npz": (any_bytes, npz, npz),
    "plan": (any_bytes, *(plan,) * 9),
    "weights": (any_bytes, safetensors),
    "masks": (any_bytes, safetensors),
    "config": (any_bytes, json_bytes, json_bytes),
    "safetensors": (any_bytes, safetensors),
    "pickle": (any_bytes,),
}
"""Mutators by kind of file; a mutator that stands there several times is drawn as often."""
