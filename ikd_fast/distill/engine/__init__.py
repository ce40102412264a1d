"""The engine of a frozen teacher: folded norms, memory layout, precision, compilation, CUDA graphs, and its self-check."""

from .check import EngineCheck
from .options import TeacherEngine
from .run import EngineRun

__all__ = ["EngineCheck", "EngineRun", "TeacherEngine"]
