"""Making a built-in set on first use: once, whole or not at all, whoever else wants it too."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
from harness.data.index import build_index, shard_entry, write_index
from harness.data.shards import Sample, list_shard, write_shard
from harness.errors import DataError
from harness.ledger.files import write_json
from harness.ledger.lease import exclusive
from harness.study.builtin import Builtin, builtin
from harness.study.datasets import DatasetMeta, ShardEntry, describe

SHARD_IMAGES = 4000
"""Another number is another order in sets of more than ORDER_WINDOW: raise the sets' versions."""
_PARALLEL_FROM = 20_000
"""Images from which further processes pay for their start."""


Draw = Callable[[str, int, int], Iterator[Sample]]
"""(split, first, num) -> samples first to first + num of the split."""

DRAWERS = {
    "scenes": "harness.data.scenes:samples",
    "captions": "harness.data.captions:samples",
    "motion": "harness.data.motion:samples",
    "scenes_real": "harness.data.scene_variants:real",
    "scenes_v2": "harness.data.scene_variants:v2",
    "scenes_shift": "harness.data.scene_variants:shift",
    "objects": "harness.data.objects:samples",
}
"""Built-in set -> the function that draws it, imported when it is needed."""


def ready(found: Builtin, root: Path) -> Path:
    """Folder of a built-in set, made now if it is absent."""
    folder = root / "datasets" / f"{found.kind}-{found.count}-v{found.version}"
    if (folder / "dataset.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.with_name(f"{folder.name}.lock")):
        if (folder / "dataset.json").exists():
            return folder
        for left_behind in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(left_behind, ignore_errors=True)
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            make(temporary, found, processes=os.cpu_count() or 1)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def make(folder: Path, found: Builtin, processes: int) -> DatasetMeta:
    """Writes shards, index and dataset.json; the bytes do not depend on `processes`."""
    spec = f"{found.kind}-{found.count}"
    tasks = _tasks(found)
    num_images = sum(num for *_, num in tasks)
    processes = min(processes, len(tasks)) if num_images >= _PARALLEL_FROM else 1
    # Plain processes, not multiprocessing: the caller may be a daemon, or hold threads of torch.
    command = [sys.executable, "-m", "harness.data.ready", str(folder), spec, str(processes)]
    path = os.pathsep.join(
        [str(Path(harness.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    helpers = [
        subprocess.Popen(
            [*command, str(rank)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(1, processes)
    ]
    try:
        _draw_share(folder, found, 0, processes)
        for helper in helpers:
            _, stderr = helper.communicate()
            if helper.returncode:
                last = (stderr.strip().splitlines() or ["no message"])[-1]
                raise DataError(f"{folder}: drawing {found.name} failed: {last}")
    finally:
        for helper in helpers:
            helper.kill()
            helper.wait()
    meta = describe(spec)
    shards: dict[str, list[ShardEntry]] = {}
    indexes: dict[str, ShardEntry] = {}
    for split in found.splits:
        paths = [folder / file for of_split, file, *_ in tasks if of_split == split]
        listed = [list_shard(shard) for shard in paths]
        shards[split] = [
            shard_entry(shard, folder, len(part)) for shard, part in zip(paths, listed, strict=True)
        ]
        indexes[split] = write_index(
            folder, split, build_index(listed, shards[split], meta.hashtags, meta.classes), shards
        )
    meta = meta.model_copy(update={"shards": shards, "indexes": indexes})
    write_json(folder / "dataset.json", meta.model_dump(mode="json", by_alias=True))
    return meta


def _tasks(found: Builtin) -> list[tuple[str, str, int, int]]:
    """(split, file, first image, number of images) of every shard."""
    return [
        (split, f"{split}/{first // SHARD_IMAGES:06d}.tar", first, min(SHARD_IMAGES, num - first))
        for split, num in found.splits.items()
        for first in range(0, num, SHARD_IMAGES)
    ]


def _draw_share(folder: Path, found: Builtin, rank: int, ranks: int) -> None:
    module, function = DRAWERS[found.kind].split(":")
    draw: Draw = getattr(importlib.import_module(module), function)
    for split, file, first, num in _tasks(found)[rank::ranks]:
        write_shard(folder / file, draw(split, first, num))


if __name__ == "__main__":
    wanted = builtin(sys.argv[2])
    assert wanted is not None, f"{sys.argv[2]} is no built-in set"
    _draw_share(Path(sys.argv[1]), wanted, int(sys.argv[4]), int(sys.argv[3]))
