"""A ZeRO-3 checkpoint read by another number of ranks than wrote it.

DeepSpeed's files of a rank hold, for every sub-group of parameters, one flat piece: of each
parameter in turn the rank's equal share, the last share padded with zeros. Shares are put together
by name, and cut anew for the ranks that are there now. None of the optimizer's hyper-parameters
is taken from the files: they are the recipe's. (DeepSpeed's own way, the universal checkpoint,
takes those of the first group for all of them; see docs/zero3.md.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.errors import UserError

_FP32, _OPTIMIZER = "fp32_flat_groups", "optimizer_state_dict"


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies in the flat pieces of its sub-group."""

    group: int
    offset: int
    share: int
    numel: int


class Saved:
    """Weights and optimizer state of a checkpoint, by name of the parameter."""

    def __init__(self, folder: Path, ranks: int, read: Callable[[Path], Any]) -> None:
        """`read` loads one of DeepSpeed's files. Raises UserError for what is not ZeRO-3's."""
        shards = [
            _only(folder, f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            for rank in range(ranks)
        ]
        self._ranks = [read(shard)[_OPTIMIZER] for shard in shards]
        stage = int(self._ranks[0].get("zero_stage", 0))
        if stage != 3:
            raise UserError(
                f"{folder}: was written with ZeRO stage {stage} by {ranks} ranks; only checkpoints"
                f" of stage 3 are read by another number of ranks: resume with {ranks}"
            )
        shapes = read(_only(folder, "zero_pp_rank_0_mp_rank_00_model_states.pt"))["param_shapes"]
        self._places: dict[str, _Place] = {}
        for group, named in enumerate(shapes):
            offset = 0
            for name, shape in named.items():
                numel = math.prod(shape)
                share = -(-numel // ranks)
                self._places[name] = _Place(group, offset, share, numel)
                offset += share
            found = self._ranks[0][_FP32][group].numel()
            assert found == offset, f"{folder}: group {group} holds {found} numbers, not {offset}"
        self.names = list(self._places)
        self.keys = [key for key, value in self._state(0, 0).items() if _is_flat(value)]

    def weight(self, name: str) -> Tensor:
        """float32, flat."""
        group = self._places[name].group
        return self._whole(name, [rank[_FP32][group] for rank in self._ranks])

    def other(self, name: str, flats: Sequence[Sequence[Tensor]]) -> Tensor:
        """float32, flat: of `flats`, each rank's, which are cut as the weights are."""
        group = self._places[name].group
        return self._whole(name, [rank[group] for rank in flats])

    def state(self, name: str, key: str) -> Tensor:
        """A moment of the optimizer, float32, flat."""
        group = self._places[name].group
        return self._whole(name, [self._state(r, group)[key] for r in range(len(self._ranks))])

    def others(self, name: str) -> dict[str, Any]:
        """What the optimizer keeps besides moments, its step count; a copy of its own each time.

        One tensor for several groups would be counted up once for each of them in every step.
        """
        state = self._state(0, self._places[name].group)
        kept = {key: value for key, value in state.items() if not _is_flat(value)}
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()}

    def _state(self, rank: int, group: int) -> dict[str, Any]:
        return self._ranks[rank][_OPTIMIZER]["state"][group]

    def _whole(self, name: str, flats: Sequence[Tensor]) -> Tensor:
        place = self._places[name]
        stop = place.offset + place.share
        return torch.cat([flat[place.offset : stop] for flat in flats])[: place.numel]


def shares(whole: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's share of a flat tensor, padded with zeros as ZeRO-3 pads it."""
    share = -(-whole.numel() // ranks)
    own = whole[rank * share : (rank + 1) * share]
    return torch.nn.functional.pad(own, (0, share - own.numel()))


def recut(
    saved: Saved, groups: Sequence[Sequence[str]], rank: int, ranks: int
) -> tuple[list[Tensor], dict[int, dict[str, Any]]]:
    """Flat weights of each sub-group, and its optimizer state, for one of `ranks` ranks.

    `groups`: names of the parameters of each sub-group. Raises UserError if they are others than
    the checkpoint's.
    """
    wanted = [name for group in groups for name in group]
    if set(wanted) != set(saved.names):
        differ = sorted({*wanted} ^ {*saved.names})
        raise UserError(f"the checkpoint is of another model; parameters that differ: {differ}")
    flats, states = [], {}
    for place, group in enumerate(groups):
        flats.append(torch.cat([shares(saved.weight(name), rank, ranks) for name in group]))
        states[place] = saved.others(group[0]) | {
            key: torch.cat([shares(saved.state(name, key), rank, ranks) for name in group])
            for key in saved.keys
        }
    return flats, states


def _is_flat(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise UserError(f"{folder}: found {len(found)} files {pattern}, expected one")
    return found[0]
