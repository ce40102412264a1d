"""Records in files: written behind the training step, replaced whole, shared by processes, there after the run."""

from .directory import DirectoryStore, SharedStore

__all__ = ["DirectoryStore", "SharedStore"]
