"""Images a second of the loader, against the usual ones, on photographic JPEGs.

    python benchmarks/loader.py [--repeats 12] [--out benchmarks/results/loader.json]

Everybody reads the same JPEGs and makes batches of 64 random crops of 224 pixels, on one core: one
reading thread here, num_workers=0 in the others. The peers do what their manuals show: webdataset
decodes with Pillow, ImageFolder does by default, both crop with torchvision's RandomResizedCrop
(bicubic) and end with ToTensor and Normalize; here normalising is left to the device, which is part
of the design and of the difference. `decoder alone` decodes the same bytes from memory with the
loader's decoder, whole images, and does nothing else.

Arms take turns in one process, in an order that is reversed every time; ratios are the median of
paired log-ratios with a bootstrap 95 % interval. Rates count the process's own CPU time, so that a
busy machine does not count; the wall clock's are in the file too.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from machine import machine
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from harness.data import cache, decode, loader
from harness.data.dataset import Split, open_dataset
from harness.data.pack import pack
from harness.study.recipes import Augmentation

SIZES = {"500x375": (500, 375, 95, 256), "1280x960": (1280, 960, 88, 128)}
"""Width, height, JPEG quality, images: of ImageNet's size, about 110 kB; and of the web's."""
BATCH, SIDE, SCALE = 64, 224, (0.2, 1.0)


def photos(width: int, height: int, quality: int, num: int) -> Iterator[bytes]:
    """JPEGs cut from scikit-learn's two photographs, enlarged and given a sensor's grain."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    for place in range(num):
        source = sources[place % 2]
        wide = min(source.width, source.height * width / height) * rng.uniform(0.5, 1.0)
        high = wide * height / width
        left, top = rng.uniform(0, source.width - wide), rng.uniform(0, source.height - high)
        box = (left, top, left + wide, top + high)
        pixels = np.asarray(source.resize((width, height), Image.Resampling.BICUBIC, box=box))
        grainy = pixels + rng.normal(0, 5, (height, width, 1))
        file = io.BytesIO()
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
        yield file.getvalue()


def arms(folder: Path, name: str) -> tuple[dict[str, Callable[[], int]], dict[str, Any]]:
    """Name -> a function that reads every image once and returns their number."""
    width, height, quality, num = SIZES[name]
    source = folder / name / "images"
    files = list(photos(width, height, quality, num))
    for place, raw in enumerate(files):
        path = source / str(place % 4) / f"{place:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    out = folder / name / "packed"
    pack(str(source), out, split="train", layout="image-folder")
    split = open_dataset(str(out), folder / name).split("train")
    shards = sorted(map(str, (out / "train").glob("*.tar")))
    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                SIDE, scale=SCALE, interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images = datasets.ImageFolder(str(source), view)

    def ours() -> int:
        return sum(len(batch.images) for batch in _ours(split, num))

    def web() -> int:
        samples = webdataset.WebDataset(shards, shardshuffle=False).shuffle(num).decode("pil")
        tuples = samples.to_tuple("jpg", "cls").map_tuple(view, int).batched(BATCH, partial=False)
        return sum(len(batch[0]) for batch in DataLoader(tuples, batch_size=None, num_workers=0))

    def folders() -> int:
        batches = DataLoader(images, BATCH, shuffle=True, num_workers=0, drop_last=True)
        return sum(len(batch[0]) for batch in batches)

    def alone() -> int:
        for raw in files:
            decode.DEFAULT(raw, 1)
        return len(files)

    about = {"images": num, "mean_kB": round(sum(map(len, files)) / num / 1000, 1)}
    return {
        "harness": ours,
        "webdataset": web,
        "ImageFolder": folders,
        "decoder alone": alone,
    }, about


def _ours(split: Split, num: int) -> Iterator[loader.Batch]:
    return loader.train_batches(
        split,
        split.stream(num, seed=0),
        batch=BATCH,
        start_step=0,
        num_steps=num // BATCH,
        rank=0,
        ranks=1,
        image_size=SIDE,
        augment=Augmentation(crop_scale=SCALE),
        threads=1,
    )


def measure(functions: dict[str, Callable[[], int]], repeats: int) -> dict[str, dict[str, Any]]:
    """Images a second of each repeat, by CPU time and by the wall clock."""
    rates: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in functions}
    for repeat in range(repeats + 1):
        names = list(functions) if repeat % 2 else list(functions)[::-1]
        for name in names:
            wall, cpu = time.perf_counter(), time.process_time()
            count = functions[name]()
            if repeat:  # the first warms up
                rates[name]["cpu"].append(count / (time.process_time() - cpu))
                rates[name]["wall"].append(count / (time.perf_counter() - wall))
    return rates


def ratio(above: list[float], below: list[float]) -> list[float]:
    """Median of the paired ratios and its bootstrap 95 % interval."""
    logs = np.log(np.array(above) / np.array(below))
    draws = np.random.default_rng(0).choice(logs, (10_000, len(logs)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return [round(float(np.exp(x)), 3) for x in (np.median(logs), low, high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loader.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cache.CACHE_BYTES = 0  # sets of these sizes would be decoded once and for all
    report: dict[str, Any] = {"batch": BATCH, "side": SIDE, "repeats": arguments.repeats}
    with tempfile.TemporaryDirectory() as folder:
        for name in SIZES:
            functions, about = arms(Path(folder), name)
            rates = measure(functions, arguments.repeats)
            report[name] = about | {
                "images_per_core_second": {
                    arm: round(float(np.median(found["cpu"])), 1) for arm, found in rates.items()
                },
                "images_per_wall_second": {
                    arm: round(float(np.median(found["wall"])), 1) for arm, found in rates.items()
                },
                "harness_over": {
                    arm: ratio(rates["harness"]["cpu"], found["cpu"])
                    for arm, found in rates.items()
                    if arm != "harness"
                },
            }
            print(name, json.dumps(report[name], indent=1))
    names = ("torch", "torchvision", "pillow", "simplejpeg", "webdataset")
    report["machine"] = machine(*names)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
