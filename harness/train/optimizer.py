"""The optimizer that DeepSpeed gets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from harness.study.recipes import Optimization


def make_optimizer(
    groups: list[dict[str, Any]],
    recipe: Optimization,
    config: Mapping[str, Any],
    device: torch.device,
) -> torch.optim.Optimizer:
    """AdamW: DeepSpeed's fused kernel on CUDA, torch's fused one elsewhere."""
    offloaded = config.get("zero_optimization", {}).get("offload_optimizer", {})
    settings: dict[str, Any] = {
        "lr": recipe.lr,
        "betas": recipe.betas,
        "weight_decay": recipe.weight_decay,
    }
    if device.type == "cuda" and offloaded.get("device", "none") == "none":
        try:
            from deepspeed.ops.adam import FusedAdam

            with plain_architectures():
                return FusedAdam(groups, adam_w_mode=True, **settings)
        except Exception as error:  # a compiler's failure has no one type
            print(f"FusedAdam cannot be built here, using torch's fused AdamW: {error}", flush=True)
    optimizer = torch.optim.AdamW(groups, fused=True, **settings)
    if device.type == "cpu":
        # Asks at every step whether a CUDA graph is being captured, and for that opens the driver's
        # library anew: 1 ms where there is none.
        optimizer._accelerator_graph_capture_health_check = lambda: None
    return optimizer


@contextmanager
def plain_architectures() -> Iterator[None]:
    """TORCH_CUDA_ARCH_LIST without letters: torch takes 9.0a, DeepSpeed's builder stops at it."""
    name = "TORCH_CUDA_ARCH_LIST"
    given = os.environ.get(name)
    if given is None:
        yield
        return
    os.environ[name] = re.sub(r"(?<=\d)[a-z]", "", given)
    try:
        yield
    finally:
        os.environ[name] = given
