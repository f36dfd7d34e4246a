"""The JSON files of ds_configs/: which one, what it may say, and how a batch is divided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import harness
from harness.errors import UserError

OWNED_KEYS = {
    "train_batch_size": "stages.<stage>.batch",
    "train_micro_batch_size_per_gpu": "resources.micro_batch",
    "gradient_accumulation_steps": "resources.micro_batch",
    "optimizer": "the recipe (lr, betas, weight_decay)",
    "scheduler": "stages.<stage>.schedule",
    "gradient_clipping": "stages.<stage>.clip",
}
"""DeepSpeed settings that the harness derives, and what to change instead."""

DEFAULT_CONFIGS = {"cpu": "zero3_fp32", "cuda": "zero3_bf16"}


def config_path(name: str | None, device: str) -> Path:
    """The DeepSpeed JSON of `name`: a path, or a name in ds_configs/; None picks by device."""
    wanted = name or DEFAULT_CONFIGS[device]
    if wanted.endswith(".json"):
        path = Path(wanted)
        if not path.is_file():
            raise UserError(f"{path}: no such DeepSpeed config")
        return path
    package = Path(harness.__file__).parent
    # Beside the package in a checkout, inside it when installed from a wheel.
    folders = [package.parent / "ds_configs", package / "ds_configs"]
    for folder in folders:
        if (folder / f"{wanted}.json").is_file():
            return folder / f"{wanted}.json"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.json")})
    raise UserError(f"zero_config {wanted!r}: unknown; known: {', '.join(known)}, or a .json path")


def read_config(path: Path) -> dict[str, Any]:
    """The JSON of `path`. UserError if it is no JSON object or sets what the harness owns."""
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds {type(config).__name__}, expected a JSON object")
    problems = [
        f"{path}: sets {key}; the harness owns it: remove it and set {instead}"
        for key, instead in OWNED_KEYS.items()
        if key in config
    ]
    if problems:
        raise UserError(*problems)
    return config


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
