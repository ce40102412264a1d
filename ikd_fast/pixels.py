"""What one grey level is worth in the units of a batch of images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_HOW = (
    "write value_range=(0, 1) or value_range=(0, 255), or if the images are normalised "
    "mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375) (in 0..255 units)"
)


@dataclass(frozen=True)
class PixelUnits:
    """Scale of images: every strength (sigma, eps) is in 0..255 grey levels, whatever the images are.

    uint8 images always mean 0..255. Float images must say what they are, by one of:

    Args:
        value_range: (lowest, highest) value, e.g. ``(0, 1)`` or ``(0, 255)``.
        mean, std: the normalisation ``(p - mean) / std`` applied to 0..255 pixels p, one number per channel
            in the channel order of the images (as in an mmdet ``data_preprocessor``).

    >>> units = PixelUnits(value_range=(0, 1))
    >>> round(float(units.grey_level(torch.zeros(3, 2, 2))) * 255, 6)
    1.0
    """

    value_range: tuple[float, float] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    _cache: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.value_range is not None:
            low, high = (float(v) for v in self.value_range)
            if not low < high:
                raise ValueError(
                    f"value_range must be (lowest, highest) with lowest < highest, got {self.value_range}"
                )
            if self.mean is not None or self.std is not None:
                raise ValueError(
                    "give value_range or mean and std, got both: they say the same thing in two ways"
                )
            object.__setattr__(self, "value_range", (low, high))
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean and std go together, got mean={self.mean}, std={self.std}")
        if self.mean is not None and self.std is not None:
            mean, std = tuple(float(v) for v in self.mean), tuple(float(v) for v in self.std)
            if len(mean) != len(std) or not mean:
                raise ValueError(
                    f"mean and std need one number per channel each, got {len(mean)} and {len(std)}"
                )
            if min(std) <= 0:
                raise ValueError(f"std must be positive, got {std}")
            if max(std) < 1:
                raise ValueError(
                    f"mean and std are in 0..255 grey levels, got std={std}, which looks like 0..1; write them times 255, e.g. "
                    "mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)"
                )
            object.__setattr__(self, "mean", mean)
            object.__setattr__(self, "std", std)

    def __getstate__(self) -> dict:
        return {"value_range": self.value_range, "mean": self.mean, "std": self.std}

    def __setstate__(self, state: dict) -> None:
        for name, value in {**state, "_cache": {}}.items():
            object.__setattr__(self, name, value)

    def __deepcopy__(self, memo: dict) -> PixelUnits:
        return self

    def grey_level(self, images: Tensor) -> Tensor:
        """Size of one 0..255 grey level, ``[1 or C, 1, 1]`` on the images' device; float32 (float64 of float64)."""
        return self._constants(images)[0]

    def bounds(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest valid value, each ``[1 or C, 1, 1]``."""
        return self._constants(images)[1:]

    def numbers(self, dtype: torch.dtype) -> tuple[list[float], list[float], list[float]]:
        """Grey level, lowest and highest value of images of ``dtype``, on the host: one number, or one for each channel."""
        if dtype == torch.uint8:
            return [1.0], [0.0], [255.0]
        if self.mean is not None and self.std is not None:
            pairs = list(zip(self.mean, self.std, strict=True))
            return [1 / s for s in self.std], [-m / s for m, s in pairs], [(255 - m) / s for m, s in pairs]
        if self.value_range is not None:
            low, high = self.value_range
            return [(high - low) / 255], [low], [high]
        raise ValueError(f"float images must say their scale; {_HOW}")

    def normalisation(self, channels: int) -> tuple[list[float], list[float]]:
        """``mean`` and ``std`` of ``channels`` channels, on the host: ``(pixels - mean) / std`` is in these units."""
        if self.mean is not None and self.std is not None:
            if len(self.mean) not in (1, channels):
                raise ValueError(
                    f"mean and std have {len(self.mean)} channels, the images have {channels} (dimension -3)"
                )
            repeat = channels // len(self.mean)
            return list(self.mean) * repeat, list(self.std) * repeat
        grey, low, _ = self.numbers(torch.float32)
        return [-low[0] / grey[0]] * channels, [1 / grey[0]] * channels

    def to_pixels(self, images: Tensor) -> Tensor:
        """Images in their own units to 0..255 float32 (float64 stays float64)."""
        grey, low, _ = self._constants(images)
        return (images.to(grey.dtype) - low) / grey

    def from_pixels(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """0..255 pixels to the images' units. ``dtype=torch.uint8`` rounds and clamps to 0..255."""
        if dtype == torch.uint8:
            return pixels.round().clamp(0, 255).to(torch.uint8)
        grey, low, _ = self._scale(pixels.device, self._work_dtype(dtype), pixels.shape[-3], uint8=False)
        return (pixels.to(grey.dtype) * grey + low).to(dtype)

    def check(self, images: Tensor | Sequence[Tensor]) -> None:
        """Raise unless dtype and values are what was declared.

        Values are looked at on every call on the CPU, and at the first call of this object on a device (a
        look costs a device-to-host sync). Half a grey level beyond the range is taken for rounding.

        Raises:
            TypeError: a dtype that is neither uint8 nor floating.
            ValueError: float images with no declared range, values outside it or not finite; the index, the
                smallest and the largest value are named.
        """
        for i, image in enumerate([images] if isinstance(images, Tensor) else images):
            self._check_one(image, "images" if isinstance(images, Tensor) else f"images[{i}]")
        if not isinstance(images, Tensor) or images.device.type != "cpu":
            first = images if isinstance(images, Tensor) else next(iter(images), None)
            if first is not None and first.device.type != "cpu":
                self._cache["looked"] = True

    def _check_one(self, image: Tensor, name: str) -> None:
        if image.dtype == torch.uint8:
            return
        if not image.dtype.is_floating_point:
            raise TypeError(
                f"{name}: expected uint8 (0..255) or a float dtype, got {image.dtype}; "
                "write images.to(torch.uint8)"
            )
        if image.numel() == 0:
            return
        declared = self.value_range is not None or self.mean is not None
        if declared and image.device.type != "cpu" and self._cache.get("looked"):
            return
        if not declared:
            low, high = (float(v) for v in image.detach().aminmax())
            raise ValueError(
                f"{name}: float images must say their scale; found {low:.6g} to {high:.6g}; {_HOW}"
            )
        try:
            grey, floor, ceiling = self._constants(image)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        channels = image.detach().movedim(-3, 0).flatten(1)
        low_c, high_c = channels.amin(1).to(grey.dtype), channels.amax(1).to(grey.dtype)
        slack = 0.5 * grey.view(-1)
        inside = (low_c >= floor.view(-1) - slack) & (high_c <= ceiling.view(-1) + slack)
        low, high = float(low_c.min()), float(high_c.max())
        if not bool(inside.all()):  # also where a comparison with NaN is false
            allowed = (
                f"{self.value_range[0]:g} to {self.value_range[1]:g} (value_range)"
                if self.value_range is not None
                else f"{float(floor.min()):.4g} to {float(ceiling.max()):.4g} "
                f"(0..255 under mean={self.mean}, std={self.std})"
            )
            raise ValueError(f"{name}: expected values of {allowed}, found {low:.6g} to {high:.6g}; {_HOW}")
        if (
            self.value_range is not None
            and self.value_range[1] >= 254
            and 0 < high <= 1
            and not self._cache.get("warned")
        ):
            self._cache["warned"] = True
            warnings.warn(
                f"{name}: value_range={self.value_range} but the largest value is {high:.4g}; "
                "if the images are 0..1 write value_range=(0, 1)",
                stacklevel=4,
            )

    @staticmethod
    def _work_dtype(dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def _constants(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        uint8 = images.dtype == torch.uint8
        channels = images.shape[-3] if images.dim() >= 3 else 1
        return self._scale(images.device, self._work_dtype(images.dtype), channels, uint8=uint8)

    def _scale(
        self, device: torch.device, dtype: torch.dtype, channels: int, *, uint8: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        key = (device, dtype, uint8)
        if self.mean is not None and not uint8 and channels != len(self.mean):
            raise ValueError(
                f"mean and std have {len(self.mean)} channels, the images have {channels} (dimension -3)"
            )
        if key not in self._cache:
            grey, low, high = self.numbers(torch.uint8 if uint8 else dtype)
            # Filled on the device: copying a list there would be a sync. Not inference tensors: they may meet
            # gradients later.
            with torch.inference_mode(False):
                self._cache[key] = tuple(
                    torch.stack([torch.full((1, 1), v, dtype=dtype, device=device) for v in values])
                    for values in (grey, low, high)
                )
        return self._cache[key]
