"""Weight files: safetensors, torch's .pth/.pt/.bin, folders of `transformers`, sharded or not.

Nothing in a file is ever run: pickles are read with `weights_only`, which builds tensors and
plain containers and refuses the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harness.errors import NotFoundError, StorageError, UserError, storage_error
from harness.ledger import files
from harness.models import interchange
from harness.models.convert import hf_config, tensors_in
from harness.models.interchange import Weights
from harness.models.layouts import Layout
from harness.study.starting import FOLDER_FILES, SUFFIXES

METADATA_KEY = "vision_scaling_harness"
"""Our one entry in a safetensors header. One, as a header's entries are in random order, and the
same weights should be the same bytes."""
TORCH_SUFFIXES = SUFFIXES[1:]
_STATE_DICTS = ("model", "state_dict", "model_state_dict", "module")
# How torch says that a pickle names a function or class that it does not know.
_FOREIGN = re.compile(r"\bGLOBAL (\S+)")


@dataclass(frozen=True, kw_only=True)
class RawFile:
    """A file's tensors by the names in it, and what else it says."""

    tensors: dict[str, Tensor]
    said: dict[str, Any] = field(default_factory=dict)
    """Our metadata, see `Weights.said`; empty for files of others."""
    config: dict[str, Any] = field(default_factory=dict)
    """config.json beside it."""
    container: str = ""
    """Key of the state dict in a torch file; empty if the file is one."""
    beside: tuple[str, ...] = ()
    """Other keys of a torch file (optimizer, epoch ...); no weights, left out."""


def read_weights(path: Path, drop: Sequence[str] = ()) -> Weights:
    """The weights of a file or folder. UserError with every missing and unexpected tensor.

    `drop`: beginnings of tensor names to leave out, such as `text_encoder.` of a CLIP.
    """
    weights = inspect_weights(path, drop)
    if weights.problems:
        hint = "; leave out what belongs to no ViT with --drop"
        lines = (p + hint * p.startswith("unexpected:") for p in weights.problems)
        raise UserError(*(f"{path}: {line}" for line in lines))
    return weights


def inspect_weights(path: Path, drop: Sequence[str] = ()) -> Weights:
    """As `read_weights`, but what is missing or unexpected is left in `problems`."""
    raw = read_file(path)
    default: Layout = "mae" if raw.container == "model" else "timm"
    try:
        weights = interchange.parse(
            raw.tensors, said=raw.said, config=raw.config, default=default, drop=drop
        )
    except UserError as error:
        raise UserError(*(f"{path}: {problem}" for problem in error.problems)) from None
    if raw.beside:
        weights.extra["beside"] = list(raw.beside)
    return weights


def read_file(path: Path) -> RawFile:
    """A file's or folder's tensors. NotFoundError, or UserError in one line if unreadable."""
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: a folder without weights; expected {FOLDER_FILES[0]} in it")
        path = found[0]
    if not path.is_file():
        raise NotFoundError(f"{path}: no such weight file")
    if path.name.endswith(".index.json"):
        raw = RawFile(tensors=_read_sharded(path))
    elif path.suffix == ".safetensors":
        raw = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        raw = _read_torch(path)
    else:
        raise UserError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
    beside = path.parent / "config.json"
    # A config.json describes only the files whose names it goes with.
    if path.name.split(".")[0] in ("model", "pytorch_model") and beside.is_file():
        config = _read_json(beside)
        return RawFile(**{**vars(raw), "config": config})
    return raw


def _read_safetensors(path: Path) -> RawFile:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {_line(str(error))}") from None
    try:
        said = json.loads(metadata.get(METADATA_KEY, "{}"))
    except ValueError:
        raise UserError(f"{path}: its metadata are not valid JSON") from None
    return RawFile(tensors=tensors, said=said if isinstance(said, dict) else {})


