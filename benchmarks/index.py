"""An index of many samples: time to open it, to the first batch, and memory; `--help` for options.

Each measurement is a fresh process, as a worker is. The index is written once to a folder and read
from the page cache; so is the order of a subset or a resampled set, which the first run that needs
it sorts (`first_run_s`). Memory: what the process holds for itself (anonymous pages) and in all
(mapped pages of the file too, which processes share), from the kernel's own count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine

SHARD = 10_000


def build(path: Path, num: int) -> None:
    """Writes an index of `num` samples with keys of 12 bytes and 3 labels each."""
    from harness.data.hashing import mix
    from harness.data.index import finish_index, save_index

    digits = np.arange(num)[:, None] // 10 ** np.arange(11, -1, -1) % 10 + ord("0")
    index = finish_index(
        shard_rows=np.minimum(np.arange(0, num + SHARD, SHARD), num).astype(np.int64),
        starts=np.arange(num, dtype=np.int64) % SHARD * 102_400,
        lengths=np.full(num, 102_400, np.uint32),
        image_starts=np.full(num, 512, np.uint32),
        image_sizes=np.full(num, 100_000, np.uint32),
        crcs=np.zeros(num, np.uint32),
        class_ids=np.full(num, -1, np.int32),
        label_offsets=np.arange(num + 1, dtype=np.int64) * 3,
        label_ids=(mix(np.arange(3 * num, dtype=np.uint64)) % np.uint64(28_000)).astype(np.int32),
        key_offsets=np.arange(num + 1, dtype=np.int64) * 12,
        key_bytes=digits.astype(np.uint8).reshape(-1),
        key_hashes=mix(np.arange(num, dtype=np.uint64)),
    )
    save_index(index, path, entries(num))


def entries(num: int) -> list[dict[str, str | int]]:
    """The shards of the index."""
    return [{"file": f"{k}.tar", "sha256": f"{k:064d}"} for k in range(-(-num // SHARD))]


def measure(
    path: Path, num: int, position: int, subset: int, resample: float | None
) -> dict[str, float]:
    """Seconds and bytes of one process that opens the index and draws a batch of 256."""
    from harness.data.index import load_index
    from harness.data.kept_order import kept
    from harness.data.order import Arrangement, Stream, arrange
    from harness.data.resample import expected_counts

    shards = entries(num)
    before = _memory()
    started = time.perf_counter()
    index = load_index(path, shards)
    assert index is not None
    opened = time.perf_counter()

    def make() -> Arrangement:
        repeats = None
        if resample:
            repeats = expected_counts(index, index.by_hash[:subset], round(subset * resample))
        return arrange(index.by_hash, index.shard_rows, subset, repeats)

    if subset == num and not resample:
        arrangement = make()
    else:
        arrangement = kept(path.parent / "order", [subset, resample], make)
    stream = Stream(index.by_hash, index.shard_rows, subset, 0, arrangement=arrangement)
    rows = stream.at(position, 256).rows
    keys = [index.keys[row] for row in rows.tolist()]
    done = time.perf_counter()
    assert len(keys) == 256
    after = _memory()
    return {
        "open_s": opened - started,
        "first_batch_s": done - opened,
        "own_bytes": after["Anonymous"] - before["Anonymous"],
        "all_bytes": after["Rss"] - before["Rss"],
    }


def _memory() -> dict[str, int]:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--position", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/index.json"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    num, position = arguments.samples, arguments.position
    if arguments.child:
        path, subset, resample = arguments.child
        found = measure(Path(path), num, position, int(subset), float(resample) or None)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.safetensors"
        build(path, num)
        size = path.stat().st_size
        results: dict[str, object] = {}
        for name, subset, resample in (
            ("all", num, 0),
            ("subset of half", num // 2, 0),
            ("subset of 99 %", num * 99 // 100, 0),
            ("resampled by 5/3", num, 5 / 3),
        ):
            options = ["--samples", str(num), "--position", str(position)]
            command = [sys.executable, __file__, *options, "--child", str(path), str(subset)]
            command.append(str(resample))
            runs = [
                json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                for _ in range(1 + arguments.repeats)
            ]
            first = runs.pop(0)["first_batch_s"]
            worst = {key: max(run[key] for run in runs) for key in runs[0]}
            results[name] = {**worst, "first_run_s": first}
    report = {
        "samples": num,
        "position": position,
        "repeats": arguments.repeats,
        "shown": "worst of the repeats",
        "file_bytes": size,
        "results": results,
        "machine": machine(),
    }
    text = json.dumps(report, indent=1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
