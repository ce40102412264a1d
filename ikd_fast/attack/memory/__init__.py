"""Perturbations kept from visit to visit: where, of which size, and what a view of an image has to do with them."""

from .forecast import Forecast, record_bytes
from .memory import PerturbationMemory, build_memory
from .record import MemorySettings, Record
from .room import available_bytes
from .shards import DirectoryStore, SharedStore
from .store import HostStore, Store
from .view import View

__all__ = [
    "DirectoryStore", "Forecast", "HostStore", "MemorySettings", "PerturbationMemory", "Record", "SharedStore", "Store", "View",
    "available_bytes", "build_memory", "record_bytes",
]  # fmt: skip
