"""Nets with every way a convolution can meet a norm, statistics as training leaves them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def trained(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and statistics of norms that make a wrong fold show."""
    g = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for value, low, high in (
                (module.running_mean, -1.0, 1.0),
                (module.running_var, 0.3, 3.0),
                (module.weight, 0.5, 2.0),
                (module.bias, -1.0, 1.0),
            ):
                if value is not None:
                    with torch.no_grad():
                        value.copy_(torch.rand(value.shape, generator=g) * (high - low) + low)
    return net.eval()


class Residual(nn.Module):
    """Two convolutions with norms held by name, as mmdet's blocks have them, and a projected skip."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False),
            nn.Conv2d(c_out, c_out, 3, 1, 1, groups=2),
        )
        self.add_module("bn1", nn.BatchNorm2d(c_out))
        self.add_module("bn2", nn.BatchNorm2d(c_out, affine=False))
        self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, 2, bias=False), nn.BatchNorm2d(c_out))
        self.relu = nn.ReLU(inplace=True)

    @property
    def norm1(self) -> nn.Module:
        return self.bn1

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Backbone(nn.Module):
    """``forward`` gives two maps; four foldable pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.block = Residual(8, 16)

    def forward(self, x):
        x = self.stem(x)
        return x, self.block(x)


class Branching(nn.Module):
    """Pairs that must stay: another reader, another norm a level, a norm of two convolutions, an output, a slice, a weight of
    its own making; and pairs that may go: through eval dropout, a transposed convolution, one called for every level."""

    FOLDS = frozenset({"dropped", "up", "shared"})

    def __init__(self) -> None:
        super().__init__()
        conv = lambda: nn.Conv2d(4, 4, 1)  # noqa: E731
        self.entry = nn.Conv2d(3, 4, 1)
        names = "read levels first second given sliced scaled inplace dropped shared"
        for name in names.split():
            setattr(self, name, Standardised(4, 4, 1) if name == "scaled" else conv())
            setattr(self, f"{name}_norm", nn.BatchNorm2d(2 if name == "sliced" else 4))
        self.up, self.up_norm = nn.ConvTranspose2d(4, 4, 2, 2), nn.BatchNorm2d(4)
        self.level_norm, self.both_norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.entry(x)
        read = self.read(x)
        out = self.read_norm(read) + read
        out = out + self.levels_norm(self.levels(x)) + self.level_norm(self.levels(2 * x))
        out = out + self.both_norm(self.first(x)) * self.both_norm(self.second(x))
        given = self.given(x)
        out = out + self.given_norm(given)
        out = out + F.pad(self.sliced_norm(self.sliced(x)[:, :2]), (0, 0, 0, 0, 0, 2))
        out = out + self.scaled_norm(self.scaled(x))
        out = out + self.inplace_norm(self.inplace(x).relu_())
        out = out + self.dropped_norm(self.drop(self.dropped(x)))
        out = out + self.shared_norm(self.shared(x)) * self.shared_norm(self.shared(out))
        return out, self.up_norm(self.up(out)), given


class Standardised(nn.Conv2d):
    """A convolution whose own forward normalises the weight: a folded scale would be lost."""

    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.norm(), self.bias)
