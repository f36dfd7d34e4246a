"""Labels of another vocabulary on the samples of a packed set: how labels.json is applied.

A set that `harness data labels` made has no shards of its own. Its index is that of its source
with other label ids, perhaps without the images that no label was left for, and can be made again
from the shards and labels.json alone.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from harness.data.index import Index, build_index, finish_index, sha256_of
from harness.data.shards import Labels, Listed, list_shard, samples_of, tags_in, words_in
from harness.data.storage import Storage
from harness.errors import DataError
from harness.study.datasets import DatasetMeta, ShardEntry

Origin = Literal["hashtags", "classes", "captions", "words"]
"""What the raw tags of a sample are: its hashtag list, its class names, the hashtags in its
caption, or all words of it."""

# Characters that show nothing: soft hyphen, marks of direction, joiners of words, variants.
_INVISIBLE = re.compile(
    "[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff]"
)
_BLANK = "".join(chr(code) for code in range(128) if not chr(code).isalnum())


def fold_tag(raw: str) -> str:
    """What all spellings of a tag have in common; "" if there is nothing but punctuation.

    Unicode NFKC and case folding (Unicode 15, sec. 3.13), without characters that show
    nothing, without punctuation and spaces at both ends ('#' is punctuation). Accents and other
    combining marks stay: they tell words apart. Folding twice is folding once.
    """
    if raw.isascii():
        return " ".join(raw.lower().strip(_BLANK).split())
    folded = _fold_once(raw)
    while folded != raw:
        raw, folded = folded, _fold_once(folded)
    return folded


def _fold_once(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    text = " ".join(_INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).split())
    start, stop = 0, len(text)
    while start < stop and _is_edge(text[start]):
        start += 1
    while start < stop and _is_edge(text[stop - 1]):
        stop -= 1
    return text[start:stop]


def _is_edge(character: str) -> bool:
    # Of ASCII everything that is neither letter nor digit, '+' and '$' included, as above.
    category = unicodedata.category(character)
    return category[0] in "PZ" or category in ("Cc", "Cf") or character in _BLANK


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """Content of labels.json that the index depends on."""

    origin: Origin
    targets: Mapping[str, Sequence[int]]
    """Raw tag -> places in the vocabulary; a tag that is not here has none."""
    drops: tuple[str, ...]
    """Splits whose images without a label are left out."""


def read_labelling(path: Path, entry: ShardEntry) -> Labelling:
    """Raises DataError if labels.json is not what dataset.json records."""
    try:
        if sha256_of(path) != entry["sha256"]:
            raise ValueError("its checksum differs from dataset.json's")
        content = json.loads(path.read_bytes())
        return Labelling(
            origin=content["origin"], targets=content["tags"], drops=tuple(content["drops"])
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be used ({error}); restore it, or make the labels again"
        ) from None


def rebuilt_index(split: str, meta: DatasetMeta, storage: Storage) -> Index:
    """The index of a split, from its shards. Raises DataError."""
    entries = meta.shards[split]
    if not meta.labels:
        listed = (list_shard(storage.local(entry)) for entry in entries)
        return build_index(listed, entries, meta.hashtags, meta.classes)
    labelling = read_labelling(storage.local(meta.labels), meta.labels)
    listed = [tagged_shard(storage.local(entry), labelling.origin) for entry in entries]
    return relabelled_listing(split, listed, entries, meta.classes, labelling)


def relabelled_listing(
    split: str,
    listed: Sequence[Sequence[Listed]],
    entries: Sequence[ShardEntry],
    classes: Sequence[str],
    labelling: Labelling,
) -> Index:
    """The index of these shards with the labels of `labelling`."""
    names = tag_names(listed)
    index = raw_index(listed, entries, names, classes, labelling.origin)
    names = classes if labelling.origin == "classes" else names
    targets = [labelling.targets.get(name, ()) for name in names]
    index = relabelled(index, targets)
    return select(index, kept_rows(index, drop=split in labelling.drops))


def tagged_shard(path: Path, origin: Origin) -> list[Listed]:
    """The samples of a shard, with their raw tags as hashtags."""
    return [tagged(listed, labels, origin) for listed, labels in samples_of(path)]


def tagged(listed: Listed, labels: Labels, origin: Origin) -> Listed:
    """A sample with its raw tags as hashtags."""
    if origin in ("hashtags", "classes"):
        return listed
    caption = str(labels.fields.get("caption", ""))
    found = tags_in(caption) if origin == "captions" else words_in(caption)
    return replace(listed, hashtags=tuple(found))


def tag_names(listed: Sequence[Sequence[Listed]]) -> list[str]:
    """All hashtags of the samples, in order."""
    return sorted({tag for part in listed for sample in part for tag in sample.hashtags})


def raw_index(
    listed: Sequence[Sequence[Listed]],
    entries: Sequence[ShardEntry],
    names: Sequence[str],
    classes: Sequence[str],
    origin: Origin,
) -> Index:
    """The index with raw tags as labels: places in `names`, or in `classes` if they are it."""
    # Without any name, classes would be taken for labels, as in sets without hashtags.
    vocabulary = [] if origin == "classes" else names or [""]
    return build_index(listed, entries, vocabulary, classes)


def relabelled(index: Index, targets: Sequence[Sequence[int]]) -> Index:
    """The index with label k replaced by `targets[k]`; each sample has a target once, in order."""
    owners, ids = image_targets(index, targets)
    counts = np.bincount(owners, minlength=index.num_samples)
    label_offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return replace(index, label_offsets=label_offsets, label_ids=ids.astype(np.int32))


def kept_rows(index: Index, *, drop: bool) -> np.ndarray:
    """int64: the samples that have a label; without `drop` all of them."""
    return np.flatnonzero(np.diff(index.label_offsets)) if drop else np.arange(index.num_samples)


def kept_shards(index: Index, rows: np.ndarray) -> list[int]:
    """Places of the shards that one of these samples lies in."""
    return np.flatnonzero(np.diff(np.searchsorted(rows, index.shard_rows))).tolist()


def image_targets(index: Index, targets: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [p], int64 [p]: the different pairs (row, target), in order."""
    many = np.array([len(ids) for ids in targets], dtype=np.int64)
    flat = np.array([target for ids in targets for target in ids], dtype=np.int64)
    rows = np.repeat(np.arange(index.num_samples), np.diff(index.label_offsets))
    raw = index.label_ids
    owners = np.repeat(rows, many[raw])
    # Place in `flat` of every target: its tag's first one plus its number there.
    firsts = np.cumsum(many) - many
    ends = np.cumsum(many[raw])
    ids = flat[np.arange(len(owners)) + np.repeat(firsts[raw] - ends + many[raw], many[raw])]
    num = int(flat.max(initial=0)) + 1
    owners, ids = np.divmod(np.unique(owners * num + ids), num)
    return owners, ids


def select(index: Index, rows: np.ndarray) -> Index:
    """The index of some of the samples, given in ascending order; shards without any are gone."""
    starts = np.searchsorted(rows, index.shard_rows)[kept_shards(index, rows)]
    label_offsets, labels = _select_ragged(index.label_offsets, rows)
    key_offsets, characters = _select_ragged(index.key_offsets, rows)
    return finish_index(
        shard_rows=np.append(starts, len(rows)).astype(np.int64),
        starts=index.starts[rows],
        lengths=index.lengths[rows],
        image_starts=index.image_starts[rows],
        image_sizes=index.image_sizes[rows],
        crcs=index.crcs[rows],
        class_ids=index.class_ids[rows],
        label_offsets=label_offsets,
        label_ids=index.label_ids[labels],
        key_offsets=key_offsets,
        key_bytes=index.key_bytes[characters],
        key_hashes=index.key_hashes[rows],
    )


def _select_ragged(offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """New offsets, and the places of the old values that stay."""
    counts = offsets[rows + 1] - offsets[rows]
    selected = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    places = np.arange(selected[-1]) + np.repeat(offsets[rows] - selected[:-1], counts)
    return selected, places
