"""IKD on a Hugging Face DETR: encoder tokens as feature maps, its loss as task loss, its class loss as victim.

    python docs/examples/huggingface_detr.py --steps 4

Both nets are small and have random weights, nothing is downloaded: put ``from_pretrained`` in their place. A teacher's weights
matter: what is distilled from random ones is nothing.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from scenes import COLOURS, scenes
from torch import Tensor, nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from ikd_fast import IKD, AdaptiveFreqAug, AdvFeatureLoss, FGDLoss, OnlineDIFGSM, PixelUnits

HEIGHT, WIDTH, STRIDE = 64, 96, 32  # of the images; of the backbone's last stage
UNITS = PixelUnits(
    mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)
)  # DetrImageProcessor's, in grey levels


def detr(width: int, seed: int) -> DetrForObjectDetection:
    torch.manual_seed(seed)
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    config = DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        d_model=width, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width, num_queries=8, num_labels=len(COLOURS), dropout=0.0,
    )  # fmt: skip
    return DetrForObjectDetection(config)


def pixel_mask(images: Tensor) -> Tensor:
    """1 on pixels, 0 on padding: what IKD pads is exactly 0 in every channel, which no normalised pixel is."""
    return (images != 0).any(1).long()


def labels_of(images: Tensor, targets: list[dict]) -> list[dict]:
    """xyxy pixels to Hugging Face's centre and size over the padded image's sides."""
    height, width = images.shape[-2:]
    scale = torch.tensor([width, height, width, height], device=images.device)
    out = []
    for target in targets:
        x1, y1, x2, y2 = (target["boxes"] / scale).unbind(-1)
        boxes = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], -1)
        out.append({"class_labels": target["labels"], "boxes": boxes})
    return out


def pixels_of(labels: list[dict], height: int, width: int) -> list[dict]:
    """The other way: IKD reads boxes as xyxy pixels."""
    scale = torch.tensor([width, height, width, height])
    out = []
    for label in labels:
        cx, cy, w, h = (label["boxes"] * scale).unbind(-1)
        boxes = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)
        out.append({"boxes": boxes, "labels": label["class_labels"], "size": (height, width)})
    return out


def forward(net: nn.Module, images: Tensor, targets: list[dict] | None = None) -> Any:
    labels = None if targets is None else labels_of(images, targets)
    return net(pixel_values=images, pixel_mask=pixel_mask(images), labels=labels)


def build(student: nn.Module, teacher: nn.Module) -> IKD:
    """``model.encoder`` gives tokens ``[N, L, C]``; with ``token_grid`` they are maps ``[N, C, h, w]``. 32 and 48 channels:
    ``FGDLoss`` and ``AdvFeatureLoss`` bring the student's to the teacher's."""
    return IKD(
        student,
        teacher,
        features="model.encoder",
        token_grid=(HEIGHT // STRIDE, WIDTH // STRIDE),
        call=forward,
        losses=[FGDLoss(preset="retinanet")],
        task_loss=lambda net, x, y: forward(net, x, y).loss,
        attack=OnlineDIFGSM("single"),
        victim=lambda x, y: forward(teacher, x, y).loss_dict["loss_ce"],
        adv_loss=AdvFeatureLoss(form="mean"),
        beta=0.1,
        augment=AdaptiveFreqAug(),
        units=UNITS,
        example=torch.ones(1, 3, HEIGHT, WIDTH),  # zeros would all be padding
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """A few steps on one batch; returns the nets and the terms of every step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args(argv)
    images, pixels = scenes(args.batch, height=HEIGHT, width=WIDTH)
    stack = torch.stack(images)  # a stack keeps its sides after a crop, and so the token grid
    dataset_labels = labels_of(stack, pixels)  # boxes as Hugging Face's data sets have them
    targets = pixels_of(dataset_labels, HEIGHT, WIDTH)
    student, teacher = detr(32, seed=2), detr(48, seed=1)
    ikd = build(student, teacher)
    optimizer, history = torch.optim.AdamW(ikd.parameters(), 2e-3), []
    for step in range(args.steps):
        out = ikd.step(stack, targets, image_ids=range(args.batch), epoch=0, step=step)
        optimizer.zero_grad()
        out.total.backward()
        optimizer.step()
        history.append({k: float(v.detach()) for k, v in out.terms.items()})
    for name in history[-1]:
        print(f"{name:14s} {history[0][name]:9.4f} -> {history[-1][name]:9.4f}")
    return {
        "history": history,
        "ikd": ikd,
        "student": student,
        "teacher": teacher,
        "images": stack,
        "targets": targets,
    }


if __name__ == "__main__":
    main()
