"""Training: data, settings, the loop, and the folder that a run leaves behind."""

from __future__ import annotations

from dsr_tool.train.data import Data, load_data
from dsr_tool.train.loop import evaluate, train
from dsr_tool.train.progress import Progress
from dsr_tool.train.records import EpochRecord, Observer, TrainResult
from dsr_tool.train.run import RunFolder
from dsr_tool.train.settings import TrainSettings

__all__ = [
    "Data",
    "EpochRecord",
    "Observer",
    "Progress",
    "RunFolder",
    "TrainResult",
    "TrainSettings",
    "evaluate",
    "load_data",
    "train",
]
