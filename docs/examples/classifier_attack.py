"""The attack without boxes: what each mode does to a classifier, and a student that learns the teacher's features under it.

    python docs/examples/classifier_attack.py --steps 100

Targets are class indices; no augmentation, as there are no boxes to decide by.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ikd_fast import IKD, AdvFeatureLoss, OnlineDIFGSM, PixelUnits

CLASSES, SIDE = 4, 32
UNITS = PixelUnits(value_range=(0, 1))


def gratings(count: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """0..1 images of faint stripes in one of four directions under noise, and the direction."""
    g = torch.Generator().manual_seed(1000 + first)
    labels = torch.arange(first, first + count) % CLASSES
    angle = labels * torch.pi / CLASSES
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    phase = torch.rand(count, generator=g) * 6.3
    wave = torch.cos(angle)[:, None, None] * x + torch.sin(angle)[:, None, None] * y
    stripes = 0.06 * torch.sin(wave * 0.8 + phase[:, None, None])
    noise = 0.05 * torch.randn(count, 3, SIDE, SIDE, generator=g)
    return (0.5 + stripes[:, None] + noise).clamp(0, 1), labels


class Classifier(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 5, 2, 2), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def fit(net: Classifier, steps: int, batch: int) -> Classifier:
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3)
    for step in range(steps):
        x, y = gratings(batch, first=batch * step)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def distil(teacher: Classifier, steps: int, batch: int, beta: float) -> tuple[IKD, list[dict[str, float]]]:
    """A narrower student: cross-entropy on clean images, the teacher's features on adversarial ones."""
    torch.manual_seed(2)
    ikd = IKD(
        Classifier(8),
        teacher,
        features="body",
        task_loss=lambda net, x, y: {"ce": F.cross_entropy(net(x), y)},
        attack=OnlineDIFGSM("single"),
        victim=lambda x, y: F.cross_entropy(teacher(x), y, reduction="none"),
        adv_loss=AdvFeatureLoss(form="mean"),
        beta=beta,
        units=UNITS,
        example=torch.zeros(1, 3, SIDE, SIDE),
    )
    optimizer, history = torch.optim.AdamW(ikd.parameters(), 5e-3), []
    for step in range(steps):
        x, y = gratings(batch, first=batch * step)
        out = ikd.step(x, y, image_ids=range(batch * step, batch * (step + 1)), epoch=0)
        optimizer.zero_grad()
        out.total.backward()
        optimizer.step()
        history.append({k: float(v.detach()) for k, v in out.terms.items()})
    return ikd, history


def under_attack(net: Classifier, x: Tensor, y: Tensor, eps: float) -> dict[str, tuple[float, float]]:
    """(cross-entropy, accuracy) on clean images and under every mode."""
    net.eval()
    report = {"clean": score(net, x, y)}
    for mode in ("random_sign", "single", "iterative"):
        attack = OnlineDIFGSM(
            mode, eps=eps, step_size=2.0 if mode == "iterative" else None, value_range=(0, 1)
        )
        out = attack(
            lambda a, b: F.cross_entropy(net(a), b, reduction="none"), x, y, image_ids=range(len(x)), epoch=0
        )
        report[mode] = score(net, out.images, y)
    return report


@torch.no_grad()
def score(net: Classifier, x: Tensor, y: Tensor) -> tuple[float, float]:
    logits = net(x)
    return float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train the teacher, attack it, distil it; returns the scores and the student's terms."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--eps", type=float, default=8.0, help="0..255 grey levels, also of 0..1 images")
    parser.add_argument(
        "--beta", type=float, default=1.0, help="weight of the feature loss, a mean squared error here"
    )
    args = parser.parse_args(argv)
    torch.manual_seed(1)
    teacher = fit(Classifier(12), args.steps, args.batch)
    x, y = gratings(64, first=100_000)
    ikd, history = distil(teacher, args.steps, args.batch, args.beta)
    reports = {
        "teacher": under_attack(teacher, x, y, args.eps),
        "student": under_attack(ikd.student, x, y, args.eps),
    }
    print(f"eps {args.eps:g}/255       " + "".join(f"{mode:>16s}" for mode in reports["teacher"]))
    for name, report in reports.items():
        print(f"{name:16s}" + "".join(f"{loss:9.3f} {100 * hit:3.0f} %" for loss, hit in report.values()))
    return {"reports": reports, "history": history, "ikd": ikd, "teacher": teacher, "student": ikd.student}


if __name__ == "__main__":
    main()
