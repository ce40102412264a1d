"""The distillation step: a frozen teacher, feature taps, Algorithm 1."""

from .engine import TeacherEngine
from .ikd import IKD
from .norms import suspend_running_stats
from .renormalize import Renormalize
from .schedule import StopAt
from .step import StepBatch, StepOutput
from .taps import FeatureTap
from .teacher import FrozenTeacher, load_strict, read_weights

__all__ = [
    "IKD",
    "FeatureTap",
    "FrozenTeacher",
    "Renormalize",
    "StepBatch",
    "StepOutput",
    "StopAt",
    "TeacherEngine",
    "load_strict",
    "read_weights",
    "suspend_running_stats",
]
