"""Training: data, settings, the loop, and the run folder that it writes."""

from __future__ import annotations

from dsr_tool.train.data import Data, load_data
from dsr_tool.train.evaluation import evaluate
from dsr_tool.train.joining import joined
from dsr_tool.train.launch import train_in_folder
from dsr_tool.train.loop import train
from dsr_tool.train.progress import Progress
from dsr_tool.train.ranks import Follower, Ranks
from dsr_tool.train.records import EpochRecord, Observer, Start, TrainResult
from dsr_tool.train.run import RunFolder
from dsr_tool.train.settings import TrainSettings
from dsr_tool.train.teacher import Teacher, open_teacher

__all__ = [
    "Data",
    "EpochRecord",
    "Follower",
    "Observer",
    "Progress",
    "Ranks",
    "RunFolder",
    "Start",
    "Teacher",
    "TrainResult",
    "TrainSettings",
    "evaluate",
    "joined",
    "load_data",
    "open_teacher",
    "train",
    "train_in_folder",
]
