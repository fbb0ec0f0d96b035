"""Semantic terms: distillation of image-text similarities, and the sigmoid loss of clips and assets with their texts.

B images, clips or assets; T texts; C channels. Source: facts-training 3, paper Eq. 7; SigLIP, arXiv 2303.15343.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_SCALE = math.exp(4.8438)
"""Factor of the cosines, as published (127)."""

LOGIT_BIAS = -15.5625

TEMPERATURE = 2.0


def similarities(images: Tensor, texts: Tensor, scale: float = LOGIT_SCALE) -> Tensor:
    """Scaled cosines [B, T]. A temperature of 2 makes sense on these only: of bare cosines it leaves nothing."""
    images, texts = (rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in (images, texts))
    return scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


def distillation_rows(student: Tensor, teacher: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """KL(softmax(teacher / tau) || softmax(student / tau)) over the texts of every image.

    student, teacher: scaled scores [B, T]. Returns [B].
    """
    wanted = F.log_softmax(teacher.detach() / temperature, dim=1)
    given = F.log_softmax(student / temperature, dim=1)
    return F.kl_div(given, wanted, reduction="none", log_target=True).sum(1)


def sigmoid_rows(
    images: Tensor, texts: Tensor, same: Tensor, scale: float = LOGIT_SCALE, bias: float = LOGIT_BIAS
) -> Tensor:
    """Sum over texts of -log sigmoid(+-logit) for every image, [B]; the mean of the rows is SigLIP's loss.

    same: bool [B, T], which texts belong to which image; all equal captions, not only the own one.
    """
    logits = similarities(images, texts, scale) + bias
    return -F.logsigmoid(torch.where(same, logits, -logits)).sum(1)
