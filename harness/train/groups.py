"""Optimizer groups: weight decay or not, and the layer-wise scale of the learning rate."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

UNDECAYED = ("cls_token", "mask_token", "pos_embed", "time_embed", "relative_bias")
"""Free vectors: decay would pull them to zero without regularising a map."""


def is_decayed(name: str, param: Tensor) -> bool:
    """Matrices and kernels are decayed; biases, norms and the free vectors are not."""
    return param.ndim > 1 and name.rsplit(".", 1)[-1] not in UNDECAYED


def layer_id(name: str, depth: int) -> int:
    """0 for patch embedding, class token and positions; block i has i + 1; the rest depth + 1."""
    local = name.removeprefix("encoder.")
    if local in ("cls_token", "pos_embed") or local.startswith("patch_embed."):
        return 0
    block = re.match(r"blocks\.(\d+)\.", local)
    return int(block[1]) + 1 if block else depth + 1


def layer_scale(layer: int, depth: int, decay: float) -> float:
    """decay ** (depth + 1 - layer): 1 for the head, least for the patches.

    Source: Clark et al. 2020 (arXiv 2003.10555), sec. A.2, as used for MAE fine-tuning.
    """
    return decay ** (depth + 1 - layer)


def parameter_groups(
    model: nn.Module, *, depth: int, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for AdamW, with `lr_scale` beside torch's keys; as few as the scales allow.

    Few, because each group is a launch of its own in the fused update.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        decayed = is_decayed(name, param)
        scale = 1.0
        if layer_decay != 1.0:
            scale = layer_scale(layer_id(name, depth), depth, layer_decay)
        group = groups.setdefault(
            (scale, decayed),
            {"params": [], "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale},
        )
        group["params"].append(param)
    return list(groups.values())
