"""A detector's losses from features that are there already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .attack_scope import overridden
from .settings import dense_forward


class DetectorTask:
    """``(detector, images, samples) -> losses``, and the same from what ``extract_feat`` gave for these images.

    Args:
        terms: what a detector's ``loss(images, samples)`` gave, as scalars by name.

    Raises:
        ValueError: features come from a forward whose result is not the detector's ``extract_feat``.
    """

    def __init__(self, terms: Callable[[dict[str, Any]], dict[str, Tensor]], call: Any) -> None:
        self.terms = terms
        if not (isinstance(call, partial) and call.func is dense_forward):
            raise ValueError(
                "joint_student=True makes the student's losses from the maps of its extract_feat, so what is distilled must come from "
                "there: tap backbone, neck or a dense head, or write joint_student=False"
            )

    def __call__(self, detector: Any, images: Tensor, samples: Any) -> dict[str, Tensor]:
        return self.terms(detector.loss(images, samples))

    def from_features(
        self, detector: nn.Module, features: Sequence[Tensor], samples: Any
    ) -> dict[str, Tensor]:
        """``loss`` with ``extract_feat`` answering with ``features``.

        Its images are asked for their number and padded size alone: they are stood in for by an expanded zero.
        """
        net: Any = detector
        height, width = samples[0].metainfo["batch_input_shape"]
        images = features[0].new_zeros(()).expand(len(samples), 3, height, width)
        with overridden(net, extract_feat=lambda _: tuple(features)):
            return self.terms(net.loss(images, samples))
