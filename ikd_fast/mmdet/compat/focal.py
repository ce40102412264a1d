"""Sigmoid focal loss with the call signature of mmcv's compiled operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _terms(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Float32 logits, the mask of the positive entries, and each row's class weight."""
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"sigmoid focal loss expects logits [N, C] and targets [N], got {tuple(logits.shape)} and "
            f"{tuple(target.shape)}"
        )
    classes = torch.arange(logits.size(1), device=logits.device)
    positive = target[:, None] == classes
    row_weight = None
    if weight.numel():
        # A background row (target outside 0..C-1) has no class weight; it counts once.
        known = (target >= 0) & (target < logits.size(1))
        row_weight = torch.where(known, weight[target.clamp(0, logits.size(1) - 1)], weight.new_ones(()))[
            :, None
        ]
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits, positive, row_weight


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss of every entry into ``output``; the drop-in for ``mmcv._ext.sigmoid_focal_loss_forward``.

    With p = sigmoid(x): ``-alpha (1 - p)^gamma log p`` where ``target[n] == c``, elsewhere
    ``-(1 - alpha) p^gamma log(1 - p)``; times ``weight[target[n]]`` when ``weight`` is not empty
    (Lin et al., "Focal Loss for Dense Object Detection", eq. 5). The logarithms are taken of the logits, so they
    stay exact where p underflows.

    Args:
        input: logits [N, C].
        target: int64 [N]; C (or any value outside 0..C-1) is background.
        weight: [C], or empty for none.
        output: [N, C], overwritten.
    """
    logits, positive, row_weight = _terms(input, target, weight)
    p = logits.sigmoid()
    q = (-logits).sigmoid()
    loss = torch.where(
        positive,
        -alpha * q.pow(gamma) * F.logsigmoid(logits),
        -(1 - alpha) * p.pow(gamma) * F.logsigmoid(-logits),
    )
    output.copy_(loss if row_weight is None else loss * row_weight)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write d loss / d logit of every entry into ``grad_input``; arguments as in the forward operator.

    With q = 1 - p: ``-alpha q^gamma (q - gamma p log p)`` for the positive entry, elsewhere
    ``-(1 - alpha) p^gamma (gamma q log q - p)``.
    """
    logits, positive, row_weight = _terms(input, target, weight)
    p = logits.sigmoid()
    q = (-logits).sigmoid()
    grad = torch.where(
        positive,
        -alpha * q.pow(gamma) * (q - gamma * p * F.logsigmoid(logits)),
        -(1 - alpha) * p.pow(gamma) * (gamma * q * F.logsigmoid(-logits) - p),
    )
    grad_input.copy_(grad if row_weight is None else grad * row_weight)
