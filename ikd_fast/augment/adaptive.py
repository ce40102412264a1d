"""Sample-specific augmentation of IKD: crop images with large objects, noise where all objects are small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ikd_fast.kernels.reference.add_noise import RNGS
from ikd_fast.kernels.reference.philox import Stream, draw
from ikd_fast.pixels import PixelUnits

from . import checks, execute
from .decide import RULES, Rule, choose_window, wanted_branch
from .geometry import BOX_FORMATS, Window
from .images import Batch, Images
from .plan import AugPlan, Branch
from .targets import Targets, boxes_of, ignored, valid_size


class AdaptiveFreqAug:
    r"""Sample-specific augmentation, eq. 4 of Inconsistent Knowledge Distillation (ACM MM 2023).

    .. math:: a(x) = \begin{cases} \text{crop}(x) & \exists b: \text{area}(b) \ge \tau \\
        x + n,\ n \sim N(0, \sigma^2) & \forall b: \text{area}(b) < \tau \end{cases}

    What happens to an image depends on (seed, image id, epoch) and its boxes only: not on the batch, its
    order, workers, world size or device. ``plan`` decides on the CPU, ``apply`` executes; giving ``plan=`` to
    the call replays one.

    Args:
        area_threshold: tau, in square pixels of the annotation (a resize given as ``scale`` is divided out).
        crop_ratio: r in [0, 1): sides are int(f*side + .5), f ~ U[1 - r, 1) drawn for each side, at a uniform
            offset. At least one box keeps some area (10 tries, then the image stays whole).
        crop_align: sides and offsets of the crop are multiples of it, in pixels of the images as given (a side that the image
            itself cuts short may be less). 1, as published, is any pixel; with the smallest stride of the teacher's maps (8) the
            perturbations that ``OnlineDIFGSM(mode="carry")`` keeps stay about twice as strong from crop to crop.
        crop_prob, noise_prob: probability of the branch's augmentation; 1 and 0.3 as published.
        noise_std: sigma in 0..255 grey levels; 20.4 = 0.08 * 255. The sum is clamped to the valid range.
        rule: ``"any_large"`` (eq. 4: crop if any box has area >= tau), ``"no_small"`` (section 3.2: crop only
            if no box is below tau) or ``callable(areas)`` taking float64 ``[n]`` and returning ``"crop"``,
            ``"noise"`` or ``"keep"``.
        hflip_prob: probability of a mirror image, after the crop.
        value_range, mean, std: what float images are, see :class:`ikd_fast.pixels.PixelUnits`. uint8 is
            0..255 always.
        no_boxes: branch of an image with no counted box: ``"noise"`` (eq. 4 on the empty set) or ``"keep"``.
        round_noise: noise of float images in whole grey levels, which gives them the same noise as their
            uint8 form. None and False: uint8 only (always rounded).
        rng: ``"philox"`` (the same on every device) or ``"torch"`` (two to three times as fast on a CPU,
            values depend on device and version); recorded in the plan.
        box_format: ``"xyxy"`` pixels or ``"cxcywh_norm"`` (centre and size over the image's width and
            height).
        on_degenerate: boxes that cover no area of the image (zero area, wholly outside): ``"error"`` or
            ``"drop"``.
        min_kept: a box stays in a crop if at least this share of its area does (0..1). 0, as published, keeps slivers
            of a pixel, whose box regression targets are huge; 0.4 suits crowded images.
        seed: 0..2**64-1, or None: drawn from torch's CPU generator at each call and recorded in the plan.

    An area that float32 coordinates cannot tell from tau counts as tau.

    >>> import torch
    >>> aug = AdaptiveFreqAug(seed=0)
    >>> image, box = torch.zeros(3, 64, 96, dtype=torch.uint8), torch.tensor([[8.0, 8.0, 48.0, 48.0]])
    >>> target = {"boxes": box, "labels": torch.tensor([1])}
    >>> images, targets = aug([image], [target], image_ids=[7], epoch=0)
    >>> plan = aug.plan([box], [(64, 96)], ids=[7], epoch=0)
    >>> plan.branch.tolist() == [Branch.CROP]
    True
    >>> tuple(images[0].shape[1:]) == plan.out_sizes[0] == targets[0]["size"]
    True
    """

    def __init__(
        self,
        area_threshold: float = 32**2,
        crop_ratio: float = 0.2,
        crop_prob: float = 1.0,
        noise_prob: float = 0.3,
        noise_std: float = 20.4,
        rule: Rule = "any_large",
        hflip_prob: float = 0.0,
        value_range: tuple[float, float] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        no_boxes: str = "noise",
        round_noise: bool | None = None,
        rng: str = "philox",
        box_format: str = "xyxy",
        on_degenerate: str = "error",
        min_kept: float = 0.0,
        crop_align: int = 1,
        seed: int | None = 0,
    ) -> None:
        if not area_threshold >= 0:
            raise ValueError(f"area_threshold must be >= 0 square pixels, got {area_threshold}")
        if not 0 <= crop_ratio < 1:
            raise ValueError(
                f"crop_ratio must be in [0, 1), got {crop_ratio}; 0.2 keeps 80 % to 100 % of each side"
            )
        if not 0 <= noise_std < float("inf"):
            raise ValueError(f"noise_std must be >= 0 grey levels of 0..255, got {noise_std}")
        self.area_threshold, self.crop_ratio, self.noise_std = (
            float(area_threshold),
            float(crop_ratio),
            float(noise_std),
        )
        if isinstance(crop_align, bool) or not isinstance(crop_align, int) or crop_align < 1:
            raise ValueError(f"crop_align must be a whole number of pixels >= 1, got {crop_align!r}")
        self.crop_align = crop_align
        self.crop_prob = checks.check_probability("crop_prob", crop_prob)
        self.noise_prob = checks.check_probability("noise_prob", noise_prob)
        self.hflip_prob = checks.check_probability("hflip_prob", hflip_prob)
        if not callable(rule) and rule not in RULES:
            raise ValueError(
                f"rule must be one of {', '.join(map(repr, RULES))} or a callable(areas), got {rule!r}"
            )
        self.rule = rule
        self.no_boxes = checks.check_choice("no_boxes", no_boxes, ("noise", "keep"))
        self.rng = checks.check_choice("rng", rng, RNGS)
        self.box_format = checks.check_choice("box_format", box_format, BOX_FORMATS)
        self.on_degenerate = checks.check_choice("on_degenerate", on_degenerate, ("error", "drop"))
        self.min_kept = checks.check_probability("min_kept", min_kept)
        self.round_noise = round_noise
        self.units = PixelUnits(value_range, mean, std)
        if seed is not None:
            draw(seed, 0, 0, Stream.BRANCH)  # says what a seed must be
        self.seed = seed

    def __repr__(self) -> str:
        names = [
            "area_threshold",
            "crop_ratio",
            "crop_align",
            "crop_prob",
            "noise_prob",
            "noise_std",
            "rule",
            "hflip_prob",
            "seed",
        ]
        return f"AdaptiveFreqAug({', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"

    def plan(
        self,
        boxes: Sequence[Any],
        sizes: Any,
        ids: Any = None,
        epoch: int | None = None,
        *,
        scale: Any = None,
        ignore: Sequence[Any] | None = None,
    ) -> AugPlan:
        """Decide what happens to each of N images. Host only: a few numbers per image.

        Args:
            boxes: N tensors or arrays ``[n_i, 4]`` on the CPU (``box_format``), in the images' pixels.
            sizes: N pairs (h, w), or ``[N, 2]``.
            ids: N integers (modulo 2**64) or strings (hashed), see ``stable_id``. Required, as ``epoch``,
                unless ``seed=None``.
            epoch: 0..2**32-1.
            scale: N pairs (sx, sy): resize already applied to the boxes, divided out of their areas.
            ignore: N bool ``[n_i]`` or None: boxes that count neither for the branch nor for the crop (crowd,
                ignored).

        Raises:
            ValueError: lists of different length, missing ids or epoch, boxes on a device, NaN, infinite or
                inverted boxes, boxes covering no area of the image, images too small for the crop. The image
                and the box are named.
        """
        size_list = checks.host_sizes(sizes)
        n = len(size_list)
        scales = scale.tolist() if hasattr(scale, "tolist") else scale
        checks.same_length(n, "as sizes", boxes=boxes, scale=scales, ignore=ignore, ids=ids)
        seed, keys, epoch = self._key(n, ids, epoch)
        rows = []
        for i, size in enumerate(size_list):
            factor = checks.resize_factor(None if scales is None else scales[i], i)
            flags = None if ignore is None else ignore[i]
            xyxy = checks.counted_boxes(boxes[i], size, self.box_format, self.on_degenerate, flags, i)
            checks.croppable(size, self.crop_ratio, i)
            rows.append(self._decide(xyxy, size, (seed, keys[i], epoch), factor))
        return AugPlan(
            ids=torch.tensor(
                [k - (1 << 64) if k >> 63 else k for k in keys], dtype=torch.int64, device="cpu"
            ),
            branch=torch.tensor([int(r[0]) for r in rows], dtype=torch.int64, device="cpu"),
            window=torch.tensor([r[1] for r in rows], dtype=torch.int64, device="cpu").reshape(n, 4),
            flip=torch.tensor([r[2] for r in rows], dtype=torch.bool, device="cpu"),
            sigma=torch.tensor(
                [self.noise_std if r[0] == Branch.NOISE else 0.0 for r in rows],
                dtype=torch.float32,
                device="cpu",
            ),
            sizes=torch.tensor(size_list, dtype=torch.int64, device="cpu").reshape(n, 2),
            epoch=epoch,
            seed=seed,
            rng=self.rng,
            round_noise=bool(self.round_noise),
            min_kept=self.min_kept,
        )

    def _key(self, n: int, ids: Any, epoch: int | None) -> tuple[int, list[int], int]:
        """(seed, image keys, epoch) of the draws."""
        if self.seed is None:
            seed = int(torch.randint(0, 2**63 - 1, ()))
            return (
                seed,
                list(range(n)) if ids is None else checks.host_ids(ids),
                0 if epoch is None else int(epoch),
            )
        if ids is None or epoch is None:
            name, write = (
                ("image ids", "image_ids=ids (plan: ids=ids)") if ids is None else ("epoch", "epoch=epoch")
            )
            raise ValueError(
                f"{name}: expected with seed={self.seed}, got None, since draws are keyed by (seed, image id, epoch); "
                f"write {write}, or seed=None for draws that cannot be repeated"
            )
        draw(self.seed, 0, epoch, Stream.BRANCH)  # says what an epoch must be
        return self.seed, checks.host_ids(ids), int(epoch)

    def _decide(
        self, xyxy: np.ndarray, size: tuple[int, int], key: tuple[int, int, int], scale: tuple[float, float]
    ) -> tuple[Branch, Window, bool]:
        """Branch, window and flip of one image from its counted boxes."""
        noise_gate, crop_gate, _, _ = draw(*key, Stream.BRANCH)
        flip = self.hflip_prob > 0 and draw(*key, Stream.FLIP)[0] < self.hflip_prob
        whole = (0, 0, size[1], size[0])
        wanted = wanted_branch(xyxy, scale, self.rule, self.area_threshold) if len(xyxy) else self.no_boxes
        if wanted == "crop" and crop_gate < self.crop_prob:
            window = choose_window(xyxy, key, size, self.crop_ratio, self.min_kept, self.crop_align)
            return (Branch.KEEP if window == whole else Branch.CROP), window, flip
        if wanted == "noise" and noise_gate < self.noise_prob and self.noise_std > 0:
            return Branch.NOISE, whole, flip
        return Branch.KEEP, whole, flip

    def apply_geometry(
        self, images: Images, targets: Targets, plan: AugPlan
    ) -> tuple[Images, list[dict[str, Any]]]:
        """Crop and flip images, boxes and masks; no noise. Otherwise as :meth:`apply`."""
        return execute.geometry(images, targets, plan, self.box_format, self.on_degenerate == "drop")

    def apply_to_targets(self, images: Images, targets: Targets, plan: AugPlan) -> list[dict[str, Any]]:
        """The targets of :meth:`apply`; the images are looked at for their sizes only. For a fused path
        (``ikd_fast.kernels.augment_batch``) that makes the pixels from ``plan.kernel_args()``."""
        return execute.moved_targets(images, targets, plan, self.box_format, self.on_degenerate == "drop")

    def apply_noise(self, images: Images, plan: AugPlan, sizes: Any = None) -> Images:
        """Add to cropped and flipped images the noise that :meth:`apply` would have; nothing on padding.

        Args:
            images: output of :meth:`apply_geometry`, or a stack of it padded at the bottom and right.
            sizes: N pairs (h, w), valid part of each image; must be the plan's, which is the default.
        """
        return execute.noise(images, plan, self.units, sizes)

    def apply(self, images: Images, targets: Targets, plan: AugPlan) -> tuple[Images, list[dict[str, Any]]]:
        """Execute a plan: crop, flip, noise.

        Args:
            images: list of ``[3, H, W]`` or ``[H, W, 3]`` tensors or arrays (where both ends are 3: ``[3, H,
                W]``), or a stack ``[N, 3, H, W]``; uint8 or float. All of one dtype and device.
            targets: N dicts: ``boxes``, ``labels``, optional ``masks`` ``[n, H, W]``, ``ignore``/``iscrowd``
                flags, ``scale`` (sx, sy), and for a padded stack ``size`` (h, w), the valid part at the top
                left. Any other tensor, array or list (not tuple) of length n follows the boxes, except known
                image facts such as ``orig_size`` or ``image_id``.

        Returns:
            Images in the form they came: a list of cropped images, or a stack of the same shape with cropped
                images at the top left and zeros beyond. New dicts with ``size`` = (h, w). Inputs are never
                changed; what needs no change is returned as it is, not copied.

        On a device this costs no sync, except for selecting boxes where ``targets`` are on the device as well
        (keep them on the CPU to avoid it) and for looking once at the range of float images.
        """
        cut, new_targets = self.apply_geometry(images, targets, plan)
        return self.apply_noise(cut, plan), new_targets

    def __call__(
        self,
        images: Images,
        targets: Targets,
        image_ids: Any = None,
        epoch: int | None = None,
        plan: AugPlan | None = None,
    ) -> tuple[Images, list[dict[str, Any]]]:
        """``apply(images, targets, plan)`` with a plan made from the targets, or the one given (a replay).

        Boxes on a device are copied to the host once for the whole batch (a sync); call :meth:`plan` on CPU
        boxes to avoid it.
        """
        if plan is None:
            plan = self.plan_for(images, targets, image_ids, epoch)
        return self.apply(images, targets, plan)

    def plan_for(
        self, images: Images, targets: Targets, image_ids: Any = None, epoch: int | None = None
    ) -> AugPlan:
        """The plan that the call would make: :meth:`plan` with boxes, ``ignore``/``iscrowd``, ``scale`` and sizes taken
        from ``images`` and ``targets``. Boxes on a device are copied to the host (a sync)."""
        checks.same_length(len(images), "as images", targets=targets, image_ids=image_ids)
        stacked = isinstance(images, Tensor)
        boxes = [boxes_of(t, i) for i, t in enumerate(targets)]
        flags = [ignored(t, len(b), i) for i, (t, b) in enumerate(zip(targets, boxes, strict=True))]
        batch = Batch.of(images, [valid_size(t) for t in targets] if stacked else None)
        if any(b.device.type != "cpu" for b in boxes):
            boxes, flags = self._to_host(boxes, flags)
        scale = [t.get("scale", (1.0, 1.0)) for t in targets]
        return self.plan(boxes, batch.sizes, image_ids, epoch, scale=scale, ignore=flags)

    @staticmethod
    def _to_host(boxes: list[Tensor], flags: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor | None]]:
        """One copy for the boxes and flags of the whole batch."""
        device = next(b.device for b in boxes if b.device.type != "cpu")
        rows = []
        for b, f in zip(boxes, flags, strict=True):
            flag = (
                torch.zeros(len(b), dtype=torch.float64, device=device)
                if f is None
                else f.to(device, torch.float64)
            )
            rows.append(torch.cat([b.to(device, torch.float64), flag[:, None]], dim=1))
        parts = torch.cat(rows).cpu().split([len(b) for b in boxes])
        return [p[:, :4] for p in parts], [p[:, 4].bool() for p in parts]
