"""``AdaptiveFreqAug`` as a container in kornia's manner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from kornia.constants import DataKey
from torch import Tensor, nn

from ikd_fast.augment import AdaptiveFreqAug, AugPlan
from ikd_fast.augment.geometry import crop_flip

from .padded import PaddedBoxes

_IMAGE = (DataKey.IMAGE, DataKey.INPUT)
_LABEL = (DataKey.CLASS, DataKey.LABEL)
_KNOWN = (*_IMAGE, DataKey.BBOX_XYXY, DataKey.MASK, *_LABEL)


class AdaptiveFreqAugmentation(nn.Module):
    r"""Sample-specific augmentation (eq. 4, see :class:`ikd_fast.AdaptiveFreqAug`) with the call of
    ``kornia.augmentation.AugmentationSequential``: ``aug(image, boxes[, masks])``, ``data_keys``, ``transform_matrix``, ``params``.

    The plan is the core's: equal keys give equal branch, window, sigma, flip and pixels.

    A module of its own, not an ``AugmentationBase2D``: kornia draws parameters from the batch's shape alone and shows children no
    boxes, on which everything depends here. So it runs before or after an ``AugmentationSequential``, on the same data, and cannot
    be a child of one (nor of ``ImageSequential`` or ``nn.Sequential``): given the image alone it raises.

    Args:
        data_keys: what the call takes, in order: ``"image"`` (``"input"``), ``"bbox_xyxy"``, ``"mask"``, ``"label"`` (``"class"``).
            None: the call takes a dict with these names and returns one; other entries pass.
        box_mode: ``"xyxy"``: edges, pixel i is from i to i + 1, as in the core; ``"xyxy_plus"``: pixel centres, what kornia's
            containers take ``bbox_xyxy`` for. ``Boxes`` objects know theirs. Where kornia's flips see the same tensor
            write ``"xyxy_plus"``, or boxes end up a pixel off.
        value_range, mean, std: what float images are; default 0..1.
        Others as :class:`ikd_fast.AdaptiveFreqAug`, but for ``box_format``.

    Attributes after a call:
        transform_matrix: ``[N, 3, 3]`` of crop and flip, from old to new pixel centres, on the image's device.
        keep: bool ``[N, M]``, boxes that are real and stayed, on the boxes' device.
        sizes: (h, w) of each image after the crop; images stay in the stack's top left corner, zeros beyond.
        params: the :class:`ikd_fast.AugPlan`; ``params=`` of the call replays one.

    >>> import torch
    >>> aug = AdaptiveFreqAugmentation(data_keys=["image", "bbox_xyxy"], hflip_prob=0.5, seed=0)
    >>> image, boxes = torch.rand(2, 3, 64, 64), torch.tensor([[[4.0, 4.0, 60.0, 60.0]], [[1.0, 1.0, 9.0, 9.0]]])
    >>> out_image, out_boxes = aug(image, boxes, image_ids=[1, 2], epoch=0)
    >>> aug.keep.tolist(), tuple(aug.transform_matrix.shape)
    ([[True], [True]], (2, 3, 3))
    >>> again, _ = aug(image, boxes, params=aug.params)
    >>> torch.equal(again, out_image)
    True
    """

    def __init__(
        self,
        data_keys: Sequence[str | DataKey] | None = ("image", "bbox_xyxy"),
        box_mode: str = "xyxy",
        value_range: tuple[float, float] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if kwargs.get("box_format", "xyxy") != "xyxy":
            raise ValueError(
                "box_format: kornia's containers take pixels; convert the boxes to xyxy and leave box_format out"
            )
        if box_mode not in ("xyxy", "xyxy_plus"):
            raise ValueError(
                f"box_mode must be 'xyxy' (edges) or 'xyxy_plus' (pixel centres, kornia's), got {box_mode!r}"
            )
        if value_range is None and mean is None:
            value_range = (0, 1)
        self.augment = AdaptiveFreqAug(value_range=value_range, mean=mean, std=std, **kwargs)
        self.data_keys = None if data_keys is None else _keys(data_keys)
        self.box_mode = box_mode
        self.params: AugPlan | None = None
        self.transform_matrix: Tensor | None = None
        self.keep: Tensor | None = None
        self.sizes: list[tuple[int, int]] = []

    def extra_repr(self) -> str:
        return f"{self.augment!r}, data_keys={self.data_keys and [k.name.lower() for k in self.data_keys]}"

    @torch.no_grad()
    def forward(
        self,
        *args: Any,
        params: AugPlan | None = None,
        image_ids: Any = None,
        epoch: int | None = None,
        keep: Tensor | None = None,
        ignore: Tensor | None = None,
        sizes: Any = None,
        scale: Any = None,
    ) -> Any:
        """Augment a batch.

        Args:
            args: per ``data_keys``: image ``[N, 3, H, W]`` (or ``[3, H, W]``); boxes ``[N, M, 4]``, a list of ``[n_i, 4]`` or a
                kornia ``Boxes``; masks ``[N, K, H, W]``; labels ``[N, M]`` or a list. Inputs are not changed.
            params: a plan to replay, instead of ``image_ids`` and ``epoch``.
            image_ids, epoch: key of the draws, as in the core.
            keep: bool ``[N, M]``, which rows are boxes; default all. ignore: bool ``[N, M]``, boxes that move along but count
                neither for the branch nor for the crop.
            sizes: N pairs (h, w), the valid part of padded images. scale: N pairs (sx, sy), a resize already applied.

        Returns:
            What came, augmented, as a list in the order of ``data_keys`` (a dict where a dict came). Dense boxes keep their
            shape; rows not in ``self.keep`` are 0. Lists lose the dropped rows, labels in lists too.
        """
        keys, values, names = self._unpack(args)
        at = {key: i for i, key in enumerate(keys)}
        image = values[_index(at, _IMAGE)]
        if DataKey.BBOX_XYXY not in at:
            raise ValueError(
                "AdaptiveFreqAugmentation decides by the boxes: data_keys needs 'bbox_xyxy' beside 'image'; as a child of a "
                "kornia container it is given none: call it before or after the container"
            )
        single = image.dim() == 3
        stack = image[None] if single else image
        padded = PaddedBoxes.of(values[at[DataKey.BBOX_XYXY]], keep, self.box_mode, len(stack))
        targets = [
            {"boxes": boxes, "labels": rows}
            | ({} if ignore is None else {"ignore": ignore.reshape(padded.valid.shape)[i][rows]})
            | ({} if sizes is None else {"size": tuple(int(v) for v in sizes[i])})
            | ({} if scale is None else {"scale": tuple(float(v) for v in scale[i])})
            for i, (boxes, rows) in enumerate(padded.rows())
        ]
        plan = self.augment.plan_for(stack, targets, image_ids, epoch) if params is None else params
        out_image, out_targets = self.augment.apply(stack, targets, plan)
        out_boxes, stays = padded.rebuild(
            [t["boxes"] for t in out_targets], [t["labels"] for t in out_targets]
        )
        for key, i in at.items():
            if key in _IMAGE:
                values[i] = out_image[0] if single else out_image
            elif key == DataKey.BBOX_XYXY:
                values[i] = out_boxes
            elif key == DataKey.MASK:
                values[i] = _masks(values[i], plan, stack)
            elif isinstance(values[i], (list, tuple)):
                values[i] = [v[stays[j, : len(v)]] for j, v in enumerate(values[i])]
        self.params, self.keep, self.sizes = plan, stays, plan.out_sizes
        self.transform_matrix = matrices(plan).to(
            stack.device, stack.dtype if stack.is_floating_point() else torch.float32
        )
        return values if names is None else {**args[0], **dict(zip(names, values, strict=True))}

    def _unpack(self, args: tuple[Any, ...]) -> tuple[list[DataKey], list[Any], list[str] | None]:
        """Data keys, values, and the names of a dict's entries."""
        if self.data_keys is None:
            if len(args) != 1 or not isinstance(args[0], Mapping):
                raise ValueError(
                    "data_keys=None: expected one dict, e.g. aug({'image': x, 'bbox_xyxy': boxes}, image_ids=ids, epoch=e)"
                )
            names = [n for n in args[0] if n.upper() in DataKey.__members__]
            return _keys(names), [args[0][n] for n in names], names
        if len(args) != len(self.data_keys):
            wanted = ", ".join(k.name.lower() for k in self.data_keys)
            raise ValueError(
                f"expected {len(self.data_keys)} inputs ({wanted}), got {len(args)}; kornia's containers give their children the image "
                "alone: call this one before or after them"
            )
        return self.data_keys, list(args), None