def _read_torch(path: Path) -> RawFile:
    try:
        with (
            warnings.catch_warnings(),
            # Plain attributes; checkpoints of the MAE reference keep their options in one.
            torch.serialization.safe_globals([argparse.Namespace]),
        ):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly every kind of error for damaged files
        text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        foreign = _FOREIGN.search(text)
        if isinstance(error, pickle.UnpicklingError) and foreign:
            raise UserError(f"{path}: refused, it holds code or objects ({foreign[1]})") from None
        if "TorchScript" in text:
            raise UserError(f"{path}: refused, it is a TorchScript program, not weights") from None
        why = _line(text) or type(error).__name__
        raise UserError(f"{path}: cannot be read as a torch file: {why}") from None
    container = ""
    if isinstance(content, dict):
        for key in _STATE_DICTS:
            if isinstance(content.get(key), Mapping):
                container = key
                break
    state = content[container] if container else content
    if not isinstance(state, Mapping) or not all(isinstance(k, str) for k in state):
        raise UserError(f"{path}: expected a state dict, found {type(state).__name__}")
    others = [k for k, v in state.items() if not isinstance(v, Tensor)]
    if others:
        raise UserError(f"{path}: not tensors: {', '.join(others)}")
    beside = tuple(str(key) for key in content if key != container) if container else ()
    return RawFile(tensors=dict(state), container=container, beside=beside)


def _read_sharded(path: Path) -> dict[str, Tensor]:
    """Tensors of all files that an index of `transformers` names."""
    table = _read_json(path).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise UserError(f"{path}: expected a weight_map of tensor names to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(table.values())):
        if Path(name).name != name:
            raise UserError(f"{path}: names {name}, which is not a file beside it")
        found = read_file(path.parent / name).tensors
        wanted = {tensor for tensor, shard in table.items() if shard == name}
        if found.keys() != wanted:
            odd = ", ".join(sorted(found.keys() ^ wanted))
            raise UserError(f"{path}: {name} does not hold what the index says: {odd}")
        tensors |= found
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {_line(str(error))}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def write_weights(weights: Weights, path: Path, layout: Layout) -> list[Path]:
    """Write in `layout`; the files written. A folder (with config.json) or one file by suffix.

    A reader sees old files or new ones, never half of one.
    """
    tensors = tensors_in(layout, weights)
    if path.suffix in TORCH_SUFFIXES:
        # The reference keeps its state dict under `model`, timm and MAWS have it bare.
        content = {"model": tensors} if layout == "mae" else tensors
        _make_folder(path.parent)
        write_atomically(path, lambda temporary: _save_torch(content, temporary))
        return [path]
    if path.suffix == ".safetensors":
        _make_folder(path.parent)
        write_safetensors(path, tensors, weights.said(layout))
        return [path]
    if layout != "hf":
        raise UserError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
    config = hf_config(weights)
    _make_folder(path)
    written = [path / "model.safetensors", path / "config.json"]
    write_safetensors(written[0], tensors, weights.said(layout))
    files.write_json(written[1], config)
    return written


def _save_torch(content: Mapping[str, Any], path: Path) -> None:
    # Through an open file: torch would put the temporary name, and so the process id, inside.
    with path.open("wb") as file:
        torch.save(content, file)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """One safetensors file with our metadata; the same weights are the same bytes."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, as pieces of a fused projection do.
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        ready[name] = plain
    # `format` is what transformers looks for; without a layout of its there is one entry only.
    metadata = {METADATA_KEY: json.dumps(said, sort_keys=True)} if said else None
    if metadata and said.get("layout") == "hf":
        metadata["format"] = "pt"
    write_atomically(path, lambda temporary: save_file(ready, temporary, metadata))


_guards: list[Callable[[], None]] = []


@contextlib.contextmanager
def guarded(guard: Callable[[], None]) -> Iterator[None]:
    """Inside, a written file gets its name only if `guard()` raises nothing.

    Writing takes long enough for a process to be stopped in the middle, and to be continued when
    the folder is another's.
    """
    _guards.append(guard)
    try:
        yield
    finally:
        _guards.remove(guard)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary) and rename: readers see the old file or the whole new one."""
    temporary = path.with_name(files.temporary_name(path.name))
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        for guard in _guards:
            guard()
        temporary.replace(path)
    except Exception as error:
        # Writers in other languages raise errors of their own for a full disk.
        known = StorageError(path, error) if isinstance(error, OSError) else None
        known = known or storage_error(error, path)
        raise known or error from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(path, error) from None


def _line(text: str) -> str:
    """The first sentence on one line."""
    return " ".join(text.split()).split(". ")[0][:200]
