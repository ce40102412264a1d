"""IKD on torchvision's RetinaNet or FCOS.

    python docs/examples/torchvision_retinanet.py --detector fcos --steps 4

torchvision's detectors take lists of images, normalise, resize and stack them themselves. Here IKD stacks: the attack and the maps
of both nets need one batch. So ``transform`` is replaced while training (:class:`Stacked`); the student gets its own back.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from scenes import COLOURS, scenes
from torch import Tensor, nn

from ikd_fast import IKD, AdaptiveFreqAug, FGDLoss, OnlineDIFGSM, PixelUnits

try:
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.image_list import ImageList
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7
except ImportError as error:
    raise ImportError(
        f"this example needs a torchvision that was built for this torch ({error}); write pip install torchvision"
    ) from error

# image_mean and image_std of the detectors, in grey levels
UNITS = PixelUnits(
    mean=[255 * m for m in (0.485, 0.456, 0.406)], std=[255 * s for s in (0.229, 0.224, 0.225)]
)
DETECTORS = {"retinanet": RetinaNet, "fcos": FCOS}


class Stacked(nn.Module):
    """In place of ``GeneralizedRCNNTransform``: images are normalised and stacked already, boxes are in their pixels."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(
        self, images: Tensor, targets: list[dict] | None = None
    ) -> tuple[ImageList, list[dict] | None]:
        whole = [tuple(images.shape[-2:])] * len(images)
        return ImageList(images, whole if targets is None else [t["size"] for t in targets]), targets

    def postprocess(self, detections: list[dict], sizes: Any, originals: Any) -> list[dict]:
        return self.original.postprocess(detections, sizes, originals)


def detector(kind: str, backbone: str, seed: int) -> nn.Module:
    """P3 to P7 of a ResNet; random weights. ``retinanet_resnet50_fpn(weights=...)`` can stand here."""
    torch.manual_seed(seed)
    body = resnet_fpn_backbone(
        backbone_name=backbone, weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d, returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )  # fmt: skip
    return DETECTORS[kind](body, num_classes=len(COLOURS))


@contextmanager
def losses_from(net: nn.Module) -> Iterator[None]:
    """A frozen detector gives losses instead of detections; its BatchNorm stays in eval mode."""
    was, net.training = net.training, True  # the attribute of this module alone, not train()
    try:
        yield
    finally:
        net.training = was


def class_loss(net: nn.Module, images: Tensor, targets: list[dict]) -> Tensor:
    with losses_from(net):
        return net(images, targets)["classification"]


def build(student: nn.Module, teacher: nn.Module) -> IKD:
    """``backbone`` gives an OrderedDict of five maps; the loss is what the detector returns in training mode."""
    for net in (student, teacher):
        net.transform = Stacked(net.transform)
    return IKD(
        student.train(),
        teacher,
        features="backbone",
        call=lambda net, images: net.backbone(images),
        losses=[FGDLoss(preset="retinanet")],
        task_loss=lambda net, images, targets: net(images, targets),
        attack=OnlineDIFGSM("single"),
        victim=lambda images, targets: class_loss(teacher, images, targets),
        augment=AdaptiveFreqAug(),
        beta=1e-5,
        units=UNITS,
        pad_divisor=32,
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """A few steps on one batch, then detections of the student; returns the nets and the terms of every step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--detector", choices=sorted(DETECTORS), default="retinanet")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args(argv)
    images, targets = scenes(args.batch)  # each with its "size", which Stacked tells the anchors
    student, teacher = (
        detector(args.detector, "resnet18", seed=2),
        detector(args.detector, "resnet34", seed=1),
    )
    ikd = build(student, teacher)
    optimizer, history = torch.optim.AdamW(ikd.parameters(), 1e-4), []
    for step in range(args.steps):
        out = ikd.step(images, targets, image_ids=range(args.batch), epoch=0, step=step)
        optimizer.zero_grad()
        out.total.backward()
        nn.utils.clip_grad_norm_(ikd.parameters(), 10.0)
        optimizer.step()
        history.append({k: float(v.detach()) for k, v in out.terms.items()})
    for name in history[-1]:
        print(f"{name:22s} {history[0][name]:10.4f} -> {history[-1][name]:10.4f}")
    student.transform = student.transform.original
    with torch.no_grad():
        detections = student.eval()([image / 255 for image in images])
    print(f"detections: {[len(d['boxes']) for d in detections]}")
    return {"history": history, "ikd": ikd, "student": student, "teacher": teacher, "detections": detections}


if __name__ == "__main__":
    main()
