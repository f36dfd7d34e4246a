"""Supervised models: encoder, pooling, linear head; and the loss over several labels.

Shapes: B images, N tokens (class token first), D width, Q classes, J labels of all images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from harness.models.vit import VisionEncoder
from harness.study.recipes import Pool


def pooled(encoder: VisionEncoder, images_BCHW: Tensor, pool: Pool) -> Tensor:
    """[B, D]: `cls`, the class token after the encoder's norm; `mean`, the mean of the patch tokens
    after it; `mean_fc_norm`, the norm of their mean, as MAE fine-tunes (He et al. 2022).
    """
    tokens_BND = encoder(images_BCHW, None, pool != "mean_fc_norm")
    if pool == "cls":
        return tokens_BND[:, 0]
    mean_BD = tokens_BND[:, 1:].mean(dim=1)
    return encoder.norm(mean_BD) if pool == "mean_fc_norm" else mean_BD


# --- targets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """Soft targets of B images that are zero but for J entries: no [B, Q] tensor is built."""

    sample_J: Tensor
    """Which image an entry belongs to."""
    label_J: Tensor
    weight_J: Tensor
    """float32."""
    total_B: Tensor
    """float32: the sum of an image's weights; 0 for one without labels, which costs nothing."""


def label_targets(labels_J: Tensor, offsets_B1: Tensor) -> Targets:
    """1/k on each of an image's k labels (Mahajan et al. 2018, arXiv 1805.00932, sec. 2.2).

    Image b has labels_J[offsets_B1[b]:offsets_B1[b + 1]].
    """
    count_B = offsets_B1[1:] - offsets_B1[:-1]
    sample_J = torch.repeat_interleave(
        torch.arange(len(count_B), device=count_B.device), count_B, output_size=len(labels_J)
    )
    weight_J = 1.0 / count_B[sample_J].float()
    return Targets(sample_J, labels_J, weight_J, (count_B > 0).float())


def mixed_targets(targets: Targets, share_B: Tensor) -> Targets:
    """share * an image's own target + (1 - share) * that of its neighbour, images 2i and 2i + 1."""
    other_J = 1 - share_B[targets.sample_J ^ 1]
    pair_B = torch.arange(len(share_B), device=share_B.device) ^ 1
    return Targets(
        torch.cat([targets.sample_J, targets.sample_J ^ 1]),
        torch.cat([targets.label_J, targets.label_J]),
        torch.cat([targets.weight_J * share_B[targets.sample_J], targets.weight_J * other_J]),
        share_B * targets.total_B + (1 - share_B) * targets.total_B[pair_B],
    )


def soft_cross_entropy(logits_BQ: Tensor, targets: Targets) -> Tensor:
    """losses_B, float32: cross-entropy against soft targets, log-sum-exp in float32."""
    # -sum_q t_q (logit_q - logsumexp) = total * logsumexp - sum_j weight_j logit_j.
    logits_BQ = logits_BQ.float()
    chosen_J = logits_BQ[targets.sample_J, targets.label_J] * targets.weight_J
    sum_B = torch.zeros(len(logits_BQ), device=logits_BQ.device)
    sum_B = sum_B.index_add(0, targets.sample_J, chosen_J)
    return targets.total_B * torch.logsumexp(logits_BQ, dim=1) - sum_B


def multi_label_cross_entropy(logits_BQ: Tensor, labels_J: Tensor, offsets_B1: Tensor) -> Tensor:
    """losses_B, float32: cross-entropy against 1/k on each of a sample's k labels.

    The least possible value is ln k; an image without labels costs 0. See `label_targets`.
    """
    return soft_cross_entropy(logits_BQ, label_targets(labels_J, offsets_B1))


def label_entropy(offsets_B1: Tensor) -> Tensor:
    """floor_B: ln k of each sample, the least cross-entropy its k labels allow; 0 for none."""
    return (offsets_B1[1:] - offsets_B1[:-1]).clamp(min=1).float().log()


def class_cross_entropy(logits_BQ: Tensor, class_B: Tensor, smoothing: float = 0.0) -> Tensor:
    """losses_B, float32: cross-entropy of one class a sample, smoothed over all classes."""
    return F.cross_entropy(logits_BQ.float(), class_B, reduction="none", label_smoothing=smoothing)


# --- models ---------------------------------------------------------------------------------------


class Head(nn.Linear):
    """Linear classifier that also computes its loss, some images at a time where logits are many.

    Of 8,192 images and 28,000 classes the logits, their float32 copy and its gradient take 2.3 GB.
    """

    def forward(  # type: ignore[override]  # torch's forward takes the features only
        self, features_BD: Tensor, targets: Targets | None = None, images: int | None = None
    ) -> Tensor:
        """logits_BQ; with targets, losses_B. `images`: how many images have logits at a time."""
        if targets is None:
            return super().forward(features_BD)
        num = len(features_BD)
        if images is None or images >= num:
            return soft_cross_entropy(super().forward(features_BD), targets)
        # The backward pass computes a part's logits anew: they are never all there.
        parts = [
            checkpoint(self._part, features_BD, targets, start, images, use_reentrant=False)
            for start in range(0, num, images)
        ]
        return torch.cat(parts)  # type: ignore[arg-type]  # checkpoint returns what _part does

    def _part(self, features_BD: Tensor, targets: Targets, start: int, images: int) -> Tensor:
        part_BD = features_BD[start : start + images]
        local_J = targets.sample_J - start
        inside_J = (local_J >= 0) & (local_J < len(part_BD))
        # Entries of other parts weigh nothing; to drop them would wait for the device.
        own = Targets(
            torch.where(inside_J, local_J, 0),
            targets.label_J,
            torch.where(inside_J, targets.weight_J, 0.0),
            targets.total_B[start : start + images],
        )
        return soft_cross_entropy(F.linear(part_BD, self.weight, self.bias), own)


class Classifier(nn.Module):
    """Logits from pooled encoder tokens; the head starts at zero, so the first loss is ln Q."""

    def __init__(self, encoder: VisionEncoder, num_classes: int, pool: Pool) -> None:
        super().__init__()
        self.pool: Pool = pool
        self.encoder = encoder
        self.head = Head(encoder.embed_dim, num_classes)

    def forward(
        self, images_BCHW: Tensor, targets: Targets | None = None, head_images: int | None = None
    ) -> Tensor:
        """logits_BQ; with targets, losses_B (see `Head`)."""
        return self.head(pooled(self.encoder, images_BCHW, self.pool), targets, head_images)
