"""IKD in a plain PyTorch loop: two small detectors, AMP, a checkpoint to go on from.

    python docs/examples/plain_torch.py --epochs 3 --checkpoint /tmp/ikd.pt

Run it again with more epochs: it goes on where it was, and ends as if it had never stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scenes import COLOURS, scenes
from torch import Tensor, nn

from ikd_fast import IKD, AdaptiveFreqAug, FGDLoss, OnlineDIFGSM, PixelUnits

UNITS = PixelUnits(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))  # what the nets take
LARGE = 30  # longest side in pixels from which a box belongs to the second level


class Neck(nn.Module):
    """Two levels of equal width, strides 8 and 16."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(width, out, 1), nn.Conv2d(2 * width, out, 1)

    def forward(self, c3: Tensor, c4: Tensor) -> list[Tensor]:
        p4 = self.coarse(c4)
        return [self.fine(c3) + F.interpolate(p4, size=c3.shape[-2:]), p4]


class Detector(nn.Module):
    """A dense detector: every cell whose centre is in a box says the class and the distances to its sides."""

    def __init__(self, width: int, classes: int = len(COLOURS)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out in ((3, width // 2), (width // 2, width), (width, width), (width, 2 * width)):
            layers += [nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.stem, self.deep = nn.Sequential(*layers[:9]), nn.Sequential(*layers[9:])
        self.neck, self.classes = Neck(width, 16), classes
        self.head = nn.Conv2d(16, classes + 4, 3, padding=1)
        nn.init.constant_(self.head.bias[:classes], -3.0)  # few cells are objects

    def features(self, images: Tensor) -> list[Tensor]:
        c3 = self.stem(images)
        return self.neck(c3, self.deep(c3))

    def losses(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """``cls``: summed binary cross-entropy, ``box``: mean L1, both over the positive cells."""
        cls, box, positives = images.new_zeros(()), images.new_zeros(()), 0
        for level, out in enumerate(self.features(images)):
            out, stride = self.head(out).float(), 8 * 2**level
            for n, target in enumerate(targets):
                wanted, sides, inside = assign(target, out.shape[-2:], stride, level, self.classes)
                cls = cls + F.binary_cross_entropy_with_logits(
                    out[n, : self.classes], wanted, reduction="sum"
                )
                box = box + ((out[n, self.classes :] - sides).abs() * inside).sum() / 4
                positives += int(inside.sum())
        return {"cls": cls / max(positives, 1), "box": box / max(positives, 1)}


def assign(target: dict, grid: Any, stride: int, level: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """One-hot classes ``[K, h, w]``, distances to left, top, right, bottom over the stride ``[4, h, w]``, cells in a box."""
    h, w = grid
    y, x = ((torch.arange(k) + 0.5) * stride for k in (h, w))
    wanted, sides, inside = torch.zeros(classes, h, w), torch.zeros(4, h, w), torch.zeros(h, w)
    for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
        if (max(x2 - x1, y2 - y1) >= LARGE) != (level == 1):
            continue
        left, right = (x - x1).expand(h, w), (x2 - x).expand(h, w)
        top, bottom = (y - y1)[:, None].expand(h, w), (y2 - y)[:, None].expand(h, w)
        distances = torch.stack([left, top, right, bottom])
        cells = distances.amin(0) > 0
        wanted[:, cells], wanted[label, cells] = 0.0, 1.0
        sides[:, cells], inside[cells] = distances[:, cells] / stride, 1.0
    return wanted, sides, inside


def train_teacher(steps: int, images: list[Tensor], targets: list[dict]) -> Detector:
    """Any trained detector does; this one takes seconds."""
    torch.manual_seed(1)
    teacher = Detector(32)
    optimizer = torch.optim.AdamW(teacher.parameters(), 3e-3)
    x = torch.stack([UNITS.from_pixels(image) for image in images])
    for _ in range(steps):
        optimizer.zero_grad()
        sum(teacher.losses(x, targets).values()).backward()
        optimizer.step()
    return teacher


def build(teacher: Detector, mode: str) -> IKD:
    """The student, and Algorithm 1 around both nets. ``beta`` is small as ``AdvFeatureLoss`` is a sum over the maps."""
    torch.manual_seed(2)
    return IKD(
        Detector(16),
        teacher,
        features="neck",
        call=lambda net, x: net.features(x),  # where only features are needed, the head is not run
        losses=[FGDLoss(preset="retinanet")],
        task_loss=lambda net, x, y: net.losses(x, y),
        attack=OnlineDIFGSM(mode),
        victim=lambda x, y: teacher.losses(x, y)["cls"],
        augment=AdaptiveFreqAug(),
        beta=1e-4,
        units=UNITS,
        pad_divisor=16,
        example=torch.zeros(1, 3, 64, 64),
    )


def train(
    ikd: IKD,
    images: list[Tensor],
    targets: list[dict],
    *,
    epochs: int,
    batch: int,
    amp: bool,
    checkpoint: Path | None,
) -> list[dict[str, float]]:
    """The loop. Images are keyed by their index, so nothing has to be saved of augmentation and attack but the epoch."""
    optimizer = torch.optim.AdamW(
        ikd.parameters(), 2e-3
    )  # the student's and the losses' parameters, never the teacher's
    start, history = 0, []
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        ikd.load_state_dict(state["ikd"])
        optimizer.load_state_dict(state["optimizer"])
        start, history = state["epoch"], state["history"]
        print(f"{checkpoint}: {start} epochs done, {max(0, epochs - start)} to go")
    for epoch in range(start, epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch)).tolist()
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
                out = ikd.step(
                    [images[i] for i in chosen], [targets[i] for i in chosen], image_ids=chosen, epoch=epoch
                )
            optimizer.zero_grad()
            out.total.backward()
            nn.utils.clip_grad_norm_(ikd.parameters(), 10.0)
            optimizer.step()
            history.append(
                {"total": float(out.total.detach()), **{k: float(v.detach()) for k, v in out.terms.items()}}
            )
        if checkpoint is not None:
            state = {
                "ikd": ikd.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch + 1,
                "history": history,
            }
            torch.save(state, checkpoint)
    return history


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train teacher and student; returns both and the terms of every step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--teacher-steps", type=int, default=60)
    parser.add_argument("--mode", default="single", help="of OnlineDIFGSM: single, iterative, random_sign")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument(
        "--checkpoint", type=Path, help="written after every epoch, gone on from if it is there"
    )
    args = parser.parse_args(argv)
    began = time.perf_counter()
    images, targets = scenes(args.images)
    teacher = train_teacher(args.teacher_steps, images, targets)
    ikd = build(teacher, args.mode)
    history = train(
        ikd, images, targets, epochs=args.epochs, batch=args.batch, amp=args.amp, checkpoint=args.checkpoint
    )
    for name in history[-1]:
        print(f"{name:12s} {history[0][name]:9.3f} -> {history[-1][name]:9.3f}")
    print(f"{len(history)} steps in {time.perf_counter() - began:.1f} s")
    return {"history": history, "ikd": ikd, "teacher": teacher, "student": ikd.student}


if __name__ == "__main__":
    main()
