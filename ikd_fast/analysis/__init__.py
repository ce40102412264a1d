"""Measurements: how strong an attack is, always beside random signs of the same size."""

from .strength import StrengthRow, attack_strength, strength_table

__all__ = ["StrengthRow", "attack_strength", "strength_table"]
