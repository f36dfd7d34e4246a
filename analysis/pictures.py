"""Original, masked and reconstructed images of each MAE run, as strips."""

from __future__ import annotations

import base64
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from PIL import Image

from analysis import style
from analysis.load import StudyData

ROWS = ("masked", "reconstructed", "original")
MAX_STRIPS = 24
_MAX_WIDTH = 900
_GAP = 2


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One run's pictures: a row each of `ROWS`, a column per image."""

    stage: str
    caption: str
    pixels: NDArray[np.uint8] | None
    """[H, W, 4], transparent between the images; None if they cannot be shown."""
    problem: str = ""

    @property
    def data_uri(self) -> str:
        """The strip as a PNG inside an address."""
        assert self.pixels is not None
        buffer = io.BytesIO()
        Image.fromarray(self.pixels, "RGBA").save(buffer, format="PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def strips(study: StudyData) -> tuple[tuple[Strip, ...], int]:
    """A strip per MAE stage, those that are not done say so; and how many beyond `MAX_STRIPS`."""
    seen: dict[str, str] = {}
    for stages, size, seed in zip(
        *(study.cells[name] for name in ("stages", "size", "seed")), strict=True
    ):
        stage = stages.get("mae")
        if stage is not None:
            seen.setdefault(stage, f"{size}, seed {seed}")
    out = []
    for stage_id, caption in list(seen.items())[:MAX_STRIPS]:
        stage = study.stages[stage_id]
        if stage.state != "done":
            out.append(Strip(stage=stage_id, caption=caption, pixels=None, problem=stage.state))
            continue
        loss = stage.result.get("metrics", {}).get("val_loss")
        if isinstance(loss, (int, float)):
            caption += f", validation loss {loss:.3f}"
        try:
            pixels, problem = _mosaic(stage.folder.path / "reconstructions.npz"), ""
        except FileNotFoundError:
            pixels, problem = None, "no reconstructions.npz"
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            pixels, problem = None, f"reconstructions.npz cannot be read: {error}"
        out.append(Strip(stage=stage_id, caption=caption, pixels=pixels, problem=problem))
    return tuple(out), max(0, len(seen) - MAX_STRIPS)


def _mosaic(path: Path) -> NDArray[np.uint8]:
    with np.load(path, allow_pickle=False) as arrays:
        rows = [arrays[name] for name in ROWS]
    count, height, width, channels = rows[0].shape
    if any(r.shape != rows[0].shape or r.dtype != np.uint8 for r in rows) or channels != 3:
        raise ValueError(f"expected uint8 images of one shape, found {[r.shape for r in rows]}")
    count = max(1, min(count, _MAX_WIDTH // (width + _GAP)))
    canvas = np.zeros(
        (len(ROWS) * (height + _GAP) - _GAP, count * (width + _GAP) - _GAP, 4), dtype=np.uint8
    )
    for i, images in enumerate(rows):
        for j in range(count):
            y, x = i * (height + _GAP), j * (width + _GAP)
            canvas[y : y + height, x : x + width, :3] = images[j]
            canvas[y : y + height, x : x + width, 3] = 255
    return canvas


def save(found: tuple[Strip, ...], folder: Path, name: str) -> None:
    """All strips in one figure: <name>.svg and .png; none where there is no picture."""
    shown = [s for s in found if s.pixels is not None]
    if not shown:
        return
    folder.mkdir(parents=True, exist_ok=True)
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    with style.apply():
        drawing, axes = plt.subplots(
            *(rows, columns),
            figsize=(6.2 * columns, 2.7 * rows),
            squeeze=False,
            layout="constrained",
        )
        for ax in axes.ravel():
            ax.set_axis_off()
        for strip, ax in zip(shown, axes.ravel(), strict=False):
            assert strip.pixels is not None
            ax.imshow(strip.pixels, interpolation="nearest")
            ax.set_title(strip.caption)
        drawing.savefig(folder / f"{name}.png")
        drawing.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
        plt.close(drawing)
