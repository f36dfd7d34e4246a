"""Supervised models: encoder, pooling, linear head; and the loss over several labels.

Shapes: B images, N tokens (class token first), D width, Q classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.models.vit import VisionEncoder

Pool = Literal["cls", "mean"]


def pool_tokens(tokens_BND: Tensor, pool: Pool) -> Tensor:
    """[B, D]: the class token, or the mean of the patch tokens (class token left out)."""
    return tokens_BND[:, 0] if pool == "cls" else tokens_BND[:, 1:].mean(dim=1)


class Classifier(nn.Module):
    """Logits from pooled encoder tokens; the head starts at zero, so the first loss is ln Q."""

    def __init__(self, encoder: VisionEncoder, num_classes: int, pool: Pool) -> None:
        super().__init__()
        self.pool: Pool = pool
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """logits_BQ."""
        return self.head(pool_tokens(self.encoder(images_BCHW), self.pool))


def multi_label_cross_entropy(logits_BQ: Tensor, labels_J: Tensor, offsets_B1: Tensor) -> Tensor:
    """losses_B, float32: cross-entropy against 1/k on each of a sample's k labels.

    Sample b has labels_J[offsets_B1[b]:offsets_B1[b + 1]]; a sample without labels costs 0.
    The least possible value is ln k (Mahajan et al. 2018, arXiv 1805.00932, sec. 2.2).
    """
    # -sum_j (1/k) (logit_j - logsumexp) = logsumexp - mean of the labels' logits: no dense
    # target is built, which for 28,000 hashtags would be as large as the logits.
    logits_BQ = logits_BQ.float()
    count_B = offsets_B1[1:] - offsets_B1[:-1]
    sample_J = torch.repeat_interleave(
        torch.arange(len(count_B), device=count_B.device), count_B, output_size=len(labels_J)
    )
    weight_J = 1.0 / count_B[sample_J].float()
    chosen_J = logits_BQ[sample_J, labels_J] * weight_J
    mean_B = torch.zeros(len(count_B), device=logits_BQ.device).index_add(0, sample_J, chosen_J)
    losses_B = torch.logsumexp(logits_BQ, dim=1) - mean_B
    return torch.where(count_B > 0, losses_B, 0.0)


def label_entropy(offsets_B1: Tensor) -> Tensor:
    """floor_B: ln k of each sample, the least cross-entropy its k labels allow; 0 for none."""
    return (offsets_B1[1:] - offsets_B1[:-1]).clamp(min=1).float().log()


def class_cross_entropy(logits_BQ: Tensor, class_B: Tensor, smoothing: float = 0.0) -> Tensor:
    """losses_B, float32: cross-entropy of one class a sample, smoothed over all classes."""
    return F.cross_entropy(logits_BQ.float(), class_B, reduction="none", label_smoothing=smoothing)
