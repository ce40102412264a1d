"""The colour of each model in every picture, told apart by a colour-blind reader (Okabe and Ito)."""

from __future__ import annotations

COLOURS = {"teacher": "#000000", "alone": "#0072B2", "fgd": "#E69F00", "fgd_ikd": "#009E73"}
