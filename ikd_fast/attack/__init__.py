"""Adversarial examples of a frozen teacher: which step, which objective, which views."""

from .batch import AttackBatch, AttackOutput
from .difgsm import OnlineDIFGSM
from .diversity import DiversityDraw, draw_diversity
from .memory import PerturbationMemory, View
from .objectives import Victim
from .offline import AdversarialSet, OfflineImages

__all__ = [
    "AdversarialSet", "AttackBatch", "AttackOutput", "DiversityDraw", "OfflineImages", "OnlineDIFGSM", "PerturbationMemory", "Victim",
    "View", "draw_diversity",
]  # fmt: skip
