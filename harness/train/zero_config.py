"""How a batch is divided, and the DeepSpeed settings of a stage: see `harness.study.zero_files`."""

from __future__ import annotations

from harness.errors import UserError
from harness.study.zero_files import DEFAULT_CONFIGS, OWNED_KEYS, config_path, read_config

__all__ = ["DEFAULT_CONFIGS", "OWNED_KEYS", "batch_plan", "config_path", "read_config"]


def batch_plan(batch: int, ranks: int, micro_batch: int | None) -> tuple[int, int]:
    """(images per forward pass of a rank, accumulation steps). UserError if not whole."""
    if batch % ranks:
        raise UserError(f"batch {batch} is not a multiple of {ranks} ranks")
    share = batch // ranks
    micro = min(micro_batch or share, share)
    if share % micro:
        raise UserError(
            f"batch {batch} is not a multiple of {ranks * micro} ({ranks} ranks x micro-batch"
            f" {micro}); use a micro_batch that divides {share}"
        )
    return micro, share // micro
