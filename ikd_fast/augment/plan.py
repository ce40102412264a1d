"""What will be done to each image: a few numbers on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Branch(IntEnum):
    """Which branch of eq. 4 an image takes. KEEP: neither (the gate said no, or no window kept a box)."""

    KEEP = 0
    CROP = 1
    NOISE = 2


_TENSORS = {
    "ids": (torch.int64, ()),
    "branch": (torch.int64, ()),
    "window": (torch.int64, (4,)),
    "flip": (torch.bool, ()),
    "sigma": (torch.float32, ()),
    "sizes": (torch.int64, (2,)),
}
_SHARED = ("epoch", "seed", "rng", "round_noise", "min_kept")


@dataclass(frozen=True, eq=False)
class AugPlan:
    """Plan of N images; made by ``AdaptiveFreqAug.plan``, executed by ``apply``. All tensors are on the CPU.

    Args:
        ids: int64 ``[N]``, the 64-bit image keys in two's complement.
        branch: int64 ``[N]``, values of :class:`Branch`.
        window: int64 ``[N, 4]``, x0, y0, x1, y1 kept of each image in its pixels, before the flip; all of it
            unless CROP.
        flip: bool ``[N]``, mirrored left to right after the crop.
        sigma: float32 ``[N]``, noise in 0..255 grey levels, 0 unless NOISE.
        sizes: int64 ``[N, 2]``, (h, w) of each image before the crop.
        epoch, seed: with the ids, the key of every draw.
        rng: ``"philox"`` or ``"torch"``, the generator of the noise.
        round_noise: the noise of float images is in whole grey levels (that of uint8 images always is).
        min_kept: share of a box's area that a crop must leave for the box to stay.
    """

    ids: Tensor
    branch: Tensor
    window: Tensor
    flip: Tensor
    sigma: Tensor
    sizes: Tensor
    epoch: int
    seed: int
    rng: str = "philox"
    round_noise: bool = False
    min_kept: float = 0.0

    def __post_init__(self) -> None:
        n = len(self.ids)
        for name, (dtype, tail) in _TENSORS.items():
            value = getattr(self, name)
            if value.dtype != dtype or tuple(value.shape) != (n, *tail) or value.device.type != "cpu":
                got = f"{value.dtype} {list(value.shape)} on {value.device}"
                raise ValueError(f"AugPlan.{name}: expected {dtype} {[n, *tail]} on the CPU, got {got}")

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AugPlan):
            return NotImplemented
        same = all(getattr(self, k) == getattr(other, k) for k in _SHARED)
        return same and all(torch.equal(getattr(self, k), getattr(other, k)) for k in _TENSORS)

    __hash__ = None  # type: ignore[assignment]

    @property
    def crop_frac(self) -> float:
        """Share of the images that are cropped."""
        return self._share(Branch.CROP)

    @property
    def noise_frac(self) -> float:
        """Share of the images that get noise."""
        return self._share(Branch.NOISE)

    def _share(self, branch: Branch) -> float:
        return self.branch.tolist().count(branch) / len(self) if len(self) else 0.0

    @property
    def out_sizes(self) -> list[tuple[int, int]]:
        """(h, w) of each image after the crop."""
        return [(y1 - y0, x1 - x0) for x0, y0, x1, y1 in self.window.tolist()]

    def kernel_args(self) -> dict[str, Any]:
        """The arguments that ``ikd_fast.kernels.augment_batch`` takes from a plan."""
        tensors = {"window": self.window, "flip": self.flip, "sigma": self.sigma, "ids": self.ids}
        return {**tensors, "seed": self.seed, "epoch": self.epoch, "rng": self.rng}

    def summary(self) -> str:
        """One line for the batch and one for each image."""
        crops, noises = (self.branch.tolist().count(b) for b in (Branch.CROP, Branch.NOISE))
        lines = [
            f"AugPlan: {len(self)} images, epoch {self.epoch}, seed {self.seed}, rng {self.rng}: "
            f"{crops} crop, {noises} noise, {len(self) - crops - noises} keep"
        ]
        rows = zip(
            self.ids.tolist(), self.branch.tolist(), self.window.tolist(), self.flip.tolist(), strict=True
        )
        for i, (key, branch, (x0, y0, x1, y1), flip) in enumerate(rows):
            h, w = self.sizes[i].tolist()
            what = {
                Branch.CROP: f"crop   {h}x{w} -> {y1 - y0}x{x1 - x0} at x {x0}, y {y0}",
                Branch.NOISE: f"noise  {h}x{w}, sigma {float(self.sigma[i]):.4g} grey levels",
                Branch.KEEP: f"keep   {h}x{w}",
            }[Branch(branch)]
            lines.append(f"  [{i}] id {key % (1 << 64)}: {what}{', flipped' if flip else ''}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON; ``from_dict`` gives an equal plan back."""
        out = {name: getattr(self, name).tolist() for name in _TENSORS}
        return {**out, **{name: getattr(self, name) for name in _SHARED}}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> AugPlan:
        expected = {*_TENSORS, *_SHARED}
        if set(state) != expected:
            missing, extra = sorted(expected - set(state)), sorted(set(state) - expected)
            raise ValueError(
                f"AugPlan.from_dict: expected keys {sorted(expected)}; missing {missing}, unexpected {extra}"
            )
        n = len(state["ids"])
        values: dict[str, Any] = dict(state)
        for name, (dtype, tail) in _TENSORS.items():
            values[name] = torch.tensor(state[name], dtype=dtype, device="cpu").reshape(n, *tail)
        return cls(**values)

    def select(self, indices: Sequence[int] | Tensor | slice) -> AugPlan:
        """The plan of some of the images, in the order given."""
        index: Any = (
            indices
            if isinstance(indices, (slice, Tensor))
            else torch.tensor(list(indices), dtype=torch.int64, device="cpu")
        )
        return AugPlan(
            **{k: getattr(self, k)[index] for k in _TENSORS}, **{k: getattr(self, k) for k in _SHARED}
        )

    @classmethod
    def cat(cls, plans: Sequence[AugPlan]) -> AugPlan:
        """One plan of several made with the same settings (epoch, seed, rng, round_noise)."""
        if not plans:
            raise ValueError("AugPlan.cat expects at least one plan, got none")
        for name in _SHARED:
            values = [getattr(p, name) for p in plans]
            if any(v != values[0] for v in values):
                raise ValueError(f"AugPlan.cat: expected plans of one {name}, got {values}")
        state: dict[str, Any] = {k: getattr(plans[0], k) for k in _SHARED}
        state.update({k: torch.cat([getattr(p, k) for p in plans]) for k in _TENSORS})
        return cls(**state)