def matrices(plan: AugPlan) -> Tensor:
    """``[N, 3, 3]`` float64 of crop and flip of a plan, from old to new pixel centres: x' = x - x0, or w - 1 - (x - x0)."""
    out = torch.eye(3, dtype=torch.float64).repeat(len(plan), 1, 1)
    x0, y0, x1, _ = plan.window.double().unbind(1)
    sign = 1 - 2 * plan.flip.double()
    out[:, 0, 0] = sign
    out[:, 0, 2] = torch.where(plan.flip, x1 - 1, 0 - x0)
    out[:, 1, 2] = 0 - y0
    return out


def _keys(names: Sequence[str | DataKey]) -> list[DataKey]:
    keys = [DataKey.get(name) for name in names]
    wrong = [k.name.lower() for k in keys if k not in _KNOWN]
    if wrong:
        raise ValueError(
            f"data_keys: expected image, bbox_xyxy, mask and label, got {wrong}; give boxes as bbox_xyxy or as Boxes"
        )
    if len(set(keys)) != len(keys):
        raise ValueError(f"data_keys: expected each once, got {[k.name.lower() for k in keys]}")
    return keys


def _index(at: Mapping[DataKey, int], either: Sequence[DataKey]) -> int:
    for key in either:
        if key in at:
            return at[key]
    raise ValueError("data_keys: expected 'image', found none; write data_keys=['image', 'bbox_xyxy']")


def _masks(masks: Any, plan: AugPlan, images: Tensor) -> Tensor:
    if not isinstance(masks, Tensor) or masks.shape[-2:] != images.shape[-2:]:
        got = list(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(f"mask: expected a tensor [N, K, {images.shape[-2]}, {images.shape[-1]}], got {got}")
    out = torch.zeros_like(masks)
    views = masks.reshape(len(plan), -1, *masks.shape[-2:])
    target = out.view(views.shape)
    for i, (window, flip) in enumerate(zip(plan.window.tolist(), plan.flip.tolist(), strict=True)):
        cut = crop_flip(views[i], tuple(window), flip)
        target[i, :, : cut.shape[-2], : cut.shape[-1]] = cut
    return out
