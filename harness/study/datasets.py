"""What a study knows of its images before any is read: counts, labels, fingerprint.

A dataset is named by a string: `scenes` or another built-in set (`harness.study.builtin`), a
directory that `harness data pack` wrote (here, or copied to where a URL such as s3://bucket/set
points), or a JSON file that describes images which are not here: enough to plan and cost a study,
not to run it. No shard is ever read here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from harness.errors import NotFoundError, UserError
from harness.study.builtin import BUILTIN, builtin
from harness.study.locations import is_remote, join_location, read_bytes
from harness.study.recipes import Frozen
from harness.units import format_count

ShardEntry = dict[str, str | int]
"""What dataset.json records of a file: file, bytes, sha256; of a shard also samples."""

Role = Literal["pretrain", "val", "train", "test"]

ORDER_WINDOW = 65_536
"""Samples that are shuffled among each other where an epoch has more than these. Up to this number
the order is blind to how shards are cut; beyond it, the cut enters the identity of a stage."""

# A packed set of labelled images has no hashtags: its own train split serves, each class name as
# the image's only hashtag (as ImageNet-21k does in Singh et al. 2023, sec. 4.3), and its test
# split doubles as the held-out set of the loss curves.
# Captions are packed as a pretraining set: text towers train on that, and are judged on its val.
_FALLBACK: dict[str, str] = {
    "pretrain": "train",
    "val": "test",
    "train": "pretrain",
    "test": "val",
}


class DatasetMeta(Frozen):
    """Content of dataset.json that studies need."""

    schema_version: int = Field(default=1, alias="schema")
    name: str
    fingerprint: str
    """Stands for pixels and labels; not for paths, shard sizes or times."""
    image_size: int
    """Side in pixels; for sets of mixed sizes the size views are made for by default."""
    channels: int = 3
    hashtags: list[str] = []
    classes: list[str] = []
    splits: dict[str, int]
    shards: dict[str, list[ShardEntry]] = {}
    indexes: dict[str, ShardEntry] = {}
    layout: dict[str, str] = {}
    """Per split: stands for the sequence of samples and how shards cut it, which the fingerprint
    does not. Sets whose fingerprint says it all have none."""
    labels: ShardEntry = {}
    """Of a set that `harness data labels` made: its labels.json, and `source`, the fingerprint of
    the set that its shards belong to."""
    planned_hashtags: int = 0
    """Number of hashtags of a set that is only described."""
    planned_classes: int = 0
    """Number of classes of a set that is only described."""
    is_planned: bool = False
    """The images are not here: studies on it can be planned, not submitted."""

    def split_for(self, role: Role) -> str:
        """The split that serves `role`. Raises UserError if the set has none."""
        if role in self.splits:
            return role
        fallback = _FALLBACK.get(role)
        if fallback in self.splits:
            return str(fallback)
        have = ", ".join(sorted(self.splits)) or "none"
        raise UserError(f"dataset {self.name}: no split for '{role}'; it has: {have}")

    def count(self, role: Role) -> int:
        """Number of samples in the split that serves `role`."""
        return self.splits[self.split_for(role)]

    def check_count(self, role: Role, wanted: int | None, field: str) -> None:
        """Raises UserError, of the `field` that says so, if more are wanted than there are."""
        if wanted is not None and wanted > (have := self.count(role)):
            raise UserError(
                f"{field} {format_count(wanted)}: split '{self.split_for(role)}' of {self.name} has"
                f" {format_count(have)} images; use at most that, or leave it out for all"
            )

    @property
    def num_hashtags(self) -> int:
        """Outputs of a WSP head; a set without hashtags uses its classes."""
        return len(self.hashtags) or self.planned_hashtags or self.num_classes

    @property
    def num_classes(self) -> int:
        """Outputs of a transfer head; 0 if the set has no clean labels."""
        return len(self.classes) or self.planned_classes


def describe(spec: str, bases: Sequence[Path] = ()) -> DatasetMeta:
    """Metadata of a dataset. Relative directories are looked for in each of `bases`.

    Raises NotFoundError if there is no such dataset, UserError if its dataset.json is unusable.
    """
    found = builtin(spec)
    if found is not None:
        return DatasetMeta(
            name=found.name,
            fingerprint=found.fingerprint,
            image_size=found.image_size,
            hashtags=list(found.hashtags),
            classes=list(found.classes),
            splits=found.splits,
        )
    location = locate(spec, bases)
    planned = location.endswith(".json")
    file = location if planned else join_location(location, "dataset.json")
    try:
        raw = json.loads(read_bytes(file))
        return DatasetMeta.model_validate({**raw, "is_planned": planned})
    except (FileNotFoundError, NotADirectoryError):
        kind, _, count = spec.partition("-")
        near = difflib.get_close_matches(kind, BUILTIN, n=1, cutoff=0.7)
        hint = f"did you mean '{'-'.join(filter(None, (near[0], count)))}'? " if near else ""
        raise NotFoundError(
            f"dataset '{spec}': no {file}; {hint}expected {', '.join(BUILTIN)}, one of these with a"
            f" number such as scenes-16k, or a directory"
            " made by `harness data pack SRC --out DIR`"
        ) from None
    except (TypeError, ValueError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{file}: not a dataset description: {first}; pack it again") from None
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise UserError(f"{file}: cannot be read ({reason})") from None


def locate(spec: str, bases: Sequence[Path] = ()) -> str:
    """URL or absolute path of a dataset: the first of `bases` that has it, else in the first."""
    if is_remote(spec):
        return spec.rstrip("/")
    path = Path(spec).expanduser()
    options = [(base / path).absolute() for base in bases or (Path.cwd(),)]
    return str(next((o for o in options if o.exists()), options[0]))
