"""A moving average of the weights, kept shard by shard as ZeRO-3 keeps the weights themselves.

The decay is that of timm's ModelEmaV3 in its training script: after update n it is min(decay,
1 - (1 + n) ** -2/3) with warm-up, else `decay`; the first update takes the weights as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_GAMMA, _POWER = 1.0, 2 / 3  # timm's defaults


class Average:
    """The average of one rank's own float32 weights, flat, one tensor a sub-group."""

    def __init__(self, decay: float, warmup: bool) -> None:
        self.decay, self.warmup = decay, warmup
        self.updates = 0
        self.flats: list[Tensor] = []

    def decay_at(self, update: int) -> float:
        """The decay of an update, counted from 1."""
        before = update - 1
        if before <= 0:
            return 0.0
        if not self.warmup:
            return self.decay
        return min(1 - (1 + before / _GAMMA) ** -_POWER, self.decay)

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor]) -> None:
        """After an optimizer step: the average moves towards `weights`."""
        self.updates += 1
        if not self.flats:
            self.flats = [weight.detach().clone() for weight in weights]
            return
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]  # timm uses it too
            self.flats, list(weights), 1 - self.decay_at(self.updates)
        )

    @torch.no_grad()
    def swap(self, weights: Sequence[Tensor]) -> None:
        """`weights` and the average change places; doing it twice changes nothing."""
        for flat, weight in zip(self.flats, weights, strict=True):
            kept = weight.clone()
            weight.copy_(flat)
            flat.copy_(kept)

    def save(self, path: Path) -> None:
        """This rank's share."""
        named = {f"{place:04d}": flat.cpu() for place, flat in enumerate(self.flats)}
        save_file({**named, "updates": torch.tensor(self.updates)}, path)

    def load(self, flats: Sequence[Tensor], updates: int, device: torch.device) -> None:
        """Go on from what `read` found, cut for this rank."""
        self.flats = [flat.to(device, copy=True) for flat in flats]
        self.updates = updates


def file_of(folder: Path, rank: int) -> Path:
    """Where a rank's share lies in a checkpoint."""
    return folder / f"ema_rank_{rank}.safetensors"


def read(path: Path) -> tuple[list[Tensor], int]:
    """The flat tensors and the number of updates of a file that `save` wrote."""
    named = load_file(path)
    updates = int(named.pop("updates"))
    return [named[name] for name in sorted(named)], updates
