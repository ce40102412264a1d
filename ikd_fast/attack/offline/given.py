"""No attack in the step: adversarial images that came with the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ikd_fast.attack.batch import AttackOutput
from ikd_fast.attack.objectives import maps_of
from ikd_fast.pixels import PixelUnits


class OfflineImages:
    """In place of an :class:`~ikd_fast.OnlineDIFGSM`: the adversarial branch takes images that were made before, as the paper does.

    Nothing is attacked; a step costs one forward of the teacher and the student's own. In a config,
    ``adv=dict(attack=dict(type="OfflineImages"))`` with ``dict(type="LoadAdversarialImage", directory=...)`` in the train pipeline; in a
    loop of one's own, ``ikd.step(images, targets, ..., adversarial=adversarial_images)``.

    Args:
        value_range, mean, std: what float images are, as of :class:`~ikd_fast.OnlineDIFGSM`; may be left to ``IKD(units=...)``.
    """

    mode = "offline"
    objective_name = "none"
    objective: Any = None
    memory = None
    steps = 0
    fraction = 1.0
    fresh = False
    needs_stable_ids = False
    needs_views = False
    reads_clean_maps = False

    def __init__(self, **units: Any) -> None:
        self.units = PixelUnits(**units)

    def __repr__(self) -> str:
        return "OfflineImages()"

    def __call__(
        self, victim: Any, images: Tensor, given: Tensor | None, *, with_maps: bool = False
    ) -> AttackOutput:
        """``given``: the adversarial images, in the units and of the shape of ``images``.

        Raises:
            ValueError: there are none, or of another shape.
        """
        if given is None:
            raise ValueError(
                "attack OfflineImages takes adversarial images that come with the batch, and none came: give adversarial= to IKD.step; in "
                "an mmdet pipeline dict(type='LoadAdversarialImage', directory=...) brings them"
            )
        if given.shape != images.shape:
            raise ValueError(
                f"expected one adversarial image of the same size for each image, {list(images.shape)}, got {list(given.shape)}"
            )
        maps = None
        if with_maps:
            with torch.no_grad():
                maps = [m.detach() for m in maps_of(victim, given)]
        return AttackOutput(given, given - images, maps=maps)
