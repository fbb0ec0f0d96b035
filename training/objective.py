"""The terms of one forward pass, each a share of the mean over the samples of the whole step.

Every term is a sum over samples divided by how many samples the step has on all ranks together. So the passes of a
step, on one process or many, add up to the same loss and the same gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from media.types import Image, Item
from model.config import ModelConfig
from model.packed import PackedTokens
from training.batches import Micro
from training.losses import item_means
from training.perceptual import SIDE, clip_perceptual, gram_loss, resample_224
from training.pictures import images_of
from training.semantic import LOGIT_BIAS, LOGIT_SCALE, distillation_rows, sigmoid_rows, similarities
from training.stages import Weights
from training.student import Outputs
from training.teachers import Teachers

Terms = dict[str, Tensor]
"""Unweighted terms by name: l1, lpips, gram, clip, adversarial, kl, distill, sigmoid."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Captions of a whole step, of all ranks. embeddings: [T, C]; ids: int64 [T, 64], to know equal ones."""

    embeddings: Tensor
    ids: Tensor


def weight_of(name: str, weights: Weights) -> float:
    """What a term counts in the total."""
    if name in ("distill", "sigmoid"):
        return weights.semantic
    if name == "kl":
        return weights.kl
    return weights.reconstruction * float(getattr(weights, name))


def total(terms: Mapping[str, Tensor], weights: Weights) -> Tensor:
    """The weighted sum."""
    return torch.stack([weight_of(name, weights) * term for name, term in terms.items()]).sum()


def reconstruction_terms(outputs: Outputs, micro: Micro, target: Tensor, model: ModelConfig, count: int) -> Terms:
    """L1 of every item, its mean over the values that it has, and KL.

    target: patches [N, P or less]. Of a still only the first frame counts: the others are grey by definition. Source:
    AToken, arXiv 2509.14476 (3.4: L1 averaged over patches, not summed; 3.5: KL of the latents, whose form is that of
    `kl_rows`).
    """
    assert outputs.decoded is not None
    decoded = outputs.decoded
    error = (decoded - F.pad(target, (0, decoded.shape[1] - target.shape[1]))).abs()
    values = error[:, : model.frame_values].mean(1)
    if decoded.shape[1] > model.frame_values:
        values = torch.where(micro.packed.moving.to(error.device), error.mean(1), values)
    terms = {"l1": item_means(values, micro.items).sum() / count}
    if outputs.kl is not None:
        terms["kl"] = outputs.kl.sum() / count
    return terms


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Images of a pass as the perceptual terms see them, [B, 3, 224, 224] in -1..1; gradients reach only `seen`."""

    given: Tensor
    seen: Tensor


def pictures_of(outputs: Outputs, packed: PackedTokens, target: Tensor, model: ModelConfig) -> Pictures:
    """Originals and reconstructions of a pack of images. target: patches [N, P or less]."""
    assert outputs.decoded is not None
    given, seen = (
        torch.cat([resample_224(picture) for picture in images_of(patches, packed, model)])
        for patches in (target, outputs.decoded)
    )
    return Pictures(given=given, seen=seen)


def perceptual_terms(pictures: Pictures, teachers: Teachers, weights: Weights, count: int) -> Terms:
    """LPIPS, Gram and CLIP terms of images; those of weight 0 are not computed.

    Source: AToken, arXiv 2509.14476 (3.3, Eq. 5); each term says its own.
    """
    share = len(pictures.given) / count
    terms: Terms = {}
    if weights.lpips or weights.gram:
        maps = teachers.vgg(pictures.seen)
        with torch.no_grad():
            wanted = teachers.vgg(pictures.given)
        if weights.lpips:
            terms["lpips"] = teachers.lpips.of_maps(maps, wanted).sum() / count
        if weights.gram:
            terms["gram"] = gram_loss(maps, wanted) * share
    if weights.clip:
        with torch.no_grad():
            features = teachers.clip(pictures.given)
        terms["clip"] = clip_perceptual(teachers.clip(pictures.seen), features) * share
    return terms


def distillation_term(
    embeddings: Tensor, micro: Micro, texts: Texts, teachers: Teachers, temperature: float, count: int
) -> Terms:
    """KL between the teacher's and the student's distribution over the step's texts, for each image.

    Over texts only: the texts of a step are known before its first pass, its images are not, and so the term is the
    same however a step is cut. embeddings: [B, C] of the student. Source: AToken, arXiv 2509.14476 (Eq. 7).
    """
    with torch.no_grad():
        pictures = torch.cat([square(sample.item).to(embeddings.device) for sample in micro.samples])
        wanted = similarities(teachers.vision(pictures), texts.embeddings, LOGIT_SCALE)
    scores = similarities(embeddings, texts.embeddings, LOGIT_SCALE)
    return {"distill": distillation_rows(scores, wanted, temperature).sum() / count}


def sigmoid_term(embeddings: Tensor, own: Sequence[int], texts: Texts, count: int) -> Terms:
    """SigLIP's loss of clips or assets against all captions of the step; equal captions are positives.

    own: row of each item's caption in `texts`. Source: Zhai et al. 2023, arXiv 2303.15343.
    """
    mine = texts.ids[torch.as_tensor(own, device=texts.ids.device)]
    same = (mine[:, None] == texts.ids[None]).all(-1)
    rows = sigmoid_rows(embeddings, texts.embeddings, same, LOGIT_SCALE, LOGIT_BIAS)
    return {"sigmoid": rows.sum() / count}


def square(item: Item, side: int = SIDE) -> Tensor:
    """An image as the teachers see it, [1, 3, side, side] in -1..1. Raises ValueError for other items."""
    if not isinstance(item, Image):
        raise ValueError(f"a {item.kind}; only images are distilled")
    pixels = torch.from_numpy(item.pixels).permute(2, 0, 1)[None].float()
    return resample_224(pixels / 127.5 - 1, side)
