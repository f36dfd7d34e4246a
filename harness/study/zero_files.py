"""The JSON files of ds_configs/: which one, and what it may say. Checked before anything runs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
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


def checked_name(name: str, bases: Sequence[Path]) -> str:
    """A config's name as it is, or the absolute path of its file, looked for in `bases`.

    Raises UserError if there is none, or it is not one the harness can use.
    """
    if not name.endswith(".json"):
        read_config(config_path(name, "cpu"))
        return name
    places = [(base / Path(name).expanduser()).absolute() for base in bases or (Path.cwd(),)]
    path = next((place for place in places if place.is_file()), places[0])
    read_config(config_path(str(path), "cpu"))
    return str(path)


def config_path(name: str | None, device: str) -> Path:
    """The DeepSpeed JSON of `name`: a path, or a name in ds_configs/; None picks by device."""
    wanted = name or DEFAULT_CONFIGS[device]
    if wanted.endswith(".json"):
        path = Path(wanted)
        if not path.is_file():
            raise UserError(f"{path}: no such DeepSpeed config; expected a .json file")
        return path
    package = Path(harness.__file__).parent
    # Beside the package in a checkout, inside it when installed from a wheel.
    folders = [package.parent / "ds_configs", package / "ds_configs"]
    for folder in folders:
        if (folder / f"{wanted}.json").is_file():
            return folder / f"{wanted}.json"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.json")})
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UserError(f"zero {wanted!r}: unknown; {hint}known: {', '.join(known)}, or a .json path")


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
