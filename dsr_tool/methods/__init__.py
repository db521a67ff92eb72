"""Training methods: each decides which weights to prune, how many each layer grows, and where they grow."""

from __future__ import annotations

from dsr_tool.methods.attached import Attached, attach
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.deepr import DeepR
from dsr_tool.methods.dense import Dense
from dsr_tool.methods.dsr import DSR
from dsr_tool.methods.dst import DST
from dsr_tool.methods.gmp import GradualPruning
from dsr_tool.methods.granet import GraNet
from dsr_tool.methods.neuron_set import NeuronSET
from dsr_tool.methods.rigl import RigL
from dsr_tool.methods.schedule import ReallocationSchedule
from dsr_tool.methods.set import SET
from dsr_tool.methods.snfs import SNFS
from dsr_tool.methods.static import Static
from dsr_tool.methods.table import METHODS, make, names, option_names
from dsr_tool.methods.tied import Tied

__all__ = [
    "DSR",
    "DST",
    "METHODS",
    "SET",
    "SNFS",
    "Attached",
    "DeepR",
    "Dense",
    "GraNet",
    "GradualPruning",
    "Method",
    "NeuronSET",
    "Reallocation",
    "ReallocationSchedule",
    "RigL",
    "Static",
    "Tied",
    "attach",
    "make",
    "names",
    "option_names",
]
