"""kornia augmentations on one image, its boxes and masks, with draws keyed by the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import kornia.augmentation as K
import torch
from torch import Tensor, nn

from ikd_fast.generators import keyed_generators
from ikd_fast.kernels.reference.philox import Stream, stable_id
from ikd_fast.kernels.reference.precision import no_autocast

from .build import build_augmentations, geometric_only

# kornia's coordinates are those of pixel centres: pixel i is at i. Boxes here are edges: pixel i is from i to i + 1.
HALF = 0.5


@dataclass
class Augmented:
    """One image after :class:`KeyedSequential`.

    Args:
        image: ``[C, H', W']``.
        boxes: ``[n, 4]`` xyxy edges in the new image, not clipped to it: the boxes that enclose the moved ones.
        masks: ``[k, H', W']`` in their own dtype, or None.
        matrix: ``[3, 3]`` from old to new coordinates of edges.
        hflips, vflips: how many mirrorings in each direction were among the augmentations.
        changed: False if no augmentation was drawn: all else is the input itself.
        moved: False if those drawn leave every pixel at its place: boxes are the input itself.
    """

    image: Tensor
    boxes: Tensor
    masks: Tensor | None
    matrix: Tensor
    hflips: int = 0
    vflips: int = 0
    changed: bool = False
    moved: bool = False


class KeyedSequential:
    """``kornia.augmentation.AugmentationSequential`` whose draws are a function of (seed, epoch, image id).

    kornia draws from torch's global generators. Here they are seeded by the key for each image and put back as they were, so
    an image gets the same augmentation whatever the batch, its order, workers, or a resume, and nobody else's draws move. One
    image at a time for that reason: kornia's draws of a batch depend on an image's place in it. Parameters are drawn on the
    CPU for images on any device; augmentations that draw noise while they are applied (``RandomDissolving``, say) draw it there.

    No module: nothing of it is in a state dict, and ``.to`` does not move where it draws.

    Args:
        augs: see :func:`build_augmentations`.
        seed: give two of them in one run different seeds, or they make the same draws.
        random_apply: as in ``AugmentationSequential``.

    >>> import torch
    >>> flip = KeyedSequential([dict(type="RandomHorizontalFlip", p=1.0)])
    >>> out = flip(torch.rand(3, 8, 10), torch.tensor([[1.0, 2.0, 4.0, 6.0]]), image_id=7, epoch=0)
    >>> out.boxes.tolist(), out.hflips
    ([[6.0, 2.0, 9.0, 6.0]], 1)
    """

    def __init__(
        self, augs: Sequence[Mapping[str, Any] | nn.Module], seed: int = 0, random_apply: Any = False
    ) -> None:
        children = build_augmentations(augs)
        self.seed = stable_id(seed)
        self.geometric = geometric_only(children)
        self._plain = K.AugmentationSequential(
            *children, data_keys=["image", "bbox"], random_apply=random_apply
        )
        self._masked = K.AugmentationSequential(
            *children, data_keys=["image", "bbox", "mask"], random_apply=random_apply
        )

    def __repr__(self) -> str:
        return f"KeyedSequential({', '.join(map(repr, self._plain.children()))}, seed={self.seed})"

    @torch.no_grad()
    def __call__(
        self, image: Tensor, boxes: Tensor, masks: Tensor | None = None, *, image_id: int, epoch: int
    ) -> Augmented:
        """Augment ``image`` (``[C, H, W]`` float, 0..1 unless all augmentations are geometric), ``boxes`` (``[n, 4]`` float xyxy
        edges in pixels) and ``masks`` (``[k, H, W]``). Inputs are not changed. The caller's autocast does not reach in here: matrix
        products of coordinates in bfloat16 would be pixels off."""
        with no_autocast(image):
            return self._augment(image, boxes, masks, image_id, epoch)

    def _augment(
        self, image: Tensor, boxes: Tensor, masks: Tensor | None, image_id: int, epoch: int
    ) -> Augmented:
        dtype = torch.promote_types(image.dtype, torch.float32)  # coordinates need more than half precision
        work = image.to(dtype)
        corners = _corners(boxes.to(dtype) - HALF)[None]
        layers = [] if masks is None or len(masks) == 0 else [masks[None]]
        container = self._masked if layers else self._plain
        key = stable_id(int(image_id))
        with keyed_generators(self.seed, key, int(epoch), stream=Stream.KORNIA, device=image.device):
            out = container(work[None], corners, *layers)
        drawn = _drawn(container)
        if not drawn:
            return Augmented(image, boxes, masks, _edges(None, work))
        moved = not all(isinstance(m, K.IntensityAugmentationBase2D) for m in drawn)
        return Augmented(
            image=out[0][0].to(image.dtype),
            boxes=(_enclosing(out[1][0]) + HALF).to(boxes.dtype) if moved else boxes,
            masks=out[2][0] if layers else None if masks is None else masks.new_zeros(0, *out[0].shape[-2:]),
            matrix=_edges(container.transform_matrix, work),
            hflips=sum(isinstance(m, K.RandomHorizontalFlip) for m in drawn),
            vflips=sum(isinstance(m, K.RandomVerticalFlip) for m in drawn),
            changed=True,
            moved=moved,
        )


def _drawn(container: Any) -> list[nn.Module]:
    """The augmentations of the last call whose gate was open."""
    children = dict(container.named_children())
    return [
        children[item.name]
        for item in container._params
        if item.data is None or "batch_prob" not in item.data or bool((item.data["batch_prob"] > 0.5).any())
    ]


def _corners(boxes: Tensor) -> Tensor:
    """``[n, 4]`` xyxy to ``[n, 4, 2]`` clockwise from the top left."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], dim=-1).reshape(-1, 4, 2)


def _enclosing(corners: Tensor) -> Tensor:
    if corners.numel() == 0:
        return corners.new_zeros(0, 4)
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)


def _edges(matrix: Tensor | None, image: Tensor) -> Tensor:
    """kornia's matrix between pixel centres as one between edges."""
    eye = torch.eye(3, dtype=image.dtype, device=image.device)
    if matrix is None:
        return eye
    shift = eye.clone()
    shift[:2, 2] = HALF
    back = eye.clone()
    back[:2, 2] = -HALF
    return shift @ matrix[0].to(image) @ back
