"""Adversarial images made before training: their files, and the branch that takes them."""

from .adversarial_set import AdversarialSet
from .formats import FORMATS, Format
from .given import OfflineImages
from .manifest import SetManifest

__all__ = ["FORMATS", "AdversarialSet", "Format", "OfflineImages", "SetManifest"]
