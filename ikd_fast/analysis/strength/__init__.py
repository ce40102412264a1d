"""How much an attack changes a teacher, and at what cost: always beside random signs of the same eps."""

from .measures import pixel_change, pyramid_change
from .plan import StrengthSettings
from .report import measure_strength, total_work
from .round_trip import published_round_trip
from .rows import StrengthRow, attack_strength, strength_table
from .subject import StrengthBatch, Subject
from .table import report_markdown

__all__ = [
    "StrengthBatch", "StrengthRow", "StrengthSettings", "Subject", "attack_strength", "measure_strength", "pixel_change",
    "published_round_trip", "pyramid_change", "report_markdown", "strength_table", "total_work",
]  # fmt: skip
