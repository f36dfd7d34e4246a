"""Making the built-in set on first use: once, whole or not at all, whoever else wants it too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import harness
from harness.data.index import build_index, shard_entry, write_index
from harness.data.png import encode_png
from harness.data.scenes import draw
from harness.data.shards import Sample, list_shard, write_shard
from harness.errors import DataError
from harness.ledger.files import write_json
from harness.ledger.lease import exclusive
from harness.study import scenes_spec as spec
from harness.study.datasets import DatasetMeta, ShardEntry, describe

SHARD_IMAGES = 4000
"""Another number is another order in sets of more than ORDER_WINDOW: raise scenes_spec.VERSION."""
_PARALLEL_FROM = 20_000
"""Images from which further processes pay for their start."""


def ready_scenes(count: int, root: Path) -> Path:
    """Folder of the built-in set with `count` pretraining images, made now if it is absent."""
    folder = root / "datasets" / f"scenes-{count}-v{spec.VERSION}"
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
            make_scenes(temporary, count, processes=os.cpu_count() or 1)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def make_scenes(folder: Path, count: int, processes: int) -> DatasetMeta:
    """Writes shards, index and dataset.json; the bytes do not depend on `processes`."""
    tasks = _tasks(count)
    num_images = sum(num for *_, num in tasks)
    processes = min(processes, len(tasks)) if num_images >= _PARALLEL_FROM else 1
    # Plain processes, not multiprocessing: the caller may be a daemon, or hold threads of torch.
    command = [sys.executable, "-m", "harness.data.ready", str(folder), str(count), str(processes)]
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
        _draw_share(folder, count, 0, processes)
        for helper in helpers:
            _, stderr = helper.communicate()
            if helper.returncode:
                last = (stderr.strip().splitlines() or ["no message"])[-1]
                raise DataError(f"{folder}: drawing scenes failed: {last}")
    finally:
        for helper in helpers:
            helper.kill()
            helper.wait()
    meta = describe(f"scenes-{count}")
    shards: dict[str, list[ShardEntry]] = {}
    indexes: dict[str, ShardEntry] = {}
    for split in spec.SPLITS:
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


def _tasks(count: int) -> list[tuple[str, str, int, int]]:
    """(split, file, first image, number of images) of every shard."""
    return [
        (split, f"{split}/{first // SHARD_IMAGES:06d}.tar", first, min(SHARD_IMAGES, num - first))
        for split, num in spec.counts(count).items()
        for first in range(0, num, SHARD_IMAGES)
    ]


def _draw_share(folder: Path, count: int, rank: int, ranks: int) -> None:
    for split, file, first, num in _tasks(count)[rank::ranks]:
        write_shard(folder / file, _samples(split, first, num))


def _samples(split: str, first: int, num: int) -> Iterator[Sample]:
    scenes = draw(split, first, num)
    for place in range(num):
        class_id = int(scenes.class_ids[place])
        yield Sample(
            key=f"{split}-{first + place:09d}",
            image=encode_png(scenes.pixels[place]),
            image_type="png",
            hashtags=scenes.hashtags[place] or None,
            class_id=class_id if class_id >= 0 else None,
        )


if __name__ == "__main__":
    _draw_share(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4]), int(sys.argv[3]))
