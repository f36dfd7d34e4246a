"""Images a second of JPEG decoders, and what else an image costs the loader.

    python benchmarks/decoders.py [--repeats 15] [--out benchmarks/results/decoders.json]

Everybody decodes the same JPEGs from memory to RGB, whole, on one core; `draft` and `factor 2` give
half the width and height. `view` is the whole way from bytes to a crop of 224 pixels, by the
decoder that the loader uses. PyTurboJPEG calls the library that simplejpeg brings with it, but only
where the system has it installed: it is measured there and left out elsewhere.

Decoders take turns, in an order that is reversed every time. Rates count the process's CPU time.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader import SCALE, SIDE, SIZES, photos
from machine import machine
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from harness.data import decode


def decoders(files: list[bytes]) -> dict[str, Callable[[bytes], object]]:
    """Name -> a function of a JPEG's bytes."""
    tensors = {raw: torch.frombuffer(bytearray(raw), dtype=torch.uint8) for raw in files}
    out_1CSS = torch.empty((1, SIDE, SIDE, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    numbers = {raw: number for number, raw in enumerate(files)}

    def pillow(raw: bytes) -> object:
        return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))

    def view(raw: bytes) -> object:
        decode.draw_view(out_1CSS, raw, (0, numbers[raw]), SCALE, flip=True)
        return out_1CSS

    found: dict[str, Callable[[bytes], object]] = {
        "Pillow": pillow,
        "Pillow, draft": lambda raw: decode.decode_pillow(raw, 2),
        "torchvision.io": lambda raw: decode_jpeg(tensors[raw], ImageReadMode.RGB),
        "simplejpeg": lambda raw: decode.decode_simplejpeg(raw, 1),
        "simplejpeg, factor 2": lambda raw: decode.decode_simplejpeg(raw, 2),
        "view": view,
    }
    try:
        from turbojpeg import TJPF_RGB, TurboJPEG  # pyright: ignore[reportMissingImports]

        library = TurboJPEG()
    except (ImportError, RuntimeError, OSError):
        return found
    return found | {"PyTurboJPEG": lambda raw: library.decode(raw, TJPF_RGB)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decoders.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"side": SIDE, "repeats": arguments.repeats}
    for name, (width, height, quality, num) in SIZES.items():
        files = list(photos(width, height, quality, num))
        functions = decoders(files)
        ms: dict[str, list[float]] = {arm: [] for arm in functions}
        for repeat in range(arguments.repeats + 1):
            for arm in list(functions) if repeat % 2 else list(functions)[::-1]:
                begin = time.process_time()
                for raw in files:
                    functions[arm](raw)
                if repeat:  # the first warms up
                    ms[arm].append((time.process_time() - begin) / num * 1e3)
        report[name] = {
            "images": num,
            "mean_kB": round(sum(map(len, files)) / num / 1000, 1),
            "ms_per_image": {arm: round(float(np.median(all_)), 3) for arm, all_ in ms.items()},
        }
        print(name, json.dumps(report[name], indent=1))
    names = ("torch", "torchvision", "pillow", "simplejpeg")
    report["machine"] = machine(*names)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
